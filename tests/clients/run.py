"""Acceptance: real clients, each of its own version in an environment of its own, against `pensieve serve` on a real port.

    python tests/clients/run.py [NAME ...] [-k WORDS] [--venvs DIR]

Starts one server with the default model, makes the environments that are missing (from `requirements/NAME.txt`, all versions pinned), runs
each client's checks (`check_*.py`, with pytest) with that environment's Python, and prints a table. The last line counts; the exit
status says whether everything passed. Knows no client's API, and of Pensieve only its command line.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MAX_OPEN = 8  # few enough for a check to fill the server
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
CHECK_TIMEOUT_S = 900.0  # all of one client's


@dataclass(frozen=True, slots=True)
class Client:
    """Checks that run in one environment."""

    name: str  # of the environment and its requirements
    package: str  # whose version is told
    checks: tuple[str, ...]

    @property
    def requirements(self) -> Path:
        """What its environment holds."""
        return HERE / "requirements" / f"{self.name}.txt"

    @property
    def version(self) -> str:
        """The client's, as it is pinned."""
        pinned = re.search(
            rf"^{re.escape(self.package)}==(\S+)", self.requirements.read_text(encoding="utf-8"), re.MULTILINE
        )
        if pinned is None:
            raise SystemExit(f"{self.requirements} does not pin {self.package}")
        return pinned[1]


OPENAI = ("check_openai_chat.py", "check_openai_responses.py", "check_openai_transport.py")
CLIENTS = (
    Client("plain", "httpx", ("check_plain.py",)),
    Client("openai3", "openai", OPENAI),
    Client("openai2", "openai", OPENAI),
    Client("langchain", "langchain-openai", ("check_langchain.py",)),
    Client("agents", "openai-agents", ("check_agents.py",)),
    Client("llm", "llm", ("check_llm.py",)),
    Client("llamaindex", "llama-index-llms-openai-like", ("check_llamaindex.py",)),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one client's checks."""

    passed: int
    failed: int
    skipped: int
    wall_s: float


def environment(client: Client, venvs: Path) -> Path:
    """The Python of a client's environment, made if it is missing or its requirements have changed."""
    folder = venvs / client.name
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / "requirements.sha256"
    wanted = hashlib.sha256(client.requirements.read_bytes() + sys.version.encode()).hexdigest()
    if stamp.is_file() and stamp.read_text(encoding="ascii") == wanted:
        return python
    print(f"making the environment of {client.name} {client.version} in {folder}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [
        str(python),
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--quiet",
        "install",
        "-r",
        str(client.requirements),
    ]
    subprocess.run(pip, check=True)
    stamp.write_text(wanted, encoding="ascii")
    return python


@contextlib.contextmanager
def server(folder: Path) -> Iterator[dict[str, str]]:
    """A running server; yields the variables by which the checks find it."""
    pensieve = [sys.executable, "-m", "pensieve"]
    keys = folder / "keys.txt"
    add = [*pensieve, "keys", "add", "--file", str(keys)]
    key, other = (
        subprocess.run([*add, tenant], check=True, capture_output=True, text=True).stdout.strip()
        for tenant in ("checked", "other")
    )
    options = [
        "--port",
        "0",
        "--store",
        f"sqlite:///{folder / 'store.db'}",
        "--api-key-file",
        str(keys),
        "--max-open",
        str(MAX_OPEN),
    ]
    log = folder / "server.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen([*pensieve, "serve", *options], stdout=output, stderr=subprocess.STDOUT)
    try:
        yield {
            "PENSIEVE_URL": _url(process, log),
            "PENSIEVE_KEY": key,
            "PENSIEVE_OTHER_KEY": other,
            "PENSIEVE_MAX_OPEN": str(MAX_OPEN),
        }
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for line in log.read_text(encoding="utf-8").splitlines():
            if " ERROR " in line or line.startswith("Traceback"):
                print(f"server: {line}")


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        if (found := re.search(r"listening at (\S+)", log.read_text(encoding="utf-8"))) is not None:
            return found[1]
        time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{log.read_text(encoding='utf-8')}")


def check(client: Client, python: Path, found: dict[str, str], folder: Path, words: str | None) -> Outcome:
    """Run one client's checks; what failed is shown."""
    begun_s = time.perf_counter()
    report = folder / f"{client.name}.xml"
    command = [
        str(python),
        "-m",
        "pytest",
        "-c",
        str(HERE / "pytest.ini"),
        f"--junitxml={report}",
        *client.checks,
    ]
    if words is not None:
        command += ["-k", words]
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OPENAI_"))
    }
    with (folder / f"{client.name}.log").open("w+", encoding="utf-8") as output:
        try:
            ended = subprocess.run(
                command,
                cwd=HERE,
                env={**inherited, **found, "NO_PROXY": "127.0.0.1", "PYTHONDONTWRITEBYTECODE": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=CHECK_TIMEOUT_S,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            output.write(f"\nstopped after {CHECK_TIMEOUT_S:g} s\n")
            ended = 1
        wall_s = time.perf_counter() - begun_s
        if ended != 0 and not (
            ended == 5 and words is not None
        ):  # (5: none of this client's checks has these words)
            output.seek(0)
            print(f"-- {client.name}\n{output.read()}", flush=True)
    suites = ElementTree.parse(report).getroot().findall("testsuite") if report.is_file() else []
    total, failures, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    if failed == 0 and ended not in (0, 5):
        failed = 1  # it did not come to a report
    return Outcome(max(0, total - failures - errors - skipped), failed, skipped, wall_s)


def main() -> int:
    """Run what was asked for; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"which of {', '.join(client.name for client in CLIENTS)}; all by default",
    )
    parser.add_argument("-k", dest="words", help="only the checks whose names match, as in pytest")
    parser.add_argument(
        "--venvs", type=Path, default=HERE.parents[1] / ".venv-clients", help="where the environments are"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {client.name for client in CLIENTS}
    if unknown:
        parser.error(f"no such client: {', '.join(sorted(unknown))}")
    chosen = [client for client in CLIENTS if not arguments.names or client.name in arguments.names]
    begun_s = time.perf_counter()
    pythons = {client.name: environment(client, arguments.venvs.resolve()) for client in chosen}
    outcomes: list[tuple[Client, Outcome]] = []
    with tempfile.TemporaryDirectory(prefix="pensieve-clients-") as name, server(Path(name)) as found:
        print(f"server: {found['PENSIEVE_URL']}", flush=True)
        for client in chosen:
            outcome = check(client, pythons[client.name], found, Path(name), arguments.words)
            print(
                f"{client.name}: {outcome.passed} passed, {outcome.failed} failed in {outcome.wall_s:.0f} s",
                flush=True,
            )
            outcomes.append((client, outcome))
    print(f"\n{'client':<30}{'version':>10}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for client, outcome in outcomes:
        row = f"{outcome.passed:>8}{outcome.failed:>8}{outcome.skipped:>9}{outcome.wall_s:>9.0f}"
        print(f"{client.package:<30}{client.version:>10}{row}")
    passed, failed = (
        sum(outcome.passed for _, outcome in outcomes),
        sum(outcome.failed for _, outcome in outcomes),
    )
    print(f"all of it took {time.perf_counter() - begun_s:.0f} s")
    print(f"{passed} passed, {failed} failed")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
