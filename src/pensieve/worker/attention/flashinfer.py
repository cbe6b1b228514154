"""Attention by FlashInfer, if it is installed and asked for. Knows its calls; never plans or models.

Our own kernel writes K and V, in the same layout as `triton`'s (FlashInfer calls it HND, with a chunk as
page). Each span is a "request" to FlashInfer whose context ends where the span does: its causal mask is
aligned there, as a span's is. Layers of one kind (window, softcap, scaling, heads) share a plan, made once a
step on the host, so decodes are not captured as graphs.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pensieve.worker.attention.base import AttentionArgs, KVGeometry
from pensieve.worker.attention.triton import TritonAttention
from pensieve.worker.batch import Batch
from pensieve.worker.kv_store import KVStore

_HEAD_DIMS = (64, 128, 256)  # head sizes for which it has both prebuilt and generated kernels
_WORKSPACE_BYTES = 256 << 20

Kind = tuple[int, float, int, float]  # query heads, scaling, window (-1 for none), softcap (0 for none)


@dataclass(frozen=True, slots=True)
class Plans:
    """One step's batch and, by kind of layer, whether its plan was made."""

    batch: Batch
    made: set[Kind] = field(default_factory=set)


class FlashInferAttention(TritonAttention):
    """Used by name only: "auto" takes our own kernel."""

    name = "flashinfer"

    def __init__(self, geometry: KVGeometry, chunk_tokens: int) -> None:
        super().__init__(geometry, chunk_tokens)
        self._library: Any = importlib.import_module("flashinfer")
        self._wrappers: dict[Kind, Any] = {}

    @classmethod
    def why_not(cls, geometry: KVGeometry, chunk_tokens: int, device: torch.device) -> str | None:
        """It serves half precision and a few head sizes, on CUDA."""
        if geometry.dtype not in (torch.bfloat16, torch.float16):
            return f"{geometry.dtype} is neither bfloat16 nor float16"
        if geometry.head_dim not in _HEAD_DIMS:
            return f"heads of {geometry.head_dim} numbers are none of {', '.join(map(str, _HEAD_DIMS))}"
        if importlib.util.find_spec("flashinfer") is None:
            return "FlashInfer is not installed (pip install flashinfer-python)"
        return super().why_not(geometry, chunk_tokens, device)

    @classmethod
    def why_not_args(cls, args: Sequence[AttentionArgs]) -> str | None:
        """It has no sinks."""
        return "the model's attention has sinks" if any(each.sinks is not None for each in args) else None

    def bind(self, store: KVStore) -> None:
        """See the store as pages of each layer."""
        super().bind(store)
        geometry = self.geometry
        shape = (store.num_slots, 2, geometry.num_kv_heads, self.chunk_tokens, geometry.head_dim)
        self._pages = [
            store.layer(layer).view(geometry.dtype).view(shape) for layer in range(store.num_layers)
        ]
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=store.device)

    def prepare(self, batch: Batch) -> Any:
        """Only the batch; the plans when the first layer of each kind needs them."""
        return Plans(batch)

    def write(self, prepared: Any, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put the new K and V, each (T, Hkv, D), into their slots, in one launch."""
        self.write_slots(prepared.batch.slot_mapping, layer, key, value)

    def attend(self, prepared: Any, layer: int, query: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
        """(T, H, D) -> (T, H, D)."""
        kind = (
            query.shape[1],
            args.scaling,
            -1 if args.sliding_window is None else args.sliding_window - 1,
            args.softcap or 0.0,
        )
        wrapper = self._wrappers.get(kind)
        if wrapper is None:
            wrapper = self._wrappers[kind] = self._library.BatchPrefillWithPagedKVCacheWrapper(
                self._workspace, "HND"
            )
        if kind not in prepared.made:
            self._plan(wrapper, prepared.batch, kind)
            prepared.made.add(kind)
        pages = self._pages[layer]
        output: torch.Tensor = wrapper.run(
            query.to(self.geometry.dtype).contiguous(), (pages[:, 0], pages[:, 1])
        )
        return output.to(query.dtype)

    def _plan(self, wrapper: Any, batch: Batch, kind: Kind) -> None:
        num_heads, scaling, window_left, softcap = kind
        starts = np.array([span.start for span in batch.spans], np.int32)
        stops = np.array([span.stop for span in batch.spans], np.int32)
        num_chunks = -(-stops // self.chunk_tokens)
        is_page = torch.from_numpy(np.arange(num_chunks.max()) < num_chunks[:, None])
        indices = batch.block_tables.cpu()[:, : is_page.shape[1]][is_page].to(torch.int32)
        wrapper.plan(
            qo_indptr=_bounds(stops - starts),
            paged_kv_indptr=_bounds(num_chunks),
            paged_kv_indices=indices.to(batch.block_tables.device),
            paged_kv_last_page_len=torch.from_numpy((stops - 1) % self.chunk_tokens + 1),
            num_qo_heads=num_heads,
            num_kv_heads=self.geometry.num_kv_heads,
            head_dim_qk=self.geometry.head_dim,
            page_size=self.chunk_tokens,
            causal=True,
            sm_scale=scaling,
            window_left=window_left,
            logits_soft_cap=softcap or None,
            q_data_type=self.geometry.dtype,
            kv_data_type=self.geometry.dtype,
        )


def _bounds(counts: Any) -> torch.Tensor:
    """(n + 1,) int32, on the host: where each of n pieces of these lengths begins, and the end."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
