"""The PostgreSQL store against a real server: the contract, and what only a server can get wrong."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from owners_contract import OwnersContract
from postgres_server import PostgresServer, find_binaries, running_server
from store_contract import ConversationStoreContract, log, say, user

from pensieve.errors import ConfigError, ConversationConflict, StoreError
from pensieve.store import path_tokens
from pensieve.store.writer import Connection

psycopg = pytest.importorskip(
    "psycopg", reason="psycopg is not installed (pip install 'pensieve-serve[postgres]')"
)
if find_binaries() is None:
    pytest.skip("PostgreSQL is not installed (apt-get install postgresql)", allow_module_level=True)

from pensieve.store.postgres import READERS, PostgresStore  # noqa: E402  only with psycopg
from pensieve.store.postgres_schema import MIGRATIONS, lock_key  # noqa: E402

SCHEMAS = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def schema() -> str:
    return f"s{next(SCHEMAS)}"


@pytest.fixture
def new_store(server: PostgresServer) -> Iterator[Callable[..., PostgresStore]]:
    made: list[PostgresStore] = []

    def make(**options: Any) -> PostgresStore:
        made.append(PostgresStore(server.url, **{"schema": f"s{next(SCHEMAS)}", **options}))
        return made[-1]

    yield make
    for store in made:
        store.close()


class TestPostgres(ConversationStoreContract):
    @pytest.fixture
    def new_store(self, new_store: Callable[..., PostgresStore]) -> Callable[..., PostgresStore]:
        return new_store


class TestOwners(OwnersContract):
    @pytest.fixture
    def new_store(self, new_store: Callable[..., PostgresStore]) -> Callable[..., PostgresStore]:
        return new_store


def query(store: PostgresStore, sql: str) -> Any:
    return store._writer.call(lambda connection: connection.execute(sql).fetchone()[0])


def cut(store: PostgresStore, server: PostgresServer) -> None:
    """Let the server end every connection of this store's database, as a restart or a firewall does."""
    with psycopg.connect(server.url, autocommit=True) as admin:
        admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pensieve'"
        )
        while admin.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pensieve'"
        ).fetchone() != (0,):
            time.sleep(0.01)


# -- groups and locks


def hold(store: PostgresStore) -> threading.Event:
    """Keep the writer busy, inside its transaction, until the event is set."""
    release, held = threading.Event(), threading.Event()

    def job(connection: Connection) -> None:
        held.set()
        assert release.wait(30)

    store._writer.submit(job)
    assert held.wait(30)
    return release


def test_turns_that_wait_are_committed_together(new_store: Callable[..., PostgresStore]) -> None:
    store = new_store()
    store.create("a", "one")
    release = hold(store)
    futures = [store.append("a", "one", None, user("x"), [i]) for i in range(100)]
    numbers = [
        store._writer.submit(lambda c: c.execute("SELECT pg_current_xact_id()::text").fetchone()[0])
        for _ in range(2)
    ]
    assert not any(future.done() for future in futures)  # nothing is acknowledged before its commit
    release.set()
    for future in futures:
        future.result(timeout=30)
    assert numbers[0].result() == numbers[1].result()
    assert [turn.result().token_ids for turn in futures] == [(i,) for i in range(100)]


def test_a_commit_is_flushed_to_the_disk(
    server: PostgresServer, new_store: Callable[..., PostgresStore]
) -> None:
    assert query(new_store(), "SHOW synchronous_commit") == "on"
    for set_, used in (("off", "on"), ("local", "on"), ("remote_apply", "remote_apply")):
        store = PostgresStore(
            f"{server.url}?options=-csynchronous_commit%3D{set_}", schema=f"s{next(SCHEMAS)}"
        )
        assert query(store, "SHOW synchronous_commit") == used
        store.close()


def test_writers_of_two_stores_take_turns(new_store: Callable[..., PostgresStore], schema: str) -> None:
    one, two = new_store(schema=schema), new_store(schema=schema)
    one.create("a", "one")
    release = hold(one)
    waiting = two.append("a", "one", None, user("x"), [1], only_if_leaf=True)
    first = one.append("a", "one", None, user("x"), [2], only_if_leaf=True)
    time.sleep(0.05)
    assert not waiting.done()
    release.set()
    outcomes = [
        first.exception(timeout=30),
        waiting.exception(timeout=30),
    ]  # the second store sees what the first wrote
    assert sorted(type(outcome) for outcome in outcomes if outcome is not None) == [ConversationConflict]
    assert len(log(one, "one")) == 1


def test_a_lock_that_does_not_end_fails_the_turn(
    server: PostgresServer, new_store: Callable[..., PostgresStore], schema: str
) -> None:
    store = new_store(schema=schema, busy_timeout_s=0.05)
    store.create("a", "one")
    with psycopg.connect(server.url) as other:
        other.execute("SELECT pg_advisory_xact_lock(%s)", (lock_key(schema),))
        futures = [store.append("a", "one", None, user("x"), [i]) for i in range(3)]
        for future in futures:
            with pytest.raises(StoreError, match="lock timeout"):
                future.result(timeout=30)
        assert log(store, "one") == []  # reading goes on
    assert say(store, "one", "x", [9]).token_ids == (9,)


def test_many_read_with_few_connections(
    server: PostgresServer, new_store: Callable[..., PostgresStore]
) -> None:
    store = new_store()
    store.create("a", "one")
    say(store, "one", "x", [1])
    wrong: list[object] = []

    def read() -> None:
        for _ in range(10):
            if log(store, "one") != [1]:
                wrong.append("a wrong log")

    threads = [threading.Thread(target=read) for _ in range(4 * READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(store._idle) <= READERS


# -- failures


def test_a_lost_connection_fails_what_was_under_way_and_nothing_else(
    server: PostgresServer, new_store: Callable[..., PostgresStore]
) -> None:
    store = new_store()
    store.create("a", "one")
    release = hold(store)
    during = [store.append("a", "one", None, user("x"), [i]) for i in range(2)]

    def break_(connection: Connection) -> None:
        cut(store, server)
        connection.execute("SELECT 1")

    broken = store._writer.submit(break_)
    release.set()
    for future in (*during, broken):
        with pytest.raises(StoreError, match=r"cannot be reached.*as not stored"):
            future.result(timeout=30)
    assert log(store, "one") == []
    assert say(store, "one", "x", [9]).token_ids == (9,)
    assert log(store, "one") == [9]


def test_a_connection_lost_while_nothing_happens_is_not_noticed(
    server: PostgresServer, new_store: Callable[..., PostgresStore], schema: str
) -> None:
    store = new_store(schema=schema)
    store.create("a", "one")
    assert log(store, "one") == []
    cut(store, server)
    assert say(store, "one", "x", [1]).token_ids == (1,)
    cut(store, server)
    assert log(store, "one") == [1]
    assert query(store, "SHOW search_path") == schema  # the new connection is set up as the first one was


def test_a_job_that_fails_halfway_leaves_nothing(new_store: Callable[..., PostgresStore]) -> None:
    store = new_store()
    store.create("a", "one")
    turn = say(store, "one", "x", [1])

    def half(connection: Connection) -> None:
        connection.execute("UPDATE conversations SET leaf = NULL")
        connection.execute("nonsense")

    release = hold(store)
    failed = store._writer.submit(half)
    after = store.append("a", "one", turn.id, user("y"), [2])
    release.set()
    assert isinstance(failed.exception(timeout=30), StoreError)
    assert store.get("a", "one").leaf == after.result(timeout=30).id
    assert log(store, "one") == [1, 2]


def test_a_commit_that_fails_is_tried_turn_by_turn(new_store: Callable[..., PostgresStore]) -> None:
    """A deferred foreign key makes COMMIT itself fail, for one turn of the group."""
    store = new_store()
    store.create("a", "one")

    def poison(connection: Connection) -> None:
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


def test_what_cannot_be_opened_is_said() -> None:
    with pytest.raises(
        StoreError, match=r"cannot open the conversation store postgresql://127.0.0.1/nowhere: .*refused"
    ) as raised:
        PostgresStore("postgresql://someone:secret@127.0.0.1:1/nowhere")
    assert "secret" not in str(raised.value)
    with pytest.raises(ConfigError, match="postgresql://user"):
        PostgresStore("postgresql://a:b:c:secret@x/?y=z&q")
    with pytest.raises(ConfigError, match="'Robert; DROP'"):
        PostgresStore("postgresql://x/y", schema="Robert; DROP")


def test_erasing_does_not_claim_what_postgresql_cannot_do(new_store: Callable[..., PostgresStore]) -> None:
    store = new_store()
    store.create("a", "one")
    for i in range(5):
        say(store, "one", f"{i}", [i])
    erased = store.erase("a", "one")
    assert (erased.turns, erased.complete) == (5, False)
    deadline_s = time.monotonic() + 30
    while query(store, "SELECT pg_stat_get_vacuum_count('turns'::regclass)") == 0:  # counted a little later
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert query(store, "SELECT pg_relation_size('turns')") == 0


# -- schema versions


def add_colour(connection: Connection) -> None:
    connection.execute("ALTER TABLE conversations ADD COLUMN colour TEXT NOT NULL DEFAULT 'grey'")


def test_an_older_schema_is_brought_up_to_date_and_a_newer_left_alone(
    new_store: Callable[..., PostgresStore], schema: str
) -> None:
    old = new_store(schema=schema)
    old.create("a", "one")
    new = new_store(schema=schema, migrations=(*MIGRATIONS, add_colour))
    assert query(new, "SELECT colour FROM conversations") == "grey"
    newer, known = len(MIGRATIONS) + 1, len(MIGRATIONS)
    with pytest.raises(
        StoreError, match=f"schema version {newer}, this program knows versions up to {known}"
    ):
        new_store(schema=schema)


def test_a_migration_that_fails_changes_nothing(new_store: Callable[..., PostgresStore], schema: str) -> None:
    store = new_store(schema=schema)

    def broken(connection: Connection) -> None:
        connection.execute("CREATE TABLE half (done INTEGER)")
        connection.execute("nonsense")

    with pytest.raises(StoreError, match="nonsense"):
        new_store(schema=schema, migrations=(*MIGRATIONS, broken))
    assert query(store, "SELECT version FROM schema_version") == len(MIGRATIONS)
    assert query(store, "SELECT to_regclass('half') IS NULL")


def test_another_programs_tables_are_left_alone(
    server: PostgresServer, new_store: Callable[..., PostgresStore], schema: str
) -> None:
    with psycopg.connect(server.url, autocommit=True) as admin:
        admin.execute(f"CREATE SCHEMA {schema}")
        admin.execute(f"CREATE TABLE {schema}.recipes (name TEXT)")
        with pytest.raises(StoreError, match="tables of some other program"):
            new_store(schema=schema)
        assert admin.execute(
            "SELECT count(*) FROM pg_tables WHERE schemaname = %s", (schema,)
        ).fetchone() == (1,)


def test_many_make_the_tables_at_once(new_store: Callable[..., PostgresStore], schema: str) -> None:
    made: list[object] = []

    def open_() -> None:
        try:
            made.append(new_store(schema=schema, busy_timeout_s=30))
        except BaseException as error:
            made.append(error)

    threads = [threading.Thread(target=open_) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(store) for store in made] == [PostgresStore] * 6


def test_a_database_must_hold_any_text(server: PostgresServer) -> None:
    with psycopg.connect(server.url, autocommit=True) as admin:
        admin.execute("CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0")
    with pytest.raises(StoreError, match="encoding LATIN1"):
        PostgresStore(server.url.replace("/postgres", "/latin"))


# -- the server dies

CHILD = """
import sys, threading
from pensieve.message import Message
from pensieve.errors import StoreError
from pensieve.store import open_store

store = open_store(sys.argv[1], busy_timeout_s=0.5)
lock = threading.Lock()

def converse(name):
    parent, number = None, 0
    while True:
        try:
            turn = store.append("a", name, parent, [Message("user", f"{name} {number}")], [number] * (1 + number % 300)).result()
        except StoreError:
            return
        parent, number = turn.id, number + 1
        with lock:
            print(name, number, turn.id, flush=True)

threads = [threading.Thread(target=converse, args=(name,)) for name in sys.argv[2:]]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
NAMES = ["one", "two", "three", "four"]


def kill_once(server: PostgresServer, alive_s: float) -> dict[str, tuple[int, str]]:
    """Append for a while, kill the server, and return the last acknowledgement of each conversation."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, server.url, *NAMES], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    lines = [child.stdout.readline()]  # it runs
    time.sleep(alive_s)
    server.kill()
    lines += child.stdout.read().splitlines()
    assert child.wait(60) == 0
    child.stdout.close()
    return {
        name: (int(number), turn_id)
        for name, number, turn_id in (line.split() for line in lines if line.strip())
    }


def check_after_kill(server: PostgresServer, acknowledged: dict[str, tuple[int, str]]) -> None:
    with PostgresStore(server.url) as store:
        for count, turn_id in acknowledged.values():
            assert len(store.path("a", turn_id)) == count
        for name in NAMES:
            turns = store.path("a", store.get("a", name).leaf)
            assert len(turns) >= acknowledged.get(name, (0, ""))[0]
            assert [turn.messages[0].content for turn in turns] == [f"{name} {i}" for i in range(len(turns))]
            assert path_tokens(turns) == [i for i in range(len(turns)) for _ in range(1 + i % 300)]


@pytest.mark.parametrize("rounds", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_server_loses_nothing_acknowledged(rounds: int) -> None:
    chance = random.Random(1)
    with running_server() as server:
        total = 0
        for _ in range(rounds):
            with PostgresStore(server.url) as store:
                for name in NAMES:
                    if any(c.id == name for c in store.list("a")):
                        store.delete("a", name)
                    store.create("a", name)
            acknowledged = kill_once(server, alive_s=chance.uniform(0.0, 0.3))
            server.start()
            total += len(acknowledged)
            check_after_kill(server, acknowledged)
        assert total > 0
        with PostgresStore(server.url) as store:
            store.set_leaf("a", "one", None)
        with pytest.raises(AssertionError):  # the check sees a lost turn
            check_after_kill(server, {"one": acknowledged["one"]})
