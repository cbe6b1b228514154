"""Curves of normalized latency over throughput, and what is read off them. Knows points; never how they came about."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from statistics import fmean

from pensieve.simulator.case import Outcome

Points = Sequence[tuple[float, float]]  # (requests a second, seconds a token), by the rate asked for


def mean_curve(outcomes: Iterable[Outcome]) -> list[tuple[float, float]]:
    """One point a rate, the mean over its seeds: finished requests a second, 90th percentile of normalized latency."""
    by_rate: dict[float, list[Outcome]] = {}
    for outcome in outcomes:
        assert outcome.rate is not None
        by_rate.setdefault(outcome.rate, []).append(outcome)
    return [
        (
            fmean(one.summary.finished_per_s for one in same),
            fmean(one.summary.normalized_s.p90 for one in same),
        )
        for _, same in sorted(by_rate.items())
        if all(one.summary.sent > one.summary.failed for one in same)
    ]


def throughput_at(points: Points, latency_s: float) -> float | None:
    """Requests a second at which a curve first passes a latency, between its points in a straight line; None: it never does, or begins above."""
    for (low_x, low_y), (high_x, high_y) in itertools.pairwise(points):
        if low_y <= latency_s <= high_y:
            share = (latency_s - low_y) / (high_y - low_y) if high_y > low_y else 1.0
            return low_x + share * (high_x - low_x)
    return None


def latency_at(points: Points, per_s: float) -> float | None:
    """Latency at a throughput, between its points in a straight line, before its first as there; None: it never gets there."""
    if points and per_s <= points[0][0]:
        return points[0][1]
    for (low_x, low_y), (high_x, high_y) in itertools.pairwise(points):
        if low_x <= per_s <= high_x:
            share = (per_s - low_x) / (high_x - low_x) if high_x > low_x else 1.0
            return low_y + share * (high_y - low_y)
    return None
