"""The SQLite store: the contract, and what only a file can get wrong."""

from __future__ import annotations

import contextlib
import json
import random
import sqlite3
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pensieve.chat import Message, path_digests
from pensieve.errors import ConversationNotFound, StoreError
from pensieve.store import Lease, SqliteStore, default_path, path_messages, schema
from pensieve.store.schema import APPLICATION_ID, MIGRATIONS, connect
from store.owners_contract import OwnersContract
from store.store_contract import ConversationStoreContract, log, say, user


class InMemory:
    @pytest.fixture
    def new_store(self) -> Iterator[Callable[[], SqliteStore]]:
        made: list[SqliteStore] = []
        yield lambda: made.append(SqliteStore(":memory:")) or made[-1]  # type: ignore[func-returns-value]
        for store in made:
            store.close()


class InFile:
    @pytest.fixture
    def new_store(self, tmp_path: Path) -> Iterator[Callable[[], SqliteStore]]:
        made: list[SqliteStore] = []
        yield lambda: made.append(SqliteStore(tmp_path / f"{len(made)}.db")) or made[-1]  # type: ignore[func-returns-value]
        for store in made:
            store.close()


class TestInMemory(InMemory, ConversationStoreContract):
    pass


class TestFile(InFile, ConversationStoreContract):
    pass


class TestOwnersInMemory(InMemory, OwnersContract):
    pass


class TestOwnersInFile(InFile, OwnersContract):
    pass


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "conversations.db"


def test_a_file_outlives_its_store(path: Path) -> None:
    with SqliteStore(path) as store:
        store.create("a", "one")
        say(store, "one", "hi", [1, 2])
    with SqliteStore(path) as store:
        assert log(store, "one") == [1, 2]


def test_a_file_is_its_owners_alone(tmp_path: Path) -> None:
    with SqliteStore(tmp_path / "new" / "folder" / "c.db"):
        files = list((tmp_path / "new" / "folder").iterdir())
    assert {stat.S_IMODE(file.stat().st_mode) for file in files if file.exists()} == {0o600}


def test_the_default_path_is_in_the_users_data() -> None:
    assert default_path().name == "conversations.db"
    assert "pensieve" in default_path().parts


# -- durability and groups


def trace(store: SqliteStore) -> list[str]:
    """The statements that the writer runs from now on."""
    statements: list[str] = []
    store._writer.call(lambda connection: connection.set_trace_callback(statements.append))
    return statements


def hold(store: SqliteStore) -> threading.Event:
    """Keep the writer busy, inside its transaction, until the event is set."""
    release, held = threading.Event(), threading.Event()

    def job(connection: sqlite3.Connection) -> None:
        held.set()
        assert release.wait(30)

    store._writer.submit(job)
    assert held.wait(30)
    return release


def test_turns_that_wait_are_committed_together(path: Path) -> None:
    with SqliteStore(path) as store:
        store.create("a", "one")
        statements = trace(store)
        release = hold(store)
        futures = [store.append("a", "one", None, user("x"), [i]) for i in range(200)]
        assert not any(future.done() for future in futures)  # nothing is acknowledged before its commit
        release.set()
        for future in futures:
            future.result(timeout=30)
        assert statements.count("COMMIT") == 3  # the trace's own, the one that was held, and one for all


def test_alone_each_turn_has_its_commit(path: Path) -> None:
    with SqliteStore(path) as store:
        store.create("a", "one")
        statements = trace(store)
        for i in range(5):
            store.append("a", "one", None, user("x"), [i]).result(timeout=30)
        assert statements.count("COMMIT") == 6


def test_a_commit_is_flushed_to_the_disk(path: Path) -> None:
    with SqliteStore(path) as store:
        pragma = "PRAGMA synchronous"
        assert store._writer.call(lambda connection: connection.execute(pragma).fetchone()[0]) == 2  # FULL
        assert store._writer.call(lambda connection: connection.execute("PRAGMA journal_mode").fetchone()[0]) == "wal"


def test_a_cancelled_append_is_not_stored(path: Path) -> None:
    with SqliteStore(path) as store:
        store.create("a", "one")
        release = hold(store)
        futures = [store.append("a", "one", None, user("x"), [i]) for i in range(3)]
        assert futures[1].cancel()
        release.set()
        ids = [futures[0].result(timeout=30).id, futures[2].result(timeout=30).id]
        rows = store._writer.call(lambda connection: connection.execute("SELECT id FROM turns").fetchall())
        assert sorted(row[0] for row in rows) == sorted(ids)


# -- failures


def set_room(store: SqliteStore, pages: int) -> None:
    def job(connection: sqlite3.Connection) -> None:
        used = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {used + pages}")

    store._writer.call(job)


def test_a_full_disk_fails_the_turn_and_nothing_else(path: Path) -> None:
    with SqliteStore(path) as store:
        store.create("a", "one")
        set_room(store, 3)
        release = hold(store)
        big = list(range(100_000))
        futures = [store.append("a", "one", None, user("x"), token_ids) for token_ids in ([1], big, [2])]
        release.set()
        assert futures[0].result(timeout=30).token_ids == (1,)
        with pytest.raises(StoreError, match=r"^the conversation store failed: database or disk is full"):
            futures[1].result(timeout=30)
        assert futures[2].result(timeout=30).token_ids == (2,)
        assert log(store, "one") == [2]
        set_room(store, 100_000)
        assert len(store.append("a", "one", None, user("x"), big).result(timeout=30).token_ids) == len(big)


def test_a_commit_that_fails_is_tried_turn_by_turn(path: Path) -> None:
    """A deferred foreign key makes COMMIT itself fail, for one turn of the group."""
    with SqliteStore(path) as store:
        store.create("a", "one")

        def poison(connection: sqlite3.Connection) -> None:
            connection.execute("CREATE TABLE IF NOT EXISTS p (t TEXT REFERENCES turns (id) DEFERRABLE INITIALLY DEFERRED)")
            connection.execute("INSERT INTO p VALUES ('nowhere')")

        release = hold(store)
        first = store.append("a", "one", None, user("x"), [1])
        poisoned = store._writer.submit(poison)
        second = store.append("a", "one", None, user("x"), [2])
        release.set()
        assert first.result(timeout=30).token_ids == (1,)
        assert isinstance(poisoned.exception(timeout=30), StoreError)
        assert second.result(timeout=30).token_ids == (2,)
        assert log(store, "one") == [2]


def test_a_job_that_fails_halfway_leaves_nothing(path: Path) -> None:
    with SqliteStore(path) as store:
        store.create("a", "one")
        turn = say(store, "one", "x", [1])

        def half(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE conversations SET leaf = NULL")
            raise RuntimeError("halfway")

        release = hold(store)
        failed = store._writer.submit(half)
        after = store.append("a", "one", turn.id, user("y"), [2])
        seen = store._writer.submit(
            lambda connection: connection.execute("SELECT count(*) FROM conversations WHERE leaf IS NULL").fetchone()
        )
        release.set()
        assert isinstance(failed.exception(timeout=30), RuntimeError)
        assert seen.result(timeout=30) == (0,)
        assert store.get("a", "one").leaf == after.result(timeout=30).id


def test_nobody_waits_for_a_job_that_breaks_the_writer(path: Path) -> None:
    with SqliteStore(path) as store:
        store.create("a", "one")

        def broken(connection: sqlite3.Connection) -> None:
            raise SystemExit

        release = hold(store)
        futures = [store.append("a", "one", None, user("x"), [1]), store._writer.submit(broken)]
        release.set()
        for future in futures:
            assert isinstance(future.exception(timeout=30), StoreError)
        assert say(store, "one", "x", [2]).token_ids == (2,)


def test_a_lock_that_does_not_end_fails_the_turn(path: Path) -> None:
    with SqliteStore(path, busy_timeout_s=0.05) as store:
        store.create("a", "one")
        other = connect(path, 0.05)
        other.execute("BEGIN IMMEDIATE")
        futures = [store.append("a", "one", None, user("x"), [i]) for i in range(3)]
        for future in futures:
            with pytest.raises(StoreError, match="database is locked"):
                future.result(timeout=30)
        assert log(store, "one") == []  # reading goes on
        other.execute("ROLLBACK")
        other.close()
        assert say(store, "one", "x", [9]).token_ids == (9,)


def test_a_lock_that_ends_is_waited_for(path: Path) -> None:
    with SqliteStore(path, busy_timeout_s=30) as store:
        store.create("a", "one")
        other = connect(path, 1)
        other.execute("BEGIN IMMEDIATE")
        future = store.append("a", "one", None, user("x"), [1])
        threading.Timer(0.1, other.execute, ["ROLLBACK"]).start()
        assert future.result(timeout=30).token_ids == (1,)
        other.close()


def test_what_cannot_be_opened_is_said(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreError, match=r"cannot open the conversation store .*garbage.db: file is not a database"):
        SqliteStore(garbage)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot open"):
        SqliteStore(tmp_path / "file" / "c.db")


# -- two processes

CHILD = """
import sys
from pensieve.chat import Message
from pensieve.store import SqliteStore
store = SqliteStore(sys.argv[1], busy_timeout_s=30)
for i in range(30):
    store.append("a", sys.argv[2], store.get("a", sys.argv[2]).leaf, [Message("user", "x")], [i]).result()
store.close()
"""


def test_two_processes_share_a_file(path: Path) -> None:
    with SqliteStore(path, busy_timeout_s=30) as store:
        store.create("a", "theirs")
        store.create("a", "ours")
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(path), "theirs"])
        for i in range(30):
            say(store, "ours", "x", [i])
        assert child.wait(60) == 0
        assert log(store, "ours") == log(store, "theirs") == list(range(30))


def test_a_second_store_sees_what_the_first_acknowledged(path: Path) -> None:
    with SqliteStore(path) as one, SqliteStore(path) as two:
        one.create("a", "one")
        for i in range(5):
            say(one if i % 2 else two, "one", "x", [i])
            assert log(one, "one") == log(two, "one") == list(range(i + 1))


def test_many_open_a_new_file_at_once(path: Path) -> None:
    made: list[SqliteStore | BaseException] = []

    def open_() -> None:
        try:
            made.append(SqliteStore(path, busy_timeout_s=30))
        except BaseException as error:
            made.append(error)

    threads = [threading.Thread(target=open_) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(store) for store in made] == [SqliteStore] * 8
    for store in made:
        assert isinstance(store, SqliteStore)
        store.close()


def test_a_file_that_another_makes_while_we_look_is_ours(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one state for all that is looked at: no mark of ours yet, but tables already."""
    meddled: list[str] = []

    def interrupted(path: Path | None, busy_timeout_s: float) -> sqlite3.Connection:
        connection = connect(path, busy_timeout_s)

        def meddle(statement: str) -> None:
            if "sqlite_master" in statement and not meddled:
                meddled.append(statement)
                with contextlib.suppress(StoreError):  # locked out, as it should be
                    SqliteStore(str(path), busy_timeout_s=0).close()

        connection.set_trace_callback(meddle)
        return connection

    monkeypatch.setattr(schema, "connect", interrupted)
    with SqliteStore(path) as store:
        assert store.create("a", "one").id == "one"
    assert meddled


# -- schema versions


def add_colour(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE conversations ADD COLUMN colour TEXT NOT NULL DEFAULT 'grey'")


def version(path: Path) -> int:
    connection = sqlite3.connect(path)
    try:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])
    finally:
        connection.close()


def test_an_empty_file_becomes_a_store(path: Path) -> None:
    path.touch()
    assert version(path) == 0
    SqliteStore(path).close()
    assert version(path) == len(MIGRATIONS)


def test_an_older_file_is_brought_up_to_date(path: Path) -> None:
    with SqliteStore(path) as store:
        store.create("a", "one")
        say(store, "one", "hi", [1])
    with SqliteStore(path, migrations=(*MIGRATIONS, add_colour)) as store:
        assert log(store, "one") == [1]
        assert store._writer.call(lambda c: c.execute("SELECT colour FROM conversations").fetchall()) == [("grey",)]
        assert store.create("a", "two").id == "two"
    assert version(path) == len(MIGRATIONS) + 1


def test_a_migration_that_fails_changes_nothing(path: Path) -> None:
    with SqliteStore(path) as store:
        store.create("a", "one")

    def broken(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE half (done INTEGER)")
        connection.execute("nonsense")

    with pytest.raises(StoreError, match="nonsense"):
        SqliteStore(path, migrations=(*MIGRATIONS, add_colour, broken))
    assert version(path) == len(MIGRATIONS)
    with SqliteStore(path) as store:
        tables = store._writer.call(lambda c: c.execute("SELECT count(*) FROM sqlite_master WHERE name = 'half'").fetchone())
        assert tables == (0,)
        assert store.get("a", "one").id == "one"


def test_a_newer_file_is_left_alone(path: Path) -> None:
    SqliteStore(path, migrations=(*MIGRATIONS, add_colour)).close()
    before = path.read_bytes()
    newer, known = len(MIGRATIONS) + 1, len(MIGRATIONS)
    with pytest.raises(StoreError, match=f"schema version {newer}, this program knows versions up to {known}"):
        SqliteStore(path)
    assert path.read_bytes() == before


def test_another_programs_database_is_left_alone(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="a database of some other program"):
        SqliteStore(path)
    assert path.read_bytes() == before


def test_ours_can_be_told_from_others(path: Path) -> None:
    SqliteStore(path).close()
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    connection.close()


# -- erasing

MARKER = "a marker that is nowhere else"


def remains(path: Path, marker: str = MARKER) -> bool:
    """Whether a text is anywhere in the store's files."""
    files = [path, path.with_name(path.name + "-wal")]
    return any(marker.encode() in file.read_bytes() for file in files if file.exists())


def fill(store: SqliteStore) -> None:
    """Two conversations, one of them with the marker everywhere it can be, an answer under way included."""
    for name in ("kept", "secret"):
        store.create("a", name, title=MARKER if name == "secret" else "kept")
    for i in range(40):
        say(store, "kept", f"kept {i}" * 20, [i] * 50)
        say(store, "secret", MARKER * (1 + i * 7 % 150), [i] * 50, meta={"k": MARKER})
    store.draft("a", "secret", None, "d", user(MARKER), [1], 0, 1, {"k": MARKER}).result(timeout=30)
    store.extend_draft("d", [2], MARKER).result(timeout=30)


def test_what_was_erased_is_nowhere_in_the_files(path: Path) -> None:
    with SqliteStore(path) as store:
        fill(store)
        assert remains(path)
        erased = store.erase("a", "secret")
        assert (erased.turns, erased.complete) == (40, True)
        assert not remains(path)
        assert log(store, "kept") == [i for i in range(40) for _ in range(50)]
    assert not remains(path)


def test_without_secure_delete_it_would_be_there(path: Path) -> None:
    with SqliteStore(path, rebuild_bytes=0) as store:
        store._writer.call(lambda connection: connection.execute("PRAGMA secure_delete = OFF").fetchone(), alone=True)
        fill(store)
        assert not store.erase("a", "secret").complete
        assert remains(path)


def come_and_go(path: Path, seed: int, last: int, rebuild_bytes: int) -> bool:
    """Let conversations come and go, `last` steps, erase one more, and say whether it can be read in the files."""
    chance, alive = random.Random(seed), list[str]()
    with SqliteStore(path, rebuild_bytes=rebuild_bytes) as store:
        store._writer.call(lambda connection: connection.execute("PRAGMA synchronous = OFF").fetchone(), alone=True)
        for number in range(last + 1):
            if len(alive) < 10 or chance.random() < 0.75:
                if not alive or chance.random() < 0.3:
                    alive.append(store.create("a", f"c{number:03}").id)
                id = chance.choice(alive)
                store.append(
                    "a", id, None, user(f"<{id}> lorem ipsum " * chance.randint(1, 60)), [7] * chance.choice([5, 50, 500])
                ).result()
            else:
                id = alive.pop(chance.randrange(len(alive)))
                if number == last:
                    assert store.erase("a", id).complete == (rebuild_bytes > 0)
                    return remains(path, f"<{id}>")
                store.delete("a", id)
    return False


def test_rebuilding_does_away_with_what_secure_delete_leaves(tmp_path: Path) -> None:
    """SQLite copies rows from page to page, and the free space of the old page keeps their bytes."""
    for seed, last in ((48, 168), (84, 210), (47, 245)):  # found by trying; so it is with SQLite 3.40
        if come_and_go(tmp_path / f"{seed}.db", seed, last, rebuild_bytes=0):
            assert not come_and_go(tmp_path / "rebuilt.db", seed, last, rebuild_bytes=1 << 30)
            return
    pytest.skip("this SQLite left nothing behind in three histories")


def test_a_reader_that_holds_the_log_makes_erasing_incomplete(path: Path) -> None:
    with SqliteStore(path, busy_timeout_s=0.2) as store:
        fill(store)
        reader = connect(path, 1, read_only=True)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM turns").fetchone()
        erased = store.erase("a", "secret")
        assert not erased.complete
        assert erased.turns == 40
        assert remains(path)
        with pytest.raises(ConversationNotFound):  # gone for everybody who looks now
            store.get("a", "secret")
        reader.execute("ROLLBACK")
        reader.close()
        store.create("a", "another")
        assert store.erase("a", "another").complete
        assert not remains(path)


def test_a_reader_that_ends_is_waited_for(path: Path) -> None:
    with SqliteStore(path, busy_timeout_s=30) as store:
        fill(store)
        reader = connect(path, 1, read_only=True)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM turns").fetchone()
        timer = threading.Timer(0.3, reader.execute, ["ROLLBACK"])
        timer.start()
        assert store.erase("a", "secret").complete
        assert not remains(path)
        timer.join()
        reader.close()


def test_turns_are_written_while_others_erase(path: Path) -> None:
    with SqliteStore(path, busy_timeout_s=30) as store:
        store.create("a", "one")
        for i in range(8):
            store.create("a", f"gone {i}")
            say(store, f"gone {i}", MARKER, [i])

        def erase(i: int) -> bool:
            return store.erase("a", f"gone {i}").complete

        with ThreadPoolExecutor(4) as pool:
            done = [pool.submit(erase, i) for i in range(8)]
            for i in range(50):
                say(store, "one", "x", [i])
            assert all(future.result(timeout=60) for future in done)
        assert log(store, "one") == list(range(50))
        assert not remains(path)


def test_an_answers_own_thread_may_erase(path: Path) -> None:
    with SqliteStore(path) as store:
        fill(store)
        seen: list[bool] = []
        done = threading.Event()

        def acknowledged(future: object) -> None:
            try:
                seen.append(store.erase("a", "secret").complete)
            finally:
                done.set()

        store.append("a", "kept", None, user("hi"), [1]).add_done_callback(acknowledged)
        assert done.wait(30)
        assert seen == [True]
        assert not remains(path)


def test_a_history_is_looked_up_in_an_index(path: Path) -> None:
    """One statement for all of its messages, and no table is read from end to end."""
    with SqliteStore(":memory:") as store:
        store.create("a", "one")
        turn = say(store, "one", "hi", [1])
        statements = trace(store)
        assert store.find("a", [b"x", turn.digest, b"y"]) == (1, turn)
        asked = [statement for statement in statements if "turns" in statement]
        assert len(asked) == 2  # which of them is known, and the turn
        plans = [
            row[3] for sql in asked for row in store._writer.call(lambda c, sql=sql: c.execute(f"EXPLAIN QUERY PLAN {sql}").fetchall())
        ]
        assert not any("SCAN turns" in plan or "SCAN conversations" in plan for plan in plans)
        assert sum("turns_by_digest" in plan for plan in plans) == 2


# -- the first version's files


def make_version_1(path: Path) -> None:
    """A file as the first version wrote it: two trees, a branch, a fork, titles."""
    connection = schema.open_for_writing(path, 5, (schema._create,))
    connection.execute("BEGIN")
    for key, (id, leaf, title) in enumerate((("one", "c", 'A "title"'), ("two", "b", None), ("three", "x", "")), start=1):
        connection.execute("INSERT INTO conversations VALUES (?, 'a', ?, NULL, 1.5, ?, ?, ?)", (key, id, 10.0 + key, title, '{"k": 1}'))
        turns = {
            "one": [("a", None, "a", 0, [["system", "be kind"], ["user", "hi"]]), ("c", "b", "a", 4, [["user", "left"]])],
            "two": [("b", "a", "a", 2, [["assistant", " hello \ud800"]]), ("d", "b", "a", 4, [["tool", "right"]]), ("e", "d", "a", 6, [])],
            "three": [("x", None, "x", 0, [["user", "hi"]])],
        }[id]
        connection.execute("PRAGMA defer_foreign_keys = ON")
        for turn, parent, root, start, messages in turns:
            row = (turn, "a", key, root, parent, start, start + 2, struct.pack("<2I", start, start + 1), json.dumps(messages), "stop", 2.5)
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
    """A file as the second version left it at a crash: answers under way and recovered ones, each with a key, and times to live."""
    connection = schema.open_for_writing(path, 5, (schema._create, schema._answers))
    connection.execute("BEGIN")
    conversation = "INSERT INTO conversations VALUES (?, 'a', ?, NULL, 100.0, 200.0, NULL, '{}', ?, 0)"
    for key, (id, expires_s) in enumerate((("one", None), ("soon", 230.0), ("used since", 150.0)), start=1):
        connection.execute(conversation, (key, id, expires_s))
    turn = "INSERT INTO turns VALUES (?, 'a', 1, ?, NULL, 0, 2, ?, ?, ?, 2.5, ?, '{}')"
    for id, reason in (("whole", "stop"), ("long", "length"), ("fragment", "interrupted"), ("late", "abort"), ("items", None)):
        digest = path_digests([Message("user", id)])[-1]
        connection.execute(turn, (id, id, struct.pack("<2I", 1, 2), json.dumps([["user", id]]), reason, digest))
    draft = "INSERT INTO drafts VALUES (?, ?, 1, NULL, 0, ?, ?, '{}', 3.5)"
    for id, owner in (("under way", "host:8000"), ("elsewhere", "host:0")):
        connection.execute(draft, (id, owner, struct.pack("<I", 1), json.dumps([["user", id]])))
        connection.execute("INSERT INTO draft_tokens VALUES (?, 0, ?, ?)", (id, struct.pack("<I", 2), json.dumps("half an")))
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
            assert (turn.reply_reason, turn.token_ids, turn.messages[-1]) == ("interrupted", (1, 2), Message("assistant", "half an"))
        kept = {id: store.claim("a", id, b"\x01", "again", owner=lease.owner) for id in ("whole", "long", "items")}
        assert {id: (claim.fresh, claim.stored, claim.turn_id) for id, claim in kept.items()} == {id: (False, True, id) for id in kept}
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
    children = [subprocess.Popen([sys.executable, "-c", OPEN, str(path)], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [child.communicate(timeout=60)[0] for child in children]
    assert sorted(int(line) for line in said) == [0, 0, 0, 2]


def test_an_erasure_that_a_reader_holds_up_is_remembered_and_completed(path: Path) -> None:
    with SqliteStore(path, busy_timeout_s=0.2) as store:
        fill(store)
        reader = connect(path, 1, read_only=True)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM turns").fetchone()
        assert not store.erase("a", "secret").complete
        assert store.erasures() == 1
        assert not store.overwrite() and store.erasures() == 1  # the reader is still there
        reader.execute("ROLLBACK")
        reader.close()
    with SqliteStore(path) as store:  # also after a restart
        assert store.erasures() == 1
        assert store.overwrite() and store.erasures() == 0
        assert not remains(path)
        stored = store._writer.call(lambda connection: connection.execute("SELECT * FROM erasures").fetchall())
        assert stored == []


def test_what_is_remembered_of_an_erasure_names_nothing(path: Path) -> None:
    with SqliteStore(path) as store:
        fill(store)
        store.erase("a", "secret", overwrite=False)
        rows = store._writer.call(lambda connection: connection.execute("SELECT * FROM erasures").fetchall())
        assert len(rows) == 1 and len(rows[0]) == 2 and abs(rows[0][1] - time.time()) < 60  # a number and a time


def test_a_file_too_large_to_be_rebuilt_is_not_tried_for_ever(path: Path) -> None:
    with SqliteStore(path, rebuild_bytes=0) as store:
        fill(store)
        assert not store.erase("a", "secret").complete
        assert store.erasures() == 0
