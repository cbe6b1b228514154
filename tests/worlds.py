"""A scheduler over a worker, fake or real, stepped by hand; every invariant is checked after every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fake_worker import BegunWorker, FakeWorker, LateWorker, cells_of, expected_answer
from pensieve.config import CacheConfig, SchedulerConfig, TierConfig
from pensieve.core.cache import TieredCache
from pensieve.core.checks import check
from pensieve.core.cost import CostProfile
from pensieve.core.eviction import POLICIES
from pensieve.core.pace import Load, Pace
from pensieve.core.plan import RequestFailure, SampledToken, StepPlan, StepResult
from pensieve.core.request import Request, SamplingParams
from pensieve.core.scheduler import Scheduler
from pensieve.core.wipes import Erasure

CHUNK = 4


class World:
    """A second passes between steps; results may come `lag` plans late."""

    def __init__(
        self,
        *slots: int,
        policy: str = "retention",
        worker: Any = None,
        lag: int = 0,
        ahead: bool = False,
        names: str = "gpu cpu disk",
        chunk_tokens: int = CHUNK,
        max_context: int = 400,
        pace: Pace | None = None,
        **config: Any,
    ) -> None:
        tiers = tuple(TierConfig(name, count) for name, count in zip(names.split(), slots, strict=False))
        cost = CostProfile([(chunk_tokens, 1.0), (16 * chunk_tokens, 2.0)], chunk_tokens)
        self.cache = TieredCache(CacheConfig(tiers, chunk_tokens), POLICIES[policy](cost.of_chunk))
        settings = {"max_batch_tokens": 64, "max_running": 8, **config}
        self.scheduler = Scheduler(SchedulerConfig(**settings), self.cache, max_context, pace=pace)
        self.worker: Any = worker or FakeWorker(list(slots), chunk_tokens)
        self.late = BegunWorker(worker) if ahead else LateWorker(self.worker, lag)
        self.timing = getattr(self.worker, "timing", None)
        self.now_s = 0.0
        self.tick_s = 1.0  # between steps, unless the worker tells how long they take
        self.plans: list[StepPlan] = []
        self.num_steps = 0
        self.check_every = 1  # steps
        self.done: dict[str, Request] = {}

    def submit(
        self,
        name: str,
        tokens: list[int],
        answer: int = 1,
        *,
        conversation: str | None = None,
        namespace: str = "n",
        history: int = 0,
    ) -> Request:
        sampling = SamplingParams(max_new_tokens=answer)
        return self.scheduler.submit(
            name, namespace, conversation or name, tuple(tokens), history, sampling, self.now_s
        )

    def step(
        self, change: Callable[[StepPlan, StepResult], StepResult] = lambda plan, result: result
    ) -> StepPlan:
        self.now_s += 0.0 if self.timing else self.tick_s
        plan = self.scheduler.schedule(self.now_s)
        self.plans.append(plan)
        self.check()
        self.late.submit(plan)
        if self.timing and plan.spans:
            self.now_s += self.timing(plan)
        for settled, result in self.late.ready(drain=plan.is_empty):
            finished = self.scheduler.commit(settled, change(settled, result), self.now_s).finished
            for request in finished:
                self.done[request.request_id] = request
            self.check()
        for request in self.scheduler.take_finished():
            self.done[request.request_id] = request
        return plan

    def check(self) -> None:
        self.num_steps += 1
        if self.num_steps % self.check_every == 0:
            check(self.cache)

    def run(self) -> None:
        for _ in range(3000):
            if not self.scheduler.requests:
                return
            self.step()
        raise AssertionError(f"not done: {list(self.scheduler.requests.values())}")

    def turn(
        self,
        name: str,
        tokens: list[int],
        answer: int = 1,
        *,
        conversation: str | None = None,
        namespace: str = "n",
        history: int = 0,
    ) -> Request:
        self.submit(name, tokens, answer, conversation=conversation, namespace=namespace, history=history)
        self.run()
        request = self.done[name]
        assert request.output == expected_answer(tokens, request.num_output)
        return request

    def settle(self, steps: int = 6) -> None:
        for _ in range(steps):
            self.step()

    def places(self, conversation: str) -> str:
        """One character a chunk: both, gpu, lower, dropped."""
        sequence = self.cache.find("n", conversation)
        letters = {(True, True): "b", (True, False): "g", (False, True): "c"}
        return "".join(
            "."
            if chunk is None
            else letters[chunk.slots[0] is not None, any(slot is not None for slot in chunk.slots[1:])]
            for chunk in (sequence.chunks if sequence else [])
        )

    def drop(self, conversation: str, *positions: int) -> None:
        """Drop chunks without a note in the history."""
        sequence = self.cache.find("n", conversation)
        assert sequence is not None
        for position in positions:
            chunk = sequence.chunks[position]
            assert chunk is not None
            for tier in range(self.cache.places.num_tiers - 1, chunk.place or 0, -1):
                if chunk.slots[tier] is not None:
                    self.cache.places.release_lower(chunk, tier)
            self.cache.places.drop(chunk)

    def erase(self, conversation: str) -> Erasure:
        """Begin to erase, stepping until no turn of the conversation is in flight."""
        for _ in range(2000):
            erasure = self.scheduler.forget("n", conversation, self.now_s, erase=True)
            if erasure is not None:
                return erasure
            self.step()
        raise AssertionError("turns stay in flight")

    def finish(self, erasure: Erasure) -> int:
        """Step until it is done. Returns the steps that took."""
        for steps in range(2000):
            if erasure.done:
                return steps
            self.step()
        raise AssertionError(f"never erased: {erasure.slots} {erasure.copies}")

    def remains(self, tokens: list[int]) -> int:
        """How many cells of a token path lie in any tier."""
        cells = set(cells_of(tokens)[0])
        return sum(cell in cells for tier in self.worker.tiers for slot in tier for cell in slot)

    def unclean_free_slots(self) -> list[tuple[int, int]]:
        return [
            (tier, slot)
            for tier, pool in enumerate(self.cache.places.pools)
            for slot in sorted(pool.free_slots())
            if any(self.worker.tiers[tier][slot])
        ]


class TimedWorld(World):
    """A world whose steps take what a machine would: time passes as they run, and the scheduler is told."""

    FIXED_S, ROW_S, READ_S, TOKEN_S, PAIR_S = 0.015, 2e-4, 2e-7, 2.5e-4, 2e-8

    def __init__(
        self,
        *slots: int,
        step_s: float = 0.1,
        slowness: float = 1.0,
        max_context: int = 40_000,
        **config: Any,
    ) -> None:
        worker = QuickWorker(list(slots), CHUNK)
        worker.timing = lambda plan: slowness * self.seconds(Load.of(plan.spans))
        pace = Pace(CostProfile([(CHUNK, 1.0), (max_context, 9.0)], CHUNK))
        super().__init__(
            *slots,
            worker=worker,
            max_context=max_context,
            pace=pace,
            **{"step_s": step_s, "max_batch_tokens": 512, **config},
        )
        self.check_every = 100  # (thousands of chunks)

    def seconds(self, load: Load) -> float:
        return (
            self.FIXED_S
            + self.ROW_S * load.rows
            + self.READ_S * load.reads
            + self.TOKEN_S * load.tokens
            + self.PAIR_S * load.pairs
        )


class QuickWorker(FakeWorker):
    """One whose tokens mean nothing, for contexts too long to compute cell by cell."""

    def _forward(self, plan: StepPlan) -> tuple[list[SampledToken], list[RequestFailure], str | None]:
        return [SampledToken(span.request_id, 7) for span in plan.spans if span.emits_token], [], None


def below(world: World, name: str, tokens: list[int]) -> list[int]:
    """A conversation that others have pushed below."""
    log = world.turn(name, tokens, 1).tokens
    world.cache.room.copy_ahead(1.0, 99, world.now_s)
    world.settle()
    places = world.cache.places
    for chunk in world.cache.find("n", name).chunks:  # type: ignore[union-attr]
        assert chunk is not None and None not in chunk.slots
        slot = places.reclaim(chunk, 0)
        places.pools[0].release(slot)
        places.wipes.released(0, slot, erase=False)
    return log
