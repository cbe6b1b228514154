"""How fast attention over paged KV is by itself: decoding in GB/s of K and V read, prompts in GFLOP/s of visible scores.

    python benchmarks/attention.py [--backends native,cpu] [--rounds 7] [--dtype bfloat16] [--heads 9 --kv-heads 3 --head-dim 64 --layers 30]

Each case is a step as a model takes it: in every layer new K and V are written, then all spans attend, layers one after the other over a cache
larger than the CPU's own caches. Backends take turns, medians count. The shape is SmolLM2-135M's unless said otherwise. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from common import commit, cpu_name, spread

from engine import CHUNK
from pensieve.core.plan import BlockTableUpdate, Span
from pensieve.worker.allocator import keep_freed_memory
from pensieve.worker.attention import BACKENDS, AttentionArgs, KVGeometry, make_backend
from pensieve.worker.batch import BatchBuilder
from pensieve.worker.kv_store import KVStore

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
READ_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Case:
    """Requests that are all alike."""

    name: str
    requests: int
    history: int  # tokens resident before the step
    new: int  # tokens of each request in the step

    @property
    def context(self) -> int:
        return self.history + self.new


CASES = (
    Case("decode, 8 requests at 600", 8, 599, 1),
    Case("decode, 8 requests at 2000", 8, 1999, 1),
    Case("decode, 1 request at 4000", 1, 3999, 1),
    Case("turn of 60 at 0", 1, 0, 60),
    Case("turn of 60 at 1024", 1, 1024, 60),
    Case("prompt of 512 at 0", 1, 0, 512),
    Case("prompt of 512 at 2048", 1, 2048, 512),
)


class Bench:
    """One case on one backend."""

    def __init__(self, case: Case, backend: str, geometry: KVGeometry, num_heads: int) -> None:
        cpu = torch.device("cpu")
        self.layers = geometry.num_layers
        self.backend: Any = make_backend(backend, geometry, CHUNK, cpu)
        num_chunks = -(-case.context // CHUNK)
        self.store = KVStore(case.requests * num_chunks, geometry.num_layers, self.backend.layer_bytes, cpu)
        self.store.data.view(geometry.dtype).normal_(generator=torch.Generator().manual_seed(0))
        self.backend.bind(self.store)
        slots = torch.randperm(self.store.num_slots, generator=torch.Generator().manual_seed(1)).tolist()
        builder = BatchBuilder(CHUNK, cpu)
        names = [f"r{index}" for index in range(case.requests)]
        builder.update(
            BlockTableUpdate(name, 0, tuple(slots[i * num_chunks : (i + 1) * num_chunks]))
            for i, name in enumerate(names)
        )
        spans = tuple(Span(name, case.history, case.context, (0,) * case.new, True) for name in names)
        self.batch = builder.build(spans, lambda span: 0)
        tokens = case.requests * case.new
        self.query, self.key, self.value = (  # as models hand them over
            torch.randn(heads, tokens, geometry.head_dim).to(geometry.dtype).transpose(0, 1)
            for heads in (num_heads, geometry.num_kv_heads, geometry.num_kv_heads)
        )
        self.args = AttentionArgs(geometry.head_dim**-0.5)

    def step_s(self) -> float:
        """Seconds of one step, all layers."""
        begin = time.perf_counter()
        with torch.inference_mode():
            prepared = self.backend.prepare(self.batch)
            for layer in range(self.layers):
                self.backend.write(prepared, layer, self.key, self.value)
                self.backend.attend(prepared, layer, self.query, self.args)
        return time.perf_counter() - begin


def measure(
    case: Case, backends: list[str], geometry: KVGeometry, num_heads: int, rounds: int
) -> dict[str, Any]:
    benches = {name: Bench(case, name, geometry, num_heads) for name in backends}
    times: dict[str, list[float]] = {name: [] for name in backends}
    for round_ in range(-1, rounds):
        for name, bench in benches.items():
            seconds = bench.step_s()
            if round_ >= 0:  # the first round warms up
                times[name].append(seconds)
    read = (
        case.requests
        * case.context
        * 2
        * geometry.num_kv_heads
        * geometry.head_dim
        * geometry.dtype.itemsize
        * geometry.num_layers
    )
    scores = case.requests * sum(range(case.history + 1, case.context + 1)) * num_heads * geometry.num_layers
    report: dict[str, Any] = {"requests": case.requests, "history": case.history, "new": case.new}
    for name, seconds_ in times.items():
        median_s = statistics.median(seconds_)
        report[name] = {"ms": spread([1e3 * second for second in seconds_])}
        if case.new == 1:
            report[name]["gb_per_s"] = read / median_s / 1e9
        else:
            report[name]["gflop_per_s"] = scores * 4 * geometry.head_dim / median_s / 1e9
    return report


def read_gb_per_s(rounds: int) -> float:
    """What this machine reads from memory while it adds up a large tensor: the bound for decoding."""
    numbers = torch.ones(READ_BYTES // 4, dtype=torch.float32)
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - begin)
    return READ_BYTES / statistics.median(times[1:]) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", default="native,cpu", help=f"some of {', '.join(BACKENDS)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=30)
    options = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    geometry = KVGeometry(options.layers, options.kv_heads, options.head_dim, DTYPES[options.dtype])
    report: dict[str, Any] = {
        "benchmark": "attention", "commit": commit(), "dtype": options.dtype, "heads": options.heads, "kv_heads": options.kv_heads,
        "head_dim": options.head_dim, "layers": options.layers, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "cpu": cpu_name(), "memory_read_gb_per_s": read_gb_per_s(options.rounds), "cases": {},
    }  # fmt: skip
    for case in CASES:
        report["cases"][case.name] = measure(
            case, options.backends.split(","), geometry, options.heads, options.rounds
        )
        print(f"{case.name}: {json.dumps(report['cases'][case.name])}", file=sys.stderr)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
