"""What goes into an engine and what comes out: plain picklable values, fit for a queue or a pipe."""

from __future__ import annotations

from dataclasses import dataclass

from pensieve.core.misses import Miss as Miss
from pensieve.core.overview import MapRow as MapRow
from pensieve.core.plan import SampledToken
from pensieve.core.request import FinishReason, SamplingParams
from pensieve.core.sequence import tenant_of as tenant_of


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
    """Free everything cached for a sequence (its conversation was deleted). With a tag, answered with `Forgotten`."""

    sequence_id: str
    namespace: str
    erase: bool = False  # and answer only when every byte of it is zero, in every tier
    tag: str = ""


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


@dataclass(frozen=True, slots=True)
class Warm:
    """A user is typing: bring the sequence's chunks up now, never at the expense of requests. Answered with `HintAnswer`."""

    sequence_id: str
    namespace: str
    tag: str = ""


@dataclass(frozen=True, slots=True)
class Idle:
    """A user is done for now: until its next activity, the sequence's chunks may go first. Answered with `HintAnswer`."""

    sequence_id: str
    namespace: str
    tag: str = ""


@dataclass(frozen=True, slots=True)
class GetMap:
    """Ask for a `CacheMap` of sequences, latest active first."""

    tag: str
    offset: int = 0
    limit: int = 200
    namespaces: tuple[str, ...] | None = None  # only these; None = all
    tenant: str | None = None  # only this tenant's; None = all


@dataclass(frozen=True, slots=True)
class GetRows:
    """Ask for a `CacheMap` with just these sequences' rows; those that are not cached have none."""

    tag: str
    keys: tuple[tuple[str, str], ...]  # (namespace, sequence id)


@dataclass(frozen=True, slots=True)
class Check:
    """Verify every invariant of the cache from scratch: slow, for tests and debugging. Answered with `Checked`."""

    tag: str = ""


Command = Submit | Abort | Stop | Forget | Keep | Warm | Idle | GetStats | GetMap | GetRows | Check


Token = SampledToken  # one token of an answer, just as the worker reported it: nothing is made anew for each token


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
    misses: tuple[
        Miss, ...
    ] = ()  # ascending; of the prompt, exactly what was not found in the first tier, and why


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
class HintAnswer:
    """What came of a `Warm` or an `Idle`; `error` says why nothing."""

    tag: str
    chunks: (
        int  # below the first tier, to come up as far as there is room; or cached, and now the first to go
    )
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What came of a `Forget`: it is done. Chunks shared with other conversations stay theirs."""

    tag: str
    slots: int  # freed (erased: and zeroed) that only this conversation used, over all tiers
    bytes: int  # in them
    error: str | None = None  # the engine stopped before it was done


@dataclass(frozen=True, slots=True)
class Checked:
    """What a `Check` found."""

    tag: str
    error: str | None  # the first invariant that does not hold
    leases: int  # held by running requests, over all chunks
    used: tuple[int, ...]  # slots, a tier


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier as it stands."""

    name: str
    num_slots: int
    used: int
    reclaimable: int  # of the used ones, clean copies that may be taken at no cost


@dataclass(frozen=True, slots=True)
class CacheMap:
    """What is cached of whom."""

    tag: str
    total: int  # sequences there are to ask for; `rows` are those asked for
    chunk_tokens: int
    tiers: tuple[TierStats, ...]
    rows: tuple[MapRow, ...]


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
    evictions: tuple[
        tuple[str, int], ...
    ] = ()  # chunks by what happened to them: copied_down, reclaimed, dropped, failed (lost)
    kept_chunks: int = 0
    keep_limit: int = 0  # most chunks that keeps may hold


@dataclass(frozen=True, slots=True)
class Lost:
    """A tagged command will have no other answer: its engine died, or cannot be had."""

    tag: str
    message: str
    code: str = "engine_restarted"  # PensieveError.code


Event = Token | Finished | Failed | KeepAnswer | HintAnswer | Forgotten | Checked | CacheMap | Stats | Lost
