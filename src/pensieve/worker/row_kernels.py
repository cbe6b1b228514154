"""The Triton kernels of `worker/device_rows.py`: norms, rotations and gates of a Llama-like layer.

Sums are in float32; each result is rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_kernel(
    residual,  # (T, h)
    delta,  # (T, h), added to `residual` first; None adds nothing
    weight,  # (h,) float32
    output,  # (T, h)
    width,
    epsilon,
    HAS_DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (T,)."""
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    mask = column < width
    x = tl.load(residual + row + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        x += tl.load(delta + row + column, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(residual.dtype.element_ty)
        tl.store(residual + row + column, rounded, mask=mask)
        x = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + epsilon)
    result = x * scale * tl.load(weight + column, mask=mask, other=0.0)
    tl.store(output + row + column, result.to(output.dtype.element_ty), mask=mask)


@triton.jit
def rotate_kernel(
    heads,  # (T, at least (H + Hkv) * D), rows `row_stride` apart: queries, then keys
    angles,  # (positions, D) float32: cosines, then sines
    positions,  # (T,) int64
    query_weight,  # (D,) float32
    key_weight,
    row_stride,
    num_heads,
    epsilon,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    ROTATES: tl.constexpr,
    NORMALISES: tl.constexpr,
):
    """Grid (T, H + Hkv): one head of one token, in place."""
    head = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64)
    place = heads + token * row_stride + head * 2 * HALF
    column = tl.arange(0, BLOCK)
    mask = column < HALF
    x = tl.load(place + column, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(place + HALF + column, mask=mask, other=0.0).to(tl.float32)
    if NORMALISES:
        scale = 1.0 / tl.sqrt((tl.sum(x * x, 0) + tl.sum(y * y, 0)) / (2 * HALF) + epsilon)
        if head < num_heads:
            x_weight = tl.load(query_weight + column, mask=mask, other=0.0)
            y_weight = tl.load(query_weight + HALF + column, mask=mask, other=0.0)
        else:
            x_weight = tl.load(key_weight + column, mask=mask, other=0.0)
            y_weight = tl.load(key_weight + HALF + column, mask=mask, other=0.0)
        x = (x * scale * x_weight).to(heads.dtype.element_ty).to(tl.float32)
        y = (y * scale * y_weight).to(heads.dtype.element_ty).to(tl.float32)
    if ROTATES:
        angle = angles + tl.load(positions + token) * 2 * HALF
        cosine = tl.load(angle + column, mask=mask, other=0.0)
        sine = tl.load(angle + HALF + column, mask=mask, other=0.0)
        turned = x * cosine - y * sine
        y = y * cosine + x * sine
        x = turned
    tl.store(place + column, x.to(heads.dtype.element_ty), mask=mask)
    tl.store(place + HALF + column, y.to(heads.dtype.element_ty), mask=mask)


@triton.jit
def gate_kernel(
    gate_up,  # (T, 2 I)
    output,  # (T, I)
    width,  # I
    BLOCK: tl.constexpr,
):
    """Grid (T, I / BLOCK)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=mask, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(output + row * width + column, result.to(output.dtype.element_ty), mask=mask)
