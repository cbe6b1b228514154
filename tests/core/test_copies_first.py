"""Copies that make room: how many are made ahead, and which ones a request waits for."""

from __future__ import annotations

import itertools

from fake_worker import FakeWorker
from worlds import CHUNK, World


def test_copies_ahead_leave_a_small_lower_tier_to_what_lies_nowhere_else() -> None:
    world = World(20, 4, copy_ahead_share=0.5)
    world.turn("old", list(range(65)))  # 17 chunks: 3 are free, half of the tier would be 10
    world.settle()
    assert world.places("old").count("b") == 0, "half of the lower tier's 4 slots are free already"
    world.turn("more", [30, 31, 32, 33, 34])  # 2 more
    world.settle()
    assert world.places("old").count("b") == 1


def test_where_copies_cost_nothing_the_head_of_the_queue_gets_them_in_a_step_of_their_own() -> None:
    world = World(12, 40, copy_ahead_share=0.0, copies_first=True)
    world.turn("old", list(range(41)))  # 11 chunks
    world.submit("a", [1, 2, 3], answer=30)
    world.step()
    world.submit("b", list(range(10, 23)))  # 4 chunks
    plan = world.step()
    assert plan.settles and plan.swap_out and not plan.spans
    plan = world.step()
    assert {span.request_id for span in plan.spans} == {"a", "b"}
    assert not plan.settles
    world.run()


def test_where_copies_cost_nothing_the_reserve_need_not_lie_ready() -> None:
    world = World(12, 40, copy_ahead_share=0.0, copies_first=True, reserve_share=0.5)
    world.turn("old", list(range(29)))  # 8 chunks
    world.submit("a", [1, 2, 3], answer=30)
    world.step()
    world.submit("b", [7, 8, 9])
    assert {span.request_id for span in world.step().spans} == {"a", "b"}
    assert not world.worker.num_swapped_out, (
        "6 slots could be had at the price of copies, but no request needs them yet"
    )
    world.run()


def test_where_copies_cost_nothing_a_growing_request_does_not_wait_for_one() -> None:
    world = World(9, 40, copy_ahead_share=0.0, copies_first=True, reserve_share=0.0)
    world.turn("old", list(range(25)))  # 7 chunks
    world.submit("a", [1, 2, 3], answer=20)
    plans = []
    while world.scheduler.requests:
        plans.append(world.step())
    assert any(plan.settles for plan in plans)
    assert all(plan.spans or plan.settles or plan.is_empty for plan in plans)
    assert sum(bool(plan.spans) for plan in plans) == 20, "one a token: none was lost to a copy"


def test_steps_that_only_copy_never_follow_each_other() -> None:
    worker = FakeWorker([12, 40], CHUNK, copy_failure_rate=1.0)
    world = World(12, 40, copy_ahead_share=0.0, copies_first=True, worker=worker)
    world.turn("old", list(range(41)))
    world.submit("a", [1, 2, 3], answer=40)
    world.step()
    world.submit("b", list(range(10, 23)))
    plans = [world.step() for _ in range(12)]
    assert any(plan.settles for plan in plans)
    assert all(earlier.spans or later.spans for earlier, later in itertools.pairwise(plans)), (
        "a broken tier stops no request"
    )
