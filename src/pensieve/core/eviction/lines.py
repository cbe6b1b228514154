"""Policies whose 1/worth is a straight line in time, exactly, in O(log) a victim.

Knows classes and lines; never costs or tiers.

The worth of every chunk changes every second, so no single heap can hold the order. But chunks fall into
classes within which the order never changes: one heap each. Between classes the lines of the heaps' tops meet
at times that can be computed: a kinetic tournament keeps the highest line and replays a match only when it is
due.
"""

from __future__ import annotations

import heapq
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Generic, TypeVar

from pensieve.core.chunk import Chunk
from pensieve.core.eviction.policy import OldestFirst
from pensieve.core.eviction.tournament import KineticTournament

ClassKey = TypeVar("ClassKey", bound=Hashable)


class ByLines(ABC, Generic[ClassKey]):
    """Chunks of a class are ordered by a fixed key; the smallest enters its line into the tournament."""

    trailing = False
    whole = False

    def __init__(self) -> None:
        self._order = itertools.count()
        # Leaf of each class with members, and of empty classes until another class takes their leaf.
        self._leaf_of: dict[ClassKey, int] = {}
        self._class_at: list[ClassKey] = []
        self._heaps: list[OldestFirst] = []
        self._spare: dict[int, None] = {}  # leaves whose class is empty, the longest empty one first
        self._tournament = KineticTournament()
        self._home: dict[Chunk, int] = {}
        # (when the line of a leaf ends and a new one must be entered, leaf): a heap
        self._bends: list[tuple[float, int]] = []
        self._bend_of: dict[int, float] = {}  # the entry of a leaf in `_bends` that counts
        self._now_s = -math.inf

    @abstractmethod
    def _class_of(self, chunk: Chunk) -> tuple[ClassKey, float]:
        """A chunk's class, and its key there."""

    @abstractmethod
    def _line(self, kind: ClassKey, key: float, now_s: float) -> tuple[float, float, float]:
        """1/worth of a chunk as slope * t + offset, and the time until which that holds.

        It holds from `now_s` on, which may lag behind the current time.
        """

    @abstractmethod
    def worth(self, chunk: Chunk, now_s: float) -> float: ...

    def add(self, chunk: Chunk) -> None:
        kind, key = self._class_of(chunk)
        leaf = self._leaf_of.get(kind)
        if leaf is None:
            leaf = self._take_leaf(kind)
        elif leaf in self._spare:
            del self._spare[leaf]
        self._home[chunk] = leaf
        self._heaps[leaf].add(chunk, key)
        self._refresh(leaf)

    def remove(self, chunk: Chunk) -> None:
        leaf = self._home.pop(chunk)
        self._heaps[leaf].remove(chunk)
        self._refresh(leaf)

    def worst(self, now_s: float) -> Chunk | None:
        self._now_s = max(self._now_s, now_s)
        while self._bends and self._bends[0][0] <= self._now_s:
            until_s, leaf = heapq.heappop(self._bends)
            if self._bend_of.get(leaf) == until_s:
                del self._bend_of[leaf]
                self._refresh(leaf)
        leaf_or_none = self._tournament.highest(now_s)
        top = self._heaps[leaf_or_none].top() if leaf_or_none is not None else None
        return top[1] if top else None

    def _refresh(self, leaf: int) -> None:
        top = self._heaps[leaf].top()
        if top is None:
            self._tournament.set(leaf, 0.0, -math.inf)
            if self._bends:
                self._bend_of.pop(leaf, None)
            self._spare[leaf] = None
            return
        slope, offset, until_s = self._line(self._class_at[leaf], top[0], self._now_s)
        self._tournament.set(leaf, slope, offset)
        if until_s == math.inf:
            if self._bends:
                self._bend_of.pop(leaf, None)
        elif self._bend_of.get(leaf) != until_s:
            self._bend_of[leaf] = until_s
            heapq.heappush(self._bends, (until_s, leaf))

    def _take_leaf(self, kind: ClassKey) -> int:
        if self._spare:
            leaf = next(iter(self._spare))
            del self._spare[leaf], self._leaf_of[self._class_at[leaf]]
            self._class_at[leaf] = kind
        else:
            leaf = len(self._heaps)
            self._heaps.append(OldestFirst(self._order, trailing=self.trailing))
            self._class_at.append(kind)
        self._leaf_of[kind] = leaf
        return leaf
