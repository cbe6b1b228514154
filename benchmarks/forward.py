"""How long one forward of the default model takes on a CPU, by whatever can compute it: its modules, fused operations, weights of 8 bits.

    python benchmarks/forward.py [--variants modules,onednn,fused,int8] [--rounds 9]

Steps as the engine makes them, over random KV, bfloat16, native attention where it is built: decodes and prompts. Variants take turns within a round, medians count. `onednn` is the
fused forward as CPUs with AMX have it, `fused` and `int8` are our own kernels throughout. A decode is the best of three in each round. Beside the times stands the speed at which a
plain sum reads memory in the same run. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from attention import Case, read_gb_per_s
from common import commit, cpu_name

from engine import CHUNK
from pensieve.core.plan import BlockTableUpdate, Span
from pensieve.runtime.loading import load_model
from pensieve.runtime.options import Options
from pensieve.worker.allocator import keep_freed_memory
from pensieve.worker.attention import PagedAttention, make_backend
from pensieve.worker.batch import BatchBuilder
from pensieve.worker.kv_store import KVStore
from pensieve.worker.model import CausalModel
from pensieve.worker.products import PanelProduct

CPU = torch.device("cpu")


CASES = (
    Case("decode, 1 request at 64", 1, 63, 1),
    Case("decode, 1 request at 1024", 1, 1023, 1),
    Case("decode, 8 requests at 64", 8, 63, 1),
    Case("decode, 8 requests at 600", 8, 599, 1),
    Case("decode, 16 requests at 600", 16, 599, 1),
    Case("decode, 8 requests at 2000", 8, 1999, 1),
    Case("turn of 100 at 0", 1, 0, 100),
    Case("turn of 100 at 500", 1, 500, 100),
    Case("prompt of 512 at 0", 1, 0, 512),
    Case("prompt of 1035 at 0", 1, 0, 1035),
)


def loaders() -> dict[str, Callable[[], CausalModel]]:
    """A model for each variant."""

    def load(**options: Any) -> CausalModel:
        return load_model(
            Options(dtype="bfloat16", **options), must_talk=False, say=lambda _: None, with_text=False
        ).model

    def by_onednn() -> CausalModel:
        with mock.patch.object(PanelProduct, "why_not", staticmethod(lambda *_, **__: "not here")):
            return load(forward="fused")

    return {
        "modules": lambda: load(forward="modules"), "onednn": by_onednn, "fused": lambda: load(forward="fused"),
        "int8": lambda: load(forward="fused", quantize="int8"),
    }  # fmt: skip


class Bench:
    """One variant, ready for any case."""

    def __init__(self, model: CausalModel, num_slots: int) -> None:
        self.model = model
        self.backend = make_backend("auto", model.geometry, CHUNK, CPU)
        store = KVStore(num_slots, model.geometry.num_layers, self.backend.layer_bytes, CPU)
        store.data.view(model.dtype).normal_()
        self.backend.bind(store)
        self.builder = BatchBuilder(CHUNK, CPU)

    def run(self, case: Case) -> float:
        """Seconds of one step."""
        chunks = -(-case.context // CHUNK)
        names = [str(index) for index in range(case.requests)]
        self.builder.update(
            BlockTableUpdate(name, 0, tuple(range(i * chunks, (i + 1) * chunks)))
            for i, name in enumerate(names)
        )
        spans = tuple(
            Span(name, case.history, case.context, tuple(range(5, 5 + case.new)), True) for name in names
        )
        began_s = time.perf_counter()
        batch = self.builder.build(spans, lambda span: 0)
        self.model.forward(batch, PagedAttention(self.backend, batch))
        return time.perf_counter() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", default="modules,onednn,fused,int8")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    keep_freed_memory()
    num_slots = max(case.requests * -(-case.context // CHUNK) for case in CASES)
    benches = {name: Bench(loaders()[name](), num_slots) for name in arguments.variants.split(",")}
    times: dict[str, dict[str, list[float]]] = {case.name: {name: [] for name in benches} for case in CASES}
    for case in CASES:
        for number in range(-1, arguments.rounds):  # the first round warms up
            for name, bench in benches.items():
                seconds = min(bench.run(case) for _ in range(3)) if case.new == 1 else bench.run(case)
                if number >= 0:
                    times[case.name][name].append(seconds)
        print(
            case.name,
            {name: f"{statistics.median(all_) * 1e3:.1f} ms" for name, all_ in times[case.name].items()},
            file=sys.stderr,
        )
    print(
        json.dumps(
            {
                "benchmark": "forward",
                "commit": commit(),
                "command": sys.argv,
                "date": time.strftime("%Y-%m-%d"),
                "cpu": cpu_name(),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "rounds": arguments.rounds,
                "read_gb_per_s": read_gb_per_s(arguments.rounds),
                "ms": {
                    case: {
                        name: [round(t * 1e3, 2) for t in (statistics.median(v), min(v), max(v))]
                        for name, v in row.items()
                    }
                    for case, row in times.items()
                },
            }
        )
    )


if __name__ == "__main__":
    main()
