"""Least recently active first. Knows when conversations were active; never costs."""

from __future__ import annotations

import itertools
import math

from pensieve.core.chunk import Chunk
from pensieve.core.eviction.policy import OldestFirst


class LRU:
    """Least recently active first; leading chunk first within a conversation. Active conversations go last.

    A subclass may rank by something else that does not change while a chunk is a candidate.
    """

    trailing = False
    whole = False

    def __init__(self) -> None:
        order = itertools.count()
        self._idle, self._active = (
            OldestFirst(order, trailing=self.trailing),
            OldestFirst(order, trailing=self.trailing),
        )
        self._home: dict[Chunk, OldestFirst] = {}

    def add(self, chunk: Chunk) -> None:
        home = self._active if chunk.owner.num_active else self._idle
        self._home[chunk] = home
        home.add(chunk, self._rank(chunk))

    def remove(self, chunk: Chunk) -> None:
        self._home.pop(chunk).remove(chunk)

    def worst(self, now_s: float) -> Chunk | None:
        top = self._idle.top() or self._active.top()
        return top[1] if top else None

    def worth(self, chunk: Chunk, now_s: float) -> float:
        """Its rank: for LRU the time when it was last active."""
        return math.inf if chunk.owner.num_active else self._rank(chunk)

    def _rank(self, chunk: Chunk) -> float:
        return chunk.owner.last_active_s
