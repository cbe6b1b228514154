"""The seam between deciding and doing: what one step computes and copies, and what came of it.

Everything here is frozen and picklable; what a step has hundreds of is a named tuple, which is made in a third of the time. A plan names slots
and token ids; it never holds bytes, text or tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from pensieve.core.request import SamplingParams


class Span(NamedTuple):
    """A half-open token range of one request's sequence to be computed in this step.

    The worker first writes K and V of `[start, stop)` to the request's slots, then lets each of these
    tokens attend `[0, its own position]`. A decode is a span of length 1, a prompt a longer one, a dropped
    prefix one more with `emits_token=False`. Spans of one request come in ascending order.
    """

    request_id: str
    start: int
    stop: int
    token_ids: tuple[int, ...] | None  # stop - start ids; None: the token sampled last for this request
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
    """What the worker must know of a request before its first span."""

    request_id: str
    sampling: SamplingParams
    prompt: tuple[int, ...]  # the whole prompt path, for penalties


class BlockTableUpdate(NamedTuple):
    """The first-tier slots of a request's chunks, from chunk index `first` on; what lay beyond is void."""

    request_id: str
    first: int
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: what moves, then what is computed. Made by `Scheduler.schedule` (or `SteadySteps.plan`), never changed after."""

    step_id: int  # 0, 1, 2, ...: plans run in this order
    spans: tuple[Span, ...]
    swap_in: tuple[Copy, ...]  # into the first tier; spans of this plan may attend them, so they go first
    swap_out: tuple[
        Copy, ...
    ]  # away from the first tier, or further down; may still run when the step has ended
    started: tuple[RequestStart, ...]
    tables: tuple[BlockTableUpdate, ...]
    ended: tuple[
        str, ...
    ]  # requests whose worker-side state may go (their last span lies in an earlier plan)
    reclaimed: tuple[
        tuple[int, int], ...
    ]  # (tier, slot) taken from a cached chunk and given to another in this plan
    wiped: tuple[tuple[int, int], ...] = ()  # (tier, slot) to be zeroed before this plan's copies and spans
    settles: bool = False  # it only copies, and its step should end when the swap-outs have settled: somebody waits for the room they make

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
    """Steps that only decode, one token further each than the one before. Made by `Scheduler.steady_steps`."""

    step_id: int  # of the first
    spans: tuple[Span, ...]  # of the first
    count: int  # of steps, at least 1

    def plan(self, index: int) -> StepPlan:
        """That of the step at `index`, whose tokens are those sampled in the step before it."""
        spans = self.spans
        if index:
            spans = tuple(
                [Span(name, start + index, stop + index, None, True) for name, start, stop, _, _ in spans]
            )
        return StepPlan(self.step_id + index, spans, (), (), (), (), (), ())


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One token sampled for a span that emits; on its way to a front end it is the event that says so (`messages.Token`)."""

    request_id: str
    token_id: int
    logprob: float | None = None  # natural log, of the model's distribution before temperature and filters
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), likeliest first

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as a call: every token of every answer goes through a pipe, and the dataclass's own way takes three times as long."""
        return SampledToken, (self.request_id, self.token_id, self.logprob, self.top)


@dataclass(frozen=True, slots=True)
class CopyFailure:
    """A copy that raised."""

    copy_id: int
    source_lost: bool  # the source cannot be read either; False: it is still good
    message: str


@dataclass(frozen=True, slots=True)
class RequestFailure:
    """A request that failed alone (in sampling, say); the rest of the step is good."""

    request_id: str
    message: str


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of one plan. Copies reported may belong to any earlier plan."""

    step_id: int
    tokens: tuple[SampledToken, ...] = ()
    copies_done: tuple[int, ...] = ()
    copies_failed: tuple[CopyFailure, ...] = ()
    requests_failed: tuple[RequestFailure, ...] = ()
    forward_error: str | None = None  # the forward raised: nothing this plan computed is valid
    wipe_error: str | None = (
        None  # a wipe raised: none of them counts, no copy was begun and nothing was computed
    )
    seconds: float | None = (
        None  # that computing the spans took; None if it says nothing of the spans (copies, a first run) or was not measured
    )


class Worker(Protocol):
    """Does what a plan says. Three bodies: the real one, the simulator's, the tests' fake."""

    def run(self, plan: StepPlan) -> StepResult:
        """Wipe what the plan says, start its copies, run its spans, sample. Returns when wipes and spans are done.

        Every swap-in of the plan has settled when this returns (its copy is in `copies_done` or
        `copies_failed`), and every swap-out of a plan that `settles`; others are reported by whichever later
        call finds them finished. Does not raise for anything a plan can meet: failures are in the result.
        """
        ...

    def set_waker(self, wake: Callable[[], None]) -> None:
        """`wake` is called, from any thread, whenever a swap-out settles while no `run` is under way."""
        ...

    def close(self) -> None:
        """Stop threads and give the memory back."""
        ...


class PipelinedWorker(Worker, Protocol):
    """A worker whose steps can be begun before the one before is over: while a device computes one, the next is planned and queued."""

    def begin(self, plan: StepPlan) -> None:
        """The first half of `run`: queue everything. Tokens of plans begun and not finished are used where a plan says "the one sampled last"."""
        ...

    def finish(self) -> StepResult:
        """The second half, of the oldest plan begun and not finished: return when it is done."""
        ...
