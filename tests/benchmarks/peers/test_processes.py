"""Servers as groups of processes: waited for, measured, and ended with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from peer_fakes import SERVER, alive
from peers.errors import PeerError
from peers.processes import RunningServer, free_port

# A first process that starts one child in its own session's group and one in a session of its own; all of them are deaf to SIGTERM.
FAMILY = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(0, flush=True); time.sleep(60)"
for apart in (False, True):
    subprocess.Popen([sys.executable, "-c", deaf], start_new_session=apart)
print("started", flush=True)
time.sleep(60)
"""
ORPHANS = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; print(0, flush=True); time.sleep(60)"])
subprocess.Popen([sys.executable, "-c", "import time; print(0, flush=True); time.sleep(60)"])
import time; time.sleep(60)
"""


def start(tmp_path: Path, code: str, *words: str) -> RunningServer:
    return RunningServer([sys.executable, "-c", code, *words], os.environ, tmp_path / "log")


def said(tmp_path: Path) -> tuple[int, bool]:
    """How many children have begun, and whether their parent has. What two of them say at once may be woven together."""
    text = (tmp_path / "log").read_text()
    return text.count("0"), "started" in text


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_is_waited_for_measured_and_ended(tmp_path: Path) -> None:
    port = free_port()
    with start(tmp_path, SERVER, str(port)) as server:
        assert 0 < server.wait_ready(f"http://127.0.0.1:{port}/health", 20) < 20
        memory = server.memory()
        assert memory.processes == 1 and 1 << 20 < memory.pss <= memory.rss
        with pytest.raises(PeerError, match=r"not ready after 0\.3 s"):
            server.wait_ready(f"http://127.0.0.1:{port}/elsewhere", 0.3)
    assert not alive(server.pid)


def test_one_that_ends_before_it_is_ready_says_its_last_words(tmp_path: Path) -> None:
    with (
        start(tmp_path, "print('no such model'); raise SystemExit(3)") as server,
        pytest.raises(PeerError, match=r"status 3.*\n.*no such model"),
    ):
        server.wait_ready("http://127.0.0.1:9/health", 20)


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="/no/such/server"):
        RunningServer(["/no/such/server"], {}, tmp_path / "log")


def test_all_of_a_family_that_is_deaf_to_sigterm_is_killed_wherever_it_went(tmp_path: Path) -> None:
    server = start(tmp_path, FAMILY)
    until(lambda: said(tmp_path) == (2, True))
    members = server.members()
    assert len(members) == 3 and server.memory().processes == 3
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        server.stop(0.3, 0.3)
        assert not any(map(alive, members)) and alive(bystander.pid)
    finally:
        bystander.kill()
        bystander.wait()


def test_children_of_a_first_process_that_died_are_ended_too(tmp_path: Path) -> None:
    server = start(tmp_path, ORPHANS)
    until(lambda: said(tmp_path) == (2, False))
    members = server.members()
    os.kill(server.pid, signal.SIGKILL)
    until(lambda: not alive(server.pid))
    assert sum(map(alive, members)) == 2
    server.stop(5, 5)
    assert not any(map(alive, members))
