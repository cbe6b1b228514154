"""Shows how far simulations are, in simulated time. Knows ticks; nothing of what is simulated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pensieve.simulator.case import Case
from pensieve.simulator.sweep import Tell, Tick


@contextmanager
def progress(cases: Sequence[Case], console: Console | None = None) -> Iterator[Tell]:
    """A bar over all cases on a terminal, a line at each case's end elsewhere (a file, a pipe, CI). Default console: standard error."""
    console = console or Console(stderr=True)
    times = [0.0] * len(cases)
    finished = [0] * len(cases)
    if not console.is_terminal:

        def line(tick: Tick) -> None:
            if tick.done:
                finished[tick.index] = 1
                console.print(
                    f"{sum(finished)} of {len(cases)} simulations done: {_words(cases[tick.index])}",
                    highlight=False,
                )

        yield line
        return
    lengths = [
        case.load.duration_s or 0.0 for case in cases
    ]  # (a trace's own length is known when it is over)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[words]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as bar:
        task = bar.add_task("simulating", total=sum(lengths) or len(cases), words="")

        def show(tick: Tick) -> None:
            length = lengths[tick.index]
            times[tick.index] = (length or 1.0) if tick.done else min(tick.now_s, length)
            finished[tick.index] = tick.finished
            done = sum(length <= at for length, at in zip(lengths, times, strict=True) if at)
            bar.update(
                task,
                completed=sum(times),
                words=f"{done}/{len(cases)}, at {_clock(tick.now_s)}, {sum(finished):,} requests",
            )

        yield show


def _words(case: Case) -> str:
    rate = f" at {case.load.rates[case.run]:g} requests/s" if case.load.rates else ""
    return f"{case.machine.model}, {case.label}{rate}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02} simulated"
