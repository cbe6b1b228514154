"""Runs everything in turn: each workload, each round, each system on a fresh server (A B A B). Knows the order; never what a figure means.

A system that does not start, or a request that fails, ends that system's turn only: the others go on, and the summary names it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers import client
from peers.curve import Crossing, Point, throughput_at
from peers.errors import PeerError
from peers.machine import load_average
from peers.metrics import Figures, Report, figures, sweep
from peers.processes import Memory, RunningServer, free_port
from peers.servers import Server, kv_in_use
from peers.workloads import PENSIEVE, Kv, Measurement, Workload

LATENCY_FACTOR = 2.0  # an open loop's limit: this times the latency without load
AT_LIMIT = "open/requests_per_s_at_limit"
_UNLOADED = "unloaded/normalized_mean_ms"

MakeServer = Callable[[str, Kv, int, Path], Server]  # system, KV, port, scratch
Measure = Callable[[Server, Measurement, int, Path], Report]  # of whom, what, seed, the file for the report
Say = Callable[[str], None]


@dataclass(slots=True)
class Cell:
    """One system's turn at one workload."""

    workload: str
    system: str
    round: int
    load_average: float  # before it
    server: Server | None = None
    start_s: float | None = None
    memory: Memory | None = None  # at the end
    figures: Figures | None = None  # None: it failed
    points: list[Point] = field(default_factory=list)  # of an open loop
    crossing: Crossing | None = None
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        """All of it, as plain data."""
        told = {name: getattr(self, name) for name in self.__slots__ if name != "server"}
        told = {
            name: dataclasses.asdict(value)
            if dataclasses.is_dataclass(value) and not isinstance(value, type)
            else value
            for name, value in told.items()
        }
        told["points"] = [dataclasses.asdict(point) for point in self.points]
        if self.server is not None:
            told |= {
                "version": self.server.version,
                "command": list(self.server.command),
                "variables": dict(self.server.variables),
            }
            told |= {"kv_bytes": self.server.kv_bytes, "weight_bytes": self.server.weight_bytes}
        return told


def turns(
    workloads: Sequence[Workload], systems: Sequence[str], rounds: int
) -> Iterator[tuple[Workload, int, str]]:
    """Who comes when: within a workload, one round after the other, and in each all systems one after the other."""
    for workload in workloads:
        for round_ in range(rounds):
            for system in workload.systems:
                if system in systems:
                    yield workload, round_, system


def run_turn(
    workload: Workload,
    system: str,
    round_: int,
    *,
    make_server: MakeServer,
    out: Path,
    seed: int,
    measure: Measure = client.run,
    say: Say = lambda message: None,
) -> Cell:
    """Start a server, measure, end it. Whatever it does wrong is in the cell.

    Args:
        workload: what is measured.
        system: who is.
        round_: which time.
        make_server: composes its command.
        out: the folder for reports and logs.
        seed: of the first call's conversations; each other call's is one more. The same for every system.
        measure: one call of the client.
        say: told what begins.
    """
    cell = Cell(workload.name, system, round_, load_average())
    folder = out / workload.name / f"{round_}-{system}"
    scratch = Path(tempfile.mkdtemp(prefix="peers-"))
    try:
        say(f"{workload.name}, round {round_ + 1}: {system} starts")
        cell.server = server = make_server(system, workload.kv[system], free_port(), scratch)
        with RunningServer(server.command, server.environment(), folder / "server.log", scratch) as running:
            cell.start_s = running.wait_ready(server.url + server.health, server.start_limit_s)
            found: Figures = {}
            for measurement in workload.measurements:
                say(f"{workload.name}, round {round_ + 1}: {system} is measured ({measurement.name})")
                for call in measurement.calls():
                    report = measure(server, call, seed, folder / f"{call.name}.json")
                    found |= figures(call, report)
                    cell.points += sweep(report)
                    seed += 1
                    if cell.points and cell.points[-1].latency_ms > LATENCY_FACTOR * found.get(
                        _UNLOADED, float("inf")
                    ):
                        break  # no limit lies higher
            cell.memory = running.memory()
            found["memory_pss_gb"] = cell.memory.pss / 1e9
            if (
                kv_bytes := kv_in_use(server)
            ) is not None:  # (a tier's memory is not there before something was put into it)
                found["memory_beyond_gb"] = (cell.memory.pss - server.weight_bytes - kv_bytes) / 1e9
        cell.figures = found
    except PeerError as error:
        cell.error = str(error)
        say(f"{workload.name}, round {round_ + 1}: {system} FAILED: {str(error).splitlines()[0]}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "turn.json").write_text(json.dumps(cell.as_json(), indent=1) + "\n", encoding="utf-8")
    return cell


def compare_loops(cells: Sequence[Cell]) -> None:
    """Give each open loop its figure: what it answers at the limit, which is one for all systems of a round.

    The limit is twice the latency without load of the system that has the lowest: so a system that is slow when nobody is there gains nothing by it.
    A bound is no figure to compare with, unless it is less than Pensieve would reach.
    """
    for key in dict.fromkeys((cell.workload, cell.round) for cell in cells if cell.points):
        together = [
            cell
            for cell in cells
            if (cell.workload, cell.round) == key and cell.figures is not None and cell.points
        ]
        unloaded = [
            cell.figures[_UNLOADED]
            for cell in together
            if cell.figures is not None and _UNLOADED in cell.figures
        ]
        if not unloaded:
            continue
        for cell in together:
            cell.crossing = throughput_at(cell.points, LATENCY_FACTOR * min(unloaded))
            assert cell.figures is not None
            if cell.crossing.bound is None or (cell.crossing.bound == "at least" and cell.system == PENSIEVE):
                cell.figures[AT_LIMIT] = cell.crossing.requests_per_s
            cell.figures["open/limit_ms"] = LATENCY_FACTOR * min(unloaded)
