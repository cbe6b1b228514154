"""Memory that a step frees stays with the process for the next step. Knows glibc; never tensors or sizes of models."""

from __future__ import annotations

import ctypes
import sys

# Names and numbers from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TRIM_BYTES = 1 << 30  # most that is held back from the system
_MMAP_BYTES = 32 << 20  # allocations from here on go back to the system when freed; glibc takes no more


def keep_freed_memory() -> bool:
    """Tell the C library to hold on to freed memory, up to 1 GB of it. Returns whether it listened (glibc does).

    Every layer of every step allocates and frees the same few megabytes. By default glibc gives them back to the system and gets them again
    as fresh pages, zeroed one fault at a time: 130,000 to 170,000 faults in a batch of six prompts of 700 tokens (docs/performance.md).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False  # another C library
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES))
