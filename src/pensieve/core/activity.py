"""When conversations were active, which is what eviction goes by.

Knows sequences and times as told; never slots or requests.
"""

from __future__ import annotations

from pensieve.core.eviction import PolicyFamily
from pensieve.core.places import Places
from pensieve.core.sequence import IDLE_S, Sequence, Sharers


class Activity:
    """Sole writer of `num_active` and `last_active_s` of sequences and sharers. Part of `TieredCache`."""

    def __init__(self, places: Places, family: PolicyFamily | None) -> None:
        """`family` is told when conversations come back and go idle; None if no policy listens."""
        self._places, self._family = places, family

    def change(self, sequence: Sequence, change: int, now_s: float, num_answered: int = 0) -> None:
        """Count one more or one fewer open request of a sequence, or as many (`change` 0).

        `num_answered` is the length in tokens of the answer of a request that ended.
        """
        self._withdraw(sequence)
        if self._family is not None:
            if change > 0 and not sequence.num_active:
                self._family.came_back(sequence, now_s)
            elif change < 0 and sequence.num_active == 1:
                self._family.went_idle(sequence, now_s, num_answered)
        sequence.num_active += change
        sequence.seen_s = max(sequence.seen_s, now_s)  # (a request may say that it was submitted earlier)
        sequence.last_active_s = max(sequence.last_active_s, now_s)
        self._offer(sequence)
        for chunk in sequence.chunks:
            if chunk is not None and isinstance(chunk.owner, Sharers):
                self._places.leave_queues(chunk)
                chunk.owner.num_active += change
                chunk.owner.last_active_s = max(chunk.owner.last_active_s, now_s)
                self._places.reindex(chunk)

    def set_idle(self, sequence: Sequence) -> None:
        """Evict a sequence's chunks first until its next activity.

        A shared chunk follows once all its sequences are idle.
        """
        self._withdraw(sequence)
        sequence.last_active_s = IDLE_S
        self._offer(sequence)
        for chunk in sequence.chunks:
            if (
                chunk is not None
                and isinstance(chunk.owner, Sharers)
                and all(member.last_active_s == IDLE_S for member in chunk.owner.members)
            ):
                self._places.leave_queues(chunk)
                chunk.owner.last_active_s = IDLE_S
                self._places.reindex(chunk)

    def _withdraw(self, sequence: Sequence) -> None:
        for queue in self._places.victim_queues:
            queue.withdraw(sequence)

    def _offer(self, sequence: Sequence) -> None:
        for queue in self._places.victim_queues:
            queue.offer(sequence)
