"""Did two systems say the same? Knows token ids and log-probabilities of two runs; nothing of speed or of
systems.

The contract (docs/architecture.md, "same tokens"): reuse, swapping and recomputing change nothing but the
order in which floating-point sums are taken. So with the same context before them two systems choose the same
token, unless the two likeliest are so close that rounding decides (a *near tie*). After a near tie the
answers may differ, and nothing that follows in this turn can be compared; the next turn can, because a replay
puts the first run's answer into both histories.
"""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pensieve.bench.runs import Run
from pensieve.bench.systems import TurnResult
from pensieve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far two log-probabilities (natural log) of the same token may lie apart: `absolute + relative * the
    larger`.

    `mean` bounds the average over a run of many tokens: rounding now and then moves one token far, a bug
    moves many.
    """

    relative: float
    absolute: float  # nats
    mean: float = math.inf  # nats, over all compared tokens of two runs

    def allows(self, a: float, b: float) -> bool:
        """The two are equal under this tolerance (not, if either is not a finite number)."""
        return (
            math.isfinite(a)
            and math.isfinite(b)
            and abs(a - b) <= self.absolute + self.relative * max(abs(a), abs(b))
        )

    def __str__(self) -> str:
        return f"{self.absolute:g} nats + {self.relative:g} relative"


_TOLERANCES = {
    "float32": Tolerance(1e-4, 1e-3, 1e-4),
    "float16": Tolerance(0.0, 0.0625, 0.005),
    "bfloat16": Tolerance(0.0, 0.5, 0.04),
}
_ENOUGH_TOKENS = 200  # below it one token moved far is a large part of the mean, and the mean says nothing


def default_tolerance(dtype: str) -> Tolerance:
    """The tolerance that goes with the type a model computes in.

    float32 is the contract's 1e-4 relative, with 1e-3 nats as a floor for log-probabilities near 0. bfloat16
    keeps 8 bits: logits of 16 to 32 lie 0.125 apart, and 0.5 nats is four such steps. Measured with
    SmolLM2-135M on a CPU, 2,039 tokens, cached against recomputed: mean 0.008, one in a hundred above 0.1,
    one in a thousand above 0.18, the largest 0.24. The bound on the mean is five times what was measured.
    float16 keeps 3 bits more: an eighth of bfloat16.

    Raises:
        ConfigError: the type is none of these.
    """
    name = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}.get(
        dtype.removeprefix("torch."), dtype
    )
    name = name.removeprefix("torch.")
    if name not in _TOLERANCES:
        raise ConfigError(f"no tolerance is known for {dtype!r}: give one, or use {', '.join(_TOLERANCES)}")
    return _TOLERANCES[name]


class Verdict(enum.Enum):
    """What became of one turn in two runs."""

    IDENTICAL = "identical"  # the same tokens, log-probabilities within tolerance
    NEAR_TIE = "near tie"  # differ from a position on where rounding decides
    DIFFERENT = "DIFFERENT"  # differ for no reason the contract knows: a bug, or other weights
    CONTEXT = "other context"  # the two were not asked the same thing
    FAILED = "failed in one"  # one answered, the other did not, or they failed differently
    BOTH_FAILED = "failed in both"  # with the same code, a full context for instance
    UNTOLD = "not told"  # a system does not tell its tokens: nothing to compare


@dataclass(frozen=True, slots=True)
class TurnComparison:
    """One turn of two runs."""

    conversation_id: str
    turn_index: int
    verdict: Verdict
    reason: str = ""  # for people; empty if identical
    position: int | None = None  # first output token that differs, or whose log-probability does
    # at a divergence: nats between the two candidates, the smaller of what the two runs saw
    gap: float | None = None
    # largest |difference| of a log-probability both runs gave to the same token in the same context, nats
    max_delta: float = 0.0
    sum_delta: float = 0.0  # sum of these differences over the tokens that both answers begin with
    num_compared: int = 0  # how many tokens these are


@dataclass(frozen=True, slots=True)
class Equality:
    """All turns of two runs compared."""

    first: str
    second: str
    dtype: str
    tolerance: Tolerance
    turns: tuple[TurnComparison, ...]

    @property
    def counts(self) -> dict[Verdict, int]:
        """Turns by verdict; every verdict is there."""
        found = Counter(turn.verdict for turn in self.turns)
        return {verdict: found[verdict] for verdict in Verdict}

    @property
    def equal(self) -> bool | None:
        """The contract holds. None: not a single turn could be compared."""
        counts = self.counts
        if counts[Verdict.DIFFERENT] or counts[Verdict.CONTEXT] or counts[Verdict.FAILED] or self.drifts:
            return False
        return True if counts[Verdict.IDENTICAL] or counts[Verdict.NEAR_TIE] else None

    @property
    def max_delta(self) -> float:
        """Largest difference of a log-probability in any turn, nats."""
        return max((turn.max_delta for turn in self.turns), default=0.0)

    @property
    def num_compared(self) -> int:
        """Tokens whose log-probabilities were compared."""
        return sum(turn.num_compared for turn in self.turns)

    @property
    def mean_delta(self) -> float:
        """Mean difference of a log-probability over these tokens, nats; 0 if there are none."""
        return sum(turn.sum_delta for turn in self.turns) / max(1, self.num_compared)

    @property
    def drifts(self) -> bool:
        """There are tokens enough for a mean, and it is larger than rounding explains."""
        return self.num_compared >= _ENOUGH_TOKENS and not self.mean_delta <= self.tolerance.mean

    @property
    def example(self) -> TurnComparison | None:
        """A turn worth showing: the first that breaks the contract, else the widest near tie, else None."""
        for verdict in (Verdict.DIFFERENT, Verdict.CONTEXT, Verdict.FAILED):
            for turn in self.turns:
                if turn.verdict is verdict:
                    return turn
        ties = [turn for turn in self.turns if turn.verdict is Verdict.NEAR_TIE]
        return max(ties, key=lambda turn: turn.gap or 0.0, default=None)

    def verdict_line(self) -> str:
        """One line that says whether the outputs are equal under the contract, with the counts."""
        told = ", ".join(f"{n} {verdict.value}" for verdict, n in self.counts.items() if n) or "no turn"
        head = {True: "equal outputs", False: "DIFFERENT outputs", None: "outputs not comparable"}[self.equal]
        if self.equal is None:
            return f"{head}: {told}"
        differences = f"log-probabilities differ by {self.mean_delta:.2g} nats in the mean, {self.max_delta:.2g} at most"
        drift = (
            f"; the mean is more than rounding explains (above {self.tolerance.mean:g})"
            if self.drifts
            else ""
        )
        return f"{head} under the contract ({self.dtype}, tolerance {self.tolerance}): {told}; {differences}{drift}"


def compare_outputs(run_a: Run, run_b: Run, dtype: str, tolerance: Tolerance | None = None) -> Equality:
    """Compare two runs turn by turn, the second being a replay of the first.

    A turn is fine if both gave the same tokens with log-probabilities within tolerance, or if at the first
    token that differs the two candidates lie within tolerance of each other, in either run's view, and every
    log-probability that both runs gave in the same context (of the tokens before, and of the candidates)
    agrees within tolerance too.

    Args:
        run_a: the first run.
        run_b: the second.
        dtype: what the models compute in ("float32", "bfloat16", "float16").
        tolerance: None is `default_tolerance(dtype)`.

    Raises:
        ConfigError: the type has no tolerance and none is given.
    """
    allowed = tolerance if tolerance is not None else default_tolerance(dtype)
    b_records = run_b.by_key()
    turns = []
    for (conversation_id, turn_index), a_record in run_a.by_key().items():
        b_record = b_records.pop((conversation_id, turn_index), None)
        turn = TurnComparison(
            conversation_id,
            turn_index,
            Verdict.FAILED,
            f"{run_b.system} was not asked: its conversation had ended",
        )
        turns.append(_compare(turn, a_record.result, b_record.result, allowed) if b_record else turn)
    for conversation_id, turn_index in b_records:
        reason = f"{run_a.system} was not asked: its conversation had ended"
        turns.append(TurnComparison(conversation_id, turn_index, Verdict.FAILED, reason))
    return Equality(run_a.system, run_b.system, dtype, allowed, tuple(turns))


def _compare(turn: TurnComparison, a: TurnResult, b: TurnResult, allowed: Tolerance) -> TurnComparison:
    """`turn` with everything but its key found out."""
    if not (a.ok and b.ok):
        if a.error_code == b.error_code:
            return replace(turn, verdict=Verdict.BOTH_FAILED, reason=str(a.error_code))
        return replace(
            turn,
            verdict=Verdict.FAILED,
            reason=f"{a.error_code or 'answered'} against {b.error_code or 'answered'}",
        )
    if not a.prompt_path or not b.prompt_path:
        return replace(turn, verdict=Verdict.UNTOLD, reason="a system does not tell its tokens")
    if a.prompt_path != b.prompt_path:
        where = _first_difference(a.prompt_path, b.prompt_path)
        sizes = f"{len(a.prompt_path)} and {len(b.prompt_path)} tokens"
        return replace(
            turn, verdict=Verdict.CONTEXT, reason=f"the prompts ({sizes}) differ from token {where} on"
        )
    end = _first_difference(a.output, b.output)
    pairs = list(zip(a.logprobs[:end], b.logprobs[:end], strict=False))
    deltas = [abs(x - y) for x, y in pairs]
    turn = replace(turn, max_delta=max(deltas, default=0.0), sum_delta=sum(deltas), num_compared=len(deltas))
    for index, (x, y) in enumerate(pairs):
        if not allowed.allows(x, y):
            reason = f"log-probability of token {index} of the answer: {x:.6g} against {y:.6g}"
            return replace(turn, verdict=Verdict.DIFFERENT, position=index, reason=reason)
    if end is None:
        return replace(turn, verdict=Verdict.IDENTICAL, reason="")
    if end in (len(a.output), len(b.output)):
        ends = f"{len(a.output)} tokens ({a.finish_reason}) against {len(b.output)} ({b.finish_reason})"
        return replace(
            turn,
            verdict=Verdict.DIFFERENT,
            position=end,
            reason=f"one answer goes on where the other ends: {ends}",
        )
    return _at_divergence(replace(turn, position=end), a, b, end, allowed)


def _at_divergence(
    turn: TurnComparison, a: TurnResult, b: TurnResult, at: int, allowed: Tolerance
) -> TurnComparison:
    """The two chose different tokens at `at` with the same context: a near tie, or a bug."""
    chosen = a.output[at], b.output[at]
    pair = f"token {at} of the answer: {chosen[0]} against {chosen[1]}"
    views = [_view(a, at), _view(b, at)]
    told = [(view[chosen[0]], view[chosen[1]]) for view in views if chosen[0] in view and chosen[1] in view]
    if not told:
        return replace(
            turn, verdict=Verdict.DIFFERENT, reason=f"{pair}, and neither run has both among its likeliest"
        )
    gap = min(abs(x - y) for x, y in told)
    moved = [
        (token, views[0][token], views[1][token])
        for token in chosen
        if token in views[0] and token in views[1]
    ]
    turn = replace(turn, gap=gap, max_delta=max([turn.max_delta, *(abs(x - y) for _, x, y in moved)]))
    for token, x, y in moved:
        if not allowed.allows(x, y):
            reason = f"{pair}, and the log-probability of {token} moved: {x:.6g} against {y:.6g}"
            return replace(turn, verdict=Verdict.DIFFERENT, reason=reason)
    tied = any(allowed.allows(x, y) for x, y in told)
    return replace(
        turn, verdict=Verdict.NEAR_TIE if tied else Verdict.DIFFERENT, reason=f"{pair}, {gap:.2g} nats apart"
    )


def _view(result: TurnResult, at: int) -> dict[int, float]:
    """What a run said of the candidates at one position: token id to log-probability."""
    view = dict(result.tops[at]) if at < len(result.tops) else {}
    if at < len(result.logprobs):
        view[result.output[at]] = result.logprobs[at]
    return view


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first difference (the shorter's length if it is a prefix); None if equal."""
    if a == b:
        return None
    return next(
        (index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
