"""One model computed by several processes.

Knows plans, results and the ranks' messages; never how weights are split.

Every rank runs every plan, on its own share of the heads and over its own tiers. Rank 0 is the `Worker` that
an engine drives; the others `follow`. Plans name slots and token ids, which are the same on all ranks: only
rank 0's scheduler decides. Outcomes can differ (a copy fails, memory runs out), so the ranks tell each other
before a forward whether all can take part in it, and after it whether everything that it attended was there.
A rank that breaks in the middle of a forward leaves the others in a collective of it: then all end.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch

from pensieve.config import TierConfig
from pensieve.core.plan import CopyFailure, RequestStart, StepPlan, StepResult
from pensieve.errors import WorkerLost
from pensieve.worker.batch import Batch
from pensieve.worker.group import Group, Leave
from pensieve.worker.ledger import CopyLedger
from pensieve.worker.model import CausalModel
from pensieve.worker.sampler import Choice, Sampled, nothing
from pensieve.worker.transfer import SwapIn
from pensieve.worker.worker import Begun, Hooks, ModelWorker, require_tiers_fit

log = logging.getLogger(__name__)

_PATIENCE = timedelta(seconds=30)  # the time in which all ranks must have noticed one that broke in a forward


# -- what rank 0 tells


@dataclass(frozen=True, slots=True)
class _OpenTiers:
    """Allocate tiers."""

    tiers: tuple[TierConfig, ...]
    chunk_tokens: int
    attention: str
    verify: bool
    debug: bool


@dataclass(frozen=True, slots=True)
class _RunPlan:
    """Run a plan."""

    plan: StepPlan
    sampled: tuple[Sampled, ...]  # by rank 0, since the step before
    reports: bool  # whether all ranks report their copies afterwards


@dataclass(frozen=True, slots=True)
class _CloseTiers:
    """Give the tiers back."""


# -- what all ranks say


@dataclass(frozen=True, slots=True)
class _Status:
    """How a rank has fared so far."""

    error: str | None = None
    lost: tuple[CopyFailure, ...] = ()  # swap-ins of this plan that failed
    print: bytes | None = None  # in debug, a hash of what must be the same on all ranks; else None


@dataclass(frozen=True, slots=True)
class _Report:
    """What settled since the last report."""

    done: tuple[int, ...]
    failed: tuple[CopyFailure, ...]
    print: bytes | None = None


class RankFailed(Exception):
    """A rank failed before the forward began or after it ended: no rank's result counts, and all continue."""


class RankWorker(ModelWorker):
    """A rank's own worker.

    It reports its status at each point where the ranks must agree, and goes on only if all can.
    """

    def __init__(
        self, group: Group, model: CausalModel, tiers: tuple[TierConfig, ...], chunk_tokens: int, *,
        attention: str, hooks: Hooks, verify: bool, debug: bool,
    ) -> None:  # fmt: skip
        super().__init__(
            model, tiers, chunk_tokens, attention=attention, hooks=hooks, verify=verify, on_device=False
        )
        self._group = group
        self._debug = debug
        self._words_due = 0  # statuses of this step that the other ranks still wait for
        self._lost: WorkerLost | None = None
        self._step_id = 0

    def run(self, plan: StepPlan) -> StepResult:
        """Run this rank's part of a plan; see `core.plan.Worker.run`.

        Raises:
            WorkerLost: the ranks are out of step, for good.
        """
        self._step_id = plan.step_id
        self._words_due = bool(plan.wiped) + 2 * bool(plan.spans)
        try:
            result = super().run(plan)
        except (
            Exception
        ) as error:  # our own bug, before the first status: the others must hear of it where they wait
            log.exception("rank %d raised in step %d", self._group.rank, plan.step_id)
            message = f"{type(error).__name__}: {error}"
            with contextlib.suppress(RankFailed, WorkerLost):
                while self._words_due:
                    self._say(_Status(message))
            lost = tuple(
                CopyFailure(copy.copy_id, False, message) for copy in (*plan.swap_in, *plan.swap_out)
            )
            result = StepResult(
                plan.step_id,
                copies_failed=lost,
                forward_error=message,
                wipe_error=message if plan.wiped else None,
            )
        if self._lost is not None:
            raise self._lost
        return result

    def accept(self, sampled: tuple[Sampled, ...]) -> None:
        """Take over the tokens that rank 0 sampled."""
        self._sampler.accept(sampled)

    def report(self, result: StepResult) -> list[_Report]:
        """Report this rank's copies, and in debug its samples; returns the reports of all ranks.

        Raises:
            WorkerLost: the ranks are out of step, or, in debug, sampled differently.
        """
        own = _Report(result.copies_done, result.copies_failed, _hash(result.tokens) if self._debug else None)
        reports: list[_Report] = self._exchange(own)
        self._compare("sampled other tokens", [report.print for report in reports])
        return reports

    # -- the parts of a step at which ranks may part

    def _wipe(self, wiped: tuple[tuple[int, int], ...]) -> None:
        if wiped:
            with self._together():
                super()._wipe(wiped)

    def _prepare(self, plan: StepPlan) -> Batch:
        """Build the batch on all ranks, or on none: a forward without a rank would wait for ever."""
        prints: list[bytes] = []
        with self._together(prints):
            batch = super()._prepare(plan)
            if self._debug:
                prints.append(_print_of(plan, batch))
        return batch

    def _forward(self, plan: StepPlan, swap_in: SwapIn) -> tuple[Batch, torch.Tensor]:
        try:
            computed = super()._forward(plan, swap_in)
            if self._model.device.type == "cuda":
                torch.cuda.current_stream(
                    self._model.device
                ).synchronize()  # only now is it known to have succeeded
        except (RankFailed, WorkerLost):
            raise  # all ranks know already
        except Exception as error:
            self._say(_Status(f"{type(error).__name__}: {error}"), _PATIENCE)
            raise
        swap_in.wait()
        words = self._say(_Status(lost=tuple(swap_in.failures)))
        known = {failure.copy_id for failure in swap_in.failures}
        for word in words:
            swap_in.failures += [failure for failure in word.lost if failure.copy_id not in known]
            known |= {failure.copy_id for failure in word.lost}
        return computed

    def _choose(self, begun: Begun, batch: Batch, logits: torch.Tensor) -> Choice:
        if self._group.rank == 0 or self._debug:
            return super()._choose(begun, batch, logits)
        return nothing()

    @contextlib.contextmanager
    def _together(self, prints: list[bytes] | None = None) -> Iterator[None]:
        """Run a block on all ranks; raises `RankFailed` on all if it fails on one."""
        error: Exception | None = None
        try:
            yield
        except Exception as own:
            error = own
        print_ = prints[0] if prints else None
        self._say(_Status(None if error is None else f"{type(error).__name__}: {error}", print=print_))

    def _say(self, word: _Status, patience: timedelta | None = None) -> list[_Status]:
        self._words_due -= 1
        words: list[_Status] = self._exchange(word, patience)
        errors = [f"rank {rank}: {each.error}" for rank, each in enumerate(words) if each.error is not None]
        if errors:
            self._words_due = 0
            raise RankFailed("; ".join(errors))
        self._compare("would compute something else", [each.print for each in words])
        return words

    def _exchange(self, message: object, patience: timedelta | None = None) -> list[Any]:
        try:
            return self._group.exchange(message, patience)
        except WorkerLost as error:
            self._give_up(error)
            raise

    def _compare(self, what: str, prints: list[bytes | None]) -> None:
        if others := [f"rank {rank}" for rank, each in enumerate(prints) if each != prints[0]]:
            raise self._give_up(
                WorkerLost(
                    f"in step {self._step_id} {', '.join(others)} {what} than rank 0: the processes must be "
                    "started again"
                )
            )

    def _give_up(self, error: WorkerLost) -> WorkerLost:
        """Remember an error and leave the group.

        A step turns exceptions into results, so the error is kept; ranks that wait for this one learn that it
        is gone.
        """
        self._lost = error
        self._words_due = 0
        self._group.leave()
        return error


class ParallelWorker:
    """The worker that an engine sees, on rank 0; see `core.plan.Worker`.

    Once the ranks are out of step, every method raises `WorkerLost`.
    """

    def __init__(
        self, group: Group, model: CausalModel, tiers: tuple[TierConfig, ...], chunk_tokens: int = 32, *,
        attention: str = "auto", hooks: Hooks = Hooks(), verify: bool = False, debug: bool = False,
    ) -> None:  # fmt: skip
        """Allocate all tiers, on every rank.

        Args:
            group: this is its rank 0; the others are in `follow`.
            model: this rank's share of it.
            tiers: of each rank, see `ModelWorker`.
            chunk_tokens: tokens of one slot.
            attention: a backend's name, or "auto".
            hooks: for tests of failures on this rank.
            verify: compare checksums of what comes back from lower tiers, see `Transfer`.
            debug: compare in each step what the ranks compute and sample.

        Raises:
            PensieveError: a rank cannot; the message says which.
        """
        order = _OpenTiers(tiers, chunk_tokens, attention, verify, debug)
        group.tell(order)
        self._group = group
        self._debug = debug
        self._local = _open(group, model, order, hooks)
        self._ledger = CopyLedger(group.size)
        self._sampled: tuple[Sampled, ...] = ()  # not sent to the other ranks yet
        self._closed = False

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one slot of one rank."""
        return self._local.chunk_bytes

    @property
    def attention(self) -> str:
        """Name of the attention backend in use."""
        return self._local.attention

    def run(self, plan: StepPlan) -> StepResult:
        """Run a plan on all ranks; see `core.plan.Worker.run`.

        A copy is done when it is done on all ranks, and failed when it is failed on one.

        Raises:
            WorkerLost: the ranks are out of step, for good.
        """
        plan = replace(plan, started=tuple(map(_with_seed, plan.started))) if plan.started else plan
        self._ledger.begin(plan)
        idle = plan.is_empty and not plan.started and not plan.tables
        told = not idle and self._tell(plan)
        result = self._local.run(plan)
        self._ledger.settle(0, result.copies_done, result.copies_failed)
        if idle and self._ledger.others_owe:  # the others had time enough, and rank 0 has nothing else to do
            told = self._tell(replace(plan, settles=True))
        if told:
            for rank, report in enumerate(self._local.report(result)):
                if rank > 0:
                    self._ledger.settle(rank, report.done, report.failed)
        if plan.spans:
            stops = {span.request_id: span.stop for span in plan.spans if span.emits_token}
            self._sampled += tuple(
                (token.request_id, stops[token.request_id], token.token_id) for token in result.tokens
            )
        done, failed = self._ledger.take()
        return replace(result, copies_done=done, copies_failed=failed)

    def set_waker(self, wake: Callable[[], None]) -> None:
        """See `core.plan.Worker.set_waker`. The next `run` waits for the other ranks' copies."""
        self._local.set_waker(wake)

    def close(self) -> None:
        """Give the memory back on every rank. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._local.close()
        with contextlib.suppress(WorkerLost):
            self._group.tell(_CloseTiers())
            self._group.exchange(None)  # the next allocation finds the memory free

    def _tell(self, plan: StepPlan) -> bool:
        """Send a plan to the other ranks; returns whether they report."""
        reports = self._debug or self._ledger.num_open > 0
        self._group.tell(_RunPlan(plan, self._sampled, reports))
        self._sampled = ()
        return reports


def follow(group: Group, model: CausalModel, *, hooks: Hooks = Hooks()) -> None:
    """Run rank 0's orders on a rank above 0 until rank 0 says that none will follow.

    Args:
        group: this is not its rank 0.
        model: this rank's share of it.
        hooks: for tests of failures on this rank.

    Raises:
        WorkerLost: rank 0 is gone without a message, or the ranks are out of step.
    """
    worker: RankWorker | None = None
    try:
        while True:
            match group.hear():
                case _OpenTiers() as order:
                    try:
                        worker = _open(group, model, order, hooks)
                    except WorkerLost:
                        raise
                    except Exception as error:  # rank 0 knows, and reports it
                        log.debug("no worker on rank %d: %s", group.rank, error)
                case _RunPlan() as step:
                    assert worker is not None, "a plan before the tiers were opened"
                    worker.accept(step.sampled)
                    result = worker.run(step.plan)
                    if step.reports:
                        worker.report(result)
                case _CloseTiers():
                    assert worker is not None
                    worker.close()
                    worker = None
                    group.exchange(None)
                case Leave():
                    break
    finally:
        if worker is not None:
            worker.close()
        group.leave()


def _open(group: Group, model: CausalModel, order: _OpenTiers, hooks: Hooks) -> RankWorker:
    """Make this rank's worker; returns when all ranks have theirs."""
    geometry = model.geometry
    chunk_bytes = (
        order.chunk_tokens
        * 2
        * geometry.num_layers
        * geometry.num_kv_heads
        * geometry.head_dim
        * geometry.dtype.itemsize
    )
    with group.agreeing():  # before any rank allocates: the ranks of a machine share its memory
        require_tiers_fit(
            order.tiers, chunk_bytes, model.device, sharers=group.local_size, beside=model.library_bytes
        )
    worker: RankWorker | None = None
    try:
        with group.agreeing():
            worker = RankWorker(
                group, model, order.tiers, order.chunk_tokens, attention=order.attention, hooks=hooks,
                verify=order.verify, debug=order.debug
            )  # fmt: skip
    except BaseException:
        if worker is not None:
            worker.close()
        raise
    assert worker is not None
    return worker


def _with_seed(start: RequestStart) -> RequestStart:
    """Draw the seed that a request leaves open: all ranks must have the same."""
    if start.sampling.temperature == 0.0 or start.sampling.seed is not None:
        return start
    return replace(start, sampling=replace(start.sampling, seed=secrets.randbits(63)))


def _print_of(plan: StepPlan, batch: Batch) -> bytes:
    """A hash of a plan and this rank's batch. Sets are sorted: a pipe may have changed their order."""
    started = [
        (
            start.request_id,
            start.prompt,
            replace(start.sampling, stop_token_ids=frozenset()),
            sorted(start.sampling.stop_token_ids),
        )
        for start in plan.started
    ]
    tensors = (batch.input_ids, batch.slot_mapping, batch.block_tables, batch.logit_rows)
    return _hash(replace(plan, started=()), started, [tensor.tolist() for tensor in tensors])


def _hash(*values: object) -> bytes:
    return hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
