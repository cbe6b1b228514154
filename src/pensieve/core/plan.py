"""The seam between deciding and doing: what one step computes and copies, and its result.

Every value is frozen and picklable. Values that are created hundreds of times a step are named tuples, which
are three times cheaper to create. A plan names slots and token ids; it never holds bytes, text or tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from pensieve.core.request import SamplingParams


class Span(NamedTuple):
    """A half-open token range of one request's sequence to be computed in this step.

    The worker first writes K and V of `[start, stop)` to the request's slots, then lets each of these tokens
    attend `[0, its own position]`. A decode is a span of length 1, a prefill a longer one; recomputing a
    dropped prefix is one more span, with `emits_token=False`. Spans of one request come in ascending order.
    """

    request_id: str
    start: int
    stop: int
    token_ids: tuple[int, ...] | None  # stop - start ids; None for the token sampled last for this request
    emits_token: bool  # sample from the logits of the last position


class Copy(NamedTuple):
    """One chunk copied from a slot of one tier to a slot of another."""

    copy_id: int  # unique for the scheduler's life
    src_tier: int  # index into the ordered tiers
    src_slot: int
    dst_tier: int
    dst_slot: int


@dataclass(frozen=True, slots=True)
class RequestStart:
    """What the worker must know about a request before its first span."""

    request_id: str
    sampling: SamplingParams
    prompt: tuple[int, ...]  # the whole prompt path, for penalties


class BlockTableUpdate(NamedTuple):
    """The first-tier slots of a request's chunks from index `first` on; they replace earlier entries."""

    request_id: str
    first: int
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: copies, then spans. Made by `Scheduler.schedule` or `SteadySteps.plan`."""

    step_id: int  # 0, 1, 2, ...: plans run in this order
    spans: tuple[Span, ...]
    swap_in: tuple[Copy, ...]  # into the first tier; spans of this plan may attend them, so they go first
    swap_out: tuple[Copy, ...]  # to a lower tier; may still run when the step has ended
    started: tuple[RequestStart, ...]
    tables: tuple[BlockTableUpdate, ...]
    ended: tuple[str, ...]  # requests that the worker may forget: their last span lies in an earlier plan
    reclaimed: tuple[tuple[int, int], ...]  # (tier, slot) taken from a cached chunk and given to another
    wiped: tuple[tuple[int, int], ...] = ()  # (tier, slot) to be zeroed before this plan's copies and spans
    settles: bool = (
        False  # it only copies, and its step ends when the swap-outs have settled: requests wait for room
    )

    @property
    def num_tokens(self) -> int:
        """Sum of the span lengths."""
        return sum(span.stop - span.start for span in self.spans)

    @property
    def is_empty(self) -> bool:
        """Nothing to compute, copy, wipe or forget."""
        return not (self.spans or self.swap_in or self.swap_out or self.ended or self.wiped)


@dataclass(frozen=True, slots=True)
class SteadySteps:
    """Consecutive steps that only decode. Made by `Scheduler.steady_steps`."""

    step_id: int  # of the first
    spans: tuple[Span, ...]  # of the first
    count: int  # of steps, at least 1

    def plan(self, index: int) -> StepPlan:
        """The plan of the step at `index`, whose tokens are those sampled in the step before it."""
        spans = self.spans
        if index:
            spans = tuple(
                [Span(name, start + index, stop + index, None, True) for name, start, stop, _, _ in spans]
            )
        return StepPlan(self.step_id + index, spans, (), (), (), (), (), ())


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One token sampled for a span that emits. To a front end it is the event `messages.Token`."""

    request_id: str
    token_id: int
    logprob: float | None = None  # natural log, of the model's distribution before temperature and filters
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), likeliest first

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as a call, in a third of a dataclass's time: every token goes through a pipe."""
        return SampledToken, (self.request_id, self.token_id, self.logprob, self.top)


@dataclass(frozen=True, slots=True)
class CopyFailure:
    """A copy that failed."""

    copy_id: int
    source_lost: bool  # whether the source cannot be read any more
    message: str


@dataclass(frozen=True, slots=True)
class RequestFailure:
    """A request that failed alone (in sampling, say); the rest of the step is valid."""

    request_id: str
    message: str


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of one plan. Copies that it reports may belong to any earlier plan."""

    step_id: int
    tokens: tuple[SampledToken, ...] = ()
    copies_done: tuple[int, ...] = ()
    copies_failed: tuple[CopyFailure, ...] = ()
    requests_failed: tuple[RequestFailure, ...] = ()
    forward_error: str | None = None  # the forward raised: nothing this plan computed is valid
    wipe_error: str | None = None  # a wipe raised: no wipe counts, no copy was begun, nothing was computed
    seconds: float | None = (
        None  # of computing the spans; None if not measured, or copies or a first run distort it
    )


class Worker(Protocol):
    """Runs plans. Three bodies: the real one, the simulator's, the tests' fake."""

    def run(self, plan: StepPlan) -> StepResult:
        """Wipe slots, start copies, run spans, sample. Returns when wipes and spans are done.

        Every swap-in of the plan has settled when this returns (its copy is in `copies_done` or
        `copies_failed`), and every swap-out of a plan that `settles`. Other swap-outs are reported by a later
        call that finds them settled. Failures of copies, spans and wipes are in the result; they raise
        nothing.
        """
        ...

    def set_waker(self, wake: Callable[[], None]) -> None:
        """Call `wake`, from any thread, whenever a swap-out settles while no `run` is under way."""
        ...

    def close(self) -> None:
        """Stop threads and free memory."""
        ...


class PipelinedWorker(Worker, Protocol):
    """A worker that can queue a step while its device still computes the one before."""

    def begin(self, plan: StepPlan) -> None:
        """The first half of `run`: queue everything. It may need a token of a plan not finished yet."""
        ...

    def finish(self) -> StepResult:
        """The second half, for the oldest plan begun and not finished. Returns when it is done."""
        ...
