"""What large bodies cost the others: memory, given back to the system after them, and the event loop's time, between them. Knows sizes and the C
library's allocator; never what is in a body."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable

LARGE_BYTES = 1 << 20  # what is less does not count
JSON_BYTES_PER_S = 64e6  # less than what JSON is read at, so that other requests come between
PART_BYTES = 1 << 16  # of a body's parts, what is less does not count
PARTS_BYTES_PER_S = 128e6  # a turn of the event loop accepts one connection: with sixty bodies coming, the sixtieth waited for 60 x 60 parts
WAIT_S = 1.0  # requests that end together are followed by one call


class Spacing:
    """Lets what is large through one after another, so that the event loop is never held for the sum of several.

    Args:
        least_bytes: what is less passes at once.
        bytes_per_s: the rate at which all pass together.
    """

    def __init__(self, least_bytes: int, bytes_per_s: float) -> None:
        self._least_bytes = least_bytes
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0  # loop time at which the next one may pass

    async def wait(self, num_bytes: int) -> None:
        """Wait until those before this one have had their time."""
        if num_bytes < self._least_bytes:
            return
        now_s = asyncio.get_running_loop().time()
        begin_s = max(now_s, self._free_s)
        self._free_s = begin_s + num_bytes / self._bytes_per_s
        await asyncio.sleep(begin_s - now_s)


class Trimmer:
    """Has glibc return free memory a moment after large bodies were freed: by itself it keeps what lies between small objects."""

    def __init__(self) -> None:
        self._num_bytes = 0
        self._waiting = False
        self._trim = _malloc_trim()

    def freed(self, num_bytes: int) -> None:
        """So many bytes were freed, or will be within a second. Called in the event loop."""
        self._num_bytes += num_bytes
        if self._trim is not None and not self._waiting and self._num_bytes >= LARGE_BYTES:
            self._waiting = True
            loop = asyncio.get_running_loop()
            loop.call_later(WAIT_S, lambda: loop.run_in_executor(None, self._run))

    def _run(self) -> None:
        self._num_bytes, self._waiting = 0, False
        assert self._trim is not None
        self._trim(0)  # (ctypes lets go of the interpreter meanwhile)


def _malloc_trim() -> Callable[[int], int] | None:
    """The function, where the C library has it (glibc)."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    return trim
