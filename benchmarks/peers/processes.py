"""A server as a group of processes: started, waited for, measured and ended. Knows /proc, signals and one HTTP path; never what is served."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peers.errors import PeerError

STOP_S = 30.0  # that a server has to end after SIGTERM
GRACE_S = 5.0  # that processes have which it left behind
KILL_S = 10.0  # to be gone after SIGKILL
TAIL_LINES = 25  # of a log, in an error
_POLL_S = 0.1
_HEALTH_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a server's processes together, bytes."""

    pss: int  # shared pages counted once among those that share them
    rss: int
    processes: int


def free_port() -> int:
    """A port of the loopback address that nobody listens at now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class RunningServer:
    """One started server. Sole owner of its processes; a context manager that leaves none of them behind."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path, folder: Path | None = None
    ) -> None:
        """Start it.

        Args:
            command: argv.
            environment: all of it.
            log: where its output goes.
            folder: where it runs.

        Raises:
            PeerError: there is no such program.
        """
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self.started_s = time.monotonic()
        try:
            with log.open("ab") as output:  # (its children write there, too)
                self._process = subprocess.Popen(
                    list(command),
                    env=dict(environment),
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise PeerError(f"{command[0]} cannot be started: {error.strerror or error}") from error

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the first process, and of its session."""
        return self._process.pid

    def wait_ready(self, url: str, limit_s: float) -> float:
        """Wait until `url` answers 200; returns seconds since the start.

        Raises:
            PeerError: it ended, or the limit has passed. The end of its log is in the message.
        """
        while True:
            if (code := self._process.poll()) is not None:
                raise PeerError(f"it ended with status {code} before it was ready{self._tail()}")
            if _answers(url):
                return time.monotonic() - self.started_s
            if time.monotonic() - self.started_s > limit_s:
                raise PeerError(f"it was not ready after {limit_s:g} s{self._tail()}")
            time.sleep(_POLL_S)

    def memory(self) -> Memory:
        """What its processes hold now."""
        pss = rss = counted = 0
        for pid in self.members():
            try:
                text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
            except OSError:
                continue  # it ended meanwhile
            sizes = {
                line.split(":")[0]: int(line.split()[1]) * 1024
                for line in text.splitlines()[1:]
                if line.endswith("kB")
            }
            pss, rss, counted = pss + sizes.get("Pss", 0), rss + sizes.get("Rss", 0), counted + 1
        return Memory(pss, rss, counted)

    def members(self) -> set[int]:
        """Its processes: all of its session, and all that descend from it wherever they went."""
        return self._members(_processes())

    def stop(self, limit_s: float = STOP_S, grace_s: float = GRACE_S) -> None:
        """End all of its processes: the first one is asked, so that it ends the others in its own way; then who is left; then they are killed.

        Args:
            limit_s: that the first process has.
            grace_s: that the others have after it.
        """
        table = _processes()
        known = {
            pid: table[pid].began for pid in self._members(table)
        }  # children of a process that has ended have lost their parent
        _signal({self.pid} & known.keys(), signal.SIGTERM)
        self._wait(lambda left: self.pid not in left, known, limit_s)
        for number, seconds in ((signal.SIGTERM, grace_s), (signal.SIGKILL, KILL_S)):
            _signal(self._left(known), number)
            self._wait(lambda left: not left, known, seconds)
        self._process.poll()

    def _members(self, table: dict[int, _Process]) -> set[int]:
        found = {pid for pid, process in table.items() if process.session == self.pid or pid == self.pid}
        while more := {pid for pid, process in table.items() if process.parent in found} - found:
            found |= more
        return found

    def _left(self, known: dict[int, str]) -> set[int]:
        self._process.poll()  # (an ended child stays a process until somebody asks)
        table = _processes()
        return {
            pid for pid, began in known.items() if pid in table and table[pid].began == began
        } | self._members(table)

    def _wait(self, enough: Callable[[set[int]], bool], known: dict[int, str], limit_s: float) -> None:
        deadline_s = time.monotonic() + limit_s
        while not enough(self._left(known)) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)

    def _tail(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        return (
            f" (all of its log: {self.log}):\n" + "\n".join(lines)
            if lines
            else f" (it said nothing; log: {self.log})"
        )


@dataclass(frozen=True, slots=True)
class _Process:
    parent: int
    session: int
    began: str  # with its id, this names a process for ever


def _processes() -> dict[int, _Process]:
    """All that run; those that have ended and wait to be asked for do not count."""
    table = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            text = Path(entry.path, "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        fields = text.rpartition(")")[
            2
        ].split()  # the name before it may hold anything; proc(5): state is the third field
        if fields[0] not in "ZX":
            table[int(entry.name)] = _Process(int(fields[1]), int(fields[3]), fields[19])
    return table


def _signal(pids: set[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=_HEALTH_TIMEOUT_S) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False
