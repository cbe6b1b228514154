"""Figures of the paper: curves are read right, go on until they can be, and a page says what differs. No simulation is run here but one."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from paper.command import expand
from paper.curves import latency_at, mean_curve, throughput_at
from paper.figures import FIGURES, SEEDS, Comparison, compare, simulate_figures
from paper.page import comparison_rows, remarks, to_json, write_page
from paper.published import CURVES, RATIOS
from paper.small_figures import SMALL_FIGURES
from simulator_worlds import small

from pensieve.simulator.case import Case, Outcome, run_case

TEMPLATE = run_case(small(debug=False))
# requests a second at which a system's queue would grow for ever
LIMITS = {"pensieve": 4.0, "pensieve-phased": 3.6, "gpu-only": 3.0, "stateless": 2.9, "baseline": 2.5}


def pretend(case: Case) -> Outcome:
    """As if a queue of one server had been simulated: latency rises without bound towards a limit."""
    rate = case.load.rates[case.run]
    limit = (
        LIMITS[case.system] * (0.95 if case.policy == "lru" else 1.0) * (60 / case.load.think.mean_s) ** 0.1
    )
    done = min(rate, 0.99 * limit)
    p90 = 0.02 / (1 - done / limit)
    summary = replace(
        TEMPLATE.summary, finished_per_s=done, normalized_s=replace(TEMPLATE.summary.normalized_s, p90=p90), sent=100, failed=0,
        recomputed_tokens=1000 + 100 * (case.policy == "lru"), recomputed_share=0.1, cpu_share=0.7 - 0.02 * (case.policy == "lru"),
    )  # fmt: skip
    return replace(TEMPLATE, case=case, rate=rate, summary=summary)


def run(cases: Sequence[Case]) -> list[Outcome]:
    assert len(set(cases)) == len(cases), "a case is simulated twice"
    return [pretend(case) for case in cases]


def test_curves_are_read_between_their_points() -> None:
    points = [(1.0, 0.02), (2.0, 0.04), (3.0, 0.12)]
    assert throughput_at(points, 0.08) == pytest.approx(2.5)
    assert throughput_at(points, 0.02) == pytest.approx(1.0)
    assert throughput_at(points, 0.2) is None and throughput_at(points, 0.01) is None
    assert latency_at(points, 2.5) == pytest.approx(0.08)
    assert latency_at(points, 0.5) == 0.02 and latency_at(points, 3.5) is None


def test_a_point_is_the_mean_over_its_seeds() -> None:
    cases = FIGURES["10a"].cases(FIGURES["10a"].series[0], 1.0)
    assert len(cases) == SEEDS and len({case.load.seed for case in cases}) == SEEDS
    one, other = (pretend(case) for case in cases)
    other = replace(other, summary=replace(other.summary, finished_per_s=one.summary.finished_per_s + 1.0))
    assert mean_curve([one, other]) == [
        pytest.approx((one.summary.finished_per_s + 0.5, one.summary.normalized_s.p90))
    ]


def test_figures_share_cases_and_curves_go_on_until_they_can_be_read() -> None:
    asked: list[Case] = []

    def counted(cases: Sequence[Case]) -> list[Outcome]:
        asked.extend(cases)
        return run(cases)

    results = simulate_figures([FIGURES["10a"], FIGURES["14"]], counted)
    assert len(set(asked)) == len(asked)
    ours = results[0]
    for series in ours.figure.series:
        assert ours.throughput(series.label) == pytest.approx(
            LIMITS[series.system] * (1 - 0.02 / 0.12), rel=0.2
        )
    ratio = next(one for one in compare(ours) if one.paper == RATIOS["10a"][1])
    assert ratio.ours == pytest.approx(4.0 / 2.5, rel=0.15)
    assert ratio.ours is not None and ratio.difference == pytest.approx(ratio.ours / 1.36 - 1)
    policies = compare(results[1])
    assert policies[0].good and policies[0].ours == pytest.approx(1 / 0.95, rel=0.15)
    assert [round(float(one.ours or 0), 1) for one in policies[1:3]] == [2.0, 9.1]


def test_orders_are_what_counts_where_the_paper_shows_orders() -> None:
    phases, thinking = (compare(result) for result in simulate_figures([FIGURES["13"], FIGURES["15"]], run))
    assert [one.good for one in phases] == [True]
    assert all(one.good for one in thinking)
    assert len(thinking) == 6


def test_every_published_curve_is_drawn_and_rises() -> None:
    for name, figure in FIGURES.items():
        drawn = {series.published for series in figure.series if series.published}
        assert drawn == set(CURVES[name]) - {"TensorRT-LLM"}
        for points in CURVES[name].values():
            assert list(points) == sorted(points)


def test_a_comparison_within_15_percent_is_good() -> None:
    assert Comparison("x", 1.0, 1.14).good and not Comparison("x", 1.0, 1.16).good
    assert Comparison("x", 1.0, 1.16, slack=0.03).good
    assert Comparison("x", 1.0, None).good is False and Comparison("x", None, 1.0).good is None
    assert comparison_rows([Comparison("x", 1.0, 1.14, "×")]) == [("x", "1×", "1.14×", "+14%", "yes")]


def test_a_page_has_every_figure_and_says_why_it_differs(tmp_path: Path) -> None:
    results = simulate_figures([FIGURES["10a"], FIGURES["15"]], run)
    page = write_page(tmp_path, results, [SMALL_FIGURES["3"]()]).read_text()
    for name in ("10a", "15", "3"):
        assert f'id="figure-{name}"' in page and (tmp_path / f"figure-{name}.png").stat().st_size > 10_000
    assert page.index('id="figure-3"') < page.index('id="figure-10a"') < page.index('id="figure-15"')
    assert [f'src="figure-{name}.png"' in page for name in ("3", "10a", "15")] == [True] * 3
    assert "base64" not in page and len(page) < 50_000
    assert set(remarks()) == {"how", *FIGURES, *SMALL_FIGURES} and all(remarks().values())
    assert html.escape(remarks()["15"][0]) in page and html.escape(remarks()["how"][0]) in page
    record = json.loads(json.dumps(to_json(results, [SMALL_FIGURES["3"]()])))
    assert [one["figure"] for one in record["figures"]] == ["10a", "15"]


@pytest.mark.parametrize("figure", sorted(SMALL_FIGURES))
def test_the_papers_small_figures_come_out(figure: str) -> None:
    """Every long end within 30 %, and each line grows as the paper's does."""
    for line in SMALL_FIGURES[figure]().lines:
        assert line.ours[-1] / line.paper[-1] == pytest.approx(1.0, abs=0.3), line.label
        assert list(line.ours) == sorted(line.ours)


def test_a_span_of_figures_and_a_number_stand_for_their_parts() -> None:
    asked = {name: expand(name, FIGURES) for name in ("10b-d", "11a-b", "10", "13", "10a", "12a-b", "all")}
    parts = {"10b-d": ["10b", "10c", "10d"], "11a-b": ["11a", "11b"], "10": ["10a", "10b", "10c", "10d"]}
    assert asked == parts | {alone: [alone] for alone in ("13", "10a", "12a-b", "all")}
