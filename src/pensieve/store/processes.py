"""Where a process runs, and whether it still does. Knows this machine's processes; never stores.

A server that was killed can be told from one that is only slow at once, if the one that asks sees the same
processes. In another container, on another machine, or where there is no /proc, only its lease can tell.
"""

from __future__ import annotations

import os
from pathlib import Path

PROC = Path("/proc")
DEAD = ("Z", "X")  # states of a process of which only its exit code is left


def own_process() -> str:
    """This process's place: the machine's start, the process namespace, the process's id and its start; ""
    where that cannot be known.
    """
    scope, found = _scope(), _look(os.getpid())
    return f"{scope} {os.getpid()} {found[1]}" if scope and found is not None else ""


def has_ended(process: str) -> bool:
    """Whether a process that wrote this place has ended for sure.

    False also where that cannot be known from here.
    """
    parts = process.split(" ")
    if len(parts) != 4 or not parts[2].isdigit() or not _scope() or " ".join(parts[:2]) != _scope():
        return False
    pid = int(parts[2])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's: it is there, though it may be hidden
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
    """A process's state and when it began, in the kernel's ticks; None if that cannot be seen."""
    try:
        state, *fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return state, fields[18]
