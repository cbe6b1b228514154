"""One conversation's habits, and the contexts they put it in.

Knows gaps, turns and lengths; never chances or worth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

ContextKey = tuple[int, ...]  # the kind of context, then its bins

_RECENT = 5  # gaps that are remembered
_UNKNOWN = -1  # bin of a gap that has not happened yet
_LONG_S = 300.0
_VERY_LONG_S = 1800.0


@dataclass(slots=True)
class Habits:
    """Written by the policy that is told what the conversation does."""

    turns: int = 0
    recent: list[float] = field(
        default_factory=list
    )  # log2 of the last gaps in seconds, at least 1 s; latest last
    mean_log: float = 3.3  # mean log2 of all gaps, older ones counting less
    num_long: float = 0.0  # share of gaps over five minutes, older ones counting less
    num_very_long: int = 0  # gaps over half an hour
    first_chunks: int = 0  # chunks of the history after the first answer
    last_busy_s: float = 0.0

    def came_back(self, gap_s: float) -> None:
        """A request came after an idle time of `gap_s`."""
        log = math.log2(max(1.0, gap_s))
        self.recent.append(log)
        del self.recent[:-_RECENT]
        self.mean_log += 0.3 * (log - self.mean_log)
        self.num_long += 0.1 * ((gap_s > _LONG_S) - self.num_long)
        self.num_very_long += gap_s > _VERY_LONG_S

    def went_idle(self, busy_s: float, num_chunks: int, num_answered: int) -> tuple[ContextKey, ...]:
        """The contexts of a conversation whose request took `busy_s` and got `num_answered` tokens.

        Its history has `num_chunks` chunks. A context combines a few features, each cut into bins. The length
        of an answer separates a tool call, after which an agent is back in seconds, from text that a person
        reads; gaps and durations separate kinds of users. The contexts were chosen on sessions of agents
        (docs/simulator.md) by leaving out, one after the other, those that did not help.
        """
        recent = self.recent
        last, before, third = ([int(log) for log in recent[:-4:-1]] + [_UNKNOWN] * 3)[:3]
        last_half = int(2.0 * recent[-1]) if recent else _UNKNOWN
        last_quarter = int(4.0 * recent[-1]) if recent else _UNKNOWN
        longest = int(max(recent)) if recent else _UNKNOWN
        busy_log, answer_log = math.log2(1.0 + busy_s), math.log2(1 + num_answered)
        busy, answer = int(1.5 * busy_log), int(answer_log)
        if not self.turns:
            self.first_chunks = num_chunks
        keys = (
            (0, last_half),
            (1, int(20.0 * self.num_long)),
            (2, min(3, self.num_very_long)),
            (3, int(math.log2(1 + num_chunks))),
            (4, int(math.log2(1 + self.first_chunks)), answer),
            (5, int(3.0 * busy_log), int(2.0 * answer_log)),
            (6, last_quarter, int(6.0 * busy_log)),
            (7, busy, int(2.0 * math.log2(1.0 + self.last_busy_s))),
            (8, last, int(2.0 * math.log2(1e-4 + busy_s / (1 + num_answered)))),
            (9, last, before, third),
            (10, last, int(2.0 * self.mean_log), answer, busy),
            (11, longest, int(self.mean_log), answer, min(12, int(math.log2(1 + self.turns)))),
        )
        self.turns += 1
        self.last_busy_s = busy_s
        return keys


NUM_CONTEXTS = 12  # in which a conversation is at a time
