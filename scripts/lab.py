"""What the two checks share: a tiny real model over the real scheduler and cache, stepped by hand, and a list of named results.

The model has random weights, so its answers mean nothing, but every token depends on every KV byte before it: a wrong, stale or foreign
chunk changes them. The judge is the same model's own eager forward over the same token ids, with no cache at all.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pensieve.config import CacheConfig, SchedulerConfig, TierConfig
from pensieve.core.cache import TieredCache
from pensieve.core.checks import check
from pensieve.core.cost import CostProfile
from pensieve.core.eviction import RetentionValue
from pensieve.core.plan import StepPlan
from pensieve.core.request import Request, SamplingParams
from pensieve.core.scheduler import Scheduler
from pensieve.core.sequence import Sequence
from pensieve.worker.gate import admit
from pensieve.worker.worker import Hooks, ModelWorker

CHUNK = 8
VOCAB = 199
NEAR_TIE = 1e-4  # of the largest logit: closer than this, either token is right (fp32)


def tiny_llama() -> LlamaForCausalLM:
    """Two layers, random weights wide enough that attention matters; the same every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 1.0 if "embed" in name else 0.3)
    return model.eval()


class Lab:
    """Scheduler, cache and worker; `check()` runs after every step."""

    def __init__(self, gpu: int, cpu: int, hooks: Hooks = Hooks()) -> None:
        tiers = (TierConfig("gpu", gpu), TierConfig("cpu", cpu))
        cost = CostProfile([(CHUNK, 1.0), (256, 2.0)], CHUNK)
        self.cache = TieredCache(CacheConfig(tiers, CHUNK), lambda: RetentionValue(cost.of_chunk))
        self.scheduler = Scheduler(
            SchedulerConfig(max_batch_tokens=64, max_running=8), self.cache, max_context=200
        )
        self.worker = ModelWorker(admit(tiny_llama(), label="tiny llama"), tiers, CHUNK, hooks=hooks)
        self.reference = tiny_llama()
        self.reference.set_attn_implementation("eager")
        self.now_s = 0.0
        self.plans: list[StepPlan] = []
        self.done: dict[str, Request] = {}

    def submit(self, name: str, conversation: str, tokens: list[int], answer: int, history: int = 0) -> None:
        """Queue one turn."""
        self.scheduler.submit(
            name,
            "lab",
            conversation,
            tuple(tokens),
            history,
            SamplingParams(max_new_tokens=answer),
            self.now_s,
        )

    def step(self) -> None:
        """One step, every invariant verified before and after it."""
        self.now_s += 1.0
        plan = self.scheduler.schedule(self.now_s)
        if plan.is_empty:
            time.sleep(1e-3)  # an engine would sleep until a copy wakes it
        check(self.cache)
        self.plans.append(plan)
        events = self.scheduler.commit(plan, self.worker.run(plan), self.now_s)
        check(self.cache)
        self._collect(events.finished)

    def run(self, limit: int = 4000) -> None:
        """Step until every request has ended."""
        for _ in range(limit):
            if not self.scheduler.requests:
                self._collect(self.scheduler.take_finished())
                return
            self.step()
        raise AssertionError(f"requests did not end within {limit} steps: {sorted(self.scheduler.requests)}")

    def _collect(self, finished: list[Request]) -> None:
        for request in finished:
            self.done[request.request_id] = request

    def settle(self) -> None:
        """Step until no copy is under way."""
        for _ in range(4000):
            if not self.cache.places.copies:
                return
            self.step()
        raise AssertionError("copies did not settle")

    def turn(
        self, name: str, conversation: str, tokens: list[int], answer: int = 6, history: int = 0
    ) -> Request:
        """Submit one turn and run it to its end."""
        self.submit(name, conversation, tokens, answer, history)
        self.run()
        return self.done[name]

    def sequence(self, conversation: str) -> Sequence:
        """What is cached of a conversation."""
        sequence = self.cache.find("lab", conversation)
        assert sequence is not None, f"nothing is cached for {conversation}"
        return sequence

    def wrong_tokens(self, request: Request) -> int:
        """Sampled tokens that a stateless run over the same ids would not give (near-ties forgiven)."""
        with torch.inference_mode():
            logits = self.reference(input_ids=torch.tensor([request.tokens]), use_cache=False).logits[0]
        wrong = 0
        for position, token in enumerate(request.output, start=request.num_prompt):
            row = logits[position - 1]
            wrong += float(row.max() - row[token]) > NEAR_TIE * float(row.abs().max())
        return wrong

    def close(self) -> None:
        """Stop the worker."""
        self.worker.close()


def prompt(seed: int, length: int) -> list[int]:
    """Token ids, the same for the same seed."""
    return [(seed * 31 + 7 * i + i * i) % VOCAB for i in range(length)]


def run_checks(title: str, checks: list[tuple[str, Callable[[], str]]]) -> int:
    """Run named checks, print a line each and a summary line; returns the exit status.

    A check returns what it saw, and raises when it saw wrong.
    """
    failures = 0
    for name, run in checks:
        try:
            print(f"  ok    {name}: {run()}", flush=True)
        except Exception as error:  # whatever a broken cache raises is a failed check
            failures += 1
            print(f"  FAIL  {name}: {type(error).__name__}: {error}", flush=True)
    passed = len(checks) - failures
    print(
        f"{title}: {passed} of {len(checks)} checks passed" + ("" if not failures else f", {failures} FAILED")
    )
    sys.stdout.flush()
    return 1 if failures else 0
