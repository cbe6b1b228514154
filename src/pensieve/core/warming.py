"""Conversations whose user is typing: their chunks come up before the turn does. Knows the cache; never requests.

Best effort: a few chunks a step, only into slots that cost nobody anything, and only for a while.
"""

from __future__ import annotations

from pensieve.core.cache import TieredCache
from pensieve.core.sequence import Key, Sequence

CHUNKS_A_STEP = 16  # swap-ins begun for hints in one plan: running requests wait for them, layer by layer
PATIENCE_S = 10.0  # a hint that found no room for so long is dropped


class Warming:
    """Sole writer of the hints that are not carried out yet."""

    def __init__(self, cache: TieredCache, reserve: int) -> None:
        """`reserve` slots of the first tier stay available."""
        self._cache, self._reserve = cache, reserve
        self._until_s: dict[Key, float] = {}  # first come first

    def __len__(self) -> int:
        return len(self._until_s)

    def add(self, sequence: Sequence, now_s: float) -> int:
        """Take a hint. Returns how many chunks lie below the first tier."""
        below = sum(
            chunk is not None and not chunk.computing and chunk.slots[0] is None for chunk in sequence.chunks
        )
        if below:
            self._until_s.setdefault(sequence.key, now_s + PATIENCE_S)
        return below

    def discard(self, key: Key) -> None:
        """The hint does not hold any more."""
        self._until_s.pop(key, None)

    def begin(self, now_s: float) -> None:
        """Begin this step's swap-ins."""
        budget = CHUNKS_A_STEP
        for key, until_s in list(self._until_s.items()):
            sequence = self._cache.find(*key)
            if sequence is None or now_s > until_s:
                del self._until_s[key]
                continue
            begun, left = self._cache.warm(sequence, budget, self._reserve, now_s)
            budget -= begun
            if left:
                return  # no room, or no budget: those behind wait for their turn
            del self._until_s[key]
