"""What a step costs beside the device's work, fitted on one published curve: vLLM's in the paper's Fig. 10a (OPT-13B, ShareGPT, A100).

Fitted are seconds a step, seconds a step and request (`simulator.cost_model.FITTED`), and how long a run lasts, which the paper does not say (it
decides how long histories get, since a run begins with nobody): all held for every other figure. Each candidate simulates the baseline at several rates with several seeds; its error is the mean squared logarithm of simulated over published
90th percentile of normalized latency at the published throughputs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from pathlib import Path

from paper.curves import latency_at, mean_curve
from paper.published import CURVES

from pensieve.simulator.case import Case, Machine
from pensieve.simulator.cost_model import Overheads
from pensieve.simulator.sweep import run_cases
from pensieve.workloads.arrivals import ThinkTime
from pensieve.workloads.load_plan import LoadOptions

RATES = (0.8, 1.7, 2.6, 3.3, 3.9, 4.4, 4.8)  # asked for; a run begins with nobody, so fewer come
WARM_UP = 0.25  # of a run


def numbers(text: str) -> list[float]:
    """Several numbers with commas."""
    return [float(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step-ms", type=numbers, default=[8.0, 10.0, 12.0])
    parser.add_argument("--request-us", type=numbers, default=[0.0, 50.0, 100.0])
    parser.add_argument("--duration", type=numbers, default=[900.0, 1200.0])
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    published = CURVES["10a"]["vLLM"]
    found = []
    for duration_s, step_ms, request_us in itertools.product(
        options.duration, options.step_ms, options.request_us
    ):
        machine = Machine(overheads=Overheads(1e-3 * step_ms, 1e-6 * request_us))
        cases = [
            Case(
                machine,
                LoadOptions(
                    trace=Path("sharegpt-like"),
                    rates=(rate,),
                    duration_s=duration_s,
                    think=ThinkTime(60.0, exponential=True),
                    seed=seed,
                ),
                "baseline",
                warm_up_s=WARM_UP * duration_s,
            )
            for rate in RATES
            for seed in range(options.seeds)
        ]
        curve = mean_curve(run_cases(cases))
        ratios = [(at, latency_at(curve, at), latency) for at, latency in published]
        errors = [math.log(ours / latency) for _, ours, latency in ratios if ours is not None]
        found.append(
            {
                "duration_s": duration_s,
                "step_ms": step_ms,
                "request_us": request_us,
                "rms_log_error": math.sqrt(statistics.fmean(error * error for error in errors)),
                "reached": len(errors),
                "points": [
                    {"per_s": at, "simulated_s": ours, "published_s": latency} for at, ours, latency in ratios
                ],
            }
        )
        print(json.dumps(found[-1]), file=sys.stderr)
    best = min(found, key=lambda one: (-int(str(one["reached"])), float(str(one["rms_log_error"]))))
    print(
        json.dumps({"benchmark": "fit_overheads", "config": vars(options), "best": best, "candidates": found})
    )


if __name__ == "__main__":
    main()
