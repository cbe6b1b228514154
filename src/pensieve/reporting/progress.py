"""Shows how far a run is while it runs. Knows counts and words; never what they count."""

from __future__ import annotations

import math
import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SHOW_EVERY_S = 0.5  # redrawing costs the machine that is measured
_LINES = 10  # lines per run where there is no terminal


class Bar:
    """One line on a terminal. Redrawn by its caller's thread: a refresh thread would disturb the measurement."""

    live = True

    def __init__(self, label: str, total: float, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[words]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
        )
        self._task = self._bar.add_task(escape(label), total=total, words="")
        self._label, self._drawn_s = label, -math.inf
        self._bar.start()

    def show(self, done: float, total: float, words: str) -> None:
        """Redraw, at most every `SHOW_EVERY_S`."""
        self._bar.update(self._task, completed=done, total=total, words=words)
        if (now_s := time.perf_counter()) - self._drawn_s >= SHOW_EVERY_S:
            self._drawn_s = now_s
            self._bar.refresh()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(f"{self._label}: {line}", markup=False, highlight=False)

    def close(self) -> None:
        self._bar.refresh()
        self._bar.stop()


class Lines:
    """One line for each tenth of the run, for a file, a pipe or CI."""

    live = False

    def __init__(self, label: str, total: float, console: Console) -> None:
        self._label, self._console, self._tenths = label, console, 0

    def show(self, done: float, total: float, words: str) -> None:
        tenths = int(done * _LINES / total) if total else _LINES
        if tenths > self._tenths:
            self._tenths = tenths
            self.say(words)

    def say(self, line: str) -> None:
        self._console.print(f"{self._label}: {line}", markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        pass


def open_bar(label: str, total: float, console: Console | None = None) -> Bar | Lines:
    """A bar on a terminal, lines elsewhere.

    Args:
        label: what runs.
        total: what `done` reaches at the end.
        console: None: standard error.
    """
    console = console or Console(stderr=True)
    return (Bar if console.is_terminal else Lines)(label, total, console)
