"""Who could give up a slot. Knows which chunks are candidates; leaves their order to a policy and their fate to the cache."""

from __future__ import annotations

from pensieve.core.chunk import Chunk
from pensieve.core.eviction import EvictionPolicy
from pensieve.core.sequence import Sequence


class VictimQueue:
    """The chunks of one tier that could give up their slot in one way.

    A sequence's private chunks are worth more the further right they are, so only the leading one is offered to the policy; a shared
    chunk is offered in its own right. Membership is a bit in `chunk.queues`, which keeps an idle chunk's record small.
    """

    def __init__(self, bit: int, policy: EvictionPolicy) -> None:
        self.bit = bit
        self.count = 0  # members; a question asked every step, so kept by hand and compared in check()
        self._policy = policy
        self._leading: dict[Sequence, Chunk] = {}

    def add(self, chunk: Chunk) -> None:
        """Take a chunk in."""
        chunk.queues |= self.bit
        self.count += 1
        owner = chunk.owner
        if not isinstance(owner, Sequence):
            self._policy.add(chunk)
            return
        leading = self._leading.get(owner)
        if leading is None or chunk.index < leading.index:
            if leading is not None:
                self._policy.remove(leading)
            self._leading[owner] = chunk
            self._policy.add(chunk)

    def discard(self, chunk: Chunk) -> None:
        """Take a chunk out; the next of its sequence leads."""
        chunk.queues &= ~self.bit
        self.count -= 1
        owner = chunk.owner
        if not isinstance(owner, Sequence):
            self._policy.remove(chunk)
        elif self._leading.get(owner) is chunk:
            self._policy.remove(chunk)
            following = self._next_of(owner, chunk.index + 1)
            if following is None:
                del self._leading[owner]
            else:
                self._leading[owner] = following
                self._policy.add(following)

    def worst(self, now_s: float) -> Chunk | None:
        """The first to go, which stays in; None if there is none."""
        return self._policy.worst(now_s)

    def worth(self, chunk: Chunk, now_s: float) -> float:
        """What the policy says a chunk is worth."""
        return self._policy.worth(chunk, now_s)

    def withdraw(self, sequence: Sequence) -> None:
        """Take a sequence's candidate back before its activity changes; `offer` returns it."""
        if (leading := self._leading.get(sequence)) is not None:
            self._policy.remove(leading)

    def offer(self, sequence: Sequence) -> None:
        """Offer a sequence's candidate again."""
        if (leading := self._leading.get(sequence)) is not None:
            self._policy.add(leading)

    def leading(self, sequence: Sequence) -> Chunk | None:
        """The private chunk offered for a sequence (for `check`)."""
        return self._leading.get(sequence)

    def _next_of(self, owner: Sequence, start: int) -> Chunk | None:
        chunks = owner.chunks
        for index in range(start, len(chunks)):
            chunk = chunks[index]
            if chunk is not None and chunk.queues & self.bit and chunk.owner is owner:
                return chunk
        return None


class Duplicates:
    """Lower copies of leased chunks: pure duplicates, any of them may go first."""

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self._chunks: dict[Chunk, None] = {}

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._chunks)

    def add(self, chunk: Chunk) -> None:
        """Take a chunk in."""
        chunk.queues |= self.bit
        self._chunks[chunk] = None

    def discard(self, chunk: Chunk) -> None:
        """Take a chunk out."""
        chunk.queues &= ~self.bit
        del self._chunks[chunk]

    def any(self) -> Chunk | None:
        """One of them, or None."""
        return next(iter(self._chunks), None)
