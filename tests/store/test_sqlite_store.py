"""The SQLite store: the contract, and what only a file can get wrong."""

from __future__ import annotations

import contextlib
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from owners_contract import OwnersContract
from store_contract import ConversationStoreContract, log, say, user

from pensieve.errors import StoreError
from pensieve.store import SqliteStore, default_path, schema
from pensieve.store.schema import APPLICATION_ID, MIGRATIONS, connect


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
        assert (
            store._writer.call(lambda connection: connection.execute("PRAGMA journal_mode").fetchone()[0])
            == "wal"
        )


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
            connection.execute(
                "CREATE TABLE IF NOT EXISTS p (t TEXT REFERENCES turns (id) DEFERRABLE INITIALLY DEFERRED)"
            )
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
            lambda connection: connection.execute(
                "SELECT count(*) FROM conversations WHERE leaf IS NULL"
            ).fetchone()
        )
        release.set()
        assert isinstance(failed.exception(timeout=30), RuntimeError)
        assert seen.result(timeout=30) == (0,)
        assert store.get("a", "one").leaf == after.result(timeout=30).id


def test_no_caller_waits_for_a_job_that_breaks_the_writer(path: Path) -> None:
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
    with pytest.raises(
        StoreError, match=r"cannot open the conversation store .*garbage.db: file is not a database"
    ):
        SqliteStore(garbage)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot open"):
        SqliteStore(tmp_path / "file" / "c.db")


# -- two processes

CHILD = """
import sys
from pensieve.message import Message
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
        assert store._writer.call(lambda c: c.execute("SELECT colour FROM conversations").fetchall()) == [
            ("grey",)
        ]
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
        tables = store._writer.call(
            lambda c: c.execute("SELECT count(*) FROM sqlite_master WHERE name = 'half'").fetchone()
        )
        assert tables == (0,)
        assert store.get("a", "one").id == "one"


def test_a_newer_file_is_left_alone(path: Path) -> None:
    SqliteStore(path, migrations=(*MIGRATIONS, add_colour)).close()
    before = path.read_bytes()
    newer, known = len(MIGRATIONS) + 1, len(MIGRATIONS)
    with pytest.raises(
        StoreError, match=f"schema version {newer}, this program knows versions up to {known}"
    ):
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
            row[3]
            for sql in asked
            for row in store._writer.call(
                lambda c, sql=sql: c.execute(f"EXPLAIN QUERY PLAN {sql}").fetchall()
            )
        ]
        assert not any("SCAN turns" in plan or "SCAN conversations" in plan for plan in plans)
        assert sum("turns_by_digest" in plan for plan in plans) == 2
