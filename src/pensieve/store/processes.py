"""Identifies processes, and says whether one has ended. Knows this machine's processes; never stores.

A server that was killed can be told at once from one that is only slow, if the observer sees the same
processes. In another container, on another machine, or without /proc, only its lease can tell.
"""

from __future__ import annotations

import os
from pathlib import Path

PROC = Path("/proc")
DEAD = ("Z", "X")  # states of a process of which only its exit code is left


def own_process() -> str:
    """Identifies this process: boot, process namespace, process id and start time; "" if that is unknown."""
    scope, found = _scope(), _look(os.getpid())
    return f"{scope} {os.getpid()} {found[1]}" if scope and found is not None else ""


def has_ended(process: str) -> bool:
    """Whether a process, as `own_process` identifies it, has certainly ended. False if that is unknown."""
    parts = process.split(" ")
    if len(parts) != 4 or not parts[2].isdigit() or not _scope() or " ".join(parts[:2]) != _scope():
        return False
    pid = int(parts[2])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's process, which may be hidden
        return False
    found = _look(pid)
    return found is not None and (found[0] in DEAD or found[1] != parts[3])


def _scope() -> str:
    try:
        return (
            f"{(PROC / 'sys/kernel/random/boot_id').read_text().strip()} {os.readlink(PROC / 'self/ns/pid')}"
        )
    except OSError:
        return ""


def _look(pid: int) -> tuple[str, str] | None:
    """A process's state and its start, in the kernel's ticks; None if they cannot be read."""
    try:
        state, *fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return state, fields[18]
