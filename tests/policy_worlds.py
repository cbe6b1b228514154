"""A tiny cache that a test drives turn by turn, with any policy, and where each chunk then lies."""

from __future__ import annotations

import hashlib

from pensieve.config import CacheConfig, TierConfig
from pensieve.core.cache import TieredCache
from pensieve.core.checks import check
from pensieve.core.cost import CostProfile
from pensieve.core.eviction import POLICIES, PolicyFactory
from pensieve.core.sequence import Key, extend_digests
from pensieve.simulator.policies import COMPARED, Setting, make_policy

SIZE = 4
COST = CostProfile([(4, 1.0), (64, 4.0)], SIZE)  # chunk i costs 1 + i / 5
ALL_POLICIES = sorted((*POLICIES, *COMPARED))


def policy_of(name: str, next_use_s: dict[str, float] | None = None, **setting: int) -> PolicyFactory:
    """`next_use_s`: when a conversation comes back, by its id; others never do."""
    known = next_use_s or {}
    return make_policy(
        name,
        Setting(
            COST.of_chunk, SIZE, next_use_s=lambda key, now_s: known.get(key[1], float("inf")), **setting
        ),
    )


def some_time_later(key: Key, now_s: float) -> float:
    """A made-up future: in up to two minutes, or never."""
    draw = hashlib.blake2b(f"{key[1]} {now_s}".encode(), digest_size=1).digest()[0]
    return float("inf") if draw < 64 else now_s + draw / 2


class TinyCache:
    """Conversations of whole chunks; a turn is computed at once, and copies settle at once."""

    def __init__(self, policy: PolicyFactory, *slots: int) -> None:
        tiers = tuple(TierConfig(name, n) for name, n in zip(("gpu", "cpu", "disk"), slots, strict=False))
        self.cache = TieredCache(CacheConfig(tiers, SIZE), policy)

    def turn(
        self, name: str, num_chunks: int, now_s: float, ends_s: float | None = None, system: int = 0
    ) -> None:
        """A request whose history is then `num_chunks` long, the first `system` of them shared with everybody."""
        cache = self.cache
        own = sum(map(ord, name))
        tokens = [1] * (system * SIZE) + [own] * ((num_chunks - system) * SIZE)
        digests: list[bytes] = []
        extend_digests(digests, "n", tokens, SIZE)
        sequence = cache.open("n", name, now_s)
        cache.attach(sequence, tokens, digests)
        need = cache.survey(sequence, len(tokens))
        for _ in range(3):
            with cache.protected(sequence):
                cache.room.make(0, need.slots, now_s)
            self._settle()
        admission = cache.admit(sequence, len(tokens), digests, now_s)
        self._settle()
        for start, stop in admission.missing:
            cache.commit(sequence, start, stop, digests)
        cache.release(sequence, tokens, digests)
        cache.close(sequence, now_s if ends_s is None else ends_s)
        check(cache)

    def _settle(self) -> None:
        for copy_id in list(self.cache.places.copies):
            self.cache.finish_copy(copy_id)
        self.cache.places.wipes.settle(self.cache.collect_moves().wiped, None)

    def places(self, name: str) -> str:
        """A letter a chunk: g, c, d by its fastest tier, a dot for what is gone; holes at the end do not show."""
        sequence = self.cache.find("n", name)
        chunks = sequence.chunks if sequence is not None else []
        return "".join(
            "." if chunk is None or chunk.place is None else "gcd"[chunk.place] for chunk in chunks
        )
