"""Gathers K and V, then calls `scaled_dot_product_attention`: built for a CPU, correct on any device.

Knows layouts and masks; never plans or models.

Once a step and kind of layer (full, or of one window) it works out which spans go together, the rows to
gather, the masks. Query heads that share a key head are folded into the query dimension, so that K and V are
never repeated. Spans of one token with contexts of similar length go as one batch; spans of one request read
their common context once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch.nn.functional import scaled_dot_product_attention

from pensieve.core.plan import Span
from pensieve.worker.attention.base import AttentionArgs, AttentionBackend, KVGeometry
from pensieve.worker.attention.token_rows import TokenRows
from pensieve.worker.batch import Batch
from pensieve.worker.kv_store import KVStore

_FOLD_QUERIES = (
    128  # folded queries need a mask row each; beyond this many the kernel's own grouping costs less
)
# Single tokens go in one batch while the K they read, padded, stays in a core's cache: up to 2 times as fast
# as one by one for contexts of 40 tokens, 1.3 times for 500; beyond it slower (SmolLM2's shape, one core).
_BATCH_BYTES = 2 << 20
_MOST_SCORES = 32 << 20  # of one span that are held at once, 64 MB each of scores and of weights
_MIN_VALUE = float("-inf")


@dataclass(frozen=True, slots=True)
class RequestQueries:
    """The spans of one request: its queries, and the keys they may see."""

    first: int  # rows [first, stop) of T
    stop: int
    slots: torch.Tensor  # (N,), chunks that hold visible keys
    key_start: int  # of the gathered cells, [key_start, key_stop) are the keys
    key_stop: int
    mask: torch.Tensor | None  # (Q, K), added to the scores; None if every query sees every key
    masked_from: int  # every query sees all keys before this one
    is_causal: bool  # query i sees keys 0 to i: the kernel needs no mask for that


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Single-token spans of several requests, padded to the longest context."""

    rows: torch.Tensor  # (N,), rows of T
    slots: torch.Tensor  # (N * B,), chunks of one after the other
    unused: torch.Tensor  # cells of the gathered N * B * C that hold no key of their request
    mask: torch.Tensor  # (N, 1, 1, B * C), added to the scores


@dataclass(frozen=True, slots=True)
class CpuStep:
    """One step's batch and, by window, how its spans attend."""

    batch: Batch
    first_rows: torch.Tensor  # (T,)
    work: dict[int | None, list[RequestQueries | TokenBatch]] = field(default_factory=dict)


class CpuAttention(AttentionBackend[CpuStep]):
    """The default if no kernel of our own runs."""

    name = "cpu"

    @classmethod
    def why_not(cls, geometry: KVGeometry, chunk_tokens: int, device: torch.device) -> str | None:
        """It serves every floating dtype that torch's attention takes."""
        if geometry.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            return f"{geometry.dtype} is none of float32, bfloat16, float16, float64"
        return None

    def bind(self, store: KVStore) -> None:
        """See the store as rows of tokens and chunks."""
        self._rows = TokenRows(store, self.geometry, self.chunk_tokens)

    def prepare(self, batch: Batch) -> CpuStep:
        """Only the rows of the new tokens; the rest when the first layer of each kind needs it."""
        return CpuStep(batch, self._rows.first_rows(batch))

    def write(self, prepared: CpuStep, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put the new K and V, each (T, Hkv, D), into their slots."""
        self._rows.write(prepared.first_rows, layer, key, value)

    def attend(self, prepared: CpuStep, layer: int, query: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
        """(T, H, D) -> (T, H, D)."""
        work = prepared.work.get(args.sliding_window)
        if work is None:
            work = list(self._plan(prepared.batch, args.sliding_window, query.dtype))
            prepared.work[args.sliding_window] = work
        if len(work) == 1 and isinstance(work[0], RequestQueries):
            return self._attend_run(work[0], layer, query, args)
        output = torch.empty_like(query)
        for item in work:
            if isinstance(item, RequestQueries):
                output[item.first : item.stop] = self._attend_run(
                    item, layer, query[item.first : item.stop], args
                )
            else:
                output.index_copy_(
                    0, item.rows, self._attend_tokens(item, layer, query.index_select(0, item.rows), args)
                )
        return output

    def _attend_run(
        self, run: RequestQueries, layer: int, query: torch.Tensor, args: AttentionArgs
    ) -> torch.Tensor:
        """(Q, H, D) -> (Q, H, D)."""
        key, value = self._rows.gather(run.slots, layer)
        key = key[run.key_start : run.key_stop].transpose(0, 1)[None]  # (1, Hkv, K, D)
        value = value[run.key_start : run.key_stop].transpose(0, 1)[None]
        num_queries, num_heads, head_dim = query.shape
        group = num_heads // key.shape[1]
        plain = args.softcap is None and args.sinks is None
        by_products = _products_pay(query, run, key.shape[2])
        if plain and not by_products and (run.is_causal or group * num_queries > _FOLD_QUERIES):
            queries = query.transpose(0, 1)[None]  # (1, H, Q, D)
            out = scaled_dot_product_attention(
                queries,
                key,
                value,
                run.mask,
                is_causal=run.is_causal,
                scale=args.scaling,
                enable_gqa=group > 1,
            )
            return out[0].transpose(0, 1)
        folded = (
            query.view(num_queries, -1, group, head_dim)
            .permute(1, 2, 0, 3)
            .reshape(1, -1, group * num_queries, head_dim)
        )
        if plain and by_products:
            out = _attend_by_products(folded, key, value, run, args.scaling)
        elif plain:
            mask = None if run.mask is None else run.mask.repeat(group, 1)
            out = scaled_dot_product_attention(folded, key, value, mask, scale=args.scaling)
        else:
            mask = _causal_mask(num_queries, query) if run.is_causal else run.mask
            out = _attend_by_hand(folded, key, value, mask, group, args)
        return out.view(-1, group, num_queries, head_dim).permute(2, 0, 1, 3).reshape(query.shape)

    def _attend_tokens(
        self, tokens: TokenBatch, layer: int, query: torch.Tensor, args: AttentionArgs
    ) -> torch.Tensor:
        """(N, H, D) -> (N, H, D)."""
        key, value = self._rows.gather(tokens.slots, layer)
        # A masked cell still meets a weight of 0, and 0 * NaN is NaN: another request's bytes there must not
        # be read.
        key.index_fill_(0, tokens.unused, 0)
        value.index_fill_(0, tokens.unused, 0)
        count, num_heads, head_dim = query.shape
        num_kv_heads = key.shape[1]
        key = key.view(count, -1, num_kv_heads, head_dim).transpose(1, 2)  # (N, Hkv, B * C, D)
        value = value.view(count, -1, num_kv_heads, head_dim).transpose(1, 2)
        group = num_heads // num_kv_heads
        folded = query.view(count, num_kv_heads, group, head_dim)
        if args.softcap is None and args.sinks is None:
            out = scaled_dot_product_attention(folded, key, value, tokens.mask, scale=args.scaling)
        else:
            out = _attend_by_hand(folded, key, value, tokens.mask, group, args)
        return out.reshape(query.shape)

    # -- once per step and window

    def _plan(
        self, batch: Batch, window: int | None, dtype: torch.dtype
    ) -> Iterator[RequestQueries | TokenBatch]:
        runs: list[tuple[int, int, list[Span]]] = []  # (row in T, row in S, spans of one request)
        row = index = 0
        for _, group in groupby(batch.spans, key=lambda span: span.request_id):
            spans = list(group)
            runs.append((row, index, spans))
            row += sum(span.stop - span.start for span in spans)
            index += len(spans)
        singles = []
        most = _BATCH_BYTES // (self.layer_bytes // 2)  # chunks of a batch
        for row, index, spans in runs:
            first_chunk = _first_visible(spans[0].start, window) // self.chunk_tokens
            num_chunks = -(-spans[-1].stop // self.chunk_tokens) - first_chunk
            if len(spans) == 1 and spans[0].stop - spans[0].start == 1 and 2 * num_chunks <= most:
                singles.append((num_chunks, row, index, spans[0]))
            else:
                yield self._run(batch, row, index, spans, window, dtype)
        yield from self._token_batches(batch, singles, most, window, dtype)

    def _run(
        self, batch: Batch, row: int, index: int, spans: list[Span], window: int | None, dtype: torch.dtype
    ) -> RequestQueries:
        size, device = self.chunk_tokens, batch.input_ids.device
        lowest = _first_visible(spans[0].start, window)
        first_chunk, context = lowest // size, spans[-1].stop
        slots = batch.block_tables[index + len(spans) - 1, first_chunk : -(-context // size)]
        num_queries = sum(span.stop - span.start for span in spans)
        is_causal = (
            len(spans) == 1
            and spans[0].start == 0
            and num_queries > 1
            and (window is None or num_queries <= window)
        )
        mask = None
        if num_queries > 1 and not is_causal:
            positions = batch.position_ids[0, row : row + num_queries, None]
            distance = positions - torch.arange(lowest, context, device=device)
            hidden = distance < 0
            if window is not None:
                hidden |= distance >= window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, _MIN_VALUE)
        offset = first_chunk * size
        masked_from = spans[0].start - lowest if window is None else 0
        return RequestQueries(
            row, row + num_queries, slots, lowest - offset, context - offset, mask, masked_from, is_causal
        )

    def _token_batches(
        self,
        batch: Batch,
        singles: list[tuple[int, int, int, Span]],
        most: int,
        window: int | None,
        dtype: torch.dtype,
    ) -> Iterator[RequestQueries | TokenBatch]:
        """Batches of at most `most` chunks, of contexts of similar length: padding is under a third."""
        singles.sort(key=lambda single: single[0])
        while singles:
            longest = singles[-1][0]
            members = [
                single for single in singles[-max(1, most // longest) :] if 4 * single[0] >= 3 * longest
            ]
            del singles[len(singles) - len(members) :]
            if len(members) == 1:
                _, row, index, span = members[0]
                yield self._run(batch, row, index, [span], window, dtype)
            else:
                yield self._token_batch(batch, members, longest, window, dtype)

    def _token_batch(
        self,
        batch: Batch,
        members: list[tuple[int, int, int, Span]],
        num_chunks: int,
        window: int | None,
        dtype: torch.dtype,
    ) -> TokenBatch:
        size, device = self.chunk_tokens, batch.input_ids.device
        tables, starts, lowest, contexts = [], [], [], []
        for own_chunks, _, index, span in members:
            first_chunk = -(-span.stop // size) - own_chunks
            slots = batch.block_tables[index, first_chunk : first_chunk + own_chunks]
            tables.append(torch.cat([slots, slots[:1].expand(num_chunks - own_chunks)]))
            starts.append(first_chunk * size)
            lowest.append(_first_visible(span.start, window))
            contexts.append(span.stop)
        cells = (
            torch.arange(num_chunks * size) + torch.tensor(starts)[:, None]
        )  # (N, B * C), the position each cell would hold
        hidden = (cells < torch.tensor(lowest)[:, None]) | (cells >= torch.tensor(contexts)[:, None])
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, _MIN_VALUE)
        return TokenBatch(
            rows=torch.tensor([row for _, row, _, _ in members], device=device),
            slots=torch.cat(tables),
            unused=hidden.view(-1).nonzero().view(-1).to(device),
            mask=mask[:, None, None, :].to(device),
        )


def _first_visible(position: int, window: int | None) -> int:
    """The first key that a query at this position may see."""
    return 0 if window is None else max(0, position - window + 1)


def _causal_mask(num_queries: int, like: torch.Tensor) -> torch.Tensor:
    """(Q, Q), for queries and keys that both begin at position 0."""
    return torch.full((num_queries, num_queries), _MIN_VALUE, dtype=like.dtype, device=like.device).triu_(1)


def _products_pay(query: torch.Tensor, run: RequestQueries, num_keys: int) -> bool:
    """Whether two plain matrix products beat torch's fused kernel.

    Its blocks are small, and for bfloat16 each is a call into oneDNN: 60 queries over 1,084 keys take 1.4 ms
    a layer against 0.8 (SmolLM2's shape, 2 cores of an EPYC with AVX512-BF16). In float32, and where it can
    skip the half above the diagonal, it wins; and it never holds all scores at once, which for many queries
    over a long context would be more memory than a step may take.
    """
    if query.dtype != torch.bfloat16 or run.is_causal or (run.mask is None and num_keys < 1024):
        return False
    return query.shape[0] * query.shape[1] * num_keys <= _MOST_SCORES


def _attend_by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, run: RequestQueries, scaling: float
) -> torch.Tensor:
    """Softmax(query key^T scaling + mask) value, as two batched products.

    Scores are rounded as eager attention rounds them.

    Args:
        query: (1, Hkv, G * Q, D).
        key: (1, Hkv, K, D).
        value: (1, Hkv, K, D).
        run: its mask; only the columns that hide something are added.
        scaling: of the scores.

    Returns:
        (1, Hkv, G * Q, D).
    """
    scores = torch.bmm((query[0] * scaling), key[0].contiguous().transpose(1, 2))  # (Hkv, G * Q, K)
    if run.mask is not None:
        scores.view(scores.shape[0], -1, *run.mask.shape)[..., run.masked_from :].add_(
            run.mask[:, run.masked_from :]
        )
    return torch.bmm(torch.softmax(scores, dim=-1), value[0].contiguous())[None]


def _attend_by_hand(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    group: int,
    args: AttentionArgs,
) -> torch.Tensor:
    """Softcap and sinks, which torch's kernel does not support.

    Args:
        query: (N, Hkv, G * Q, D).
        key: (N, Hkv, K, D).
        value: (N, Hkv, K, D).
        mask: broadcastable to (N, Hkv, Q, K), added to the scores.
        group: G.
        args: scaling, softcap and sinks.

    Returns:
        (N, Hkv, G * Q, D).
    """
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * args.scaling
    if args.softcap is not None:
        scores = args.softcap * torch.tanh(scores / args.softcap)
    count, num_kv_heads, folded, num_keys = scores.shape
    scores = scores.view(count, num_kv_heads, group, folded // group, num_keys)
    if mask is not None:
        scores = scores + (mask if mask.ndim == 2 else mask[:, :, None])
    if args.sinks is not None:
        sinks = args.sinks.float().view(1, num_kv_heads, group, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return torch.matmul(weights.reshape(count, num_kv_heads, folded, num_keys).to(value.dtype), value)
