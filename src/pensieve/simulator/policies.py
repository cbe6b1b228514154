"""Eviction policies to compare with, which no server offers. Knows chunks, costs and, for bounds, the future;
never tiers or requests.

    tail-lru       least recently active conversation first, its trailing chunk first: what vLLM and SGLang do
    conversation   least recently active conversation first, and all of it: what CachedAttention does t-lru
    Tail-Optimized LRU: first what the next turn can do without and stay under a threshold, then LRU lfu
    fewest turns first, aged (LFUDA); arc: recency against frequency, adaptive (`classic_policies`)
    clairvoyant    knows when each conversation comes back: worth = Cost(l) / time until then. Greedy, so a
    strong policy and not a bound belady         knows it too, and lets the farthest go first, whatever it
    costs

`make_policy` makes these and those of the core by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pensieve.core.chunk import Chunk
from pensieve.core.eviction import (
    LRU,
    MIN_IDLE_S,
    POLICIES,
    ByLines,
    CostOfChunk,
    PolicyFactory,
    PolicyFamily,
)
from pensieve.core.sequence import Key, Sequence, sequences_of
from pensieve.errors import ConfigError
from pensieve.simulator.classic_policies import AdaptiveFamily, FrequencyFamily

NextUse = Callable[
    [Key, float], float
]  # (sequence key, the time it went idle) -> when it comes back, infinity for never
NEVER = 1e300  # 1/worth of what is never used again: above every line


@dataclass(frozen=True, slots=True)
class Setting:
    """What policies may ask of the world they are compared in."""

    cost_of_chunk: CostOfChunk
    chunk_tokens: int = 32
    num_slots: int = 1024  # of the first tier
    next_use_s: NextUse | None = None  # asked when a sequence goes idle; None if unknown
    # t-lru: a turn may compute so many tokens that are not cached, its prompt included
    uncached_tokens: int = 2048
    prompt_tokens: int = 128  # t-lru: what a turn is expected to add


class TailLRU(LRU):
    """Least recently active conversation first, and of it the trailing chunk: the order of an LRU list of
    blocks freed back to front.
    """

    trailing = True


class WholeConversations(LRU):
    """Least recently active conversation first: copied down or dropped as a whole, not just as much as is
    needed.
    """

    whole = True


class TailOptimizedLRU(LRU):
    """T-LRU (Zhang et al., "Tail-Optimized Caching for LLM Inference", 2025).

    Of a conversation of L tokens whose next turn is expected to bring Q, the first L + Q - X suffice for a
    turn that computes no more than X tokens. What lies beyond goes before anything else, least recently
    active first; then LRU. Trailing chunks first throughout.
    """

    trailing = True

    def __init__(self, family: _Lengths, spare_chunks: int) -> None:
        super().__init__()
        self._lengths, self._spare_chunks = family.lengths, spare_chunks

    def _rank(self, chunk: Chunk) -> float:
        longest = max(self._lengths.get(member.key, len(member.chunks)) for member in sequences_of(chunk))
        spare = chunk.index >= longest - self._spare_chunks
        return chunk.owner.last_active_s - (1e13 if spare else 0.0)


class _Lengths(PolicyFamily):
    """Remembers how long conversations were when they went idle: what leaves from their end would not tell."""

    def __init__(self, uncached_tokens: int, prompt_tokens: int, chunk_tokens: int) -> None:
        spare_chunks = max(0, uncached_tokens - prompt_tokens) // chunk_tokens
        super().__init__(lambda: TailOptimizedLRU(self, spare_chunks))
        self.lengths: dict[
            Key, int
        ] = {}  # chunks; one entry a conversation, for as long as the simulation lasts

    def went_idle(self, sequence: Sequence, now_s: float, num_answered: int) -> None:
        """See `PolicyFamily`."""
        self.lengths[sequence.key] = len(sequence.chunks)


class Foresight(PolicyFamily):
    """Policies that know when each conversation comes back."""

    def __init__(self, next_use_s: NextUse, make: Callable[[Foresight], Clairvoyant | Belady]) -> None:
        super().__init__(lambda: make(self))
        self._next_use_s = next_use_s
        self._next: dict[Key, float] = {}  # of idle sequences

    def went_idle(self, sequence: Sequence, now_s: float, num_answered: int) -> None:
        """See `PolicyFamily`."""
        self._next[sequence.key] = self._next_use_s(sequence.key, now_s)

    def next_s(self, chunk: Chunk) -> float:
        """When the first of the conversations through an idle chunk comes back."""
        return min(self._next.get(member.key, math.inf) for member in sequences_of(chunk))


class Clairvoyant(ByLines[tuple[int, bool]]):
    """Worth = Cost(l) / (time until its next use), 0 for what is never used again.

    1/worth is a straight line that falls until the next use. Within a length class the farthest is the worst
    for ever.
    """

    def __init__(self, cost_of_chunk: CostOfChunk, foresight: Foresight) -> None:
        super().__init__()
        self._cost, self._foresight = cost_of_chunk, foresight

    def worth(self, chunk: Chunk, now_s: float) -> float:
        """In Cost units a second."""
        next_s = now_s if chunk.owner.num_active else self._foresight.next_s(chunk)
        return self._cost(chunk.index) / (max(0.0, next_s - now_s) + MIN_IDLE_S)

    def _class_of(self, chunk: Chunk) -> tuple[tuple[int, bool], float]:
        if chunk.owner.num_active:
            return (chunk.index, True), 0.0
        next_s = self._foresight.next_s(chunk)
        return (
            ((-1, False), chunk.owner.last_active_s)
            if next_s == math.inf
            else ((chunk.index, False), -next_s)
        )

    def _line(self, kind: tuple[int, bool], key: float, now_s: float) -> tuple[float, float, float]:
        index, active = kind
        if index < 0:
            return 0.0, NEVER, math.inf
        slope = 1.0 / self._cost(index)
        if active or now_s >= -key:
            return 0.0, MIN_IDLE_S * slope, math.inf
        return -slope, (MIN_IDLE_S - key) * slope, -key


class Belady(LRU):
    """The farthest next use first; leading chunk first within a conversation."""

    def __init__(self, foresight: Foresight) -> None:
        super().__init__()
        self._foresight = foresight

    def _rank(self, chunk: Chunk) -> float:
        return -self._foresight.next_s(chunk)


def _foresight(setting: Setting, make: Callable[[Foresight], Clairvoyant | Belady]) -> Foresight:
    if setting.next_use_s is None:
        raise ConfigError(
            "a clairvoyant policy must be told when conversations come back, which only a simulation can"
        )
    return Foresight(setting.next_use_s, make)


# name -> setting -> what makes the policies of one cache
COMPARED: dict[str, Callable[[Setting], PolicyFactory]] = {
    "tail-lru": lambda setting: TailLRU,
    "conversation": lambda setting: WholeConversations,
    "t-lru": lambda setting: _Lengths(setting.uncached_tokens, setting.prompt_tokens, setting.chunk_tokens),
    "lfu": lambda setting: FrequencyFamily(),
    "arc": lambda setting: AdaptiveFamily(setting.num_slots),
    "clairvoyant": lambda setting: _foresight(
        setting, lambda family: Clairvoyant(setting.cost_of_chunk, family)
    ),
    "belady": lambda setting: _foresight(setting, Belady),
}


def make_policy(name: str, setting: Setting) -> PolicyFactory:
    """The policies of one cache, by name.

    Raises:
        ConfigError: no policy has that name, or it needs the future and `next_use_s` is None.
    """
    if name in POLICIES:
        return POLICIES[name](setting.cost_of_chunk)
    if name not in COMPARED:
        raise ConfigError(
            f"no policy is called {name!r}: take one of {', '.join(sorted((*POLICIES, *COMPARED)))}"
        )
    return COMPARED[name](setting)
