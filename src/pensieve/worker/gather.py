"""Copies one layer of many slots in one kernel launch.

Knows strided rows; never streams, tiers or what the bytes mean.

One layer of one chunk is about 100 KB: a copy call for each would cost more than the move itself. The kernel
reads page-locked main memory in place, over the link, with few programs, so that most multiprocessors stay
free for the model.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch

_PROGRAMS = (
    16  # each has 16 KB in flight: 256 KB together; a link of 64 GB/s with 2 us of latency needs 128 KB
)
_BLOCK_WORDS = 2048
_WORD = torch.int64


def why_not(layer_bytes: int) -> str | None:
    """Why no kernel can copy layers of this size; None if one can."""
    if layer_bytes % _WORD.itemsize:
        return f"{layer_bytes} bytes are not whole words of {_WORD.itemsize}"
    return _why_no_kernels()


def copy_layer(source_rows: torch.Tensor, target_rows: torch.Tensor, slots: torch.Tensor) -> None:
    """Copy one layer of some slots, on the current stream.

    Args:
        source_rows: (source slots, layer_bytes) uint8, strided, page-locked or on the device.
        target_rows: (target slots, layer_bytes) uint8, strided, page-locked or on the device.
        slots: (2, n) int64 on the device: row numbers in the source, and in the target.
    """
    from_, to = source_rows.view(_WORD), target_rows.view(_WORD)
    _kernels().copy_rows_kernel[(_PROGRAMS,)](
        from_, to, slots[0], slots[1], slots.shape[1], from_.stride(0), to.stride(0), from_.shape[1],
        BLOCK=_BLOCK_WORDS, PROGRAMS=_PROGRAMS, num_warps=8,
    )  # fmt: skip


@functools.cache
def _why_no_kernels() -> str | None:
    return None if importlib.util.find_spec("triton") is not None else "Triton is not installed"


def _kernels() -> Any:
    return importlib.import_module("pensieve.worker.gather_kernels")
