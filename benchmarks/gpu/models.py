"""Models of published shapes with random weights, workers driven by plans made by hand, and engines stepped by hand. Knows no goal and no clock."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gpu.common import CHUNK, DTYPES, Report
from pensieve.config import CacheConfig, SchedulerConfig, TierConfig
from pensieve.core.cache import TieredCache
from pensieve.core.cost import CostProfile
from pensieve.core.eviction import POLICIES
from pensieve.core.plan import BlockTableUpdate, Copy, RequestStart, Span, StepPlan, StepResult
from pensieve.core.request import SamplingParams
from pensieve.core.scheduler import Scheduler
from pensieve.engine.engine import Engine
from pensieve.engine.messages import Event
from pensieve.worker.attention import PagedAttention, make_backend
from pensieve.worker.batch import BatchBuilder
from pensieve.worker.gate import admit
from pensieve.worker.kv_store import KVStore
from pensieve.worker.model import CausalModel
from pensieve.worker.presets import PRESETS
from pensieve.worker.random_weights import build, require_weights_fit
from pensieve.worker.worker import ModelWorker

MOST_GRAPH_ROWS = 256  # batches of so many decodes are captured as graphs, as `pensieve serve` does
BATCH_TOKENS = 4096  # one step's budget on a GPU
_RMS_LIMITS = {
    torch.float32: 1e-3,
    torch.bfloat16: 0.08,
    torch.float16: 0.03,
}  # of logits against the reference: above, it is no rounding


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model, ready."""

    name: str
    model: CausalModel
    weight_bytes: int  # read by every step: all but an embedding of which only rows are looked up
    load_s: float

    @property
    def kv_bytes_per_token(self) -> int:
        return self.model.shape.kv_bytes_per_token(self.model.dtype.itemsize)

    @property
    def chunk_bytes(self) -> int:
        return CHUNK * self.kv_bytes_per_token


def config_of(name: str, *, quick: bool) -> Any:
    """The Hugging Face config of a preset; `quick`: of a model that a CPU computes in a millisecond."""
    if not quick:
        return PRESETS[name].config()
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=4096,
    )  # fmt: skip


def load(report: Report, name: str) -> Loaded:
    """Random weights of a preset's shape, through the load-time gate (which compares with the model's own attention).

    Raises:
        ModelRefused: it does not fit, or answers wrong.
    """
    quick, dtype = report.options.quick, DTYPES[report.options.dtype]
    begin = time.perf_counter()
    if not quick:
        require_weights_fit(name, PRESETS[name].num_parameters, dtype, str(report.device))
    modules = build(config_of(name, quick=quick), dtype, str(report.device), seed=report.options.seed)
    total = sum(p.numel() * p.element_size() for p in modules.parameters())
    embedding = modules.get_input_embeddings().weight
    looked_up = (
        embedding.numel() * embedding.element_size()
        if modules.get_output_embeddings().weight is not embedding
        else 0
    )
    model = admit(modules, "tiny" if quick else name, keep_modules=False)
    loaded = Loaded(name, model, total - looked_up, time.perf_counter() - begin)
    report.say(
        f"{model.label}: {total / 1e9:.1f} GB of weights in {loaded.load_s:.0f} s, computed by {model.forward_name}"
    )
    report.note(
        "model",
        {
            "name": model.label,
            "weights_gb": total / 1e9,
            "load_s": loaded.load_s,
            "forward": model.forward_name,
        },
    )
    return loaded


def check(report: Report, loaded: Loaded) -> bool:
    """Compare the logits of prompts and decodes in one batch with those that the reference attention gives; a difference fails the run."""
    error = max(logit_errors(loaded.model, report.options.attention))
    limit = _RMS_LIMITS[loaded.model.dtype]
    report.say(
        f"logits differ from the reference attention's by {error:.2g} of their size (root mean square)"
    )
    report.note("logit_error", error)
    if not error <= limit:
        report.wrong(
            f"logits over {report.options.attention!r} attention are off by {error:.2g}, {limit:g} would be rounding"
        )
    return error <= limit


def logit_errors(model: CausalModel, attention: str) -> list[float]:
    """Root mean square of the difference over that of the logits, for each of two steps."""
    if attention == "reference":
        return [0.0]
    lengths = (75, 130, 33)
    rng = random.Random(0)
    tokens = [drawn(rng, length + 20, model.shape.vocab_size) for length in lengths]
    logits: dict[str, list[torch.Tensor]] = {}
    for name in ("reference", attention):
        backend = make_backend(name, model.geometry, CHUNK, model.device)
        chunks = [-(-len(row) // CHUNK) for row in tokens]
        store = KVStore(sum(chunks), model.geometry.num_layers, backend.layer_bytes, model.device)
        backend.bind(store)
        free = torch.randperm(store.num_slots, generator=torch.Generator().manual_seed(1)).tolist()
        builder = BatchBuilder(CHUNK, model.device)
        builder.update(
            BlockTableUpdate(str(i), 0, tuple(free.pop() for _ in range(count)))
            for i, count in enumerate(chunks)
        )
        first = [(i, 0, length) for i, length in enumerate(lengths)]
        second = [
            (0, lengths[0], lengths[0] + 1),
            (1, lengths[1], lengths[1] + 20),
            (2, lengths[2], lengths[2] + 1),
        ]
        logits[name] = [
            model.forward(batch, PagedAttention(backend, batch)).float()
            for step in (first, second)
            for batch in [
                builder.build(
                    tuple(Span(str(i), a, b, tokens[i][a:b], True) for i, a, b in step), lambda span: 0
                )
            ]
        ]
    expected, got = logits.values()
    return [
        float((a - b).square().mean().sqrt() / a.square().mean().sqrt())
        for a, b in zip(expected, got, strict=True)
    ]


def drawn(rng: random.Random, length: int, vocab: int) -> tuple[int, ...]:
    """Random token ids."""
    return tuple(rng.randrange(vocab) for _ in range(length))


# -- a worker, driven by plans made by hand


class Steps:
    """A worker and its plans, numbered. A failure of any kind raises."""

    def __init__(self, worker: ModelWorker) -> None:
        self._worker = worker
        self._numbers, self._copies = itertools.count(), itertools.count()
        self.num_copies_done = 0

    def run(
        self,
        spans: Sequence[Span] = (),
        *,
        swap_in: Sequence[Copy] = (),
        swap_out: Sequence[Copy] = (),
        started: Sequence[RequestStart] = (),
        tables: Sequence[BlockTableUpdate] = (),
        wiped: Sequence[tuple[int, int]] = (),
    ) -> StepResult:
        """One step.

        Raises:
            RuntimeError: the forward, a copy, a wipe or a request failed.
        """
        plan = StepPlan(
            next(self._numbers),
            tuple(spans),
            tuple(swap_in),
            tuple(swap_out),
            tuple(started),
            tuple(tables),
            (),
            (),
            tuple(wiped),
        )
        result = self._worker.run(plan)
        self.num_copies_done += len(result.copies_done)
        broken = [result.forward_error, result.wipe_error]
        broken += [copy.message for copy in result.copies_failed]
        broken += [request.message for request in result.requests_failed]
        if any(broken):
            raise RuntimeError(f"step {plan.step_id} failed: {next(filter(None, broken))}")
        return result

    def copies(self, pairs: Iterable[tuple[int, int]], source: int, target: int) -> tuple[Copy, ...]:
        """Copies of (source slot, target slot) between two tiers."""
        return tuple(Copy(next(self._copies), source, a, target, b) for a, b in pairs)

    def settle(self, num_copies: int) -> None:
        """Return when so many copies have been reported since the beginning."""
        while self.num_copies_done < num_copies:
            self.run()
            time.sleep(1e-4)  # let the copying thread have the interpreter


# -- an engine, stepped by hand


class World:
    """Scheduler, worker and engine as `pensieve serve` wires them."""

    def __init__(
        self,
        loaded: Loaded,
        gpu_slots: int,
        cpu_slots: int,
        *,
        attention: str,
        emit: Callable[[list[Event]], None],
        retain: bool = True,
        max_running: int = 256,
        max_context: int | None = None,
    ) -> None:
        model = loaded.model
        tiers = (TierConfig("gpu", gpu_slots), *((TierConfig("cpu", cpu_slots),) if cpu_slots else ()))
        cost = CostProfile.from_shape(model.shape, CHUNK)
        cache = TieredCache(CacheConfig(tiers, CHUNK), POLICIES["retention"](cost.of_chunk))
        on_cpu = model.device.type == "cpu"
        config = SchedulerConfig(
            max_batch_tokens=BATCH_TOKENS,
            max_running=max_running,
            retain=retain,
            copies_first=on_cpu,
            copy_ahead_share=0.0 if on_cpu else 0.25,
        )
        limit = min(model.shape.max_positions, gpu_slots * CHUNK, max_context or gpu_slots * CHUNK)
        self.scheduler = Scheduler(config, cache, limit, model.shape.vocab_size)
        self.ahead = model.device.type == "cuda"
        graph_rows = min(config.max_running, MOST_GRAPH_ROWS) if self.ahead else 0
        self.worker = ModelWorker(model, tiers, CHUNK, attention=attention, graph_rows=graph_rows)
        self.engine = Engine(
            self.scheduler, self.worker, chunk_bytes=self.worker.chunk_bytes, emit=emit, ahead=self.ahead
        )

    def close(self) -> None:
        """Stop, and give the tiers back."""
        self.engine.close()


def greedy(num_tokens: int) -> SamplingParams:
    """An answer of exactly so many tokens."""
    return SamplingParams(max_new_tokens=num_tokens)
