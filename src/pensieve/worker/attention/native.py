"""Attention in place, by our own kernel in C (`worker/kernel`): for x86-64 CPUs with AVX2 or more.

Knows pointers; never plans or models.

Nothing is gathered: the kernel follows the block tables and reads each chunk in place, in a layout made for
its products, so that a decode costs the same as reading K and V from memory. All spans of a step go in one
call a layer.

In a slot's layer, KV head by KV head: K, then V. In bfloat16 K is [D/2][C][2] and V [C/2][D][2], in float32
[D][C] and [C][D]. It is fastest with C = 32, the kernel's own width; smaller chunks serve tests.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch

from pensieve.worker.attention.base import AttentionArgs, AttentionBackend, KVGeometry
from pensieve.worker.batch import Batch
from pensieve.worker.kernel import INT, KINDS, POINTER, REAL, Level, levels, library_for, num_threads
from pensieve.worker.kv_store import KVStore
from pensieve.worker.products import LayerCall

_CHUNKS = range(4, 33, 2)  # tokens of a slot: pairs, at most as many as the kernel is wide
_HEAD_STEP = 16  # numbers of its widest vector
_UNBOUNDED = 1 << 40  # a window that hides nothing
_PART_CHUNKS = 8  # a context is divided among threads into parts of at least so many chunks


class _AttentionCall(ctypes.Structure):
    """`struct call` of worker/kernel/call.h, field by field."""

    _fields_ = [
        ("store", POINTER), ("slot_bytes", INT), ("layer_bytes", INT), ("kind", INT), ("num_kv_heads", INT),
        ("head_dim", INT), ("chunk_tokens", INT), ("level", INT), ("num_threads", INT), ("part_chunks", INT),
        ("first_rows", POINTER), ("stops", POINTER), ("tables", POINTER), ("slot_mapping", POINTER),
        ("num_spans", INT), ("table_width", INT), ("num_tokens", INT), ("layer", INT), ("key", POINTER),
        ("value", POINTER), ("key_token_stride", INT), ("key_head_stride", INT), ("value_token_stride", INT),
        ("value_head_stride", INT), ("query", POINTER), ("query_token_stride", INT),
        ("query_head_stride", INT), ("num_heads", INT), ("output", POINTER), ("sinks", POINTER),
        ("scaling", REAL), ("softcap", REAL), ("window", INT), ("scratch", POINTER), ("scratch_bytes", INT),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class NativeStep:
    """One step's batch, whose tensors the call points into."""

    batch: Batch
    call: _AttentionCall


class NativeAttention(AttentionBackend[NativeStep]):
    """The default on a CPU, if it was compiled."""

    name = "native"

    def __init__(self, geometry: KVGeometry, chunk_tokens: int, level: Level | None = None) -> None:
        """`level` None takes the highest level of this CPU."""
        super().__init__(geometry, chunk_tokens)
        library = library_for("call", ctypes.sizeof(_AttentionCall))
        assert not isinstance(library, str), library
        self._kernel = library
        self._level = levels()[-1] if level is None else level
        assert self._level in levels(), f"this CPU has no {self._level.name}"
        self._scratch = torch.empty(0, dtype=torch.uint8)

    @classmethod
    def why_not(cls, geometry: KVGeometry, chunk_tokens: int, device: torch.device) -> str | None:
        """It serves bfloat16 and float32, heads of a multiple of 16, chunks of up to 32 tokens."""
        if device.type != "cpu":
            return f"it runs on a CPU, not on {device}"
        if geometry.dtype not in KINDS:
            return f"{geometry.dtype} is neither bfloat16 nor float32"
        if chunk_tokens not in _CHUNKS:
            return f"chunks of {chunk_tokens} tokens are no even number from {_CHUNKS[0]} to {_CHUNKS[-1]}"
        if geometry.head_dim % _HEAD_STEP:
            return f"heads of {geometry.head_dim} numbers are no multiple of {_HEAD_STEP}"
        library = library_for("call", ctypes.sizeof(_AttentionCall))
        return library if isinstance(library, str) else None

    def bind(self, store: KVStore) -> None:
        """Remember where the slots are."""
        self._store = store

    def prepare(self, batch: Batch) -> NativeStep:
        """Everything that the layers share, as the kernel reads it."""
        geometry, store = self.geometry, self._store
        call = _AttentionCall(
            store=store.data.data_ptr(),
            slot_bytes=store.slot_bytes,
            layer_bytes=store.layer_bytes,
            kind=KINDS[geometry.dtype],
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            chunk_tokens=self.chunk_tokens,
            level=self._level,
            num_threads=num_threads(),
            part_chunks=_PART_CHUNKS,
            first_rows=batch.cu_seqlens_q.data_ptr(),
            stops=batch.context_lens.data_ptr(),
            tables=batch.block_tables.data_ptr(),
            slot_mapping=batch.slot_mapping.data_ptr(),
            num_spans=len(batch.spans),
            table_width=batch.block_tables.shape[1],
            num_tokens=batch.num_tokens,
        )
        return NativeStep(batch, call)

    def write(self, prepared: NativeStep, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put the new K and V, each (T, Hkv, D), into their slots."""
        key, value = self._plain(key), self._plain(value)
        call = prepared.call
        call.layer = layer
        call.key, call.value = key.data_ptr(), value.data_ptr()
        call.key_token_stride, call.key_head_stride, _ = key.stride()
        call.value_token_stride, call.value_head_stride, _ = value.stride()
        self._kernel.pensieve_write(ctypes.byref(call))

    def attend(
        self, prepared: NativeStep, layer: int, query: torch.Tensor, args: AttentionArgs
    ) -> torch.Tensor:
        """(T, H, D) -> (T, H, D), in one call for all spans."""
        rows = self._plain(query)
        output = torch.empty(query.shape, dtype=rows.dtype)
        sinks = None if args.sinks is None else args.sinks.float().contiguous()
        call = prepared.call
        call.query, call.output = rows.data_ptr(), output.data_ptr()
        call.query_token_stride, call.query_head_stride, _ = rows.stride()
        _set_layer(call, layer, query.shape[1], args, None if sinks is None else sinks.data_ptr())
        while need := self._with_scratch(call, self._kernel.pensieve_attend, ctypes.byref(call)):
            self._scratch = torch.empty(need, dtype=torch.uint8)
        return output.to(query.dtype)

    def run_layer(
        self, prepared: NativeStep, layer: int, num_heads: int, args: AttentionArgs, work: LayerCall
    ) -> None:
        """Run a whole layer of a model without sinks in one call, writing and attending included."""
        call = prepared.call
        _set_layer(call, layer, num_heads, args, None)
        while need := self._with_scratch(
            call, self._kernel.pensieve_layer, ctypes.byref(work), ctypes.byref(call)
        ):
            self._scratch = torch.empty(need, dtype=torch.uint8)

    def _with_scratch(self, call: _AttentionCall, function: Any, *arguments: Any) -> int:
        """Call a kernel with the scratch memory; returns the bytes of it that the kernel needs first, or 0.

        The memory is kept: the next layer needs as much.
        """
        call.scratch, call.scratch_bytes = self._scratch.data_ptr(), len(self._scratch)
        need: int = function(*arguments)
        return need

    def _plain(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows in the cache's dtype with each head's numbers contiguous; copied only if they are not so."""
        if rows.dtype != self.geometry.dtype or rows.stride(2) != 1:
            return rows.to(self.geometry.dtype).contiguous()
        return rows


def _set_layer(
    call: _AttentionCall, layer: int, num_heads: int, args: AttentionArgs, sinks: int | None
) -> None:
    call.layer, call.num_heads, call.sinks = layer, num_heads, sinks
    call.scaling, call.softcap = args.scaling, args.softcap or 0.0
    call.window = _UNBOUNDED if args.sliding_window is None else args.sliding_window
