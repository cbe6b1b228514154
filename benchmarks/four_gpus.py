"""What servers on four GPUs spend beside their devices: an experiment about the paper's Fig. 11. No model, no GPU.

    python benchmarks/four_gpus.py [--jobs N]

The overheads that hold for every figure were fitted on one GPU (Fig. 10a, `fit_overheads.py`), and Fig. 11's ratios come out a quarter too low with
them. Here seconds a step, and a step and request in it, are fitted anew on Fig. 11a (OPT-66B), for the baseline and for Pensieve each on its own
published curve; with both held, Fig. 11b (Llama 2-70B, another model, shorter KV) is predicted. If it comes out as published, what is missing in the
figures is what a server of several processes does for each request in each step.

A candidate's error is the root of the mean square of the logarithms by which published points lie off the simulated curve, in latency or in
throughput, whichever is nearer. One seed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import statistics
import sys
from dataclasses import replace
from typing import Any

from paper.curves import latency_at, mean_curve, throughput_at
from paper.figures import FIGURES, CurveFigure, Series
from paper.published import RATIOS

from pensieve.simulator.cost_model import Overheads
from pensieve.simulator.sweep import run_cases

GRID_MS = {  # a step, and a request in it
    "vLLM": ((18.0, 22.0, 26.0), (0.8, 1.0, 1.2)),
    "Pensieve": ((14.0, 18.0, 22.0), (0.3, 0.4, 0.5)),
}
FAR = 1.0  # the distance of a point that a curve does not come near
# Asked for, requests a second; a run begins with nobody, so fewer come.
RATES = {
    ("11a", "vLLM"): (0.6, 1.25, 2.0, 2.5, 3.2, 4.2), ("11a", "Pensieve"): (0.75, 2.6, 3.75, 4.5, 5.4, 6.5),
    ("11b", "vLLM"): (0.6, 1.25, 2.0, 2.5, 3.2, 4.2, 5.5), ("11b", "Pensieve"): (1.2, 5.0, 7.5, 10.0, 11.0, 12.5),
}  # fmt: skip


def simulate(
    figure: CurveFigure, series: Series, step_ms: float, request_ms: float, jobs: int | None
) -> list[tuple[float, float]]:
    overheads = Overheads(1e-3 * step_ms, 1e-3 * request_ms, commit_step_s=1e-3)
    asked = replace(figure, machine=replace(figure.machine, overheads=overheads))
    rates = RATES[figure.name, series.published or ""]
    return mean_curve(run_cases([asked.cases(series, rate)[0] for rate in rates], jobs=jobs))


def distance(curve: list[tuple[float, float]], per_s: float, latency_s: float) -> float:
    """How far a published point lies from a curve: up or sideways, whichever is nearer, for a curve is flat at its beginning and steep at its end."""
    up, sideways = latency_at(curve, per_s), throughput_at(curve, latency_s)
    found = [
        abs(math.log(ours / published))
        for ours, published in ((up, latency_s), (sideways, per_s))
        if ours is not None
    ]
    return min(found, default=FAR)


def beside(figure: CurveFigure, series: Series, curve: list[tuple[float, float]]) -> dict[str, Any]:
    """A curve beside the published one."""
    published = figure.published(series)
    assert published is not None
    points = [
        {"per_s": at, "published_s": latency, "simulated_s": latency_at(curve, at)}
        for at, latency in published
    ]
    errors = [distance(curve, at, latency) for at, latency in published]
    return {
        "rms_log_error": math.sqrt(statistics.fmean(error * error for error in errors)), "points": points, "curve": curve,
        "per_s_where_compared": throughput_at(curve, figure.read_at_s), "published_per_s_where_compared": throughput_at(published, figure.read_at_s),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=None)
    options = parser.parse_args()
    fitted, predicted = FIGURES["11a"], FIGURES["11b"]
    report: dict[str, Any] = {
        "benchmark": "four_gpus",
        "python": platform.python_version(),
        "candidates": [],
        "fitted": {},
        "predicted": {},
    }
    for name, grid in GRID_MS.items():
        series = next(one for one in fitted.series if one.published == name)
        found: list[dict[str, Any]] = []
        for step_ms, request_ms in itertools.product(*grid):
            row: dict[str, Any] = {"system": name, "step_ms": step_ms, "request_ms": request_ms}
            row |= beside(fitted, series, simulate(fitted, series, step_ms, request_ms, options.jobs))
            print(
                json.dumps({key: value for key, value in row.items() if key not in ("points", "curve")}),
                file=sys.stderr,
                flush=True,
            )
            found.append(row)
        best = min(found, key=lambda one: one["rms_log_error"])
        report["candidates"] += found
        report["fitted"][name] = best
        curve = simulate(predicted, series, best["step_ms"], best["request_ms"], options.jobs)
        report["predicted"][name] = beside(predicted, series, curve)
    for part, figure in (("fitted", fitted), ("predicted", predicted)):
        ours, base = (report[part][name]["per_s_where_compared"] for name in ("Pensieve", "vLLM"))
        ratio = ours / base if ours is not None and base is not None else None
        report[part]["ratio"] = {
            "at_s": figure.read_at_s,
            "simulated": ratio,
            "published": RATIOS[figure.name][1],
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
