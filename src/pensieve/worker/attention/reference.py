"""Attention as its definition says, one span at a time, in fp32.

The reference for the fast backends; knows no speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pensieve.worker.attention.base import AttentionArgs, AttentionBackend, KVGeometry
from pensieve.worker.attention.token_rows import TokenRows
from pensieve.worker.batch import Batch
from pensieve.worker.kv_store import KVStore


@dataclass(frozen=True, slots=True)
class ReferenceStep:
    """One step's batch, and the row of each new token."""

    batch: Batch
    first_rows: torch.Tensor  # (T,)


class ReferenceAttention(AttentionBackend[ReferenceStep]):
    """Plain torch, on any device and in any floating dtype."""

    name = "reference"

    @classmethod
    def why_not(cls, geometry: KVGeometry, chunk_tokens: int, device: torch.device) -> str | None:
        """It serves every dtype of real numbers."""
        return None if geometry.dtype.is_floating_point else f"{geometry.dtype} holds no fractions"

    def bind(self, store: KVStore) -> None:
        """See the store as rows of tokens."""
        self._rows = TokenRows(store, self.geometry, self.chunk_tokens)

    def prepare(self, batch: Batch) -> ReferenceStep:
        """Only the rows of the new tokens."""
        return ReferenceStep(batch, self._rows.first_rows(batch))

    def write(self, prepared: ReferenceStep, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put the new K and V, each (T, Hkv, D), into their slots."""
        self._rows.write(prepared.first_rows, layer, key, value)

    def attend(
        self, prepared: ReferenceStep, layer: int, query: torch.Tensor, args: AttentionArgs
    ) -> torch.Tensor:
        """(T, H, D) -> (T, H, D), span by span."""
        batch = prepared.batch
        outputs = []
        first = 0
        for index, span in enumerate(batch.spans):
            length = span.stop - span.start
            num_chunks = -(-span.stop // self.chunk_tokens)
            key, value = self._rows.gather(batch.block_tables[index, :num_chunks], layer)
            positions = torch.arange(span.start, span.stop, device=query.device)
            outputs.append(
                attend_one(
                    query[first : first + length], key[: span.stop], value[: span.stop], positions, args
                )
            )
            first += length
        return torch.cat(outputs)


def attend_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, args: AttentionArgs
) -> torch.Tensor:
    """Let tokens of one sequence attend its context.

    Args:
        query: (Q, H, D).
        key: (K, Hkv, D), of positions 0 to K - 1.
        value: (K, Hkv, D).
        positions: (Q,), of the queries.
        args: scaling, window, softcap and sinks.

    Returns:
        (Q, H, D), in the dtype of `query`.
    """
    group = query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(group, dim=1)  # (K, H, D): head h reads key head h // group
    values = value.float().repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys) * args.scaling
    if args.softcap is not None:
        scores = args.softcap * torch.tanh(scores / args.softcap)
    distance = positions[:, None] - torch.arange(len(key), device=query.device)[None, :]  # (Q, K)
    visible = distance >= 0
    if args.sliding_window is not None:
        visible &= distance < args.sliding_window
    scores = scores.masked_fill(~visible, float("-inf"))
    if args.sinks is not None:
        sinks = args.sinks.float()[:, None, None].expand(-1, len(query), 1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)
