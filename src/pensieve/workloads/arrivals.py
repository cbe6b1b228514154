"""When users speak: think times, Poisson arrivals, starts. Knows seconds; never what is said, nor the time of
day.

Everything is a pure function of a seed, so two systems measured one after the other meet the same users.
"""

from __future__ import annotations

import enum
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from pensieve.errors import ConfigError
from pensieve.workloads.gaps import CHATS, Gaps, read_gaps

MAX_RATES = 100  # of a sweep


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
    # False: always the class's time; True: exponential with that mean (paper, evaluation)
    jitter: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.request_interval_s) and self.request_interval_s >= 0):
            raise ConfigError(
                f"the request interval must be at least 0 seconds, got {self.request_interval_s}"
            )

    def think_s(self, user: int, turn: int) -> float:
        """Seconds that user thinks before its turn `turn`. The same for the same seed, in whatever order it
        is asked.
        """
        mean_s = self.request_interval_s * think_class(user).factor
        if not self.jitter:
            return mean_s
        return mean_s * random.Random(f"think/{self.seed}/{user}/{turn}").expovariate(1.0)


@dataclass(frozen=True, slots=True)
class ThinkTime:
    """A user's time between an answer and the next turn: constant, exponential around a mean (paper,
    evaluation), or as observed.
    """

    mean_s: float = 0.0
    exponential: bool = False
    gaps: Gaps | None = None  # observed ones, that are drawn from; the mean is then theirs

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean_s) and self.mean_s >= 0):
            raise ConfigError(f"a think time must be at least 0 seconds, got {self.mean_s}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """A think time's words.

        `2.5`: always so many seconds; `exp:3`: exponential with that mean; `chats`: as people in chats took
        it; `file:GAPS`: as the file has it, a number of seconds a line.

        Raises:
            ConfigError: it is none of these, or the file cannot be read.
        """
        text = text.strip()
        form = f"a think time is a number of seconds, exp:MEAN, chats or file:GAPS, got {text!r}"
        if text == CHATS.name:
            return cls._observed(CHATS)
        kind, colon, rest = text.partition(":")
        if colon and kind == "file" and rest:
            return cls._observed(read_gaps(rest))
        if colon and kind != "exp":
            raise ConfigError(form)
        return cls(_number(rest if colon else text, form), bool(colon))

    @classmethod
    def _observed(cls, gaps: Gaps) -> Self:
        return cls(gaps.mean_s, gaps=gaps)

    def draw_s(self, seed: int | str, conversation: int | str, turn: int) -> float:
        """Seconds before turn `turn` of a conversation. The same for the same seed, in whatever order it is
        asked.
        """
        if self.gaps is None and not self.exponential:
            return self.mean_s
        rng = random.Random(f"think/{seed}/{conversation}/{turn}")
        return self.mean_s * rng.expovariate(1.0) if self.gaps is None else self.gaps.at(rng.random())

    def __str__(self) -> str:
        if self.gaps is not None:
            return self.gaps.name
        return f"exp:{self.mean_s:g}" if self.exponential else f"{self.mean_s:g}"


def poisson_arrivals(rate_per_s: float, seed: int | str = 0) -> Iterator[float]:
    """Arrival times in seconds from 0, ascending, without end; gaps are exponential with mean `1 /
    rate_per_s`.

    Raises:
        ConfigError: the rate is not a positive number.
    """
    if not (math.isfinite(rate_per_s) and rate_per_s > 0):
        raise ConfigError(f"the arrival rate must be positive, in requests a second, got {rate_per_s}")
    return _arrivals(rate_per_s, random.Random(f"arrivals/{seed}"))


def even_starts(num_users: int, over_s: float) -> list[float]:
    """When each user starts, spread evenly over the half-open time [0, over_s)."""
    if not (math.isfinite(over_s) and over_s >= 0):
        raise ConfigError(f"starts must be spread over at least 0 seconds, got {over_s}")
    return [over_s * user / num_users for user in range(num_users)]


def parse_rates(text: str) -> tuple[float, ...]:
    """One rate, several (`0.5,1,2`) or a range, with a step of 1 (`1:10`) or another (`0.5:4:0.5`), both ends
    included.

    Raises:
        ConfigError: it is none of these, a rate is not positive, or there are too many.
    """
    form = f"rates are one number, several (0.5,1,2), FROM:TO (1:10) or FROM:TO:STEP (0.5:4:0.5), in requests a second, got {text!r}"
    if ":" in text:
        parts = [_number(part, form) for part in text.split(":")]
        if len(parts) == 2:
            parts.append(1.0)
        if len(parts) != 3 or parts[2] <= 0 or parts[1] < parts[0]:
            raise ConfigError(form)
        start, stop, step = parts
        steps = (stop - start) / step + 1e-9  # (1 - 0.1) / 0.3 is a little under 3
        if steps >= MAX_RATES:
            raise ConfigError(
                f"a sweep has at most {MAX_RATES} rates, {text!r} has {math.floor(steps) + 1}: take a larger step"
            )
        rates = tuple(round(start + step * index, 9) for index in range(math.floor(steps) + 1))
    else:
        rates = tuple(_number(part, form) for part in text.split(","))
    if len(rates) > MAX_RATES:
        raise ConfigError(f"a sweep has at most {MAX_RATES} rates, got {len(rates)}")
    if any(rate <= 0 for rate in rates):
        raise ConfigError(f"a rate must be positive, in requests a second, got {text!r}")
    return rates


def _arrivals(rate_per_s: float, rng: random.Random) -> Iterator[float]:
    now_s = 0.0
    while True:
        now_s += rng.expovariate(rate_per_s)
        yield now_s


def _number(text: str, form: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(form) from None
    if not math.isfinite(value):
        raise ConfigError(form)
    return value
