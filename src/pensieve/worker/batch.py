"""A step's spans as tensors.

Knows requests' block tables and token positions; never models, KV bytes or sampling.

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
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pensieve.core.plan import BlockTableUpdate, Span
from pensieve.worker.pinned import staging

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
    # (S, B), slots of each span's chunks; cells beyond its context are 0 and never read
    block_tables: torch.Tensor
    logit_rows: torch.Tensor  # (E,), index in T of the last token of each emitting span
    emitting_rows: torch.Tensor  # (E,), each one's row of its request, see `BatchBuilder.num_rows`
    # (U,), index in T of tokens whose ids are still on the device: their ids here are 0
    unknown: torch.Tensor
    unknown_rows: torch.Tensor  # (U,), each one's row of its request
    emitting: tuple[Span, ...]  # the E spans, in the order of `logit_rows`
    chunk_tokens: int

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.input_ids.shape[1]


class _Lists(NamedTuple):
    """The numbers of a step's spans."""

    rows: list[int]  # of their requests
    starts: list[int]
    stops: list[int]
    ids: list[int]  # (T,)
    emitting: list[int]  # indices of spans
    unknown: list[int]  # indices in T
    unknown_rows: list[int]


class BatchBuilder:
    """Keeps each request's block table and turns spans into a `Batch`. Sole owner of the block tables.

    All tables are rows of one array, so that a step takes its rows at once. A batch holds copies: a later
    update, or a request that takes a forgotten one's row, never changes a batch that waits to be run.
    """

    def __init__(self, chunk_tokens: int, device: torch.device) -> None:
        self._chunk_tokens = chunk_tokens
        self._device = device
        self._rows: dict[str, int] = {}  # by request
        self._free_rows: list[int] = []
        self._tables = np.zeros((8, 64), np.int64)  # (rows, chunks), 0 beyond a table's end
        self._num_chunks = np.zeros(8, np.int64)  # (rows,), chunks of each table

    def update(self, updates: Iterable[BlockTableUpdate]) -> None:
        """Write slots from chunk index `first` on; later entries are void."""
        for update in updates:
            row = self._rows.get(update.request_id)
            before = 0 if row is None else int(self._num_chunks[row])
            assert update.first <= before, (
                f"table of {update.request_id!r} has {before} chunks, update begins at {update.first}"
            )
            end = update.first + len(update.slots)
            if row is None:
                row = self._rows[update.request_id] = (
                    self._free_rows.pop() if self._free_rows else len(self._rows)
                )
            self._make_room(row, end)
            table = self._tables[row]
            table[update.first : end] = update.slots
            table[end:before] = 0
            self._num_chunks[row] = end

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop the tables of requests that ended."""
        for request_id in request_ids:
            row = self._rows.pop(request_id, None)
            if row is not None:
                self._tables[row, : self._num_chunks[row]] = 0
                self._num_chunks[row] = 0
                self._free_rows.append(row)

    def slots_of(self, span: Span) -> IntArray:
        """The slots that hold a span's context `[0, span.stop)` now."""
        num_chunks = -(-span.stop // self._chunk_tokens)
        row = self._rows[span.request_id]
        self._require(num_chunks, int(self._num_chunks[row]), span)
        return self._tables[row, :num_chunks]

    @property
    def num_rows(self) -> int:
        """Upper bound of the requests' rows. A request keeps its row until it is forgotten."""
        return len(self._tables)

    def build(self, spans: tuple[Span, ...], last_token: Callable[[Span], int | None]) -> Batch:
        """Tensors for these spans, at least one.

        Args:
            spans: in the plan's order; those of one request ascending.
            last_token: gives the id for a span of one token whose plan did not know it yet; None if it is
                still on the device.
        """
        assert spans, "a batch needs at least one span"
        size, num_spans = self._chunk_tokens, len(spans)
        listed = self._list(spans, last_token)
        ids, emitting, unknown = listed.ids, listed.emitting, listed.unknown
        row_of_span, start_of_span, context_lens = np.array(
            (listed.rows, listed.starts, listed.stops), np.int64
        )  # (3, S)
        tables = self._tables_of(spans, row_of_span, context_lens)  # (S, B)

        # One array, so that a device gets one copy: ids, positions, slots (T each), bounds in T, contexts,
        # tables, logit rows, request rows.
        num_tokens, num_emitting, num_unknown = len(ids), len(emitting), len(unknown)
        sizes = (
            num_tokens, num_tokens, num_tokens, num_spans + 1, num_spans, tables.size, num_emitting,
            num_emitting, num_unknown, num_unknown,
        )  # fmt: skip
        tensor, flat = staging(sum(sizes), torch.int64, self._device)
        flat[:num_tokens] = ids
        positions, slots = flat[num_tokens : 2 * num_tokens], flat[2 * num_tokens : 3 * num_tokens]
        cu_seqlens = flat[3 * num_tokens : 3 * num_tokens + num_spans + 1]
        span_of_token = _place(start_of_span, context_lens, positions, cu_seqlens)
        chunks, offsets = np.divmod(positions, size)
        np.add(tables[span_of_token, chunks] * size, offsets, out=slots)
        rest = flat[3 * num_tokens + num_spans + 1 :]
        rest[:num_spans] = context_lens
        rest[num_spans : num_spans + tables.size] = tables.reshape(-1)
        last = rest[num_spans + tables.size :]
        last[:num_emitting] = cu_seqlens[1:][emitting] - 1
        last[num_emitting : 2 * num_emitting] = row_of_span[emitting]
        if num_unknown:
            last[2 * num_emitting : 2 * num_emitting + num_unknown] = unknown
            last[2 * num_emitting + num_unknown :] = listed.unknown_rows

        if self._device.type != "cpu":
            tensor = tensor.to(self._device, non_blocking=True)
        parts = tensor.split_with_sizes(sizes)
        return Batch(
            spans=spans,
            input_ids=parts[0][None],
            position_ids=parts[1][None],
            slot_mapping=parts[2],
            cu_seqlens_q=parts[3],
            context_lens=parts[4],
            block_tables=parts[5].view(tables.shape),
            logit_rows=parts[6],
            emitting_rows=parts[7],
            unknown=parts[8],
            unknown_rows=parts[9],
            emitting=spans if len(emitting) == num_spans else tuple(spans[index] for index in emitting),
            chunk_tokens=size,
        )

    def _list(self, spans: tuple[Span, ...], last_token: Callable[[Span], int | None]) -> _Lists:
        """The numbers of all spans, one list for each kind."""
        lists = _Lists([], [], [], [], [], [], [])
        for index, span in enumerate(spans):
            known, row = span.token_ids, self._rows[span.request_id]
            if known is None:
                token = last_token(span)
                if token is None:
                    lists.unknown.append(len(lists.ids))
                    lists.unknown_rows.append(row)
                known = (0 if token is None else token,)
            assert len(known) == span.stop - span.start > 0, (
                f"{len(known)} token ids for [{span.start}, {span.stop}) of {span.request_id!r}"
            )
            lists.rows.append(row)
            lists.starts.append(span.start)
            lists.stops.append(span.stop)
            lists.ids.extend(known)
            if span.emits_token:
                lists.emitting.append(index)
        return lists

    def _tables_of(self, spans: tuple[Span, ...], row_of_span: IntArray, context_lens: IntArray) -> IntArray:
        """A copy of the spans' block tables, with 0 beyond each context, (S, B)."""
        context_chunks = (context_lens + (self._chunk_tokens - 1)) // self._chunk_tokens
        table_chunks = self._num_chunks[row_of_span]
        width = int(context_chunks.max())
        tables: IntArray = self._tables[row_of_span, :width]
        if (context_chunks != table_chunks).any():
            short = int((context_chunks - table_chunks).argmax())
            self._require(int(context_chunks[short]), int(table_chunks[short]), spans[short])
            tables[np.arange(width) >= context_chunks[:, None]] = 0
        return tables

    def _require(self, needed: int, there: int, span: Span) -> None:
        assert needed <= there, f"{span} needs {needed} chunks, its block table has {there}"

    def _make_room(self, row: int, num_chunks: int) -> None:
        """Make the array large enough for a row of so many chunks."""
        rows, chunks = self._tables.shape
        if row < rows and num_chunks <= chunks:
            return
        more_rows, more_chunks = rows * (2 if row >= rows else 1), chunks
        while more_chunks < num_chunks:
            more_chunks *= 2
        tables = np.zeros((more_rows, more_chunks), np.int64)
        tables[:rows, :chunks] = self._tables
        self._tables = tables
        self._num_chunks = np.concatenate([self._num_chunks, np.zeros(more_rows - rows, np.int64)])


def _place(
    start_of_span: IntArray, context_lens: IntArray, positions: IntArray, cu_seqlens: IntArray
) -> IntArray:
    """Fill in each token's position (T,) and the bounds of spans (S + 1,); returns each token's span (T,)."""
    num_spans = len(start_of_span)
    if len(positions) == num_spans:  # only decodes, as in nearly every step
        cu_seqlens[:] = np.arange(num_spans + 1)
        positions[:] = start_of_span
        return cu_seqlens[:-1]
    lengths = context_lens - start_of_span
    cu_seqlens[0] = 0
    np.cumsum(lengths, out=cu_seqlens[1:])
    span_of_token: IntArray = np.repeat(np.arange(num_spans), lengths)
    positions[:] = np.arange(len(positions)) + (start_of_span - cu_seqlens[:-1])[span_of_token]
    return span_of_token
