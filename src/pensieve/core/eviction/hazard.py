"""The retention value with a learned rate of return in place of 1 / T.

Knows costs, gaps and turns; never slots or tiers.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict
from dataclasses import dataclass, field

from pensieve.core.chunk import Chunk
from pensieve.core.eviction.habits import Habits
from pensieve.core.eviction.lines import ByLines
from pensieve.core.eviction.policy import CostOfChunk, PolicyFamily
from pensieve.core.eviction.retention import num_sharers
from pensieve.core.eviction.returns import (
    ENDS_S,
    NUM_PERIODS,
    PRIOR,
    STARTS_S,
    WIDTHS_S,
    ReturnContext,
    ReturnTimes,
    period_of,
    saving_rates,
)
from pensieve.core.sequence import Key, Sequence, sequences_of

MAX_KNOWN = 65_536  # conversations whose habits are remembered; the longest idle are forgotten first
_ACTIVE_S = 1e-6  # 1 / rate of an active conversation: below that of every idle one

Curve = tuple[float, ...]  # 1 / rate at the start of each period of idle time; linear in between

PRIOR_CURVE: Curve = tuple(1.0 / rate for rate in saving_rates(PRIOR))


@dataclass(slots=True, eq=False)
class _Known:
    """What is known of one conversation."""

    habits: Habits = field(default_factory=Habits)
    busy_since_s: float = 0.0
    idle_since_s: float | None = None  # None while a request of it is queued or running
    contexts: list[ReturnContext] = field(default_factory=list)  # as it went idle
    curve: Curve = PRIOR_CURVE


class Hazard(PolicyFamily):
    """V = n * Cost(l) * r, with n conversations through a chunk and r the rate at which keeping it pays.

    r is a Gittins index (`saving_rates`) of when the conversation comes back, learned from all returns so far
    and from all conversations still idle (`ReturnTimes`), given this one's habits: its last gaps, turns,
    length, and the length and duration of its last answer. For servers whose users return at different paces:
    agents, whose tools answer in seconds, beside people who go to lunch. With nothing learned r is near 1 /
    (2 T), so it starts as the paper's policy and departs from it as it learns. A shared chunk counts n times
    the conversation that was active last.
    """

    def __init__(self, cost_of_chunk: CostOfChunk, times: ReturnTimes | None = None) -> None:
        """`cost_of_chunk(index)` is positive and monotone in the index; `times` may have learned before."""
        super().__init__(lambda: HazardValue(cost_of_chunk, self))
        self.times = times or ReturnTimes()
        self._known: OrderedDict[Key, _Known] = OrderedDict()
        self._order = itertools.count()
        # A heap of (when it outlasts the period, tie-break, conversation, period, idle since): void if it
        # came back.
        self._waits: list[tuple[float, int, _Known, int, float]] = []

    def came_back(self, sequence: Sequence, now_s: float) -> None:
        self._outlast(now_s)
        known = self._known.setdefault(sequence.key, _Known())
        if known.idle_since_s is not None:
            gap_s = max(0.0, now_s - known.idle_since_s)
            if gap_s < ENDS_S[-1]:
                self.times.learn(known.contexts, period_of(gap_s), returned=True)
            known.habits.came_back(gap_s)
        known.idle_since_s, known.busy_since_s = None, now_s

    def went_idle(self, sequence: Sequence, now_s: float, num_answered: int) -> None:
        self._outlast(now_s)
        known = self._known.setdefault(sequence.key, _Known(busy_since_s=now_s))
        self._known.move_to_end(sequence.key)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)[1].idle_since_s = None
        known.idle_since_s = now_s
        keys = known.habits.went_idle(
            max(0.0, now_s - known.busy_since_s), len(sequence.chunks), num_answered
        )
        known.contexts = self.times.contexts(keys)
        known.curve = tuple(1.0 / rate for rate in saving_rates(self.times.chances(known.contexts)))
        heapq.heappush(self._waits, (now_s + STARTS_S[1], next(self._order), known, 0, now_s))

    def curve_of(self, chunk: Chunk) -> Curve:
        """The curve of the conversation through a chunk that was active last."""
        latest = max(sequences_of(chunk), key=lambda sequence: sequence.last_active_s)
        known = self._known.get(latest.key)
        return known.curve if known is not None else PRIOR_CURVE

    def _outlast(self, now_s: float) -> None:
        """Learn from conversations still idle: each period that they outlasted since the last call."""
        waits = self._waits
        while waits and waits[0][0] <= now_s:
            _, _, known, period, since_s = heapq.heappop(waits)
            if known.idle_since_s != since_s:
                continue
            self.times.learn(known.contexts, period, returned=False)
            if period + 1 < NUM_PERIODS:
                heapq.heappush(
                    waits, (since_s + ENDS_S[period + 1], next(self._order), known, period + 1, since_s)
                )


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    """What orders a candidate: its worth is 1 / (scale * curve(idle time))."""

    curve: Curve
    scale: float  # 1 / (n * cost)
    active: bool


class HazardValue(ByLines[_Candidate]):
    """The policy of one queue.

    Each candidate is its own class, whose line bends where periods meet: O(log) a victim and a bend.
    """

    def __init__(self, cost_of_chunk: CostOfChunk, family: Hazard) -> None:
        super().__init__()
        self._cost, self._family = cost_of_chunk, family

    def worth(self, chunk: Chunk, now_s: float) -> float:
        """n * V, in Cost units a second."""
        leaf = self._home.get(chunk)
        candidate = self._class_at[leaf] if leaf is not None else self._class_of(chunk)[0]
        return 1.0 / _height(candidate, now_s - chunk.owner.last_active_s)

    def _class_of(self, chunk: Chunk) -> tuple[_Candidate, float]:
        scale = 1.0 / (num_sharers(chunk) * self._cost(chunk.index))
        return _Candidate(
            self._family.curve_of(chunk), scale, chunk.owner.num_active > 0
        ), chunk.owner.last_active_s

    def _line(self, kind: _Candidate, key: float, now_s: float) -> tuple[float, float, float]:
        if kind.active:
            return 0.0, _ACTIVE_S * kind.scale, math.inf
        period = period_of(now_s - key)
        while (
            period + 1 < NUM_PERIODS and key + STARTS_S[period + 1] <= now_s
        ):  # (as the caller will compare it)
            period += 1
        start, slope = _piece(kind.curve, period)
        until_s = key + STARTS_S[period + 1] if period + 1 < NUM_PERIODS else math.inf
        return kind.scale * slope, kind.scale * (start - slope * (key + STARTS_S[period])), until_s


def _piece(curve: Curve, period: int) -> tuple[float, float]:
    """1 / rate at a period's start, and its slope there; in the last one it grows as 1 / idle time falls."""
    start = curve[period]
    end = curve[period + 1] if period + 1 < NUM_PERIODS else 2.0 * start
    return start, (end - start) / WIDTHS_S[period]


def _height(candidate: _Candidate, idle_s: float) -> float:
    if candidate.active:
        return _ACTIVE_S * candidate.scale
    period = period_of(idle_s)
    start, slope = _piece(candidate.curve, period)
    return candidate.scale * (start + slope * (max(0.0, idle_s) - STARTS_S[period]))
