"""Who waits for whom: a long prompt beside short turns and beside an answer, over the time that a step may take.

    python benchmarks/fairness.py [--models smollm2-135m,qwen2.5-0.5b] [--step-ms 50,100,200,400] [--prefill 20000] [--threads 1] [--rounds 1]

Random weights of the named shapes (their context made longer where need be), token ids drawn. The engine runs on its own thread; requests
come from this one while steps are under way, and every time is taken here. For each step time: the prefill alone; beside an answer that
decodes; beside short turns (60 new tokens, their history resident), one after the other. Then a dozen prompts of 900 tokens, and a short
turn behind them. `fcfs` is first come, first served in steps bounded by tokens. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import torch
from common import commit, cpu_name, spread

from engine import CHUNK, drawn
from pensieve.config import CacheConfig, SchedulerConfig, TierConfig
from pensieve.core.cache import TieredCache
from pensieve.core.cost import CostProfile
from pensieve.core.eviction import POLICIES
from pensieve.core.pace import Pace
from pensieve.core.plan import SampledToken
from pensieve.core.request import SamplingParams
from pensieve.core.scheduler import Scheduler
from pensieve.engine.engine import Engine
from pensieve.engine.messages import Event, Failed, Finished, Submit
from pensieve.runtime.options import Options
from pensieve.worker.gate import admit
from pensieve.worker.model import CausalModel
from pensieve.worker.presets import PRESETS
from pensieve.worker.random_weights import build
from pensieve.worker.weights import torch_dtype
from pensieve.worker.worker import ModelWorker

HISTORY, NEW = 1000, 60  # tokens of a short turn's history, and new ones
NEVER = 1 << 20  # tokens of an answer that is aborted


class Bench:
    """An engine on a thread of its own, and when its tokens came."""

    def __init__(self, model: CausalModel, step_ms: float | None, num_slots: int) -> None:
        options = Options()
        cost = CostProfile.from_shape(model.shape)
        tiers = (TierConfig("gpu", num_slots),)
        cache = TieredCache(CacheConfig(tiers, CHUNK), POLICIES["retention"](cost.of_chunk))
        config = SchedulerConfig(
            max_batch_tokens=options.batch_tokens, copies_first=True, copy_ahead_share=0.0
        )
        config = (
            replace(config, admission="fcfs") if step_ms is None else replace(config, step_s=step_ms / 1e3)
        )
        self.scheduler = Scheduler(config, cache, num_slots * CHUNK, pace=Pace(cost))
        self.worker = ModelWorker(model, tiers, CHUNK)
        self.engine = Engine(
            self.scheduler, self.worker, chunk_bytes=self.worker.chunk_bytes, emit=self._emit
        )
        self.changed = threading.Condition()
        self.tokens: dict[str, list[float]] = {}  # when they came, by request
        self.outputs: dict[str, tuple[int, ...]] = {}
        self.sent: dict[str, float] = {}
        self.closing = False
        self.engine.start()

    def _emit(self, events: list[Event]) -> None:
        now_s = time.perf_counter()
        with self.changed:
            for event in events:
                match event:
                    case SampledToken():
                        self.tokens[event.request_id].append(now_s)
                    case Finished():
                        self.outputs[event.request_id] = event.output
                    case Failed() if not self.closing:
                        raise AssertionError(event)
            self.changed.notify_all()

    def submit(self, name: str, conversation: str, tokens: list[int], history: int, answer: int) -> None:
        self.tokens[name], self.sent[name] = [], time.perf_counter()
        self.engine.post(
            Submit(name, conversation, "bench", tuple(tokens), history, SamplingParams(max_new_tokens=answer))
        )

    def first_s(self, name: str) -> float:
        """Seconds to the first token; waits for it."""
        with self.changed:
            self.changed.wait_for(lambda: bool(self.tokens[name]))
        return self.tokens[name][0] - self.sent[name]

    def output(self, name: str) -> list[int]:
        with self.changed:
            self.changed.wait_for(lambda: name in self.outputs)
        return list(self.outputs[name])

    def close(self) -> None:
        self.closing = True
        self.engine.close()


def with_context(name: str, length: int, dtype: str) -> CausalModel:
    """Random weights of a preset's shape, for contexts of at least `length` tokens."""
    config = PRESETS[name].config()
    config.max_position_embeddings = max(config.max_position_embeddings, length)
    return admit(build(config, torch_dtype(dtype), "cpu"), label=name, keep_modules=False)


def warm(bench: Bench, rng: random.Random, vocab: int) -> list[int]:
    """Steps of all kinds; returns the log of the conversation `chat`, whose KV stays resident."""
    log = drawn(rng, HISTORY, vocab)
    bench.submit("warm", "chat", log, 0, 24)
    log += bench.output("warm")
    bench.submit("warm 2", "other", drawn(rng, 2048, vocab), 0, 8)
    bench.output("warm 2")
    return log


def prefill_alone(model: CausalModel, step_ms: float | None, length: int, seed: int) -> dict[str, float]:
    rng, vocab = random.Random(seed), model.shape.vocab_size
    bench = Bench(model, step_ms, length // CHUNK + 256)
    log = warm(bench, rng, vocab)
    bench.submit("answer", "chat", log, len(log), 40)
    bench.output("answer")
    times = bench.tokens["answer"]
    decode_s = (times[-1] - times[4]) / (len(times) - 5)
    bench.submit("long", "long", drawn(rng, length, vocab), 0, 1)
    seconds = bench.first_s("long")
    bench.close()
    return {"prefill_s": seconds, "decode_s": decode_s}


def beside_an_answer(model: CausalModel, step_ms: float | None, length: int, seed: int) -> dict[str, float]:
    """A conversation decodes; a long prompt comes."""
    rng, vocab = random.Random(seed), model.shape.vocab_size
    bench = Bench(model, step_ms, length // CHUNK + 1024)
    log = warm(bench, rng, vocab)
    bench.submit("answer", "chat", log, len(log), NEVER)
    bench.first_s("answer")
    time.sleep(1.0)
    bench.submit("long", "long", drawn(rng, length, vocab), 0, 1)
    seconds = bench.first_s("long")
    begin, end = bench.sent["long"], bench.sent["long"] + seconds
    gaps = [
        b - a
        for a, b in zip(bench.tokens["answer"], bench.tokens["answer"][1:], strict=False)
        if begin <= b <= end
    ]
    bench.close()
    return {
        "prefill_s": seconds,
        "token_s": seconds / max(1, len(gaps)),
        "longest_gap_s": max(gaps, default=seconds),
    }


def beside_short_turns(model: CausalModel, step_ms: float | None, length: int, seed: int) -> dict[str, Any]:
    """A long prompt is computed; short turns come, one after the other, a while apart."""
    rng, vocab = random.Random(seed), model.shape.vocab_size
    bench = Bench(model, step_ms, length // CHUNK + 1024)
    log = warm(bench, rng, vocab)
    bench.submit("long", "long", drawn(rng, length, vocab), 0, 1)
    waits: list[float] = []
    while not bench.tokens["long"]:
        time.sleep(rng.uniform(0.5, 1.5))
        if bench.tokens["long"]:
            break
        name, history = f"turn {len(waits)}", len(log)
        log = log + drawn(rng, NEW, vocab)
        bench.submit(name, "chat", log, history, 4)
        wait = bench.first_s(name)
        if not bench.tokens["long"]:
            waits.append(wait)
        log += bench.output(name)
        if len(log) > 3 * HISTORY:
            log = log[:HISTORY]
    seconds = bench.first_s("long")
    bench.close()
    return {
        "prefill_s": seconds,
        "first_token_s": spread(waits) | {"p90": sorted(waits)[len(waits) * 9 // 10]} if waits else None,
    }


def behind_a_dozen(model: CausalModel, step_ms: float | None, seed: int) -> dict[str, float]:
    """A dozen prompts of 900 tokens, then a cached chat's turn: steps and seconds to its first token."""
    rng, vocab = random.Random(seed), model.shape.vocab_size
    bench = Bench(model, step_ms, 1024)
    log = warm(bench, rng, vocab)
    for index in range(12):
        bench.submit(f"p{index}", f"p{index}", drawn(rng, 900, vocab), 0, 4)
    time.sleep(0.3)
    before = bench.engine.num_steps
    bench.submit("turn", "chat", log + drawn(rng, NEW, vocab), len(log), 4)
    seconds = bench.first_s("turn")
    steps = bench.engine.num_steps - before
    bench.close()
    return {"first_token_s": seconds, "steps": steps}


def measure(model: CausalModel, step_ms: float | None, length: int, rounds: int) -> dict[str, Any]:
    runs = []
    for seed in range(rounds):
        run = {
            "alone": prefill_alone(model, step_ms, length, seed), "answer": beside_an_answer(model, step_ms, length, seed),
            "short": beside_short_turns(model, step_ms, length, seed), "dozen": behind_a_dozen(model, step_ms, seed),
        }  # fmt: skip
        run["prefill_over_alone"] = run["answer"]["prefill_s"] / run["alone"]["prefill_s"]
        run["decode_rate_of_alone"] = run["alone"]["decode_s"] / run["answer"]["token_s"]
        runs.append(run)
        print(
            f"{model.label} {'fcfs' if step_ms is None else f'{step_ms:g} ms'} round {seed}: {json.dumps(run)}",
            file=sys.stderr,
            flush=True,
        )
    return {"step_ms": step_ms, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="smollm2-135m,qwen2.5-0.5b")
    parser.add_argument("--step-ms", default="fcfs,50,100,200,400")
    parser.add_argument("--prefill", type=int, default=20_000, help="tokens of the long prompt")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {
        "benchmark": "fairness", "commit": commit(), "prefill": options.prefill, "threads": options.threads, "dtype": options.dtype,
        "torch": torch.__version__, "cpu": cpu_name(), "models": {},
    }  # fmt: skip
    for name in options.models.split(","):
        model = with_context(name, options.prefill + 12_000, options.dtype)
        steps = [None if text == "fcfs" else float(text) for text in options.step_ms.split(",")]
        report["models"][name] = [
            measure(model, step_ms, options.prefill, options.rounds) for step_ms in steps
        ]
        del model
    print(json.dumps(report))


if __name__ == "__main__":
    main()
