"""Which idle chunk is evicted first. One policy a module; a server offers those in `POLICIES`."""

from __future__ import annotations

from collections.abc import Callable

from pensieve.core.eviction.hazard import Hazard
from pensieve.core.eviction.lines import ByLines
from pensieve.core.eviction.lru import LRU
from pensieve.core.eviction.policy import (
    CostOfChunk,
    EvictionPolicy,
    OldestFirst,
    PolicyFactory,
    PolicyFamily,
)
from pensieve.core.eviction.retention import MIN_IDLE_S, RetentionValue, SharersValue
from pensieve.core.eviction.returns import ReturnTimes
from pensieve.core.eviction.tournament import KineticTournament

# name -> cost of a chunk -> factory of one cache's policies
POLICIES: dict[str, Callable[[CostOfChunk], PolicyFactory]] = {
    "retention": lambda cost: lambda: RetentionValue(cost),
    "lru": lambda cost: LRU,
    "sharers": lambda cost: lambda: SharersValue(cost),
    "hazard": lambda cost: Hazard(cost),
}

__all__ = [
    "ByLines",
    "LRU",
    "MIN_IDLE_S",
    "POLICIES",
    "CostOfChunk",
    "EvictionPolicy",
    "Hazard",
    "KineticTournament",
    "OldestFirst",
    "PolicyFactory",
    "PolicyFamily",
    "RetentionValue",
    "ReturnTimes",
    "SharersValue",
]
