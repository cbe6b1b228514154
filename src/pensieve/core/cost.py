"""What recomputing a chunk costs, by the length of the context before it.

Knows points; never how they were measured.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from pensieve.config import ModelShape
from pensieve.errors import ConfigError


class CostProfile:
    """Cost(l): seconds to recompute one chunk whose last token sees l tokens (paper §4.3.1).

    Measured at powers of two and interpolated linearly between; made monotone, since noise must never make a
    trailing chunk look cheaper than a leading one; extrapolated along the last segment.
    """

    def __init__(self, points: Iterable[tuple[int, float]], chunk_tokens: int = 32) -> None:
        """`points` are (context tokens, seconds), at least one, positive and finite."""
        ordered = sorted(points)
        if not ordered:
            raise ConfigError("a cost profile needs at least one point, got none")
        for context, seconds in ordered:
            if context < 1 or not (math.isfinite(seconds) and seconds > 0.0):
                raise ConfigError(
                    f"a cost profile point must be (context >= 1, seconds > 0), got ({context}, {seconds})"
                )
        self.chunk_tokens = chunk_tokens
        self._contexts: list[int] = []
        self._seconds: list[float] = []
        highest = 0.0
        for context, seconds in ordered:
            highest = max(highest, seconds)
            if self._contexts and self._contexts[-1] == context:
                self._seconds[-1] = highest
            else:
                self._contexts.append(context)
                self._seconds.append(highest)
        self._by_chunk: list[float] = []

    @classmethod
    def from_shape(cls, shape: ModelShape, chunk_tokens: int = 32, max_context: int = 1 << 15) -> CostProfile:
        """A profile from arithmetic alone, if none was measured; in units of 1e12 FLOPs.

        Linear work of a token: 2 FLOPs a weight of the layers; attention: 4 * heads * head_dim FLOPs a
        visible token and layer.
        """
        attended = shape.num_heads * shape.head_dim
        projections = shape.hidden_size * (2 * attended + 2 * shape.num_kv_heads * shape.head_dim)
        linear = 2 * shape.num_layers * (projections + 3 * shape.hidden_size * shape.intermediate_size)
        points = []
        context = chunk_tokens
        while context <= max(max_context, chunk_tokens):
            points.append(
                (context, chunk_tokens * (linear + 4 * shape.num_layers * attended * context) / 1e12)
            )
            context *= 2
        return cls(points, chunk_tokens)

    def at(self, context: int) -> float:
        """Seconds to recompute one chunk that ends at `context` tokens."""
        contexts, seconds = self._contexts, self._seconds
        if len(contexts) == 1 or context <= contexts[0]:
            return seconds[0]
        right = min(bisect_left(contexts, context), len(contexts) - 1)
        slope = (seconds[right] - seconds[right - 1]) / (contexts[right] - contexts[right - 1])
        return seconds[right - 1] + slope * (context - contexts[right - 1])

    def of_chunk(self, index: int) -> float:
        """Seconds to recompute the chunk at `index` of its sequence."""
        while len(self._by_chunk) <= index:
            self._by_chunk.append(self.at((len(self._by_chunk) + 1) * self.chunk_tokens))
        return self._by_chunk[index]


@dataclass(frozen=True, slots=True)
class ResumeQuote:
    """Estimates the seconds it takes to have a conversation in the first tier again."""

    cost: CostProfile  # measured: its points are seconds
    chunk_bytes: int
    copy_bytes_per_s: float  # from the lower tier up

    def __post_init__(self) -> None:
        if not self.copy_bytes_per_s > 0.0:
            raise ConfigError(f"copy_bytes_per_s must be positive, got {self.copy_bytes_per_s}")

    def seconds(self, dropped: Iterable[int], num_lower: int) -> float:
        """To recompute the chunks at the positions `dropped`, then swap `num_lower` chunks in."""
        return sum(map(self.cost.of_chunk, dropped)) + num_lower * self.chunk_bytes / self.copy_bytes_per_s
