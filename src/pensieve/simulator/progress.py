"""Shows how far simulations are, in simulated time. Knows cases and ticks; never what is simulated in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

from pensieve.reporting.progress import open_bar
from pensieve.simulator.case import Case
from pensieve.simulator.sweep import Tell, Tick


@contextmanager
def progress(cases: Sequence[Case], console: Console | None = None) -> Iterator[Tell]:
    """One bar for all cases on a terminal; elsewhere a line at the end of each case.

    Args:
        cases: what is simulated.
        console: None: standard error.
    """
    times = [0.0] * len(cases)
    finished = [0] * len(cases)  # requests
    lengths = [case.load.duration_s or 1.0 for case in cases]  # (a trace's length is known at its end only)
    bar = open_bar("simulating", sum(lengths), console)
    num_done = 0

    def show(tick: Tick) -> None:
        nonlocal num_done
        num_done += tick.done
        times[tick.index] = lengths[tick.index] if tick.done else min(tick.now_s, lengths[tick.index])
        finished[tick.index] = tick.finished
        if bar.live:
            words = f"{num_done}/{len(cases)}, at {_clock(tick.now_s)}, {sum(finished):,} requests"
            bar.show(sum(times), sum(lengths), words)
        elif tick.done:
            bar.say(f"{num_done} of {len(cases)} simulations done: {_words(cases[tick.index])}")

    try:
        yield show
    finally:
        bar.close()


def _words(case: Case) -> str:
    rate = f" at {case.load.rates[case.run]:g} requests/s" if case.load.rates else ""
    return f"{case.machine.model}, {case.label}{rate}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02} simulated"
