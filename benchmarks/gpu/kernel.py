"""How fast attention over scattered KV is: against contiguous KV, against memory, against the matrix units.

    python benchmarks/gpu/kernel.py [--parts turns,decode,prefill] [--out FILE]
    python benchmarks/gpu/kernel.py --device cpu --quick

turns    the paper's figure 12: 32 requests with 8 new tokens each behind 256 to 16k. Beside ours: torch's attention over contiguous KV (the best of
         its backends), the same after copying the pages out, and ours one token a round.
decode   one new token, 1 to 256 requests of 1k to 32k: bytes of K and V over time, as a share of what a copy on the device moves.
prefill  one prompt of 4k to 32k: against torch's flash attention, and as a share of the matrix peak.

Every answer is compared with the definition in fp32 before it is timed, those of the baselines too: a wrong baseline is named and left out, a wrong
answer of ours fails the run. Layers are read in turns, so that KV comes from memory and not from the L2 cache. Times are the device's; `host_us` is how long
a call kept the host. The last line is JSON.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if (
    not __package__
):  # Python puts this very folder on its path, whose modules are meant to be found in their package only
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from gpu.common import DTYPES, Report, Timing, copy_bytes_per_s, matmul_flops_per_s, parser
from gpu.paged import TOLERANCES, Heads, PagedCase, worst_error

LLAMA, OPT = Heads("llama2-13b-gqa", 40, 10, 128), Heads("opt-13b", 40, 40, 128)
TINY = (Heads("tiny-gqa", 4, 2, 64), Heads("tiny-mha", 2, 2, 64))
MEMORY_SHARE = 0.85  # of what is free, that a case may take
TURN_REQUESTS, TURN_NEW = 32, 8
BIG_KV_BYTES = 128e6  # from here on a decode must run at memory speed
CHECKED_ROWS = 48  # of a long prompt

Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]  # (S, H, Q, D), (S, Hkv, N, D) twice -> (S, H, Q, D)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured; small on a CPU."""

    heads: tuple[Heads, ...]
    requests: int
    new: int
    pasts: tuple[int, ...]
    decode_batches: tuple[int, ...]
    decode_contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    rotated_bytes: int  # of K and V over the layers read in turns: far more than an L2 cache holds
    copied_bytes: int
    product: int


FULL = Sizes(
    (LLAMA, OPT), TURN_REQUESTS, TURN_NEW, (256, 512, 1024, 2048, 4096, 8192, 16384), (1, 4, 16, 64, 256), (1024, 4096, 16384, 32768),
    (4096, 8192, 16384, 32768), 512 << 20, 1 << 30, 8192,
)  # fmt: skip
QUICK = Sizes(TINY, 3, 4, (20, 70), (1, 3), (40, 100), (50, 100), 64 << 10, 1 << 20, 128)


class Bench:
    """The parts of this benchmark."""

    def __init__(self, report: Report, options: argparse.Namespace) -> None:
        self.report, self.options = report, options
        self.sizes = QUICK if options.quick else FULL
        self.device, self.dtype = report.device, DTYPES[options.dtype]
        self.tolerance = TOLERANCES[self.dtype]
        self.copy_rate = report.limit(
            "copy_bytes_per_s", copy_bytes_per_s(self.device, options.repeats, self.sizes.copied_bytes)
        )
        self.peak = report.limit(
            "matmul_flops_per_s",
            matmul_flops_per_s(self.device, self.dtype, options.repeats, self.sizes.product),
        )

    def case(
        self, name: str, heads: Heads, requests: int, past: int, new: int, *, copies: int
    ) -> PagedCase | None:
        """A case filled and ready, if memory holds it and `copies` more of its KV; else it is named as left out."""
        tokens = requests * (past + new + 32)
        layer_bytes = heads.kv_bytes(tokens, self.dtype)
        layers = max(1, math.ceil(self.sizes.rotated_bytes / layer_bytes))
        if self.device.type == "cuda":
            need, free = (
                layers * layer_bytes * (1 + copies),
                torch.cuda.mem_get_info(self.device)[0] * MEMORY_SHARE,
            )
            if need > free:
                self.report.skip(name, f"{need / 1e9:.0f} GB of KV, {free / 1e9:.0f} GB of memory")
                return None
        case = PagedCase(
            heads, self.dtype, self.device, self.options.attention, requests=requests, past=past, new=new, layers=layers,
            seed=self.options.seed,
        )  # fmt: skip
        self.report.note("attention", case.backend.name)
        return case

    def ours_is_right(self, name: str, case: PagedCase, rows: torch.Tensor | None = None) -> bool:
        """Compare with the definition: first, middle and last request, first and last layer."""
        requests = sorted({0, case.requests // 2, case.requests - 1})
        error = max(case.check(layer, requests, rows) for layer in sorted({0, case.layers - 1}))
        if error <= self.tolerance:
            return True
        self.report.wrong(
            f"{name}: attention is off by {error:.2g} of an answer's length ({self.tolerance:g} would be rounding)"
        )
        return False

    # -- turns: the paper's figure 12

    def turns(self) -> None:
        for heads in self.sizes.heads:
            for past in self.sizes.pasts:
                name = f"turns {heads.name} {past}"
                if self.report.fits(name, 12 if self.report.judges else 1):
                    with self.report.attempt(name), torch.inference_mode():
                        self._turn(name, heads, past)

    def _turn(self, name: str, heads: Heads, past: int) -> None:
        case = self.case(name, heads, self.sizes.requests, past, self.sizes.new, copies=3)
        if case is None or not self.ours_is_right(name, case):
            return
        works: dict[str, Callable[[int], object]] = {"ours": case.attend, "write": case.write}
        contiguous = self._contiguous(name, case)
        works |= contiguous.works
        if contiguous.attends:
            works["copy out"] = self._copy_out(name, case, contiguous)
        works["one token a round"] = self._rounds(name, case)
        times = self.report.clock.in_turns(works, self.options.repeats)
        figures: dict[str, Any] = {work: timing.as_json() for work, timing in times.items()} | {
            "layers": case.layers
        }
        ours_s = times["ours"].median_s
        best = best_of(times, contiguous.works)
        line = f"ours {1e6 * ours_s:.0f} µs"
        if best is not None:
            ratios = {"contiguous": times[best].median_s, "copy out": times["copy out"].median_s}
            ratios["one token a round"] = times["one token a round"].median_s
            figures |= {"best_contiguous": best} | {
                f"ours_over_{what}": ours_s / seconds for what, seconds in ratios.items()
            }
            line += (
                "".join(f", {what} {1e6 * seconds:.0f}" for what, seconds in ratios.items())
                + f" (contiguous: {best})"
            )
            self.report.goal(f"{name}: time, of {best}", ours_s / times[best].median_s, 1.0, at_least=False)
        self.report.case(name, figures, line)

    def _contiguous(self, name: str, case: PagedCase) -> Contiguous:
        """Torch's attention over contiguous KV, by each of its backends that is right here."""
        query = by_head(case.query, case.requests)  # (S, H, Q, D)
        kv = [
            tuple(part.transpose(1, 2) for part in case.contiguous(layer)) for layer in range(case.layers)
        ]  # (S, Hkv, N, D) twice, a layer
        found = Contiguous({}, {})
        for which, attend in torch_attention(case).items():
            try:
                output = attend(query, *kv[0])
                error = worst_error(output[0].transpose(0, 1), case.expected(0, 0))
                if not error <= self.tolerance:
                    raise ArithmeticError(f"its answers are off by {error:.2g}")
            except (RuntimeError, ArithmeticError) as error_:
                self.report.skip(f"{name}: torch's {which}", str(error_).splitlines()[0][:200])
                continue
            found.attends[which] = attend
            found.works[f"contiguous {which}"] = lambda number, attend=attend: attend(
                query, *kv[number % case.layers]
            )  # type: ignore[misc]
        return found

    def _copy_out(self, name: str, case: PagedCase, contiguous: Contiguous) -> Callable[[int], object]:
        """Gather the pages of all requests into contiguous KV, then attend there by the first backend that is right."""
        pages = [case.paged(layer) for layer in range(case.layers)]
        table = case.tables.reshape(-1)
        heads = case.heads
        room = [part.new_empty(len(table), part.shape[1]) for part in pages[0]]
        shape = (case.requests, case.num_chunks * 32, heads.num_kv_heads, heads.head_dim)
        query, attend = by_head(case.query, case.requests), next(iter(contiguous.attends.values()))

        def work(number: int) -> torch.Tensor:
            for source, target in zip(pages[number % case.layers], room, strict=True):
                torch.index_select(source, 0, table, out=target)
            key, value = (part.view(shape)[:, : case.context].transpose(1, 2) for part in room)
            return attend(query, key, value)

        error = worst_error(work(0)[0].transpose(0, 1), case.expected(0, 0))
        if not error <= self.tolerance:
            raise ArithmeticError(f"copy out is off by {error:.2g}")
        return work

    def _rounds(self, name: str, case: PagedCase) -> Callable[[int], object]:
        """The same new tokens one at a time, as a kernel for single tokens has to."""
        steps = [
            case.backend.prepare(case.batch_of(case.past + step, case.past + step + 1))
            for step in range(case.new)
        ]
        by_request = case.query.view(case.requests, case.new, *case.query.shape[1:])
        queries = [by_request[:, step].contiguous() for step in range(case.new)]

        def work(number: int) -> list[torch.Tensor]:
            layer = number % case.layers
            return [
                case.backend.attend(step, layer, query, case.args)
                for step, query in zip(steps, queries, strict=True)
            ]

        error = worst_error(torch.stack([output[0] for output in work(0)]), case.expected(0, 0))
        if not error <= self.tolerance:
            self.report.wrong(f"{name}: attention one token a round is off by {error:.2g}")
        return work

    # -- decode

    def decode(self) -> None:
        heads = self.sizes.heads[0]
        for context in self.sizes.decode_contexts:
            for batch in self.sizes.decode_batches:
                name = f"decode {batch} x {context}"
                kv_bytes = heads.kv_bytes(batch * context, self.dtype)
                if self.report.fits(name, 4 + kv_bytes / 2e9 if self.report.judges else 1):
                    with self.report.attempt(name), torch.inference_mode():
                        self._decode(name, heads, batch, context, kv_bytes)

    def _decode(self, name: str, heads: Heads, batch: int, context: int, kv_bytes: int) -> None:
        case = self.case(name, heads, batch, context - 1, 1, copies=0)
        if case is None or not self.ours_is_right(name, case):
            return
        times = self.report.clock.in_turns({"ours": case.attend, "write": case.write}, self.options.repeats)
        rate = kv_bytes / times["ours"].median_s
        figures: dict[str, Any] = {work: timing.as_json() for work, timing in times.items()}
        figures |= {
            "kv_mb": kv_bytes / 1e6,
            "gb_per_s": rate / 1e9,
            "of_copy": rate / self.copy_rate,
            "layers": case.layers,
        }
        if kv_bytes >= BIG_KV_BYTES:
            self.report.goal(f"{name}: of copy bandwidth", rate / self.copy_rate, 0.75, at_least=True)
        self.report.case(
            name, figures,
            f"{kv_bytes / 1e6:.0f} MB in {1e6 * times['ours'].median_s:.0f} µs: {rate / 1e9:.0f} GB/s, {rate / self.copy_rate:.0%} of a copy",
        )  # fmt: skip

    # -- prefill

    def prefill(self) -> None:
        heads = self.sizes.heads[0]
        for prompt in self.sizes.prompts:
            name = f"prefill {prompt}"
            if self.report.fits(name, 10 if self.report.judges else 1):
                with self.report.attempt(name), torch.inference_mode():
                    self._prefill(name, heads, prompt)

    def _prefill(self, name: str, heads: Heads, prompt: int) -> None:
        case = self.case(name, heads, 1, 0, prompt, copies=3)
        rows = torch.linspace(0, prompt - 1, min(prompt, CHECKED_ROWS), device=self.device).round().long()
        if case is None or not self.ours_is_right(name, case, rows):
            return
        query = by_head(case.query, 1)
        key, value = (part.transpose(1, 2) for part in case.contiguous(0))
        works: dict[str, Callable[[int], object]] = {"ours": case.attend}
        expected = case.expected(0, 0, rows)
        for which, attend in torch_attention(case).items():
            try:
                error = worst_error(attend(query, key, value)[0].transpose(0, 1)[rows], expected)
            except RuntimeError as broken:
                self.report.skip(f"{name}: torch's {which}", str(broken).splitlines()[0][:200])
                continue
            if error <= self.tolerance:
                works[which] = lambda _, attend=attend: attend(query, key, value)  # type: ignore[misc]
            else:
                self.report.skip(f"{name}: torch's {which}", f"its answers are off by {error:.2g}")
        times = self.report.clock.in_turns(works, self.options.repeats, block_s=0.1)
        flops = 4 * heads.num_heads * heads.head_dim * prompt * (prompt + 1) / 2
        figures: dict[str, Any] = {work: timing.as_json() for work, timing in times.items()}
        for work, timing in times.items():
            figures[work]["tflop_per_s"] = flops / timing.median_s / 1e12
            figures[work]["of_matmul"] = flops / timing.median_s / self.peak
        for which in works:
            if which != "ours":
                figures[f"speed_of_{which}"] = times[which].median_s / times["ours"].median_s
        if "flash" in times:
            self.report.goal(
                f"{name}: speed, of torch's flash attention", figures["speed_of_flash"], 0.9, at_least=True
            )
        speeds = ", ".join(
            f"{w} {figures[w]['tflop_per_s']:.3g} TFLOP/s ({figures[w]['of_matmul']:.0%} of a product's)"
            for w in times
        )
        self.report.case(name, figures, speeds)


@dataclass(frozen=True, slots=True)
class Contiguous:
    """Baselines over contiguous KV that proved right."""

    attends: dict[str, Attend]  # by torch's backend
    works: dict[str, Callable[[int], object]]


def torch_attention(case: PagedCase) -> dict[str, Attend]:
    """Torch's backends, each as a function over contiguous KV. Causal from the lower right: the last query sees every key.

    `is_causal` would do for prompts only, it aligns the mask with the upper left. Flash attention knows the lower right by itself; the others
    get a mask, made once.
    """
    lower_right: Any = causal_lower_right(case.new, case.context)
    square = case.new == case.context
    grouped = case.heads.num_heads != case.heads.num_kv_heads
    with warnings.catch_warnings(action="ignore"):
        mask = None if square or case.new == 1 else lower_right._materialize(case.device)

    def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        bias = None if case.new == 1 else lower_right
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(
                query, key, value, attn_mask=bias, scale=case.args.scaling, enable_gqa=grouped
            )

    def masked(backend: SDPBackend) -> Attend:
        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    query,
                    key,
                    value,
                    attn_mask=mask,
                    is_causal=square,
                    scale=case.args.scaling,
                    enable_gqa=grouped,
                )

        return attend

    if case.device.type == "cuda":
        return {"flash": flash, "cudnn": masked(SDPBackend.CUDNN_ATTENTION)}
    return {"math": masked(SDPBackend.MATH)}


def by_head(rows: torch.Tensor, requests: int) -> torch.Tensor:
    """(T, H, D) of requests with as many tokens each -> (S, H, Q, D)."""
    return rows.view(requests, len(rows) // requests, *rows.shape[1:]).transpose(1, 2)


def best_of(times: dict[str, Timing], names: dict[str, Any]) -> str | None:
    """The fastest of some; None if there is none."""
    return min(names, key=lambda name: times[name].median_s, default=None)


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--parts", default="turns,decode,prefill")
    options = arguments.parse_args()
    report = Report("kernel", options)
    torch.manual_seed(options.seed)
    bench = Bench(report, options)
    for part in options.parts.split(","):
        {"turns": bench.turns, "decode": bench.decode, "prefill": bench.prefill}[part]()
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
