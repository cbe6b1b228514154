"""From what `pensieve bench` reports to the figures of the table. Knows that report; never servers or goals.

A figure's name is `MEASUREMENT/FIGURE`, for instance `users/ttft_p90_ms`.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from peers.curve import Point
from peers.errors import PeerError
from peers.workloads import Measurement

KIND, VERSION = "pensieve-bench", 1
_SPREADS = (("ttft_ms", "ttft"), ("normalized_ms", "normalized"), ("inter_token_ms", "inter_token"))
_QUANTILES = ("mean", "p50", "p90", "p99")
Figures = dict[str, float]
Report = dict[str, Any]


def check(report: Report) -> None:
    """Raise `PeerError` for a report that is none, or that tells of requests that failed."""
    if report.get("kind") != KIND or report.get("version") != VERSION:
        raise PeerError(
            f"the client's report is a {report.get('kind')!r} of version {report.get('version')!r}, not a {KIND!r} of {VERSION}"
        )
    failed = sum(run["failed"] for run in report["runs"])
    if failed:
        why = next(
            (request["error"] for request in report.get("requests", ()) if request.get("error")),
            "no reason given",
        )
        raise PeerError(
            f"{failed} of {sum(run['requests'] for run in report['runs'])} requests failed, the first one: {why}"
        )


def figures(measurement: Measurement, report: Report) -> Figures:
    """Of one measurement. An open loop has none but what the client cost: see `sweep`."""
    runs = report["runs"]
    found: dict[str, float | None] = {
        "client_cpu_share": max(float(run.get("client_cpu_share") or 0.0) for run in runs)
    }
    if len(runs) == 1 and runs[0]["rate"] is None:
        run = runs[0]
        found |= {"requests_per_s": run["requests_per_s"], "output_tokens_per_s": run["output_tokens_per_s"]}
        found |= {
            f"{short}_{q}_ms": run[name].get(q)
            for name, short in _SPREADS
            for q in _QUANTILES
            if run.get(name)
        }
        found |= {f"ttft_turn{turn['turn']}_ms": turn["ttft_ms"]["p50"] for turn in run["by_turn"]}
        if run["cached_tokens"] is not None and run["prompt_tokens"]:
            found["cached_share"] = run["cached_tokens"] / run["prompt_tokens"]
        found |= _single_stream(report)
    return {
        f"{measurement.name}/{name}": float(value)
        for name, value in found.items()
        if value is not None and math.isfinite(value)
    }


def sweep(report: Report) -> list[Point]:
    """The points of an open loop, by the rate asked for. Of what is answered, that between the first users' coming and the last ones' where it is told."""
    runs = sorted(
        (run for run in report["runs"] if run["rate"] is not None), key=lambda run: float(run["rate"])
    )
    return [
        Point(
            float(run.get("steady_requests_per_s") or run["requests_per_s"]),
            float(run["normalized_ms"]["mean"]),
        )
        for run in runs
        if run["requests"]
    ]


def _single_stream(report: Report) -> dict[str, float | None]:
    """Tokens a second of prompts and answers, each request by itself: what they mean only where one user is alone."""
    answered = [
        request
        for request in report.get("requests", ())
        if not request.get("error") and request.get("ttft_s")
    ]
    prefill = [
        request["prompt_tokens"] / request["ttft_s"] for request in answered if request.get("prompt_tokens")
    ]
    decode = [
        (request["output_tokens"] - 1) / (request["latency_s"] - request["ttft_s"])
        for request in answered
        if (request.get("output_tokens") or 0) > 1 and request["latency_s"] > request["ttft_s"]
    ]
    return {
        "prefill_tokens_per_s": statistics.median(prefill) if prefill else None,
        "decode_tokens_per_s": statistics.median(decode) if decode else None,
    }
