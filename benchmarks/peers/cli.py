"""The command line: sets up, runs, reports. The last line on stdout is JSON; the exit status is 0 if every system answered every request."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from peers import machine
from peers.errors import PeerError
from peers.goals import judge
from peers.install import TORCH, VERSIONS, Peers, install, model_folder
from peers.report import plot, rounds_of, summary, tables
from peers.run import Cell, compare_loops, run_turn, turns
from peers.servers import INSTALLED_AS, Server, Site, make
from peers.workloads import SYSTEMS, Kv, Workload, workloads

SEEDS_A_ROUND, SEEDS_A_WORKLOAD = (
    10_000,
    100,
)  # so that no two calls on one server have the same conversations, nor any two rounds


def main(arguments: Sequence[str] | None = None) -> int:
    """Do it; returns the exit status."""
    options = _parser().parse_args(arguments)
    available = {workload.name: workload for workload in workloads()}
    chosen = [available[name] for name in _names(options.workloads, tuple(available), "--workloads")]
    chosen = [workload.in_little() for workload in chosen] if options.quick else chosen
    systems = _names(options.systems, SYSTEMS, "--systems")
    rounds = options.rounds or (1 if options.quick else 2)
    needed = {system for workload in chosen for system in workload.systems if system in systems}
    try:
        peers = install(
            options.peers,
            {INSTALLED_AS[s] for s in needed if s in INSTALLED_AS},
            torch=options.torch,
            say=_say,
        )
        folder = model_folder()
    except PeerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.setup_only:
        return 0
    out = options.out or Path("out") / f"peers-{datetime.now():%Y%m%d-%H%M%S}"
    threads = options.threads or machine.cores()
    about = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": machine.describe(),
        "versions": VERSIONS,
        "options": {
            "rounds": rounds,
            "quick": options.quick,
            "threads": threads,
            "seed": options.seed,
            "systems": list(systems),
        },
        "out": str(out),
    }
    cells, interrupted = _run(
        chosen,
        systems,
        rounds,
        functools.partial(_server, peers, folder, threads),
        out.resolve(),
        options.seed,
    )
    return _report(cells, chosen, about, out, interrupted)


def _run(
    chosen: Sequence[Workload],
    systems: Sequence[str],
    rounds: int,
    make_server: functools.partial[Server],
    out: Path,
    seed: int,
) -> tuple[list[Cell], bool]:
    """All turns, or those until somebody pressed Ctrl-C."""
    cells: list[Cell] = []
    places = {workload.name: place for place, workload in enumerate(workloads())}
    try:
        for workload, round_, system in turns(chosen, systems, rounds):
            first_seed = seed + SEEDS_A_ROUND * round_ + SEEDS_A_WORKLOAD * places[workload.name]
            cells.append(
                run_turn(
                    workload, system, round_, make_server=make_server, out=out, seed=first_seed, say=_say
                )
            )
    except KeyboardInterrupt:
        return cells, True
    return cells, False


def _report(
    cells: list[Cell], chosen: Sequence[Workload], about: dict[str, Any], out: Path, interrupted: bool
) -> int:
    compare_loops(cells)
    verdicts = judge(rounds_of(cells))
    Console(width=None if sys.stdout.isatty() else 140).print(
        tables(cells, chosen, verdicts, quick=about["options"]["quick"])
    )
    told = summary(cells, verdicts, {**about, "interrupted": interrupted})
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if picture := plot(cells, out / "peers.png"):
        _say(f"picture: {picture}")
    _say(f"everything: {out}")
    print(json.dumps(told))
    if interrupted:
        return 130
    return 1 if told["failures"] else 0


def _server(
    peers: Peers, folder: Path, threads: int, system: str, kv: Kv, port: int, scratch: Path
) -> Server:
    return make(system, Site(peers, folder, threads, scratch), kv, port)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/peers", description="Pensieve beside its peers, A B A B."
    )
    parser.add_argument(
        "--workloads", help=f"of {','.join(workload.name for workload in workloads())}  [all]"
    )
    parser.add_argument("--systems", help=f"of {','.join(SYSTEMS)}  [all]")
    parser.add_argument("--rounds", type=_positive, help="[2; 1 with --quick]")
    parser.add_argument(
        "--quick", action="store_true", help="few users, short answers: to see that everything works"
    )
    parser.add_argument("--threads", type=_positive, help="of every system  [the cores there are]")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--peers",
        type=Path,
        default=machine.ROOT / ".peers",
        help="the folder where the peers are set up  [.peers]",
    )
    parser.add_argument("--torch", default=TORCH, help=f"what pip is told for the peers' PyTorch  [{TORCH}]")
    parser.add_argument("--setup-only", action="store_true", help="set up the peers and stop")
    parser.add_argument(
        "--out", type=Path, help="the folder for reports, logs and pictures  [out/peers-DATE]"
    )
    return parser


def _names(told: str | None, known: Sequence[str], option: str) -> tuple[str, ...]:
    if told is None:
        return tuple(known)
    asked = [name.strip() for name in told.split(",") if name.strip()]
    if unknown := [name for name in asked if name not in known]:
        raise SystemExit(f"error: {option} knows no {unknown[0]!r}: choose from {', '.join(known)}")
    if not asked:
        raise SystemExit(f"error: {option} names nothing: choose from {', '.join(known)}")
    return tuple(name for name in known if name in asked)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def _say(message: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {message}", file=sys.stderr, flush=True)
