"""How long a step takes. Knows spans, a model's numbers and a machine's; never slots, requests or when.

Two bodies: a roofline from arithmetic, and the measured points of a real machine (`pensieve profile`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pensieve.config import ModelShape
from pensieve.core.cost import CostProfile
from pensieve.core.plan import Span
from pensieve.errors import ConfigError
from pensieve.simulator.hardware import Hardware
from pensieve.worker.measurements import attention_costs, attention_s


class CostModel(Protocol):
    """What computing costs on a device."""

    num_layers: int  # a swapped-in layer can be computed on while the next is copied

    def step_s(self, spans: Iterable[Span]) -> float:
        """Seconds of the device to compute these spans in one forward."""
        ...


@dataclass(frozen=True, slots=True)
class Overheads:
    """What a step costs beside the device's work: planning, sampling, launching, writing answers."""

    step_s: float = 0.0  # a step
    request_s: float = 0.0  # a step and request in it
    # And from a result to the next plan: the idle time of a finished conversation when the next step is planned,
    # which tells it from running ones.
    commit_step_s: float = 0.0
    commit_request_s: float = 0.0
    commit_end_s: float = 0.0  # an answer that ends


# Fitted on vLLM's curve of the paper's Fig. 10a alone, by benchmarks/fit_overheads.py (benchmarks/results has
# the candidates), and held for every other figure and system: a Python server of 2023 and 2024 on an A100.
# Fitted were 9 ms a step and 0.2 ms a request in it. Of the 9 ms we assume that 1 ms falls between a result
# and the next plan. Only eviction depends on it: without the gap a finished conversation would look active.
FITTED = Overheads(8e-3, 200e-6, commit_step_s=1e-3)


@dataclass(frozen=True, slots=True)
class ModelNumbers:
    """A model as far as costs depend on it."""

    shape: ModelShape
    # weights that a token is multiplied with: all, less an input embedding that is not the output's too
    matrix_parameters: int
    bytes_per_value: int = 2  # of weights and KV

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token over all layers."""
        return self.shape.kv_bytes_per_token(self.bytes_per_value)

    def chunk_bytes(self, chunk_tokens: int) -> int:
        """One chunk over all layers."""
        return chunk_tokens * self.kv_bytes_per_token


class Roofline:
    """A step as the larger of what it must multiply and what it must read, part by part, over `num_devices`
    that share every layer.

    Products: 2 FLOPs a weight and token, or the weights' bytes. Attention, span by span: 4 * heads * head_dim
    FLOPs a visible token, query and layer, at the rate tiles of so many rows reach, or the context's K and V.
    Two all-reduces a layer between devices. Never less than launching it all.
    """

    def __init__(self, model: ModelNumbers, hardware: Hardware, num_devices: int = 1) -> None:
        if num_devices < 1:
            raise ConfigError(f"the number of devices must be at least 1, got {num_devices}")
        if num_devices > 1 and not hardware.peer_bytes_per_s:
            raise ConfigError(
                f"{hardware.name} has no links between devices: it computes alone, got {num_devices} devices"
            )
        shape = model.shape
        self.num_layers = shape.num_layers
        weights = model.matrix_parameters
        self._linear_token_s = (
            2.0 * weights / (hardware.matrix_flops_per_s * hardware.matrix_efficiency) / num_devices
        )
        bytes_per_s = hardware.memory_bytes_per_s * hardware.memory_efficiency * num_devices
        self._weights_s = weights * model.bytes_per_value / bytes_per_s
        self._kv_token_s = model.kv_bytes_per_token / bytes_per_s
        self._pair_flops = 4.0 * shape.num_layers * shape.num_heads * shape.head_dim
        self._attention_flops_per_s = hardware.attention_flops_per_s * num_devices
        self._half_rows = hardware.attention_rows
        self._group = shape.num_heads // shape.num_kv_heads
        self._launch_s = hardware.launch_s * shape.num_layers
        self._reduce_s = self._reduce_token_s = 0.0
        if num_devices > 1:
            reduces = 2 * shape.num_layers
            self._reduce_s = reduces * hardware.peer_latency_s
            ring = 2.0 * (num_devices - 1) / num_devices
            self._reduce_token_s = (
                reduces * ring * shape.hidden_size * model.bytes_per_value / hardware.peer_bytes_per_s
            )
        self._decode_pair_s = self._pair_flops / self._attention_rate(1)
        self._decode_token_s = max(self._kv_token_s, self._decode_pair_s)

    def _attention_rate(self, queries: int) -> float:
        rows = max(32.0, queries * self._group)  # a tile of fewer rows is not computed any slower
        return self._attention_flops_per_s * rows / (rows + self._half_rows)

    def attention_s(self, queries: int, context: int) -> float:
        """Seconds of all layers' attention for one span of `queries` tokens whose last sees `context`."""
        if queries == 1:
            return context * self._decode_token_s
        pairs = queries * (context - (queries - 1) / 2)
        return max(context * self._kv_token_s, pairs * self._pair_flops / self._attention_rate(queries))

    def linear_s(self, num_tokens: int) -> float:
        """Seconds of everything but attention for so many tokens."""
        return (
            max(num_tokens * self._linear_token_s, self._weights_s)
            + self._reduce_s
            + num_tokens * self._reduce_token_s
        )

    def step_s(self, spans: Iterable[Span]) -> float:
        """See `CostModel`."""
        num_tokens = seen = 0
        attention_s = 0.0
        for span in spans:
            queries = span.stop - span.start
            num_tokens += queries
            if queries == 1:
                seen += span.stop
            else:
                attention_s += self.attention_s(queries, span.stop)
        if not num_tokens:
            return 0.0
        return max(self._launch_s, self.linear_s(num_tokens) + attention_s + seen * self._decode_token_s)


class Measured:
    """A step from a machine's own measurements: by its tokens, by the answers it gives a token to, and span
    by span for attention.

    The output layer is computed for answers only, so a decode of many requests and a prompt of as many tokens
    are different steps.
    """

    def __init__(
        self,
        num_layers: int,
        steps: Sequence[tuple[int, float]],
        answers: Sequence[tuple[int, float]],
        decode_token_s: float,
        chunk_token_s: float,
        chunk: int = 32,
    ) -> None:
        """Tables of one machine and model.

        Args:
            num_layers: of the model.
            steps: (tokens of a step, seconds beside attention without a sampled token), ascending; extrapolated
                along the last segment.
            answers: (answers that get a token in a step, seconds more), ascending; extrapolated likewise, and
                to 0 at none.
            decode_token_s: attention of one query, seconds a token it sees.
            chunk_token_s: attention of a chunk's queries together, seconds a token before it.
            chunk: how many queries that was.
        """
        for what, points, least in (("steps", steps, 2), ("answers", answers, 1)):
            if len(points) < least or [count for count, _ in points] != sorted(
                {count for count, _ in points}
            ):
                raise ConfigError(
                    f"a measured cost needs at least {least} ascending (count, seconds) for {what}, got "
                    f"{list(points)}"
                )
        self.num_layers = num_layers
        self._steps = tuple(steps)
        self._answers = ((0, 0.0), *answers)
        self._read_s, self._pair_s = attention_costs(decode_token_s, chunk_token_s, chunk)

    def linear_s(self, num_tokens: int, num_answers: int = 0) -> float:
        """Seconds of everything but attention."""
        seconds = _along(self._steps, num_tokens)
        return seconds + _along(self._answers, num_answers) if num_answers else seconds

    def attention_s(self, queries: int, context: int) -> float:
        """Seconds of all layers' attention for one span of `queries` tokens whose last sees `context`."""
        return attention_s(self._read_s, self._pair_s, queries, context)

    def step_s(self, spans: Iterable[Span]) -> float:
        """See `CostModel`."""
        num_tokens = num_answers = 0
        seconds = 0.0
        for span in spans:
            num_tokens += span.stop - span.start
            num_answers += span.emits_token
            seconds += self.attention_s(span.stop - span.start, span.stop)
        return self.linear_s(num_tokens, num_answers) + seconds if num_tokens else 0.0


def _along(points: Sequence[tuple[int, float]], at: int) -> float:
    """On the line through the points on both sides, or through the last two; at least 0."""
    right = min(max(1, bisect_left(points, (at,))), len(points) - 1)
    (before, less), (after, more) = points[right - 1], points[right]
    return max(0.0, less + (more - less) / (after - before) * (at - before))


def chunk_costs(model: CostModel, chunk_tokens: int, max_context: int) -> CostProfile:
    """Cost(l) as `pensieve profile` would measure it on this device: a forward of one chunk at contexts of a
    power of two (paper §4.3.1).
    """
    points = []
    context = chunk_tokens
    while True:
        points.append(
            (context, model.step_s([Span("", context - chunk_tokens, context, None, emits_token=False)]))
        )
        if context >= max_context:
            return CostProfile(points, chunk_tokens)
        context *= 2
