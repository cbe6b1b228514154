"""Numbers about many numbers. Knows nothing of what they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and quantiles, in the unit of the values. None: there were no values."""

    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None


def spread(values: Iterable[float]) -> Spread:
    """Of any number of values."""
    ordered = sorted(values)
    if not ordered:
        return Spread()
    return Spread(fmean(ordered), *(_at(ordered, share) for share in (0.5, 0.9, 0.99)))


def quantile(values: Iterable[float], share: float) -> float:
    """The quantile at `share` of at least one value, interpolated between neighbours."""
    return _at(sorted(values), share)


def _at(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
