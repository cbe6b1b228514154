"""Making room: which idle chunk is evicted, and how. Knows tiers and worth; never requests.

Each tier gives slots in this order: free slots; slots of chunks that have a lower copy; then the chunk worth
least is copied down, or dropped if no lower tier has room for it.
"""

from __future__ import annotations

from pensieve.core.chunk import Chunk
from pensieve.core.history import History
from pensieve.core.places import Places
from pensieve.core.sequence import Key, Sequence

# After FAILED_TIER failed copies in a row a tier gets one copy every FAILED_TIER_RETRY_S; other chunks are
# dropped instead.
FAILED_TIER, FAILED_TIER_RETRY_S = 3, 1.0


class Room:
    """Questions about room, and evictions.

    Changes places through `Places` only; notes in `History` what is lost.
    """

    def __init__(self, places: Places, history: History) -> None:
        self._places, self._history = places, history
        self._retry_s = [0.0] * places.num_tiers

    def available(self, tier: int) -> int:
        """Slots of a tier that can be had now at no cost."""
        return self._places.pools[tier].num_free + self._places.has_lower_copy[tier].count

    def coming(self, tier: int) -> int:
        """Slots that copies under way will make reclaimable (fewer, if their chunks are leased meanwhile)."""
        return self._places.copies_down[tier]

    def evictable(self, tier: int) -> int:
        """Slots whose chunk would have to be copied down or dropped first."""
        return self._places.only_copy[tier].count

    def retries_due(self, now_s: float) -> int:
        """Tiers left alone because copies into them failed, and which may be tried again now."""
        return sum(
            count >= FAILED_TIER and now_s >= retry_s
            for count, retry_s in zip(self._places.failed_down, self._retry_s, strict=True)
        )

    def take(self, tier: int, now_s: float) -> int:
        """A slot of `tier`: a free one, or that of the worst chunk with a lower copy.

        One must be available.
        """
        places = self._places
        slot = places.pools[tier].take()
        if slot is None:
            victim = places.has_lower_copy[tier].worst(now_s)
            assert victim is not None, f"no slot available in tier {tier}"
            others = places.has_lower_copy[tier].evicted_with(victim)
            slot = places.reclaim(victim, tier)
            for chunk in others:
                places.release_upper(chunk, tier)
        return slot

    def make(self, tier: int, num_slots: int, now_s: float, for_key: Key | None = None) -> None:
        """Evict from `tier`, worst first, until `num_slots` are available or coming, or no victim is left."""
        queue = self._places.only_copy[tier]
        stuck: list[Chunk] = []  # kept chunks with no slot to be had below: other chunks are evicted instead
        while self.available(tier) + self.coming(tier) < num_slots:
            victim = queue.worst(now_s)
            if victim is None:
                break
            if not self._evict(victim, tier, now_s, for_key):
                if not victim.keeps:
                    break
                queue.discard(victim)
                stuck.append(victim)
        for chunk in stuck:
            queue.add(chunk)

    def has_copies_to_begin(self, share: float, max_in_flight: int) -> bool:
        """Whether `copy_ahead`, asked for no more than the share, would look for victims.

        If not, it will not until a chunk moves or is leased.
        """
        places = self._places
        return len(places.copies) < max_in_flight and any(
            self.evictable(tier) and self.available(tier) + self.coming(tier) < self._share_slots(tier, share)
            for tier in range(places.num_tiers - 1)
        )

    def copy_ahead(self, share: float, max_in_flight: int, now_s: float, asked_for: int = 0) -> None:
        """Copy the chunks worth least down before room is needed (paper §4.3.2).

        1. Target: in each tier but the last, `share` of its slots are free, reclaimable or on their way to
           be. The share is taken of the smaller of this tier and the one below, lest lower copies crowd out
           only copies.
        2. Limit: no chunk below that is worth more is evicted for a copy.
        3. Queue: in the first tier the target is at least `asked_for` slots. Beyond the share only free slots
           below are used: a copy that displaces another lower copy makes no room in the end.
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
                victim = places.only_copy[tier].worst(now_s)
                if victim is None or victim.place != tier or not self._takes_copies(tier + 1, now_s):
                    break
                for_key = victim.owner.key if isinstance(victim.owner, Sequence) else None
                slot = self._obtain_below(tier + 1, victim, now_s, for_key, at_any_price=False)
                if slot is None:
                    break
                places.begin_copy(victim, tier, tier + 1, slot)

    def _share_slots(self, tier: int, share: float) -> float:
        return share * min(pool.num_slots for pool in self._places.pools[tier : tier + 2])

    def _evict(self, victim: Chunk, tier: int, now_s: float, for_key: Key | None) -> bool:
        """Begin to evict a chunk without a lower copy, and those the policy evicts with it.

        False if not possible now.
        """
        queue = self._places.only_copy[tier]
        others = queue.evicted_with(victim)
        done = self._evict_one(victim, tier, now_s, for_key)
        for chunk in others if done else ():
            if chunk.queues & queue.bit:
                self._evict_one(chunk, tier, now_s, for_key)
        return done

    def _evict_one(self, victim: Chunk, tier: int, now_s: float, for_key: Key | None) -> bool:
        places = self._places
        if victim.place != tier and not victim.keeps:  # a faster tier has it too (a kept one would return)
            places.release_lower(victim, tier)
            return True
        if tier + 1 < places.num_tiers and self._takes_copies(tier + 1, now_s):
            slot = self._obtain_below(tier + 1, victim, now_s, for_key, at_any_price=victim.keeps > 0)
            if slot is not None:
                places.begin_copy(victim, tier, tier + 1, slot)
                return True
            if places.copies_down[tier + 1]:
                return False  # room below is on its way: better to wait for it than to drop the chunk
        if victim.keeps:
            return False
        self._history.note(victim, "dropped", now_s, for_key)
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
        self, tier: int, incoming: Chunk, now_s: float, for_key: Key | None, *, at_any_price: bool
    ) -> int | None:
        """A slot of a lower tier for `incoming`.

        Evicts only a chunk worth less than it, unless `at_any_price`.
        """
        places = self._places
        slot = places.pools[tier].take()
        if slot is not None:
            return slot
        duplicate = places.duplicates[tier].any()
        if duplicate is not None:
            places.release_lower(duplicate, tier)
            return places.pools[tier].take()
        reclaimable = places.has_lower_copy[tier].worst(now_s)
        if reclaimable is not None:
            if reclaimable.place == tier:
                return places.reclaim(reclaimable, tier)
            places.release_lower(reclaimable, tier)
            return places.pools[tier].take()
        queue = places.only_copy[tier]
        victim = queue.worst(now_s)
        if victim is None or not (at_any_price or queue.worth(victim, now_s) < queue.worth(incoming, now_s)):
            return None
        if not self._evict(victim, tier, now_s, for_key):
            return None
        return places.pools[tier].take()
