"""The Triton kernels: they write K and V, attend over scattered chunks, and combine split contexts.

Knows pointers and strides; never plans. `attention/triton.py` decides what each program does. One program of
`attend_kernel` takes a tile of queries of one span, all query heads of one key head together (rows are
(query, head) pairs), and a range of its context. It is the paper's multi-token paged attention (§4.4) with
the online softmax of FlashAttention-2 (arXiv:2307.08691) and the split over keys of Flash-Decoding.

Scores are in base 2. In Triton's interpreter products of bfloat16 are wrong, so operands become float32 first
(AS_FLOAT).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
ITEM_FIELDS: tl.constexpr = tl.constexpr(8)  # see `triton.WorkItem`
REDUCTION_FIELDS: tl.constexpr = tl.constexpr(4)  # see `triton.Reduction`


@triton.jit
def write_kernel(
    key,  # (T, Hkv, D)
    value,  # (T, Hkv, D)
    store,  # one layer of the first tier: slots of [2][Hkv][C][D], `slot_stride` numbers apart
    slot_mapping,  # (T,) int64
    num_tokens,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    slot_stride,
    NUM_KV_HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Grid (T / BLOCK_T, Hkv): some tokens' numbers of one head, K and V."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1)
    column = tl.arange(0, DIM_PADDED)
    is_token = token < num_tokens
    mask = is_token[:, None] & (column < DIM)[None, :]
    flat = tl.load(slot_mapping + token, mask=is_token, other=0)
    cell = (flat // CHUNK) * slot_stride + head * CHUNK * DIM + (flat % CHUNK) * DIM
    token = token.to(tl.int64)
    k = tl.load(key + token[:, None] * key_token_stride + head * key_head_stride + column[None, :], mask=mask)
    v = tl.load(
        value + token[:, None] * value_token_stride + head * value_head_stride + column[None, :], mask=mask
    )
    place = store + cell[:, None] + column[None, :]
    tl.store(place, k.to(store.dtype.element_ty), mask=mask)
    tl.store(place + NUM_KV_HEADS * CHUNK * DIM, v.to(store.dtype.element_ty), mask=mask)


@triton.jit
def _over_keys(
    highest,  # (M,) so far
    total,  # (M,)
    acc,  # (M, D)
    q,  # (M, D)
    position,  # (M,) of each row's query
    cells,  # this head's K in slot 0
    table,  # the span's block table
    first,  # tokens [first, stop) of the context; a multiple of BLOCK_N
    stop,
    slot_stride,
    scaling,
    softcap,
    window,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AS_FLOAT: tl.constexpr,
):
    """Attend a range of the context.

    Without MASKED every row sees all of it, and it is a whole number of blocks.
    """
    column = tl.arange(0, DIM_PADDED)
    is_number = (column < DIM)[None, :]
    for block in range(first, stop, BLOCK_N):
        token = block + tl.arange(0, BLOCK_N)
        if MASKED:
            slot = tl.load(table + token // CHUNK, mask=token < stop, other=0)
        else:
            slot = tl.load(table + token // CHUNK)
        place = cells + (slot * slot_stride + (token % CHUNK) * DIM)[:, None] + column[None, :]
        if MASKED:  # cells beyond the context may hold NaN, and 0 times NaN is NaN
            is_cell = (token < stop)[:, None] & is_number
            k = tl.load(place, mask=is_cell, other=0.0)
            v = tl.load(place + NUM_KV_HEADS * CHUNK * DIM, mask=is_cell, other=0.0)
        elif DIM == DIM_PADDED:
            k = tl.load(place)
            v = tl.load(place + NUM_KV_HEADS * CHUNK * DIM)
        else:
            k = tl.load(place, mask=is_number, other=0.0)
            v = tl.load(place + NUM_KV_HEADS * CHUNK * DIM, mask=is_number, other=0.0)
        if AS_FLOAT:
            k = k.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        if HAS_SOFTCAP:  # tanh(x) = 1 - 2 / (e^2x + 1)
            scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E / softcap)) + 1.0))
        scores = scores * LOG2E
        if MASKED:
            distance = position[:, None] - token[None, :]
            is_visible = (distance >= 0) & (token < stop)[None, :]
            if HAS_WINDOW:
                is_visible = is_visible & (distance < window)
            scores = tl.where(is_visible, scores, float("-inf"))
        now_highest = tl.maximum(highest, tl.max(scores, 1))
        base = now_highest
        if MASKED:  # a row may have seen no key yet
            base = tl.where(now_highest == float("-inf"), 0.0, now_highest)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(highest - base)
        total = total * fade + tl.sum(weights, 1)
        weights = weights.to(v.dtype)
        if AS_FLOAT:
            weights = weights.to(tl.float32)
            v = v.to(tl.float32)
        acc = acc * fade[:, None] + tl.dot(weights, v, input_precision="ieee")
        highest = now_highest
    return highest, total, acc


@triton.jit
def attend_kernel(
    query,  # (T, H, D)
    output,  # (T, H, D)
    store,  # as above
    items,  # (items, 8) int32
    tables,  # (S, B) int64
    partials,  # (parts, Hkv, M, D padded) float32, of items with a part of their context
    sums,  # (parts, Hkv, 2, M) float32: their highest scores and their sums of weights
    sinks,  # (H,) float32
    query_token_stride,
    query_head_stride,
    output_token_stride,
    output_head_stride,
    slot_stride,
    table_width,
    scaling,
    softcap,
    window,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    AS_FLOAT: tl.constexpr,
):
    """Grid (items, Hkv)."""
    head = tl.program_id(1)
    item = items + tl.program_id(0) * ITEM_FIELDS
    num_queries = tl.load(item + 2)
    if num_queries == 0:  # fills up a captured graph
        return
    span, first_row, first_position = tl.load(item), tl.load(item + 1).to(tl.int64), tl.load(item + 3)
    first, stop, part, num_parts = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6), tl.load(item + 7)

    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, DIM_PADDED)
    member = row % GROUP
    position = first_position + row // GROUP
    mask = (row // GROUP < num_queries)[:, None] & (column < DIM)[None, :]
    token = first_row + row // GROUP
    place = (
        query
        + token[:, None] * query_token_stride
        + (head * GROUP + member)[:, None] * query_head_stride
        + column[None, :]
    )
    q = tl.load(place, mask=mask, other=0.0)
    if AS_FLOAT:
        q = q.to(tl.float32)

    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DIM_PADDED), tl.float32)
    cells = store + head * CHUNK * DIM
    table = tables + span.to(tl.int64) * table_width
    # Every query sees all of the blocks [whole_first, whole_stop); before them is the windows' edge, after
    # them the diagonal.
    whole_first = first
    whole_stop = tl.maximum(first, tl.minimum(stop, first_position + 1) // BLOCK_N * BLOCK_N)
    if HAS_WINDOW:
        oldest = tl.maximum(0, first_position - window + 1)  # the first key that the first query sees
        first = tl.maximum(first, oldest // BLOCK_N * BLOCK_N)
        # the last query sees all keys from here on
        all_see = tl.maximum(0, first_position + num_queries - window)
        whole_first = tl.minimum(tl.maximum(first, (all_see + BLOCK_N - 1) // BLOCK_N * BLOCK_N), stop)
        whole_stop = tl.maximum(whole_first, whole_stop)
        highest, total, acc = _over_keys(
            highest, total, acc, q, position, cells, table, first, whole_first, slot_stride, scaling, softcap,
            window, True, HAS_WINDOW, HAS_SOFTCAP, NUM_KV_HEADS, CHUNK, DIM, DIM_PADDED, BLOCK_N, AS_FLOAT,
        )  # fmt: skip
    highest, total, acc = _over_keys(
        highest, total, acc, q, position, cells, table, whole_first, whole_stop, slot_stride, scaling,
        softcap, window, False, HAS_WINDOW, HAS_SOFTCAP, NUM_KV_HEADS, CHUNK, DIM, DIM_PADDED, BLOCK_N,
        AS_FLOAT,
    )  # fmt: skip
    highest, total, acc = _over_keys(
        highest, total, acc, q, position, cells, table, whole_stop, stop, slot_stride, scaling, softcap,
        window, True, HAS_WINDOW, HAS_SOFTCAP, NUM_KV_HEADS, CHUNK, DIM, DIM_PADDED, BLOCK_N, AS_FLOAT,
    )  # fmt: skip

    if num_parts == 1:
        if HAS_SINKS:
            sink = tl.load(sinks + head * GROUP + member) * LOG2E
            with_sink = tl.maximum(highest, sink)
            fade = tl.exp2(highest - with_sink)
            total = total * fade + tl.exp2(sink - with_sink)
            acc = acc * fade[:, None]
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        place = (
            output
            + token[:, None] * output_token_stride
            + (head * GROUP + member)[:, None] * output_head_stride
            + column[None, :]
        )
        tl.store(place, result.to(output.dtype.element_ty), mask=mask)
    else:
        tile = part.to(tl.int64) * NUM_KV_HEADS + head
        tl.store(partials + (tile * BLOCK_M + row[:, None]) * DIM_PADDED + column[None, :], acc)
        tl.store(sums + tile * 2 * BLOCK_M + row, highest)
        tl.store(sums + (tile * 2 + 1) * BLOCK_M + row, total)


@triton.jit
def reduce_kernel(
    output,  # (T, H, D)
    reductions,  # (reductions, 4) int32
    partials,
    sums,
    sinks,
    output_token_stride,
    output_head_stride,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Grid (reductions, Hkv): a tile of queries whose context was divided."""
    head = tl.program_id(1)
    reduction = reductions + tl.program_id(0) * REDUCTION_FIELDS
    num_queries = tl.load(reduction + 1)
    if num_queries == 0:
        return
    first_row, first_part, num_parts = (
        tl.load(reduction).to(tl.int64),
        tl.load(reduction + 2),
        tl.load(reduction + 3),
    )
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, DIM_PADDED)
    member = row % GROUP
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DIM_PADDED), tl.float32)
    if HAS_SINKS:
        highest = tl.load(sinks + head * GROUP + member) * LOG2E
        total += 1.0
    for part in range(first_part, first_part + num_parts):
        tile = tl.full((), 0, tl.int64) + part * NUM_KV_HEADS + head
        part_highest = tl.load(sums + tile * 2 * BLOCK_M + row)
        part_total = tl.load(sums + (tile * 2 + 1) * BLOCK_M + row)
        now_highest = tl.maximum(highest, part_highest)
        base = tl.where(now_highest == float("-inf"), 0.0, now_highest)  # a window may hide whole parts
        fade, part_fade = tl.exp2(highest - base), tl.exp2(part_highest - base)
        total = total * fade + part_total * part_fade
        numbers = tl.load(partials + (tile * BLOCK_M + row[:, None]) * DIM_PADDED + column[None, :])
        acc = acc * fade[:, None] + numbers * part_fade[:, None]
        highest = now_highest
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    token = first_row + row // GROUP
    mask = (row // GROUP < num_queries)[:, None] & (column < DIM)[None, :]
    place = (
        output
        + token[:, None] * output_token_stride
        + (head * GROUP + member)[:, None] * output_head_stride
        + column[None, :]
    )
    tl.store(place, result.to(output.dtype.element_ty), mask=mask)
