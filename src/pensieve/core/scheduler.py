"""Scheduling: who runs, what each step computes, who waits. Knows token counts, requests and time as told; never tensors, text or a clock.

One step is `schedule(now_s) -> StepPlan`, run by a worker, then `commit(plan, result)`. State advances in `schedule`, so the next step may be
planned before this one's result is in: a token not sampled yet is "the one sampled last", and whatever a plan names stays leased until it is
committed.
"""

from __future__ import annotations

import math
from array import array
from bisect import insort
from collections import deque
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from itertools import islice

from pensieve.config import ContextLimit, SchedulerConfig
from pensieve.core.cache import Admission, TieredCache
from pensieve.core.misses import explain
from pensieve.core.pace import Load, Pace, StepTime
from pensieve.core.plan import (
    BlockTableUpdate,
    RequestStart,
    SampledToken,
    Span,
    SteadySteps,
    StepPlan,
    StepResult,
)
from pensieve.core.recovery import cut
from pensieve.core.request import FinishReason, Request, RequestState, SamplingParams, Verdict
from pensieve.core.sequence import Sequence, extend_digests
from pensieve.core.waiting import MAX_OVERTAKINGS, WaitingQueue
from pensieve.core.warming import Warming
from pensieve.core.wipes import Erasure
from pensieve.errors import (
    ConfigError,
    ContextLengthExceeded,
    ConversationNotFound,
    InvalidRequest,
    KeepRefused,
    Overloaded,
    RequestTooLarge,
    WorkerFailed,
)

MAX_FAILURES = 4  # in a row, without a token computed between them, before a request is given up
BACKLOG_STEPS = (
    8  # a request is not admitted while so many steps' worth of tokens are to be computed before its own
)
# Of several admitted requests the one with the least to compute goes first, unless it came later by more than the other takes times this:
# behind a dropped history a short turn would wait as long as it, and a long one is put off by a bounded time. A long one whose time has
# come takes turns with short ones, a step each.
PATIENCE = 4
LOOK_AHEAD = 8  # queued requests for which chunks are copied down ahead of time
MAX_TOKEN_ID = (1 << 32) - 1  # what a chain hash and the store can hold


@dataclass(slots=True)
class StepEvents:
    """What a commit means for those who wait for answers."""

    tokens: list[SampledToken] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)  # with `ending` and perhaps `error`


@dataclass(slots=True)
class _Step:
    """A plan being filled."""

    budget: int  # tokens left
    prefill_s: float = (
        math.inf
    )  # seconds left for spans other than decodes; 0: only what ends within one step
    num_prefill: int = 0  # tokens of such spans
    spans: list[Span] = field(default_factory=list)
    tables: list[BlockTableUpdate] = field(default_factory=list)
    started: list[RequestStart] = field(default_factory=list)
    named: list[Request] = field(default_factory=list)
    num_unmet: int = 0  # running requests that found no slot for their next token


class Scheduler:
    """Sole writer of the waiting and running queues, the token budget and every `Request`."""

    def __init__(
        self,
        config: SchedulerConfig,
        cache: TieredCache,
        max_context: int,
        vocab_size: int = MAX_TOKEN_ID + 1,
        *,
        pace: Pace | None = None,
        limit: ContextLimit | None = None,
    ) -> None:
        """Start with nothing queued.

        Args:
            config: how steps are filled.
            cache: empty, and from now on only ours to change.
            max_context: the longest sequence in tokens, prompt and answer together.
            vocab_size: token ids lie in [0, vocab_size).
            pace: what steps take; needed where `config.step_s` bounds them in time.
            limit: what would allow a longer sequence, for the errors of requests that are too long.

        Raises:
            ConfigError: the token budget is too small, or `step_s` comes without a pace.
        """
        self.config = config
        self.cache = cache
        self.max_context = max_context
        self.vocab_size = vocab_size
        self._limit = limit
        self.requests: dict[str, Request] = {}
        self.running: list[Request] = []  # in arrival order
        self._waiting = WaitingQueue(config.max_batch_tokens, fcfs=config.admission == "fcfs")
        self._behind: dict[
            tuple[str, str], deque[Request]
        ] = {}  # turns that wait for an earlier turn of their conversation
        self._ended: list[str] = []  # for the worker to forget
        self._finished: list[
            Request
        ] = []  # ended outside of a commit, reported by the next `schedule` or `commit`
        self._reserve = math.ceil(config.reserve_share * cache.places.pools[0].num_slots)
        self._warming = Warming(cache, self._reserve)
        self._num_arrived = 0
        self._next_step = 0
        self._time: StepTime | None = None
        if config.step_s is not None:
            if pace is None:
                raise ConfigError("step_s bounds steps in time, which takes a pace: what steps take")
            self._time = StepTime(config.step_s, pace)
        self._first: Request | None = (
            None  # whose missing tokens went first in the last step that computed such
        )
        self._copied_first = False  # the last step only copied
        self.num_forwards_failed = 0
        self.num_copies_failed = 0
        self.num_suspensions = 0
        if config.max_batch_tokens < cache.chunk_tokens + config.max_running:
            raise ConfigError(
                f"max_batch_tokens must be at least chunk_tokens + max_running = {cache.chunk_tokens + config.max_running}, "
                f"got {config.max_batch_tokens}"
            )

    # -- requests in

    @property
    def num_waiting(self) -> int:
        """Requests that wait for room, or for an earlier turn of their conversation."""
        return len(self._waiting) + sum(len(turns) for turns in self._behind.values())

    @property
    def has_work(self) -> bool:
        """A step may have something to do: a request is not finished, a hint not carried out, or the worker has something to forget."""
        return bool(
            self.requests
            or self._ended
            or self._finished
            or self._warming
            or self.cache.places.wipes.has_work
        )

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
        """Queue a turn. `tokens` is its whole path, of which an earlier turn had put `history_tokens` before the model.

        Raises:
            InvalidRequest: no tokens, an id outside the vocabulary, a negative or too long history, or a request id in use.
            ContextLengthExceeded: the prompt leaves no room for one new token within `max_context`.
            RequestTooLarge: its chunks would not fit in the first tier even alone.
            Overloaded: the queue is full.
        """
        if not tokens:
            raise InvalidRequest("a prompt needs at least one token, got none")
        if (wrong := _first_wrong_id(tokens, self.vocab_size)) is not None:
            raise InvalidRequest(
                f"token ids must be integers in [0, {self.vocab_size}) (the vocabulary), got {tokens[wrong]!r}"
            )
        try:
            namespace.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the namespace {namespace!r} is not valid text: {error}") from error
        if not 0 <= history_tokens <= len(tokens):
            raise InvalidRequest(
                f"history_tokens must lie in [0, {len(tokens)}] (the prompt's length), got {history_tokens}"
            )
        if request_id in self.requests:
            raise InvalidRequest(f"request id {request_id!r} is in use")
        if len(tokens) >= self.max_context:
            raise ContextLengthExceeded(
                f"the prompt has {len(tokens)} tokens, but at most {self.max_context - 1} fit in the context of {self.max_context}: "
                "shorten it, start a new conversation, allow the oldest turns to be dropped (--overflow truncate)"
                f"{self._way_out(len(tokens), sampling.max_new_tokens)}"
            )
        salt = (
            namespace if self.config.retain else f"{namespace}\0{request_id}"
        )  # a stateless baseline shares nothing, not even between running requests
        size = self.cache.chunk_tokens
        digests: list[bytes] = []
        extend_digests(digests, salt, tokens, size)
        capacity = self._first_tier_limit(self.cache.find(namespace, sequence_id), digests)
        if (need := -(-len(tokens) // size)) > capacity:
            raise RequestTooLarge(
                f"the prompt has {len(tokens)} tokens and needs {need} chunks of {size}, but the first tier has {capacity} for one request: "
                f"shorten it{self._way_out(len(tokens), sampling.max_new_tokens, others=self.cache.places.pools[0].num_slots - capacity)}"
            )
        if self.num_waiting >= self.config.max_waiting:
            raise Overloaded(
                f"{self.num_waiting} requests wait already, at most {self.config.max_waiting} may: try again later"
            )
        most_tokens = min(len(tokens) + sampling.max_new_tokens, self.max_context)
        request = Request(
            request_id,
            namespace,
            sequence_id,
            list(tokens),
            history_tokens,
            sampling,
            self._num_arrived,
            now_s,
            most_tokens,
        )
        request.salt, request.digests = salt, digests
        self._num_arrived += 1
        self.requests[request_id] = request
        key = (request.namespace, sequence_id)
        if key in self._behind:
            self._behind[key].append(request)
        else:
            self._behind[key] = deque()
            self._enqueue(request, now_s)
        return request

    def _way_out(self, num_prompt: int, num_new: int, *, others: int = 0) -> str:
        """The end of an error message: what an engine would have to be started with for a prompt and, as far as the model goes, its answer."""
        if self._limit is None:
            return ", or start with a larger first tier"
        num_tokens = max(num_prompt + 1, min(num_prompt + num_new, self._limit.model_tokens))
        return f", or {self._limit.way_out(num_tokens, others=others)}"

    def abort(self, request_id: str, now_s: float) -> None:
        """End a request in whatever state it is; one that has ended already, or never was, is left alone."""
        request = self.requests.get(request_id)
        if request is not None and request.ending is None:
            self._end(request, FinishReason.ABORT, now_s)

    def stop(self, request_id: str, num_output_tokens: int, now_s: float) -> None:
        """End a request's answer after its first `num_output_tokens` tokens (a stop string was found in them)."""
        request = self.requests.get(request_id)
        if request is None or request.ending not in (None, FinishReason.STOP, FinishReason.LENGTH):
            return
        del request.tokens[request.num_prompt + max(0, num_output_tokens) :]
        del request.digests[len(request.tokens) // self.cache.chunk_tokens :]
        if request.ending is None:
            self._end(request, FinishReason.STOP, now_s)
        else:
            request.ending = FinishReason.STOP

    def forget(
        self, namespace: str, sequence_id: str, now_s: float, *, erase: bool = False
    ) -> Erasure | None:
        """Abort every turn of a conversation and free its cache. None: turns are still in flight, ask again after the next commit.

        With `erase` the erasure is done when every byte that the conversation left in any tier is zero, a few steps later; without, at once.
        """
        for request in list(self.requests.values()):
            if (request.namespace, request.sequence_id) == (namespace, sequence_id):
                self.abort(request.request_id, now_s)
        sequence = self.cache.find(namespace, sequence_id)
        if sequence is not None and sequence.leased:
            return None
        self._warming.discard((namespace, sequence_id))
        if erase:
            return self.cache.erase(sequence)
        return Erasure(self.cache.forget(sequence) if sequence is not None else 0)

    def warm(self, namespace: str, sequence_id: str, now_s: float) -> int:
        """A user is about to go on: bring the conversation's chunks up, never at the expense of running or queued requests.

        Counts as activity. Returns how many chunks lie below the first tier; they come up over the next steps, as far as there is room.

        Raises:
            ConversationNotFound: nothing is cached under this id.
        """
        sequence = self._cached(namespace, sequence_id)
        self.cache.touch(sequence, now_s)
        return self._warming.add(sequence, now_s)

    def idle(self, namespace: str, sequence_id: str) -> int:
        """A user is done for now: until its next activity, the conversation's chunks are the first to go. Returns how many there are.

        Raises:
            ConversationNotFound: nothing is cached under this id.
        """
        sequence = self._cached(namespace, sequence_id)
        self._warming.discard(sequence.key)
        return self.cache.idle(sequence)

    def _cached(self, namespace: str, sequence_id: str) -> Sequence:
        sequence = self.cache.find(namespace, sequence_id)
        if sequence is None or not sequence.chunks:
            raise ConversationNotFound(
                f"nothing is cached for conversation {sequence_id!r}: hints help from its next turn on"
            )
        return sequence

    def set_keep(self, namespace: str, sequence_id: str, keep: bool) -> None:
        """Set or lift a user's keep on what is cached of a conversation.

        Raises:
            ConversationNotFound: nothing is cached under this id.
            KeepRefused: the keeps would exceed their share of the slots, or leave a queued request without room.
        """
        sequence = self.cache.find(namespace, sequence_id)
        if sequence is None:
            raise ConversationNotFound(
                f"nothing is cached for conversation {sequence_id!r}: it can be kept after its next turn"
            )
        self.cache.set_keep(sequence, keep)
        size = self.cache.chunk_tokens
        for request in self.requests.values() if keep else ():
            need, limit = (
                -(-len(request.tokens) // size),
                self._first_tier_limit(request.sequence, request.digests),
            )
            if need > limit:
                self.cache.set_keep(sequence, False)
                raise KeepRefused(
                    f"keeping {sequence_id!r} would leave {limit} chunks to a queued request that needs {need}: try again later"
                )

    def take_finished(self) -> list[Request]:
        """Requests that ended outside of a commit since the last call."""
        finished, self._finished = self._finished, []
        return finished

    # -- one step

    def schedule(self, now_s: float) -> StepPlan:
        """Plan the next step: spans for running requests, admissions, copies. May be empty."""
        step = _Step(self.config.max_batch_tokens)
        copies_alone = self._copies_come_first(step, now_s)
        if not copies_alone:
            self._fill(step, now_s)
        self.cache.room.copy_ahead(
            self.config.copy_ahead_share, self.config.max_copies_in_flight, now_s, self._slots_asked_for()
        )
        moves = self.cache.collect_moves()
        for request in step.named:
            request.in_flight += 1
        ended, self._ended = tuple(self._ended), []
        plan = StepPlan(
            self._next_step,
            tuple(step.spans),
            moves.swap_in,
            moves.swap_out,
            tuple(step.started),
            tuple(step.tables),
            ended,
            moves.reclaimed,
            moves.wiped,
            settles=copies_alone,
        )
        self._next_step += 1
        return plan

    def commit(self, plan: StepPlan, result: StepResult, now_s: float) -> StepEvents:
        """Take in what came of a plan. Plans are committed in the order they were scheduled.

        Raises:
            WorkerFailed: slots could not be zeroed several times in a row. What was to be erased cannot be: the engine must stop.
        """
        assert plan.step_id == result.step_id, (
            f"plan {plan.step_id} committed with the result of {result.step_id}"
        )
        events = StepEvents()
        cannot_wipe = self.cache.places.wipes.settle(
            plan.wiped, result.wipe_error
        )  # before copies release slots anew
        if cannot_wipe is not None:
            raise WorkerFailed(cannot_wipe)
        self._settle_copies(result, now_s)
        if self._time is not None and result.seconds is not None and plan.spans and not plan.swap_in:
            self._time.pace.observe(Load.of(plan.spans), result.seconds)
        if result.forward_error is not None:
            self._fail_forward(plan, result.forward_error, now_s)
        for failure in result.requests_failed:
            broken = self.requests.get(failure.request_id)
            if broken is not None and broken.ending is None:
                broken.error = failure.message
                self._end(broken, FinishReason.ERROR, now_s)
        sampled = {token.request_id: token for token in result.tokens}
        named: dict[str, Request] = {}
        size = self.cache.chunk_tokens
        for span in plan.spans:
            request = self.requests[span.request_id]
            named[span.request_id] = request
            if span.emits_token:
                request.num_pending -= 1
            if request.failed or request.ending is not None:
                continue
            assert request.sequence is not None
            if span.stop // size > len(request.digests):
                extend_digests(request.digests, request.salt, request.tokens, size)
            self.cache.commit(request.sequence, span.start, span.stop, request.digests)
            request.suspect, request.num_failures = False, 0
            if span.emits_token:
                self._take_token(request, sampled[span.request_id], events, now_s)
        for request in named.values():
            request.in_flight -= 1
            if request.in_flight == 0 and (request.suspending or request.ending is not None):
                self._settle(request, now_s)
        events.finished += self.take_finished()
        return events

    # -- steps that only decode

    def steady_steps(self) -> SteadySteps | None:
        """The steps to come in which every running request decodes one more token into a chunk it has, and nothing else happens.

        Running them and handing the results to `commit_steady` is the same as scheduling, running and committing each, provided that
        nothing is asked of the scheduler meanwhile, that each is committed before the next would be planned, and that one in which copies
        settled was the last. It is for those who have nobody to show tokens to: a simulation, whose steps mostly are of this kind.
        None: the next step is not.
        """
        if self._waiting or self._ended or not self.running:
            return None
        size = count = self.cache.chunk_tokens
        for (
            request
        ) in self.running:  # (most of the time it is one of these, and whoever asks does so every step)
            if request.missing or not (len(request.tokens) - 1) % size:
                return None
        cache, config = self.cache, self.config
        if self._finished or self._warming or cache.places.wipes.has_work:
            return None
        if cache.room.has_copies_to_begin(config.copy_ahead_share, config.max_copies_in_flight):
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
        """Take in what came of the first of these steps, none of which may have failed; those after them have not run."""
        assert steps.step_id == self._next_step, (
            f"steady steps from {steps.step_id} on committed after step {self._next_step - 1}"
        )
        assert len(results) <= steps.count, f"{len(results)} steps ran of {steps.count} steady ones"
        self._next_step += len(results)
        self._copied_first = False
        for index, result in enumerate(results):
            assert not (result.forward_error or result.requests_failed or result.wipe_error), (
                f"steady step {result.step_id} failed"
            )
            for token in result.tokens:
                self.requests[token.request_id].tokens.append(token.token_id)
            self._settle_copies(result, now_s)
            if self._time is not None and result.seconds is not None:
                self._time.pace.observe(Load.of(steps.plan(index).spans), result.seconds)
        for span in steps.spans:
            request, stop = self.requests[span.request_id], span.start + len(results)
            assert request.sequence is not None
            if stop // self.cache.chunk_tokens > len(request.digests):
                extend_digests(request.digests, request.salt, request.tokens, self.cache.chunk_tokens)
            self.cache.commit(request.sequence, span.start, stop, request.digests)

    # -- planning

    def _fill(self, step: _Step, now_s: float) -> None:
        """Spans for running requests and for those that can be admitted."""
        suspect = self._next_suspect(step, now_s)
        if (
            suspect is not None
        ):  # alone, so that a request which breaks the forward breaks nobody else's again
            self._plan_decode(step, suspect, now_s)
            self._plan_missing(step, suspect)
        else:
            for request in list(self.running):
                self._plan_decode(step, request, now_s)
            self._admit(step, now_s)
            self._plan_prefill(step)
            if not (self._waiting or step.num_unmet):
                self._warming.begin(now_s)

    def _plan_decode(self, step: _Step, request: Request, now_s: float) -> None:
        """The span of one token of a request whose prompt is computed, if it may have one more and finds room for it."""
        length = self._next_length(request)
        if length is None:
            return
        sequence, start = request.sequence, length - 1
        assert sequence is not None
        if start // self.cache.chunk_tokens == len(sequence.chunks):
            slot = self._grow(step, request, now_s)
            if slot is None:
                return
            step.tables.append(BlockTableUpdate(request.request_id, len(sequence.chunks) - 1, (slot,)))
        token_ids = None if request.num_pending else (request.tokens[-1],)
        self._add_span(step, request, Span(request.request_id, start, length, token_ids, True))

    def _next_length(self, request: Request) -> int | None:
        """Tokens of a decoding request with those that are on their way; None: it does not decode, or its last token is on its way."""
        if request.missing:
            return None
        length = len(request.tokens) + request.num_pending
        return length if length < request.most_tokens and request.plannable else None

    def _grow(self, step: _Step, request: Request, now_s: float) -> int | None:
        """A slot for a decoding request's next chunk; None: it waits, is suspended, or ends for lack of room (paper §4.3.5)."""
        assert request.sequence is not None
        room = self.cache.room
        step.num_unmet += 1
        while True:
            if room.available(0) == 0:
                room.make(0, step.num_unmet, now_s, request.sequence.key)
            slot = self.cache.grow(request.sequence, now_s)
            if slot is not None:
                step.num_unmet -= 1
                return slot
            if room.coming(0) or any(r.suspending or r.ending for r in self.running):
                return None  # room is on its way
            latest = next(r for r in reversed(self.running) if r.plannable)
            if (
                latest is not request
            ):  # it comes later in this step's order too: nothing is planned for it yet
                self._suspend(latest, now_s)
            elif len(self.running) > 1:
                self._suspend(request, now_s)
                return None
            else:
                if not request.in_flight:
                    self._end(request, FinishReason.LENGTH, now_s)
                return None

    def _plan_prefill(self, step: _Step) -> None:
        """Spans for what admitted requests still lack, in the order of `due`, as far as the step's tokens and seconds go."""
        requests = sorted((r for r in self.running if r.missing), key=lambda r: (r.due, r.arrival))
        if not requests:
            return
        if self._time is not None:
            step.prefill_s = self._time.for_prefill(Load.of(step.spans))
        if self.config.admission == "work" and requests[0] is self._first:
            # It went first in the last step too, and has not ended: one that ends within this step need not wait for it.
            short = next((r for r in requests[1:] if self._is_short(r.num_missing, r.missing)), None)
            if short is not None:
                requests.remove(short)
                requests.insert(0, short)
        if (
            self._time is not None
            and self._time.pace.known
            and self._is_short(requests[0].num_missing, requests[0].missing)
        ):
            step.prefill_s = min(
                step.prefill_s, self._time.step_s
            )  # its first token comes with this step: no reason to fill it up
        for request in requests:
            before = step.num_prefill
            self._plan_missing(step, request)
            if not before and step.num_prefill:
                self._first = request

    def _is_short(self, num_tokens: int, ranges: list[tuple[int, int]]) -> bool:
        """Whether so many tokens, of these ranges, are computed within one step."""
        if num_tokens > self.config.max_batch_tokens:
            return False
        return (
            self._time is None
            or not self._time.pace.known
            or self._time.pace.prefill_s(ranges) <= self._time.step_s
        )

    def _plan_missing(self, step: _Step, request: Request) -> None:
        """Spans for what an admitted request still lacks, as far as the budget goes."""
        if not (request.missing and request.plannable):
            return
        taken, request.missing = cut(
            request.missing, self._prefill_budget(step, request), self.cache.chunk_tokens
        )
        for start, stop in taken:
            emits = not request.missing and (start, stop) == taken[-1]
            self._add_span(
                step, request, Span(request.request_id, start, stop, tuple(request.tokens[start:stop]), emits)
            )
            step.num_prefill += stop - start
        if self._time is not None and taken and step.prefill_s > 0.0:
            seconds = self._time.pace.prefill_s(taken)
            self._time.spend(seconds)
            step.prefill_s = max(0.0, step.prefill_s - seconds)

    def _prefill_budget(self, step: _Step, request: Request) -> int:
        """Tokens of what a request lacks that this step may hold."""
        if self._time is None or math.isinf(step.prefill_s):
            return step.budget
        if not step.num_prefill:
            if self._is_short(request.num_missing, request.missing):
                return step.budget
            if step.prefill_s <= 0.0:
                return 0  # it sits this step out: the decoding requests are behind
        size = self.cache.chunk_tokens
        within = self._time.pace.tokens_within(step.prefill_s, request.missing[0][0])
        if not step.num_prefill:  # to the nearest boundary; and a chunk, however long it takes, since it is the least that can be computed
            within = max(within + size // 2, size)
        return min(step.budget, within)

    def _add_span(self, step: _Step, request: Request, span: Span) -> None:
        step.spans.append(span)
        step.budget -= span.stop - span.start
        request.num_pending += span.emits_token
        if not step.named or step.named[-1] is not request:
            step.named.append(request)

    # -- admission

    def _admit(self, step: _Step, now_s: float) -> None:
        """Admit who can be, in the queue's order: everything a request needs, or nothing (DESIGN §4)."""
        while self._waiting and len(self.running) < self.config.max_running:
            request = self._next_admitted(step, now_s)
            if request is None:
                return
            self._waiting.admit(request)
            self._start(step, request, now_s)
            request.due = self._due(request.missing, now_s)

    def _next_admitted(self, step: _Step, now_s: float) -> Request | None:
        """The request to admit now. None if none can be admitted, or if the slots coming free are meant for one that waits."""
        for request in self._waiting.candidates():
            if request.suspect:
                return None
            verdict = self._judge(step, request, now_s)
            if verdict is Verdict.NOW and not self._waits_for_others(request, now_s):
                return request
            if verdict in (Verdict.AFTER_COPIES, Verdict.MAKING_ROOM):
                return None
        return None

    def _waits_for_others(self, request: Request, now_s: float) -> bool:
        """Whether so much is to be computed before a request that it need not hold its slots yet."""
        most = BACKLOG_STEPS * self.config.max_batch_tokens
        if self.config.admission == "fcfs":
            return sum(r.num_missing for r in self.running) >= most
        if request.num_overtaken >= MAX_OVERTAKINGS:
            return False
        ranges = [(len(request.tokens) - request.work, len(request.tokens))]
        due, short = self._due(ranges, now_s), self._is_short(request.work, ranges)
        before = 0
        for other in self.running:
            if (
                other.missing
                and other.due <= due
                and not (short and other.num_missing > self.config.max_batch_tokens)
            ):
                before += other.num_missing
        return before >= most

    def _due(self, ranges: list[tuple[int, int]], now_s: float) -> float:
        """When these ranges, admitted now, should be computed at the latest."""
        if self._time is not None:
            return now_s + PATIENCE * self._time.pace.prefill_s(ranges)
        return (
            self._next_step
            + PATIENCE * sum(stop - start for start, stop in ranges) / self.config.max_batch_tokens
        )

    def _slots_asked_for(self) -> int:
        """First-tier slots that the next requests of the queue will take, at most, and the reserve they leave.

        Room for those behind the head is made while the head waits: a copy's end is noticed at its step's end only, so one after the
        other would wait a whole step each.
        """
        if not self._waiting:
            return 0
        size = self.cache.chunk_tokens
        return self._reserve + sum(
            -(-len(request.tokens) // size) for request in islice(self._waiting, LOOK_AHEAD)
        )

    def _next_suspect(self, step: _Step, now_s: float) -> Request | None:
        """The request that has this step for itself because a forward failed with it, admitted if it is the queue's head."""
        for request in self.running:
            if request.suspect and request.plannable:
                return request
        head = self._waiting.head
        if head is None or not head.suspect or len(self.running) >= self.config.max_running:
            return None
        if self._judge(step, head, now_s) is not Verdict.NOW:
            return None
        self._waiting.admit(head)
        self._start(step, head, now_s)
        return head

    def _copies_come_first(self, step: _Step, now_s: float) -> bool:
        """Whether this step only copies, because running requests or the head of the queue wait for nothing else; never twice in a row."""
        self._copied_first = (
            self.config.copies_first
            and not self._copied_first
            and (self._growth_waits(now_s) or self._queue_waits(step, now_s))
        )
        return self._copied_first

    def _growth_waits(self, now_s: float) -> bool:
        """Whether running requests need new chunks for their next tokens that copies alone can give them."""
        room, size = self.cache.room, self.cache.chunk_tokens
        if room.available(0) >= len(self.running):
            return False
        lengths = ((request, self._next_length(request)) for request in self.running)
        num_growing = sum(
            length is not None
            and request.sequence is not None
            and (length - 1) // size == len(request.sequence.chunks)
            for request, length in lengths
        )
        room.make(0, num_growing, now_s)
        return room.available(0) < num_growing <= room.available(0) + room.coming(0)

    def _queue_waits(self, step: _Step, now_s: float) -> bool:
        """Whether the next request of the queue could be admitted if copies under way had settled."""
        if not self._waiting or len(self.running) >= self.config.max_running:
            return False
        for request in self._waiting.candidates():
            verdict = self._judge(step, request, now_s)
            if verdict is not Verdict.NOT_YET:
                return verdict is Verdict.AFTER_COPIES
        return False

    def _judge(self, step: _Step, request: Request, now_s: float) -> Verdict:
        """Whether a waiting request can be admitted; if room must be made first, begins to make it."""
        if request.refusal is None or request.seen != self._room_state(step, now_s):
            verdict = self._look(step, request, now_s)
            if verdict is Verdict.NOW:  # (not remembered: slots may be taken without a change of that state)
                request.refusal = None
                return verdict
            request.refusal, request.seen = verdict, self._room_state(step, now_s)
        return request.refusal

    def _look(self, step: _Step, request: Request, now_s: float) -> Verdict:
        cache, room, sequence = self.cache, self.cache.room, request.sequence
        assert sequence is not None
        cache.attach(sequence, request.tokens, request.digests)
        need = cache.survey(sequence, len(request.tokens))
        self._waiting.set_work(request, need.missing)
        least = need.slots + step.num_unmet
        wanted = least + (self._reserve if self.running else 0)
        # Where copies cost next to nothing the reserve need not lie ready: copies made for nobody crowd a small lower tier.
        ready = least if self.config.copies_first else wanted
        at_once = room.available(0) - need.own_clean
        in_time = at_once + room.coming(0) + room.evictable(0) - need.own_sole
        if need.blocked or wanted > in_time:
            return Verdict.NOT_YET
        if at_once + room.coming(0) < ready:  # (else the copies under way make what room is missing)
            with cache.protected(sequence):
                room.make(0, ready, now_s, sequence.key)
                at_once = room.available(0)
            if at_once < ready and not (self.running or room.coming(0)):
                # Kept chunks fill what its own lower copies leave: some of those must be recomputed after all.
                version = cache.places.version
                room.make(0, ready, now_s, sequence.key)
                if (
                    cache.places.version != version
                ):  # (perhaps it was its own that went: look again, nothing else would make us)
                    return self._look(step, request, now_s)
        if at_once >= ready:
            return Verdict.NOW
        return Verdict.AFTER_COPIES if at_once + room.coming(0) >= ready else Verdict.MAKING_ROOM

    def _room_state(self, step: _Step, now_s: float) -> tuple[int, int, int, int]:
        """Equal to an earlier value only if no chunk has become available or found since, and no tier can be tried again."""
        return (
            self.cache.places.version,
            len(self.running),
            step.num_unmet,
            self.cache.room.retries_due(now_s),
        )

    def _start(self, step: _Step, request: Request, now_s: float) -> None:
        sequence = request.sequence
        assert sequence is not None
        admission = self.cache.admit(sequence, len(request.tokens), request.digests, now_s)
        request.state = RequestState.RUNNING
        request.missing = list(admission.missing)
        request.chunks_in += admission.num_swapped_in
        request.chunks_out += sequence.num_copied_out
        sequence.num_copied_out = 0
        self._account(request, admission, now_s)
        insort(self.running, request, key=lambda r: r.arrival)
        if not request.started:
            request.started = True
            step.started.append(
                RequestStart(
                    request.request_id, request.sampling, tuple(request.tokens[: request.num_prompt])
                )
            )
        step.tables.append(BlockTableUpdate(request.request_id, 0, self.cache.slots_of(sequence)))

    def _account(self, request: Request, admission: Admission, now_s: float) -> None:
        if request.admitted_s is not None:
            request.resume_cpu_tokens += admission.cpu_tokens
            request.resume_recomputed_tokens += sum(stop - start for start, stop in admission.missing)
            return
        request.admitted_s = now_s
        request.gpu_tokens, request.cpu_tokens = admission.gpu_tokens, admission.cpu_tokens
        history = request.history_tokens
        request.recomputed_tokens = sum(
            max(0, min(stop, history) - start) for start, stop in admission.missing
        )
        request.new_tokens = sum(max(0, stop - max(start, history)) for start, stop in admission.missing)
        assert request.sequence is not None
        request.misses = explain(
            self.cache, request.sequence.key, request.tokens, history, request.digests, admission
        )

    def _first_tier_limit(self, sequence: Sequence | None, digests: Tokens[bytes]) -> int:
        """First-tier slots that one request of `sequence` can have, its path having these chain hashes: all but those that others' keeps hold for good."""
        others = 0
        if self.cache.keep_takes_first_tier:
            others = self.cache.num_kept - (
                self.cache.num_own_kept(sequence, digests) if sequence is not None else 0
            )
        return self.cache.places.pools[0].num_slots - others

    # -- endings

    def _take_token(self, request: Request, token: SampledToken, events: StepEvents, now_s: float) -> None:
        request.tokens.append(token.token_id)
        if request.first_token_s is None:
            request.first_token_s = now_s
        events.tokens.append(token)
        if token.token_id in request.sampling.stop_token_ids:
            self._end(request, FinishReason.STOP, now_s)
        elif len(request.tokens) >= request.most_tokens:
            self._end(request, FinishReason.LENGTH, now_s)

    def _end(self, request: Request, reason: FinishReason, now_s: float) -> None:
        request.ending = reason
        if request.in_flight == 0:
            self._settle(request, now_s)

    def _suspend(self, request: Request, now_s: float) -> None:
        request.suspending = True
        if request.in_flight == 0:
            self._settle(request, now_s)

    def _settle(self, request: Request, now_s: float) -> None:
        """No plan names the request any more: carry out what was decided of it."""
        if request.state is RequestState.FINISHED or (request.ending is None and not request.suspending):
            return
        sequence = request.sequence
        if request.state is RequestState.RUNNING:
            assert sequence is not None
            self.running.remove(request)
            request.missing = []
            self.cache.release(sequence, request.tokens, request.digests, now_s if request.failed else None)
            if request.failed:
                self.cache.drop_unread(sequence, now_s)
        if request.ending is None and -(
            -len(request.tokens) // self.cache.chunk_tokens
        ) > self._first_tier_limit(sequence, request.digests):
            request.ending = FinishReason.LENGTH  # it had grown to the whole tier: it could not come back
        if request.ending is not None:
            self._finish(request, now_s)
            return
        request.state, request.suspending, request.failed = RequestState.SUSPENDED, False, False
        request.suspensions += 1
        self.num_suspensions += 1
        extend_digests(request.digests, request.salt, request.tokens, self.cache.chunk_tokens)
        self._queue(request, len(request.tokens))

    def _finish(self, request: Request, now_s: float) -> None:
        key = (request.namespace, request.sequence_id)
        if request in self._waiting:
            self._waiting.remove(request)
        request.state = RequestState.FINISHED
        del self.requests[request.request_id]
        if request.started:
            self._ended.append(request.request_id)
        self._finished.append(request)
        behind = self._behind[key]
        if request in behind:
            behind.remove(request)
            return
        sequence = request.sequence
        assert sequence is not None
        if not self.config.retain:
            self.cache.forget(sequence)
        self.cache.close(sequence, now_s, request.num_output)
        if behind:
            self._enqueue(behind.popleft(), now_s)
        else:
            del self._behind[key]

    def _enqueue(self, request: Request, now_s: float) -> None:
        request.sequence = self.cache.open(request.namespace, request.sequence_id, now_s)
        self._queue(request, len(request.tokens) - request.history_tokens * self.config.retain)

    def _queue(self, request: Request, work: int) -> None:
        """Let a request wait for admission. `work` is what it has to compute as far as is known before a look at the cache."""
        request.work, request.refusal = max(1, work), None
        self._waiting.add(request)

    # -- failures

    def _settle_copies(self, result: StepResult, now_s: float) -> None:
        known = self.cache.places.copies  # (a worker that raised may yet report a copy that was given up)
        for copy_id in result.copies_done:
            if copy_id in known:
                self.cache.finish_copy(copy_id)
        affected: dict[Sequence, str] = {}  # however many copies of one failed, that is one failure
        for failure in result.copies_failed:
            if failure.copy_id not in known:
                continue
            self.num_copies_failed += 1
            for sequence in self.cache.fail_copy(failure.copy_id, failure.source_lost, now_s):
                affected.setdefault(sequence, failure.message)
        for request in self.running:
            if request.sequence in affected:
                self._fail(request, f"a copy of its cache failed: {affected[request.sequence]}")

    def _fail_forward(self, plan: StepPlan, message: str, now_s: float) -> None:
        """Nothing a plan computed is valid. Its requests go on from what they had; one that fails again, alone, is given up."""
        self.num_forwards_failed += 1
        named = {span.request_id: self.requests[span.request_id] for span in plan.spans}
        for request in named.values():
            if request.suspect and not request.failed and len(named) == 1 and request.ending is None:
                request.error = f"computing it failed twice, the second time alone: {message}"
                self._end(request, FinishReason.ERROR, now_s)
            request.suspect = True
            self._fail(request, message)

    def _fail(self, request: Request, message: str) -> None:
        """Void what is in flight for a request; it goes back to the queue and recomputes what it lost."""
        request.num_failures += 1
        request.failed = request.suspending = True
        if request.num_failures > MAX_FAILURES and request.ending is None:
            request.error = f"gave up after {request.num_failures} failures: {message}"
            request.ending = FinishReason.ERROR


def _first_wrong_id(tokens: Tokens[int], vocab_size: int) -> int | None:
    """Where the first id stands that is no integer in [0, vocab_size). Long prompts are looked through by the array's own loop."""
    try:
        array("I", tokens)  # (as they are hashed: none is beyond `MAX_TOKEN_ID`)
        if vocab_size > MAX_TOKEN_ID or max(tokens) < vocab_size:
            return None
    except (TypeError, OverflowError):
        pass
    return next(
        (at for at, token in enumerate(tokens) if not (isinstance(token, int) and 0 <= token < vocab_size)),
        None,
    )
