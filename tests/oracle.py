"""The oracle: whatever the cache did, an answer is what the model's own eager forward over the same ids gives."""

from __future__ import annotations

import contextlib
import functools
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from pensieve.config import SchedulerConfig, TierConfig
from pensieve.core.plan import StepPlan
from pensieve.core.request import FinishReason, Request, SamplingParams
from pensieve.core.wipes import Erasure
from pensieve.errors import ConversationNotFound
from pensieve.worker.gate import admit
from pensieve.worker.model import CausalModel
from pensieve.worker.worker import Hooks, ModelWorker
from tiny_models import tiny
from worlds import World

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


class Lab(World):
    """A world whose worker is a real one with a tiny model."""

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
        if make_worker is None:
            recorder = None if real_graphs else EagerRecorder()
            make_worker = functools.partial(
                ModelWorker, on_device=ahead or None, graph_rows=graph_rows, recorder=recorder
            )
        worker = make_worker(model, tiers, chunk_tokens, hooks=hooks or Hooks(), attention=attention)
        settings = {"max_batch_tokens": 72} if config is None else asdict(config)
        super().__init__(
            *slots,
            policy=policy,
            worker=worker,
            ahead=ahead,
            chunk_tokens=chunk_tokens,
            max_context=max_context,
            **settings,
        )

    def submit(  # type: ignore[override]
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

    def step(self, *changes: Any) -> StepPlan:
        plan = super().step(*changes)
        if plan.is_empty:
            time.sleep(1e-3)  # an engine would sleep until a copy wakes it
        return plan

    def erase(self, conversation: str) -> Erasure:
        """Erase it to the last byte, whatever is under way."""
        erasure = super().erase(conversation)
        self.finish(erasure)
        return erasure

    def close(self) -> None:
        self.worker.close()


def eager_logits(reference: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """(S, V) of a fresh, stateless forward."""
    with torch.inference_mode():
        logits: torch.Tensor = reference(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits.float()


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
        if rng.random() < 0.15 and lab.cache.places.only_copy[0].count:
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
