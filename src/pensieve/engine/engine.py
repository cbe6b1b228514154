"""The engine: an inbox, a clock and the step loop.

Knows the Worker protocol and messages; never text, tensors or clients.

Commands come in from any thread through `post`; events go out, a list a step, through the `emit` callback, on
the engine's thread.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from typing import cast

from pensieve.core.cache import TieredCache
from pensieve.core.checks import check
from pensieve.core.cost import ResumeQuote
from pensieve.core.overview import Overview, latest_first
from pensieve.core.plan import CopyFailure, PipelinedWorker, StepPlan, StepResult, Worker
from pensieve.core.request import FinishReason, Request
from pensieve.core.scheduler import Scheduler
from pensieve.core.sequence import Sequence
from pensieve.core.wipes import Erasure
from pensieve.engine.messages import (
    Abort,
    CacheMap,
    Check,
    Checked,
    Command,
    Event,
    Failed,
    Finished,
    Forget,
    Forgotten,
    GetMap,
    GetRows,
    GetStats,
    HintAnswer,
    Idle,
    Keep,
    KeepAnswer,
    Stats,
    Stop,
    Submit,
    TierStats,
    Warm,
)
from pensieve.errors import EngineClosed, PensieveError, WorkerLost

log = logging.getLogger(__name__)

# Fallback poll: covers a lost wake-up of the worker, and retries of a tier that was left alone after failed
# copies.
COPY_POLL_S = 0.05
_TOTALS = (  # fields of a receipt that are summed up for `Stats`
    "gpu_tokens",
    "cpu_tokens",
    "recomputed_tokens",
    "new_tokens",
    "output_tokens",
    "bytes_in",
    "bytes_out",
)
NO_REQUEST = ""  # a `Failed` with this id says that the loop has ended


class Engine:
    """Owns the clock and the loop; the scheduler decides, the worker computes."""

    def __init__(
        self,
        scheduler: Scheduler,
        worker: Worker,
        *,
        chunk_bytes: int,
        emit: Callable[[list[Event]], None],
        clock: Callable[[], float] = time.monotonic,
        debug: bool = False,
        quote: ResumeQuote | None = None,
        ahead: bool = False,
        max_failed_steps: int | None = None,
    ) -> None:
        """Nothing runs until `start`.

        Args:
            scheduler: used on the engine's thread only from now on.
            worker: computes.
            chunk_bytes: bytes of one chunk, for receipts.
            emit: takes the events of a step.
            clock: seconds, never backwards.
            debug: verify every cache invariant after every step.
            quote: estimates what resuming a conversation takes; None if costs were not measured in seconds.
            ahead: plan and begin each step while the one before runs. Needs a `PipelinedWorker`; pays on a
                GPU.
            max_failed_steps: the loop ends after so many failed steps in a row, so that a new process can be
                started. None: it goes on, and each request fails for itself.
        """
        self._scheduler = scheduler
        self._worker = worker
        self._chunk_bytes = chunk_bytes
        self._emit = emit
        self._clock = clock
        self._debug = debug
        self._quote = quote
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._to_forget: list[tuple[Forget, Erasure | None]] = []  # None while its turns are in flight
        self._maps: deque[tuple[str, int, Overview]] = deque()  # (tag, total, rows so far)
        self.num_steps = 0
        self._ahead = ahead
        self._max_failed_steps, self._num_failed_steps = max_failed_steps, 0  # (in a row)
        # Steps begun; with the result if the step could not even be begun.
        self._begun: deque[tuple[StepPlan, StepResult | None]] = deque()
        self._totals: Counter[str] = Counter()
        worker.set_waker(self._wake.set)

    # -- from any thread

    def post(self, command: Command) -> None:
        """Hand a command in. Events answer it."""
        self._inbox.put(command)
        self._wake.set()

    def start(self) -> None:
        """Run the loop on its own thread until `close`."""
        self._thread = threading.Thread(target=self.run, name="pensieve-engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the loop after the current step, fail the requests that are left, stop the worker."""
        self._closing = True
        self.post(GetStats())  # wakes the loop, whether it sleeps or waits for a command
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._worker.close()

    # -- the loop

    def run(self) -> None:
        """Step until closed; sleep while there is nothing to do."""
        why = "the engine was closed before this request ended"
        try:
            while not self._closing:
                self._wake.clear()
                if not self.step():
                    self._wake.wait(COPY_POLL_S if self._cache.copies or self._scheduler.requests else None)
        except WorkerLost as error:
            log.error("the engine stopped: %s", error.message)
            why = f"the engine stopped: {error.message}"
        except Exception as error:  # our own bug: fail every request rather than leave it waiting
            log.exception("the engine stopped")
            why = f"the engine stopped on an error of its own: {type(error).__name__}: {error}"
        self._emit(
            [
                Failed(request_id, EngineClosed.code, why)
                for request_id in (*self._scheduler.requests, NO_REQUEST)
            ]
        )
        self._emit([Forgotten(command.tag, 0, 0, why) for command, _ in self._to_forget if command.tag])
        self._emit(
            [
                CacheMap(tag, total, self._cache.chunk_tokens, self._tiers(), ())
                for tag, total, _ in self._maps
            ]
        )
        while not self._closing:  # only after an error: refuse later commands at once
            self._emit(self._refusal(self._inbox.get(), why))

    def step(self) -> bool:
        """Plan and begin a step, and end it (or the one before, if `ahead`).

        False if there was nothing to do.
        """
        events: list[Event] = []
        try:
            plan, has_result = self._step(events)
        finally:
            if events:  # also of a step that raised
                self._emit(events)
        return bool(events or self._maps or not plan.is_empty or has_result)

    def _step(self, events: list[Event]) -> tuple[StepPlan, bool]:
        self._drain_inbox(events)
        plan = self._scheduler.schedule(self._clock())
        self._begin(plan)
        has_result = False
        # An empty plan waits for the steps under way.
        while len(self._begun) > (1 if self._ahead and not plan.is_empty else 0):
            has_result |= self._finish(events)
        self._to_forget = [
            left
            for command, erasure in self._to_forget
            if (left := self._forget(command, erasure, events)) is not None
        ]
        self._build_map(events)
        if plan.spans:
            self.num_steps += 1
        return plan, has_result

    def _begin(self, plan: StepPlan) -> None:
        if not self._ahead:
            self._begun.append((plan, self._attempt(plan, lambda: self._worker.run(plan))))
            return
        worker = cast(PipelinedWorker, self._worker)
        self._begun.append((plan, self._attempt(plan, lambda: worker.begin(plan))))

    def _finish(self, events: list[Event]) -> bool:
        """Commit the oldest step begun. True if its result may let the next step do more."""
        plan, result = self._begun.popleft()
        if result is None:
            result = self._attempt(plan, cast(PipelinedWorker, self._worker).finish)
        assert result is not None
        outcome = self._scheduler.commit(plan, result, self._clock())
        if self._debug:
            check(self._scheduler.cache)
        events += outcome.tokens
        events += [self._ending(request) for request in outcome.finished]
        if plan.spans:
            self._count_failures(result.forward_error)
        return bool(not plan.is_empty or result.copies_done or result.copies_failed)

    def _count_failures(self, error: str | None) -> None:
        self._num_failed_steps = 0 if error is None else self._num_failed_steps + 1
        if self._max_failed_steps is not None and self._num_failed_steps >= self._max_failed_steps:
            raise WorkerLost(
                f"{self._num_failed_steps} steps failed in a row, and none went well between them; "
                f"the last: {error}"
            )

    def _attempt(self, plan: StepPlan, work: Callable[[], StepResult | None]) -> StepResult | None:
        """Run part of a step.

        A worker reports failures in its result; if it raises, only this step is lost.
        """
        try:
            return work()
        except WorkerLost:  # it will never compute again
            raise
        except Exception as error:
            log.exception("the worker raised in step %d", plan.step_id)
            message = f"{type(error).__name__}: {error}"
            lost = tuple(
                CopyFailure(copy.copy_id, False, message) for copy in (*plan.swap_in, *plan.swap_out)
            )
            return StepResult(
                plan.step_id,
                copies_failed=lost,
                forward_error=message,
                wipe_error=message if plan.wiped else None,
            )

    def _drain_inbox(self, events: list[Event]) -> None:
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            try:
                self._take(command, events)
            except Exception as error:  # a command that meets a bug of ours fails alone
                log.exception("the command %s failed", type(command).__name__)
                events += self._refusal(command, f"{type(error).__name__}: {error}", PensieveError.code)

    def _take(self, command: Command, events: list[Event]) -> None:
        now_s = self._clock()
        match command:
            case Submit():
                try:
                    self._scheduler.submit(
                        command.request_id,
                        command.namespace,
                        command.sequence_id,
                        command.tokens,
                        command.history_tokens,
                        command.sampling,
                        now_s if command.submitted_s is None else command.submitted_s,
                    )
                except PensieveError as error:
                    events.append(Failed(command.request_id, error.code, error.message))
            case Abort():
                self._scheduler.abort(command.request_id, now_s)
            case Stop():
                self._scheduler.stop(command.request_id, command.num_output_tokens, now_s)
            case Forget():
                if (left := self._forget(command, None, events)) is not None:
                    self._to_forget.append(left)
            case Keep():
                events.append(self._keep(command))
            case Warm() | Idle():
                events.append(self._hint(command, now_s))
            case GetStats():
                events.append(self._stats(command.tag))
            case GetMap():
                found = latest_first(self._cache, command.namespaces, command.tenant)
                first = max(0, command.offset)
                self._queue_map(command.tag, len(found), found[first : first + max(0, command.limit)])
            case GetRows():
                rows = [sequence for key in command.keys if (sequence := self._cache.find(*key)) is not None]
                self._queue_map(command.tag, len(rows), rows)
            case Check():
                events.append(self._check(command.tag))
        events += [self._ending(request) for request in self._scheduler.take_finished()]

    @property
    def _cache(self) -> TieredCache:
        return self._scheduler.cache

    def _forget(
        self, command: Forget, erasure: Erasure | None, events: list[Event]
    ) -> tuple[Forget, Erasure | None] | None:
        """Continue a `Forget`. Returns what is left to do; None if it is done."""
        if erasure is None:
            erasure = self._scheduler.forget(
                command.namespace, command.sequence_id, self._clock(), erase=command.erase
            )
        if erasure is None or not erasure.done:
            return command, erasure
        if command.tag:
            events.append(Forgotten(command.tag, erasure.num_slots, erasure.num_slots * self._chunk_bytes))
        return None

    def _hint(self, command: Warm | Idle, now_s: float) -> HintAnswer:
        try:
            if isinstance(command, Warm):
                return HintAnswer(
                    command.tag, self._scheduler.warm(command.namespace, command.sequence_id, now_s)
                )
            return HintAnswer(command.tag, self._scheduler.idle(command.namespace, command.sequence_id))
        except PensieveError as error:
            return HintAnswer(command.tag, 0, error.message, error.code)

    def _keep(self, command: Keep) -> KeepAnswer:
        try:
            self._scheduler.set_keep(command.namespace, command.sequence_id, command.keep)
        except PensieveError as error:
            return KeepAnswer(command.sequence_id, command.keep, error.message, command.tag, error.code)
        return KeepAnswer(command.sequence_id, command.keep, None, command.tag)

    def _queue_map(self, tag: str, total: int, sequences: list[Sequence]) -> None:
        self._maps.append((tag, total, Overview(self._cache, sequences, self._quote)))

    def _build_map(self, events: list[Event]) -> None:
        """Build some rows of the oldest map asked for; never many between two steps."""
        if not self._maps:
            return
        tag, total, overview = self._maps[0]
        overview.build_some(self._clock())
        if overview.done:
            self._maps.popleft()
            events.append(CacheMap(tag, total, self._cache.chunk_tokens, self._tiers(), tuple(overview.rows)))

    def _check(self, tag: str) -> Checked:
        error = None
        try:
            check(self._cache)
        except AssertionError as broken:
            error = str(broken)
        leases = sum(
            chunk is not None
            for sequence in self._cache.sequences.values()
            if sequence.leased
            for chunk in sequence.chunks
        )
        return Checked(tag, error, leases, tuple(pool.num_used for pool in self._cache.places.pools))

    # -- events

    def _refusal(self, command: Command, why: str, code: str = EngineClosed.code) -> list[Event]:
        """The events that answer a command which cannot be carried out."""
        match command:
            case Submit():
                return [Failed(command.request_id, code, why)]
            case Keep():
                return [KeepAnswer(command.sequence_id, command.keep, why, command.tag, code)]
            case Warm() | Idle():
                return [HintAnswer(command.tag, 0, why, code)]
            case Forget():
                return [Forgotten(command.tag, 0, 0, why)] if command.tag else []
            case Check():
                return [Checked(command.tag, why, 0, ())]
            case GetMap() | GetRows():
                return [CacheMap(command.tag, 0, self._cache.chunk_tokens, self._tiers(), ())]
            case GetStats():
                return [self._stats(command.tag)]
            case Abort() | Stop():
                return []

    def _ending(self, request: Request) -> Event:
        assert request.ending is not None
        receipt = replace(
            request.receipt,
            bytes_in=request.chunks_in * self._chunk_bytes,
            bytes_out=request.chunks_out * self._chunk_bytes,
        )
        for name in _TOTALS:
            self._totals[name] += getattr(receipt, name)
        if request.ending is FinishReason.ERROR:
            return Failed(request.request_id, request.error_code, request.error or "the request failed")
        return Finished(request.request_id, request.ending, tuple(request.output), receipt)

    def _tiers(self) -> tuple[TierStats, ...]:
        places = self._cache.places
        return tuple(
            TierStats(tier.name, pool.num_slots, pool.num_used, places.has_lower_copy[index].count)
            for index, (tier, pool) in enumerate(zip(self._cache.config.tiers, places.pools, strict=True))
        )

    def _stats(self, tag: str) -> Stats:
        scheduler, cache = self._scheduler, self._cache
        places = cache.places
        evictions = {
            "copied_down": places.num_copied_down,
            "reclaimed": places.num_reclaimed,
            "dropped": places.num_dropped,
            "failed": cache.history.num_failed,
        }
        return Stats(
            tag=tag,
            waiting=scheduler.num_waiting,
            running=len(scheduler.running),
            sequences=len(cache.sequences),
            chunks=places.num_chunks,
            steps=self.num_steps,
            tiers=self._tiers(),
            chunks_reclaimed=places.num_reclaimed,
            chunks_dropped=places.num_dropped,
            suspensions=scheduler.num_suspensions,
            copies_failed=scheduler.num_copies_failed,
            forwards_failed=scheduler.num_forwards_failed,
            evictions=tuple(evictions.items()),
            kept_chunks=cache.keeps.num_kept,
            keep_limit=cache.keeps.limit,
            **self._totals,
        )
