"""The free list of one tier. Knows slot numbers; never their contents."""

from __future__ import annotations


class SlotPool:
    """Hands out slots `0 .. num_slots - 1`. A slot is free or taken, nothing else."""

    __slots__ = ("_fresh", "_returned", "num_slots")

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._fresh = 0  # slots from here on were never handed out: a large tier costs no list
        self._returned: list[int] = []

    @property
    def num_free(self) -> int:
        """Slots that can be taken now."""
        return self.num_slots - self._fresh + len(self._returned)

    @property
    def num_used(self) -> int:
        """Slots that are taken."""
        return self._fresh - len(self._returned)

    def take(self) -> int | None:
        """A free slot, or None, with nothing changed, when there is none."""
        if self._returned:
            return self._returned.pop()
        if self._fresh == self.num_slots:
            return None
        self._fresh += 1
        return self._fresh - 1

    def release(self, slot: int) -> None:
        """Take a slot back."""
        assert 0 <= slot < self._fresh, f"slot {slot} was never handed out"
        self._returned.append(slot)

    def free_slots(self) -> set[int]:
        """Every free slot (for `check`: linear)."""
        free = set(self._returned)
        assert len(free) == len(self._returned), "a slot was released twice"
        return free | set(range(self._fresh, self.num_slots))
