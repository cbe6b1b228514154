"""The oracle: whatever the cache did, an answer is what the model's own eager forward over the same ids gives."""

from __future__ import annotations

import contextlib
import functools
import random
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from pensieve.config import CacheConfig, SchedulerConfig, TierConfig
from pensieve.core.cache import TieredCache
from pensieve.core.cost import CostProfile
from pensieve.core.eviction import POLICIES
from pensieve.core.plan import StepPlan, StepResult
from pensieve.core.request import FinishReason, Request, SamplingParams
from pensieve.core.scheduler import Scheduler
from pensieve.errors import ConversationNotFound
from pensieve.worker.gate import admit
from pensieve.worker.model import CausalModel
from pensieve.worker.worker import Hooks, ModelWorker
from tiny_models import tiny

TOLERANCE = 1e-4  # relative to the largest logit, fp32


class EagerRecorder:
    """A graph that is captured by doing its work again whenever it is replayed: over the same tensors, as a real one."""

    num_bytes = 0

    def __init__(self) -> None:
        self.num_replays = 0

    def record(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        work()

        def replay() -> torch.Tensor:
            self.num_replays += 1
            return work()

        return replay


class Lab:
    """A scheduler over a real worker with a tiny model, stepped by hand, invariants checked after every step."""

    def __init__(
        self,
        model: CausalModel,
        slots: tuple[int, ...],
        *,
        policy: str = "retention",
        chunk_tokens: int = 8,
        max_context: int = 120,
        config: SchedulerConfig | None = None,
        hooks: Hooks | None = None,
        attention: str = "auto",
        ahead: bool = False,
        graph_rows: int = 0,
        real_graphs: bool = False,
        make_worker: Callable[..., Any] | None = None,
    ) -> None:
        tiers = tuple(TierConfig(name, n) for name, n in zip(("gpu", "cpu", "disk"), slots, strict=False))
        cost = CostProfile([(chunk_tokens, 1.0), (max_context, 2.0)], chunk_tokens)
        self.cache = TieredCache(CacheConfig(tiers, chunk_tokens), POLICIES[policy](cost.of_chunk))
        self.scheduler = Scheduler(
            config or SchedulerConfig(max_batch_tokens=72, max_running=8), self.cache, max_context
        )
        wants = {"hooks": hooks or Hooks(), "attention": attention}
        if make_worker is None:
            recorder = None if real_graphs else EagerRecorder()
            make_worker = functools.partial(
                ModelWorker, on_device=ahead or None, graph_rows=graph_rows, recorder=recorder
            )
        self.worker = make_worker(model, tiers, chunk_tokens, **wants)
        self.ahead = ahead
        self.begun: deque[StepPlan] = deque()
        self.now_s = 0.0
        self.done: dict[str, Request] = {}

    def submit(
        self,
        request_id: str,
        conversation: str,
        tokens: list[int],
        max_new_tokens: int,
        history_tokens: int = 0,
        **sampling_params: Any,
    ) -> None:
        sampling = SamplingParams(max_new_tokens=max_new_tokens, **{"logprobs": 2, **sampling_params})
        self.scheduler.submit(
            request_id, "n", conversation, tuple(tokens), history_tokens, sampling, self.now_s
        )

    def step(self) -> None:
        self.now_s += 1.0
        plan = self.scheduler.schedule(self.now_s)
        if plan.is_empty:
            time.sleep(1e-3)  # an engine would sleep until a copy wakes it
        self.cache.check()
        if not self.ahead:
            self.commit(plan, self.worker.run(plan))
        else:
            self.worker.begin(plan)
            self.begun.append(plan)
            while len(self.begun) > (0 if plan.is_empty else 1):
                self.commit(self.begun.popleft(), self.worker.finish())
        for request in self.scheduler.take_finished():
            self.done[request.request_id] = request

    def commit(self, plan: StepPlan, result: StepResult) -> None:
        events = self.scheduler.commit(plan, result, self.now_s)
        self.cache.check()
        for request in events.finished:
            self.done[request.request_id] = request

    def run(self, limit: int = 3000) -> None:
        for _ in range(limit):
            if not self.scheduler.requests:
                return
            self.step()
        raise AssertionError(f"not done after {limit} steps: {list(self.scheduler.requests.values())}")

    def erase(self, conversation: str, limit: int = 2000) -> None:
        """Erase it to the last byte, whatever is under way."""
        erasure = None
        for _ in range(limit):
            erasure = erasure or self.scheduler.forget("n", conversation, self.now_s, erase=True)
            if erasure is not None and erasure.done:
                return
            self.step()
        raise AssertionError(f"not erased after {limit} steps: {erasure and (erasure.slots, erasure.copies)}")

    def close(self) -> None:
        self.worker.close()


def eager_logits(reference: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """(S, V) of a fresh, stateless forward."""
    with torch.inference_mode():
        return reference(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()


def assert_answer_is_stateless(reference: torch.nn.Module, request: Request) -> int:
    """Every sampled token is the eager forward's, unless its two best logits are closer than the tolerance. Returns near-ties met."""
    if not request.output:
        return 0
    logits = eager_logits(reference, request.tokens)
    near_ties = 0
    for position, token in enumerate(request.output, start=request.num_prompt):
        row = logits[position - 1]
        best = int(row.argmax())
        if token != best:
            gap = float(row[best] - row[token])
            assert gap <= TOLERANCE * float(row.abs().max()), (
                f"{request.request_id}: token {position} is {token}, a stateless run gives {best}, {gap:.2e} ahead"
            )
            near_ties += 1
    return near_ties


def random_play(
    model: CausalModel,
    reference: torch.nn.Module,
    seed: int,
    *,
    faults: bool,
    attention: str = "auto",
    ahead: bool = False,
    graph_rows: int = 0,
    make_worker: Callable[..., Any] | None = None,
) -> Lab:
    """Random conversations, interleaved and sharing a prefix, through random small tiers, with random trouble."""
    rng = random.Random(seed)

    def maybe(rate: float, message: str) -> None:
        if faults and rng.random() < rate:
            raise RuntimeError(message)

    hooks = Hooks(
        before_copy=lambda copy: maybe(0.1, "injected copy"),
        before_forward=lambda plan: maybe(0.02, "injected forward"),
    )
    slots = (rng.randint(4, 24), rng.choice([0, 4, 30]))
    lab = Lab(
        model,
        slots if slots[1] else slots[:1],
        policy=rng.choice(["lru", "retention"]),
        hooks=hooks,
        attention=attention,
        ahead=ahead,
        graph_rows=graph_rows,
        make_worker=make_worker,
    )
    vocab = model.config.vocab_size
    system = [rng.randrange(vocab) for _ in range(rng.choice([0, 11, 17]))]
    logs = {f"c{i}": list(system) for i in range(rng.randint(2, 4))}
    waiting: dict[str, str] = {}
    longest = min(96, slots[0] * 8)
    for turn in range(rng.randint(4, 9)):
        name = rng.choice(sorted(logs))
        prompt = logs[name] + [rng.randrange(vocab) for _ in range(rng.randint(1, 20))]
        if name in waiting.values() or len(prompt) > longest - 4:
            logs[name] = list(system)  # a new beginning under the same id: a fork at the system prompt
            continue
        lab.submit(f"r{turn}", name, prompt, rng.randint(1, 10), len(logs[name]))
        waiting[f"r{turn}"] = name
        for _ in range(rng.choice([0, 1, 4, 40])):
            lab.step()
        if rng.random() < 0.15:
            lab.scheduler.abort(rng.choice(sorted(waiting)), lab.now_s)
        if rng.random() < 0.15 and lab.cache.places.sole[0].count:
            lab.cache.room.make(0, lab.cache.room.available(0) + 2, lab.now_s)  # an eviction out of the blue
        if rng.random() < 0.3:
            with contextlib.suppress(ConversationNotFound):
                name = rng.choice(sorted(logs))
                lab.scheduler.warm("n", name, lab.now_s) if rng.random() < 0.7 else lab.scheduler.idle(
                    "n", name
                )
        if rng.random() < 0.1:
            name = rng.choice(sorted(logs))
            lab.erase(name)
            logs[name] = list(system)
        for request_id, request in lab.done.items():
            if request_id in waiting:
                logs[waiting.pop(request_id)] = (
                    list(request.tokens) if request.ending is not FinishReason.ABORT else list(system)
                )
    lab.run()
    for request in lab.done.values():
        assert request.ending is not FinishReason.ERROR or faults, request.error
        assert_answer_is_stateless(reference, request)
    for name in logs:
        lab.erase(name)
    assert not any(store.data.any() for store in getattr(lab.worker, "_local", lab.worker)._stores), (
        "bytes are left after everything was erased"
    )
    return lab


def pair(architecture: str, seed: int = 0) -> tuple[CausalModel, torch.nn.Module]:
    """The same tiny random model twice: through the cache, and eager."""
    reference = tiny(architecture, seed)
    reference.set_attn_implementation("eager")
    return admit(tiny(architecture, seed), label=architecture), reference
