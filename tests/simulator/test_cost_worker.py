"""The worker that costs: how computing and copying share time, on numbers small enough to check by hand."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from pensieve.core.plan import Copy, RequestStart, Span, StepPlan
from pensieve.core.request import SamplingParams
from pensieve.simulator.cost_model import Overheads
from pensieve.simulator.worker import CostWorker, Links, VirtualClock


class OneSecond:
    """A forward takes 1 s, in 4 layers."""

    num_layers = 4

    def step_s(self, spans: Iterable[Span]) -> float:
        return 1.0 if list(spans) else 0.0


def links(*, hold_back: bool = True) -> Links:
    """A chunk of 100 bytes takes 1 s each way, 2 s to the disk and 4 s from it; both ways at once at half the rate."""
    return Links(100, 100.0, 25.0, 50.0, 0.5, hold_back)


def worker(*, hold_back: bool = True, overheads: Overheads | None = None) -> tuple[CostWorker, VirtualClock]:
    clock = VirtualClock()
    return CostWorker(OneSecond(), links(hold_back=hold_back), 3, clock, overheads), clock


def up(copy_id: int, tier: int = 1) -> Copy:
    return Copy(copy_id, tier, 0, 0, 0)


def down(copy_id: int, tier: int = 0) -> Copy:
    return Copy(copy_id, tier, 0, tier + 1, 0)


def plan(
    step: int,
    *,
    spans: int = 0,
    swap_in: tuple[Copy, ...] = (),
    swap_out: tuple[Copy, ...] = (),
    settles: bool = False,
) -> StepPlan:
    return StepPlan(
        step, tuple(Span(f"r{i}", 4, 5, None, emits_token=True) for i in range(spans)), swap_in, swap_out,
        tuple(RequestStart(f"r{i}", SamplingParams(), (7, 8 + i)) for i in range(spans)), (), (), (), settles=settles,
    )  # fmt: skip


def test_a_step_takes_what_it_costs_and_overheads_and_samples_the_prompts_last_id() -> None:
    it, clock = worker(overheads=Overheads(0.5, 0.25))
    result = it.run(plan(0, spans=2))
    assert clock.now_s == pytest.approx(1.0 + 0.5 + 2 * 0.25)
    assert [(token.request_id, token.token_id) for token in result.tokens] == [("r0", 8), ("r1", 9)]


def test_layers_are_computed_while_later_ones_are_copied() -> None:
    it, clock = worker()
    # 2 chunks: 0.5 s a layer to copy, 0.25 s to compute. The last layer's copy ends at 2 s, and it is computed by 2.25 s
    assert it.run(plan(0, spans=1, swap_in=(up(0), up(1)))).copies_done == (0, 1)
    assert clock.now_s == pytest.approx(2.25)
    # half a chunk's time: 0.125 s a layer to copy; the first layer waits for its own, the rest is there in time
    it._links = Links(50, 100.0, 25.0, 50.0, 0.5)
    it.run(plan(1, spans=1, swap_in=(up(2),)))
    assert clock.now_s == pytest.approx(2.25 + 0.125 + 1.0)
    assert it.waited_s == pytest.approx(1.25 + 0.125)


def test_chunks_from_the_disk_come_at_its_rate() -> None:
    it, clock = worker()
    it.run(plan(0, swap_in=(up(0, tier=2),)))
    assert clock.now_s == pytest.approx(4.0)


def test_swap_outs_go_on_in_the_background_one_after_the_other() -> None:
    it, clock = worker()
    assert it.run(plan(0, spans=1, swap_out=(down(0), down(1), down(2, tier=1)))).copies_done == (0,)
    assert clock.now_s == pytest.approx(1.0)
    assert it.next_settled_s == pytest.approx(2.0)
    assert it.run(plan(1, spans=1)).copies_done == (1, 2)  # the disk's lane is another
    assert it.next_settled_s is None


def test_a_copy_is_reported_by_an_empty_plan_once_time_has_moved_on() -> None:
    it, clock = worker()
    assert it.run(plan(0, swap_out=(down(0),))).copies_done == ()
    assert clock.now_s == 0.0
    assert it.next_settled_s == pytest.approx(1.0)
    clock.advance(1.0)
    assert it.run(plan(1)).copies_done == (0,)


def test_a_plan_that_settles_ends_with_its_swap_outs() -> None:
    it, clock = worker()
    assert it.run(plan(0, swap_out=(down(0), down(1)), settles=True)).copies_done == (0, 1)
    assert clock.now_s == pytest.approx(2.0)


def test_swap_outs_wait_for_swap_ins() -> None:
    it, clock = worker()
    it.run(plan(0, swap_in=(up(0), up(1)), swap_out=(down(2),)))
    assert clock.now_s == pytest.approx(2.0)
    assert it.next_settled_s == pytest.approx(3.0)


def test_both_directions_at_once_cost_each_other() -> None:
    it, clock = worker()
    it.run(plan(0, swap_out=(down(0),)))
    it.run(
        plan(1, spans=0, swap_in=())
    )  # (begins nothing: the copy of step 0 is not under way before time moves)
    clock.advance(0.5)
    assert it.run(plan(2)).copies_done == ()  # now it is, with 0.5 s to go
    it.run(plan(3, swap_in=(up(1),)))
    # 0.5 s of both at half the rate take 1 s for what is left of the copy down; meanwhile half a chunk came up
    assert clock.now_s == pytest.approx(0.5 + 1.25, abs=0.3)
    assert clock.now_s > 1.5 + 0.1
    held, both = worker(), worker(hold_back=False)
    for one, _ in (held, both):
        one.run(plan(0, swap_out=(down(0), down(1)), swap_in=()))
        one.run(plan(1, swap_in=(up(2), up(3))))
    assert held[1].now_s < both[1].now_s


def test_time_never_runs_backwards() -> None:
    clock = VirtualClock()
    clock.advance(2.0)
    with pytest.raises(AssertionError, match="backwards"):
        clock.advance(1.0)
