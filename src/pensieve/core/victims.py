"""Candidates for eviction.

Knows which chunks could give up a slot; never their order (a policy's) or fate (`Room`'s).
"""

from __future__ import annotations

from pensieve.core.chunk import Chunk
from pensieve.core.eviction import EvictionPolicy
from pensieve.core.sequence import Sequence


class VictimQueue:
    """The chunks of one tier that could give up their slot in one way.

    Of a sequence's private chunks only one is offered to the policy: the leading one, which is worth least
    where cost is monotone, or the trailing one for a policy that wants that. Every shared chunk is offered.
    Membership is a bit in `chunk.queues`, which keeps an idle chunk's record small.
    """

    def __init__(self, bit: int, policy: EvictionPolicy) -> None:
        self.bit = bit
        self.count = 0  # members; asked for in every step, hence counted here and compared in `checks`
        self._policy = policy
        self._trailing = policy.trailing
        self._offered: dict[Sequence, Chunk] = {}

    def add(self, chunk: Chunk) -> None:
        """Add a chunk."""
        chunk.queues |= self.bit
        self.count += 1
        owner = chunk.owner
        if not isinstance(owner, Sequence):
            self._policy.add(chunk)
            return
        offered = self._offered.get(owner)
        if offered is None or (
            chunk.index > offered.index if self._trailing else chunk.index < offered.index
        ):
            if offered is not None:
                self._policy.remove(offered)
            self._offered[owner] = chunk
            self._policy.add(chunk)

    def discard(self, chunk: Chunk) -> None:
        """Remove a chunk; the next one of its sequence is offered."""
        chunk.queues &= ~self.bit
        self.count -= 1
        owner = chunk.owner
        if not isinstance(owner, Sequence):
            self._policy.remove(chunk)
        elif self._offered.get(owner) is chunk:
            self._policy.remove(chunk)
            following = self._next_of(owner, chunk.index)
            if following is None:
                del self._offered[owner]
            else:
                self._offered[owner] = following
                self._policy.add(following)

    def worst(self, now_s: float) -> Chunk | None:
        """The chunk to evict first, which stays in; None if the queue is empty."""
        return self._policy.worst(now_s)

    def evicted_with(self, chunk: Chunk) -> list[Chunk]:
        """The other chunks of a victim's conversation, if the policy evicts whole conversations."""
        owner = chunk.owner
        if not (self._policy.whole and isinstance(owner, Sequence)):
            return []
        return [
            other
            for other in owner.chunks
            if other is not None and other is not chunk and self._is_private(other, owner)
        ]

    def worth(self, chunk: Chunk, now_s: float) -> float:
        """What the policy says a chunk is worth."""
        return self._policy.worth(chunk, now_s)

    def withdraw(self, sequence: Sequence) -> None:
        """Take a sequence's candidate from the policy before its activity changes; `offer` gives it back."""
        if (offered := self._offered.get(sequence)) is not None:
            self._policy.remove(offered)

    def offer(self, sequence: Sequence) -> None:
        """Offer a sequence's candidate again."""
        if (offered := self._offered.get(sequence)) is not None:
            self._policy.add(offered)

    def check(self, chunk: Chunk) -> None:
        """Assert that a private member is the one offered for its sequence, or comes after it."""
        offered = self._offered.get(chunk.owner) if isinstance(chunk.owner, Sequence) else chunk
        ahead = offered is not None and (
            offered.index >= chunk.index if self._trailing else offered.index <= chunk.index
        )
        assert ahead, f"{chunk!r} is queued, but no chunk of its sequence is offered"

    def _next_of(self, owner: Sequence, index: int) -> Chunk | None:
        chunks = owner.chunks
        for position in (
            range(min(index, len(chunks)) - 1, -1, -1) if self._trailing else range(index + 1, len(chunks))
        ):
            chunk = chunks[position]
            if chunk is not None and self._is_private(chunk, owner):
                return chunk
        return None

    def _is_private(self, chunk: Chunk, owner: Sequence) -> bool:
        return bool(chunk.queues & self.bit) and chunk.owner is owner


class Duplicates:
    """Lower copies of leased chunks: any of them may be freed first."""

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self._chunks: dict[Chunk, None] = {}

    @property
    def count(self) -> int:
        """Number of chunks."""
        return len(self._chunks)

    def add(self, chunk: Chunk) -> None:
        """Add a chunk."""
        chunk.queues |= self.bit
        self._chunks[chunk] = None

    def discard(self, chunk: Chunk) -> None:
        """Remove a chunk."""
        chunk.queues &= ~self.bit
        del self._chunks[chunk]

    def any(self) -> Chunk | None:
        """One of them; None if there is none."""
        return next(iter(self._chunks), None)
