"""A latency not to be exceeded, and when it is certain that a simulation exceeds it. Knows requests' times;
never schedulers or costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pensieve.errors import ConfigError
from pensieve.reporting.spread import Spread
from pensieve.simulator.records import RequestRecord, Summary
from pensieve.workloads.scripts import Player

Quantile = Literal["p50", "p90", "p99"]
Metric = Literal["normalized", "ttft"]
_PERCENT: dict[Quantile, int] = {"p50": 50, "p90": 90, "p99": 99}


@dataclass(frozen=True, slots=True)
class Goal:
    """A latency not to be exceeded."""

    latency_s: float
    quantile: Quantile = "p90"
    metric: Metric = "normalized"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.latency_s) and self.latency_s > 0):
            raise ConfigError(f"the target must be a latency above 0 ms, got {1e3 * self.latency_s:g}")

    def of(self, found: Summary) -> float:
        """What it is in a summary, in seconds; infinity if a request failed: that one was never answered."""
        value = self.quantile_of(found.normalized_s if self.metric == "normalized" else found.ttft_s)
        return math.inf if found.failed or math.isnan(value) else value

    def quantile_of(self, spread: Spread) -> float:
        """The quantile it is about."""
        return {"p50": spread.p50, "p90": spread.p90, "p99": spread.p99}[self.quantile]

    def most_late(self, num_requests: int) -> int:
        """Of so many requests, how many may exceed it (the nearest rank, as `Spread` has it)."""
        return num_requests - -(-_PERCENT[self.quantile] * num_requests // 100)

    @property
    def words(self) -> str:
        """What is measured."""
        return f"{self.quantile} {'normalized latency' if self.metric == 'normalized' else 'time to first token'}"

    @property
    def unit(self) -> str:
        """Of what is measured."""
        return "ms a token" if self.metric == "normalized" else "ms"


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that was sent and has not been answered."""

    sent_s: float
    output_tokens: int  # of its whole answer
    ttft_s: float | None  # time to its first token; None if there is none yet


class Lateness:
    """Counts who is late in a simulation under way. Once it says that the goal is missed, no continuation can
    mend that.
    """

    def __init__(self, goal: Goal, players: Iterable[Player], window_s: tuple[float, float] | None) -> None:
        """Requests sent outside of the window do not count; without a window, all do."""
        self._goal, self._window_s = goal, window_s or (0.0, math.inf)
        self._most_late = goal.most_late(
            sum(_num_turns_before(player, self._window_s[1]) for player in players)
        )
        self._num_seen = self._num_late = 0
        self._failed = False

    def missed(self, records: list[RequestRecord], waiting: Iterable[Waiting], now_s: float) -> bool:
        """Whether the goal is missed for certain. `records` are all that ended so far: what was seen is not
        looked at again.
        """
        for record in records[self._num_seen :]:
            if self._counts(record.sent_s):
                self._failed |= record.error is not None
                self._num_late += record.error is None and self._is_late(record)
        self._num_seen = len(records)
        if self._failed or self._num_late > self._most_late:
            return True
        late = sum(self._counts(one.sent_s) and self._is_late_already(one, now_s) for one in waiting)
        return self._num_late + late > self._most_late

    def _counts(self, sent_s: float) -> bool:
        return self._window_s[0] <= sent_s < self._window_s[1]

    def _is_late(self, record: RequestRecord) -> bool:
        return (
            record.normalized_s if self._goal.metric == "normalized" else record.ttft_s
        ) > self._goal.latency_s

    def _is_late_already(self, one: Waiting, now_s: float) -> bool:
        if self._goal.metric == "normalized":
            return (now_s - one.sent_s) / one.output_tokens > self._goal.latency_s
        ttft_s = now_s - one.sent_s if one.ttft_s is None else one.ttft_s
        return ttft_s > self._goal.latency_s


def _num_turns_before(player: Player, end_s: float) -> int:
    """How many turns a user could send before some time, if every answer came at once: more it cannot be."""
    at_s, count = player.start_s, 0
    for script in player.scripts:
        for turn in script.turns:
            at_s = turn.due_after(at_s)
            if at_s >= end_s:
                return count
            count += 1
    return count
