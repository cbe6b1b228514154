"""A PostgreSQL server that freezes, dies or loses a connection under a commit.

Everything ends in time, and nothing is stored twice or half.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed")

from owners_contract import begin, end, owner_of  # noqa: E402
from postgres_server import PostgresServer, find_binaries, running_server  # noqa: E402
from store_contract import log, say, user  # noqa: E402

from pensieve.errors import StoreError, StoreUnavailable  # noqa: E402
from pensieve.message import ROOT_DIGEST  # noqa: E402
from pensieve.store import Lease, postgres_schema  # noqa: E402
from pensieve.store.postgres import PostgresStore  # noqa: E402
from pensieve.store.postgres_deadline import Deadlines  # noqa: E402

pytestmark = pytest.mark.skipif(find_binaries() is None, reason="PostgreSQL is not installed")

BOUND_S = 15.0  # far more than statement, connection and patience take together below


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with running_server() as running:
        yield running


@pytest.fixture
def new_store(server: PostgresServer) -> Iterator[Callable[..., PostgresStore]]:
    made: list[PostgresStore] = []

    def make(**options: Any) -> PostgresStore:
        options = {"schema": f"s{uuid.uuid4().hex}", "statement_s": 0.5, "busy_timeout_s": 0.2} | options
        made.append(PostgresStore(server.url + "?connect_timeout=2", **options))
        return made[-1]

    yield make
    for store in made:
        store.close()


@pytest.fixture
def store(new_store: Callable[..., PostgresStore]) -> PostgresStore:
    made = new_store()
    made.create("a", "one")
    say(made, "one", "hi", [1])
    return made


def until(condition: Callable[[], bool], timeout_s: float = BOUND_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_frozen_server_fails_everything_in_time_and_is_taken_up_again(
    server: PostgresServer, store: PostgresStore
) -> None:
    with server.frozen():
        begun_s = time.monotonic()
        with ThreadPoolExecutor(24) as pool:
            reads = [pool.submit(store.get, "a", "one") for _ in range(20)]  # more than there are connections
            writes = [store.append("a", "one", None, user("x"), [i]) for i in range(3)]
            for future in (*reads, *writes):
                error = future.exception(timeout=BOUND_S)
                assert isinstance(error, StoreUnavailable) and error.http_status == 503
                assert "127.0.0.1" not in error.message and "tests" not in error.message
        assert time.monotonic() - begun_s < BOUND_S
        assert "has not been reached for" in (store.trouble() or "")
        begun_s = time.monotonic()
        for _ in range(10):  # from now on at once: only one thread tries
            with pytest.raises(StoreUnavailable):
                store.get("a", "one")
        with pytest.raises(StoreUnavailable):
            store.append("a", "one", None, user("x"), [9]).result(timeout=BOUND_S)
        assert time.monotonic() - begun_s < 2
    until(lambda: store._outages.trouble() is None)
    store.probe()
    assert store.trouble() is None
    assert log(store, "one") == [1]
    assert say(store, "one", "x", [2]).token_ids == (2,)


def test_a_statement_on_a_server_that_answers_is_not_cut_off(store: PostgresStore) -> None:
    deadlines = Deadlines()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for _ in range(50):
            with deadlines.within(0.05, ours.fileno()):
                pass
        time.sleep(0.1)
        ours.send(b"x")  # still open
        with deadlines.within(30.0, ours.fileno()), deadlines.within(0.05, ours.fileno()):
            assert theirs.recv(1) == b"x"
            assert theirs.recv(1) == b""  # the sooner of the two is watched, though it came later
    deadlines.close()


def cut_at_commit(store: PostgresStore, *, arrives: bool, times: int = 1) -> list[str]:
    """Lose the connection under the next commit, before or after the server has carried it out.

    Gives what was cut.
    """
    link, done = store._writer._link, list[str]()
    connect = link._connect  # type: ignore[attr-defined]

    def watch(connection: Any) -> Any:
        execute = connection.execute

        def executed(sql: str, values: Any = ()) -> Any:
            if sql != "COMMIT" or len(done) >= times:
                return execute(sql, values)
            done.append(sql)
            if arrives:
                execute(sql, values)
            socket.socket(fileno=os.dup(connection.raw.fileno())).shutdown(socket.SHUT_RDWR)
            return execute("SELECT 1")

        connection.execute = executed
        return connection

    watch(link.connection)
    link._connect = lambda: watch(connect())  # type: ignore[attr-defined]
    return done


@pytest.mark.parametrize("arrives", [True, False])
def test_a_commit_in_doubt_is_looked_for(store: PostgresStore, arrives: bool) -> None:
    cut = cut_at_commit(store, arrives=arrives)
    futures = [store.append("a", "one", None, user("x"), [i], turn_id=f"t{i}") for i in range(3)]
    assert [future.result(timeout=BOUND_S).id for future in futures] == ["t0", "t1", "t2"]
    assert cut == ["COMMIT"]
    (count,) = store._read(
        lambda connection: connection.execute("SELECT count(*) FROM turns WHERE id LIKE 't%'").fetchone()
    )
    assert count == 3
    assert say(store, "one", "on", [7]).token_ids == (7,)


def test_a_commit_whose_fate_cannot_be_found_out_says_so(
    server: PostgresServer, store: PostgresStore
) -> None:
    cut_at_commit(store, arrives=True, times=1)
    link = store._writer._link
    link.outcome = lambda: None  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="may be stored or not"):
        say(store, "one", "x", [2])


def test_a_connection_that_is_lost_again_and_again_is_not_tried_for_ever(store: PostgresStore) -> None:
    cut = cut_at_commit(store, arrives=False, times=100)
    with pytest.raises(StoreUnavailable, match="not stored"):
        say(store, "one", "x", [2])
    assert len(cut) == 2


def test_a_server_that_dies_and_starts_again_is_found(server: PostgresServer, store: PostgresStore) -> None:
    server.kill()
    try:
        with pytest.raises(StoreUnavailable):
            say(store, "one", "x", [2])
    finally:
        server.start()
    until(lambda: store._outages.trouble() is None)
    assert log(store, "one") == [1]
    assert say(store, "one", "x", [2]).token_ids == (2,)


def test_a_frozen_writer_does_not_hold_the_others_for_ever(new_store: Callable[..., PostgresStore]) -> None:
    frozen = new_store(
        schema="shared", busy_timeout_s=5.0, statement_s=0.5
    )  # (statement_s becomes 10: the settings below count)
    frozen.create("a", "one")
    other = new_store(schema="shared", busy_timeout_s=5.0)
    hold, begun = threading.Event(), threading.Event()

    def job(connection: Any) -> None:
        connection.execute(
            "SET idle_in_transaction_session_timeout = '500ms'"
        )  # as the store sets it, but sooner
        begun.set()
        hold.wait(30)

    stuck = frozen._writer.submit(job)
    assert begun.wait(10)
    assert say(other, "one", "x", [1]).token_ids == (1,)  # the server has ended the frozen one's transaction
    hold.set()
    assert stuck.exception(timeout=30) is None  # it was tried once more


def test_leases_go_by_the_servers_clock(new_store: Callable[..., PostgresStore]) -> None:
    schema = f"s{uuid.uuid4().hex}"
    fast, slow = (
        new_store(schema=schema, clock=lambda: time.time() + 3600),
        new_store(schema=schema, clock=lambda: time.time() - 3600),
    )
    one, two = Lease(fast), Lease(slow)
    fast.create("a", "one")
    begin(fast, "t", one.owner)
    two._tick()
    two._tick()
    assert not owner_of(slow, one.owner).lapsed and end(fast, "t").reply_reason == "stop"
    one.close()
    two.close()


def test_a_schema_of_the_first_version_is_brought_up_to_date(new_store: Callable[..., PostgresStore]) -> None:
    schema = f"s{uuid.uuid4().hex}"
    old = new_store(schema=schema, migrations=postgres_schema.MIGRATIONS[:1])

    def insert(sql: str, *values: object) -> None:
        old._writer.call(lambda connection: connection.execute(sql, values) and None, alone=True)

    row = "INSERT INTO conversations (namespace, id, leaf, created_s, updated_s, title, metadata, expires_s, pinned)"
    insert(row + " VALUES ('a', 'one', NULL, 100, 200, NULL, '{}', 230, 0)")
    turn = "INSERT INTO turns VALUES (?, 'a', 1, ?, NULL, 0, 1, ?, '[]', ?, 2.5, ?, '{}')"
    for id, reason in (("whole", "stop"), ("fragment", "interrupted")):
        insert(turn, id, id, b"\x01\0\0\0", reason, ROOT_DIGEST)
    insert(
        "INSERT INTO drafts VALUES ('under way', 'host:8000', 1, NULL, 0, ?, '[]', '{}', 3.5)", b"\x01\0\0\0"
    )
    for id in ("whole", "fragment", "under way", "not begun"):
        insert("INSERT INTO claims VALUES ('a', ?, ?, ?, ?)", id, b"", id, time.time())
    old.close()
    store = new_store(schema=schema)
    assert store.recover_drafts() == 1
    assert store.turn("a", "under way").reply_reason == "interrupted"
    assert store.claim("a", "whole", b"", "again").stored
    for id in ("fragment", "under way", "not begun"):
        assert store.claim("a", id, b"", f"again {id}").fresh, id
    assert (store.get("a", "one").ttl_s, store.get("a", "one").expires_s) == (30, 230)
