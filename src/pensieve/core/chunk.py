"""A chunk of KV cache and the table of its legal moves.

Knows states and slots; never sequences' tokens, bytes or time.

A chunk is 32 consecutive tokens of a sequence over all layers. It is one record with at most one slot per
tier; its place is derived from those slots, so it cannot be in two caches by accident.
"""

from __future__ import annotations

import enum
from typing import Protocol


class ChunkState(enum.Enum):
    """A chunk's state between an upper and a lower tier."""

    ABSENT = "dropped"  # no copy in either tier
    COMPUTING = "computing"  # an upper slot is taken, its bytes are not valid yet
    UPPER = "upper"  # valid in the upper tier only
    UPPER_COPYING = "upper, copying down"
    BOTH = "upper+lower"
    LOWER = "lower"
    LOWER_COPYING = "lower, copying up"

    # An enum's own hash is a Python function, and a table of moves is looked up several times a chunk.
    __hash__ = object.__hash__


class ChunkEvent(enum.Enum):
    """What happens to a chunk."""

    BEGIN_COMPUTE = "begin_compute"
    FINISH_COMPUTE = "finish_compute"
    FAIL_COMPUTE = "fail_compute"
    BEGIN_SWAP_OUT = "begin_swap_out"
    FINISH_SWAP_OUT = "finish_swap_out"
    FAIL_SWAP_OUT = "fail_swap_out"  # also: an append made the copy stale
    RECLAIM = "reclaim"
    RELEASE_LOWER = "release_lower"
    APPEND = "append"
    BEGIN_SWAP_IN = "begin_swap_in"
    FINISH_SWAP_IN = "finish_swap_in"
    FAIL_SWAP_IN = "fail_swap_in"
    LOSE = "lose"  # a swap-in failed and its source cannot be read either
    DROP = "drop"

    __hash__ = object.__hash__  # (as above)


MOVES: dict[tuple[ChunkState, ChunkEvent], ChunkState] = {
    (ChunkState.ABSENT, ChunkEvent.BEGIN_COMPUTE): ChunkState.COMPUTING,
    (ChunkState.COMPUTING, ChunkEvent.FINISH_COMPUTE): ChunkState.UPPER,
    (ChunkState.COMPUTING, ChunkEvent.FAIL_COMPUTE): ChunkState.ABSENT,
    (ChunkState.COMPUTING, ChunkEvent.APPEND): ChunkState.COMPUTING,
    (ChunkState.UPPER, ChunkEvent.APPEND): ChunkState.UPPER,
    (
        ChunkState.UPPER_COPYING,
        ChunkEvent.APPEND,
    ): ChunkState.UPPER_COPYING,  # the copy is stale: settling it discards it
    (ChunkState.BOTH, ChunkEvent.APPEND): ChunkState.UPPER,
    (ChunkState.UPPER, ChunkEvent.BEGIN_SWAP_OUT): ChunkState.UPPER_COPYING,
    (ChunkState.UPPER_COPYING, ChunkEvent.FINISH_SWAP_OUT): ChunkState.BOTH,
    (ChunkState.UPPER_COPYING, ChunkEvent.FAIL_SWAP_OUT): ChunkState.UPPER,
    (ChunkState.BOTH, ChunkEvent.RECLAIM): ChunkState.LOWER,
    (ChunkState.BOTH, ChunkEvent.RELEASE_LOWER): ChunkState.UPPER,
    (ChunkState.LOWER, ChunkEvent.BEGIN_SWAP_IN): ChunkState.LOWER_COPYING,
    (ChunkState.LOWER_COPYING, ChunkEvent.FINISH_SWAP_IN): ChunkState.BOTH,
    (ChunkState.LOWER_COPYING, ChunkEvent.FAIL_SWAP_IN): ChunkState.LOWER,
    (ChunkState.LOWER_COPYING, ChunkEvent.LOSE): ChunkState.ABSENT,
    (ChunkState.UPPER, ChunkEvent.DROP): ChunkState.ABSENT,
    (ChunkState.LOWER, ChunkEvent.DROP): ChunkState.ABSENT,
}

_FORBIDDEN_WHILE_LEASED = frozenset({ChunkEvent.RECLAIM, ChunkEvent.DROP})


class IllegalMove(Exception):
    """A move outside the table: a bug of ours, never the user's. Nothing was changed."""


class ChunkOwner(Protocol):
    """What uses a chunk: one sequence, or several that share it (`sequence.sequences_of` names them)."""

    last_active_s: float
    num_active: int  # requests of its sequences that are queued, running or suspended


class CopyRecord:
    """A copy under way: the slot it fills belongs to it until it settles."""

    __slots__ = ("chunk", "copy_id", "dst_slot", "dst_tier", "orphan", "src_tier", "stale")

    def __init__(self, copy_id: int, chunk: Chunk, src_tier: int, dst_tier: int, dst_slot: int) -> None:
        self.copy_id = copy_id
        self.chunk = chunk
        self.src_tier = src_tier
        self.dst_tier = dst_tier
        self.dst_slot = dst_slot
        self.stale = False  # an append changed the source after the copy began
        self.orphan = False  # no sequence runs through the chunk any more: settling frees every slot


class Chunk:
    """One record: where a chunk's bytes are, and which sequences use them. Written by `TieredCache` only."""

    __slots__ = (
        "computing",
        "copy",
        "digest",
        "index",
        "keeps",
        "leases",
        "num_tokens",
        "owner",
        "queues",
        "slots",
    )

    def __init__(self, index: int, num_tiers: int, owner: ChunkOwner, digest: bytes | None) -> None:
        self.index = index  # covers tokens [index * chunk_tokens, ...) of its sequences
        self.num_tokens = 0  # valid tokens, 0..chunk_tokens
        self.slots: list[int | None] = [None] * num_tiers  # while computing, slots[0] is taken but not valid
        self.owner = owner  # the sequence or sequences that run through it
        self.digest = digest  # chain hash of a full chunk; while computing, of the full chunk it will be
        self.computing = False
        self.copy: CopyRecord | None = None
        self.leases = 0  # running requests that need it in the first tier
        self.keeps = 0  # sequences through it that a user asked to keep
        self.queues = 0  # bit set of the victim queues it is in

    def state(self, upper: int, lower: int) -> ChunkState:
        """The state between two tiers."""
        if self.computing:
            return ChunkState.COMPUTING
        copy = self.copy
        if copy is not None:
            if copy.src_tier == upper and copy.dst_tier == lower:
                return ChunkState.UPPER_COPYING
            if copy.src_tier == lower and copy.dst_tier == upper:
                return ChunkState.LOWER_COPYING
        in_upper = self.slots[upper] is not None
        in_lower = lower != upper and self.slots[lower] is not None  # (a single tier has nothing below it)
        if in_upper:
            return ChunkState.BOTH if in_lower else ChunkState.UPPER
        return ChunkState.LOWER if in_lower else ChunkState.ABSENT

    @property
    def place(self) -> int | None:
        """The fastest tier with a valid copy; None while it is computed or dropped."""
        if self.computing:
            return None
        slots = self.slots
        if slots[0] is not None:
            return 0
        for tier in range(1, len(slots)):
            if slots[tier] is not None:
                return tier
        return None

    def require(self, event: ChunkEvent, upper: int, lower: int) -> ChunkState:
        """The state that `event` leads to.

        Raises:
            IllegalMove: the table does not allow it here, or a lease, keep or copy under way forbids it.
        """
        state = self.state(upper, lower)
        target = MOVES.get((state, event))
        if target is None:
            where = f"from {state.value!r} between tiers {upper} and {lower}"
            raise IllegalMove(f"{self!r}: {event.value} is not a legal move {where}")
        if self.leases and event in _FORBIDDEN_WHILE_LEASED and (upper == 0 or event is ChunkEvent.DROP):
            raise IllegalMove(f"{self!r}: {event.value} of a leased chunk")
        if self.keeps and event is ChunkEvent.DROP:
            raise IllegalMove(f"{self!r}: {event.value} of a kept chunk")
        if (
            self.copy is not None
            and event in _FORBIDDEN_WHILE_COPYING
            and not (event is ChunkEvent.APPEND and self.copy.src_tier == 0)
        ):
            raise IllegalMove(f"{self!r}: {event.value} while a copy is under way")
        return target

    def __repr__(self) -> str:
        counts = f"tokens={self.num_tokens} leases={self.leases} keeps={self.keeps}"
        return f"<chunk {self.index} slots={self.slots} {counts}>"


# Moves that are illegal while a copy of the chunk is under way.
_FORBIDDEN_WHILE_COPYING = frozenset(
    {
        ChunkEvent.BEGIN_SWAP_OUT,
        ChunkEvent.BEGIN_SWAP_IN,
        ChunkEvent.RECLAIM,
        ChunkEvent.RELEASE_LOWER,
        ChunkEvent.DROP,
        ChunkEvent.APPEND,
    }
)
