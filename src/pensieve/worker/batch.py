"""One step's spans as tensors. Knows requests' block tables and token positions; never models, KV bytes or sampling.

Glossary of shapes, here and in the rest of the room:
    T  tokens computed in this step, all spans together
    S  spans of this step
    E  spans that emit a token
    B  chunks of the longest block table of this step
    C  tokens of one chunk (a slot holds one chunk)
    L  layers
    H  query heads; Hkv: key/value heads; G = H / Hkv
    D  numbers of one head
    V  vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pensieve.core.plan import BlockTableUpdate, Span

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward computes. Index tensors are int64, on the model's device, and shared by all layers."""

    spans: tuple[Span, ...]
    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (1, T), absolute position of each token in its sequence
    slot_mapping: torch.Tensor  # (T,), flat slot of each token: slot * C + offset
    cu_seqlens_q: torch.Tensor  # (S + 1,), where each span's tokens begin in T
    context_lens: torch.Tensor  # (S,), tokens a span's last token attends: span.stop
    block_tables: torch.Tensor  # (S, B), slots of each span's chunks; cells beyond its context are 0 and never read
    logit_rows: torch.Tensor  # (E,), index in T of the last token of each emitting span
    emitting: tuple[Span, ...]  # the E spans, in the order of `logit_rows`
    chunk_tokens: int

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.input_ids.shape[1]


class BatchBuilder:
    """Keeps each request's block table and turns spans into a `Batch`. Sole owner of the worker's block tables."""

    def __init__(self, chunk_tokens: int, device: torch.device) -> None:
        self._chunk_tokens = chunk_tokens
        self._device = device
        self._tables: dict[str, IntArray] = {}

    def update(self, updates: Iterable[BlockTableUpdate]) -> None:
        """Write slots from chunk index `first` on; what lay beyond is void."""
        for update in updates:
            table = self._tables.get(update.request_id, np.empty(0, np.int64))
            assert update.first <= len(table), f"table of {update.request_id!r} has {len(table)} chunks, update begins at {update.first}"
            self._tables[update.request_id] = np.concatenate([table[: update.first], np.array(update.slots, np.int64)])

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop the tables of requests that ended."""
        for request_id in request_ids:
            self._tables.pop(request_id, None)

    def slots_of(self, span: Span) -> IntArray:
        """The slots that hold the context of a span, `[0, span.stop)`."""
        num_chunks = -(-span.stop // self._chunk_tokens)
        table = self._tables[span.request_id]
        assert num_chunks <= len(table), f"{span} needs {num_chunks} chunks, its block table has {len(table)}"
        return table[:num_chunks]

    def build(self, spans: tuple[Span, ...], last_token: Callable[[Span], int]) -> Batch:
        """Tensors for these spans, at least one.

        Args:
            spans: in the plan's order; those of one request ascending.
            last_token: the id for a span of one token whose plan did not know it yet.
        """
        assert spans, "a batch needs at least one span"
        starts = np.array([span.start for span in spans], np.int64)
        stops = np.array([span.stop for span in spans], np.int64)
        lengths = stops - starts
        assert (lengths > 0).all(), f"an empty span among {spans}"
        cu_seqlens = np.zeros(len(spans) + 1, np.int64)
        np.cumsum(lengths, out=cu_seqlens[1:])

        contexts = [self.slots_of(span) for span in spans]
        tables = np.zeros((len(spans), max(map(len, contexts))), np.int64)
        for row, context in zip(tables, contexts, strict=True):
            row[: len(context)] = context

        span_of_token = np.repeat(np.arange(len(spans)), lengths)
        positions = np.arange(cu_seqlens[-1]) + (starts - cu_seqlens[:-1])[span_of_token]
        slots = tables[span_of_token, positions // self._chunk_tokens]
        emitting = [index for index, span in enumerate(spans) if span.emits_token]
        return Batch(
            spans=spans,
            input_ids=self._tensor(_token_ids(spans, last_token))[None],
            position_ids=self._tensor(positions)[None],
            slot_mapping=self._tensor(slots * self._chunk_tokens + positions % self._chunk_tokens),
            cu_seqlens_q=self._tensor(cu_seqlens),
            context_lens=self._tensor(stops),
            block_tables=self._tensor(tables),
            logit_rows=self._tensor(cu_seqlens[1:][emitting] - 1),
            emitting=tuple(spans[index] for index in emitting),
            chunk_tokens=self._chunk_tokens,
        )

    def _tensor(self, array: IntArray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def _token_ids(spans: tuple[Span, ...], last_token: Callable[[Span], int]) -> IntArray:
    ids: list[int] = []
    for span in spans:
        known = span.token_ids if span.token_ids is not None else (last_token(span),)
        assert len(known) == span.stop - span.start, f"{len(known)} token ids for [{span.start}, {span.stop}) of {span.request_id!r}"
        ids.extend(known)
    return np.array(ids, np.int64)
