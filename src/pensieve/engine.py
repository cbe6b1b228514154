"""The engine: an inbox, a clock and the step loop. Knows the Worker protocol and plain messages; never text, tensors or who asks.

Commands come in from any thread through `post`; events go out, a list a step, through the `emit` callback, on the engine's thread.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable

from pensieve.core.plan import CopyFailure, StepPlan, StepResult, Worker
from pensieve.core.request import FinishReason, Request
from pensieve.core.scheduler import Scheduler
from pensieve.errors import EngineClosed, PensieveError
from pensieve.messages import (
    Abort,
    Command,
    Event,
    Failed,
    Finished,
    Forget,
    GetStats,
    Keep,
    KeepAnswer,
    Receipt,
    Stats,
    Stop,
    Submit,
    TierStats,
    Token,
)

log = logging.getLogger(__name__)

# A worker wakes the engine when a copy settles. Should a wake-up ever be lost, copies under way are looked after this often.
COPY_POLL_S = 0.05


class Engine:
    """Owns time and the loop; the scheduler decides, the worker does."""

    def __init__(
        self,
        scheduler: Scheduler,
        worker: Worker,
        *,
        chunk_bytes: int,
        emit: Callable[[list[Event]], None],
        clock: Callable[[], float] = time.monotonic,
        debug: bool = False,
    ) -> None:
        """`chunk_bytes` turns chunks moved into bytes for receipts. `debug` verifies every cache invariant after every step."""
        self._scheduler = scheduler
        self._worker = worker
        self._chunk_bytes = chunk_bytes
        self._emit = emit
        self._clock = clock
        self._debug = debug
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._to_forget: list[Forget] = []
        self._num_steps = 0
        self._totals: Counter[str] = Counter()
        worker.set_waker(self._wake.set)

    # -- from any thread

    def post(self, command: Command) -> None:
        """Hand a command in. What comes of it is an event."""
        self._inbox.put(command)
        self._wake.set()

    def start(self) -> None:
        """Run the loop in a thread of its own until `close`."""
        self._thread = threading.Thread(target=self.run, name="pensieve-engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the loop after the step under way, abort what is left, stop the worker."""
        self._closing = True
        self.post(GetStats())  # whatever the loop waits on, this wakes it
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
                    self._wake.wait(COPY_POLL_S if self._scheduler.cache.places.copies else None)
        except Exception as error:  # our own bug: say so to everybody who waits rather than leave them waiting
            log.exception("the engine stopped")
            why = f"the engine stopped on an error of its own: {type(error).__name__}: {error}"
        self._emit([Failed(request_id, EngineClosed.code, why) for request_id in self._scheduler.requests])
        while not self._closing:  # (only after an error) whoever comes now is told at once
            command = self._inbox.get()
            if isinstance(command, Submit):
                self._emit([Failed(command.request_id, EngineClosed.code, why)])
            elif isinstance(command, Keep):
                self._emit([KeepAnswer(command.sequence_id, command.keep, why, command.tag)])
            elif isinstance(command, GetStats):
                self._emit([self._stats(command.tag)])

    def step(self) -> bool:
        """One step; False if there was nothing to do and nothing came of it."""
        events: list[Event] = []
        self._drain_inbox(events)
        plan = self._scheduler.schedule(self._clock())
        result = self._run(plan)
        outcome = self._scheduler.commit(plan, result, self._clock())
        if self._debug:
            self._scheduler.cache.check()
        events += [Token(request.request_id, token.token_id, token.logprob, token.top) for request, token in outcome.tokens]
        events += [self._ending(request) for request in outcome.finished]
        self._to_forget = [forget for forget in self._to_forget if not self._forget(forget)]
        if plan.spans:
            self._num_steps += 1
        if events:
            self._emit(events)
        return bool(events or not plan.is_empty or result.copies_done or result.copies_failed)

    def _run(self, plan: StepPlan) -> StepResult:
        try:
            return self._worker.run(plan)
        except Exception as error:  # a worker reports failures in its result; one that raises all the same loses only this step
            log.exception("the worker raised in step %d", plan.step_id)
            message = f"{type(error).__name__}: {error}"
            lost = tuple(CopyFailure(copy.copy_id, False, message) for copy in (*plan.swap_in, *plan.swap_out))
            return StepResult(plan.step_id, copies_failed=lost, forward_error=message)

    def _drain_inbox(self, events: list[Event]) -> None:
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            try:
                self._take(command, events)
            except Exception as error:  # a command that trips over a bug of ours fails alone
                log.exception("the command %s failed", type(command).__name__)
                if isinstance(command, Submit):
                    events.append(Failed(command.request_id, PensieveError.code, f"{type(error).__name__}: {error}"))

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
                if not self._forget(command):
                    self._to_forget.append(command)
            case Keep():
                events.append(self._keep(command))
            case GetStats():
                events.append(self._stats(command.tag))
        events += [self._ending(request) for request in self._scheduler.take_finished()]

    def _forget(self, command: Forget) -> bool:
        return self._scheduler.forget(command.namespace, command.sequence_id, self._clock())

    def _keep(self, command: Keep) -> KeepAnswer:
        try:
            self._scheduler.set_keep(command.namespace, command.sequence_id, command.keep)
        except PensieveError as error:
            return KeepAnswer(command.sequence_id, command.keep, error.message, command.tag)
        return KeepAnswer(command.sequence_id, command.keep, None, command.tag)

    # -- what to say

    def _ending(self, request: Request) -> Event:
        assert request.ending is not None
        receipt = self._receipt(request)
        for name in ("gpu_tokens", "cpu_tokens", "recomputed_tokens", "new_tokens", "output_tokens", "bytes_in", "bytes_out"):
            self._totals[name] += getattr(receipt, name)
        if request.ending is FinishReason.ERROR:
            return Failed(request.request_id, request.error_code, request.error or "the request failed")
        return Finished(request.request_id, request.ending, tuple(request.output), receipt)

    def _receipt(self, request: Request) -> Receipt:
        now_s = self._clock()
        first_token_s = request.first_token_s
        return Receipt(
            prompt_tokens=request.num_prompt,
            gpu_tokens=request.gpu_tokens,
            cpu_tokens=request.cpu_tokens,
            recomputed_tokens=request.recomputed_tokens,
            new_tokens=request.new_tokens,
            output_tokens=request.num_output,
            bytes_in=request.chunks_in * self._chunk_bytes,
            bytes_out=request.chunks_out * self._chunk_bytes,
            suspensions=request.suspensions,
            resume_cpu_tokens=request.resume_cpu_tokens,
            resume_recomputed_tokens=request.resume_recomputed_tokens,
            queue_s=(now_s if request.admitted_s is None else request.admitted_s) - request.submitted_s,
            first_token_s=None if first_token_s is None else first_token_s - request.submitted_s,
            total_s=now_s - request.submitted_s,
        )

    def _stats(self, tag: str) -> Stats:
        scheduler, cache = self._scheduler, self._scheduler.cache
        places = cache.places
        tiers = tuple(
            TierStats(tier.name, pool.num_slots, pool.num_used, places.clean[index].count)
            for index, (tier, pool) in enumerate(zip(cache.config.tiers, places.pools, strict=True))
        )
        return Stats(
            tag=tag,
            waiting=scheduler.num_waiting,
            running=len(scheduler.running),
            sequences=len(cache.sequences),
            chunks=places.num_chunks,
            steps=self._num_steps,
            tiers=tiers,
            chunks_reclaimed=places.num_reclaimed,
            chunks_dropped=places.num_dropped,
            suspensions=scheduler.num_suspensions,
            copies_failed=scheduler.num_copies_failed,
            forwards_failed=scheduler.num_forwards_failed,
            **self._totals,
        )
