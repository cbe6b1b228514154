"""LFU and ARC over conversations, to compare with. Knows turns and recency; never costs, tiers or the future.

Both were made for pages of one size that are used one by one; here a conversation is used as a whole and
evicted chunk by chunk, leading chunks first. What that changes is said with each.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

from pensieve.core.chunk import Chunk
from pensieve.core.eviction import LRU, OldestFirst, PolicyFamily
from pensieve.core.sequence import Key, Sequence, sequences_of

_TIE = 1e-9  # seconds of recency, in uses
_LATER = 1e13  # seconds: beyond every time


class FrequencyFamily(PolicyFamily):
    """LFU with dynamic aging (LFUDA): a conversation's rank is its turns so far plus the age of the cache at
    the last of them.

    The age is the highest rank that was next to go so far, so what was popular once is passed by what is used
    now. Turns are counted for as long as the simulation lasts, those of conversations that were evicted in
    between too. Among equals the least recently active goes.
    """

    def __init__(self) -> None:
        super().__init__(lambda: LeastFrequentlyUsed(self))
        self.age = 0
        self.ranks: dict[Key, int] = {}
        self._turns: dict[Key, int] = {}

    def went_idle(self, sequence: Sequence, now_s: float, num_answered: int) -> None:
        """See `PolicyFamily`."""
        turns = self._turns[sequence.key] = self._turns.get(sequence.key, 0) + 1
        self.ranks[sequence.key] = self.age + turns

    def rank(self, chunk: Chunk) -> int:
        """That of the best of the conversations through a chunk."""
        return max(self.ranks.get(member.key, 0) for member in sequences_of(chunk))


class LeastFrequentlyUsed(LRU):
    """The policy of one queue."""

    def __init__(self, family: FrequencyFamily) -> None:
        super().__init__()
        self._family = family

    def worst(self, now_s: float) -> Chunk | None:
        """See `EvictionPolicy`."""
        victim = super().worst(now_s)
        if victim is not None and not victim.owner.num_active:
            self._family.age = max(self._family.age, self._family.rank(victim))
        return victim

    def _rank(self, chunk: Chunk) -> float:
        return self._family.rank(chunk) + _TIE * chunk.owner.last_active_s


@dataclass(slots=True)
class _Listed:
    """A conversation in one of the two lists, and its chunks."""

    where: Literal[1, 2] = 1  # used once lately, or more often
    length: int = 0  # chunks, as it went idle
    gone: int = 0  # of those, leading ones that are not there
    forgotten: int = 0  # of those, leading ones that are no ghosts any more
    idle: bool = False

    @property
    def ghosts(self) -> int:
        """Chunks that are remembered and not there."""
        return self.gone - self.forgotten


class AdaptiveFamily(PolicyFamily):
    """ARC (Megiddo and Modha, 2003) over conversations; sizes are counted in chunks.

    A conversation enters the list of those used once (T1), and moves to that of those used more often (T2)
    when it comes back while it has chunks or ghosts. T1 gives a victim while it is larger than its target p,
    else T2. A return that finds m chunks gone is m ghost hits at once: p grows by m * max(1, |B2| / |B1|) if
    they were T1's, and shrinks likewise if they were T2's. Ghosts of a list beyond the cache's size are
    forgotten, the least recently active first. Only idle conversations count: those that are active cannot be
    victims. How many chunks are gone is read off the leading candidate, exactly where only leading ones go
    and there is one tier.
    """

    def __init__(self, num_slots: int) -> None:
        super().__init__(lambda: Adaptive(self))
        self.target = 0.0  # p
        self.resident = {1: 0, 2: 0}
        self._num_slots = num_slots
        self._ghosts = {1: 0, 2: 0}
        self._listed: OrderedDict[Key, _Listed] = OrderedDict()  # by the last time they went idle

    def came_back(self, sequence: Sequence, now_s: float) -> None:
        """See `PolicyFamily`."""
        listed = self._listed.get(sequence.key)
        if listed is None or not listed.idle:
            return
        there = sum(chunk is not None and chunk.place is not None for chunk in sequence.chunks)
        self._set_gone(listed, max(listed.forgotten, listed.length - there))
        if hits := listed.ghosts:
            change = hits * max(1.0, self._ghosts[3 - listed.where] / self._ghosts[listed.where])
            self.target = min(
                self._num_slots, max(0.0, self.target + (change if listed.where == 1 else -change))
            )
        self._count(listed, -1)
        listed.idle = False
        listed.where = 2 if there or hits else 1

    def went_idle(self, sequence: Sequence, now_s: float, num_answered: int) -> None:
        """See `PolicyFamily`."""
        listed = self._listed.setdefault(sequence.key, _Listed())
        self._listed.move_to_end(sequence.key)
        listed.length, listed.gone, listed.forgotten, listed.idle = len(sequence.chunks), 0, 0, True
        self._count(listed, +1)
        for where in (1, 2):
            oldest = iter(self._listed.values())
            while self._ghosts[where] > self._num_slots and (ghost := next(oldest, None)) is not None:
                if ghost.where == where and ghost.idle:
                    self._ghosts[where] -= ghost.ghosts
                    ghost.forgotten = ghost.gone

    def where(self, chunk: Chunk) -> int:
        """The list a chunk is in: the better one of its conversations'."""
        return max(
            (listed.where for s in sequences_of(chunk) if (listed := self._listed.get(s.key)) is not None),
            default=1,
        )

    def leads(self, chunk: Chunk, *, comes: bool) -> None:
        """A private chunk of an idle conversation becomes next to go of it, and what was before it is gone;
        or it is so no more.
        """
        listed = self._listed.get(sequences_of(chunk)[0].key)
        if listed is not None and listed.idle:
            self._set_gone(
                listed, max(listed.forgotten, min(chunk.index, listed.length) if comes else listed.length)
            )

    def _set_gone(self, listed: _Listed, gone: int) -> None:
        self._count(listed, -1)
        listed.gone = gone
        self._count(listed, +1)

    def _count(self, listed: _Listed, sign: int) -> None:
        self.resident[listed.where] += sign * (listed.length - listed.gone)
        self._ghosts[listed.where] += sign * listed.ghosts


class Adaptive:
    """The policy of one queue."""

    trailing = False
    whole = False

    def __init__(self, family: AdaptiveFamily) -> None:
        order = itertools.count()
        self._family = family
        self._lists = {where: OldestFirst(order) for where in (1, 2, 3)}  # 3: active
        self._home: dict[Chunk, int] = {}

    def add(self, chunk: Chunk) -> None:
        """See `EvictionPolicy`."""
        if not chunk.owner.num_active and isinstance(chunk.owner, Sequence):
            self._family.leads(chunk, comes=True)
        home = 3 if chunk.owner.num_active else self._family.where(chunk)
        self._home[chunk] = home
        self._lists[home].add(chunk, chunk.owner.last_active_s)

    def remove(self, chunk: Chunk) -> None:
        """See `EvictionPolicy`."""
        home = self._home.pop(chunk)
        self._lists[home].remove(chunk)
        if home != 3 and isinstance(chunk.owner, Sequence):
            self._family.leads(chunk, comes=False)

    def worst(self, now_s: float) -> Chunk | None:
        """See `EvictionPolicy`."""
        first = self._first()
        top = self._lists[first].top() or self._lists[3 - first].top() or self._lists[3].top()
        return top[1] if top else None

    def worth(self, chunk: Chunk, now_s: float) -> float:
        """The time it was last active, later for the list that is spared."""
        home = self._home.get(chunk) or (3 if chunk.owner.num_active else self._family.where(chunk))
        return (
            math.inf if home == 3 else chunk.owner.last_active_s + (0.0 if home == self._first() else _LATER)
        )

    def _first(self) -> int:
        return 1 if self._family.resident[1] > self._family.target else 2
