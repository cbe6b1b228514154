"""What goes into an engine and what comes out: plain picklable values, fit for a queue or a pipe."""

from __future__ import annotations

from dataclasses import dataclass

from pensieve.core.request import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True)
class Submit:
    """Answer this prompt.

    `tokens` is the whole path from the conversation's root. What of it is cached, the engine finds out by
    itself; a changed or shortened history is safe and reuses what still agrees.
    """

    request_id: str
    sequence_id: str  # the KV cache is kept under this id between turns (a conversation's id)
    namespace: str  # chunks are shared within it, never across
    tokens: tuple[int, ...]
    history_tokens: int  # of `tokens`, how many an earlier turn had already put before the model
    sampling: SamplingParams
    submitted_s: float | None = None  # engine clock; None = when the engine sees it


@dataclass(frozen=True, slots=True)
class Abort:
    """Stop a request in whatever state it is; ends with `Finished(reason=ABORT)`."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """The caller found a stop string: end the answer and keep only its first `num_output_tokens` tokens."""

    request_id: str
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Free everything cached for a sequence (its conversation was deleted)."""

    sequence_id: str
    namespace: str


@dataclass(frozen=True, slots=True)
class Keep:
    """Set or lift a user's keep (pin) on all chunks of a sequence. Answered with `KeepAnswer`."""

    sequence_id: str
    namespace: str
    keep: bool
    tag: str = ""  # comes back with the answer


@dataclass(frozen=True, slots=True)
class GetStats:
    """Ask for `Stats`."""

    tag: str = ""


Command = Submit | Abort | Stop | Forget | Keep | GetStats


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer."""

    request_id: str
    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Receipt:
    """Where a turn's tokens came from and what it cost.

    gpu_tokens + cpu_tokens + recomputed_tokens + new_tokens = prompt_tokens.
    """

    prompt_tokens: int
    gpu_tokens: int  # found in the first tier
    cpu_tokens: int  # swapped in from a lower tier
    recomputed_tokens: int  # of the history, computed again from raw tokens
    new_tokens: int  # never computed before for this conversation
    output_tokens: int
    bytes_in: int  # swapped in for this request, resumptions included
    bytes_out: int  # of this conversation, swapped out since its previous receipt
    suspensions: int
    resume_cpu_tokens: int  # swapped in again after suspensions
    resume_recomputed_tokens: int  # computed again after suspensions and failures
    queue_s: float  # from submission to first admission
    first_token_s: float | None  # from submission to the first token; None if there was none
    total_s: float  # from submission to the end
    truncated_tokens: int = 0  # history left out by --overflow truncate


@dataclass(frozen=True, slots=True)
class Finished:
    """An answer ended; `output` is what was kept of it. The caller makes it durable before it acknowledges."""

    request_id: str
    reason: FinishReason
    output: tuple[int, ...]
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Failed:
    """A request was refused or broke; nothing else was disturbed."""

    request_id: str
    code: str  # PensieveError.code
    message: str


@dataclass(frozen=True, slots=True)
class KeepAnswer:
    """What came of a `Keep`; `error` says why not."""

    sequence_id: str
    keep: bool
    error: str | None = None
    tag: str = ""


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier as it stands."""

    name: str
    num_slots: int
    used: int
    reclaimable: int  # of the used ones, clean copies that may be taken at no cost


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters since the engine started, and gauges as they stand."""

    tag: str
    waiting: int
    running: int
    sequences: int
    chunks: int
    steps: int
    tiers: tuple[TierStats, ...]
    gpu_tokens: int = 0
    cpu_tokens: int = 0
    recomputed_tokens: int = 0
    new_tokens: int = 0
    output_tokens: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    chunks_reclaimed: int = 0
    chunks_dropped: int = 0
    suspensions: int = 0
    copies_failed: int = 0
    forwards_failed: int = 0


@dataclass(frozen=True, slots=True)
class Lost:
    """A tagged command will have no other answer: its engine died, or cannot be had."""

    tag: str
    message: str
    code: str = "engine_restarted"  # PensieveError.code


Event = Token | Finished | Failed | KeepAnswer | Stats | Lost
