"""Where a process runs, and whether it still does. Knows this machine's processes; never stores.

A server that was killed can be told from one that is only slow at once, if the one that asks sees the same processes. In another container, on
another machine, or where there is no /proc, only its lease can tell.
"""

from __future__ import annotations

import os
from pathlib import Path

PROC = Path("/proc")


def here() -> str:
    """This process's place: the machine's start, the process namespace, the process's id and its start; "" where that cannot be known."""
    started = _started(os.getpid())
    scope = _scope()
    return f"{scope} {os.getpid()} {started}" if scope and started else ""


def is_gone(place: str) -> bool:
    """Whether a process that wrote this place has ended for sure. False also where that cannot be known from here."""
    parts = place.split(" ")
    if len(parts) != 4 or not parts[2].isdigit() or not _scope() or " ".join(parts[:2]) != _scope():
        return False
    return _started(int(parts[2])) != parts[3]


def _scope() -> str:
    try:
        return f"{(PROC / 'sys/kernel/random/boot_id').read_text().strip()} {os.readlink(PROC / 'self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's ticks; None if there is none, or nothing but its exit code is left of it."""
    try:
        state, *fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in ("Z", "X") else fields[18]
