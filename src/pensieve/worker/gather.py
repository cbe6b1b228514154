"""Copies one layer of many slots by one kernel. Knows strides; never streams, plans or what the bytes mean.

A layer of a chunk is some 100 KB: a call of its own for each costs more than moving it. The kernel reads page-locked main memory where it lies, over the
link, from few programs, so that the model keeps the multiprocessors.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pensieve.worker.kv_store import KVStore

_PROGRAMS = 16  # each has 16 KB on its way: 256 KB, where a link of 64 GB/s with 2 us of latency needs 128
_BLOCK_WORDS = 2048
_WORD = torch.int64


def why_not(source: KVStore, target: KVStore) -> str | None:
    """Why no kernel can copy between two tiers; None: one can."""
    if source.layer_bytes % _WORD.itemsize:
        return f"{source.layer_bytes} bytes are not whole words of {_WORD.itemsize}"
    return _why_no_kernels()


def copy_layer(source: KVStore, target: KVStore, slots: torch.Tensor, layer: int) -> None:
    """Copy one layer of slots, on the current stream.

    Args:
        source: page-locked, or on the device.
        target: page-locked, or on the device.
        slots: (2, n) int64 on the device: of the source, and of the target.
        layer: which.
    """
    from_, to = source.layer(layer).view(_WORD), target.layer(layer).view(_WORD)  # (slots, words), strided
    _kernels().copy_rows_kernel[(_PROGRAMS,)](
        from_, to, slots[0], slots[1], slots.shape[1], from_.stride(0), to.stride(0), from_.shape[1],
        BLOCK=_BLOCK_WORDS, PROGRAMS=_PROGRAMS, num_warps=8,
    )  # fmt: skip


@functools.cache
def _why_no_kernels() -> str | None:
    return None if importlib.util.find_spec("triton") is not None else "Triton is not installed"


def _kernels() -> Any:
    return importlib.import_module("pensieve.worker.gather_kernels")
