"""Measures what the engine adds to a step: planning it, and taking its result in.

Knows schedulers and clocks; never models.

A real worker computes between two plans: caches of the processor that Python needs are cold then, as in
service.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from pensieve.config import CacheConfig, SchedulerConfig, TierConfig
from pensieve.core.cache import TieredCache
from pensieve.core.cost import CostProfile
from pensieve.core.eviction import POLICIES
from pensieve.core.plan import StepPlan, StepResult
from pensieve.core.request import SamplingParams
from pensieve.core.scheduler import Scheduler, StepEvents
from pensieve.engine.engine import Engine
from pensieve.worker.worker import ModelWorker

_WARM_UPS = 2  # steps before those that count
_REQUESTS = (1, 16)  # of the steps whose planning is timed: a line through both gives a constant and a slope
_STEPS = 24  # that count, for each number of requests
# The conversation whose turns' ends are timed: tokens of its first prompt, of each further turn, and of each
# answer; turns.
_ENDED_CONTEXT, _ENDED_NEW, _ENDED_ANSWER, _ENDED_TURNS = 512, 100, 4, 5


@dataclass(frozen=True, slots=True)
class PlanningCosts:
    """Seconds beside the worker; see the fields of the same names of `Profile`."""

    plan_step_s: float
    plan_request_s: float
    commit_step_s: float
    commit_request_s: float
    commit_end_s: float


def planning_costs(
    worker: ModelWorker,
    vocab_size: int,
    num_slots: int,
    max_context: int,
    chunk_tokens: int,
    clock: Callable[[], float],
) -> PlanningCosts:
    """Measure them with a scheduler over a worker's first tier.

    Args:
        worker: no request is under way in it.
        vocab_size: of its model.
        num_slots: of the first tier.
        max_context: longest context, tokens.
        chunk_tokens: tokens of one slot.
        clock: seconds.
    """
    players = _Players(worker, vocab_size, num_slots, chunk_tokens, clock)
    room = num_slots * chunk_tokens  # tokens
    few, many = (players.decodes(count, min(max_context, room // count)) for count in _REQUESTS)
    return PlanningCosts(
        *_line(few[0], many[0]), *_line(few[1], many[1]), players.endings(min(max_context, room))
    )


class _TimedScheduler(Scheduler):
    """Notes the seconds of each plan, and those from each result to the next plan."""

    def watch(self, clock: Callable[[], float]) -> None:
        """Note times from now on."""
        self._timer = clock
        self._committed: tuple[float, int, int] | None = None
        self.plans: list[tuple[float, int]] = []  # (seconds, spans)
        self.gaps: list[tuple[float, int, int]] = []  # (seconds, spans of the result, answers that ended)

    def schedule(self, now_s: float) -> StepPlan:
        begin = self._timer()
        if self._committed is not None:
            committed_s, num_spans, num_ended = self._committed
            self.gaps.append((begin - committed_s, num_spans, num_ended))
            self._committed = None
        plan = super().schedule(now_s)
        self.plans.append((self._timer() - begin, len(plan.spans)))
        return plan

    def commit(self, plan: StepPlan, result: StepResult, now_s: float) -> StepEvents:
        events = super().commit(plan, result, now_s)
        if plan.spans:
            self._committed = (now_s, len(plan.spans), len(events.finished))
        return events


class _Players:
    """Plays conversations through an engine over the worker."""

    def __init__(
        self,
        worker: ModelWorker,
        vocab_size: int,
        num_slots: int,
        chunk_tokens: int,
        clock: Callable[[], float],
    ) -> None:
        self._worker, self._vocab_size, self._clock = worker, vocab_size, clock
        self._num_slots, self._chunk_tokens = num_slots, chunk_tokens

    def decodes(self, count: int, max_context: int) -> tuple[float, float]:
        """Seconds to plan a step of so many decodes, and to commit it."""
        if max_context < 4:
            return 0.0, 0.0
        scheduler = self._scheduler(count, max_context)
        answer = min(_STEPS + _WARM_UPS, max_context - 2)
        for row in range(count):
            # (ids of its own for each: nothing is shared)
            scheduler.submit(
                f"planned {count} {row}",
                "profile",
                str(row),
                (row, row),
                0,
                SamplingParams(max_new_tokens=answer),
                self._clock(),
            )
        self._play(scheduler)
        plans = [seconds for seconds, num_spans in scheduler.plans if num_spans == count][_WARM_UPS:]
        gaps = [
            seconds
            for seconds, num_spans, num_ended in scheduler.gaps
            if num_spans == count and not num_ended
        ][_WARM_UPS:]
        return statistics.median(plans or [0.0]), statistics.median(gaps or [0.0])

    def endings(self, max_context: int) -> float:
        """Seconds that a commit takes more in which an answer ends.

        Of a conversation as long as they usually are, turn by turn.
        """
        first = min(_ENDED_CONTEXT, max_context // 2)
        new = min(_ENDED_NEW, first // _ENDED_TURNS)
        if new < _ENDED_ANSWER + 1:
            return 0.0
        scheduler = self._scheduler(1, max_context)
        vocabulary = self._vocab_size
        for turn in range(_ENDED_TURNS):
            length = first + turn * new
            tokens = tuple(position * 7919 % vocabulary for position in range(length))
            sampling = SamplingParams(max_new_tokens=_ENDED_ANSWER)
            scheduler.submit(
                f"ended {turn}", "profile", "ended", tokens, max(0, length - new), sampling, self._clock()
            )
            self._play(scheduler)
        ends, others = (
            [seconds for seconds, _, ended in scheduler.gaps if bool(ended) == asked]
            for asked in (True, False)
        )
        return max(0.0, statistics.median(ends) - statistics.median(others))

    def _scheduler(self, count: int, max_context: int) -> _TimedScheduler:
        """A real one over the slots that are there."""
        cost = CostProfile([(self._chunk_tokens, 1.0)], self._chunk_tokens)
        tiers = (TierConfig("gpu", self._num_slots),)
        cache = TieredCache(CacheConfig(tiers, self._chunk_tokens), POLICIES["retention"](cost.of_chunk))
        config = SchedulerConfig(
            max_batch_tokens=self._chunk_tokens + 2 * count, max_running=count, reserve_share=0.0
        )
        scheduler = _TimedScheduler(config, cache, max_context)
        scheduler.watch(self._clock)
        return scheduler

    def _play(self, scheduler: Scheduler) -> None:
        """Steps until every request has ended and the worker has forgotten it."""
        chunk_bytes = self._worker.chunk_bytes
        engine = Engine(
            scheduler, self._worker, chunk_bytes=chunk_bytes, emit=lambda events: None, clock=self._clock
        )
        while scheduler.requests:
            engine.step()
        engine.step()


def _line(few_s: float, many_s: float) -> tuple[float, float]:
    """A constant and a slope, at least 0 each, through what the fewest and the most requests took."""
    few, many = _REQUESTS
    slope = max(0.0, many_s - few_s) / (many - few)
    return max(0.0, few_s - few * slope), slope
