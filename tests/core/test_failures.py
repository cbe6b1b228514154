"""A failure stays where it happened: stories on small tiers, with a worker told what to break."""

from __future__ import annotations

import worlds
from fake_worker import FakeWorker, expected_answer
from pensieve.core.plan import CopyFailure, StepPlan, StepResult
from pensieve.core.request import FinishReason
from worlds import CHUNK


class World(worlds.World):
    """Steps are a hundredth of a second apart."""

    def __init__(self, *slots: int, worker: FakeWorker | None = None) -> None:
        super().__init__(*slots, worker=worker, max_batch_tokens=128)
        self.tick_s = 0.01

    def right(self, name: str) -> bool:
        request = self.done[name]
        prompt = request.tokens[: request.num_prompt]
        return (
            request.output == expected_answer(prompt, request.num_output)
            and request.num_output == request.sampling.max_new_tokens
        )


def test_however_many_copies_of_one_step_fail_that_is_one_failure() -> None:
    world = World(14, 30)
    for name in ("a", "b"):
        world.submit(name, [ord(name) % 7 + i % 5 for i in range(45)], 3)
        world.run()
    failed: list[CopyFailure] = []

    def fail_swap_ins(plan: StepPlan, result: StepResult) -> StepResult:
        lost = tuple(CopyFailure(copy.copy_id, False, "a hiccup") for copy in plan.swap_in)
        failed.extend(lost)
        done = tuple(c for c in result.copies_done if c not in {f.copy_id for f in lost})
        return StepResult(
            plan.step_id,
            result.tokens,
            done,
            (*result.copies_failed, *lost),
            result.requests_failed,
            result.forward_error,
        )

    world.submit("again", [*world.done["a"].tokens, 1], 3, conversation="a")
    while not failed:
        world.step(fail_swap_ins)
    world.run()
    assert len(failed) > 4
    assert world.done["again"].num_failures <= 1
    assert world.right("again")


def test_swap_outs_that_always_fail_do_not_stop_the_rest() -> None:
    world = World(8, 8)

    def fail_swap_outs(plan: StepPlan, result: StepResult) -> StepResult:
        lost = tuple(CopyFailure(copy.copy_id, False, "the tier is broken") for copy in plan.swap_out)
        world.worker.settling.clear()
        done = tuple(c for c in result.copies_done if c not in {f.copy_id for f in lost})
        return StepResult(
            plan.step_id, result.tokens, done, lost, result.requests_failed, result.forward_error
        )

    for turn in range(6):
        world.submit(f"r{turn}", [turn + i % 3 for i in range(20)], 3)
        for _ in range(40):
            world.step(fail_swap_outs)
        assert world.right(f"r{turn}")
    copies = sum(len(plan.swap_out) for plan in world.plans)
    assert copies < 40, f"{copies} copies into a tier that never took one"


def test_a_broken_tier_is_tried_again_and_used_when_it_works() -> None:
    world = World(8, 8)
    world.cache.places.failed_down[1] = 3
    world.cache.room._retry_s[1] = 1.0
    world.submit("a", list(range(24)), 3)
    world.run()
    world.step()
    assert world.cache.places.pools[1].num_used == 0, "left alone at first"
    world.now_s = 2.0
    for _ in range(3):
        world.step()
    assert world.cache.places.failed_down[1] == 0
    assert world.cache.places.pools[1].num_used > 0


def test_a_broken_request_does_not_keep_others_from_being_admitted() -> None:
    world = World(60, worker=FakeWorker([60], CHUNK, poison=lambda token: token == 777))
    world.submit("long", [1, 2, 3], 100)
    world.step()
    world.submit("broken", [777], 3)
    world.submit("next", [4, 5, 6], 3)
    for _ in range(12):
        world.step()
    assert world.done["broken"].ending is FinishReason.ERROR
    assert "next" in world.done, "it waited for the whole long answer"
    world.run()
    assert world.right("long")
    assert world.right("next")


def test_failures_far_apart_do_not_add_up() -> None:
    world = World(60)

    def fail_now_and_then(plan: StepPlan, result: StepResult) -> StepResult:
        return StepResult(plan.step_id, forward_error="transient") if plan.step_id % 9 == 8 else result

    world.submit("long", [1, 2, 3], 100)
    for _ in range(200):
        world.step(fail_now_and_then)
    assert world.scheduler.num_forwards_failed > 8
    assert world.right("long")


def test_with_one_tier_a_keep_does_not_lock_out_its_own_conversation() -> None:
    world = World(20)
    world.submit("a", [i % 9 for i in range(38)], 3)
    world.run()
    world.scheduler.set_keep("n", "a", True)
    world.submit("again", [*world.done["a"].tokens, *(i % 5 for i in range(30))], 3, conversation="a")
    world.run()
    assert world.right("again")
