"""From reports to figures, curves to one number, figures to goals."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peer_fakes import report as make_report
from peer_fakes import request, run_of
from peers.curve import Crossing, Point, throughput_at
from peers.errors import PeerError
from peers.goals import GOALS, Goal, judge
from peers.metrics import check, figures, sweep
from peers.workloads import PENSIEVE, VLLM, Measurement, workloads

ONE = Measurement("users", users=2, turns=2, new_tokens=100, output_tokens=64)


def test_a_closed_loops_figures() -> None:
    told = figures(
        ONE,
        make_report(
            [run_of(requests_per_s=3.0, output_tokens_per_s=192.0, prompt_tokens=1000, cached_tokens=400)]
        ),
    )
    assert (
        told["users/requests_per_s"] == 3.0
        and told["users/output_tokens_per_s"] == 192.0
        and told["users/cached_share"] == 0.4
    )
    assert told["users/ttft_p90_ms"] == 90.0 and told["users/normalized_mean_ms"] == 40.0
    assert told["users/ttft_turn0_ms"] == 100.0 and told["users/ttft_turn1_ms"] == 50.0


def test_prefill_and_decode_are_of_each_request_by_itself() -> None:
    requests = [
        request(prompt_tokens=1000, ttft_s=0.5, latency_s=1.5, output_tokens=101),
        request(prompt_tokens=1000, ttft_s=0.25, latency_s=1.25, output_tokens=51),
    ]
    told = figures(ONE, make_report([run_of()], [*requests, request(error="broken")]))
    assert told["users/prefill_tokens_per_s"] == pytest.approx(3000.0)  # the median of 2,000 and 4,000
    assert told["users/decode_tokens_per_s"] == pytest.approx(
        75.0
    )  # of 100 and 50: the first token is the prefill's


def test_what_a_server_does_not_tell_has_no_figure() -> None:
    told = figures(ONE, make_report([run_of(cached_tokens=None)], [request(prompt_tokens=None)]))
    assert "users/cached_share" not in told and "users/prefill_tokens_per_s" not in told


def test_an_open_loop_has_points_by_rate_and_no_figures_of_a_closed_one() -> None:
    told = make_report(
        [
            run_of(rate=2.0, requests_per_s=1.9, normalized=60.0),
            run_of(rate=1.0, requests_per_s=1.0, normalized=40.0),
        ]
    )
    assert sweep(told) == [Point(1.0, 40.0), Point(1.9, 60.0)]
    assert set(figures(ONE, told)) == {"users/client_cpu_share"}
    assert sweep(make_report([run_of()])) == []
    steady = make_report([run_of(rate=2.0, requests_per_s=1.2, steady_requests_per_s=1.9, normalized=60.0)])
    assert sweep(steady) == [Point(1.9, 60.0)]


def test_a_report_of_failed_requests_or_of_something_else_is_refused() -> None:
    check(make_report([run_of()]))
    with pytest.raises(PeerError, match=r"2 of 12 requests failed, the first one: gone"):
        check(make_report([run_of(failed=2)], [request(), request(error="gone")]))
    with pytest.raises(PeerError, match="pensieve-bench"):
        check({**make_report([run_of()]), "kind": "other"})
    with pytest.raises(PeerError, match="version 2"):
        check({**make_report([run_of()]), "version": 2})


@pytest.mark.parametrize(
    ("points", "limit", "expected"),
    [
        ([(1, 40), (2, 60), (3, 100)], 80, Crossing(2.5)),
        ([(1, 40), (2, 60), (3, 100)], 60, Crossing(2.0)),
        ([(1, 40), (2, 60)], 80, Crossing(2, "at least")),
        ([(1, 90), (2, 60)], 80, Crossing(1, "at most")),
        ([(1, 40), (2, 100), (3, 50), (4, 200)], 70, Crossing(1.5)),  # the first time
        ([(1, 40), (2.4, 60), (2.2, 100)], 80, Crossing(2.3)),  # overloaded, it answers less
        ([(1, 40)], 40, Crossing(1, "at least")),
    ],
)
def test_where_a_curve_reaches_its_limit(
    points: list[tuple[float, float]], limit: float, expected: Crossing
) -> None:
    found = throughput_at([Point(*point) for point in points], limit)
    assert found.requests_per_s == pytest.approx(expected.requests_per_s) and found.bound == expected.bound


def test_a_curve_without_points_is_refused() -> None:
    with pytest.raises(ValueError, match="without points"):
        throughput_at([], 10)


@given(st.lists(st.tuples(st.floats(0.1, 50), st.floats(1, 500)), min_size=1, max_size=8), st.floats(1, 500))
def test_a_crossing_lies_within_what_was_measured(points: list[tuple[float, float]], limit: float) -> None:
    found = throughput_at([Point(*point) for point in points], limit).requests_per_s
    rates = [rate for rate, _ in points]
    assert min(rates) - 1e-6 <= found <= max(rates) + 1e-6


def test_goals_compare_round_with_round() -> None:
    more = Goal("", "users", "x", VLLM, ">=", 1.4)
    less = Goal("", "users", "x", VLLM, "<=", 1.4)
    alone = Goal("", "users", "x", None, "<=", 1.0)
    rounds: dict[tuple[str, str], list[dict[str, float] | None]] = {
        ("users", PENSIEVE): [{"x": 3.0}, None, {"x": 8.0}, {"x": 1.0}],
        ("users", VLLM): [{"x": 2.0}, {"x": 1.0}, {"x": 4.0}, {}],
    }
    one, two, three = judge(rounds, (more, less, alone))
    assert one.values == (1.5, 2.0) and one.value == 1.75 and one.met is True and two.met is False
    assert three.values == (3.0, 8.0, 1.0) and three.met is False
    assert judge({}, (more,))[0].met is None and judge({}, (more,))[0].value is None


def test_a_goal_on_its_edge_is_met() -> None:
    figure: dict[tuple[str, str], list[dict[str, float] | None]] = {
        ("w", PENSIEVE): [{"x": 3.0}],
        ("w", VLLM): [{"x": 4.0}],
    }
    assert judge(figure, (Goal("", "w", "x", VLLM, ">=", 0.75),))[0].met is True
    assert judge(figure, (Goal("", "w", "x", VLLM, "<=", 0.75),))[0].met is True


def test_every_goal_is_about_something_that_is_measured() -> None:
    known: dict[str, Any] = {workload.name: workload for workload in workloads()}
    for goal in GOALS:
        workload = known[goal.workload]
        assert {PENSIEVE, *([goal.against] if goal.against else [])} <= set(workload.kv)
        measured = {measurement.name for measurement in workload.measurements}
        assert goal.figure == "memory_beyond_gb" or goal.figure.partition("/")[0] in measured
