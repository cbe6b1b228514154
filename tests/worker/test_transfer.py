"""The copying thread: order, layers, failures, waking.

No test here sleeps to be right: events say when things happen.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from pensieve.core.plan import Copy, CopyFailure
from pensieve.worker import transfer as transfer_module
from pensieve.worker.kv_store import KVStore, SlotCopy
from pensieve.worker.transfer import SourceLost, Transfer

LAYERS = 3
PATIENCE_S = 20.0  # far beyond anything here: a hang is a failure, not a measurement


class Gate:
    """Holds the copying thread where a test wants it, and records what it did."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.reached = threading.Event()
        self.open = threading.Event()
        self.open.set()

    def pass_through(self, copy: Copy) -> None:
        self.log.append(("in" if copy.dst_tier == 0 else "out", copy.copy_id))
        self.reached.set()
        assert self.open.wait(PATIENCE_S)


@pytest.fixture
def stores() -> list[KVStore]:
    made = [KVStore(8, LAYERS, 16, torch.device("cpu")) for _ in range(3)]
    for tier, store in enumerate(made):
        for slot in range(8):
            store.data[slot] = 100 * (tier == 0) + 10 * tier + slot
    return made


@pytest.fixture
def make(stores: list[KVStore]) -> Iterator[Callable[[Callable[[Copy], None]], Transfer]]:
    made: list[Transfer] = []

    def build(before_copy: Callable[[Copy], None] = lambda copy: None) -> Transfer:
        made.append(Transfer(stores, before_copy=before_copy))
        return made[-1]

    yield build
    for transfer in made:
        transfer.close()


def swap_in(copy_id: int, src: int, dst: int, tier: int = 1) -> Copy:
    return Copy(copy_id, tier, src, 0, dst)


def swap_out(copy_id: int, src: int, dst: int, tier: int = 1) -> Copy:
    return Copy(copy_id, 0, src, tier, dst)


def settle(transfer: Transfer, count: int) -> tuple[list[int], list[CopyFailure]]:
    """Steps without copies until `count` copies were reported."""
    done: list[int] = []
    failed: list[CopyFailure] = []
    settled = threading.Event()
    transfer.set_waker(settled.set)
    while True:
        new_done, new_failed = transfer.end_step()
        done += new_done
        failed += new_failed
        if len(done) + len(failed) >= count:
            return done, failed
        assert settled.wait(PATIENCE_S), "no copy settled"
        settled.clear()


def test_swap_ins_have_settled_after_wait(stores: list[KVStore], make: Callable[..., Transfer]) -> None:
    transfer = make()
    ticket = transfer.start((swap_in(1, 4, 6), swap_in(2, 3, 0, tier=2)), ())
    ticket.wait()
    assert stores[0].data[6].eq(14).all() and stores[0].data[0].eq(23).all()
    assert transfer.end_step() == ((1, 2), ())


@pytest.mark.parametrize(
    ("source", "target"), [pair for pair in itertools.product(range(3), repeat=2) if pair[0] != pair[1]]
)
def test_copies_between_any_two_tiers(
    stores: list[KVStore], make: Callable[..., Transfer], source: int, target: int
) -> None:
    transfer = make()
    expected = stores[source].data[5].clone()
    transfer.start((), (Copy(9, source, 5, target, 2),))
    assert settle(transfer, 1) == ([9], [])
    assert torch.equal(stores[target].data[2], expected)


def test_swap_ins_overtake_swap_outs_that_have_not_begun(
    monkeypatch: pytest.MonkeyPatch, stores: list[KVStore], make: Callable[..., Transfer]
) -> None:
    """And no swap-out begins until they have settled."""
    monkeypatch.setattr(transfer_module, "PIECE_BYTES", stores[0].slot_bytes)  # one slot a piece
    gate = Gate()
    transfer = make(gate.pass_through)
    gate.open.clear()
    transfer.start((), tuple(swap_out(slot, slot, slot) for slot in range(4)))
    assert gate.reached.wait(PATIENCE_S)  # the first swap-out is under way
    assert transfer.end_step() == ((), ())
    ticket = transfer.start((swap_in(10, 6, 6), swap_in(11, 7, 7)), (swap_out(12, 5, 5),))
    gate.open.set()
    ticket.wait()
    settle(transfer, 7)
    assert gate.log == [("out", 0), ("in", 10), ("in", 11), ("out", 1), ("out", 2), ("out", 3), ("out", 12)]


def test_each_layer_is_released_by_itself(
    monkeypatch: pytest.MonkeyPatch, stores: list[KVStore], make: Callable[..., Transfer]
) -> None:
    copied = {layer: threading.Event() for layer in range(LAYERS)}
    may_copy = {layer: threading.Event() for layer in range(LAYERS)}

    copy_layer = SlotCopy.layer

    def slow_copy(move: SlotCopy, layer: int) -> None:
        assert may_copy[layer].wait(PATIENCE_S)
        copy_layer(move, layer)
        copied[layer].set()

    monkeypatch.setattr(SlotCopy, "layer", slow_copy)
    transfer = make()
    ticket = transfer.start((swap_in(1, 4, 6),), ())
    may_copy[0].set()
    ticket.wait_layer(0)  # returns although layers 1 and 2 have not begun
    assert stores[0].data[6, 0].eq(14).all() and not copied[1].is_set()
    may_copy[1].set()
    ticket.wait_layer(1)
    assert not copied[2].is_set()
    may_copy[2].set()
    ticket.wait()
    assert stores[0].data[6].eq(14).all()


def test_a_step_without_swap_ins_waits_for_nothing(make: Callable[..., Transfer]) -> None:
    ticket = make().start((), ())
    for layer in range(LAYERS):
        ticket.wait_layer(layer)
    ticket.wait()


def test_one_copy_fails_and_the_others_go_on(stores: list[KVStore], make: Callable[..., Transfer]) -> None:
    def refuse(copy: Copy) -> None:
        if copy.copy_id in (2, 6):
            raise OSError("bad sector")
        if copy.copy_id == 3:
            raise SourceLost("gone")

    transfer = make(refuse)
    ticket = transfer.start(
        tuple(swap_in(index, index, index) for index in range(1, 5)), (swap_out(6, 5, 5), swap_out(7, 7, 7))
    )
    for layer in range(LAYERS):
        ticket.wait_layer(layer)
    ticket.wait()
    assert ticket.failed_slots == {(0, 2), (0, 3)}
    done, failed = settle(transfer, 6)
    assert sorted(done) == [1, 4, 7]
    assert sorted((f.copy_id, f.source_lost) for f in failed) == [(2, False), (3, True), (6, False)]
    assert "bad sector" in failed[0].message
    assert (
        stores[0].data[4].eq(14).all() and stores[0].data[2].eq(102).all() and stores[1].data[5].eq(15).all()
    )


@pytest.mark.parametrize("breaking_layer", [0, 2, None])
def test_a_batch_that_breaks_fails_alone_and_hangs_no_other(
    monkeypatch: pytest.MonkeyPatch, make: Callable[..., Transfer], breaking_layer: int | None
) -> None:
    """None: a batch of swap-outs."""
    broken = threading.Event()

    copy_layer, copy_whole = SlotCopy.layer, SlotCopy.whole

    def break_once(layer: int | None) -> None:
        if layer == breaking_layer and not broken.is_set():
            broken.set()
            raise RuntimeError("device lost")

    monkeypatch.setattr(SlotCopy, "layer", lambda move, layer: (break_once(layer), copy_layer(move, layer)))
    monkeypatch.setattr(SlotCopy, "whole", lambda move: (break_once(None), copy_whole(move)))
    transfer = make()
    bad = swap_out(1, 1, 1) if breaking_layer is None else swap_in(1, 1, 1)
    ticket = transfer.start(
        () if breaking_layer is None else (bad,), (bad,) if breaking_layer is None else ()
    )
    for layer in range(LAYERS):
        ticket.wait_layer(layer)
    ticket.wait()
    done, failed = settle(transfer, 1)
    assert (
        done == []
        and [(f.copy_id, f.source_lost) for f in failed] == [(1, False)]
        and "device lost" in failed[0].message
    )
    transfer.start((swap_in(2, 2, 2),), (swap_out(3, 3, 3),)).wait()
    done, failed = settle(transfer, 2)
    assert sorted(done) == [2, 3] and failed == []


def test_the_waker_is_called_only_between_steps(make: Callable[..., Transfer]) -> None:
    gate = Gate()
    transfer = make(gate.pass_through)
    woken = threading.Event()
    transfer.set_waker(woken.set)
    transfer.start((), (swap_out(1, 1, 1),))
    ticket = transfer.start(
        (swap_in(2, 2, 2),), ()
    )  # settles after the swap-out, both within the two steps under way
    ticket.wait()
    transfer.start((), ())
    transfer.wait()
    done, failed = transfer.end_step()
    assert sorted(done) == [1, 2] and failed == ()
    assert not woken.is_set()
    transfer.end_step()
    transfer.end_step()
    gate.open.clear()
    gate.reached.clear()
    transfer.start((), (swap_out(4, 4, 4),))
    assert gate.reached.wait(PATIENCE_S)
    transfer.end_step()  # the step is over before its swap-out is
    gate.open.set()
    assert woken.wait(PATIENCE_S)
    assert transfer.end_step() == ((4,), ())


def test_a_waker_that_raises_ends_nothing(
    make: Callable[..., Transfer], caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    transfer = make(gate.pass_through)
    raised = threading.Event()

    def wake() -> None:
        raised.set()
        raise ValueError("no engine")

    transfer.set_waker(wake)
    gate.open.clear()
    transfer.start((), (swap_out(1, 1, 1),))
    transfer.end_step()
    gate.open.set()
    assert raised.wait(PATIENCE_S)
    transfer.start((swap_in(2, 2, 2),), ()).wait()
    assert "waker" in caplog.text


def test_close_joins_and_lets_waiters_go(make: Callable[..., Transfer]) -> None:
    gate = Gate()
    transfer = make(gate.pass_through)
    gate.open.clear()
    transfer.start((), (swap_out(1, 1, 1),))
    assert gate.reached.wait(PATIENCE_S)
    ticket = transfer.start((swap_in(2, 2, 2),), ())
    closer = threading.Thread(target=transfer.close)
    closer.start()
    while not transfer._closing:
        pass
    gate.open.set()
    closer.join(PATIENCE_S)
    assert not closer.is_alive() and not transfer._thread.is_alive()
    ticket.wait()
    transfer.close()
    with pytest.raises(AssertionError, match="closed"):
        transfer.start((), ())


def test_a_step_without_copies_waits_for_nothing_and_leaves_the_thread_asleep(
    make: Callable[..., Transfer], monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer = make()
    woken: list[int] = []
    monkeypatch.setattr(transfer._work, "notify", lambda: woken.append(1))
    for _ in range(2):
        ticket = transfer.start((), ())
        ticket.wait_layer(LAYERS - 1)
        ticket.wait()
        assert ticket.failed_slots == frozenset() and transfer.end_step() == ((), ())
    assert not woken
    monkeypatch.undo()
    transfer.start((), (Copy(0, 0, 1, 1, 2),))
    done: tuple[int, ...] = ()
    while not done:
        done, _ = transfer.end_step()
    assert done == (0,)


def test_wait_returns_when_everything_queued_has_settled(
    stores: list[KVStore], make: Callable[..., Transfer]
) -> None:
    gate = Gate()
    transfer = make(gate.pass_through)
    transfer.wait()  # nothing to wait for
    gate.open.clear()
    transfer.start((), tuple(swap_out(slot, slot, slot) for slot in range(4)))
    waited = threading.Event()
    waiter = threading.Thread(target=lambda: (transfer.wait(), waited.set()))
    waiter.start()
    assert gate.reached.wait(PATIENCE_S)
    assert not waited.wait(0.05)
    gate.open.set()
    assert waited.wait(PATIENCE_S)
    waiter.join()
    assert transfer.end_step() == ((0, 1, 2, 3), ())


def test_closing_waits_for_no_copy_that_it_leaves_undone(make: Callable[..., Transfer]) -> None:
    gate = Gate()
    transfer = make(gate.pass_through)
    gate.open.clear()
    transfer.start((), tuple(swap_out(slot, slot, slot) for slot in range(4)))
    assert gate.reached.wait(PATIENCE_S)
    waiter = threading.Thread(target=transfer.wait)
    waiter.start()
    closer = threading.Thread(target=transfer.close)
    closer.start()
    waiter.join(PATIENCE_S)
    assert not waiter.is_alive()
    gate.open.set()
    closer.join(PATIENCE_S)
