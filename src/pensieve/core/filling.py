"""What goes into a step: decodes of running requests, then prefill as far as the budget goes.

Knows spans; never the queue's order.

A filling strategy is handed to the scheduler, which asks it to `fill` a draft.
"""

from __future__ import annotations

import math

from pensieve.config import SchedulerConfig
from pensieve.core.admission import AdmissionControl
from pensieve.core.budget import StepBudget
from pensieve.core.cache import TieredCache
from pensieve.core.draft import StepDraft
from pensieve.core.hints import Hints
from pensieve.core.lifecycle import Lifecycle
from pensieve.core.pace import Load
from pensieve.core.plan import BlockTableUpdate, Span
from pensieve.core.recovery import cut
from pensieve.core.request import FinishReason, Request


class Filling:
    """One batch for everything: each step holds the decodes, and prefill beside them."""

    def __init__(
        self,
        config: SchedulerConfig,
        cache: TieredCache,
        lifecycle: Lifecycle,
        budget: StepBudget,
        admission: AdmissionControl,
        hints: Hints,
    ) -> None:
        self._config, self._cache, self._lifecycle, self._budget = config, cache, lifecycle, budget
        self.admission, self._hints = admission, hints
        self.running = lifecycle.running
        self._first: Request | None = None  # whose prefill came first in the last step that had prefill

    def fill(self, draft: StepDraft) -> None:
        """Spans for running requests and for those that can be admitted."""
        suspect = self._suspect(draft)
        if suspect is not None:  # alone: a request that breaks the forward again breaks no other request
            self.plan_decode(draft, suspect)
            self.plan_missing(draft, suspect)
            return
        for request in list(self.running):
            self.plan_decode(draft, request)
        self.admission.admit_all(draft)
        self._plan_prefill(draft)
        if not (self._lifecycle.waiting or draft.num_unmet):
            self._hints.begin(draft.now_s)

    # -- for strategies

    def plan_decode(self, draft: StepDraft, request: Request) -> None:
        """The decode of a request whose prefill is done, if it may have one more token and finds room."""
        length = request.next_length
        if length is None:
            return
        sequence, start = request.sequence, length - 1
        assert sequence is not None
        if start // self._cache.chunk_tokens == len(sequence.chunks):
            slot = self._grow(draft, request)
            if slot is None:
                return
            draft.tables.append(BlockTableUpdate(request.request_id, len(sequence.chunks) - 1, (slot,)))
        token_ids = None if request.num_pending else (request.tokens[-1],)
        draft.add(request, Span(request.request_id, start, length, token_ids, True))

    def plan_missing(self, draft: StepDraft, request: Request) -> None:
        """Prefill of an admitted request, as far as the budget goes."""
        if not (request.missing and request.plannable):
            return
        budget, size = self._prefill_budget(draft, request), self._cache.chunk_tokens
        taken, request.missing = cut(request.missing, budget, size)
        for start, stop in taken:
            emits = not request.missing and (start, stop) == taken[-1]
            span = Span(request.request_id, start, stop, tuple(request.tokens[start:stop]), emits)
            draft.add(request, span)
            draft.num_prefill += stop - start
        time = self._budget.time
        if time is not None and taken and draft.prefill_s > 0.0:
            seconds = time.pace.prefill_s(taken)
            time.spend(seconds)
            draft.prefill_s = max(0.0, draft.prefill_s - seconds)

    # -- inside

    def _suspect(self, draft: StepDraft) -> Request | None:
        """The request that runs alone in this step because a forward failed with it; None if none does."""
        for request in self.running:
            if request.suspect and request.plannable:
                return request
        return self.admission.admit_suspect(draft)

    def _grow(self, draft: StepDraft, request: Request) -> int | None:
        """A slot for a decoding request's next chunk; None if it waits, is suspended, or ends (§4.3.5)."""
        assert request.sequence is not None
        cache, now_s = self._cache, draft.now_s
        draft.num_unmet += 1
        while True:
            if cache.available() == 0:
                cache.make_room(draft.num_unmet, now_s, request.sequence.key)
            slot = cache.grow(request.sequence, now_s)
            if slot is not None:
                draft.num_unmet -= 1
                return slot
            if cache.coming() or any(r.suspending or r.ending for r in self.running):
                return None  # room is on its way
            latest = next(r for r in reversed(self.running) if r.plannable)
            if latest is not request:  # it comes later in this step's order too, so it has no span yet
                self._lifecycle.suspend(latest, now_s)
            elif len(self.running) > 1:
                self._lifecycle.suspend(request, now_s)
                return None
            else:
                if not request.in_flight:
                    self._lifecycle.end(request, FinishReason.LENGTH, now_s)
                return None

    def _plan_prefill(self, draft: StepDraft) -> None:
        """Prefill of admitted requests, in the order of `due`, as far as the step's tokens and seconds go."""
        requests = sorted((r for r in self.running if r.missing), key=lambda r: (r.due, r.arrival))
        if not requests:
            return
        budget = self._budget
        if budget.time is not None:
            draft.prefill_s = budget.time.for_prefill(Load.of(draft.spans))
        if self._config.admission == "work" and requests[0] is self._first:
            # It came first in the last step too and is not done: a prefill that ends within this step goes
            # before it.
            short = next((r for r in requests[1:] if budget.is_short(r.num_missing, r.missing)), None)
            if short is not None:
                requests.remove(short)
                requests.insert(0, short)
        time = budget.known_time
        if time is not None and budget.is_short(requests[0].num_missing, requests[0].missing):
            # Its first token comes with this step, so the step is not filled up further.
            draft.prefill_s = min(draft.prefill_s, time.step_s)
        for request in requests:
            before = draft.num_prefill
            self.plan_missing(draft, request)
            if not before and draft.num_prefill:
                self._first = request

    def _prefill_budget(self, draft: StepDraft, request: Request) -> int:
        """Tokens of a request's prefill that this step may hold."""
        time = self._budget.time
        if time is None or math.isinf(draft.prefill_s):
            return draft.budget
        if not draft.num_prefill:
            if self._budget.is_short(request.num_missing, request.missing):
                return draft.budget
            if draft.prefill_s <= 0.0:
                return 0  # no prefill in this step: the decoding requests are behind
        size = self._cache.chunk_tokens
        within = time.pace.tokens_within(draft.prefill_s, request.missing[0][0])
        if not draft.num_prefill:  # to the nearest boundary, and at least a chunk: no less can be computed
            within = max(within + size // 2, size)
        return min(draft.budget, within)
