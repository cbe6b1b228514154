"""The real thing:

`pensieve serve` as its own processes over the embedded model, to be killed and started again.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

MAX_CONTEXT = 640
OPTIONS = (
    "--dtype",
    "float32",
    "--threads",
    "1",
    "--gpu-cache",
    "0.1",
    "--cpu-cache",
    "0.1",
    "--max-context",
    str(MAX_CONTEXT),
    "--debug",
)
START_S = 120.0
_URL = re.compile(r"listening at (http://\S+)")


class RealServer:
    """One store, and a server on it while there is one.

    Args:
        store: the SQLite file.
        options: of `pensieve serve`, behind those of every test.
    """

    def __init__(self, store: Path, *options: str) -> None:
        self.store = store
        self._options = options
        self._process: subprocess.Popen[str] | None = None
        self.log: deque[str] = deque(maxlen=400)  # what it said last
        self.url = ""
        self.client = httpx.Client(timeout=60.0)

    def start(self) -> None:
        """Start it and wait until it is ready for turns."""
        assert self._process is None
        arguments = ["serve", "--port", "0", "--store", f"sqlite:///{self.store}", *OPTIONS, *self._options]
        process = self._process = subprocess.Popen(
            [sys.executable, "-m", "pensieve", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        found: list[str] = []
        threading.Thread(target=self._listen, args=(process, found), daemon=True).start()
        deadline = time.monotonic() + START_S
        while not found:
            assert process.poll() is None and time.monotonic() < deadline, "it did not start:\n" + "\n".join(
                self.log
            )
            time.sleep(0.01)
        self.url = found[0]
        self.client = httpx.Client(base_url=self.url, timeout=60.0)
        self.wait_ready()

    def wait_ready(self, timeout_s: float = START_S) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if self.client.get("/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, "it is not ready:\n" + "\n".join(self.log)
            time.sleep(0.02)

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._process is not None
        return self._process

    def engine(self) -> psutil.Process:
        """The engine's process: the child that holds the model."""
        return max(psutil.Process(self.process.pid).children(), key=lambda child: child.memory_info().rss)

    def kill(self) -> None:
        """As a machine does that loses its power: front end and engine at once."""
        processes = [
            psutil.Process(self.process.pid),
            *psutil.Process(self.process.pid).children(recursive=True),
        ]
        for process in processes:
            process.kill()
        self.process.wait()
        self._process = None
        self.client.close()

    def terminate(self) -> None:
        """Ask it to end; see `process` for how it does."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Its exit code."""
        code = self.process.wait(timeout_s)
        self._process = None
        self.client.close()
        return code

    def close(self) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                self.kill()
            self._process = None
        self.client.close()

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return self.client.post(path, json=body, headers=headers)

    def until_idle(self, timeout_s: float = 30.0) -> None:
        """Wait until nothing runs, and see that the cache holds together and leases nothing."""
        deadline = time.monotonic() + timeout_s
        while True:
            checked = self.client.post("/v1/pensieve/check").json()
            assert checked["ok"], checked
            if checked["leases"] == 0:
                return
            assert time.monotonic() < deadline, checked
            time.sleep(0.02)

    def _listen(self, process: subprocess.Popen[str], found: list[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self.log.append(line.rstrip())
                if match := _URL.search(line):
                    found.append(match[1])


@contextmanager
def real_server(store: Path, *options: str) -> Iterator[RealServer]:
    """A running server on a store; whatever is left of it is killed at the end."""
    server = RealServer(store, *options)
    try:
        server.start()
        yield server
    finally:
        server.close()
