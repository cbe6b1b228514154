"""A simulation is given up when its goal is missed for certain, and never else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulator_worlds import LOAD, MACHINE, small

from pensieve.reporting.spread import Spread
from pensieve.simulator.case import Case, Machine, Outcome, run_case
from pensieve.simulator.goal import Goal, Lateness, Metric, Quantile, Waiting
from pensieve.simulator.planner import Prices, Trials
from pensieve.workloads.load_plan import LoadOptions
from pensieve.workloads.scripts import Player, Script, ScriptTurn


@given(st.lists(st.floats(0, 2), min_size=1, max_size=300), st.sampled_from(["p50", "p90", "p99"]))
def test_so_many_may_be_late_as_the_quantile_allows(values: list[float], quantile: Quantile) -> None:
    goal = Goal(1.0, quantile)
    late = sum(value > 1.0 for value in values)
    assert (late > goal.most_late(len(values))) == (goal.quantile_of(Spread.of(values)) > 1.0)


@pytest.mark.parametrize("metric", ["normalized", "ttft"])
@pytest.mark.parametrize(
    "load",
    [replace(LOAD, users=80), replace(LOAD, users=None, rates=(15.0,), duration_s=20.0, turns=6)],
    ids=["users", "a window"],
)
def test_what_is_given_up_would_have_missed_and_nothing_else_changes(
    load: LoadOptions, metric: Metric
) -> None:
    case = small(load=load, debug=False, warm_up_s=2.0 if load.rates else 0.0)
    whole = run_case(case)
    assert not whole.gave_up
    given_up = 0
    latency_s = Goal(1.0, "p90", metric).of(whole.summary)
    for factor in (0.1, 0.5, 0.9, 0.999, 1.001, 2.0):
        goal = Goal(factor * latency_s, "p90", metric)
        outcome = run_case(replace(case, give_up=goal))
        if outcome.gave_up:
            assert factor < 1.0
            assert outcome.num_steps < whole.num_steps
            given_up += 1
        else:
            assert replace(outcome, case=case) == whole
    assert given_up >= 2


def test_a_failed_request_misses_every_goal() -> None:
    machine = Machine("smollm2-135m", "a100-80gb", gpu_cache_gb=MACHINE.gpu_cache_gb / 4, cpu_cache_gb=0.0)
    load = replace(
        LOAD, users=4, turns=60, first_tokens=20, new_tokens=10, output_tokens=10
    )  # grows until it does not fit
    case = small(load=load, machine=machine, debug=False)
    assert run_case(case).summary.failed
    assert run_case(replace(case, give_up=Goal(1e6))).gave_up


def test_turns_that_could_be_sent_in_time_are_counted_and_no_others() -> None:
    turns = tuple(
        ScriptTurn(10, 10, think_s=think_s, due_s=due_s)
        for think_s, due_s in ((0.0, None), (4.0, None), (1.0, 20.0), (1.0, None))
    )
    player = Player(5.0, (Script("a", turns),))  # at 5, 9, 20 and 21 s at the earliest
    waiting = [Waiting(5.0, 10, None)]
    for end_s, most_late in ((9.0, 0), (9.1, 1), (20.5, 1), (math.inf, 2)):  # p50 of 1, 2, 3 and 4
        lateness = Lateness(Goal(0.1, "p50"), [player], (0.0, end_s))
        assert lateness.missed([], waiting * most_late, 100.0) is False
        assert lateness.missed([], waiting * (most_late + 1), 100.0) is True
        assert lateness.missed([], waiting * 4, 5.5) is False  # half a second for ten tokens is not late yet
    outside = Lateness(Goal(0.1, "p50"), [player], (6.0, 9.0))
    assert outside.missed([], waiting * 9, 100.0) is False


def test_what_was_given_up_is_simulated_again_only_if_its_figures_are_asked_for() -> None:
    batches: list[list[Case]] = []

    def run(cases: Sequence[Case]) -> list[Outcome]:
        batches.append(list(cases))
        return [run_case(case) for case in cases]

    load = replace(LOAD, users=None, rates=(15.0,), duration_s=20.0)
    base = small(load=load, debug=False)
    book = Trials(base, Goal(1e-4), Prices(1.0, 1.0, 1.0, 1.0), run)
    (given_up,) = book.try_all([(base.machine, 1.0)], to_the_end=False)
    assert given_up.outcome.gave_up and math.isinf(given_up.latency_s) and not book.holds(given_up)
    assert book.try_all([(base.machine, 1.0)], to_the_end=False) == [given_up]
    (whole,) = book.try_all([(base.machine, 1.0)])
    assert not whole.outcome.gave_up and 1e-4 < whole.latency_s < math.inf
    assert book.try_all([(base.machine, 1.0)], to_the_end=False) == [whole] == list(book.trials.values())
    assert len(batches) == 2
