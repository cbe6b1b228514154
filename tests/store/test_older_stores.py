"""SQLite stores of earlier versions.

What was in them is there afterwards, and what they left under way is recovered.
"""

from __future__ import annotations

import json
import sqlite3
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from store_contract import log, say, user

from pensieve.errors import StoreError
from pensieve.message import Message, path_digests
from pensieve.store import Lease, SqliteStore, path_messages, schema
from pensieve.store.schema import MIGRATIONS


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "conversations.db"


def version(path: Path) -> int:
    connection = sqlite3.connect(path)
    try:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])
    finally:
        connection.close()


# -- the first version's files


def make_version_1(path: Path) -> None:
    """A file as the first version wrote it: two trees, a branch, a fork, titles."""
    connection = schema.open_for_writing(path, 5, (schema._create,))
    connection.execute("BEGIN")
    for key, (id, leaf, title) in enumerate(
        (("one", "c", 'A "title"'), ("two", "b", None), ("three", "x", "")), start=1
    ):
        connection.execute(
            "INSERT INTO conversations VALUES (?, 'a', ?, NULL, 1.5, ?, ?, ?)",
            (key, id, 10.0 + key, title, '{"k": 1}'),
        )
        turns = {
            "one": [
                ("a", None, "a", 0, [["system", "be kind"], ["user", "hi"]]),
                ("c", "b", "a", 4, [["user", "left"]]),
            ],
            "two": [
                ("b", "a", "a", 2, [["assistant", " hello \ud800"]]),
                ("d", "b", "a", 4, [["tool", "right"]]),
                ("e", "d", "a", 6, []),
            ],
            "three": [("x", None, "x", 0, [["user", "hi"]])],
        }[id]
        connection.execute("PRAGMA defer_foreign_keys = ON")
        for turn, parent, root, start, messages in turns:
            row = (
                turn,
                "a",
                key,
                root,
                parent,
                start,
                start + 2,
                struct.pack("<2I", start, start + 1),
                json.dumps(messages),
                "stop",
                2.5,
            )
            connection.execute("INSERT INTO turns VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        connection.execute("UPDATE conversations SET leaf = ? WHERE key = ?", (leaf, key))
    connection.execute("COMMIT")
    connection.close()
    assert version(path) == 1


def check_version_1(path: Path) -> None:
    with SqliteStore(path) as store:
        assert version(path) == len(MIGRATIONS)
        assert [(c.id, c.title, c.leaf, c.expires_s, c.pinned) for c in store.list("a")] == [
            ("three", "", "x", None, False),
            ("two", None, "b", None, False),
            ("one", 'A "title"', "c", None, False),
        ]
        for turn_id, length in (("a", 1), ("b", 2), ("c", 3), ("d", 3), ("e", 4), ("x", 1)):
            turns = store.path("a", turn_id)
            assert len(turns) == length
            assert turns[-1].digest == path_digests(path_messages(turns))[-1]
            assert turns[-1].meta == {}
        assert log(store, "one") == [0, 1, 2, 3, 4, 5]
        asked = [*path_messages(store.path("a", "c")), Message("user", "more")]
        found = store.find("a", path_digests(asked))
        assert found is not None
        assert (found[0], found[1].id) == (3, "c")
        on = say(store, "one", "on", [9])
        assert on.digest == path_digests(path_messages(store.path("a", on.id)))[-1]
        store.delete("a", "two")
        assert log(store, "one")[-1] == 9


def test_a_file_of_the_first_version_is_brought_up_to_date(path: Path) -> None:
    make_version_1(path)
    check_version_1(path)


def test_the_migration_test_sees_a_wrong_hash(path: Path) -> None:
    make_version_1(path)

    def broken(connection: sqlite3.Connection) -> None:
        schema._answers(connection)
        connection.execute("UPDATE turns SET digest = x'00' WHERE id = 'b'")

    SqliteStore(path, migrations=(schema._create, broken, schema._owners)).close()
    with pytest.raises(StoreError, match="turn 'b' is not what was written"):
        check_version_1(path)


# -- the second version's files


def make_version_2(path: Path) -> None:
    """A file as the second version left it at a crash.

    Answers under way and recovered ones, each with a key, and times to live.
    """
    connection = schema.open_for_writing(path, 5, (schema._create, schema._answers))
    connection.execute("BEGIN")
    conversation = "INSERT INTO conversations VALUES (?, 'a', ?, NULL, 100.0, 200.0, NULL, '{}', ?, 0)"
    for key, (id, expires_s) in enumerate((("one", None), ("soon", 230.0), ("used since", 150.0)), start=1):
        connection.execute(conversation, (key, id, expires_s))
    turn = "INSERT INTO turns VALUES (?, 'a', 1, ?, NULL, 0, 2, ?, ?, ?, 2.5, ?, '{}')"
    for id, reason in (
        ("whole", "stop"),
        ("long", "length"),
        ("fragment", "interrupted"),
        ("late", "abort"),
        ("items", None),
    ):
        digest = path_digests([Message("user", id)])[-1]
        connection.execute(
            turn, (id, id, struct.pack("<2I", 1, 2), json.dumps([["user", id]]), reason, digest)
        )
    draft = "INSERT INTO drafts VALUES (?, ?, 1, NULL, 0, ?, ?, '{}', 3.5)"
    for id, owner in (("under way", "host:8000"), ("elsewhere", "host:0")):
        connection.execute(draft, (id, owner, struct.pack("<I", 1), json.dumps([["user", id]])))
        connection.execute(
            "INSERT INTO draft_tokens VALUES (?, 0, ?, ?)", (id, struct.pack("<I", 2), json.dumps("half an"))
        )
    now_s = time.time()
    for id in ("whole", "long", "fragment", "late", "items", "under way", "elsewhere", "not begun"):
        connection.execute("INSERT INTO claims VALUES ('a', ?, x'01', ?, ?)", (id, id, now_s))
    connection.execute("COMMIT")
    connection.close()
    assert version(path) == 2


def test_a_file_of_the_second_version_is_brought_up_to_date(path: Path) -> None:
    make_version_2(path)
    with SqliteStore(path) as store:
        assert version(path) == 3
        lease = Lease(store)
        assert lease.num_recovered == 2  # whatever their owners were called: none of them has a lease
        for id in ("under way", "elsewhere"):
            turn = store.turn("a", id)
            assert (turn.reply_reason, turn.token_ids, turn.messages[-1]) == (
                "interrupted",
                (1, 2),
                Message("assistant", "half an"),
            )
        kept = {
            id: store.claim("a", id, b"\x01", "again", owner=lease.owner) for id in ("whole", "long", "items")
        }
        assert {id: (claim.fresh, claim.stored, claim.turn_id) for id, claim in kept.items()} == {
            id: (False, True, id) for id in kept
        }
        for id in ("fragment", "late", "under way", "elsewhere", "not begun"):
            assert store.claim("a", id, b"\x01", f"again {id}", owner=lease.owner).fresh, id
        times = {one.id: (one.ttl_s, one.expires_s) for one in store.list("a")}
        assert times == {"one": (None, None), "soon": (30.0, 230.0), "used since": (50.0, 150.0)}
        assert store.path("a", "whole")[0].messages == (Message("user", "whole"),)
        on = store.append("a", "one", "whole", user("on"), [3]).result(timeout=30)
        assert log(store, "one") == [1, 2, 3] and store.path("a", on.id)[-1] == on
        lease.close()


OPEN = "import sys; from pensieve.store import Lease, SqliteStore; store = SqliteStore(sys.argv[1], busy_timeout_s=30); print(Lease(store).num_recovered)"


def test_many_processes_open_an_older_file_at_once(path: Path) -> None:
    make_version_2(path)
    children = [
        subprocess.Popen([sys.executable, "-c", OPEN, str(path)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = [child.communicate(timeout=60)[0] for child in children]
    assert sorted(int(line) for line in said) == [0, 0, 0, 2]
