"""`pensieve bench` as a process of its own. Knows its options and that it writes a report; never how servers are run or what figures mean."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from peers.errors import PeerError
from peers.machine import ROOT
from peers.metrics import Report, check
from peers.processes import TAIL_LINES
from peers.servers import Server
from peers.workloads import Measurement

LIMIT_S = 1800.0  # for one call


def command(server: Server, measurement: Measurement, seed: int, report: Path) -> list[str]:
    """Argv of one call."""
    asked = [
        sys.executable,
        "-m",
        "pensieve",
        "bench",
        "--url",
        server.url,
        "--model",
        server.model,
        *server.bench_options,
    ]
    return [*asked, *measurement.arguments(), "--seed", str(seed), "--json", str(report)]


def run(
    server: Server, measurement: Measurement, seed: int, report: Path, *, limit_s: float = LIMIT_S
) -> Report:
    """Measure once; the report and what the client said stay beside each other.

    Args:
        server: which one; it runs.
        measurement: what.
        seed: of the conversations.
        report: the file to be written; `.log` beside it gets the client's words.
        limit_s: for the whole call.

    Raises:
        PeerError: it failed, took too long, or tells of requests that failed.
    """
    report.parent.mkdir(parents=True, exist_ok=True)
    log = report.with_suffix(".log")
    with log.open("wb") as output:
        try:
            ended = subprocess.run(
                command(server, measurement, seed, report),
                env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "NO_PROXY": "127.0.0.1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise PeerError(
                f"the client was not done with {measurement.name!r} after {limit_s:g} s (log: {log})"
            ) from error
    try:
        told: Report = json.loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        said = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])
        raise PeerError(
            f"the client wrote no report of {measurement.name!r} (status {ended.returncode}; log: {log}):\n{said}"
        ) from error
    check(told)
    return told
