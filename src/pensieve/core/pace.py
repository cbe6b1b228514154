"""How long a step takes, and how long it may take.

Knows token counts and seconds as told; never requests, tensors or a clock.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import NamedTuple

from pensieve.core.cost import CostProfile
from pensieve.core.plan import Span

_MEMORY = 0.98  # weight of a step relative to the one after it: machines and their other users change
# After _TRUSTING steps one that took over _CLIP times its prediction, or under 1/_CLIP of it, counts as if it
# had taken exactly that: a busy neighbour must not become the rule.
_CLIP, _TRUSTING = 3.0, 16
_PRIOR = 0.01  # weight of the proportions that a profile gives
_NEAR, _FAR = 1024, 8192  # context lengths between which a profile tells what attention costs
# Before any step was measured: reading the weights takes as long as a prefill of so many tokens,
_FIXED_TOKENS = 32
# and a decode reads a cached token in the time in which a prefill computes so many (query, key) pairs.
_READ_PAIRS = 4
# A step without decodes may take LONE_STEPS times `step_s`, or LONE_FIXED times its fixed time if that is
# more: smaller steps would waste too much of the machine.
LONE_STEPS = 2.0
LONE_FIXED = 4.0
COMPUTING = (
    0.92  # share of `step_s` that is computed; the rest covers scheduling and what predictions fall short of
)
# Where decodes alone take most of `step_s`, or more, prefill still gets so many times their time.
LEAST_PREFILL = 1.0
# After so many steps with prefill in a row, one step only decodes. If all steps took exactly `step_s`, the
# cost of prefill could not be told from that of decodes, and a wrong guess of the two would confirm itself.
_PROBE_STEPS = 16


class Load(NamedTuple):
    """What a step computes, as far as its time depends on it."""

    rows: int = 0  # spans of one token: decodes
    reads: int = 0  # cached tokens that decodes attend
    tokens: int = 0  # of longer spans: prefill
    pairs: int = 0  # (query, key) pairs of prefill

    @classmethod
    def of(cls, spans: Iterable[Span]) -> Load:
        """The load of a step with these spans."""
        rows = reads = tokens = pairs = 0
        for _, start, stop, _, _ in spans:
            if (length := stop - start) == 1:
                rows += 1
                reads += stop
            else:
                tokens += length
                pairs += _pairs(start, stop)
        return cls(rows, reads, tokens, pairs)


class Pace:
    """Predicts the seconds of a step: fixed + a * rows + b * reads + c * tokens + d * pairs.

    Learns the five weights.

    Least squares of the relative error, no weight negative, older steps counting less. The sums over the
    steps are kept as a 5 x 5 matrix; each step is followed by one sweep of coordinate descent from the
    weights of the step before.
    """

    def __init__(self, cost: CostProfile, *, measured: bool = False) -> None:
        """`cost` gives the first proportions.

        `measured`: it is in seconds, so the pace is known before the first step.
        """
        chunk = cost.chunk_tokens
        pair = max(1e-12, (cost.at(_FAR) - cost.at(_NEAR)) / (_FAR - _NEAR) / chunk)
        token = max(cost.at(_NEAR) / chunk - _NEAR * pair, 0.1 * cost.at(_NEAR) / chunk)
        self._weights = [_FIXED_TOKENS * token, token, _READ_PAIRS * pair, token, pair]
        self.known = measured
        self._products: list[list[float]] = []  # (5, 5)
        self._sums: list[float] = []  # (5,)
        self._num_seen = 0
        self._begin()

    @property
    def fixed_s(self) -> float:
        """Seconds that every step takes, mostly to read the weights."""
        return self._weights[0]

    def seconds(self, load: Load) -> float:
        """Predicted seconds of a step with this load."""
        fixed, row, read, token, pair = self._weights
        return fixed + row * load.rows + read * load.reads + token * load.tokens + pair * load.pairs

    def prefill_s(self, ranges: Iterable[tuple[int, int]]) -> float:
        """Seconds that prefill of these token ranges adds to a step."""
        _, _, _, token, pair = self._weights
        return sum((stop - start) * token + _pairs(start, stop) * pair for start, stop in ranges)

    def tokens_within(self, seconds: float, start: int) -> int:
        """Tokens from position `start` on that are computed in so many seconds; a large number if unknown."""
        _, _, _, token, pair = self._weights
        linear = token + start * pair  # n * linear + n^2 / 2 * pair = seconds
        if seconds <= 0.0:
            return 0
        if math.isinf(seconds) or linear + pair <= 0.0:
            return 1 << 30
        return int(2.0 * seconds / (linear + math.sqrt(linear * linear + 2.0 * pair * seconds)))

    def observe(self, load: Load, seconds: float) -> None:
        """Learn from a step with this load."""
        if not seconds > 0.0:
            return
        predicted = self.seconds(load)
        if not self.known:
            self._weights = [weight * seconds / predicted for weight in self._weights]
            self.known = True
            self._begin()
        elif predicted > 0.0 and self._num_seen >= _TRUSTING:
            seconds = max(predicted / _CLIP, min(seconds, predicted * _CLIP))
        self._num_seen += 1
        scaled = [part / seconds for part in (1, *load)]
        for row, part in zip(self._products, scaled, strict=True):
            for index, other in enumerate(scaled):
                row[index] = _MEMORY * row[index] + part * other
        self._sums = [_MEMORY * total + part for total, part in zip(self._sums, scaled, strict=True)]
        weights = self._weights
        for index in (
            index for index, part in enumerate(scaled) if part
        ):  # of other weights the step says nothing
            row = self._products[index]
            rest = sum(map(operator.mul, row, weights)) - row[index] * weights[index]
            weights[index] = max(0.0, (self._sums[index] - rest) / row[index])

    def _begin(self) -> None:
        """Start the sums as if a little evidence had confirmed the weights."""
        count = len(self._weights)
        self._products = [
            [_PRIOR / weight**2 * (row == column) for column in range(count)]
            for row, weight in enumerate(self._weights)
        ]
        self._sums = [_PRIOR / weight for weight in self._weights]


class StepTime:
    """How many seconds of prefill the next step may hold.

    While a request decodes, each step earns the part of `step_s` that decodes leave, and prefill spends it.
    The least that can be computed is a chunk: one that takes longer is paid off by steps that only decode, so
    decoding requests still get a token every `step_s` on average. While none decodes, steps are long enough
    for throughput, but not so long that a new request waits for several `step_s`.
    """

    def __init__(self, step_s: float, pace: Pace) -> None:
        self.step_s = step_s
        self.pace = pace
        self._credit_s = 0.0  # prefill earned and not spent
        self._num_in_a_row = 0  # steps with decodes and prefill

    def for_prefill(self, decodes: Load) -> float:
        """Seconds of prefill that a step with these decodes may hold; infinity if the pace is unknown yet."""
        pace = self.pace
        if not pace.known:
            return math.inf
        if not decodes.rows:
            self._credit_s = 0.0
            return max(LONE_STEPS * self.step_s, LONE_FIXED * pace.fixed_s) - pace.fixed_s
        decodes_s = pace.seconds(decodes)
        earned_s = max(COMPUTING * self.step_s - decodes_s, LEAST_PREFILL * decodes_s)
        self._credit_s = min(self._credit_s, earned_s) + earned_s
        if self._credit_s <= 0.0 or self._num_in_a_row >= _PROBE_STEPS:
            self._num_in_a_row = 0
            return 0.0
        self._num_in_a_row += 1
        return self._credit_s

    def spend(self, seconds: float) -> None:
        """The step holds so many seconds of prefill."""
        if self.pace.known:
            self._credit_s -= seconds


def _pairs(start: int, stop: int) -> int:
    """(query, key) pairs of a causal range."""
    return (stop * (stop + 1) - start * (start + 1)) // 2
