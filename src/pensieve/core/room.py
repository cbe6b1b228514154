"""Finding room: which idle chunk gives up its slot, and how. Knows tiers and worth; never requests.

Each tier gives slots in this order: free ones, clean copies (a lower copy exists), and then at a price: the lowest retention value is
copied down, or dropped where nothing lower has room for it.
"""

from __future__ import annotations

from pensieve.core.chunk import Chunk
from pensieve.core.history import History
from pensieve.core.places import Places
from pensieve.core.sequence import Key, Sequence

# A tier into which so many copies failed in a row is left alone, but for one try now and then: what would go there is dropped instead.
FAILED_TIER, FAILED_TIER_RETRY_S = 3, 1.0


class Room:
    """Questions about room, and the acts that make it. Acts through `Places` only, and notes what is lost."""

    def __init__(self, places: Places, history: History) -> None:
        self._places, self._history = places, history
        self._retry_s = [0.0] * places.num_tiers

    def available(self, tier: int) -> int:
        """Slots of a tier that can be had now, at no cost."""
        return self._places.pools[tier].num_free + self._places.clean[tier].count

    def coming(self, tier: int) -> int:
        """Slots that copies under way will make reclaimable (fewer, if their chunks are leased meanwhile)."""
        return self._places.copies_down[tier]

    def evictable(self, tier: int) -> int:
        """Slots whose chunk would have to be copied down or dropped first."""
        return self._places.sole[tier].count

    def retries_due(self, now_s: float) -> int:
        """Tiers left alone because copies into them failed, and which may be tried again now."""
        return sum(
            count >= FAILED_TIER and now_s >= retry_s
            for count, retry_s in zip(self._places.failed_down, self._retry_s, strict=True)
        )

    def take(self, tier: int, now_s: float) -> int:
        """A slot of `tier`: a free one, or that of the worst clean copy. The caller has seen that one is available."""
        places = self._places
        slot = places.pools[tier].take()
        if slot is None:
            victim = places.clean[tier].worst(now_s)
            assert victim is not None, f"no slot available in tier {tier}"
            others = places.clean[tier].going_with(victim)
            slot = places.reclaim(victim, tier)
            for chunk in others:
                places.release_upper(chunk, tier)
        return slot

    def make(self, tier: int, num_slots: int, now_s: float, for_whom: Key | None = None) -> None:
        """Evict from `tier`, worst first, until `num_slots` are available or on their way. Does what it can."""
        queue = self._places.sole[tier]
        stuck: list[Chunk] = []  # kept chunks for which nothing below can be had: others go instead of them
        while self.available(tier) + self.coming(tier) < num_slots:
            victim = queue.worst(now_s)
            if victim is None:
                break
            if not self._evict(victim, tier, now_s, for_whom):
                if not victim.keeps:
                    break
                queue.discard(victim)
                stuck.append(victim)
        for chunk in stuck:
            queue.add(chunk)

    def has_copies_to_begin(self, share: float, max_in_flight: int) -> bool:
        """Whether `copy_ahead`, asked for no more than the share, would look for victims. If not, it will not until a chunk moves or is leased."""
        places = self._places
        return len(places.copies) < max_in_flight and any(
            self.evictable(tier) and self.available(tier) + self.coming(tier) < self._share_slots(tier, share)
            for tier in range(places.num_tiers - 1)
        )

    def copy_ahead(self, share: float, max_in_flight: int, now_s: float, asked_for: int = 0) -> None:
        """Copy the lowest retention values down before room is needed (paper §4.3.2).

        In each tier but the last, until `share` of its slots (or of those of the tier below, if that is smaller: copies of what is above
        would crowd out what lies nowhere else) are free, reclaimable or on their way to be; never at the cost of something below that is
        worth more. In the first tier, until `asked_for` slots are, but beyond the share into free slots only: what displaces
        another's lower copy makes no room in the end.
        """
        places = self._places
        for tier in range(places.num_tiers - 1):
            share_slots = self._share_slots(tier, share)
            target = max(share_slots, asked_for if tier == 0 else 0)
            while (
                len(places.copies) < max_in_flight
                and (ready := self.available(tier) + self.coming(tier)) < target
            ):
                if ready >= share_slots and not places.pools[tier + 1].num_free:
                    break
                victim = places.sole[tier].worst(now_s)
                if victim is None or victim.place != tier or not self._takes_copies(tier + 1, now_s):
                    break
                for_whom = victim.owner.key if isinstance(victim.owner, Sequence) else None
                slot = self._obtain_below(tier + 1, victim, now_s, for_whom, at_any_price=False)
                if slot is None:
                    break
                places.begin_copy(victim, tier, tier + 1, slot)

    def _share_slots(self, tier: int, share: float) -> float:
        return share * min(pool.num_slots for pool in self._places.pools[tier : tier + 2])

    def _evict(self, victim: Chunk, tier: int, now_s: float, for_whom: Key | None) -> bool:
        """Begin to free the slot of a chunk without a lower copy; False if that is not possible now. Some policies let more go with it."""
        queue = self._places.sole[tier]
        others = queue.going_with(victim)
        done = self._evict_one(victim, tier, now_s, for_whom)
        for chunk in others if done else ():
            if chunk.queues & queue.bit:
                self._evict_one(chunk, tier, now_s, for_whom)
        return done

    def _evict_one(self, victim: Chunk, tier: int, now_s: float, for_whom: Key | None) -> bool:
        places = self._places
        if (
            victim.place != tier and not victim.keeps
        ):  # a faster tier has it too (a kept one would only come back)
            places.release_lower(victim, tier)
            return True
        if tier + 1 < places.num_tiers and self._takes_copies(tier + 1, now_s):
            slot = self._obtain_below(tier + 1, victim, now_s, for_whom, at_any_price=victim.keeps > 0)
            if slot is not None:
                places.begin_copy(victim, tier, tier + 1, slot)
                return True
            if places.copies_down[tier + 1]:
                return False  # room below is on its way: better wait for it than forget
        if victim.keeps:
            return False
        self._history.note(victim, "dropped", now_s, for_whom)
        places.drop(victim)
        return True

    def _takes_copies(self, tier: int, now_s: float) -> bool:
        if self._places.failed_down[tier] < FAILED_TIER:
            return True
        if now_s < self._retry_s[tier]:
            return False
        self._retry_s[tier] = now_s + FAILED_TIER_RETRY_S
        return True

    def _obtain_below(
        self, tier: int, incoming: Chunk, now_s: float, for_whom: Key | None, *, at_any_price: bool
    ) -> int | None:
        """A slot of a lower tier for `incoming`, at the cost only of what is worth less than it (unless at any price)."""
        places = self._places
        slot = places.pools[tier].take()
        if slot is not None:
            return slot
        duplicate = places.duplicates[tier].any()
        if duplicate is not None:
            places.release_lower(duplicate, tier)
            return places.pools[tier].take()
        clean = places.clean[tier].worst(now_s)
        if clean is not None:
            if clean.place == tier:
                return places.reclaim(clean, tier)
            places.release_lower(clean, tier)
            return places.pools[tier].take()
        queue = places.sole[tier]
        victim = queue.worst(now_s)
        if victim is None or not (at_any_price or queue.worth(victim, now_s) < queue.worth(incoming, now_s)):
            return None
        if not self._evict(victim, tier, now_s, for_whom):
            return None
        return places.pools[tier].take()
