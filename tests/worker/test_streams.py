"""What waits for what between computing and copying.

On streams as late as events allow, a missing wait gives wrong bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from late_streams import LateDevice, LateStream
from pensieve.core.plan import Copy
from pensieve.worker.kv_store import KVStore
from pensieve.worker.streams import HostStream, streams_for
from pensieve.worker.transfer import SwapIn, Transfer

LAYERS, SEEDS = 4, 30
CPU = torch.device("cpu")


class World:
    """Two tiers, a transfer, and a model that reads and writes the first tier on the compute stream."""

    def __init__(self, seed: int) -> None:
        self.device = LateDevice(seed)
        self.stores = [KVStore(6, LAYERS, 16, CPU) for _ in range(2)]
        for tier, store in enumerate(self.stores):
            for slot in range(6):
                store.data[slot] = 100 * tier + slot
        self.transfer = Transfer(self.stores, streams=self.device.streams)
        self.seen: list[int] = []

    def close(self) -> None:
        self.device.catch_up()
        self.transfer.close()

    def read(self, slot: int, layer: int) -> None:
        self.device.streams.compute.do(lambda: self.seen.append(int(self.stores[0].data[slot, layer, 0])))

    def write(self, slot: int, number: int) -> None:
        self.device.streams.compute.do(lambda: self.stores[0].data[slot].fill_(number))


@pytest.fixture(params=range(SEEDS))
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(request.param)
    yield made
    made.close()


def attend_what_comes_in(world: World) -> list[int]:
    """A forward over a chunk that is being swapped in."""
    ticket = world.transfer.start((Copy(1, 1, 3, 0, 5),), ())
    for layer in range(LAYERS):
        ticket.wait_layer(layer)
        world.read(5, layer)
    world.device.when_drained(1)
    world.device.catch_up()
    ticket.wait()
    return world.seen


def copy_what_was_computed(world: World) -> int:
    """A swap-out right behind the forward that writes the chunk."""
    world.write(2, 77)
    world.transfer.start((), (Copy(1, 0, 2, 1, 4),))
    world.device.when_drained(1)
    world.device.catch_up()
    world.transfer.wait()
    return int(world.stores[1].data[4, 0, 0])


def swap_in_where_a_forward_reads(world: World) -> list[int]:
    """A slot is given to another chunk while the forward that read the first one is still queued."""
    for layer in range(LAYERS):
        world.read(0, layer)
    ticket = world.transfer.start((Copy(1, 1, 3, 0, 0),), ())
    world.device.when_drained(1)
    world.device.catch_up()
    ticket.wait()
    return world.seen


def test_a_layer_is_read_after_its_own_copy(world: World) -> None:
    assert attend_what_comes_in(world) == [103] * LAYERS


def test_a_chunk_is_copied_out_after_it_was_computed(world: World) -> None:
    assert copy_what_was_computed(world) == 77


def test_a_chunk_comes_in_after_the_last_reader_of_its_slot(world: World) -> None:
    assert swap_in_where_a_forward_reads(world) == [0] * LAYERS
    assert int(world.stores[0].data[0, 0, 0]) == 103


def wrong_in_some(story: object, right: object) -> bool:
    results = []
    for seed in range(SEEDS):
        world = World(seed)
        results.append(story(world))  # type: ignore[operator]
        world.close()
    return any(result != right for result in results)


def test_a_missing_wait_for_a_layer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(ticket: SwapIn, layer: int) -> None:
        with ticket._changed:
            ticket._changed.wait_for(lambda: ticket._ready > layer)

    monkeypatch.setattr(SwapIn, "wait_layer", forget)
    assert wrong_in_some(attend_what_comes_in, [103] * LAYERS)


@pytest.mark.parametrize(
    ("story", "right"), [(copy_what_was_computed, 77), (swap_in_where_a_forward_reads, [0] * LAYERS)]
)
def test_a_missing_wait_for_what_was_computed_is_seen(
    monkeypatch: pytest.MonkeyPatch, story: object, right: object
) -> None:
    monkeypatch.setattr(LateStream, "wait", lambda stream, event: None)
    assert wrong_in_some(story, right)


def test_copies_of_a_layer_may_run_while_the_layer_before_computes() -> None:
    """The streams are not put in one order: some seed copies a later layer before an earlier one is read."""
    orders = set()
    for seed in range(SEEDS):
        world = World(seed)
        order: list[str] = []
        ticket = world.transfer.start((Copy(1, 1, 3, 0, 5),), ())
        for layer in range(LAYERS):
            ticket.wait_layer(layer)
            world.device.streams.compute.do(partial(order.append, f"read {layer}"))
        world.device.when_drained(1)
        world.device.streams.copy_in.do(partial(order.append, "copied"))
        world.device.catch_up()
        orders.add(tuple(order))
        world.close()
    assert len(orders) > 2


def test_on_a_cpu_everything_is_done_at_once() -> None:
    streams = streams_for(CPU)
    done: list[int] = []
    for stream in (streams.compute, streams.copy_in, streams.copy_out):
        assert isinstance(stream, HostStream)
        stream.do(lambda: done.append(1))
        stream.wait(stream.record())
        stream.drain()
    assert done == [1, 1, 1]


# -- checksums


def copied_out(verify: bool) -> tuple[Transfer, list[KVStore]]:
    stores = [KVStore(4, LAYERS, 16, CPU) for _ in range(3)]
    stores[0].data.copy_(torch.arange(stores[0].data.numel()).remainder(251).view(stores[0].data.shape))
    transfer = Transfer(stores, verify=verify)
    transfer.start((), (Copy(1, 0, 0, 1, 2), Copy(2, 0, 1, 1, 3)))
    transfer.wait()
    assert transfer.end_step() == ((1, 2), ())
    return transfer, stores


@pytest.mark.parametrize("verify", [True, False])
def test_a_bit_that_flips_in_a_lower_tier_is_a_lost_source(
    verify: bool, caplog: pytest.LogCaptureFixture
) -> None:
    transfer, stores = copied_out(verify)
    stores[1].data[2, 1, 5] ^= 8
    ticket = transfer.start((Copy(3, 1, 2, 0, 3), Copy(4, 1, 3, 0, 2)), ())
    ticket.wait()
    done, failed = transfer.end_step()
    if verify:
        assert done == (4,) and [(failure.copy_id, failure.source_lost) for failure in failed] == [(3, True)]
        assert "does not hold what was sent there" in failed[0].message and "computed again" in caplog.text
        assert ticket.failed_slots == {(0, 3)}
    else:
        assert done == (3, 4) and not failed
    transfer.close()


def test_exchanged_words_are_noticed_too() -> None:
    transfer, stores = copied_out(verify=True)
    stores[1].data[2] = stores[1].data[2].flip(0)
    ticket = transfer.start((Copy(3, 1, 2, 0, 3),), ())
    ticket.wait()
    assert ticket.failed_slots == {(0, 3)}
    transfer.close()


def test_a_chunk_that_goes_further_down_is_verified_there_too() -> None:
    transfer, stores = copied_out(verify=True)
    transfer.start((), (Copy(3, 1, 2, 2, 0), Copy(4, 1, 3, 2, 1)))
    transfer.wait()
    assert transfer.end_step() == ((3, 4), ())
    stores[2].data[1, 3, 0] ^= 1
    transfer.start((Copy(5, 2, 0, 0, 3), Copy(6, 2, 1, 0, 2)), ()).wait()
    done, failed = transfer.end_step()
    assert done == (5,) and [failure.copy_id for failure in failed] == [6]
    transfer.close()
