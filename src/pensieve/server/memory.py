"""Giving memory back to the system after large requests. Knows the C library's allocator; never what was in the memory."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable

LARGE_BYTES = 1 << 20  # freed in all, before it is worth the call
WAIT_S = 1.0  # requests that end together are followed by one call


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
