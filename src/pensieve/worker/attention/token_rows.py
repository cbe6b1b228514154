"""A layout that the plain torch backends share.

In a slot's layer all K, then all V, each token's heads side by side. The store is then one matrix whose
contiguous rows are tokens (Hkv * D numbers) or chunks (C * Hkv * D numbers): writing is one `index_copy_` of
tokens and reading one `index_select` of chunks. Gathered chunks follow each other, hence read as (context,
Hkv, D).
"""

from __future__ import annotations

import torch

from pensieve.worker.attention.base import KVGeometry
from pensieve.worker.batch import Batch
from pensieve.worker.kv_store import KVStore


class TokenRows:
    """The first tier seen as rows of K and V."""

    def __init__(self, store: KVStore, geometry: KVGeometry, chunk_tokens: int) -> None:
        self._geometry = geometry
        self._chunk_tokens = chunk_tokens
        numbers = store.data.view(-1).view(geometry.dtype)
        width = geometry.num_kv_heads * geometry.head_dim
        self._tokens = numbers.view(-1, width)
        self._chunks = numbers.view(-1, chunk_tokens * width)
        # Memory for gathered chunks, kept: fresh memory for every layer would cost more in page faults than
        # the copying itself.
        self._gathered = self._chunks.new_empty((2, 0, chunk_tokens * width))

    def first_rows(self, batch: Batch) -> torch.Tensor:
        """(T,), the row of each new token's K in layer 0."""
        offset = batch.slot_mapping % self._chunk_tokens
        slot = batch.slot_mapping // self._chunk_tokens
        return slot * (2 * self._geometry.num_layers * self._chunk_tokens) + offset

    def write(self, first_rows: torch.Tensor, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write K and V, each (T, Hkv, D), into the rows `first_rows` of this layer."""
        rows = first_rows + 2 * layer * self._chunk_tokens
        self._tokens.index_copy_(0, rows, key.reshape(len(rows), -1))
        self._tokens.index_copy_(0, rows + self._chunk_tokens, value.reshape(len(rows), -1))

    def gather(self, slots: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the chunks in these slots (N,), each (N * C, Hkv, D), with cells beyond the context.

        Valid until the next call.
        """
        geometry = self._geometry
        rows = slots * (2 * geometry.num_layers) + 2 * layer
        count = len(slots)
        if count > self._gathered.shape[1]:
            self._gathered = self._chunks.new_empty((2, count, self._chunks.shape[1]))
        shape = (count * self._chunk_tokens, geometry.num_kv_heads, geometry.head_dim)
        key, value = self._gathered[0, :count], self._gathered[1, :count]
        torch.index_select(self._chunks, 0, rows, out=key)
        torch.index_select(self._chunks, 0, rows + 1, out=value)
        return key.view(shape), value.view(shape)
