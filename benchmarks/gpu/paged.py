"""Requests that are all alike over a scattered cache whose contents are known, so that any kernel's answer can be checked. Knows no clock.

A cache of tens of gigabytes is filled with a pattern of some thousand chunks: what a slot holds in a layer follows from their numbers,
and any request's K and V can be laid out again without a second cache. It is filled through the backend's own `write`: its layout is its business.

Shapes as in `pensieve.worker.batch`; N is a context in tokens, R the layers that are read in turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gpu.common import CHUNK
from pensieve.core.plan import BlockTableUpdate, Span
from pensieve.worker.attention import AttentionArgs, KVGeometry, make_backend
from pensieve.worker.attention.reference import attend_one
from pensieve.worker.batch import Batch, BatchBuilder
from pensieve.worker.kv_store import KVStore

_PATTERN_CHUNKS = 1021  # a prime: neighbours in a table never repeat each other
_LAYER_SHIFT = 131
_LOUD_KEY, _LOUD_VALUE = (
    4.0,
    8.0,
)  # new tokens of a check stand out, so that one that is seen wrongly, or not at all, shows in any context
TOLERANCES = {torch.bfloat16: 4e-2, torch.float16: 5e-3, torch.float32: 2e-3}  # of `worst_error`


@dataclass(frozen=True, slots=True)
class Heads:
    """The shape of one layer's attention."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def kv_bytes(self, num_tokens: int, dtype: torch.dtype) -> int:
        """Of K and V of so many tokens in one layer."""
        return 2 * num_tokens * self.num_kv_heads * self.head_dim * dtype.itemsize


class PagedCase:
    """`requests` requests with `past` tokens each in R layers of scattered slots, and `new` more that attend."""

    def __init__(
        self, heads: Heads, dtype: torch.dtype, device: torch.device, backend: str, *, requests: int, past: int, new: int, layers: int,
        seed: int,
    ) -> None:  # fmt: skip
        self.heads, self.dtype, self.device, self.layers = heads, dtype, device, layers
        self.requests, self.past, self.new, self.context = requests, past, new, past + new
        self.num_chunks = -(-self.context // CHUNK)
        geometry = KVGeometry(layers, heads.num_kv_heads, heads.head_dim, dtype)
        self.backend: Any = make_backend(backend, geometry, CHUNK, device)
        self.store = KVStore(requests * self.num_chunks, layers, self.backend.layer_bytes, device)
        self.backend.bind(self.store)
        self._random = torch.Generator(device).manual_seed(seed)
        self._pattern = self.normal(
            2, min(_PATTERN_CHUNKS, self.store.num_slots), CHUNK, heads.num_kv_heads, heads.head_dim
        )
        slots = torch.randperm(self.store.num_slots, generator=torch.Generator().manual_seed(seed))
        self.tables = slots.view(requests, self.num_chunks).to(device)  # (S, B)
        self._builder = BatchBuilder(CHUNK, device)
        self._names = [f"r{index}" for index in range(requests)]
        self._builder.update(
            BlockTableUpdate(name, 0, tuple(row))
            for name, row in zip(self._names, self.tables.tolist(), strict=True)
        )
        self.args = AttentionArgs(heads.head_dim**-0.5)
        with torch.inference_mode():
            self._fill()
            self.query = self.normal(requests * new, heads.num_heads, heads.head_dim)  # (T, H, D)
            self.key, self.value = self._new_of_pattern(0)  # (T, Hkv, D)
            self.batch = self.batch_of(past, self.context)
            self.prepared = self.backend.prepare(self.batch)

    def normal(self, *shape: int) -> torch.Tensor:
        """Random numbers of this case."""
        return torch.randn(*shape, generator=self._random, device=self.device, dtype=torch.float32).to(
            self.dtype
        )

    def batch_of(self, start: int, stop: int) -> Batch:
        """A step in which every request computes `[start, stop)`."""
        ids = (0,) * (stop - start)
        return self._builder.build(
            tuple(Span(name, start, stop, ids, True) for name in self._names), lambda span: 0
        )

    def attend(self, number: int) -> torch.Tensor:
        """(T, H, D), over the layer whose turn it is."""
        output: torch.Tensor = self.backend.attend(self.prepared, number % self.layers, self.query, self.args)
        return output

    def write(self, number: int) -> None:
        """The new K and V into the layer whose turn it is."""
        self.backend.write(self.prepared, number % self.layers, self.key, self.value)

    def contiguous(self, layer: int, request: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of all requests (S, N, Hkv, D), or of one (N, Hkv, D), one token after the other; the pattern's, new tokens included."""
        tables = self.tables if request is None else self.tables[request : request + 1]
        rows = self._rows(tables, layer)  # (S, B)
        shape = (len(tables), self.num_chunks * CHUNK, self.heads.num_kv_heads, self.heads.head_dim)
        key, value = (part[rows].view(shape)[:, : self.context].contiguous() for part in self._pattern)
        return (key, value) if request is None else (key[0], value[0])

    def paged(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same cache in a plain layout, K and V each (slots, C * Hkv * D): what a copy out of pages starts from."""
        rows = self._rows(torch.arange(self.store.num_slots, device=self.device), layer)
        key, value = (part[rows].view(len(rows), -1) for part in self._pattern)
        return key, value

    def check(self, layer: int, requests: list[int], rows: torch.Tensor | None = None) -> float:
        """How far our attention is off in some requests, with new tokens that stand out (see `worst_error`). The cache is as before afterwards.

        Args:
            layer: of the R.
            requests: whose answers are looked at.
            rows: of a request's new tokens, those looked at; None: all.
        """
        with torch.inference_mode():
            key, value = (
                self.normal(*self.key.shape) * _LOUD_KEY,
                self.normal(*self.value.shape) * _LOUD_VALUE,
            )
            self.backend.write(self.prepared, layer, key, value)
            output = self.backend.attend(self.prepared, layer, self.query, self.args).view(
                self.requests, self.new, *self.query.shape[1:]
            )
            worst = 0.0
            for request in requests:
                mine = slice(request * self.new, (request + 1) * self.new)
                expected = self.expected(layer, request, rows, key[mine], value[mine])
                got = output[request] if rows is None else output[request][rows]
                worst = max(worst, worst_error(got, expected))
            self.backend.write(self.prepared, layer, *self._new_of_pattern(layer))
        return worst

    def expected(
        self,
        layer: int,
        request: int,
        rows: torch.Tensor | None = None,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What one request's new tokens (or some rows of them) must come to, (Q, H, D), by the definition; new K and V (new, Hkv, D) if given."""
        all_keys, all_values = self.contiguous(layer, request)
        if key is not None and value is not None:
            all_keys[self.past :], all_values[self.past :] = key, value
        query = self.query[request * self.new : (request + 1) * self.new]
        positions = torch.arange(self.past, self.context, device=self.device)
        if rows is not None:
            query, positions = query[rows], positions[rows]
        return attend_one(query, all_keys, all_values, positions, self.args)

    def _rows(self, slots: torch.Tensor, layer: int) -> torch.Tensor:
        """Which chunk of the pattern lies in a slot."""
        return (slots + _LAYER_SHIFT * layer) % self._pattern.shape[1]

    def _new_of_pattern(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, Hkv, D) each: what the pattern has where the new tokens lie."""
        positions = torch.arange(self.past, self.context, device=self.device)
        rows = self._rows(self.tables[:, positions // CHUNK], layer)  # (S, new)
        shape = (self.requests * self.new, self.heads.num_kv_heads, self.heads.head_dim)
        key, value = (part[rows, positions % CHUNK].view(shape) for part in self._pattern)
        return key, value

    def _fill(self) -> None:
        """All slots of all layers, through the backend."""
        for first in range(0, self.store.num_slots, _PATTERN_CHUNKS):
            slots = range(first, min(first + _PATTERN_CHUNKS, self.store.num_slots))
            self._builder.update([BlockTableUpdate("fill", 0, tuple(slots))])
            num_tokens = len(slots) * CHUNK
            batch = self._builder.build(
                (Span("fill", 0, num_tokens, (0,) * num_tokens, False),), lambda span: 0
            )
            prepared = self.backend.prepare(batch)
            numbers = torch.tensor(list(slots), device=self.device)
            for layer in range(self.layers):
                rows = self._rows(numbers, layer)
                key, value = (
                    part[rows].view(num_tokens, self.heads.num_kv_heads, self.heads.head_dim)
                    for part in self._pattern
                )
                self.backend.write(prepared, layer, key, value)
        self._builder.forget(["fill"])


def worst_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error of any token's head, relative to its length; NaN is infinitely wrong. Both (Q, H, D)."""
    length = expected.float().norm(dim=-1)
    error = (output.float() - expected.float()).norm(dim=-1) / length.clamp(min=0.05 * float(length.mean()))
    return float(error.nan_to_num(nan=float("inf")).max())
