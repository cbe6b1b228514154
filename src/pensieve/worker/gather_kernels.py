"""The Triton kernel of `worker/gather.py`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_rows_kernel(
    source,  # rows of words, `source_stride` apart
    target,
    source_rows,  # (n,) int64
    target_rows,  # (n,) int64
    num_rows,
    source_stride,
    target_stride,
    num_words,  # of a row
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Grid (PROGRAMS,): each takes every PROGRAMS-th block of all rows."""
    blocks = tl.cdiv(num_words, BLOCK)
    for piece in range(tl.program_id(0), num_rows * blocks, PROGRAMS):
        row = piece // blocks
        word = (piece % blocks) * BLOCK + tl.arange(0, BLOCK)
        mask = word < num_words
        from_ = source + tl.load(source_rows + row) * source_stride + word
        to = target + tl.load(target_rows + row) * target_stride + word
        tl.store(to, tl.load(from_, mask=mask), mask=mask)
