"""The life of a request: queued, running, suspended, ended.

Knows requests and the cache; never what a step computes.

    queue -> start -> suspend -> (queue) -> start -> end

A request that plans in flight still name ends, or is suspended, when the last of them is committed.
"""

from __future__ import annotations

from bisect import insort
from collections import deque

from pensieve.config import SchedulerConfig
from pensieve.core.cache import Admission, TieredCache
from pensieve.core.request import FinishReason, Request, RequestState
from pensieve.core.sequence import Key, extend_digests
from pensieve.core.waiting import WaitingQueue

MAX_FAILURES = 4  # in a row, without a token computed between them, before a request is given up


class Lifecycle:
    """Sole writer of the waiting and running requests and of their states."""

    def __init__(self, config: SchedulerConfig, cache: TieredCache) -> None:
        self._retain, self._cache = config.retain, cache
        self.requests: dict[str, Request] = {}  # not finished, by id
        self.running: list[Request] = []  # in arrival order
        self.waiting = WaitingQueue(config.max_batch_tokens, fcfs=config.admission == "fcfs")
        # Turns that wait for an earlier turn of their conversation
        self._behind: dict[Key, deque[Request]] = {}
        self.ended: list[str] = []  # ids that the worker has yet to forget
        self.finished: list[Request] = []  # not reported yet
        self.num_suspensions = 0

    @property
    def num_waiting(self) -> int:
        """Requests that wait for room, or for an earlier turn of their conversation."""
        return len(self.waiting) + sum(len(turns) for turns in self._behind.values())

    def take_finished(self) -> list[Request]:
        """Requests that finished since the last call."""
        finished = self.finished[:]
        self.finished.clear()
        return finished

    def take_ended(self) -> tuple[str, ...]:
        """Ids of requests that ended since the last call, for the worker to forget."""
        ended = tuple(self.ended)
        self.ended.clear()
        return ended

    # -- forward

    def add(self, request: Request, now_s: float) -> None:
        """Queue a new request, behind earlier turns of its conversation."""
        self.requests[request.request_id] = request
        if request.key in self._behind:
            self._behind[request.key].append(request)
        else:
            self._behind[request.key] = deque()
            self._enqueue(request, now_s)

    def start(self, request: Request, admission: Admission) -> None:
        """A waiting request was admitted: it runs."""
        self.waiting.admit(request)
        request.state = RequestState.RUNNING
        request.missing = list(admission.missing)
        insort(self.running, request, key=lambda r: r.arrival)

    def end(self, request: Request, reason: FinishReason, now_s: float) -> None:
        """End a request, at once or when no plan in flight names it any more."""
        request.ending = reason
        if request.in_flight == 0:
            self.settle(request, now_s)

    def suspend(self, request: Request, now_s: float) -> None:
        """Send a running request back to the queue, at once or when no plan in flight names it any more."""
        request.suspending = True
        if request.in_flight == 0:
            self.settle(request, now_s)

    def fail(self, request: Request, message: str) -> None:
        """Void all plans in flight for a request: it is suspended and recomputes, or is given up."""
        request.num_failures += 1
        request.failed = request.suspending = True
        if request.num_failures > MAX_FAILURES and request.ending is None:
            request.error = f"gave up after {request.num_failures} failures: {message}"
            request.ending = FinishReason.ERROR

    def settle(self, request: Request, now_s: float) -> None:
        """No plan names the request any more: end or suspend it if that was decided."""
        if request.state is RequestState.FINISHED or (request.ending is None and not request.suspending):
            return
        cache, sequence = self._cache, request.sequence
        if request.state is RequestState.RUNNING:
            assert sequence is not None
            self.running.remove(request)
            request.missing = []
            cache.release(sequence, request.tokens, request.digests, now_s if request.failed else None)
            if request.failed:
                cache.drop_unread(sequence, now_s)
        num_chunks = -(-len(request.tokens) // cache.chunk_tokens)
        if request.ending is None and num_chunks > cache.slots_for_one(sequence, request.digests):
            request.ending = FinishReason.LENGTH  # it grew to the whole tier: it could not come back
        if request.ending is not None:
            self._finish(request, now_s)
            return
        request.state, request.suspending, request.failed = RequestState.SUSPENDED, False, False
        request.receipt.suspensions += 1
        self.num_suspensions += 1
        extend_digests(request.digests, request.salt, request.tokens, cache.chunk_tokens)
        self._queue(request, len(request.tokens))

    # -- inside

    def _finish(self, request: Request, now_s: float) -> None:
        if request in self.waiting:
            self.waiting.remove(request)
        request.state = RequestState.FINISHED
        receipt = request.receipt
        receipt.output_tokens, receipt.total_s = request.num_output, now_s - request.submitted_s
        if not request.started:
            receipt.queue_s = receipt.total_s
        del self.requests[request.request_id]
        if request.started:
            self.ended.append(request.request_id)
        self.finished.append(request)
        behind = self._behind[request.key]
        if request in behind:
            behind.remove(request)
            return
        sequence = request.sequence
        assert sequence is not None
        if not self._retain:
            self._cache.forget(sequence)
        self._cache.close(sequence, now_s, request.num_output)
        if behind:
            self._enqueue(behind.popleft(), now_s)
        else:
            del self._behind[request.key]

    def _enqueue(self, request: Request, now_s: float) -> None:
        request.sequence = self._cache.open(*request.key, now_s)
        self._queue(request, len(request.tokens) - request.history_tokens * self._retain)

    def _queue(self, request: Request, work: int) -> None:
        """Let a request wait for admission.

        `work` estimates the tokens it has to compute, before a look at the cache.
        """
        request.work, request.refusal = max(1, work), None
        self.waiting.add(request)
