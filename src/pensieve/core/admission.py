"""Admission control: which waiting request runs next.

Knows requests and room in the first tier; never spans or time budgets' use.

A request is admitted with everything it needs, or not at all; while it waits it holds no lease.
"""

from __future__ import annotations

import math
from itertools import islice

from pensieve.config import SchedulerConfig
from pensieve.core.budget import StepBudget
from pensieve.core.cache import Admission, TieredCache
from pensieve.core.draft import StepDraft
from pensieve.core.lifecycle import Lifecycle
from pensieve.core.misses import explain
from pensieve.core.plan import BlockTableUpdate, RequestStart
from pensieve.core.request import Readiness, Request
from pensieve.core.waiting import MAX_OVERTAKINGS

# A request is not admitted while this many steps' worth of tokens are to be computed before its own.
BACKLOG_STEPS = 8
LOOK_AHEAD = 8  # queued requests for which chunks are copied down ahead of time


class AdmissionControl:
    """Decides which waiting requests are admitted, and makes room for them."""

    def __init__(
        self, config: SchedulerConfig, cache: TieredCache, lifecycle: Lifecycle, budget: StepBudget
    ) -> None:
        self._config, self._cache, self._lifecycle, self._budget = config, cache, lifecycle, budget
        self._waiting, self._running = lifecycle.waiting, lifecycle.running
        self.reserve = math.ceil(config.reserve_share * cache.num_slots)  # slots left to running requests
        self.copied_first = False  # the last step only copied

    # -- admitting

    def admit_all(self, draft: StepDraft) -> None:
        """Admit every request that can be, in the queue's order."""
        while self._waiting and len(self._running) < self._config.max_running:
            request = self._next(draft)
            if request is None:
                return
            self._admit(draft, request)
            request.due = self._budget.due(request.missing, draft.step_id, draft.now_s)

    def admit_suspect(self, draft: StepDraft) -> Request | None:
        """Admit the queue's head if a forward failed with it; None if not, or if there is no room now."""
        head = self._waiting.head
        if head is None or not head.suspect or len(self._running) >= self._config.max_running:
            return None
        if self._judge(draft, head) is not Readiness.NOW:
            return None
        self._admit(draft, head)
        return head

    def copies_come_first(self, draft: StepDraft) -> bool:
        """Whether this step only copies, because requests wait for copies alone; never twice in a row."""
        self.copied_first = (
            self._config.copies_first
            and not self.copied_first
            and (self._growth_waits(draft.now_s) or self._queue_waits(draft))
        )
        return self.copied_first

    def slots_asked_for(self) -> int:
        """First-tier slots that the next requests of the queue will take at most, and the reserve they leave.

        Room is made for several of them at once: a copy's end is noticed at the end of its step, so one
        request after the other would wait a whole step each.
        """
        if not self._waiting:
            return 0
        size = self._cache.chunk_tokens
        return self.reserve + sum(
            -(-len(request.tokens) // size) for request in islice(self._waiting, LOOK_AHEAD)
        )

    def _next(self, draft: StepDraft) -> Request | None:
        """The request to admit now; None if none can be, or if slots are being freed for a waiting one."""
        for request in self._waiting.candidates():
            if request.suspect:
                return None
            readiness = self._judge(draft, request)
            if readiness is Readiness.NOW and not self._waits_for_others(draft, request):
                return request
            if readiness in (Readiness.AFTER_COPIES, Readiness.MAKING_ROOM):
                return None
        return None

    def _admit(self, draft: StepDraft, request: Request) -> None:
        sequence = request.sequence
        assert sequence is not None
        admission = self._cache.admit(sequence, len(request.tokens), request.digests, draft.now_s)
        self._lifecycle.start(request, admission)
        request.chunks_in += admission.num_swapped_in
        request.chunks_out += sequence.num_copied_out
        sequence.num_copied_out = 0
        if request.started:
            receipt = request.receipt
            receipt.resume_cpu_tokens += admission.cpu_tokens
            receipt.resume_recomputed_tokens += sum(stop - start for start, stop in admission.missing)
        else:
            request.started = True
            _fill_receipt(request, admission, self._cache, draft.now_s)
            prompt = tuple(request.tokens[: request.num_prompt])
            draft.started.append(RequestStart(request.request_id, request.sampling, prompt))
        draft.tables.append(BlockTableUpdate(request.request_id, 0, self._cache.slots_of(sequence)))

    # -- judging

    def _waits_for_others(self, draft: StepDraft, request: Request) -> bool:
        """Whether so much is to be computed before a request that it need not hold its slots yet."""
        max_tokens = self._config.max_batch_tokens
        most = BACKLOG_STEPS * max_tokens
        if self._config.admission == "fcfs":
            return sum(r.num_missing for r in self._running) >= most
        if request.num_overtaken >= MAX_OVERTAKINGS:
            return False
        ranges = [(len(request.tokens) - request.work, len(request.tokens))]
        due = self._budget.due(ranges, draft.step_id, draft.now_s)
        short = self._budget.is_short(request.work, ranges)
        before = sum(
            other.num_missing
            for other in self._running
            if other.missing and other.due <= due and not (short and other.num_missing > max_tokens)
        )
        return before >= most

    def _growth_waits(self, now_s: float) -> bool:
        """Whether running requests need new chunks for their next tokens that copies alone can give them."""
        cache, size = self._cache, self._cache.chunk_tokens
        if cache.available() >= len(self._running):
            return False
        num_growing = 0
        for request in self._running:
            length = request.next_length
            if length is not None and request.sequence is not None:
                num_growing += (length - 1) // size == len(request.sequence.chunks)
        cache.make_room(num_growing, now_s)
        return cache.available() < num_growing <= cache.available() + cache.coming()

    def _queue_waits(self, draft: StepDraft) -> bool:
        """Whether the next request of the queue could be admitted if copies under way had settled."""
        if not self._waiting or len(self._running) >= self._config.max_running:
            return False
        for request in self._waiting.candidates():
            readiness = self._judge(draft, request)
            if readiness is not Readiness.NOT_YET:
                return readiness is Readiness.AFTER_COPIES
        return False

    def _judge(self, draft: StepDraft, request: Request) -> Readiness:
        """Whether a waiting request can be admitted; if room must be made first, begins to make it."""
        if request.refusal is None or request.seen != self._room_state(draft):
            readiness = self._look(draft, request)
            if readiness is Readiness.NOW:  # not remembered: slots may be taken without a change of state
                request.refusal = None
                return readiness
            request.refusal, request.seen = readiness, self._room_state(draft)
        return request.refusal

    def _look(self, draft: StepDraft, request: Request) -> Readiness:
        cache, sequence, now_s = self._cache, request.sequence, draft.now_s
        assert sequence is not None
        cache.attach(sequence, request.tokens, request.digests)
        need = cache.survey(sequence, len(request.tokens))
        self._waiting.set_work(request, need.missing)
        least = need.slots + draft.num_unmet
        wanted = least + (self.reserve if self._running else 0)
        # Where copies cost next to nothing the reserve need not lie ready: copies made ahead crowd a small
        # lower tier.
        ready = least if self._config.copies_first else wanted
        at_once = cache.available() - need.own_reclaimable
        in_time = at_once + cache.coming() + cache.evictable() - need.own_evictable
        if need.blocked or wanted > in_time:
            return Readiness.NOT_YET
        if at_once + cache.coming() < ready:  # (else copies under way make enough room)
            with cache.protected(sequence):
                cache.make_room(ready, now_s, sequence.key)
                at_once = cache.available()
            if at_once < ready and not (self._running or cache.coming()):
                # Kept chunks fill the rest of the lower tier: some of its own lower copies must be dropped.
                version = cache.version
                cache.make_room(ready, now_s, sequence.key)
                if cache.version != version:  # one of its own chunks may be gone, and no event would tell
                    return self._look(draft, request)
        if at_once >= ready:
            return Readiness.NOW
        return Readiness.AFTER_COPIES if at_once + cache.coming() >= ready else Readiness.MAKING_ROOM

    def _room_state(self, draft: StepDraft) -> tuple[int, int, int, int]:
        """Unchanged only if no chunk has become available or cached since, and no tier can be tried again."""
        cache = self._cache
        return cache.version, len(self._running), draft.num_unmet, cache.retries_due(draft.now_s)


def _fill_receipt(request: Request, admission: Admission, cache: TieredCache, now_s: float) -> None:
    """What the first admission found."""
    receipt, history, missing = request.receipt, request.history_tokens, admission.missing
    receipt.queue_s = now_s - request.submitted_s
    receipt.gpu_tokens, receipt.cpu_tokens = admission.gpu_tokens, admission.cpu_tokens
    receipt.recomputed_tokens = sum(max(0, min(stop, history) - start) for start, stop in missing)
    receipt.new_tokens = sum(max(0, stop - max(start, history)) for start, stop in missing)
    receipt.misses = explain(cache, request.key, request.tokens, history, request.digests, admission)
