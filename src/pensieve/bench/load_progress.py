"""Shows how a load run goes while it goes. Knows counts; nothing of what is measured."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from pensieve.bench.load import LoadListener
from pensieve.bench.load import Progress as Counts

_LINES = 10  # a run says this many lines where there is no terminal


def open_load_progress(console: Console | None = None) -> LoadListener:
    """A live bar on a terminal, plain lines elsewhere (a file, a pipe, CI). Default console: standard error."""
    console = console or Console(stderr=True)
    return _Bar(console) if console.is_terminal else _Lines(console)


class _Bar:
    """One line, redrawn when it is told to: a thread that does so by itself would take the measured machine's time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._begun_s = 0.0

    def begin(self, label: str, progress: Counts) -> None:
        self._begun_s = time.perf_counter()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("turns, {task.fields[words]}"),
            TimeElapsedColumn(),
            console=self._console,
            auto_refresh=False,
        )
        self._task = self._bar.add_task(escape(label), total=progress.num_turns, words="")
        self._bar.start()

    def show(self, progress: Counts) -> None:
        if self._bar is None or self._task is None:
            return
        elapsed_s = max(1e-9, time.perf_counter() - self._begun_s)
        words = f"{progress.under_way} under way, {progress.output_tokens / elapsed_s:.0f} tokens/s"
        words += f", {progress.failed} failed" if progress.failed else ""
        self._bar.update(
            self._task, total=progress.num_turns - progress.skipped, completed=progress.ended, words=words
        )
        self._bar.refresh()

    def end(self, progress: Counts) -> None:
        self.show(progress)
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _Lines:
    """A line for each tenth of the run."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._label = ""
        self._said = 0

    def begin(self, label: str, progress: Counts) -> None:
        self._label, self._said = label, 0
        self._say(f"{progress.num_turns} turns")

    def show(self, progress: Counts) -> None:
        tenth = progress.ended * _LINES // max(1, progress.num_turns - progress.skipped)
        if tenth > self._said:
            self._said = tenth
            failed = f", {progress.failed} failed" if progress.failed else ""
            self._say(
                f"{progress.ended}/{progress.num_turns - progress.skipped} turns ended, {progress.under_way} under way{failed}"
            )

    def end(self, progress: Counts) -> None:
        self.show(progress)

    def _say(self, words: str) -> None:
        self._console.print(f"{self._label}: {words}", markup=False, highlight=False, soft_wrap=True)
