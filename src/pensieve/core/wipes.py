"""Which slots may hold bytes, and which of them must be zeroed.

Knows slots and copies by number; never chunks, bytes or time.

A slot is zero until it is taken. Given back, it keeps its bytes until they must go: before a chunk is
computed in it (behind a partial chunk must lie no bytes of an earlier one), or because a conversation is
erased. A copy fills a slot whole and needs no wipe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import islice

Slot = tuple[int, int]  # (tier, slot)

MAX_WIPES = 64  # free slots wiped in one plan, so that no step takes much longer for an erasure
MAX_FAILURES = 3  # plans in a row whose wipes failed before the engine stops: erasure is a promise

_DIRTY, _TAKEN = 1, 2  # bits of a slot's state


class Erasure:
    """The erasure of a conversation's bytes: waits for copies that may still write, and for wipes."""

    __slots__ = ("copies", "num_slots", "slots")

    def __init__(self, num_slots: int = 0, slots: Iterable[Slot] = (), copies: Iterable[int] = ()) -> None:
        self.num_slots = num_slots  # slots that only this conversation used, over all tiers
        self.slots = set(slots)
        self.copies = set(copies)

    @property
    def done(self) -> bool:
        """Every byte of it is zero."""
        return not (self.slots or self.copies)


class Wipes:
    """Sole writer of whether a slot may hold bytes.

    Part of `Places`, which reports every slot taken and given back.
    """

    def __init__(self, num_slots: Iterable[int]) -> None:
        self._state = [bytearray(count) for count in num_slots]  # one byte a slot
        self._pending: dict[Slot, None] = {}  # free slots to be wiped, in order
        self._issued: list[Slot] = []  # for the next plan
        self._in_flight: Counter[Slot] = Counter()  # in plans not committed yet
        self._erasures: list[Erasure] = []
        self._num_failures = 0

    @property
    def has_work(self) -> bool:
        """The next plan will have something to wipe."""
        return bool(self._issued or self._pending)

    def is_dirty(self, tier: int, slot: int) -> bool:
        """Whether the slot may hold bytes other than zero once every plan made so far has run."""
        return bool(self._state[tier][slot] & _DIRTY)

    # -- slots taken and given back

    def taken(self, tier: int, slot: int, *, to_compute: bool) -> None:
        """A slot was taken.

        Schedules a wipe if it is dirty and a chunk is computed in it, or if an erasure waits on it.
        """
        state, key = self._state[tier], (tier, slot)
        if key in self._pending:
            del self._pending[key]
            self._issued.append(key)
        elif to_compute and state[slot] & _DIRTY:
            self._issued.append(key)
        state[slot] = _DIRTY | _TAKEN

    def released(self, tier: int, slot: int, *, erase: bool, copy_id: int | None = None) -> None:
        """A slot is free again; `copy_id` is the copy whose end freed it, if any.

        `erase`: its bytes must be zeroed.
        """
        self._state[tier][slot] = _DIRTY
        key = (tier, slot)
        for erasure in self._erasures:
            if copy_id is not None and copy_id in erasure.copies:
                erasure.slots.add(key)
            erase |= key in erasure.slots
        if erase:
            self._pending[key] = None

    def handed_over(self, tier: int, slot: int) -> None:
        """A slot passes from an erased chunk straight to another: `taken` will wipe it."""
        self._pending[(tier, slot)] = None

    def copy_settled(self, copy_id: int) -> None:
        """A copy ended: its target was filled whole or freed."""
        for erasure in self._erasures:
            erasure.copies.discard(copy_id)
        self._drop_done()

    # -- erasing

    def erase(self, num_slots: int, copies: Iterable[int]) -> Erasure:
        """Zero every dirty free slot: which of them hold bytes of the conversation is not recorded.

        Waits for the copies under way as well: until they settle, their targets hold older bytes.
        """
        for tier, state in enumerate(self._state):
            slot = state.find(_DIRTY)
            while slot >= 0:
                self._pending[(tier, slot)] = None
                slot = state.find(_DIRTY, slot + 1)
        erasure = Erasure(num_slots, (*self._pending, *self._issued, *self._in_flight), copies)
        if not erasure.done:
            self._erasures.append(erasure)
        return erasure

    # -- plans

    def collect(self) -> tuple[Slot, ...]:
        """Slots for the next plan to wipe: those taken since the last plan, and some free ones."""
        free = list(islice(self._pending, max(0, MAX_WIPES - len(self._issued))))
        for tier, slot in free:
            del self._pending[(tier, slot)]
            self._state[tier][slot] = 0
        wiped = (*self._issued, *free)
        self._issued.clear()
        self._in_flight.update(wiped)
        return wiped

    def settle(self, wiped: tuple[Slot, ...], error: str | None) -> str | None:
        """A plan's wipes are done, or failed and are repeated.

        Returns why the engine must stop; None if it need not.
        """
        for key in wiped:
            self._in_flight[key] -= 1
            if not self._in_flight[key]:
                del self._in_flight[key]
        if error is not None:
            for tier, slot in wiped:
                if not self._state[tier][slot] & _TAKEN:
                    self._state[tier][slot] |= _DIRTY
                    self._pending[(tier, slot)] = None
            self._num_failures += 1
            return (
                f"freed slots could not be zeroed {self._num_failures} times in a row: {error}"
                if self._num_failures == MAX_FAILURES
                else None
            )
        if wiped:
            self._num_failures = 0
            for erasure in self._erasures:
                erasure.slots.difference_update(wiped)
            self._drop_done()
        return None

    # -- for `check`

    def check(self, tier: int, free: set[int]) -> None:
        """Assert that free and taken slots are known as such, and that only free ones wait to be wiped."""
        state = self._state[tier]
        wrong = [slot for slot, bits in enumerate(state) if bool(bits & _TAKEN) == (slot in free)]
        assert not wrong, f"tier {tier}: slots {wrong} are free and known as taken, or the other way round"
        taken = [slot for place, slot in self._pending if place == tier and slot not in free]
        assert not taken, f"tier {tier}: slots {taken} are taken and wait to be wiped"
        clean = [slot for place, slot in self._pending if place == tier and not state[slot] & _DIRTY]
        assert not clean, f"tier {tier}: slots {clean} are clean and wait to be wiped"

    def check_erasures(self, copies: Iterable[int]) -> None:
        """Assert that every copy and wipe that an erasure waits for is on its way."""
        under_way = set(copies)
        for erasure in self._erasures:
            assert erasure.copies <= under_way, (
                f"an erasure waits for copies {erasure.copies - under_way}, which have settled"
            )
            stuck = [
                (tier, slot)
                for tier, slot in erasure.slots
                if not (
                    (tier, slot) in self._pending
                    or (tier, slot) in self._issued
                    or self._in_flight[(tier, slot)]
                    or self._state[tier][slot] & _TAKEN
                )
            ]
            assert not stuck, f"an erasure waits for slots {stuck}, which no plan wipes"

    def _drop_done(self) -> None:
        if self._erasures:
            self._erasures = [erasure for erasure in self._erasures if not erasure.done]
