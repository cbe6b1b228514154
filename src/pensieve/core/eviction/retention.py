"""The paper's retention value, and the same weighed by sharers.

Knows costs, idle times and how many conversations share a chunk.
"""

from __future__ import annotations

import math

from pensieve.core.chunk import Chunk
from pensieve.core.eviction.lines import ByLines
from pensieve.core.eviction.policy import CostOfChunk
from pensieve.core.sequence import Sharers

# T = idle time + 1 ms. The paper's V = Cost / T has a pole at T = 0; adding instead of clamping keeps 1/V
# linear in time.
MIN_IDLE_S = 1e-3


class RetentionValue(ByLines[int]):
    """The paper's V = Cost(l) / T, exactly, in O(log) a victim (§4.3.1).

    1/V = (now - last_active + 1 ms) / Cost(l) is a straight line in time. Chunks of one length class share
    its slope, so within a class the oldest is the worst for ever.
    """

    def __init__(self, cost_of_chunk: CostOfChunk) -> None:
        """`cost_of_chunk(index)` gives seconds, positive and monotone in the index."""
        super().__init__()
        self._cost = cost_of_chunk

    def worth(self, chunk: Chunk, now_s: float) -> float:
        """V, in Cost units a second."""
        idle_s = 0.0 if chunk.owner.num_active else max(0.0, now_s - chunk.owner.last_active_s)
        return self._cost(chunk.index) / (idle_s + MIN_IDLE_S)

    def _class_of(self, chunk: Chunk) -> tuple[int, float]:
        owner = chunk.owner
        return 2 * chunk.index + (1 if owner.num_active else 0), owner.last_active_s

    def _line(self, kind: int, key: float, now_s: float) -> tuple[float, float, float]:
        slope = 1.0 / self._cost(kind // 2)
        if kind % 2:  # its conversation counts as active now, whenever "now" is
            return 0.0, MIN_IDLE_S * slope, math.inf
        return slope, (MIN_IDLE_S - key) * slope, math.inf


class SharersValue(ByLines[tuple[int, int, bool]]):
    """n * Cost(l) / T, with n conversations through a chunk and T since the last of them was active.

    For servers whose conversations share system prompts or documents. A class is a length and a number of
    sharers, so it is as exact as `RetentionValue`, and equal to it where nothing is shared.
    """

    def __init__(self, cost_of_chunk: CostOfChunk) -> None:
        """`cost_of_chunk(index)` gives seconds, positive and monotone in the index."""
        super().__init__()
        self._cost = cost_of_chunk

    def worth(self, chunk: Chunk, now_s: float) -> float:
        """n * V, in Cost units a second."""
        idle_s = 0.0 if chunk.owner.num_active else max(0.0, now_s - chunk.owner.last_active_s)
        return num_sharers(chunk) * self._cost(chunk.index) / (idle_s + MIN_IDLE_S)

    def _class_of(self, chunk: Chunk) -> tuple[tuple[int, int, bool], float]:
        owner = chunk.owner
        return (chunk.index, num_sharers(chunk), owner.num_active > 0), owner.last_active_s

    def _line(self, kind: tuple[int, int, bool], key: float, now_s: float) -> tuple[float, float, float]:
        index, num_members, active = kind
        slope = 1.0 / (num_members * self._cost(index))
        if active:
            return 0.0, MIN_IDLE_S * slope, math.inf
        return slope, (MIN_IDLE_S - key) * slope, math.inf


def num_sharers(chunk: Chunk) -> int:
    """Conversations through a chunk."""
    return len(chunk.owner.members) if isinstance(chunk.owner, Sharers) else 1
