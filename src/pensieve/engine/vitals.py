"""Whether an engine's process still works, judged by its heartbeats.

Knows heartbeats and clocks; never processes or pipes.

Time in which this process itself stood still (a suspended laptop, SIGSTOP to a whole server) does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from pensieve.errors import ConfigError

LOOK_S = 0.5  # longest time between two looks
SILENT_S = 30.0  # without a heartbeat
STEPS_TO_SILENCE = 10  # a step may take so many times as long: heartbeats go on during a long step
_LONGEST_LOOK_S = 2.0  # of the time between two looks, at most so much counts


class LivedTime:
    """Seconds in which this process ran, as far as regular calls of `now` show."""

    def __init__(
        self, longest_look_s: float = _LONGEST_LOOK_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Of the time between two calls of `now` at most `longest_look_s` counts."""
        self._longest_look_s, self._clock = longest_look_s, clock
        self._looked_s = clock()
        self._lived_s = 0.0

    def now(self) -> float:
        """Seconds lived since this was made. Call it every `LOOK_S` or so."""
        now_s = self._clock()
        self._lived_s += min(max(0.0, now_s - self._looked_s), self._longest_look_s)
        self._looked_s = now_s
        return self._lived_s


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a ready engine may show no sign of life, and no progress."""

    silent_s: float = SILENT_S  # without any message; heartbeats come once a second, also during a long step
    # Without an end of the step under way, or with work and no step
    step_s: float = STEPS_TO_SILENCE * SILENT_S

    def __post_init__(self) -> None:
        if not self.silent_s > 2 * LOOK_S:  # (heartbeats are a second apart)
            raise ConfigError(f"--engine-timeout must be more than {2 * LOOK_S:g} s, got {self.silent_s:g}")
        if not self.step_s > 0:
            raise ConfigError(f"--step-timeout must be positive, got {self.step_s:g}")


class Vitals:
    """One engine's signs of life since it became ready, in `LivedTime`."""

    def __init__(self, patience: Patience, now_s: float) -> None:
        self._patience = patience
        self._heard_s = now_s
        self._stalled_s = 0.0

    def heard(self, now_s: float) -> None:
        """A message came."""
        self._heard_s = now_s

    def beat(self, stalled_s: float) -> None:
        """A heartbeat reports for how long there was no progress; 0 if there is."""
        self._stalled_s = stalled_s

    def silent_s(self, now_s: float) -> float:
        """How long no message came."""
        return now_s - self._heard_s

    def why_dead(self, now_s: float) -> str | None:
        """Why the process must be replaced; None if it lives."""
        if self.silent_s(now_s) >= self._patience.silent_s:
            return f"it sent no heartbeat for {self._patience.silent_s:g} s"
        if self._stalled_s >= self._patience.step_s:
            return f"its step did not end within {self._patience.step_s:g} s"
        return None
