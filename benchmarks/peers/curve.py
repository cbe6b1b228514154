"""What an open loop's sweep says in one number. Knows points of a curve; never where they come from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Point:
    """One rate of a sweep."""

    requests_per_s: float  # answered
    latency_ms: float  # normalized: a request's whole time / its output tokens


@dataclass(frozen=True, slots=True)
class Crossing:
    """How much is answered where latency reaches a limit."""

    requests_per_s: float
    bound: str | None = None  # "at least": the sweep ended below the limit; "at most": it began above


def throughput_at(points: Sequence[Point], limit_ms: float) -> Crossing:
    """Requests a second at which the latency first reaches a limit, between two points on the straight line through them.

    Args:
        points: by the rate asked for, lowest first.
        limit_ms: of the latency.

    Raises:
        ValueError: there is no point.
    """
    if not points:
        raise ValueError("a curve without points crosses nothing")
    if points[0].latency_ms > limit_ms:
        return Crossing(points[0].requests_per_s, "at most")
    for below, above in itertools.pairwise(points):
        if above.latency_ms >= limit_ms:
            share = (
                (limit_ms - below.latency_ms) / (above.latency_ms - below.latency_ms)
                if above.latency_ms > below.latency_ms
                else 0.0
            )
            return Crossing(below.requests_per_s + share * (above.requests_per_s - below.requests_per_s))
    return Crossing(max(point.requests_per_s for point in points), "at least")
