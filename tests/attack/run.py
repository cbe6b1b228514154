"""Attack a real `pensieve serve`, and say whether its promises hold.

    python tests/attack/run.py [--list] [--quick] [--only WORDS ...] [--seed N] [--limit-s S]

Starts servers of its own over a tiny random model, with stores of their own on free ports, sends them what hostile or broken clients, disks,
models and processes do, and measures the others' waiting and the servers' memory meanwhile. A line a check, the last line is JSON; the exit
status is 1 if a promise did not hold. Knows the checks and how to run them; never what they send.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import platform
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import bodies
import connections
import deaths
import engines
import heads
import model
import pages
import stores
import templates
import tenants
import texts
from promises import CHECKS, Check, Notes
from world import World

KINDS = (
    bodies,
    texts,
    heads,
    connections,
    tenants,
    pages,
    stores,
    deaths,
    engines,
    templates,
)  # imported: they register their checks
LIMIT_S = 3600.0  # of a whole run; checks that were not begun by then fail


def chosen(words: list[str], quick: bool) -> list[Check]:
    """The checks that were asked for: by name, kind or pattern."""
    named = [
        check
        for check in CHECKS.values()
        if not words
        or any(fnmatch.fnmatch(check.name, word) or check.name.startswith(f"{word}/") for word in words)
    ]
    return [check for check in named if check.quick or not quick]


def run_one(check: Check, world: World) -> Notes:
    """Run a check; a second time if it found nothing but latencies that other work on the machine explains."""
    notes = Notes(check.name)
    begun_s = time.monotonic()
    try:
        check.run(world, notes)
        if not notes.passed and notes.only_slow:
            first, notes = notes, Notes(check.name)
            notes.say(f"(second try; first: {'; '.join(first.broken)})", tries=2)
            check.run(world, notes)
    except Exception as error:
        notes.hold(False, f"the check itself ended: {type(error).__name__}: {str(error)[-600:]}")
        if not isinstance(error, RuntimeError):
            traceback.print_exc()
    if not notes.passed and not notes.only_slow:
        world.drop_shared()  # the next input meets a server that nothing was done to
    notes.wall_s = time.monotonic() - begun_s
    return notes


def show(notes: Notes) -> None:
    """A line a check, and one for each promise that did not hold."""
    print(
        f"{'pass' if notes.passed else 'FAIL'} {notes.name} [{notes.wall_s:.1f} s]: {'; '.join(notes.told)}",
        flush=True,
    )
    for words in notes.broken:
        print(f"     {words}", flush=True)


def summary(all_notes: list[Notes], wall_s: float, seed: int) -> dict[str, Any]:
    """What the last line says."""

    def most(figure: str) -> float | None:
        return max((notes.figures[figure] for notes in all_notes if figure in notes.figures), default=None)

    def total(figure: str) -> int:
        return sum(notes.figures.get(figure, 0) for notes in all_notes)

    counted = ("kills", "acknowledged", "retried", "lost", "doubled", "fragments")
    return {
        "passed": sum(notes.passed for notes in all_notes),
        "failed": [notes.name for notes in all_notes if not notes.passed],
        "worst_health_s": most("worst_health_s"),
        "quiet_health_s": most("quiet_health_s"),
        "growth_mb": most("growth_mb"),
        **{figure: total(figure) for figure in counted},
        "wall_s": round(wall_s, 1),
        "seed": seed,
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "checks": {
            notes.name: {"passed": notes.passed, "wall_s": round(notes.wall_s, 1), **notes.figures}
            for notes in all_notes
        },
    }


def main() -> int:
    """Run what was asked for; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="name the checks and their promises")
    parser.add_argument("--quick", action="store_true", help="fewer inputs of each kind")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORDS", help="checks by name, kind or pattern"
    )
    parser.add_argument("--skip", nargs="+", default=[], metavar="WORDS", help="all but these")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--limit-s", type=float, default=LIMIT_S, help="seconds after which no check is begun"
    )
    parser.add_argument("--model", type=Path, default=None, help="where the tiny model is, or is to be made")
    arguments = parser.parse_args()
    checks = chosen(arguments.only, arguments.quick)
    if arguments.skip:
        skipped = {check.name for check in chosen(arguments.skip, False)}
        checks = [check for check in checks if check.name not in skipped]
    if not checks:
        parser.error(f"no check is called {' or '.join(arguments.only)}; --list names them")
    if arguments.list:
        for check in checks:
            print(f"{check.name:<40} {check.promise}")
        return 0
    begun_s = time.monotonic()
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2
    )  # thousands of connections
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    all_notes: list[Notes] = []
    with tempfile.TemporaryDirectory(prefix="pensieve-attack-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        world = World(
            folder, model.made(arguments.model or folder / "model"), arguments.seed, arguments.quick
        )
        with contextlib.closing(world):
            for check in checks:
                if time.monotonic() - begun_s > arguments.limit_s:
                    notes = Notes(check.name)
                    notes.hold(False, f"not begun: the run has taken {arguments.limit_s:g} s (--limit-s)")
                else:
                    notes = run_one(check, world)
                show(notes)
                all_notes.append(notes)
    told = summary(all_notes, time.monotonic() - begun_s, arguments.seed)
    failed = told["failed"]
    print(
        f"{told['passed']} held, {len(failed)} did not, in {told['wall_s']:.0f} s{': ' if failed else ''}{', '.join(failed)}"
    )
    print(json.dumps(told))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
