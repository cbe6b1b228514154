"""What an eviction policy is, and what the policies of one cache may hear. Knows costs and idle times; never slots, tiers or fates.

A policy orders candidates. The cache offers one private chunk of each sequence, the leading evictable one unless the policy wants the
trailing one (where cost is monotone, the leading chunk is always worth least), and every shared chunk.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Protocol

from pensieve.core.chunk import Chunk
from pensieve.core.sequence import Sequence

CostOfChunk = Callable[
    [int], float
]  # seconds to recompute the chunk at an index, positive and monotone (`CostProfile.of_chunk`)


class EvictionPolicy(Protocol):
    """Orders candidates by worth; the worst is the victim. Time given to it never runs backwards."""

    @property
    def trailing(self) -> bool:
        """Of one conversation the trailing chunk goes first, not the leading one."""
        ...

    @property
    def whole(self) -> bool:
        """With a victim goes all of its conversation that could go, needed or not."""
        ...

    def add(self, chunk: Chunk) -> None:
        """Take a candidate in. Its owner's activity must not change while it is in."""
        ...

    def remove(self, chunk: Chunk) -> None:
        """Take a candidate out."""
        ...

    def worst(self, now_s: float) -> Chunk | None:
        """The candidate that goes first, which stays in; None if there is none."""
        ...

    def worth(self, chunk: Chunk, now_s: float) -> float:
        """What a chunk is worth now, to compare chunks of different queues."""
        ...


class PolicyFamily:
    """The policies of one cache: makes one for each queue, and hears what conversations do. Those that learn override the hooks."""

    def __init__(self, make: Callable[[], EvictionPolicy]) -> None:
        self._make = make

    def __call__(self) -> EvictionPolicy:
        """A policy for one more queue."""
        return self._make()

    def came_back(self, sequence: Sequence, now_s: float) -> None:
        """A sequence, new or idle until now, has a request; its candidates are not offered during the call."""

    def went_idle(self, sequence: Sequence, now_s: float, num_answered: int) -> None:
        """A sequence's last request has ended with an answer of so many tokens; its candidates are not offered during the call."""


PolicyFactory = Callable[[], EvictionPolicy]  # a `PolicyFamily`, or any other maker: then nobody listens


class OldestFirst:
    """Chunks by a fixed key, smallest first; at equal keys the leading one, or the trailing one if so asked.

    Removal is lazy: a heap entry counts only while it is the chunk's current one.
    """

    __slots__ = ("_current", "_heap", "_order", "_sign")

    def __init__(self, order: itertools.count[int], *, trailing: bool = False) -> None:
        self._heap: list[tuple[float, int, int, Chunk]] = []
        self._current: dict[Chunk, int] = {}
        self._order = order
        self._sign = -1 if trailing else 1

    def add(self, chunk: Chunk, key: float) -> None:
        """Take a chunk in."""
        ticket = next(self._order)
        self._current[chunk] = ticket
        heapq.heappush(self._heap, (key, self._sign * chunk.index, ticket, chunk))

    def remove(self, chunk: Chunk) -> None:
        """Take a chunk out."""
        del self._current[chunk]
        if len(self._heap) > 2 * len(self._current) + 16:
            self._heap = [entry for entry in self._heap if self._current.get(entry[3]) == entry[2]]
            heapq.heapify(self._heap)

    def top(self) -> tuple[float, Chunk] | None:
        """The smallest key and its chunk, which stays in."""
        heap, current = self._heap, self._current
        while heap:
            key, _, ticket, chunk = heap[0]
            if current.get(chunk) == ticket:
                return key, chunk
            heapq.heappop(heap)
        return None
