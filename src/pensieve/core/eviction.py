"""Which idle chunk goes first. Knows costs and idle times; never slots, tiers or what happens to a victim.

A policy orders candidates. The cache offers only each sequence's leading evictable chunk (cost is monotone, so within a
sequence the leading chunk always goes first) and every shared one.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from typing import Protocol

from pensieve.core.chunk import Chunk

# T = idle time + 1 ms. The paper's V = Cost / T has a pole at T = 0; adding instead of clamping keeps 1/V linear in time.
MIN_IDLE_S = 1e-3


class EvictionPolicy(Protocol):
    """Orders candidates by worth; the worst is the victim. Time given to it never runs backwards."""

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


PolicyFactory = Callable[[], EvictionPolicy]


class _OldestFirst:
    """Chunks by a fixed key, smallest first. Removal is lazy: a heap entry counts only while it is the chunk's current one."""

    __slots__ = ("_current", "_heap", "_order")

    def __init__(self, order: itertools.count[int]) -> None:
        self._heap: list[tuple[float, int, int, Chunk]] = []
        self._current: dict[Chunk, int] = {}
        self._order = order

    def add(self, chunk: Chunk, key: float) -> None:
        ticket = next(self._order)
        self._current[chunk] = ticket
        heapq.heappush(self._heap, (key, chunk.index, ticket, chunk))

    def remove(self, chunk: Chunk) -> None:
        del self._current[chunk]
        if len(self._heap) > 2 * len(self._current) + 16:
            self._heap = [entry for entry in self._heap if self._current.get(entry[3]) == entry[2]]
            heapq.heapify(self._heap)

    def top(self) -> tuple[float, Chunk] | None:
        heap, current = self._heap, self._current
        while heap:
            key, _, ticket, chunk = heap[0]
            if current.get(chunk) == ticket:
                return key, chunk
            heapq.heappop(heap)
        return None


class LRU:
    """Least recently active first; leading chunk first within a conversation. Active conversations go last."""

    def __init__(self) -> None:
        order = itertools.count()
        self._idle, self._active = _OldestFirst(order), _OldestFirst(order)
        self._home: dict[Chunk, _OldestFirst] = {}

    def add(self, chunk: Chunk) -> None:
        """See `EvictionPolicy`."""
        home = self._active if chunk.owner.num_active else self._idle
        self._home[chunk] = home
        home.add(chunk, chunk.owner.last_active_s)

    def remove(self, chunk: Chunk) -> None:
        """See `EvictionPolicy`."""
        self._home.pop(chunk).remove(chunk)

    def worst(self, now_s: float) -> Chunk | None:
        """See `EvictionPolicy`."""
        top = self._idle.top() or self._active.top()
        return top[1] if top else None

    def worth(self, chunk: Chunk, now_s: float) -> float:
        """The time it was last active."""
        return math.inf if chunk.owner.num_active else chunk.owner.last_active_s


class RetentionValue:
    """The paper's V = Cost(l) / T, exactly, in O(log) a victim (§4.3.1).

    V changes every second for every chunk, but 1/V = (now - last_active + 1 ms) / Cost(l) is a straight line in time. Chunks of one
    length class share their slope, so within a class the oldest is the worst for ever: a heap. Between classes the lines of the tops
    meet at times that can be computed: a kinetic tournament keeps the highest line and redoes a match only when it is due.
    """

    def __init__(self, cost_of_chunk: Callable[[int], float]) -> None:
        """`cost_of_chunk(index)` gives seconds, positive and monotone in the index (`CostProfile.of_chunk`)."""
        self._cost = cost_of_chunk
        self._order = itertools.count()
        self._classes: list[_OldestFirst] = []  # two a length class: idle at 2 * index, active at 2 * index + 1
        self._tournament = KineticTournament()
        self._home: dict[Chunk, int] = {}

    def add(self, chunk: Chunk) -> None:
        """See `EvictionPolicy`."""
        home = 2 * chunk.index + (1 if chunk.owner.num_active else 0)
        while len(self._classes) <= home:
            self._classes.append(_OldestFirst(self._order))
        self._home[chunk] = home
        self._classes[home].add(chunk, chunk.owner.last_active_s)
        self._refresh(home)

    def remove(self, chunk: Chunk) -> None:
        """See `EvictionPolicy`."""
        home = self._home.pop(chunk)
        self._classes[home].remove(chunk)
        self._refresh(home)

    def worst(self, now_s: float) -> Chunk | None:
        """See `EvictionPolicy`."""
        home = self._tournament.highest(now_s)
        top = self._classes[home].top() if home is not None else None
        return top[1] if top else None

    def worth(self, chunk: Chunk, now_s: float) -> float:
        """V, in Cost units a second."""
        idle_s = 0.0 if chunk.owner.num_active else max(0.0, now_s - chunk.owner.last_active_s)
        return self._cost(chunk.index) / (idle_s + MIN_IDLE_S)

    def _refresh(self, home: int) -> None:
        """Enter the class's top, as the line 1/V(t) = slope * t + offset, into the tournament."""
        top = self._classes[home].top()
        if top is None:
            self._tournament.set(home, 0.0, -math.inf)
            return
        slope = 1.0 / self._cost(home // 2)
        if home % 2:  # its conversation counts as active now, whenever "now" is
            self._tournament.set(home, 0.0, MIN_IDLE_S * slope)
        else:
            self._tournament.set(home, slope, (MIN_IDLE_S - top[0]) * slope)


class KineticTournament:
    """Which of many straight lines is the highest, as time moves on.

    A complete binary tree of matches. Each remembers its winner and until when the matches at and below it stand: two lines meet at
    most once, so that time is known. `set` replays one path; `highest(t)` replays only matches that are due. Ties go to the lower index.
    """

    def __init__(self) -> None:
        self._size = 1  # leaves, a power of two
        self._slope = [0.0]
        self._offset = [-math.inf]
        self._winner = [0, 0]  # node 1 is the root, leaf i is node size + i
        self._until = [math.inf, math.inf]
        self._now_s = 0.0

    def set(self, leaf: int, slope: float, offset: float) -> None:
        """Give `leaf` the line slope * t + offset; -inf as offset takes it out."""
        if leaf >= self._size:
            self._grow(leaf)
        if self._slope[leaf] == slope and self._offset[leaf] == offset:
            return
        self._slope[leaf], self._offset[leaf] = slope, offset
        node = (self._size + leaf) // 2
        while node:
            self._play(node)
            node //= 2

    def highest(self, now_s: float) -> int | None:
        """The leaf whose line is highest at `now_s` (not before any earlier `now_s`); None if all are out."""
        self._now_s = max(self._now_s, now_s)
        if self._until[1] <= self._now_s:
            self._replay(1)
        winner = self._winner[1]
        return None if self._offset[winner] == -math.inf else winner

    def _grow(self, leaf: int) -> None:
        size = self._size
        while size <= leaf:
            size *= 2
        self._slope += [0.0] * (size - self._size)
        self._offset += [-math.inf] * (size - self._size)
        self._size = size
        self._winner = [0] * size + list(range(size))
        self._until = [math.inf] * (2 * size)
        for node in range(size - 1, 0, -1):
            self._play(node)

    def _replay(self, node: int) -> None:
        if node >= self._size:
            return
        for child in (2 * node, 2 * node + 1):
            if self._until[child] <= self._now_s:
                self._replay(child)
        self._play(node)

    def _play(self, node: int) -> None:
        slope, offset, winner, until, now_s = self._slope, self._offset, self._winner, self._until, self._now_s
        left, right = 2 * node, 2 * node + 1
        a, b = winner[left], winner[right]
        if slope[b] * now_s + offset[b] > slope[a] * now_s + offset[a]:
            a, b = b, a
        stands = min(until[left], until[right])
        if slope[b] > slope[a] and offset[b] != -math.inf:
            # the loser is steeper and will overtake; a meeting that rounding puts in the past is due at the next instant
            meet_s = (offset[a] - offset[b]) / (slope[b] - slope[a])
            stands = min(stands, max(meet_s, math.nextafter(now_s, math.inf)))
        winner[node], until[node] = a, stands


POLICIES: dict[str, Callable[[Callable[[int], float]], EvictionPolicy]] = {
    "retention": RetentionValue,
    "lru": lambda cost_of_chunk: LRU(),
}
