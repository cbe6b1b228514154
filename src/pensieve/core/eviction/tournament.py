"""The highest of many straight lines as time moves on. Knows lines; never what they stand for."""

from __future__ import annotations

import math


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
