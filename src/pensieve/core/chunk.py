"""A chunk of KV cache and the table of its legal moves. Knows states and slots; never sequences' tokens, bytes or time.

A chunk is 32 consecutive tokens of a sequence over all layers. It is one record with at most one slot per tier; its
place is derived from those slots, so it cannot be in two caches by accident.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pensieve.core.sequence import Owner


class State(enum.Enum):
    """A chunk as seen from a pair of tiers, one upper and one lower."""

    ABSENT = "dropped"  # no copy in either
    COMPUTING = "computing"  # an upper slot is taken, its bytes are not valid yet
    UPPER = "upper"  # valid in the upper tier only
    UPPER_COPYING = "upper, copying down"
    BOTH = "upper+lower"
    LOWER = "lower"
    LOWER_COPYING = "lower, copying up"

    __hash__ = (
        object.__hash__
    )  # (an enum's own is a Python function, and a table of moves is looked up several times a chunk)


class Event(enum.Enum):
    """What can happen to a chunk."""

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


MOVES: dict[tuple[State, Event], State] = {
    (State.ABSENT, Event.BEGIN_COMPUTE): State.COMPUTING,
    (State.COMPUTING, Event.FINISH_COMPUTE): State.UPPER,
    (State.COMPUTING, Event.FAIL_COMPUTE): State.ABSENT,
    (State.COMPUTING, Event.APPEND): State.COMPUTING,
    (State.UPPER, Event.APPEND): State.UPPER,
    (State.UPPER_COPYING, Event.APPEND): State.UPPER_COPYING,  # the copy is stale: settling it discards it
    (State.BOTH, Event.APPEND): State.UPPER,
    (State.UPPER, Event.BEGIN_SWAP_OUT): State.UPPER_COPYING,
    (State.UPPER_COPYING, Event.FINISH_SWAP_OUT): State.BOTH,
    (State.UPPER_COPYING, Event.FAIL_SWAP_OUT): State.UPPER,
    (State.BOTH, Event.RECLAIM): State.LOWER,
    (State.BOTH, Event.RELEASE_LOWER): State.UPPER,
    (State.LOWER, Event.BEGIN_SWAP_IN): State.LOWER_COPYING,
    (State.LOWER_COPYING, Event.FINISH_SWAP_IN): State.BOTH,
    (State.LOWER_COPYING, Event.FAIL_SWAP_IN): State.LOWER,
    (State.LOWER_COPYING, Event.LOSE): State.ABSENT,
    (State.UPPER, Event.DROP): State.ABSENT,
    (State.LOWER, Event.DROP): State.ABSENT,
}

_FORBIDDEN_WHILE_LEASED = frozenset({Event.RECLAIM, Event.DROP})


class IllegalMove(Exception):
    """A move outside the table: our bug, never the user's. Nothing was changed."""


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
        self.orphan = False  # the last sequence let go of the chunk: settling frees every slot


class Chunk:
    """One record: where a chunk's bytes are and who holds on to them. Written by `TieredCache` only."""

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

    def __init__(self, index: int, num_tiers: int, owner: Owner, digest: bytes | None) -> None:
        self.index = index  # covers tokens [index * chunk_tokens, ...) of its sequences
        self.num_tokens = 0  # valid tokens, 0..chunk_tokens
        self.slots: list[int | None] = [None] * num_tiers  # while computing, slots[0] is taken but not valid
        self.owner = owner  # the sequence, or the sequences, through it
        self.digest = digest  # chain hash of a full chunk (of the prompt it will hold, while computing)
        self.computing = False
        self.copy: CopyRecord | None = None
        self.leases = 0  # running requests that need it in the first tier
        self.keeps = 0  # sequences through it that a user asked to keep
        self.queues = 0  # bit set of the victim queues it is in

    def state(self, upper: int, lower: int) -> State:
        """The state between two tiers."""
        if self.computing:
            return State.COMPUTING
        copy = self.copy
        if copy is not None:
            if copy.src_tier == upper and copy.dst_tier == lower:
                return State.UPPER_COPYING
            if copy.src_tier == lower and copy.dst_tier == upper:
                return State.LOWER_COPYING
        in_upper = self.slots[upper] is not None
        in_lower = lower != upper and self.slots[lower] is not None  # (a single tier has nothing below it)
        if in_upper:
            return State.BOTH if in_lower else State.UPPER
        return State.LOWER if in_lower else State.ABSENT

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

    def require(self, event: Event, upper: int, lower: int) -> State:
        """The state that `event` leads to.

        Raises:
            IllegalMove: the table does not allow it here, or a lease, keep or copy under way forbids it.
        """
        state = self.state(upper, lower)
        target = MOVES.get((state, event))
        if target is None:
            raise IllegalMove(
                f"{self!r}: {event.value} is not a legal move from {state.value!r} between tiers {upper} and {lower}"
            )
        if self.leases and event in _FORBIDDEN_WHILE_LEASED and (upper == 0 or event is Event.DROP):
            raise IllegalMove(f"{self!r}: {event.value} of a leased chunk")
        if self.keeps and event is Event.DROP:
            raise IllegalMove(f"{self!r}: {event.value} of a kept chunk")
        if (
            self.copy is not None
            and event in _WANTS_STILL
            and not (event is Event.APPEND and self.copy.src_tier == 0)
        ):
            raise IllegalMove(f"{self!r}: {event.value} while a copy is under way")
        return target

    def __repr__(self) -> str:
        return f"<chunk {self.index} slots={self.slots} tokens={self.num_tokens} leases={self.leases} keeps={self.keeps}>"


# Moves that begin something or give a slot away wait until a copy under way has settled.
_WANTS_STILL = frozenset(
    {Event.BEGIN_SWAP_OUT, Event.BEGIN_SWAP_IN, Event.RECLAIM, Event.RELEASE_LOWER, Event.DROP, Event.APPEND}
)
