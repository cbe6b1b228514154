"""`pensieve serve` as its own processes, to be watched, stopped, killed and started again. Knows the command line and processes; never inputs."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
from wire import Address, get

START_S = 120.0
FRONT_LIMIT_MB = 3000.0  # resident; beyond it the server is killed, for the machine's sake
FAMILY_LIMIT_MB = 6000.0
SAMPLE_S = 0.02
LOOK_S = 0.5  # between two looks at which children there are
OPTIONS = ("--dtype", "float32", "--threads", "1", "--gpu-cache", "0.15", "--name", "tiny")


@functools.cache
def known_key(folder: Path, tenant: str) -> tuple[str, str]:
    """A tenant's key and its line of a key file, made once a run."""
    path = folder / f"{tenant}.keys"
    add = [sys.executable, "-m", "pensieve", "keys", "add", tenant, "--file", str(path)]
    key = subprocess.run(add, capture_output=True, text=True, check=True).stdout.strip()
    return key, path.read_text(encoding="utf-8")


@functools.cache
def help_text() -> str:
    """What `pensieve serve --help` says."""
    return subprocess.run(
        [sys.executable, "-m", "pensieve", "serve", "--help"], capture_output=True, text=True, check=True
    ).stdout


def offered(option: str) -> bool:
    """Whether the server has an option."""
    return re.search(rf"{re.escape(option)}(?![\w-])", help_text()) is not None


class Watch:
    """Resident memory of a server's processes, sampled; kills them when they take too much."""

    def __init__(self, pid: int) -> None:
        self._front = psutil.Process(pid)
        self._children: list[psutil.Process] = []
        self._over = threading.Event()
        self._lock = threading.Lock()
        self.killed: str | None = None  # why, in words
        self.front_mb = self.family_mb = 0.0
        self._peak = (0.0, 0.0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def look(self) -> tuple[float, float, float, float]:
        """MB now and at most since the last look: front end, everything. (front, family, front's peak, family's peak)"""
        with self._lock:
            peak, self._peak = self._peak, (self.front_mb, self.family_mb)
            return self.front_mb, self.family_mb, max(peak[0], self.front_mb), max(peak[1], self.family_mb)

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        looked_s = 0.0
        while not self._over.wait(SAMPLE_S):
            try:
                if time.monotonic() - looked_s > LOOK_S:
                    looked_s = time.monotonic()
                    self._children = self._front.children(recursive=True)
                front = self._front.memory_info().rss / 1e6
            except psutil.Error:
                return
            family = front
            for child in self._children:
                with contextlib.suppress(psutil.Error):
                    family += child.memory_info().rss / 1e6
            with self._lock:
                self.front_mb, self.family_mb = front, family
                self._peak = (max(self._peak[0], front), max(self._peak[1], family))
            if front > FRONT_LIMIT_MB or family > FAMILY_LIMIT_MB:
                self.killed = (
                    f"killed by the watchdog: the front end took {front:.0f} MB, all of it {family:.0f} MB"
                )
                kill_tree(self._front)
                return


def kill_tree(process: psutil.Process) -> None:
    """SIGKILL for a process and all below it."""
    family = [process]
    with contextlib.suppress(psutil.Error):
        family = [*process.children(recursive=True), process]
    for one in family:
        with contextlib.suppress(psutil.Error):
            one.kill()


class Served:
    """A store, and a server on it while there is one.

    Args:
        folder: its own; store, keys and log are there.
        model: a folder.
        options: of `pensieve serve`, behind the usual ones.
        tenants: who has a key; none: a server without keys.
        files: the soft limit of open files: a user's usual one.
        store: the SQLite file; None: one in the folder.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        *options: str,
        tenants: tuple[str, ...] = (),
        files: int = 1024,
        store: Path | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.model, self.options, self._files = folder, model, options, files
        self.store = store or folder / "store.db"
        self.log_path = folder / "server.log"
        self.key_path = folder / "keys.txt"
        self.keys: dict[str, str] = {}
        for tenant in tenants:
            self.keys[tenant], line = known_key(folder.parent, tenant)
            with self.key_path.open("a", encoding="utf-8") as file:
                file.write(line)
        if tenants:
            self.key_path.chmod(0o600)
        self.address = Address("127.0.0.1", 0)
        self.process: subprocess.Popen[bytes] | None = None
        self.watch: Watch | None = None
        self._log_start = 0

    def add_key(self, tenant: str) -> str:
        """A new key."""
        add = [sys.executable, "-m", "pensieve", "keys", "add", tenant, "--file", str(self.key_path)]
        return subprocess.run(add, capture_output=True, text=True, check=True).stdout.strip()

    def command(self) -> list[str]:
        """As it is started."""
        pensieve = [
            sys.executable,
            "-m",
            "pensieve",
            "serve",
            "--port",
            "0",
            "--store",
            f"sqlite:///{self.store}",
            "--model",
            str(self.model),
        ]
        keys = ["--api-key-file", str(self.key_path)] if self.keys else []
        command = [*pensieve, *OPTIONS, *keys, *self.options]
        return ["bash", "-c", f'ulimit -Sn {self._files}; exec "$0" "$@"', *command]

    def start(self, timeout_s: float = START_S) -> None:
        """Start it, and wait until it is ready for turns."""
        assert self.process is None
        self._log_start = self.log_path.stat().st_size if self.log_path.is_file() else 0
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.watch = Watch(self.process.pid)
        deadline = time.monotonic() + timeout_s
        while (found := re.search(r"listening at http://([^\s:]+):(\d+)", self.log())) is None:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{self.log()[-3000:]}")
            time.sleep(0.05)
        self.address = Address(found[1], int(found[2]))
        self.until_ready()

    def log(self) -> str:
        """What it said since it was started."""
        with self.log_path.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")

    def until_ready(self, timeout_s: float = START_S) -> float:
        """Wait for /ready; seconds it took."""
        begun_s = time.monotonic()
        while get(self.address, "/ready", timeout_s=5.0).status != 200:
            if time.monotonic() - begun_s > timeout_s:
                raise RuntimeError(f"the server is not ready after {timeout_s:g} s:\n{self.log()[-3000:]}")
            time.sleep(0.05)
        return time.monotonic() - begun_s

    @property
    def alive(self) -> bool:
        """Whether its front end is there."""
        return self.process is not None and self.process.poll() is None

    @property
    def front(self) -> psutil.Process:
        """The front end's process."""
        assert self.process is not None
        return psutil.Process(self.process.pid)

    def engine(self) -> psutil.Process:
        """The engine's: the child that holds torch and the model."""
        deadline = time.monotonic() + 30
        while not (
            children := [child for child in self.front.children() if child.status() != psutil.STATUS_ZOMBIE]
        ):
            if time.monotonic() > deadline:
                raise RuntimeError("there is no engine")
            time.sleep(0.05)
        return max(children, key=lambda child: child.memory_info().rss)

    def kill(self) -> None:
        """As a machine does that loses its power."""
        assert self.process is not None
        with contextlib.suppress(psutil.Error):
            kill_tree(self.front)
        with contextlib.suppress(ProcessLookupError):  # what outlived the front end
            os.killpg(self.process.pid, signal.SIGKILL)
        self._gone()

    def _gone(self) -> None:
        assert self.process is not None
        self.process.wait()
        self.process = None
        if self.watch is not None:
            self.watch.close()
            self.watch = None

    def terminate(self, timeout_s: float = 60.0) -> float | None:
        """SIGTERM; seconds until it had ended, None: it had not and was killed."""
        assert self.process is not None
        begun_s = time.monotonic()
        self.process.terminate()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return None
        took_s = time.monotonic() - begun_s
        self._gone()
        return took_s

    def close(self) -> None:
        """Kill what is left."""
        if self.process is not None:
            self.kill()
