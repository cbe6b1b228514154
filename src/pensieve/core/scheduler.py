"""Scheduling: which requests run, what each step computes, which requests wait.

Knows token counts, requests and time as told; never tensors, text or a clock.

One step is `schedule(now_s) -> StepPlan`, run by a worker, then `commit(plan, result)`. State advances in
`schedule`, so the next step may be planned before this one's result is in: a token not sampled yet is "the
one sampled last", and the chunks that a plan names stay leased until it is committed.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from pensieve.config import ContextLimit, SchedulerConfig
from pensieve.core.admission import AdmissionControl
from pensieve.core.budget import StepBudget
from pensieve.core.cache import TieredCache
from pensieve.core.draft import StepDraft
from pensieve.core.filling import Filling
from pensieve.core.hints import Hints
from pensieve.core.intake import MAX_TOKEN_ID, PromptLimits
from pensieve.core.lifecycle import Lifecycle
from pensieve.core.pace import Load, Pace
from pensieve.core.plan import SampledToken, Span, SteadySteps, StepPlan, StepResult
from pensieve.core.request import FinishReason, Request, SamplingParams
from pensieve.core.sequence import Sequence, extend_digests
from pensieve.core.wipes import Erasure
from pensieve.errors import (
    ConfigError,
    ConversationNotFound,
    InvalidRequest,
    KeepRefused,
    Overloaded,
    WorkerFailed,
)


@dataclass(slots=True)
class StepEvents:
    """What came of a step, for the clients."""

    tokens: list[SampledToken] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)  # with `ending` and perhaps `error`


class Scheduler:
    """Plans steps and commits their results. Sole writer of every `Request`, through its parts.

    `Lifecycle` owns the queues and states, `AdmissionControl` decides which request is admitted, a `Filling`
    fills a step.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache: TieredCache,
        max_context: int,
        vocab_size: int = MAX_TOKEN_ID + 1,
        *,
        pace: Pace | None = None,
        limit: ContextLimit | None = None,
        filling: type[Filling] = Filling,
    ) -> None:
        """Start with an empty queue.

        Args:
            config: how steps are filled.
            cache: empty; from now on only the scheduler changes it.
            max_context: the longest sequence in tokens, prompt and answer together.
            vocab_size: token ids lie in [0, vocab_size).
            pace: predicts the seconds of a step; needed where `config.step_s` bounds them.
            limit: what would allow a longer sequence, for error messages; None if unknown.
            filling: the strategy by which a step is filled.

        Raises:
            ConfigError: the token budget is too small, or `step_s` comes without a pace.
        """
        least = cache.chunk_tokens + config.max_running
        if config.max_batch_tokens < least:
            raise ConfigError(
                f"max_batch_tokens must be at least chunk_tokens + max_running = {least}, "
                f"got {config.max_batch_tokens}"
            )
        self.config = config
        self.cache = cache
        self.max_context = max_context
        self._limits = PromptLimits(max_context, vocab_size, limit)
        self._lifecycle = Lifecycle(config, cache)
        self._budget = StepBudget(config, pace)
        self._admission = AdmissionControl(config, cache, self._lifecycle, self._budget)
        self._hints = Hints(cache, self._admission.reserve)
        self._filling = filling(config, cache, self._lifecycle, self._budget, self._admission, self._hints)
        self.requests = self._lifecycle.requests  # not finished, by id
        self.running = self._lifecycle.running  # in arrival order
        self._num_arrived = 0
        self._next_step = 0
        self.num_forwards_failed = 0
        self.num_copies_failed = 0

    @property
    def num_waiting(self) -> int:
        """Requests that wait for room, or for an earlier turn of their conversation."""
        return self._lifecycle.num_waiting

    @property
    def num_suspensions(self) -> int:
        """Requests suspended since the start, each time counted."""
        return self._lifecycle.num_suspensions

    @property
    def has_work(self) -> bool:
        """Whether the next step may do something for a request, a hint, an erasure or the worker."""
        lifecycle = self._lifecycle
        return bool(
            self.requests or lifecycle.ended or lifecycle.finished or self._hints or self.cache.has_wipes
        )

    # -- requests in

    def submit(
        self,
        request_id: str,
        namespace: str,
        sequence_id: str,
        tokens: tuple[int, ...],
        history_tokens: int,
        sampling: SamplingParams,
        now_s: float,
    ) -> Request:
        """Queue a turn.

        `tokens` is its whole path, of which an earlier turn had put `history_tokens` before the model.

        Raises:
            InvalidRequest: no tokens, an id outside the vocabulary, a negative or too long history, or a
                request id in use.
            ContextLengthExceeded: the prompt leaves no room for one new token within `max_context`.
            RequestTooLarge: its chunks would not fit in the first tier even alone.
            Overloaded: the queue is full.
        """
        self._limits.check(tokens, namespace, history_tokens, sampling.max_new_tokens)
        if request_id in self.requests:
            raise InvalidRequest(f"request id {request_id!r} is in use")
        # A stateless baseline shares nothing, not even between running requests.
        salt = namespace if self.config.retain else f"{namespace}\0{request_id}"
        cache, size = self.cache, self.cache.chunk_tokens
        digests: list[bytes] = []
        extend_digests(digests, salt, tokens, size)
        capacity = cache.slots_for_one(cache.find(namespace, sequence_id), digests)
        self._limits.check_chunks(len(tokens), sampling.max_new_tokens, size, capacity, cache.num_slots)
        if self.num_waiting >= self.config.max_waiting:
            raise Overloaded(
                f"{self.num_waiting} requests wait already, at most {self.config.max_waiting} may: "
                "try again later"
            )
        request = Request(
            request_id,
            namespace,
            sequence_id,
            list(tokens),
            history_tokens,
            sampling,
            arrival=self._num_arrived,
            submitted_s=now_s,
            most_tokens=min(len(tokens) + sampling.max_new_tokens, self.max_context),
            salt=salt,
            digests=digests,
        )
        self._num_arrived += 1
        self._lifecycle.add(request, now_s)
        return request

    def abort(self, request_id: str, now_s: float) -> None:
        """End a request in whatever state it is. Does nothing if it has ended or is unknown."""
        request = self.requests.get(request_id)
        if request is not None and request.ending is None:
            self._lifecycle.end(request, FinishReason.ABORT, now_s)

    def stop(self, request_id: str, num_output_tokens: int, now_s: float) -> None:
        """End a request's answer after its first `num_output_tokens` tokens: they hold a stop string."""
        request = self.requests.get(request_id)
        if request is None or request.ending not in (None, FinishReason.STOP, FinishReason.LENGTH):
            return
        del request.tokens[request.num_prompt + max(0, num_output_tokens) :]
        del request.digests[len(request.tokens) // self.cache.chunk_tokens :]
        if request.ending is None:
            self._lifecycle.end(request, FinishReason.STOP, now_s)
        else:
            request.ending = FinishReason.STOP

    def take_finished(self) -> list[Request]:
        """Requests that finished outside of a commit since the last call."""
        return self._lifecycle.take_finished()

    # -- conversations

    def forget(
        self, namespace: str, sequence_id: str, now_s: float, *, erase: bool = False
    ) -> Erasure | None:
        """Abort every turn of a conversation and free its cache.

        With `erase` the erasure is done once every byte that the conversation left in any tier is zero, a few
        steps later; otherwise at once. Returns None while turns are in flight: ask again after the next
        commit.
        """
        key = (namespace, sequence_id)
        for request in list(self.requests.values()):
            if request.key == key:
                self.abort(request.request_id, now_s)
        sequence = self.cache.find(namespace, sequence_id)
        if sequence is not None and sequence.leased:
            return None
        self._hints.discard(key)
        if erase:
            return self.cache.erase(sequence)
        return Erasure(self.cache.forget(sequence) if sequence is not None else 0)

    def warm(self, namespace: str, sequence_id: str, now_s: float) -> int:
        """A user is typing: swap its conversation in (`Hints.warm`). Returns how many chunks lie below."""
        return self._hints.warm((namespace, sequence_id), now_s)

    def idle(self, namespace: str, sequence_id: str) -> int:
        """A user is done for now: evict its conversation first (`Hints.idle`).

        Returns how many chunks it has.
        """
        return self._hints.idle((namespace, sequence_id))

    def set_keep(self, namespace: str, sequence_id: str, keep: bool) -> None:
        """Set or lift a user's keep on the cached chunks of a conversation.

        Raises:
            ConversationNotFound: nothing is cached under this id.
            KeepRefused: the keeps would exceed their share of the slots, or leave a queued request without
                room.
        """
        cache = self.cache
        sequence = cache.find(namespace, sequence_id)
        if sequence is None:
            raise ConversationNotFound(
                f"nothing is cached for conversation {sequence_id!r}: it can be kept after its next turn"
            )
        cache.set_keep(sequence, keep)
        for request in self.requests.values() if keep else ():
            need = -(-len(request.tokens) // cache.chunk_tokens)
            if need > (limit := cache.slots_for_one(request.sequence, request.digests)):
                cache.set_keep(sequence, False)
                raise KeepRefused(
                    f"keeping {sequence_id!r} would leave {limit} chunks to a queued request "
                    f"that needs {need}: try again later"
                )

    # -- one step

    def schedule(self, now_s: float) -> StepPlan:
        """Plan the next step: spans for running requests, admissions, copies. May be empty."""
        draft = StepDraft(self._next_step, now_s, self.config.max_batch_tokens)
        copies_alone = self._admission.copies_come_first(draft)
        if not copies_alone:
            self._filling.fill(draft)
        asked_for = self._admission.slots_asked_for()
        self.cache.copy_ahead(
            self.config.copy_ahead_share, self.config.max_copies_in_flight, now_s, asked_for
        )
        moves = self.cache.collect_moves()
        for request in draft.named:
            request.in_flight += 1
        plan = StepPlan(
            self._next_step,
            tuple(draft.spans),
            moves.swap_in,
            moves.swap_out,
            tuple(draft.started),
            tuple(draft.tables),
            self._lifecycle.take_ended(),
            moves.reclaimed,
            moves.wiped,
            settles=copies_alone,
        )
        self._next_step += 1
        return plan

    def commit(self, plan: StepPlan, result: StepResult, now_s: float) -> StepEvents:
        """Take in the result of a plan. Plans are committed in the order they were scheduled.

        Raises:
            WorkerFailed: slots could not be zeroed several times in a row, so an erasure cannot be kept: the
                engine must stop.
        """
        assert plan.step_id == result.step_id, (
            f"plan {plan.step_id} committed with the result of {result.step_id}"
        )
        cannot_wipe = self.cache.settle_wipes(plan.wiped, result.wipe_error)  # before copies give slots back
        if cannot_wipe is not None:
            raise WorkerFailed(cannot_wipe)
        self._settle_copies(result, now_s)
        time = self._budget.time
        if time is not None and result.seconds is not None and plan.spans and not plan.swap_in:
            time.pace.observe(Load.of(plan.spans), result.seconds)
        if result.forward_error is not None:
            self._fail_forward(plan, result.forward_error, now_s)
        for failure in result.requests_failed:
            broken = self.requests.get(failure.request_id)
            if broken is not None and broken.ending is None:
                broken.error = failure.message
                self._lifecycle.end(broken, FinishReason.ERROR, now_s)
        events = StepEvents()
        self._commit_spans(plan.spans, result, events, now_s)
        events.finished += self.take_finished()
        return events

    def _commit_spans(
        self, spans: Tokens[Span], result: StepResult, events: StepEvents, now_s: float
    ) -> None:
        sampled = {token.request_id: token for token in result.tokens}
        named: dict[str, Request] = {}
        cache, size = self.cache, self.cache.chunk_tokens
        for span in spans:
            request = self.requests[span.request_id]
            named[span.request_id] = request
            if span.emits_token:
                request.num_pending -= 1
            if request.failed or request.ending is not None:
                continue
            assert request.sequence is not None
            if span.stop // size > len(request.digests):
                extend_digests(request.digests, request.salt, request.tokens, size)
            cache.commit(request.sequence, span.start, span.stop, request.digests)
            request.suspect, request.num_failures = False, 0
            if span.emits_token:
                self._take_token(request, sampled[span.request_id], events, now_s)
        for request in named.values():
            request.in_flight -= 1
            if request.in_flight == 0 and (request.suspending or request.ending is not None):
                self._lifecycle.settle(request, now_s)

    def _take_token(self, request: Request, token: SampledToken, events: StepEvents, now_s: float) -> None:
        request.tokens.append(token.token_id)
        if request.receipt.first_token_s is None:
            request.receipt.first_token_s = now_s - request.submitted_s
        events.tokens.append(token)
        if token.token_id in request.sampling.stop_token_ids:
            self._lifecycle.end(request, FinishReason.STOP, now_s)
        elif len(request.tokens) >= request.most_tokens:
            self._lifecycle.end(request, FinishReason.LENGTH, now_s)

    # -- failures

    def _settle_copies(self, result: StepResult, now_s: float) -> None:
        known = self.cache.copies  # (a worker that raised may yet report a copy that was given up)
        for copy_id in result.copies_done:
            if copy_id in known:
                self.cache.finish_copy(copy_id)
        affected: dict[Sequence, str] = {}  # however many copies of one sequence failed, that is one failure
        for failure in result.copies_failed:
            if failure.copy_id not in known:
                continue
            self.num_copies_failed += 1
            for sequence in self.cache.fail_copy(failure.copy_id, failure.source_lost, now_s):
                affected.setdefault(sequence, failure.message)
        if affected:
            for request in list(self.running):
                if request.sequence in affected:
                    self._lifecycle.fail(request, f"a copy of its cache failed: {affected[request.sequence]}")
                    if request.in_flight == 0:  # its swap-in ran in a step of copies alone: no span names it
                        self._lifecycle.settle(request, now_s)

    def _fail_forward(self, plan: StepPlan, message: str, now_s: float) -> None:
        """Nothing a plan computed is valid. A request whose forward fails again, alone, is given up."""
        self.num_forwards_failed += 1
        named = {span.request_id: self.requests[span.request_id] for span in plan.spans}
        for request in named.values():
            if request.suspect and not request.failed and len(named) == 1 and request.ending is None:
                request.error = f"computing it failed twice, the second time alone: {message}"
                self._lifecycle.end(request, FinishReason.ERROR, now_s)
            request.suspect = True
            self._lifecycle.fail(request, message)

    # -- steps that only decode

    def steady_steps(self) -> SteadySteps | None:
        """The next steps in which running requests decode into chunks they have, and nothing else happens.

        Running them and handing the results to `commit_steady` equals scheduling, running and committing
        each, provided that no command comes meanwhile, that each step is committed before the next would be
        planned, and that a step in which copies settled was the last. For callers that stream no tokens (the
        simulator). Returns None if the next step is not of this kind.
        """
        lifecycle = self._lifecycle
        if lifecycle.waiting or lifecycle.ended or not self.running:
            return None
        size = count = self.cache.chunk_tokens
        for request in self.running:  # (the usual reason, and callers ask before every step)
            if request.missing or not (len(request.tokens) - 1) % size:
                return None
        cache, config = self.cache, self.config
        if lifecycle.finished or self._hints or cache.has_wipes:
            return None
        if cache.has_copies_to_begin(config.copy_ahead_share, config.max_copies_in_flight):
            return None
        spans: list[Span] = []
        for request in self.running:
            start = len(request.tokens) - 1
            count = min(count, size - start % size, request.most_tokens - 2 - start)
            if count < 1 or not request.is_steady:
                return None
            spans.append(Span(request.request_id, start, start + 1, (request.tokens[-1],), True))
        return SteadySteps(self._next_step, tuple(spans), count)

    def commit_steady(self, steps: SteadySteps, results: Tokens[StepResult], now_s: float) -> None:
        """Take in the results of the first of these steps, none of which failed. The rest did not run."""
        assert steps.step_id == self._next_step, (
            f"steady steps from {steps.step_id} on committed after step {self._next_step - 1}"
        )
        assert len(results) <= steps.count, f"{len(results)} steps ran of {steps.count} steady ones"
        self._next_step += len(results)
        self._admission.copied_first = False
        time, cache = self._budget.time, self.cache
        for index, result in enumerate(results):
            assert not (result.forward_error or result.requests_failed or result.wipe_error), (
                f"steady step {result.step_id} failed"
            )
            for token in result.tokens:
                self.requests[token.request_id].tokens.append(token.token_id)
            self._settle_copies(result, now_s)
            if time is not None and result.seconds is not None:
                time.pace.observe(Load.of(steps.plan(index).spans), result.seconds)
        for span in steps.spans:
            request, stop = self.requests[span.request_id], span.start + len(results)
            assert request.sequence is not None
            if stop // cache.chunk_tokens > len(request.digests):
                extend_digests(request.digests, request.salt, request.tokens, cache.chunk_tokens)
            cache.commit(request.sequence, span.start, stop, request.digests)
