"""Hints: a user is typing (swap its chunks in early) or is done (evict them first).

Knows the cache; never requests.

Best effort: a few chunks a step, only into slots that no request needs, and only for a while.
"""

from __future__ import annotations

from pensieve.core.cache import TieredCache
from pensieve.core.sequence import Key, Sequence
from pensieve.errors import ConversationNotFound

CHUNKS_A_STEP = 16  # swap-ins begun for hints in one plan: running requests wait for them, layer by layer
HINT_PATIENCE_S = 10.0  # a hint that found no room for so long is dropped


class Hints:
    """Sole writer of the hints that are not carried out yet."""

    def __init__(self, cache: TieredCache, reserve: int) -> None:
        """`reserve` slots of the first tier stay available."""
        self._cache, self._reserve = cache, reserve
        self._until_s: dict[Key, float] = {}  # in order of arrival

    def __len__(self) -> int:
        return len(self._until_s)

    def warm(self, key: Key, now_s: float) -> int:
        """Swap a sequence's chunks in over the next steps. Returns how many lie below the first tier.

        Raises:
            ConversationNotFound: nothing is cached for it.
        """
        sequence = self._cached(key)
        self._cache.touch(sequence, now_s)
        below = sum(
            chunk is not None and not chunk.computing and chunk.slots[0] is None for chunk in sequence.chunks
        )
        if below:
            self._until_s.setdefault(key, now_s + HINT_PATIENCE_S)
        return below

    def idle(self, key: Key) -> int:
        """Evict a sequence's chunks first until its next activity. Returns how many there are.

        Raises:
            ConversationNotFound: nothing is cached for it.
        """
        sequence = self._cached(key)
        self.discard(key)
        return self._cache.idle(sequence)

    def discard(self, key: Key) -> None:
        """Forget a hint."""
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
                return  # no room, or the budget is used up: later hints wait
            del self._until_s[key]

    def _cached(self, key: Key) -> Sequence:
        sequence = self._cache.find(*key)
        if sequence is None or not sequence.chunks:
            raise ConversationNotFound(
                f"nothing is cached for conversation {key[1]!r}: hints help from its next turn on"
            )
        return sequence
