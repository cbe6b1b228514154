"""What an eviction policy is, and what the policies of one cache are told.

Knows costs and idle times; never slots or tiers.

A policy orders candidates. The cache offers every shared chunk, and one private chunk of each sequence: the
leading evictable one (worth least where cost is monotone), or the trailing one if the policy wants that.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Protocol

from pensieve.core.chunk import Chunk
from pensieve.core.sequence import Sequence

# Seconds to recompute the chunk at an index, positive and monotone (`CostProfile.of_chunk`).
CostOfChunk = Callable[[int], float]


class EvictionPolicy(Protocol):
    """Orders candidates by worth; the worst is the victim. The time it is given never runs backwards."""

    @property
    def trailing(self) -> bool:
        """Whether a conversation's trailing chunk is evicted first, not its leading one."""
        ...

    @property
    def whole(self) -> bool:
        """Whether all evictable chunks of a conversation are evicted together, needed or not."""
        ...

    def add(self, chunk: Chunk) -> None:
        """Add a candidate. Its owner's activity must not change while it is in."""
        ...

    def remove(self, chunk: Chunk) -> None:
        """Remove a candidate."""
        ...

    def worst(self, now_s: float) -> Chunk | None:
        """The candidate to evict first, which stays in; None if there is none."""
        ...

    def worth(self, chunk: Chunk, now_s: float) -> float:
        """A chunk's worth now, to compare chunks of different queues."""
        ...


class PolicyFamily:
    """The policies of one cache: makes one for each queue, and is told what conversations do.

    Override to learn.
    """

    def __init__(self, make: Callable[[], EvictionPolicy]) -> None:
        self._make = make

    def __call__(self) -> EvictionPolicy:
        """Make a policy for one more queue."""
        return self._make()

    def came_back(self, sequence: Sequence, now_s: float) -> None:
        """A sequence that was new or idle has a request. Its candidates are not offered during the call."""

    def went_idle(self, sequence: Sequence, now_s: float, num_answered: int) -> None:
        """A sequence's last request ended; its answer has `num_answered` tokens.

        Its candidates are not offered now.
        """


PolicyFactory = Callable[[], EvictionPolicy]  # a `PolicyFamily`, or a plain function if no policy learns


class OldestFirst:
    """Chunks by a fixed key, smallest first; at equal keys the leading (or trailing) one.

    Removal is lazy: a heap entry counts only while it is the chunk's current one.
    """

    __slots__ = ("_current", "_heap", "_order", "_sign")

    def __init__(self, order: itertools.count[int], *, trailing: bool = False) -> None:
        self._heap: list[tuple[float, int, int, Chunk]] = []
        self._current: dict[Chunk, int] = {}
        self._order = order
        self._sign = -1 if trailing else 1

    def add(self, chunk: Chunk, key: float) -> None:
        """Add a chunk."""
        ticket = next(self._order)
        self._current[chunk] = ticket
        heapq.heappush(self._heap, (key, self._sign * chunk.index, ticket, chunk))

    def remove(self, chunk: Chunk) -> None:
        """Remove a chunk."""
        del self._current[chunk]
        if len(self._heap) > 2 * len(self._current) + 16:
            self._heap = [entry for entry in self._heap if self._current.get(entry[3]) == entry[2]]
            heapq.heapify(self._heap)

    def top(self) -> tuple[float, Chunk] | None:
        """The smallest key and its chunk, which stays in; None if there is none."""
        heap, current = self._heap, self._current
        while heap:
            key, _, ticket, chunk = heap[0]
            if current.get(chunk) == ticket:
                return key, chunk
            heapq.heappop(heap)
        return None
