"""Main memory as it is fastest: kept when a step frees it, in huge pages if it is read all through.

Knows the system; never models or tiers.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import weakref
from typing import Any

import torch

from pensieve.errors import ConfigError

# Names and numbers from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TRIM_BYTES = 1 << 30  # the most that is held back from the system
# allocations of this size and more go back to the system when freed; glibc takes no larger number
_MMAP_BYTES = 32 << 20
_LOADING_MMAP_BYTES = 256 << 10  # the same while weights are loaded
_REGION_BYTES = 64 << 20
_CACHE_LINE = 64


def keep_freed_memory() -> bool:
    """Tell the C library to keep up to 1 GB of freed memory; returns whether it does (glibc does).

    Every layer of every step allocates and frees the same few megabytes. By default glibc gives them back to
    the system and gets them again as fresh pages, zeroed one fault at a time: 130,000 to 170,000 faults in a
    batch of six prompts of 700 tokens (docs/log/performance.md).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False  # another C library
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES))


def return_freed_memory() -> None:
    """Tell the C library to give freed memory back to the system at once, now and from now on.

    While weights are loaded and laid out, freed memory must not be held beside its replacement.
    `keep_freed_memory` undoes it.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(AttributeError, OSError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LOADING_MMAP_BYTES)
        library.malloc_trim(0)


def fresh_pages(num_bytes: int) -> torch.Tensor:
    """Main memory straight from the system, which zeroes a page when it is first written.

    So no start waits for zeroing: writing 3 GB of zeros took 0.7 to 3.3 s of each start. Huge pages, if the
    system has them, make first writes 5 times cheaper.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(num_bytes, dtype=torch.uint8)  # not Unix
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)  # keeps the mapping while the tensor lives


def lock_pages(memory: torch.Tensor) -> None:
    """Page-lock main memory for CUDA while its tensor lives: copies then need no staging.

    Raises:
        ConfigError: the system does not let this process lock so much.
    """
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address, num_bytes = memory.data_ptr(), memory.numel()
    status = int(runtime.cudaHostRegister(address, num_bytes, 0))
    if status != 0:
        raise ConfigError(
            f"{num_bytes / 1e9:.2f} GB of main memory cannot be page-locked for the device (CUDA error "
            f"{status}): give the tiers below the first less"
        )
    weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, address)


class HugeRegions:
    """Hands out memory from large regions of fresh pages.

    Reading weights through huge pages is about 10 % faster, and few weights fill a huge page alone.
    """

    def __init__(self) -> None:
        self._region = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of zeros that begins with a cache line. It keeps its region while it lives."""
        num_bytes = dtype.itemsize
        for size in shape:
            num_bytes *= size
        if self._used + num_bytes > len(self._region):
            self._region = fresh_pages(max(num_bytes, _REGION_BYTES))
            self._used = 0
        piece = self._region[self._used : self._used + num_bytes]
        self._used += -(-num_bytes // _CACHE_LINE) * _CACHE_LINE
        return piece.view(dtype).view(shape)
