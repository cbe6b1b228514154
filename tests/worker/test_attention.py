"""The fast backend against the reference, and the reference against the definition written out number by number."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pensieve.core.plan import BlockTableUpdate, Span
from pensieve.errors import ConfigError
from pensieve.worker.attention import AttentionArgs, KVGeometry, cpu, make_backend, native
from pensieve.worker.attention.native import NativeAttention
from pensieve.worker.attention.reference import attend_one
from pensieve.worker.batch import Batch, BatchBuilder
from pensieve.worker.kv_store import KVStore

CPU = torch.device("cpu")
CHUNK, NATIVE_CHUNK = 4, 32
LAYERS = 2
HEADS, DIM = 4, 8

torch.set_num_threads(1)

VARIANTS = ["cpu", "reference", *(f"native {level.name}" for level in native.levels())]
NATIVE = VARIANTS[2:]


def args_of(kind: str, window: int | None = None, heads: int = HEADS) -> AttentionArgs:
    generator = torch.Generator().manual_seed(7)
    return AttentionArgs(
        scaling=0.4,
        sliding_window=window,
        softcap=3.0 if kind == "softcap" else None,
        sinks=torch.randn(heads, generator=generator) if kind == "sinks" else None,
    )


class Bench:
    """Contexts of several requests in scattered slots; every cell that belongs to nobody is NaN."""

    def __init__(
        self,
        variant: str,
        contexts: dict[str, int],
        kv_heads: int,
        dtype: torch.dtype,
        *,
        seed: int = 0,
        heads: int = HEADS,
        dim: int = DIM,
    ) -> None:
        name, _, level = variant.partition(" ")
        self.chunk = NATIVE_CHUNK if name == "native" else CHUNK
        geometry = KVGeometry(LAYERS, kv_heads, dim, dtype)
        self.backend: Any = make_backend(name, geometry, self.chunk, CPU)
        if level:
            self.backend = NativeAttention(geometry, self.chunk, native.Level[level])
        counts = {request: -(-length // self.chunk) for request, length in contexts.items()}
        self.store = KVStore(sum(counts.values()) + 8, LAYERS, self.backend.layer_bytes, CPU)
        self.backend.bind(self.store)
        self.store.data.fill_(0xFF)  # NaN
        self.builder = BatchBuilder(self.chunk, CPU)
        self.generator = torch.Generator().manual_seed(seed)
        free = torch.randperm(self.store.num_slots, generator=self.generator).tolist()
        for request, count in counts.items():
            self.builder.update([BlockTableUpdate(request, 0, tuple(free.pop() for _ in range(count)))])
        self.heads, self.dim, self.dtype = heads, dim, dtype
        self.contents = {
            (request, layer): self._random(2, length, kv_heads) for request, length in contexts.items() for layer in range(LAYERS)
        }

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, self.dim, generator=self.generator).to(self.dtype)

    def batch(self, *spans: Span) -> Batch:
        return self.builder.build(spans, lambda span: 0)

    def write(self, *spans: Span) -> Any:
        """Write K and V of these spans, in every layer."""
        prepared = self.backend.prepare(self.batch(*spans))
        for layer in range(LAYERS):
            pieces = [self.contents[span.request_id, layer][:, span.start : span.stop] for span in spans]
            key, value = torch.cat(pieces, dim=1)
            self.backend.write(prepared, layer, key, value)
        return prepared

    def fill(self, spans: tuple[Span, ...]) -> Any:
        """Everything before the spans is written by itself, then the spans."""
        prompts: dict[str, int] = {}
        for span in spans:
            prompts.setdefault(span.request_id, span.start)
        if resident := [ids(request, 0, stop) for request, stop in prompts.items() if stop]:
            self.write(*resident)
        written = {span.request_id: 0 for span in spans}
        for span in spans:  # between two spans of one request lies what is resident already
            between = max(written[span.request_id], prompts[span.request_id])
            if between < span.start:
                self.write(ids(span.request_id, between, span.start))
            written[span.request_id] = span.stop
        return self.write(*spans)

    def check(self, spans: tuple[Span, ...], args: AttentionArgs) -> None:
        """Attention equals the definition."""
        prepared = self.fill(spans)
        num_tokens = sum(span.stop - span.start for span in spans)
        for layer in range(LAYERS):
            query = self._random(num_tokens, self.heads)
            ours = self.backend.attend(prepared, layer, query, args)
            assert ours.shape == query.shape and ours.dtype == query.dtype
            row = 0
            for span in spans:
                key, value = self.contents[span.request_id, layer][:, : span.stop]
                stop = row + span.stop - span.start
                expected = attend_one(query[row:stop], key, value, torch.arange(span.start, span.stop), args)
                tolerance = 1e-5 if self.dtype == torch.float32 else 0.03
                torch.testing.assert_close(ours[row:stop].float(), expected.float(), rtol=tolerance, atol=tolerance)
                row = stop


def ids(request: str, start: int, stop: int) -> Span:
    return Span(request, start, stop, (0,) * (stop - start), False)


def contexts_of(spans: tuple[Span, ...]) -> dict[str, int]:
    return {span.request_id: span.stop for span in spans}  # the last span of a request ends furthest


@pytest.mark.parametrize("window", [None, 1, 3, 6])
@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
def test_the_reference_is_the_definition(kind: str, window: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(count, heads, DIM, generator=generator) for count, heads in ((3, HEADS), (9, 2), (9, 2)))
    args = args_of(kind, window)
    ours = attend_one(query, key, value, torch.tensor([2, 7, 8]), args)
    for row, position in enumerate((2, 7, 8)):
        for head in range(HEADS):
            weights: dict[int, float] = {}
            for k in range(9):
                if 0 <= position - k < (window or 1000):
                    score = float(query[row, head] @ key[k, head // 2]) * args.scaling
                    weights[k] = math.exp(args.softcap * math.tanh(score / args.softcap) if args.softcap else score)
            total = sum(weights.values()) + (math.exp(float(args.sinks[head])) if args.sinks is not None else 0.0)
            expected = sum((weight / total * value[k, head // 2] for k, weight in weights.items()), torch.zeros(DIM))
            torch.testing.assert_close(ours[row, head], expected, rtol=1e-5, atol=1e-5)


STORY = (
    ids("prompt", 0, 13), ids("more", 9, 20), ids("hole", 0, 4), ids("hole", 8, 10), ids("hole", 17, 23), ids("one", 16, 17),
    ids("two", 5, 6), ids("three", 7, 8), ids("first", 0, 1), ids("long", 45, 46),
)  # fmt: skip
CONTEXTS = {"prompt": 13, "more": 20, "hole": 23, "one": 17, "two": 6, "three": 8, "first": 1, "long": 46, "other": 30}


# The same for chunks of 32: spans that begin and end inside chunks and at their borders, odd and even, longer than a tile and a block of rows.
LONG_STORY = (
    ids("prompt", 0, 77), ids("more", 45, 101), ids("hole", 0, 32), ids("hole", 64, 79), ids("hole", 130, 133), ids("one", 64, 65),
    ids("two", 37, 38), ids("three", 31, 32), ids("first", 0, 1), ids("long", 290, 291), ids("end", 95, 96),
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ragged_spans_over_scattered_slots(variant: str, kv_heads: int, kind: str, window: int | None, dtype: torch.dtype) -> None:
    if variant in NATIVE:
        Bench(variant, contexts_of(LONG_STORY), kv_heads, dtype, dim=16).check(LONG_STORY, args_of(kind, window))
    else:
        Bench(variant, CONTEXTS, kv_heads, dtype).check(STORY, args_of(kind, window))


@st.composite
def spans_of_a_step(draw: st.DrawFn, scale: int = 1) -> tuple[Span, ...]:
    spans = []
    for request in range(draw(st.integers(1, 6))):
        position = draw(st.integers(0, 20 * scale))
        for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
            stop = position + draw(st.sampled_from([1, 1, 2, 5 * scale, 40 * scale]))
            spans.append(ids(f"r{request}", position, min(stop, 60 * scale)))
            position = stop + draw(st.integers(1, 9 * scale))
            if position >= 60 * scale - 1:
                break
    return tuple(spans)


@settings(max_examples=60, deadline=None)
@given(
    spans_of_a_step(), st.sampled_from(["plain", "softcap", "sinks"]), st.sampled_from([None, 2, 9]), st.sampled_from([1, 2, 4]),
    st.sampled_from([0, 600, cpu._BATCH_BYTES]), st.sampled_from([0, 128]),
)  # fmt: skip
def test_any_step_on_the_fast_backend(
    spans: tuple[Span, ...], kind: str, window: int | None, kv_heads: int, batch_bytes: int, fold_queries: int
) -> None:
    """Whatever goes together and however heads are folded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_BATCH_BYTES", batch_bytes)
        patch.setattr(cpu, "_FOLD_QUERIES", fold_queries)
        Bench("cpu", contexts_of(spans), kv_heads, torch.float32).check(spans, args_of(kind, window))


@pytest.mark.parametrize(
    ("window", "function", "replacement"),
    [
        (7, "_first_visible", lambda position, window: max(0, position - window)),  # one key too many
        (7, "_first_visible", lambda position, window: max(0, position - window + 2)),  # one too few
        (None, "_causal_mask", lambda num, like: torch.zeros(num, num, dtype=like.dtype)),  # looks ahead
    ],
)
def test_a_planted_bug_is_caught(monkeypatch: pytest.MonkeyPatch, window: int | None, function: str, replacement: Any) -> None:
    monkeypatch.setattr(cpu, function, replacement)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        Bench("cpu", CONTEXTS, 2, torch.float32).check(STORY, args_of("softcap", window))


def test_what_another_request_left_in_a_slot_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: padded cells that are only masked. 0 times NaN is NaN."""
    monkeypatch.setattr(torch.Tensor, "index_fill_", lambda self, *_: self)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        Bench("cpu", CONTEXTS, 2, torch.float32).check(STORY, args_of("plain"))


def test_an_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'auto' or one of 'native', 'cpu', 'reference', got 'flash'"):
        make_backend("flash", KVGeometry(1, 1, 8, torch.float32), CHUNK, CPU)


def test_a_backend_that_cannot_says_why() -> None:
    with pytest.raises(ConfigError, match=r"cpu: torch.int8 is none of"):
        make_backend("auto", KVGeometry(1, 1, 8, torch.int8), CHUNK, CPU)
