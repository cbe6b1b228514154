"""What one measurement is: its settings, and every turn with its result. Values only; knows no system and no
clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from pensieve.bench.systems import CONTEXT_FULL, TurnRequest, TurnResult
from pensieve.errors import ConfigError
from pensieve.workloads.arrivals import ThinkClass


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How users behave. The same settings and conversations give the same users."""

    request_interval_s: float  # a warm user's think time; hot 0.3 of it, cold 2.5
    max_new_tokens: int
    # users at once; each takes its conversations one after the other. None: one conversation each
    num_users: int | None = None
    fixed_length: bool = False  # every answer has max_new_tokens (a model of random weights never stops well)
    vocab_size: int | None = None  # draw token ids below it at the texts' lengths; None: send the texts
    jitter: bool = False  # think times exponential around their means
    seed: int = 0
    turn_timeout_s: float = 1800.0  # a turn that takes longer is recorded as failed

    def __post_init__(self) -> None:
        if not (math.isfinite(self.request_interval_s) and self.request_interval_s >= 0):
            raise ConfigError(
                f"the request interval must be at least 0 seconds, got {self.request_interval_s}"
            )
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.num_users is not None and self.num_users < 1:
            raise ConfigError(f"the number of users must be at least 1, got {self.num_users}")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ConfigError(f"the vocabulary must have at least 1 token, got {self.vocab_size}")
        if not self.turn_timeout_s > 0:
            raise ConfigError(f"turn_timeout_s must be positive, got {self.turn_timeout_s}")


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """One turn as it was sent and what came of it. Times in seconds since the run began."""

    user: int
    think: ThinkClass
    request: TurnRequest
    result: TurnResult
    due_s: float  # when the user wanted to send it
    sent_s: float  # when it was sent
    done_s: float  # when its answer was complete

    @property
    def key(self) -> tuple[str, int]:
        """Conversation and turn: what two runs are matched by."""
        return self.request.conversation_id, self.request.turn_index


@dataclass(frozen=True, slots=True)
class EarlyEnd:
    """A conversation that did not get all its turns."""

    conversation_id: str
    turn_index: int  # the turn that failed
    turns_left: int  # turns after it that were never sent
    code: str
    message: str

    @property
    def context_full(self) -> bool:
        """It ended because the model's context was full, which is no fault."""
        return self.code == CONTEXT_FULL

    def __str__(self) -> str:
        why = "context full" if self.context_full else f"{self.code}: {self.message}"
        more = f", {self.turns_left} more not sent" if self.turns_left else ""
        return f"conversation {self.conversation_id} ended at turn {self.turn_index + 1}{more}: {why}"


@dataclass(frozen=True, slots=True)
class Run:
    """All turns that one system was given, in order of conversation and turn."""

    system: str
    settings: RunSettings
    records: tuple[TurnRecord, ...]
    early_ends: tuple[EarlyEnd, ...]
    duration_s: float  # from the first turn sent to the last answer
    started_at: str  # ISO 8601, UTC

    def answered(self) -> Iterator[TurnRecord]:
        """The turns that did not fail."""
        return (record for record in self.records if record.result.ok)

    def by_key(self) -> dict[tuple[str, int], TurnRecord]:
        """Turns by conversation and index."""
        return {record.key: record for record in self.records}


def short_name(system: str) -> str:
    """A system's name without what it says in brackets: for columns and bars."""
    return system.partition(" (")[0]


@dataclass(frozen=True, slots=True)
class Subject:
    """What was measured, in the words of titles and records."""

    model: str
    weights: str  # "real" or "random"
    dtype: str  # what it computes in, "float32" for instance
    device: str

    def __str__(self) -> str:
        return f"{self.model}, {self.weights} weights, {self.dtype} on {self.device}"
