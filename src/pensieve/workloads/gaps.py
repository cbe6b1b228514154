"""Observed times that people took to answer, as quantiles. Knows seconds; never conversations."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from pensieve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Gaps:
    """A distribution of times by its quantiles; between two of them it is linear."""

    name: str
    shares: tuple[float, ...] = field(
        repr=False
    )  # of all gaps that are at most so long; ascending from 0 to 1
    gaps_s: tuple[float, ...] = field(repr=False)  # as many, ascending

    def at(self, share: float) -> float:
        """The gap that `share` of all gaps, from 0 to 1, are at most as long as."""
        after = min(bisect_right(self.shares, share), len(self.shares) - 1)
        low, high = self.shares[after - 1], self.shares[after]
        return self.gaps_s[after - 1] + (self.gaps_s[after] - self.gaps_s[after - 1]) * (share - low) / (
            high - low
        )

    @property
    def mean_s(self) -> float:
        """Mean of what is drawn."""
        steps = zip(pairwise(self.shares), pairwise(self.gaps_s), strict=True)
        return math.fsum((high - low) * (shorter + longer) / 2 for (low, high), (shorter, longer) in steps)


# Between the last message of one person and the next of the other, of 7,168 chats of people with each other
# (131,569 gaps): computed from the time stamps, whole seconds, of the Chit Chat Challenge's data set (PyPI:
# chitchat-dataset 0.9.0, MIT). One gap in 711 is longer than an hour, up to eight days: they are left out,
# since users who come back another day were not thinking; they make
# 61 s of the mean of 99 s.
CHATS = Gaps(
    "chats",
    (
        0,
        0.05,
        0.1,
        0.15,
        0.2,
        0.25,
        0.3,
        0.35,
        0.4,
        0.45,
        0.5,
        0.55,
        0.6,
        0.65,
        0.7,
        0.75,
        0.8,
        0.85,
        0.9,
        0.92,
        0.94,
        0.95,
        0.96,
        0.97,
        0.98,
        0.985,
        0.99,
        0.9925,
        0.995,
        0.9965,
        0.9975,
        0.9985,
        0.999,
        0.9995,
        1,
    ),
    (
        0,
        1,
        3,
        4,
        5,
        7,
        8,
        10,
        12,
        15,
        17,
        21,
        24,
        29,
        34,
        41,
        49,
        62,
        81,
        94,
        111,
        124,
        141,
        167,
        209,
        249,
        319,
        380,
        492,
        632,
        811,
        1104,
        1408,
        2098,
        3573,
    ),
)


def read_gaps(path: str | Path) -> Gaps:
    """Gaps from a file: a number of seconds a line; blank lines and lines that begin with # do not count.

    Raises:
        ConfigError: it cannot be read, holds no gap, or a line is no number of seconds; the message names the
            line.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"cannot read the gaps {path}: {error.strerror or error}") from error
    gaps_s = []
    for number, line in enumerate(lines, start=1):
        text = line.decode("utf-8", "replace").strip("\ufeff \t\r")
        if not text or text.startswith("#"):
            continue
        try:
            gap_s = float(text)
        except ValueError:
            gap_s = math.nan
        if not (math.isfinite(gap_s) and gap_s >= 0):
            raise ConfigError(
                f"{path}, line {number}: a gap must be a number of seconds of at least 0, got {text[:40]!r}"
            )
        gaps_s.append(gap_s)
    if not gaps_s:
        raise ConfigError(f"{path} holds no gap: it must have a number of seconds a line")
    gaps_s.sort()
    if len(gaps_s) == 1:
        gaps_s *= 2
    last = len(gaps_s) - 1
    return Gaps(f"file:{path}", tuple(index / last for index in range(len(gaps_s))), tuple(gaps_s))
