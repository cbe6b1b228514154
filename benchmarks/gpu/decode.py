"""What a decode step takes, of what memory allows; and how long the device idles while the host thinks.

    python benchmarks/gpu/decode.py [--parts steps,host] [--out FILE]
    python benchmarks/gpu/decode.py --device cpu --quick

steps  decoding with 1, 8 and 64 requests through the engine: the time of a step against (weights + KV bytes) / copy bandwidth.
host   256 requests: the host's work in a step (scheduling, the worker's call, committing) and the device's idle share.

Model: Llama 3-8B's shape with random weights; its logits are compared with those of the reference attention first. A step's time is the host's
over many steps; the device's busy time comes from a profile of some more of them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if (
    not __package__
):  # Python puts this very folder on its path, whose modules are meant to be found in their package only
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from gpu.common import CHUNK, Report, copy_bytes_per_s, device_busy_s, parser, spread
from gpu.models import BATCH_TOKENS, Loaded, World, check, drawn, greedy, load
from pensieve.engine.messages import Event, Failed, Submit

MODEL = "llama3-8b"
WARM_UP = 4  # blocks of steps before the first that counts: graphs are captured there


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured; small on a CPU."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    running: int  # in `host`
    running_context: int
    block: int  # steps timed as one
    profiled: int  # steps in the profile
    copied_bytes: int


FULL = Sizes((1, 8, 64), (1024, 4096), 256, 512, 16, 16, 1 << 30)
QUICK = Sizes((1, 3), (40,), 6, 20, 3, 2, 1 << 20)


class Decoding:
    """An engine whose requests are all in the middle of their answers."""

    def __init__(
        self, loaded: Loaded, attention: str, running: int, context: int, num_steps: int, seed: int
    ) -> None:
        rng, vocab = random.Random(seed), loaded.model.shape.vocab_size
        # The first requests decode while the prompts of the last are computed.
        num_steps += 2 * -(-running * context // (BATCH_TOKENS - running)) + 8
        chunks = -(-(context + num_steps + 8) // CHUNK)
        self.running = running
        self.failed: list[Failed] = []
        self.world = World(
            loaded,
            int(running * chunks / 0.85) + 16,
            0,
            attention=attention,
            emit=self._emit,
            max_running=max(8, running),
        )
        engine, scheduler = self.world.engine, self.world.scheduler
        for number in range(running):
            engine.post(
                Submit(
                    f"r{number}", f"c{number}", "bench", drawn(rng, context, vocab), 0, greedy(num_steps + 4)
                )
            )
        while len(scheduler.running) < running or any(request.missing for request in scheduler.running):
            engine.step()
            if self.failed:
                raise RuntimeError(f"a request failed: {self.failed[0].message}")

    def _emit(self, events: list[Event]) -> None:
        self.failed += [event for event in events if isinstance(event, Failed)]

    def steps(self, count: int) -> float:
        """Seconds a step, over so many, in which every request decodes."""
        begin = time.perf_counter()
        for _ in range(count):
            self.world.engine.step()
        took_s = (time.perf_counter() - begin) / count
        if self.failed or len(self.world.scheduler.running) != self.running:
            raise RuntimeError(
                f"{len(self.world.scheduler.running)} of {self.running} requests still run: {self.failed[:1]}"
            )
        return took_s

    def context_now(self) -> float:
        """Mean length of the requests, tokens."""
        return statistics.mean(len(request.tokens) for request in self.world.scheduler.running)


class HostClock:
    """How long each part of a step keeps the host, by wrapping the methods that do it."""

    def __init__(self) -> None:
        self.spent_s: dict[str, list[float]] = {}

    def watch(self, owner: object, method: str) -> None:
        """Take the time of a method from now on."""
        inner: Callable[..., Any] = getattr(owner, method)
        spent = self.spent_s.setdefault(method, [])

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                spent.append(time.perf_counter() - begin)

        setattr(owner, method, timed)


class Bench:
    """The parts of this benchmark."""

    def __init__(self, report: Report, options: argparse.Namespace) -> None:
        self.report, self.options, self.repeats = report, options, options.repeats
        self.sizes = QUICK if options.quick else FULL
        self.copy_rate = report.limit(
            "copy_bytes_per_s", copy_bytes_per_s(report.device, self.repeats, self.sizes.copied_bytes)
        )
        self.loaded = load(report, MODEL)
        with torch.inference_mode():
            check(report, self.loaded)

    def _decoding(self, running: int, context: int) -> Decoding:
        num_steps = self.sizes.block * (self.repeats + WARM_UP) + self.sizes.profiled + 8
        begin = time.perf_counter()
        decoding = Decoding(
            self.loaded, self.options.attention, running, context, num_steps, self.options.seed
        )
        self.report.note("attention", decoding.world.worker.attention)
        self.report.say(f"{running} x {context}: prompts computed in {time.perf_counter() - begin:.1f} s")
        for _ in range(WARM_UP):
            decoding.steps(self.sizes.block)
        return decoding

    def steps(self) -> None:
        for context in self.sizes.contexts:
            for batch in self.sizes.batches:
                name = f"step {batch} x {context}"
                if self.report.fits(name, 15 + batch * context / 5000 if self.report.judges else 1):
                    with self.report.attempt(name):
                        self._step(name, batch, context)

    def _step(self, name: str, batch: int, context: int) -> None:
        decoding = self._decoding(batch, context)
        try:
            times, lengths = [], []
            for _ in range(self.repeats):
                times.append(decoding.steps(self.sizes.block))
                lengths.append(decoding.context_now())
            busy = self._busy(decoding)
        finally:
            decoding.world.close()
        step_s = statistics.median(times)
        kv_bytes = batch * statistics.mean(lengths) * self.loaded.kv_bytes_per_token
        limit_s = (self.loaded.weight_bytes + kv_bytes) / self.copy_rate
        figures = {
            "batch": batch, "context": statistics.mean(lengths), "step_ms": spread([1e3 * s for s in times]), "limit_ms": 1e3 * limit_s,
            "weights_gb": self.loaded.weight_bytes / 1e9, "kv_gb": kv_bytes / 1e9, "of_limit": limit_s / step_s, **idle(busy, step_s),
        }  # fmt: skip
        self.report.goal(f"{name}: of the memory's limit", limit_s / step_s, 0.70, at_least=True)
        self.report.case(
            name,
            figures,
            f"{1e3 * step_s:.2f} ms, memory allows {1e3 * limit_s:.2f}: {limit_s / step_s:.0%}{told(figures)}",
        )

    def _busy(self, decoding: Decoding) -> tuple[float, float] | None:
        """Seconds a step in which the device was busy, and seconds a step of the profile."""
        try:
            found = device_busy_s(self.report.device, lambda: decoding.steps(self.sizes.profiled))
        except RuntimeError as error:
            self.report.skip("the device's idle share", str(error))
            return None
        return None if found is None else (found[0] / self.sizes.profiled, found[1] / self.sizes.profiled)

    def host(self) -> None:
        name = f"host {self.sizes.running} running"
        if self.report.fits(name, 60 if self.report.judges else 1):
            with self.report.attempt(name):
                self._host(name)

    def _host(self, name: str) -> None:
        decoding = self._decoding(self.sizes.running, self.sizes.running_context)
        world = decoding.world
        try:
            times = [decoding.steps(self.sizes.block) for _ in range(self.repeats)]
            busy = self._busy(decoding)
            clock = HostClock()
            clock.watch(world.scheduler, "schedule")
            clock.watch(world.scheduler, "commit")
            for method in (
                ("begin", "finish") if world.ahead else ("run",)
            ):  # ("finish" is mostly waiting for the device)
                clock.watch(world.worker, method)
            decoding.steps(self.sizes.profiled)
        finally:
            world.close()
        step_s = statistics.median(times)
        parts = {method: 1e6 * statistics.median(spent) for method, spent in clock.spent_s.items() if spent}
        figures: dict[str, Any] = {
            "running": self.sizes.running,
            "step_ms": spread([1e3 * s for s in times]),
            "host_us": parts,
            **idle(busy, step_s),
        }
        if busy is not None:
            self.report.goal(f"{name}: the device's idle share", figures["idle_share"], 0.03, at_least=False)
        line = ", ".join(f"{method} {spent_us:.0f} µs" for method, spent_us in parts.items())
        self.report.case(name, figures, f"{1e3 * step_s:.2f} ms a step; {line}{told(figures)}")


def idle(busy: tuple[float, float] | None, step_s: float) -> dict[str, float]:
    """Busy time and idle shares of a step. The profile slows the host, so its own share is an upper bound."""
    if busy is None:
        return {}
    busy_s, profiled_s = busy
    return {
        "busy_ms": 1e3 * busy_s,
        "idle_share": max(0.0, 1 - busy_s / step_s),
        "idle_share_profiled": max(0.0, 1 - busy_s / profiled_s),
    }


def told(figures: dict[str, Any]) -> str:
    """The idle share for people, if it is known."""
    return (
        f"; the device busy {figures['busy_ms']:.2f} ms, idle {figures['idle_share']:.1%}"
        if "busy_ms" in figures
        else ""
    )


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--parts", default="steps,host")
    options = arguments.parse_args()
    report = Report("decode", options)
    with report.attempt("the model"):
        bench = Bench(report, options)
        for part in options.parts.split(","):
            {"steps": bench.steps, "host": bench.host}[part]()
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
