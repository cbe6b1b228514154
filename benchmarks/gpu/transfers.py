"""What moving KV between the tiers costs: copies against a plain memcpy, steps beside swap-outs, a turn whose history is swapped in.

    python benchmarks/gpu/transfers.py [--parts copies,beside,swapped] [--out FILE]
    python benchmarks/gpu/transfers.py --device cpu --quick

copies   swap-out and swap-in of scattered chunks through `Transfer`, against a memcpy of as many bytes between the device and pinned memory.
beside   decode steps while every step also swaps out as much as the link carries in its time, against the same steps without.
swapped  time to the first token of a turn whose history of 4k comes in from the cpu tier, against the same turn with the history resident;
         beside it, how long one layer takes to copy and to compute: only where copying is the shorter can it be hidden.

Copied bytes are compared, and the tokens of swapped-in turns with those of resident ones. Model: Llama 2-13B-GQA with random weights. Times are the
host's, from the call to the end of its work. The last line is JSON.
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

from gpu.common import CHUNK, DTYPES, Report, parser, spread
from gpu.models import BATCH_TOKENS, Loaded, Steps, check, config_of, drawn, load
from pensieve.config import TierConfig
from pensieve.core.plan import BlockTableUpdate, Copy, RequestStart, Span
from pensieve.core.request import SamplingParams
from pensieve.worker.kv_store import KVStore
from pensieve.worker.model import shape_of
from pensieve.worker.transfer import Transfer
from pensieve.worker.worker import ModelWorker

MODEL = "llama2-13b-gqa"
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured; small on a CPU."""

    chunks: tuple[int, ...]  # copied at once
    running: int
    context: int  # of each running request
    steps: int  # in one block of decode steps
    idle: int  # chunks of the first tier that are swapped out beside
    history: int
    new: tuple[int, ...]  # tokens of the turn


FULL = Sizes((64, 256), 32, 1024, 12, 256, 4096, (60, 512, 1024))
QUICK = Sizes((6, 9), 3, 70, 3, 8, 96, (20, 40))


class Bench:
    """The parts of this benchmark."""

    def __init__(self, report: Report, options: argparse.Namespace) -> None:
        self.report, self.options, self.repeats = report, options, options.repeats
        self.sizes = QUICK if options.quick else FULL
        self.shape = shape_of(config_of(MODEL, quick=options.quick))
        layer_bytes = (
            2 * CHUNK * self.shape.num_kv_heads * self.shape.head_dim * DTYPES[options.dtype].itemsize
        )
        self.layer_bytes, self.slot_bytes = layer_bytes, layer_bytes * self.shape.num_layers
        self.rates = {"out": 0.0, "in": 0.0}  # of a memcpy, bytes a second
        self._loaded: Loaded | None = None

    # -- copies

    def copies(self) -> None:
        for count in self.sizes.chunks:
            name = f"copies {count}"
            if self.report.fits(name, 30 if self.report.judges else 1):
                with self.report.attempt(name), torch.inference_mode():
                    self._copies(name, count)

    def _copies(self, name: str, count: int) -> None:
        pinned = self.report.device.type == "cuda"
        slots = count * 5 // 4
        gpu = KVStore(slots, self.shape.num_layers, self.layer_bytes, self.report.device)
        cpu = KVStore(slots, self.shape.num_layers, self.layer_bytes, CPU, pinned=pinned)
        gpu.data.random_(0, 256)
        host = torch.empty(count * self.slot_bytes, dtype=torch.uint8, pin_memory=pinned)
        device = torch.empty(count * self.slot_bytes, dtype=torch.uint8, device=self.report.device)
        rng = random.Random(self.options.seed)
        pairs = list(zip(rng.sample(range(slots), count), rng.sample(range(slots), count), strict=True))
        transfer = Transfer((gpu, cpu))
        try:
            works: dict[str, Callable[[], object]] = {
                "swap out": lambda: run_copies(
                    transfer, [Copy(i, 0, a, 1, b) for i, (a, b) in enumerate(pairs)], up=False
                ),
                "memcpy out": lambda: host.copy_(device, non_blocking=True),
                "swap in": lambda: run_copies(
                    transfer, [Copy(i, 1, b, 0, a) for i, (a, b) in enumerate(pairs)], up=True
                ),
                "memcpy in": lambda: device.copy_(host, non_blocking=True),
            }
            self._check_copies(name, gpu, cpu, pairs, works)
            seconds = self._walls(works)
        finally:
            transfer.close()
        num_bytes = count * self.slot_bytes
        figures: dict[str, Any] = {
            work: {"ms": spread([1e3 * s for s in all_])} for work, all_ in seconds.items()
        }
        rates = {work: num_bytes / statistics.median(all_) for work, all_ in seconds.items()}
        for work, rate in rates.items():
            figures[work]["gb_per_s"] = rate / 1e9
        for way in ("out", "in"):
            self.rates[way] = max(self.rates[way], rates[f"memcpy {way}"])
            share = rates[f"swap {way}"] / rates[f"memcpy {way}"]
            figures[f"swap_{way}_over_memcpy"] = share
            self.report.goal(f"swap-{way} of {count} chunks: speed, of a memcpy", share, 0.85, at_least=True)
        figures["mb"] = num_bytes / 1e6
        line = ", ".join(f"{work} {rate / 1e9:.1f} GB/s" for work, rate in rates.items())
        self.report.case(name, figures, f"{num_bytes / 1e6:.0f} MB: {line}")

    def _check_copies(
        self,
        name: str,
        gpu: KVStore,
        cpu: KVStore,
        pairs: list[tuple[int, int]],
        works: dict[str, Callable[[], object]],
    ) -> None:
        """Out, the first tier made worthless, and in again: are all bytes there, and no others touched?"""
        before = gpu.data.clone()
        mine, theirs = [a for a, _ in pairs], [b for _, b in pairs]
        works["swap out"]()
        if not torch.equal(cpu.data[theirs], before[mine].cpu()):
            self.report.wrong(f"{name}: swapped-out bytes are not those of the first tier")
        gpu.data[mine] = 0
        works["swap in"]()
        self.report.clock.sync()
        if not torch.equal(gpu.data, before):
            self.report.wrong(f"{name}: swapped-in bytes are not those that were swapped out")

    def _walls(self, works: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {work: [] for work in works}
        for number in range(-2, self.repeats):  # the first two rounds warm up
            for name, work in works.items():
                took_s = self.report.clock.wall(work)
                if number >= 0:
                    seconds[name].append(took_s)
        return seconds

    # -- with a model

    @property
    def loaded(self) -> Loaded:
        """The model, loaded and checked once."""
        if self._loaded is None:
            self._loaded = load(self.report, MODEL)
            with torch.inference_mode():
                check(self.report, self._loaded)
        return self._loaded

    def _worker(self, gpu_slots: int, cpu_slots: int) -> tuple[ModelWorker, Steps]:
        tiers = (TierConfig("gpu", gpu_slots), TierConfig("cpu", cpu_slots))
        worker = ModelWorker(self.loaded.model, tiers, CHUNK, attention=self.options.attention)
        self.report.note("attention", worker.attention)
        return worker, Steps(worker)

    def _memcpy_rates(self) -> None:
        """Bytes a second of a memcpy each way, if `copies` has not measured them."""
        if not self.rates["out"]:
            num_bytes = self.sizes.chunks[0] * self.slot_bytes
            host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.report.device.type == "cuda")
            device = torch.empty(num_bytes, dtype=torch.uint8, device=self.report.device)
            found = self._walls(
                {
                    "out": lambda: host.copy_(device, non_blocking=True),
                    "in": lambda: device.copy_(host, non_blocking=True),
                }
            )
            self.rates = {way: num_bytes / statistics.median(seconds) for way, seconds in found.items()}

    def beside(self) -> None:
        if self.report.fits("beside", 120 if self.report.judges else 1):
            with self.report.attempt("beside"):
                self._memcpy_rates()
                self._beside()

    def _beside(self) -> None:
        sizes, vocab = self.sizes, self.shape.vocab_size
        blocks = 2 * (self.repeats + 1)
        length = sizes.context + (blocks + 1) * sizes.steps + 4
        chunks = -(-length // CHUNK)
        worker, steps = self._worker(sizes.running * chunks + sizes.idle, sizes.idle)
        try:
            rng = random.Random(self.options.seed)
            names = [f"r{number}" for number in range(sizes.running)]
            for number, name in enumerate(names):
                start(
                    steps,
                    name,
                    drawn(rng, sizes.context, vocab),
                    tuple(range(number * chunks, (number + 1) * chunks)),
                    length,
                )
            idle = range(sizes.running * chunks, sizes.running * chunks + sizes.idle)
            reached, num_copies = sizes.context, 0

            def block(copied: int) -> float:
                """Seconds a step."""
                nonlocal reached, num_copies
                self.report.clock.sync()
                begin = time.perf_counter()
                for _ in range(sizes.steps):
                    out = steps.copies(((idle[i], i) for i in range(copied)), 0, 1)
                    steps.run([Span(name, reached, reached + 1, None, True) for name in names], swap_out=out)
                    num_copies += copied
                    reached += 1
                took_s = (time.perf_counter() - begin) / sizes.steps
                steps.settle(num_copies)
                return took_s

            alone_s = block(0)
            copied = max(1, min(sizes.idle, round(alone_s * self.rates["out"] / self.slot_bytes)))
            block(copied)  # warms up
            alone, beside = [], []
            for _ in range(self.repeats):
                alone.append(block(0))
                beside.append(block(copied))
            coming = min(sizes.idle, sizes.history // CHUNK)
            with_swap_in = [
                self._step_with_swap_in(steps, names, reached + number, [(i, idle[i]) for i in range(coming)])
                for number in range(3)
            ]
        finally:
            worker.close()
        ratio = statistics.median(beside) / statistics.median(alone)
        self.report.goal(
            f"step with {copied} chunks a step swapped out: time, of one without", ratio, 1.02, at_least=False
        )
        figures = {
            "running": sizes.running, "context": sizes.context, "chunks_a_step": copied, "mb_a_step": copied * self.slot_bytes / 1e6,
            "alone_ms": spread([1e3 * s for s in alone]), "beside_ms": spread([1e3 * s for s in beside]), "ratio": ratio,
            "chunks_swapped_in": coming, "with_swap_in_ms": spread([1e3 * s for s in with_swap_in]),
        }  # fmt: skip
        line = f"{1e3 * statistics.median(alone):.2f} ms alone, {1e3 * statistics.median(beside):.2f} with {copied} chunks a step: {ratio:.3f}"
        line += f"; {1e3 * statistics.median(with_swap_in):.2f} with {coming} chunks swapped in"
        self.report.case("beside", figures, line)

    def _step_with_swap_in(
        self, steps: Steps, names: list[str], reached: int, pairs: list[tuple[int, int]]
    ) -> float:
        """Seconds of a decode step that brings somebody's history in: its attention waits, layer by layer."""
        copies = steps.copies(pairs, 1, 0)
        self.report.clock.sync()
        begin = time.perf_counter()
        steps.run([Span(name, reached, reached + 1, None, True) for name in names], swap_in=copies)
        return time.perf_counter() - begin

    # -- swapped

    def swapped(self) -> None:
        if self.report.fits("swapped", 90 if self.report.judges else 1):
            with self.report.attempt("swapped"):
                self._memcpy_rates()
                self._swapped()

    def _swapped(self) -> None:
        sizes, vocab = self.sizes, self.shape.vocab_size
        past = sizes.history // CHUNK
        chunks = -(-(sizes.history + max(sizes.new)) // CHUNK)
        worker, steps = self._worker(2 * chunks, past)
        try:
            rng = random.Random(self.options.seed)
            history = drawn(rng, sizes.history, vocab)
            slots = random.Random(1).sample(range(2 * chunks), 2 * chunks)
            tables = {"resident": tuple(slots[:chunks]), "swapped": tuple(slots[chunks:])}
            for name, table in tables.items():
                start(steps, name, history, table, sizes.history + 1)
            below = random.Random(2).sample(range(past), past)
            pairs = list(zip(tables["swapped"][:past], below, strict=True))
            steps.run(swap_out=steps.copies(pairs, 0, 1))
            steps.settle(past)
            up = [(b, a) for a, b in pairs]
            layer_copy_s = past * self.layer_bytes / self.rates["in"]
            for new in sizes.new:
                self._turn(steps, new, drawn(rng, new, vocab), up, layer_copy_s)
        finally:
            worker.close()

    def _turn(
        self, steps: Steps, new: int, ids: tuple[int, ...], up: list[tuple[int, int]], layer_copy_s: float
    ) -> None:
        """A turn of `new` tokens, resident and swapped in by turns."""
        history = self.sizes.history
        seconds: dict[str, list[float]] = {"resident": [], "swapped": []}
        agreed = 0
        for number in range(-2, self.repeats):  # the first two rounds warm up
            tokens = {}
            for name, all_ in seconds.items():
                copies = () if name == "resident" else steps.copies(up, 1, 0)
                if copies:  # what is not copied in again is worthless, and shows
                    steps.run(wiped=[(0, copy.dst_slot) for copy in copies])
                self.report.clock.sync()
                begin = time.perf_counter()
                result = steps.run([Span(name, history, history + new, ids, True)], swap_in=copies)
                took_s = time.perf_counter() - begin
                tokens[name] = result.tokens[0].token_id
                if number >= 0:
                    all_.append(took_s)
            agreed += tokens["resident"] == tokens["swapped"]
        if agreed * 2 <= self.repeats + 2:
            self.report.wrong(
                f"turn of {new}: only {agreed} of {self.repeats + 2} swapped-in turns gave the resident turn's token"
            )
        resident_s, swapped_s = (statistics.median(all_) for all_ in seconds.values())
        layer_compute_s = resident_s / self.shape.num_layers
        ratio = swapped_s / resident_s
        what = f"turn of {new} behind {history} swapped in: first token, of resident"
        if layer_copy_s < layer_compute_s:
            self.report.goal(what, ratio, 1.15, at_least=False)
        figures = {
            "history": history, "new": new, "resident_ms": spread([1e3 * s for s in seconds["resident"]]),
            "swapped_ms": spread([1e3 * s for s in seconds["swapped"]]), "ratio": ratio, "same_token": agreed, "rounds": self.repeats + 2,
            "layer_copy_us": 1e6 * layer_copy_s, "layer_compute_us": 1e6 * layer_compute_s, "can_be_hidden": layer_copy_s < layer_compute_s,
            "of_the_longer": swapped_s / max(resident_s, layer_copy_s * self.shape.num_layers),
        }  # fmt: skip
        self.report.case(
            f"swapped {new}", figures,
            f"{1e3 * resident_s:.2f} ms resident, {1e3 * swapped_s:.2f} swapped in: {ratio:.3f}; a layer copies in {1e6 * layer_copy_s:.0f} µs "
            f"and computes in {1e6 * layer_compute_s:.0f}",
        )  # fmt: skip


def run_copies(transfer: Transfer, copies: list[Copy], *, up: bool) -> None:
    """Copies through the copying thread, from the call until all have settled.

    Raises:
        RuntimeError: one failed.
    """
    if up:
        transfer.start(tuple(copies), ()).wait()
    else:
        transfer.start((), tuple(copies))
        transfer.wait()
    done, failed = transfer.end_step()
    if failed or len(done) != len(copies):
        raise RuntimeError(f"{len(done)} of {len(copies)} copies were done: {failed[:1]}")


def start(steps: Steps, name: str, prompt: tuple[int, ...], slots: tuple[int, ...], length: int) -> None:
    """A request's prompt, computed into its slots; the last step samples its first token."""
    params = SamplingParams(max_new_tokens=length)
    begun = [RequestStart(name, params, prompt)]
    tables = [BlockTableUpdate(name, 0, slots)]
    for first in range(0, len(prompt), BATCH_TOKENS):
        stop = min(first + BATCH_TOKENS, len(prompt))
        span = Span(name, first, stop, prompt[first:stop], stop == len(prompt))
        steps.run([span], started=begun if first == 0 else (), tables=tables if first == 0 else ())


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--parts", default="copies,beside,swapped")
    options = arguments.parse_args()
    report = Report("transfers", options)
    bench = Bench(report, options)
    for part in options.parts.split(","):
        {"copies": bench.copies, "beside": bench.beside, "swapped": bench.swapped}[part]()
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
