"""A real PostgreSQL server for tests, from the system's packages, in a folder of its own."""

from __future__ import annotations

import contextlib
import glob
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

PATTERNS = (
    "/usr/lib/postgresql/*/bin/initdb",
    "/usr/pgsql-*/bin/initdb",
    "/opt/homebrew/opt/postgresql*/bin/initdb",
)
START_S = 60.0


def find_binaries() -> Path | None:
    """The folder with the newest server's programs; None = not installed."""
    found = sorted(
        (Path(path).parent for pattern in PATTERNS for path in glob.glob(pattern)),
        key=lambda path: _version(path),
        reverse=True,
    )
    if found:
        return found[0]
    initdb = shutil.which("initdb")
    return Path(initdb).resolve().parent if initdb and shutil.which("postgres") else None


def _version(path: Path) -> int:
    digits = "".join(c for c in path.parent.name if c.isdigit())
    return int(digits or 0)


class PostgresServer:
    """One database cluster. `start`, `kill` and `start` again as a test likes."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self.binaries = binaries
        self.folder = folder
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        # the server refuses to run as root: then it runs as a user that owns nothing else of importance
        self._user = _unprivileged() if os.geteuid() == 0 else None
        if self._user is not None:
            os.chown(folder, self._user, -1)
        self._run(
            "initdb",
            "-D",
            str(folder / "data"),
            "-A",
            "trust",
            "-U",
            "tests",
            "-E",
            "UTF8",
            "--locale=C",
            "--no-sync",
        )

    @property
    def url(self) -> str:
        return f"postgresql://tests@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [
                    *(
                        str(self.binaries / "postgres"),
                        "-D",
                        str(self.folder / "data"),
                        "-p",
                        str(self.port),
                        "-k",
                        str(self.folder),
                    ),
                    *(
                        "-c",
                        "listen_addresses=127.0.0.1",
                        "-c",
                        "max_connections=60",
                        "-c",
                        "shared_buffers=16MB",
                        "-c",
                        "recovery_init_sync_method=syncfs",
                    ),
                ],
                user=self._user,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline_s = time.monotonic() + START_S
        while self._run("pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port), check=False) != 0:
            if time.monotonic() > deadline_s or self._process.poll() is not None:
                raise RuntimeError(f"PostgreSQL does not start:\n{(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.02)

    def kill(self) -> None:
        """As if the machine had lost the server: every process of it, at once, with no chance to tidy up."""
        assert self._process is not None
        members = psutil.Process(self._process.pid).children(recursive=True)
        self._process.kill()  # the first one first: it would begin a recovery when it misses a child
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        self._process.wait()
        self._process = None
        psutil.wait_procs(members, timeout=START_S)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """As if the machine stood still: connections stay, nothing is answered."""
        assert self._process is not None
        members = [
            psutil.Process(self._process.pid),
            *psutil.Process(self._process.pid).children(recursive=True),
        ]
        for member in members:
            member.suspend()
        try:
            yield
        finally:
            for member in reversed(members):
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.resume()

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # disconnects all clients and ends in order
            self._process.wait(START_S)
            self._process = None

    def _run(self, program: str, *arguments: str, check: bool = True) -> int:
        done = subprocess.run(
            [str(self.binaries / program), *arguments],
            user=self._user,
            cwd="/",
            capture_output=True,
            check=False,
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{program} failed: {done.stderr.decode()}")
        return done.returncode


def _unprivileged() -> int:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_uid
    raise RuntimeError("no user to run PostgreSQL as")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running_server() -> Iterator[PostgresServer]:
    """A server until the block ends. Its folder is not below pytest's, which only its owner may enter."""
    binaries = find_binaries()
    assert binaries is not None
    folder = Path(tempfile.mkdtemp(prefix="pensieve-postgres-"))
    server: PostgresServer | None = None
    try:
        server = PostgresServer(binaries, folder)
        server.start()
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)
