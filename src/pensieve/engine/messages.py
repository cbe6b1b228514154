"""Commands to an engine and events from it: plain picklable values, fit for a queue or a pipe.

Knows no engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from pensieve.core.overview import MapRow as MapRow
from pensieve.core.plan import SampledToken
from pensieve.core.receipt import Receipt
from pensieve.core.request import FinishReason, SamplingParams
from pensieve.core.sequence import tenant_of as tenant_of


@dataclass(frozen=True, slots=True)
class Submit:
    """Answer a prompt. Ends with `Finished` or `Failed`.

    `tokens` is the whole path from the conversation's root. The engine finds out how much of it is cached; a
    changed or shortened history is safe and reuses the chunks that still agree.
    """

    request_id: str
    sequence_id: str  # the KV cache is kept under this id between turns (a conversation's id)
    namespace: str  # chunks are shared within it, never across
    tokens: tuple[int, ...]
    history_tokens: int  # of `tokens`, how many an earlier turn had already put before the model
    sampling: SamplingParams
    submitted_s: float | None = None  # engine clock; None if the engine is to take its own time


@dataclass(frozen=True, slots=True)
class Abort:
    """End a request in whatever state it is. Ends with `Finished(reason=ABORT)`."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """A stop string was found: end the answer and keep only its first `num_output_tokens` tokens."""

    request_id: str
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Free everything cached for a deleted conversation. With a tag, answered with `Forgotten`."""

    sequence_id: str
    namespace: str
    erase: bool = False  # answer only once every byte of it is zero, in every tier
    tag: str = ""


@dataclass(frozen=True, slots=True)
class Keep:
    """Set or lift a user's keep (pin) on all chunks of a sequence. Answered with `KeepAnswer`."""

    sequence_id: str
    namespace: str
    keep: bool
    tag: str = ""  # returned in the answer


@dataclass(frozen=True, slots=True)
class GetStats:
    """Ask for `Stats`."""

    tag: str = ""


@dataclass(frozen=True, slots=True)
class Warm:
    """A user is typing: swap the sequence in now, into slots that no request needs.

    Answered with `HintAnswer`.
    """

    sequence_id: str
    namespace: str
    tag: str = ""


@dataclass(frozen=True, slots=True)
class Idle:
    """A user is done for now: evict the sequence first until its next activity.

    Answered with `HintAnswer`.
    """

    sequence_id: str
    namespace: str
    tag: str = ""


@dataclass(frozen=True, slots=True)
class GetMap:
    """Ask for a `CacheMap` of sequences, latest active first."""

    tag: str
    offset: int = 0
    limit: int = 200
    namespaces: tuple[str, ...] | None = None  # None for all
    tenant: str | None = None  # None for all


@dataclass(frozen=True, slots=True)
class GetRows:
    """Ask for a `CacheMap` of these sequences. Those that are not cached have no row."""

    tag: str
    keys: tuple[tuple[str, str], ...]  # (namespace, sequence id)


@dataclass(frozen=True, slots=True)
class Check:
    """Verify every invariant of the cache. Slow, for tests and debugging. Answered with `Checked`."""

    tag: str = ""


Command = Submit | Abort | Stop | Forget | Keep | Warm | Idle | GetStats | GetMap | GetRows | Check


Token = SampledToken  # one token of an answer, as the worker reported it: no new object for each token


@dataclass(frozen=True, slots=True)
class Finished:
    """An answer ended; `output` holds its tokens. The service stores it before it tells the client."""

    request_id: str
    reason: FinishReason
    output: tuple[int, ...]
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Failed:
    """A request was refused or failed. No other request is affected."""

    request_id: str
    code: str  # PensieveError.code
    message: str


@dataclass(frozen=True, slots=True)
class KeepAnswer:
    """Result of a `Keep`."""

    sequence_id: str
    keep: bool
    error: str | None = None  # why it was refused; None if it was done
    tag: str = ""
    code: str | None = None  # PensieveError.code of the refusal


@dataclass(frozen=True, slots=True)
class HintAnswer:
    """Result of a `Warm` or an `Idle`."""

    tag: str
    chunks: (
        int  # Warm: below the first tier, to be swapped in as room allows. Idle: cached, now evicted first
    )
    error: str | None = None  # why it was refused; None if it was done
    code: str | None = None  # PensieveError.code of the refusal


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A `Forget` is done. Chunks shared with other conversations stay cached for them."""

    tag: str
    slots: int  # freed, over all tiers, that only this conversation used; zeroed if it was erased
    bytes: int  # in those slots
    error: str | None = None  # the engine stopped before it was done


@dataclass(frozen=True, slots=True)
class Checked:
    """Result of a `Check`."""

    tag: str
    error: str | None  # the first invariant that does not hold; None if all hold
    leases: int  # held by running requests, over all chunks
    used: tuple[int, ...]  # slots used in each tier


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier as it stands."""

    name: str
    num_slots: int
    used: int
    reclaimable: int  # used slots whose chunk also lies in a lower tier: free to take


@dataclass(frozen=True, slots=True)
class CacheMap:
    """Which chunks of which sequences lie where."""

    tag: str
    total: int  # sequences that match; `rows` holds the requested part of them
    chunk_tokens: int
    tiers: tuple[TierStats, ...]
    rows: tuple[MapRow, ...]


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters since the engine started, and gauges of this moment."""

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
    evictions: tuple[tuple[str, int], ...] = ()  # chunks copied_down, reclaimed, dropped, failed (lost)
    kept_chunks: int = 0
    keep_limit: int = 0  # chunks that may be kept at most


@dataclass(frozen=True, slots=True)
class Lost:
    """The engine died or is unavailable; no other reply to this tagged command will follow."""

    tag: str
    message: str
    code: str = "engine_restarted"  # PensieveError.code


Event = Token | Finished | Failed | KeepAnswer | HintAnswer | Forgotten | Checked | CacheMap | Stats | Lost
