"""Hints that a user is typing or is done: they never take room that a request needs."""

from __future__ import annotations

import pytest

from pensieve.core import hints
from pensieve.core.eviction import POLICIES
from pensieve.errors import ConversationNotFound
from worlds import World, below


def test_typing_brings_chunks_up_while_nothing_runs() -> None:
    world = World(10, 20, copy_ahead_share=0.9)
    log = below(world, "a", list(range(20)))
    assert world.places("a") == "ccccc"
    assert world.scheduler.warm("n", "a", world.now_s) == 5
    plan = world.step()
    assert len(plan.swap_in) == 5 and not plan.spans, "a plan of copies alone"
    assert world.places("a") == "bbbbb", "clean copies: they may be reclaimed at no cost"
    assert world.turn("next", [*log, 3], conversation="a").receipt.cpu_tokens == 0


def test_a_few_chunks_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hints, "CHUNKS_A_STEP", 2)
    world = World(16, 20, copy_ahead_share=0.9)
    below(world, "a", list(range(20)))
    below(world, "b", list(range(30, 42)))
    world.scheduler.warm("n", "a", world.now_s)
    world.scheduler.warm("n", "b", world.now_s)
    assert [len(world.step().swap_in) for _ in range(5)] == [2, 2, 2, 2, 0]


def test_a_reserve_stays_free() -> None:
    world = World(10, 40, copy_ahead_share=0.9, reserve_share=0.3)
    below(world, "a", list(range(36)))
    world.scheduler.warm("n", "a", world.now_s)
    assert len(world.step().swap_in) == 7
    assert world.cache.places.pools[0].num_free == 3


def test_the_queue_goes_first() -> None:
    world = World(10, 40, copy_ahead_share=0.9)
    below(world, "a", list(range(20)))
    world.submit("running", [1, 2, 3], answer=30)
    world.step()
    world.submit("waiting", list(range(100, 135)))
    world.scheduler.warm("n", "a", world.now_s)
    for _ in range(3):
        assert world.step().swap_in == ()
    assert world.scheduler.num_waiting == 1
    world.scheduler.abort("waiting", world.now_s)
    assert len(world.step().swap_in) > 0


def test_only_what_is_worth_less_gives_way() -> None:
    """The clean copies of a conversation that is active itself stay where they are."""
    world = World(6, 40, copy_ahead_share=0.9, reserve_share=0.0)
    below(world, "a", list(range(12)))
    log = world.turn("b", list(range(100, 123)), 1).tokens
    world.cache.room.copy_ahead(1.0, 99, world.now_s)
    world.settle()
    assert world.places("b") == "bbbbbb"
    world.scheduler.warm("n", "b", world.now_s + 5.0)  # typing as well, and later
    world.scheduler.warm("n", "a", world.now_s)
    assert world.step().swap_in == ()
    assert world.places("b") == "bbbbbb"
    world.now_s += 5.0
    world.scheduler.warm("n", "a", world.now_s)
    assert len(world.step().swap_in) == 3
    assert world.places("b") == "cccbbb"
    assert world.remains(log) > 0


def test_a_hint_that_finds_no_room_is_dropped_after_a_while() -> None:
    world = World(6, 40, copy_ahead_share=0.0, reserve_share=0.5)
    log = world.turn("a", list(range(20)), 1).tokens
    world.cache.room.copy_ahead(0.9, 9, world.now_s)
    world.settle()
    world.turn("b", list(range(100, 120)), 1)
    assert "c" in world.places("a")
    world.scheduler.warm("n", "a", world.now_s)
    for _ in range(12):
        world.step()
    assert not world.scheduler.has_work
    world.turn("a2", [*log, 2], conversation="a")


def test_typing_counts_as_activity() -> None:
    world = World(8, 0)
    world.turn("old", list(range(12)), 1)
    world.turn("new", list(range(100, 112)), 1)
    world.now_s += 100.0
    world.scheduler.warm("n", "old", world.now_s)
    world.turn("third", list(range(200, 212)), 1)
    assert world.places("old") == "ggg"
    assert "." in world.places("new")


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_who_is_done_goes_first_until_the_next_turn(policy: str) -> None:
    world = World(12, 0, policy=policy)
    log = world.turn("done", list(range(16)), 1).tokens
    world.turn("older", list(range(100, 116)), 1)
    world.now_s += 60.0
    world.turn("done2", [*log, 1], conversation="done")  # the latest of all
    assert world.scheduler.idle("n", "done") == 5
    world.turn("third", list(range(200, 216)), 1)
    assert world.places("older") == "gggg"
    assert "." in world.places("done")
    world.turn("done3", [*log, 2], conversation="done")
    world.turn("fourth", list(range(300, 304)), 1)
    assert "." not in world.places("done"), "a turn undoes it"


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_shared_chunk_goes_first_only_when_all_are_done(policy: str) -> None:
    world = World(12, 0, policy=policy)
    system = [7] * 8
    world.turn("a", [*system, 1, 2, 3], 1)
    world.turn("b", [*system, 4, 5, 6], 1)
    world.turn("c", list(range(100, 112)), 1)
    shared = world.cache.find("n", "a").chunks[0]  # type: ignore[union-attr]
    assert shared is not None
    world.scheduler.idle("n", "a")
    assert world.cache.places.only_copy[0].worst(world.now_s) is world.cache.find("n", "a").chunks[2]  # type: ignore[union-attr]
    assert shared.owner.last_active_s > 0
    world.scheduler.idle("n", "b")
    assert shared.owner.last_active_s < 0
    world.scheduler.warm("n", "b", world.now_s)
    assert shared.owner.last_active_s == world.now_s


def test_hints_for_what_is_not_cached_are_refused() -> None:
    world = World(8, 0)
    with pytest.raises(ConversationNotFound, match="nothing is cached for conversation 'x'"):
        world.scheduler.warm("n", "x", 0.0)
    with pytest.raises(ConversationNotFound, match="nothing is cached for conversation 'x'"):
        world.scheduler.idle("n", "x")
    world.submit("x", [1, 2, 3])  # queued, nothing computed yet
    with pytest.raises(ConversationNotFound):
        world.scheduler.warm("n", "x", 0.0)


def test_a_conversation_erased_while_it_comes_up_leaves_nothing() -> None:
    world = World(10, 20, copy_ahead_share=0.9, lag=1)
    log = below(world, "a", list(range(1000, 1020)))
    world.scheduler.warm("n", "a", world.now_s)
    plan = world.scheduler.schedule(world.now_s)
    assert plan.swap_in
    erasure = world.erase("a")
    assert erasure.copies
    world.late.submit(plan)
    world.finish(erasure)
    assert world.remains(log) == 0
