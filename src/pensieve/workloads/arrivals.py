"""When users speak: think times by temper, Poisson arrivals. Knows seconds; never what is said, nor the time of day.

Everything is a pure function of a seed, so two systems measured one after the other meet the same users.
"""

from __future__ import annotations

import enum
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from pensieve.errors import ConfigError


class ThinkClass(enum.Enum):
    """How soon a user comes back, as a multiple of the request interval."""

    HOT = "hot"
    WARM = "warm"
    COLD = "cold"

    @property
    def factor(self) -> float:
        """Think time in request intervals."""
        return _FACTORS[self]


_FACTORS = {ThinkClass.HOT: 0.3, ThinkClass.WARM: 1.0, ThinkClass.COLD: 2.5}
_ROUND = tuple(ThinkClass)


def think_class(user: int) -> ThinkClass:
    """The class of user 0, 1, 2, ...: hot, warm, cold in turn, so that each has a third of the users."""
    return _ROUND[user % len(_ROUND)]


@dataclass(frozen=True, slots=True)
class ThinkTimes:
    """How long each user thinks between an answer and the next turn."""

    request_interval_s: float  # a warm user's (mean) think time
    jitter: bool = False  # False: always the class's time; True: exponential with that mean (paper, evaluation)
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.request_interval_s) and self.request_interval_s >= 0):
            raise ConfigError(f"the request interval must be at least 0 seconds, got {self.request_interval_s}")

    def think_s(self, user: int, turn: int) -> float:
        """Seconds that user thinks before its turn `turn`. The same for the same seed, in whatever order it is asked."""
        mean_s = self.request_interval_s * think_class(user).factor
        if not self.jitter:
            return mean_s
        return mean_s * random.Random(f"think/{self.seed}/{user}/{turn}").expovariate(1.0)


def poisson_arrivals(rate_per_s: float, seed: int = 0) -> Iterator[float]:
    """Arrival times in seconds from 0, ascending, without end; gaps are exponential with mean `1 / rate_per_s`.

    Raises:
        ConfigError: the rate is not a positive number.
    """
    if not (math.isfinite(rate_per_s) and rate_per_s > 0):
        raise ConfigError(f"the arrival rate must be positive, in requests a second, got {rate_per_s}")
    return _arrivals(rate_per_s, random.Random(f"arrivals/{seed}"))


def _arrivals(rate_per_s: float, rng: random.Random) -> Iterator[float]:
    now_s = 0.0
    while True:
        now_s += rng.expovariate(rate_per_s)
        yield now_s
