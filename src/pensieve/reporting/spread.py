"""Mean and quantiles of many numbers. Knows nothing of what they are.

The one definition of a quantile here is the nearest rank: the smallest value that at least the given share of
the values does not exceed. It is a value that was observed, and "at most 10 % are above it" holds exactly,
which the planner's early stop relies on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and quantiles, in the unit of the values. NaN if there were no values."""

    mean: float = math.nan
    p50: float = math.nan
    p90: float = math.nan
    p99: float = math.nan

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        ordered = sorted(values)
        if not ordered:
            return cls()
        return cls(fmean(ordered), *(_at(ordered, share) for share in (0.5, 0.9, 0.99)))


def quantile(values: Iterable[float], share: float) -> float:
    """The quantile at `share` of at least one value."""
    return _at(sorted(values), share)


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[max(0, min(len(ordered), math.ceil(share * len(ordered))) - 1)]
