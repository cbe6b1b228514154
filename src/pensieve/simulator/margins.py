"""What more of something would bring: the load a machine holds, and the worth of another GB. Knows trials;
what runs cases is in their book.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pensieve.simulator.case import Machine
from pensieve.simulator.planner import Space, Trial, Trials, rate_of

HEADROOM = 1.2  # of the load
_FURTHER = 1.2  # how much further the first look outside of what is known
_RESOLVED = 1.05  # between a load that holds and one that does not, at most
_MOST, _LEAST = 4.0, 1 / 64  # of the load; beyond, it is not said how much
TIERS = {"gpu_cache_gb": "first tier", "cpu_cache_gb": "CPU", "disk_cache_gb": "disk"}


@dataclass(frozen=True, slots=True)
class Held:
    """The load up to which a machine keeps to the target."""

    # of the load that is planned for; interpolated between the last that holds and the first that does not
    load: float
    per_s: float  # requests
    bounded: bool  # False: it holds that much and perhaps more (or, near 0, not even that)


@dataclass(frozen=True, slots=True)
class Margin:
    """What more of one tier would bring."""

    tier: str  # of `TIERS`
    more_gb: float  # of each device, but the disk's
    price: float  # of it, on all devices
    trial: Trial
    saved_ms: float  # of the latency that the target is about, for each further GB (of all devices together)
    saved_tokens_per_s: float  # not recomputed, for each further GB
    held: Held
    more_per_s: float  # requests a second held, for each further GB


def held_loads(book: Trials, machines: Sequence[Machine]) -> list[Held]:
    """Up to which load machines hold, all searched at once."""
    brackets = [_Bracket() for _ in machines]
    while asked := [
        (index, load) for index, bracket in enumerate(brackets) if (load := bracket.next_load()) is not None
    ]:
        trials = book.try_all((machines[index], load) for index, load in asked)
        for (index, _), trial in zip(asked, trials, strict=True):
            brackets[index].learn(trial, book.holds(trial))
    return [bracket.held(book.goal.latency_s) for bracket in brackets]


@dataclass(slots=True)
class _Bracket:
    """The largest load known to hold, and the smallest known not to."""

    low: Trial | None = None
    high: Trial | None = None
    looks: int = 0

    def next_load(self) -> float | None:
        if self.low is None and self.high is None:
            return 1.0
        if self.high is None:
            assert self.low is not None
            return min(_MOST, self.low.load * _FURTHER**self.looks) if self.low.load < _MOST else None
        if self.low is None:
            return self.high.load / _FURTHER**self.looks if self.high.load > _LEAST else None
        middle = math.sqrt(self.low.load * self.high.load)
        return middle if self.high.load / self.low.load > _RESOLVED else None

    def learn(self, trial: Trial, holds: bool) -> None:
        self.looks += 1
        if holds:
            self.low = trial
        else:
            self.high = trial

    def held(self, latency_s: float) -> Held:
        if self.high is None or self.low is None:
            end = self.low or self.high
            assert end is not None
            return Held(end.load, rate_of(end), bounded=False)
        low, high = self.low, self.high
        rise_s = high.latency_s - low.latency_s
        share = (latency_s - low.latency_s) / rise_s if math.isfinite(rise_s) and rise_s > 0 else 0.0
        return Held(
            low.load + share * (high.load - low.load),
            rate_of(low) + share * (rate_of(high) - rate_of(low)),
            bounded=True,
        )


def margins(book: Trials, space: Space, best: Trial) -> tuple[Held, list[Margin]]:
    """The load that a machine holds, and what more of each tier would bring. A tier that can have no more is
    left out.
    """
    more = {tier: gigabytes for tier in TIERS if (gigabytes := _more_gb(space, best.machine, tier))}
    machines = [
        replace(best.machine, **{tier: getattr(best.machine, tier) + gigabytes})
        for tier, gigabytes in more.items()
    ]
    trials = book.try_all([*((machine, 1.0) for machine in machines), (best.machine, HEADROOM)])[:-1]
    base, *others = held_loads(book, [best.machine, *machines])
    found = []
    for (tier, gigabytes), trial, held in zip(more.items(), trials, others, strict=True):
        total_gb = gigabytes * (1 if tier == "disk_cache_gb" else best.machine.devices)
        found.append(
            Margin(
                tier, gigabytes, trial.price - best.price, trial,
                1e3 * (best.latency_s - trial.latency_s) / total_gb,
                (_recomputed_per_s(best) - _recomputed_per_s(trial)) / total_gb,
                held,
                (held.per_s - base.per_s) / total_gb,
            )
        )  # fmt: skip
    return base, found


def _more_gb(space: Space, machine: Machine, tier: str) -> float:
    """1 GB or 10 %, whichever is more, as far as there is room."""
    now = getattr(machine, tier)
    if tier == "disk_cache_gb" and not (machine.cpu_cache_gb and space.disk_gb):
        return 0.0  # (it is below a CPU tier, or nowhere)
    more = max(1.0, 0.1 * now)
    return float(min(more, max(0.0, space.gpu_gb - now))) if tier == "gpu_cache_gb" else more


def _recomputed_per_s(trial: Trial) -> float:
    found = trial.outcome.summary
    return found.recomputed_tokens / (found.window_s[1] - found.window_s[0])
