"""After an erasure not one byte of a conversation is left in any tier; and no slot hands one owner's bytes to the next."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from fake_worker import FakeWorker
from pensieve.core import wipes
from pensieve.core.plan import CopyFailure, StepPlan, StepResult
from pensieve.core.request import FinishReason
from pensieve.errors import WorkerFailed
from worlds import CHUNK, World

SECRET = list(range(1000, 1022))  # 5.5 chunks
SYSTEM = [40, 41, 42, 43, 44, 45, 46, 47]


def test_a_conversation_in_both_tiers_is_gone_from_both() -> None:
    world = World(12, 12, copy_ahead_share=0.9)
    log = world.turn("a", SECRET, 3).tokens
    other = world.turn("b", list(range(2000, 2010)), 3).tokens
    world.settle()
    assert "b" in world.places("a") and world.remains(log) > len(SECRET)
    sequence = world.cache.find("n", "a")
    assert sequence is not None
    slots = sum(slot is not None for chunk in sequence.chunks if chunk for slot in chunk.slots)
    erasure = world.erase("a")
    assert not erasure.done and world.remains(log), "nothing is zero before a worker has run"
    assert world.finish(erasure) == 1
    assert erasure.num_slots == slots
    assert world.remains(log) == 0 and world.unclean_free_slots() == []
    assert world.remains(other) >= 12, "the others' stay"


def test_what_was_evicted_long_ago_goes_as_well() -> None:
    """Its record is gone, its bytes still lie in a free slot."""
    world = World(8, 0)
    log = world.turn("a", SECRET, 1).tokens
    world.drop("a", 0, 1, 2, 3, 4, 5)
    assert world.cache.find("n", "a") is None and world.remains(log) > 0
    erasure = world.erase("a")
    assert erasure.num_slots == 0
    world.finish(erasure)
    assert world.remains(log) == 0


def test_nothing_cached_at_all_is_done_at_once() -> None:
    assert World(8, 4).erase("unknown").done


def test_forgetting_without_erasing_is_done_at_once_and_leaves_the_bytes() -> None:
    world = World(12, 0)
    log = world.turn("a", SECRET, 1).tokens
    forgotten = world.scheduler.forget("n", "a", world.now_s)
    assert forgotten is not None and forgotten.done and forgotten.num_slots == 6
    assert world.remains(log) > 0 and world.cache.places.pools[0].num_used == 0


def test_a_slot_is_wiped_before_another_computes_in_it() -> None:
    """Otherwise the rest of a partial chunk would hold an earlier owner's bytes, and outlive its erasure there."""
    world = World(6, 0)
    log = world.turn("a", SECRET, 1).tokens
    world.scheduler.forget("n", "a", world.now_s)
    plan_of = []
    world.submit("b", [1, 2])
    plan_of.append(world.step())
    (wiped,) = plan_of[0].wiped
    chunk = world.cache.find("n", "b").chunks[0]  # type: ignore[union-attr]
    assert chunk is not None and wiped == (0, chunk.slots[0])
    assert not set(world.worker.tiers[0][wiped[1]]) & set(log), "only b's cells and zeros"
    assert world.worker.tiers[0][wiped[1]][2:] == [0, 0]
    erasure = world.erase("a")
    world.finish(erasure)
    assert world.remains(log) == 0


def test_a_clean_slot_is_not_wiped_again() -> None:
    world = World(6, 0)
    world.submit("a", SECRET[:10])
    assert world.step().wiped == ()


def test_a_shared_chunk_stays_with_the_others_and_goes_with_the_last() -> None:
    world = World(16, 16, copy_ahead_share=0.9)
    log = world.turn("a", [*SYSTEM, *SECRET], 1).tokens
    world.turn("b", [*SYSTEM, 5, 6, 7], 1)
    world.settle()
    world.finish(world.erase("a"))
    assert world.remains(log[8:]) == 0
    assert world.remains(SYSTEM) == 2 * len(SYSTEM), "in both tiers, for b"
    assert world.turn("b2", [*SYSTEM, 5, 6, 8], conversation="b").receipt.gpu_tokens >= 8
    world.scheduler.forget("n", "b", world.now_s)  # without erase: what a shared with b is a's as well
    world.settle()
    assert world.remains(SYSTEM) == 0
    assert not world.cache.places.marked


def test_a_marked_chunk_leaves_nothing_where_it_moves() -> None:
    """Reclaimed for a copy that then fails: not even there."""
    world = World(8, 8, copy_ahead_share=0.9, reserve_share=0.0)
    world.turn("a", [*SYSTEM, *SECRET[:6]], 1)
    world.turn("b", [*SYSTEM, 5], 1)
    world.settle()
    world.finish(world.erase("a"))
    places = world.cache.places
    chunk = world.cache.find("n", "b").chunks[0]  # type: ignore[union-attr]
    assert chunk is not None and chunk in places.marked and None not in chunk.slots
    slot = places.reclaim(chunk, 0)
    other = world.cache.find("n", "b").chunks[1]  # type: ignore[union-attr]
    assert other is not None and other.slots[1] is not None
    places.pools[0].release(places.reclaim(other, 0))
    copy = places.begin_copy(other, 1, 0, slot)
    assert (0, slot) in world.step(
        lambda plan, result: replace(
            result, copies_done=(), copies_failed=(CopyFailure(copy.copy_id, False, "x"),)
        )
    ).wiped


def test_a_copy_under_way_is_waited_for_and_its_target_wiped() -> None:
    """Whatever becomes of it."""
    for delay, rate in ((3, 0.0), (3, 1.0)):
        world = World(
            12,
            12,
            copy_ahead_share=0.9,
            worker=FakeWorker([12, 12], CHUNK, swap_out_delay=delay, rng=random.Random(1)),
        )
        log = world.turn("a", SECRET, 1).tokens
        world.worker.copy_failure_rate = rate
        world.step()
        assert world.cache.places.copies
        erasure = world.erase("a")
        assert erasure.copies
        assert world.finish(erasure) > 1
        assert world.remains(log) == 0 and world.unclean_free_slots() == []


def test_a_copy_into_a_slot_with_old_bytes_is_waited_for() -> None:
    """Another's swap-out has taken a slot below that the conversation once had: until it is filled, the bytes are there."""
    world = World(12, 8, copy_ahead_share=0.9)
    log = world.turn("a", SECRET, 1).tokens
    world.settle()
    world.scheduler.forget("n", "a", world.now_s)
    world.turn("b", list(range(2000, 2022)), 1)
    world.worker.swap_out_delay, world.worker.rng = 5, random.Random(3)
    world.worker.copy_failure_rate = 1.0  # and then it fails
    world.step()
    assert world.cache.places.copies and world.remains(log)
    erasure = world.erase("a")
    world.finish(erasure)
    assert world.remains(log) == 0


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_erasing_a_conversation_that_runs_ends_its_turn_and_no_other(lag: int) -> None:
    world = World(24, 24, lag=lag, copy_ahead_share=0.6)
    secret = world.submit("a", SECRET, 40)
    world.submit("b", [1, 2, 3], 30)
    world.submit("c", [4, 5, 6], 30)
    for _ in range(6):
        world.step()
    erasure = world.erase("a")
    assert secret.ending is FinishReason.ABORT
    world.finish(erasure)
    assert world.remains(secret.tokens) == 0
    assert len(world.scheduler.running) == 2
    world.run()
    for name in ("b", "c"):
        assert world.done[name].num_output == 30
    world.turn("b2", [*world.done["b"].tokens, 9], conversation="b")


def test_wipes_in_flight_count_only_once_they_are_committed() -> None:
    world = World(12, 0, lag=2)
    world.turn("a", SECRET, 1)
    first = world.erase("a")
    world.submit("b", [1, 2, 3], 9)
    world.step()
    assert world.cache.places.wipes.has_work is False
    again = world.erase("a")
    assert not first.done and not again.done
    world.finish(again)
    assert first.done


def test_many_free_slots_take_several_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wipes, "MAX_WIPES", 4)
    world = World(40, 0)
    log = world.turn("a", list(range(1000, 1060)), 1).tokens
    erasure = world.erase("a")
    taken = []
    while not erasure.done:
        assert world.remains(log) > 0
        taken.append(len(world.step().wiped))
    assert taken == [4, 4, 4, 3]
    assert world.remains(log) == 0


def test_slots_that_wait_to_be_wiped_can_be_used_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wipes, "MAX_WIPES", 1)
    world = World(10, 10, copy_ahead_share=0.9)
    log = world.turn("a", SECRET, 1).tokens
    world.settle()
    erasure = world.erase("a")
    world.turn("b", list(range(2000, 2030)), 2)  # takes most of them, to compute in and to copy to
    world.finish(erasure)
    assert world.remains(log) == 0


def test_a_failed_wipe_is_tried_again_and_an_engine_that_cannot_wipe_stops() -> None:
    world = World(12, 0)
    log = world.turn("a", SECRET, 1).tokens
    erasure = world.erase("a")
    fail = [1]

    def broken(plan: StepPlan, result: StepResult) -> StepResult:
        return replace(result, wipe_error="no memory", forward_error="no memory") if fail else result

    world.step(broken)
    assert not erasure.done and world.cache.places.wipes.has_work
    fail.clear()
    world.step(broken)
    assert erasure.done and world.remains(log) == 0
    world.turn("b", SECRET, 1)
    world.erase("b")
    fail.append(1)
    world.step(broken)
    world.step(broken)
    with pytest.raises(WorkerFailed, match="could not be zeroed 3 times in a row: no memory"):
        world.step(broken)


def test_a_planted_bug_is_caught() -> None:
    """A worker that skips a wipe is found out by the same searches."""

    class Forgetful(FakeWorker):
        def wipe(self, tier: int, slot: int) -> None:
            pass

    world = World(12, 12, worker=Forgetful([12, 12], CHUNK))
    log = world.turn("a", SECRET, 1).tokens
    world.finish(world.erase("a"))
    assert world.remains(log) > 0
    assert world.unclean_free_slots() != []
