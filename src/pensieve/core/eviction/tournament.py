"""The highest of many straight lines as time moves on. Knows lines; never their meaning."""

from __future__ import annotations

import math

_OUT = -math.inf  # the offset of a leaf without a line


class KineticTournament:
    """Which of many straight lines is the highest, as time moves on.

    A complete binary tree of matches. Each remembers its winner and until when the matches at and below it
    stand: two lines meet at most once, so that time is known. `highest(t)` replays only matches that are due,
    and those above the leaves set since it was last asked, as far up as a result changes. Ties go to the
    lower index.
    """

    def __init__(self) -> None:
        self._size = 1  # leaves, a power of two
        self._slope = [0.0]
        self._offset = [_OUT]
        self._winner = [0, 0]  # node 1 is the root, leaf i is node size + i
        self._until = [math.inf, math.inf]
        self._set: set[int] = set()  # leaves that were given a line since the last question
        self._now_s = 0.0

    def set(self, leaf: int, slope: float, offset: float) -> None:
        """Give `leaf` the line slope * t + offset; -inf as offset takes it out."""
        if leaf >= self._size:
            self._grow(leaf)
        if self._slope[leaf] == slope and self._offset[leaf] == offset:
            return
        self._slope[leaf], self._offset[leaf] = slope, offset
        self._set.add(leaf)

    def highest(self, now_s: float) -> int | None:
        """The leaf whose line is highest at `now_s` (not before any earlier `now_s`); None if all are out."""
        self._now_s = max(self._now_s, now_s)
        if self._until[1] <= self._now_s:
            self._set_due()
        if self._set:
            self._replay()
        winner = self._winner[1]
        return None if self._offset[winner] == _OUT else winner

    def _grow(self, leaf: int) -> None:
        size = self._size
        while size <= leaf:
            size *= 2
        self._slope += [0.0] * (size - self._size)
        self._offset += [_OUT] * (size - self._size)
        self._size = size
        self._winner = [0] * size + list(range(size))
        self._until = [math.inf] * (2 * size)
        self._set.update(range(size))

    def _set_due(self) -> None:
        """Mark the winner of every due match without a due match below it, as if its line had been set."""
        until, now_s = self._until, self._now_s
        due = [1]
        while due:
            node = due.pop()
            below = [child for child in (2 * node, 2 * node + 1) if until[child] <= now_s]
            if below:
                due += below
            else:
                self._set.add(self._winner[node])

    def _replay(self) -> None:
        """Replay matches above the leaves that were set, level by level.

        A path ends at a match that keeps its result and was not won by one of these leaves.
        """
        size, winner, until = self._size, self._winner, self._until
        slopes, offsets, now_s = self._slope, self._offset, self._now_s
        changed, self._set = self._set, set()
        level = [size + leaf for leaf in sorted(changed)] if size > 1 else []
        while level:
            above: list[int] = []
            node = 0
            for child in level:
                if child // 2 == node:
                    continue
                node = child // 2
                # (played some ten times a victim: no call, and no builtin where an `if` will do)
                left = 2 * node
                right = left + 1
                a, b = winner[left], winner[right]
                slope_a, slope_b, offset_a, offset_b = slopes[a], slopes[b], offsets[a], offsets[b]
                if slope_b * now_s + offset_b > slope_a * now_s + offset_a:
                    a = b
                    slope_a, slope_b, offset_a, offset_b = slope_b, slope_a, offset_b, offset_a
                stands = until[left] if until[left] < until[right] else until[right]
                if slope_b > slope_a and offset_b != _OUT:
                    # the loser is steeper and will overtake; a meeting that rounding puts in the past is due
                    # at the next instant
                    meet_s = (offset_a - offset_b) / (slope_b - slope_a)
                    if meet_s <= now_s:
                        meet_s = math.nextafter(now_s, math.inf)
                    if meet_s < stands:
                        stands = meet_s
                before = winner[node]
                if node > 1 and (before != a or before in changed or until[node] != stands):
                    above.append(node)
                winner[node], until[node] = a, stands
            level = above
