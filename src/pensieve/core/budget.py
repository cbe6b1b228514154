"""How much one step holds: tokens, and seconds where steps are timed.

Knows ranges and a pace; never requests or slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pensieve.config import SchedulerConfig
from pensieve.core.pace import Pace, StepTime
from pensieve.errors import ConfigError

# Shortest remaining prefill first, with aging: a request is due PATIENCE times its own prefill after its
# admission. Short turns overtake a long prefill, and none is put off without bound.
PATIENCE = 4


class StepBudget:
    """The budget of every step, and what follows from it for one request's prefill."""

    def __init__(self, config: SchedulerConfig, pace: Pace | None) -> None:
        """`pace` predicts the seconds of a step; needed where `config.step_s` bounds them.

        Raises:
            ConfigError: `step_s` comes without a pace.
        """
        self.max_tokens = config.max_batch_tokens
        self.time: StepTime | None = None  # None if steps are bounded by tokens alone
        if config.step_s is not None:
            if pace is None:
                raise ConfigError("step_s bounds steps in time, which takes a pace: what steps take")
            self.time = StepTime(config.step_s, pace)

    @property
    def known_time(self) -> StepTime | None:
        """The bound in seconds; None if there is none, or no step was measured yet."""
        return self.time if self.time is not None and self.time.pace.known else None

    def is_short(self, num_tokens: int, ranges: Iterable[tuple[int, int]]) -> bool:
        """Whether `num_tokens` tokens, in these ranges, are computed within one step."""
        if num_tokens > self.max_tokens:
            return False
        time = self.known_time
        return time is None or time.pace.prefill_s(ranges) <= time.step_s

    def due(self, ranges: Sequence[tuple[int, int]], step_id: int, now_s: float) -> float:
        """When ranges admitted now are due: in seconds where steps are timed, else in steps."""
        if self.time is not None:
            return now_s + PATIENCE * self.time.pace.prefill_s(ranges)
        return step_id + PATIENCE * sum(stop - start for start, stop in ranges) / self.max_tokens
