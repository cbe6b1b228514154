"""The table of moves, exhaustively: what it allows leads where it says, what it does not allow changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from pensieve.config import CacheConfig, TierConfig
from pensieve.core.chunk import MOVES, Chunk, ChunkEvent, ChunkState, IllegalMove
from pensieve.core.eviction import LRU
from pensieve.core.places import Places
from pensieve.core.sequence import Sequence

FULL = 32


class Bench:
    """One chunk in a two-tier cache, brought into any state, and every event as a call."""

    def __init__(self) -> None:
        config = CacheConfig((TierConfig("gpu", 4), TierConfig("cpu", 4)))
        self.vanished: list[Chunk] = []
        self.places = Places(config, LRU, self.vanished.append)
        self.chunk = Chunk(0, 2, Sequence(("n", "c"), 0.0), None)

    def slot(self, tier: int) -> int:
        slot = self.places.pools[tier].take()
        assert slot is not None
        return slot

    def bring_to(self, state: ChunkState) -> None:
        if state is ChunkState.ABSENT:
            return
        self.places.begin_compute(self.chunk, self.slot(0))
        if state is ChunkState.COMPUTING:
            return
        self.places.finish_compute(self.chunk, FULL)
        self.places.lease(self.chunk, -1)
        if state is ChunkState.UPPER:
            return
        copy = self.places.begin_copy(self.chunk, 0, 1, self.slot(1))
        if state is ChunkState.UPPER_COPYING:
            return
        self.places.finish_copy(copy.copy_id)
        if state is ChunkState.BOTH:
            return
        self.places.pools[0].release(self.places.reclaim(self.chunk, 0))
        if state is ChunkState.LOWER:
            return
        self.places.begin_copy(self.chunk, 1, 0, self.slot(0))
        assert state is ChunkState.LOWER_COPYING

    @property
    def copy_id(self) -> int:
        return self.chunk.copy.copy_id if self.chunk.copy else 999

    def begin_copy(self, src: int, dst: int) -> None:
        slot = self.slot(dst)
        try:
            self.places.begin_copy(self.chunk, src, dst, slot)
        except IllegalMove:
            self.places.pools[dst].release(slot)
            raise

    def begin_compute(self) -> None:
        slot = self.slot(0)
        try:
            self.places.begin_compute(self.chunk, slot)
        except IllegalMove:
            self.places.pools[0].release(slot)
            raise

    def calls(self) -> dict[ChunkEvent, Callable[[], object]]:
        places, chunk = self.places, self.chunk
        return {
            ChunkEvent.BEGIN_COMPUTE: self.begin_compute,
            ChunkEvent.FINISH_COMPUTE: lambda: places.finish_compute(chunk, FULL),
            ChunkEvent.FAIL_COMPUTE: lambda: places.fail_compute(chunk),
            ChunkEvent.BEGIN_SWAP_OUT: lambda: self.begin_copy(0, 1),
            ChunkEvent.RECLAIM: lambda: places.reclaim(chunk, 0),
            ChunkEvent.RELEASE_LOWER: lambda: places.release_lower(chunk, 1),
            ChunkEvent.APPEND: lambda: places.append(chunk, FULL),
            ChunkEvent.BEGIN_SWAP_IN: lambda: self.begin_copy(1, 0),
            ChunkEvent.DROP: lambda: places.drop(chunk),
            # what settles a copy names the copy; the same call means the swap-out's or the swap-in's event
            ChunkEvent.FINISH_SWAP_OUT: lambda: places.finish_copy(self.copy_id),
            ChunkEvent.FINISH_SWAP_IN: lambda: places.finish_copy(self.copy_id),
            ChunkEvent.FAIL_SWAP_OUT: lambda: places.fail_copy(self.copy_id, source_lost=False),
            ChunkEvent.FAIL_SWAP_IN: lambda: places.fail_copy(self.copy_id, source_lost=False),
            ChunkEvent.LOSE: lambda: places.fail_copy(self.copy_id, source_lost=True),
        }

    def snapshot(self) -> tuple[object, ...]:
        chunk, places = self.chunk, self.places
        return (
            tuple(chunk.slots),
            chunk.computing,
            chunk.copy,
            chunk.leases,
            chunk.keeps,
            chunk.num_tokens,
            chunk.queues,
            tuple(pool.num_free for pool in places.pools),
            tuple(tuple(sorted(pool.free_slots())) for pool in places.pools),
            tuple(places.copies),
            places.num_chunks,
        )


SETTLES_DOWN = {ChunkEvent.FINISH_SWAP_OUT, ChunkEvent.FAIL_SWAP_OUT}
SETTLES_UP = {ChunkEvent.FINISH_SWAP_IN, ChunkEvent.FAIL_SWAP_IN, ChunkEvent.LOSE}


# What settles a copy is one call for both directions: the copy's own makes it a swap-out's event or a swap-in's.
CASES = [
    (state, event)
    for state, event in itertools.product(ChunkState, ChunkEvent)
    if not (event in SETTLES_DOWN and state is ChunkState.LOWER_COPYING)
    and not (event in SETTLES_UP and state is ChunkState.UPPER_COPYING)
]


@pytest.mark.parametrize(("state", "event"), CASES, ids=lambda value: value.name)
def test_every_pair_of_state_and_event(state: ChunkState, event: ChunkEvent) -> None:
    bench = Bench()
    bench.bring_to(state)
    assert bench.chunk.state(0, 1) is state
    before = bench.snapshot()
    target = MOVES.get((state, event))
    if target is None:
        with pytest.raises((IllegalMove, KeyError)) as raised:
            bench.calls()[event]()
        if raised.type is IllegalMove:
            message = str(raised.value)
            assert event.value in message and "chunk 0" in message
            assert state.value in message or "while a copy is under way" in message
        assert bench.snapshot() == before
    else:
        bench.calls()[event]()
        assert bench.chunk.state(0, 1) is target
        assert (target is ChunkState.ABSENT) == (bench.chunk in bench.vanished)


@pytest.mark.parametrize(
    ("state", "event"),
    [
        (ChunkState.BOTH, ChunkEvent.RECLAIM),
        (ChunkState.UPPER, ChunkEvent.DROP),
        (ChunkState.LOWER, ChunkEvent.DROP),
    ],
)
def test_a_leased_chunk_is_never_reclaimed_or_dropped(state: ChunkState, event: ChunkEvent) -> None:
    bench = Bench()
    bench.bring_to(state)
    bench.places.lease(bench.chunk, +1)
    before = bench.snapshot()
    with pytest.raises(IllegalMove, match="leased"):
        bench.calls()[event]()
    assert bench.snapshot() == before


@pytest.mark.parametrize("state", [ChunkState.UPPER, ChunkState.LOWER])
def test_a_kept_chunk_is_never_dropped_but_may_change_tier(state: ChunkState) -> None:
    bench = Bench()
    bench.bring_to(state)
    bench.chunk.keeps = 1
    with pytest.raises(IllegalMove, match="kept"):
        bench.places.drop(bench.chunk)
    if state is ChunkState.UPPER:
        bench.begin_copy(0, 1)
        bench.places.finish_copy(bench.copy_id)
        bench.places.reclaim(bench.chunk, 0)
        assert bench.chunk.state(0, 1) is ChunkState.LOWER


def test_an_append_during_the_copy_makes_finish_discard_it() -> None:
    bench = Bench()
    bench.bring_to(ChunkState.UPPER_COPYING)
    bench.places.append(bench.chunk, FULL)
    bench.places.finish_copy(bench.copy_id)
    assert bench.chunk.state(0, 1) is ChunkState.UPPER
    assert bench.places.pools[1].num_used == 0


def test_an_append_frees_a_stale_lower_copy() -> None:
    bench = Bench()
    bench.bring_to(ChunkState.BOTH)
    bench.places.append(bench.chunk, FULL)
    assert bench.places.pools[1].num_used == 0


@pytest.mark.parametrize("state", [ChunkState.UPPER_COPYING, ChunkState.LOWER_COPYING])
@pytest.mark.parametrize("fails", [False, True])
def test_a_chunk_let_go_during_a_copy_frees_its_slots_when_the_copy_settles(
    state: ChunkState, fails: bool
) -> None:
    bench = Bench()
    bench.bring_to(state)
    bench.places.discard(bench.chunk)
    assert bench.places.pools[0].num_used == 1
    assert bench.places.pools[1].num_used == 1
    if fails:
        bench.places.fail_copy(bench.copy_id, source_lost=True)
    else:
        bench.places.finish_copy(bench.copy_id)
    assert [pool.num_used for pool in bench.places.pools] == [0, 0]
    assert bench.places.num_chunks == 0
