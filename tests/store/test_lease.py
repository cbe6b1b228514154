"""A server's lease: it is kept, it ends with the server, and what dead servers left is recovered by one that
lives.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from owners_contract import begin, end, owner_of, write

from pensieve.errors import ConversationNotFound
from pensieve.store import INTERRUPTED, LEASE_S, Lease, SqliteStore, processes
from pensieve.store.lease import RENEW_S

# A server with an answer under way and a key for it, until it is killed.
CHILD = """
import sys, time
from pensieve.message import Message
from pensieve.store import Lease, SqliteStore
store = SqliteStore(sys.argv[1])
lease = Lease(store, renew_s=0.05)
store.claim("a", "key", b"", "t", owner=lease.owner)
store.draft("a", "one", None, "t", [Message("user", "q")], [1], 0, 1, owner=lease.owner).result()
print(lease.owner, flush=True)
time.sleep(60)
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    with SqliteStore(tmp_path / "c.db") as made:
        made.create("a", "one")
        yield made


@pytest.fixture
def child(store: SqliteStore, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "c.db")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()


def lapse(store: SqliteStore, *owners: str) -> None:
    """As if so much time had passed."""
    for owner in owners:
        write(store, "UPDATE owners SET expires_s = expires_s - ? WHERE id = ?", 2 * LEASE_S, owner)


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def interrupted(store: SqliteStore, turn_id: str) -> bool:
    try:
        return store.turn("a", turn_id).reply_reason == INTERRUPTED
    except ConversationNotFound:
        return False


def test_two_renewals_may_fail() -> None:
    assert 3 * RENEW_S <= LEASE_S


def test_a_lease_is_renewed_until_it_is_closed(store: SqliteStore) -> None:
    lease = Lease(store, renew_s=0.01)
    first = owner_of(store, lease.owner).expires_s
    until(lambda: owner_of(store, lease.owner).expires_s > first)
    begin(store, "t", lease.owner)
    lease.close()
    lease.close()
    assert store.owners() == [] and interrupted(store, "t")


def test_every_server_has_a_name_of_its_own(store: SqliteStore) -> None:
    leases = [Lease(store) for _ in range(3)]
    assert len({lease.owner for lease in leases}) == 3
    assert {owner.id for owner in store.owners()} == {lease.owner for lease in leases}
    for lease in leases:
        lease.close()


def test_a_second_server_leaves_the_first_ones_answers_alone(store: SqliteStore) -> None:
    first = Lease(store)
    begin(store, "t", first.owner)
    second = Lease(store)
    second._tick()
    second.close()
    assert end(store, "t").reply_reason == "stop"
    first.close()


def test_what_was_left_by_owners_without_a_lease_is_recovered_at_the_start(store: SqliteStore) -> None:
    begin(store, "t", "")  # as a store of before there were leases has it
    lease = Lease(store)
    assert lease.num_recovered == 1 and interrupted(store, "t")
    lease.close()


def test_a_lease_must_be_found_lapsed_twice(store: SqliteStore) -> None:
    store.join("elsewhere", "")
    begin(store, "t", "elsewhere")
    lapse(store, "elsewhere")
    lease = Lease(store)
    assert lease.num_recovered == 0 and not interrupted(store, "t")
    lease._tick()
    assert interrupted(store, "t")
    lease.close()


def test_servers_of_a_machine_that_slept_renew_before_they_take_each_other_for_dead(
    store: SqliteStore,
) -> None:
    one, two = Lease(store), Lease(store)
    for lease in (one, two):
        begin(store, lease.owner, lease.owner)
    for _ in range(3):  # falls asleep three times
        lapse(store, one.owner, two.owner)
        one._tick()
        two._tick()
    for lease in (one, two):
        assert end(store, lease.owner).reply_reason == "stop"
        lease.close()


def test_a_server_that_was_taken_for_dead_goes_on_under_a_new_lease(
    store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    frozen, other = Lease(store), Lease(store)
    begin(store, "t", frozen.owner)
    lapse(store, frozen.owner)
    other._tick()
    other._tick()
    assert interrupted(store, "t")
    frozen._tick()
    assert "had lapsed" in caplog.text
    begin(store, "u", frozen.owner)
    other._tick()
    other._tick()
    assert end(store, "u").reply_reason == "stop"
    for lease in (frozen, other):
        lease.close()


def test_a_store_that_fails_now_and_then_does_not_end_a_lease(
    store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    lease = Lease(store, renew_s=0.01)
    write(store, "ALTER TABLE owners RENAME TO away")
    until(lambda: "could not be renewed" in caplog.text)
    write(store, "ALTER TABLE away RENAME TO owners")
    before = owner_of(store, lease.owner).expires_s
    until(lambda: owner_of(store, lease.owner).expires_s > before)
    lease.close()


def test_a_killed_server_is_recovered_at_once_and_by_one(
    child: subprocess.Popen[str], store: SqliteStore
) -> None:
    alive = Lease(store)
    assert alive.num_recovered == 0 and not interrupted(store, "t")
    child.kill()
    until(
        lambda: processes.has_ended(
            next(owner.process for owner in store.owners() if owner.id != alive.owner)
        )
    )  # (not waited for: a zombie)
    with ThreadPoolExecutor(4) as pool:
        starting = list(pool.map(lambda _: Lease(store), range(4)))
    assert sorted(lease.num_recovered for lease in starting) == [0, 0, 0, 1]
    for lease in starting:
        lease.close()
    assert interrupted(store, "t") and store.claim("a", "key", b"", "u", owner=alive.owner).fresh
    alive.close()


def test_a_frozen_server_is_recovered_when_its_lease_has_lapsed_and_stores_nothing_twice(
    child: subprocess.Popen[str], store: SqliteStore
) -> None:
    child.send_signal(signal.SIGSTOP)
    lease = Lease(store)
    (frozen,) = [owner for owner in store.owners() if owner.id != lease.owner]
    assert not processes.has_ended(frozen.process)
    lapse(store, frozen.id)
    lease._tick()
    lease._tick()
    assert interrupted(store, "t")
    child.send_signal(signal.SIGCONT)
    until(lambda: any(owner.id == frozen.id for owner in store.owners()))  # it has found out, and goes on
    assert interrupted(store, "t")
    lease.close()


# -- processes


def test_a_process_that_runs_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    here = processes.own_process()
    if not here:
        pytest.skip("there is no /proc")
    assert not processes.has_ended(here)
    boot, namespace, pid, started = here.split(" ")
    assert int(pid) == os.getpid()
    assert processes.has_ended(
        f"{boot} {namespace} {pid} {int(started) + 1}"
    )  # the number is another process's now
    assert not processes.has_ended(f"another-machine {namespace} {pid} {int(started) + 1}")
    assert not processes.has_ended(f"{boot} pid:[1] {pid} {int(started) + 1}")  # another container
    for unknown in ("", "x", "a b c d", f"{boot} {namespace} {pid}"):
        assert not processes.has_ended(unknown)
    with monkeypatch.context() as patched:

        def refused(pid: int, number: int) -> None:
            raise PermissionError

        patched.setattr(os, "kill", refused)
        assert not processes.has_ended(
            f"{boot} {namespace} {pid} {int(started) + 1}"
        )  # another user's process, which may be hidden
    monkeypatch.setattr(processes, "PROC", Path("/nowhere"))
    assert processes.own_process() == "" and not processes.has_ended(here)
