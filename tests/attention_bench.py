"""Contexts in scattered slots, any attention backend over them, and the reference as their judge."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from pensieve.core.plan import BlockTableUpdate, Span
from pensieve.worker import kernel
from pensieve.worker.attention import AttentionArgs, KVGeometry, make_backend
from pensieve.worker.attention.native import NativeAttention
from pensieve.worker.attention.reference import attend_one
from pensieve.worker.attention.triton import TritonAttention
from pensieve.worker.batch import Batch, BatchBuilder
from pensieve.worker.kv_store import KVStore

CPU = torch.device("cpu")
CHUNK = 4
LAYERS = 2
HEADS, DIM = 4, 8
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.005}


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
        heads: int = HEADS,
        dim: int = DIM,
        chunk: int = CHUNK,
        device: torch.device = CPU,
        num_programs: int | None = None,
    ) -> None:
        self.chunk, self.device = chunk, device
        name, _, level = variant.partition(" ")
        geometry = KVGeometry(LAYERS, kv_heads, dim, dtype)
        self.backend: Any = make_backend(name, geometry, self.chunk, device)
        if level:
            self.backend = NativeAttention(geometry, self.chunk, kernel.Level[level])
        if num_programs is not None:
            self.backend = TritonAttention(geometry, self.chunk, num_programs=num_programs)
        counts = {request: -(-length // self.chunk) for request, length in contexts.items()}
        self.store = KVStore(sum(counts.values()) + 8, LAYERS, self.backend.layer_bytes, device)
        self.backend.bind(self.store)
        self.store.data.fill_(0xFF)  # NaN
        self.builder = BatchBuilder(self.chunk, device)
        self.generator = torch.Generator().manual_seed(0)
        free = torch.randperm(self.store.num_slots, generator=self.generator).tolist()
        for request, count in counts.items():
            self.builder.update([BlockTableUpdate(request, 0, tuple(free.pop() for _ in range(count)))])
        self.heads, self.dim, self.dtype = heads, dim, dtype
        self.contents = {
            (request, layer): self._random(2, length, kv_heads)
            for request, length in contexts.items()
            for layer in range(LAYERS)
        }

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, self.dim, generator=self.generator).to(self.dtype).to(self.device)

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

    def lay(self, *spans: Span) -> None:
        """Have K and V of these spans in their slots, as `write` would.

        Triton's interpreter takes seconds for what a GPU writes at once, and the kernel is tried by the spans of the step itself.
        """
        if not isinstance(self.backend, TritonAttention) or self.device.type != "cpu":
            self.write(*spans)
            return
        places = self.batch(*spans).slot_mapping
        _, _, kv_heads, _ = next(iter(self.contents.values())).shape
        numbers = self.store.data.view(self.dtype).view(
            self.store.num_slots, LAYERS, 2, kv_heads, self.chunk, self.dim
        )
        for layer in range(LAYERS):
            pieces = [self.contents[span.request_id, layer][:, span.start : span.stop] for span in spans]
            numbers[places // self.chunk, layer, :, :, places % self.chunk] = torch.cat(
                pieces, dim=1
            ).transpose(0, 1)

    def fill(self, spans: tuple[Span, ...]) -> Any:
        """Everything before the spans is there already, then the spans are written."""
        prompts: dict[str, int] = {}
        for span in spans:
            prompts.setdefault(span.request_id, span.start)
        if resident := [ids(request, 0, stop) for request, stop in prompts.items() if stop]:
            self.lay(*resident)
        written = {span.request_id: 0 for span in spans}
        for span in spans:  # between two spans of one request lies what is resident already
            between = max(written[span.request_id], prompts[span.request_id])
            if between < span.start:
                self.lay(ids(span.request_id, between, span.start))
            written[span.request_id] = span.stop
        return self.write(*spans)

    def check(self, spans: tuple[Span, ...], args: AttentionArgs) -> Any:
        """Attention equals the definition. Returns the step that was prepared for it."""
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
                expected = attend_one(
                    query[row:stop], key, value, torch.arange(span.start, span.stop, device=self.device), args
                )
                tolerance = TOLERANCE[self.dtype]
                torch.testing.assert_close(
                    ours[row:stop].float(), expected.float(), rtol=tolerance, atol=tolerance
                )
                row = stop
        return prepared


def ids(request: str, start: int, stop: int) -> Span:
    return Span(request, start, stop, (0,) * (stop - start), False)


def contexts_of(spans: tuple[Span, ...]) -> dict[str, int]:
    return {span.request_id: span.stop for span in spans}  # the last span of a request ends furthest


STORY = (
    ids("prompt", 0, 13), ids("more", 9, 20), ids("hole", 0, 4), ids("hole", 8, 10), ids("hole", 17, 23), ids("one", 16, 17),
    ids("two", 5, 6), ids("three", 7, 8), ids("first", 0, 1), ids("long", 45, 46),
)  # fmt: skip
CONTEXTS = {
    "prompt": 13,
    "more": 20,
    "hole": 23,
    "one": 17,
    "two": 6,
    "three": 8,
    "first": 1,
    "long": 46,
    "other": 30,
}


# The same for chunks of 32: spans that begin and end inside chunks and at their borders, odd and even, longer than a tile and a block of rows.
LONG_STORY = (
    ids("prompt", 0, 77), ids("more", 45, 101), ids("hole", 0, 32), ids("hole", 64, 79), ids("hole", 130, 133), ids("one", 64, 65),
    ids("two", 37, 38), ids("three", 31, 32), ids("first", 0, 1), ids("long", 290, 291), ids("end", 95, 96),
)  # fmt: skip


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
