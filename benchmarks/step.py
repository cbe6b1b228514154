"""What one engine step costs beside the model's forward: inbox, scheduling, the batch's tensors, sampling, commit, events. No model.

    python benchmarks/step.py [--running 1,8,16,64] [--idle-chunks 10000] [--steps 400] [--read-mb 64]

The engine, scheduler, cache, batch builder, sampler and copying thread are the real ones; the forward hands out fixed logits. Decode steps
only. Events go to another process, as `pensieve serve` sends them. Each figure is a median over the steps, in microseconds on the step's
thread. Twice: `hot`, with a forward that does nothing, and `cold`, with one that reads --read-mb of memory as a model reads its weights, so
that what Python needs has to come back into the processor's caches as it has to in a real step. `samplers` is `Sampler.sample` alone, for
rows that ask for more than the likeliest token. Prints JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import torch
from common import commit

from pensieve.config import CacheConfig, SchedulerConfig, TierConfig
from pensieve.core.cache import TieredCache
from pensieve.core.cost import CostProfile
from pensieve.core.eviction import POLICIES
from pensieve.core.plan import RequestStart, Span
from pensieve.core.request import SamplingParams
from pensieve.core.scheduler import Scheduler
from pensieve.engine.child import Outbox
from pensieve.engine.engine import Engine
from pensieve.engine.messages import Event, Failed, Finished, Submit, Token
from pensieve.engine.wire import receive
from pensieve.worker.attention.base import KVGeometry
from pensieve.worker.batch import Batch
from pensieve.worker.sampler import Sampler
from pensieve.worker.worker import ModelWorker

CHUNK = 32
VOCAB = 49_152
COST = CostProfile([(2**p, 1.0 + 2**p / 10_000) for p in range(5, 15)])
SAMPLERS = {
    "greedy": SamplingParams(),
    "greedy, logprobs 5": SamplingParams(logprobs=5),
    "greedy, penalties": SamplingParams(repetition_penalty=1.1, frequency_penalty=0.2),
    "temperature": SamplingParams(temperature=0.8, seed=1),
    "temperature, min_p": SamplingParams(temperature=0.8, min_p=0.05, seed=1),
    "temperature, top_p": SamplingParams(temperature=0.8, top_p=0.95, seed=1),
    "temperature, top_k": SamplingParams(temperature=0.8, top_k=50, seed=1),
}


class FreeForward(ModelWorker):
    """The worker with fixed logits instead of a model."""

    def __init__(self, tiers: tuple[TierConfig, ...], rows: int) -> None:
        geometry = KVGeometry(num_layers=1, num_kv_heads=1, head_dim=16, dtype=torch.bfloat16)
        model: Any = SimpleNamespace(
            geometry=geometry, device=torch.device("cpu"), attention_args=(), library_bytes=0
        )
        super().__init__(model, tiers, CHUNK, attention="reference")
        self._fixed = logits(rows)
        self.read: torch.Tensor | None = None  # what a forward reads
        self.forward_s = 0.0

    def _logits(self, batch: Batch, swap_in: Any) -> torch.Tensor:
        begin = time.perf_counter()
        if self.read is not None:
            self.read.sum()
        self.forward_s = time.perf_counter() - begin
        return self._fixed[: len(batch.emitting)]


def logits(rows: int) -> torch.Tensor:
    """(E, V), shaped like a model's: a few likely tokens, a long tail."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(rows, VOCAB, generator=generator) * 2.0
    flat[:, :20] += 8.0
    return flat.bfloat16()


class Clock:
    """How long each part of a step took, by wrapping the methods that do it."""

    def __init__(self) -> None:
        self.spent_s: dict[str, float] = {}

    def watch(self, owner: object, method: str, part: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.spent_s[part] = self.spent_s.get(part, 0.0) + time.perf_counter() - begin

        setattr(owner, method, timed)


class World:
    """An engine with a full cache and `num_running` requests in the middle of their answers."""

    def __init__(self, num_running: int, idle_chunks: int, seed: int) -> None:
        rng = random.Random(seed)
        gpu = idle_chunks // 2 + num_running * 130  # the first tier is full of idle chunks: growing reclaims
        tiers = (TierConfig("gpu", gpu), TierConfig("cpu", idle_chunks + num_running * 130))
        cache = TieredCache(CacheConfig(tiers, CHUNK), POLICIES["retention"](COST.of_chunk))
        self.scheduler = Scheduler(
            SchedulerConfig(max_batch_tokens=4096, max_running=max(8, num_running)), cache, 8192, VOCAB
        )
        self.worker = FreeForward(tiers, max(8, num_running))
        self.clock = Clock()
        context = multiprocessing.get_context("fork")
        theirs, ours = context.Pipe(duplex=False)
        self._reader = context.Process(target=drain, args=(theirs, ours), daemon=True)
        self._reader.start()
        theirs.close()
        self._outbox = Outbox(ours)
        self._num_ended = 0
        self.engine = Engine(
            self.scheduler, self.worker, chunk_bytes=self.worker.chunk_bytes, emit=self._emit
        )
        self._fill(idle_chunks, rng)
        for number in range(num_running):
            prompt = drawn(rng, rng.randint(200, 1800))
            self.engine.post(
                Submit(
                    f"request-{number}", f"c{number}", "bench", prompt, 0, SamplingParams(max_new_tokens=6000)
                )
            )
        while len(self.scheduler.running) < num_running or any(
            request.missing for request in self.scheduler.running
        ):
            self.engine.step()

    def _fill(self, idle_chunks: int, rng: random.Random) -> None:
        cache, count = self.scheduler.cache, 0
        while cache.places.num_chunks < idle_chunks:
            prompt = drawn(rng, rng.randint(200, 1800))
            self.engine.post(
                Submit(f"idle-{count}", f"idle-{count}", "bench", prompt, 0, SamplingParams(max_new_tokens=1))
            )
            count += 1
            while self._num_ended < count:
                self.engine.step()
        while cache.places.copies:
            self.engine.step()

    def _emit(self, events: list[Event]) -> None:
        self._outbox.put(events)
        for event in events:
            if type(event) is not Token:
                assert not isinstance(event, Failed), event
                self._num_ended += isinstance(event, Finished)

    def close(self) -> None:
        self.engine.close()
        self._outbox.close()
        self._reader.kill()
        self._reader.join()

    def watch(self) -> None:
        """Take the time of each part from now on."""
        engine, worker, clock = self.engine, self.worker, self.clock
        clock.watch(engine, "_drain_inbox", "inbox")
        clock.watch(self.scheduler, "schedule", "schedule")
        clock.watch(worker, "run", "worker")
        clock.watch(worker._builder, "build", "batch")
        clock.watch(worker._sampler, "launch", "sample")
        clock.watch(worker._sampler, "collect", "sample")
        clock.watch(self.scheduler, "commit", "commit")
        clock.watch(engine, "_emit", "emit")

    def measure(self, num_steps: int, read: torch.Tensor | None) -> dict[str, float]:
        """Medians of each part over some decode steps, in us."""
        worker, samples = self.worker, []
        worker.read = read
        gc.collect()
        for _ in range(num_steps):
            self.clock.spent_s.clear()
            begin = time.perf_counter()
            self.engine.step()
            total = time.perf_counter() - begin
            spent = dict(self.clock.spent_s)
            total -= worker.forward_s
            spent["worker_rest"] = spent.pop("worker") - spent["batch"] - spent["sample"] - worker.forward_s
            spent["engine_rest"] = total - sum(spent.values())
            samples.append({"total": total, **spent})
        return {
            part: round(1e6 * statistics.median(sample[part] for sample in samples), 1) for part in samples[0]
        }


def drain(connection: Connection, other: Connection) -> None:
    """The process that takes events in."""
    other.close()
    try:
        while True:
            receive(connection)
    except EOFError:
        pass


def drawn(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCAB) for _ in range(length))


def measure_samplers(num_running: int, num_steps: int) -> dict[str, float]:
    """Medians of `Sampler.sample` over `num_running` rows that all ask for the same, in us."""
    rows, rng, report = logits(num_running), random.Random(0), {}
    for name, params in SAMPLERS.items():
        sampler = Sampler()
        prompts = [drawn(rng, 500) for _ in range(num_running)]
        sampler.start(RequestStart(f"r{row}", params, prompt) for row, prompt in enumerate(prompts))
        times = []
        with torch.inference_mode():
            for step in range(num_steps + 5):
                spans = [Span(f"r{row}", 499 + step, 500 + step, None, True) for row in range(num_running)]
                begin = time.perf_counter()
                sampler.sample(spans, rows)
                times.append(time.perf_counter() - begin)
        report[name] = round(1e6 * statistics.median(times[5:]), 1)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--running", default="1,8,16,64", help="how many requests run, several with commas")
    parser.add_argument("--idle-chunks", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=400, help="measured, of each kind")
    parser.add_argument("--read-mb", type=int, default=64, help="memory that a cold forward reads")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    read = torch.zeros(options.read_mb << 18)
    report: dict[str, Any] = {
        "benchmark": "step", "commit": commit(), "config": vars(options), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(), "unit": "us, median", "running": {},
    }  # fmt: skip
    for number in map(int, options.running.split(",")):
        world = World(number, options.idle_chunks, options.seed)
        world.watch()
        world.measure(20, None)
        found = {
            "hot": world.measure(options.steps, None),
            "cold": world.measure(max(1, options.steps // 4), read),
            "samplers": measure_samplers(number, 30),
        }
        world.close()
        report["running"][str(number)] = found
        print(f"{number} running: {json.dumps(found)}", file=sys.stderr)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
