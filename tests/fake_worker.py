"""A worker without a model, whose "KV" is checkable: a cell's value depends on every cell before it, as real KV does.

A token sampled over one stale, missing or foreign cell comes out different from what `expected_answer` computes from the token ids alone.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

from pensieve.core.plan import (
    Copy,
    CopyFailure,
    PipelinedWorker,
    RequestFailure,
    SampledToken,
    StepPlan,
    StepResult,
)

MODULUS = (1 << 61) - 1
GARBAGE = -7  # what a failed copy leaves
ZERO = 0  # what a slot holds that was never used, or wiped


def mix(state: int, value: int) -> int:
    return (state * 1_000_003 + value + 12_345) % MODULUS


def cells_of(tokens: list[int]) -> tuple[list[int], int]:
    """The cells of a sequence computed from scratch, and the state after them."""
    state, cells = 1, []
    for token in tokens:
        cells.append(mix(state, token))
        state = mix(state, cells[-1])
    return cells, state


def sample_from(state: int, vocab: int) -> int:
    return (state >> 7) % vocab


def expected_answer(
    prompt: list[int], num_tokens: int, vocab: int = 50, stops: frozenset[int] = frozenset()
) -> list[int]:
    """What a fresh stateless run answers."""
    tokens = list(prompt)
    _, state = cells_of(tokens)
    answer: list[int] = []
    while len(answer) < num_tokens:
        answer.append(sample_from(state, vocab))
        if answer[-1] in stops:
            break
        state = mix(state, mix(state, answer[-1]))
    return answer


class FakeWorker:
    """Runs plans in order at once, or as slowly as it is told to; reports results and finished swap-outs as late as it is told to."""

    timing: Callable[[StepPlan], float] | None = None  # seconds that a plan's spans are said to have taken
    pause_s = 0.0  # of each step that computes, so that something can happen while an answer is made

    def __init__(
        self,
        tier_slots: list[int],
        chunk_tokens: int,
        *,
        rng: random.Random | None = None,
        vocab: int = 50,
        swap_out_delay: int = 0,
        copy_failure_rate: float = 0.0,
        forward_failure_rate: float = 0.0,
        poison: Callable[[int], bool] = lambda token: False,
        sampling_poison: Callable[[int], bool] = lambda token: False,
    ) -> None:
        self.size = chunk_tokens
        self.vocab = vocab
        self.tiers = [[[ZERO] * chunk_tokens for _ in range(n)] for n in tier_slots]
        self.tables: dict[str, list[int]] = {}
        self.last: dict[str, int] = {}
        self.rng = rng or random.Random(0)
        self.swap_out_delay = swap_out_delay
        self.copy_failure_rate = copy_failure_rate
        self.forward_failure_rate = forward_failure_rate
        self.poison, self.sampling_poison = poison, sampling_poison
        self.settling: deque[tuple[int, Copy]] = deque()  # (run at which it settles, copy)
        self.num_runs = 0
        self.num_swapped_in = 0
        self.num_swapped_out = 0

    def set_waker(self, wake: Callable[[], None]) -> None:
        pass

    def close(self) -> None:
        pass

    def run(self, plan: StepPlan) -> StepResult:
        if self.pause_s and plan.spans:
            time.sleep(self.pause_s)
        self.num_runs += 1
        for update in plan.tables:
            table = self.tables.setdefault(update.request_id, [])
            assert update.first <= len(table)
            del table[update.first :]
            table.extend(update.slots)
        done: list[int] = []
        failed: list[CopyFailure] = []
        for tier, slot in plan.wiped:
            self.wipe(tier, slot)
        for copy in plan.swap_in:  # before any swap-out writes below
            if self.rng.random() < self.copy_failure_rate:
                failed.append(CopyFailure(copy.copy_id, self.rng.random() < 0.5, "injected"))
                self.tiers[copy.dst_tier][copy.dst_slot] = [GARBAGE] * self.size
            else:
                self.tiers[copy.dst_tier][copy.dst_slot] = list(self.tiers[copy.src_tier][copy.src_slot])
                done.append(copy.copy_id)
                self.num_swapped_in += 1
        for copy in plan.swap_out:
            self.settling.append(
                (self.num_runs + (0 if plan.settles else self.rng.randint(0, self.swap_out_delay)), copy)
            )
        tokens, broken, error = self._forward(plan)
        self._settle_swap_outs(done, failed)
        for request_id in plan.ended:
            self.tables.pop(request_id, None)
            self.last.pop(request_id, None)
        seconds = self.timing(plan) if self.timing is not None and plan.spans else None
        return StepResult(
            plan.step_id, tuple(tokens), tuple(done), tuple(failed), tuple(broken), error, seconds=seconds
        )

    def wipe(self, tier: int, slot: int) -> None:
        self.tiers[tier][slot] = [ZERO] * self.size

    def _forward(self, plan: StepPlan) -> tuple[list[SampledToken], list[RequestFailure], str | None]:
        tokens: list[SampledToken] = []
        broken: list[RequestFailure] = []
        raises = bool(plan.spans) and self.rng.random() < self.forward_failure_rate
        first = self.tiers[0]
        for span in plan.spans:
            table = self.tables[span.request_id]
            ids = span.token_ids if span.token_ids is not None else (self.last.get(span.request_id, 0),)
            assert len(ids) == span.stop - span.start
            raises |= any(self.poison(token) for token in ids)
            state = 1
            for position in range(span.start):
                state = mix(state, first[table[position // self.size]][position % self.size])
            for position, token in zip(range(span.start, span.stop), ids, strict=True):
                cell = mix(state, token)
                first[table[position // self.size]][position % self.size] = cell
                state = mix(state, cell)
            if not span.emits_token:
                continue
            if any(self.sampling_poison(token) for token in ids):
                broken.append(RequestFailure(span.request_id, "sampling broke"))
                continue
            self.last[span.request_id] = sample_from(state, self.vocab)
            tokens.append(SampledToken(span.request_id, self.last[span.request_id]))
        return ([], [], "the forward broke") if raises else (tokens, broken, None)

    def _settle_swap_outs(self, done: list[int], failed: list[CopyFailure]) -> None:
        waiting = deque[tuple[int, Copy]]()
        for due, copy in self.settling:
            if due > self.num_runs:
                waiting.append((due, copy))
            elif self.rng.random() < self.copy_failure_rate:
                failed.append(CopyFailure(copy.copy_id, False, "injected"))
            else:  # read as late as possible: what must not change until it settles, must not have changed
                self.tiers[copy.dst_tier][copy.dst_slot] = list(self.tiers[copy.src_tier][copy.src_slot])
                done.append(copy.copy_id)
                self.num_swapped_out += 1
        self.settling = waiting


class LateWorker:
    """Hands out each result `lag` plans late, as a worker that runs behind the scheduler does."""

    def __init__(self, worker: FakeWorker, lag: int) -> None:
        self.worker, self.lag = worker, lag
        self.queue: deque[tuple[StepPlan, StepResult]] = deque()

    def submit(self, plan: StepPlan) -> None:
        self.queue.append((plan, self.worker.run(plan)))

    def ready(self, *, drain: bool = False) -> list[tuple[StepPlan, StepResult]]:
        ready = []
        while len(self.queue) > (0 if drain else self.lag):
            ready.append(self.queue.popleft())
        return ready


class BegunWorker:
    """Begins each step before it finishes the one before, as an engine with `ahead` does."""

    def __init__(self, worker: PipelinedWorker) -> None:
        self.worker = worker
        self.begun: deque[StepPlan] = deque()

    def submit(self, plan: StepPlan) -> None:
        self.worker.begin(plan)
        self.begun.append(plan)

    def ready(self, *, drain: bool = False) -> Iterator[tuple[StepPlan, StepResult]]:
        while len(self.begun) > (0 if drain else 1):
            yield self.begun.popleft(), self.worker.finish()


def void(result: StepResult) -> StepResult:
    """A result with its tokens taken out, for tests."""
    return replace(result, tokens=())
