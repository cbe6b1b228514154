"""Keeps large bodies from costing other requests memory and event loop time.

Knows sizes and malloc; never contents of bodies.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable

LARGE_BYTES = 1 << 20  # smaller bodies do not count
JSON_BYTES_PER_S = 64e6  # less than the speed of the JSON parser, so that other requests come between
PART_BYTES = 1 << 16  # smaller parts of a body do not count
# Each iteration of the event loop accepts one connection: without this, the 60th of 60 bodies waited for 60 x
# 60 parts.
PARTS_BYTES_PER_S = 128e6
WAIT_S = 1.0  # requests that end within this time share one call


class Spacing:
    """Lets large pieces of work through one after another, so that several never hold the event loop
    together.

    Args:
        least_bytes: smaller pieces pass at once.
        bytes_per_s: the rate at which all pass together.
    """

    def __init__(self, least_bytes: int, bytes_per_s: float) -> None:
        self._least_bytes = least_bytes
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0  # loop time at which the next one may pass

    async def wait(self, num_bytes: int) -> None:
        """Wait until the pieces before this one have had their time."""
        if num_bytes < self._least_bytes:
            return
        now_s = asyncio.get_running_loop().time()
        begin_s = max(now_s, self._free_s)
        self._free_s = begin_s + num_bytes / self._bytes_per_s
        await asyncio.sleep(begin_s - now_s)


class Trimmer:
    """Has glibc return free memory soon after large bodies were freed: by itself it keeps memory between
    small objects.
    """

    def __init__(self) -> None:
        self._num_bytes = 0
        self._waiting = False
        self._trim = _malloc_trim()

    def freed(self, num_bytes: int) -> None:
        """`num_bytes` were freed, or will be within a second. Called in the event loop."""
        self._num_bytes += num_bytes
        if self._trim is not None and not self._waiting and self._num_bytes >= LARGE_BYTES:
            self._waiting = True
            loop = asyncio.get_running_loop()
            loop.call_later(WAIT_S, lambda: loop.run_in_executor(None, self._run))

    def _run(self) -> None:
        self._num_bytes, self._waiting = 0, False
        assert self._trim is not None
        self._trim(0)  # ctypes releases the interpreter lock meanwhile


def _malloc_trim() -> Callable[[int], int] | None:
    """`malloc_trim` of glibc; None with another C library."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    return trim
