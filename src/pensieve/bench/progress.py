"""Shows how a run goes while it goes. Knows counts of turns; nothing of what is measured."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pensieve.bench.compare import RunListener
from pensieve.bench.runs import EarlyEnd, TurnRecord, short_name

_LINES = 10  # a run of many turns says this many lines where there is no terminal


def open_progress(console: Console | None = None) -> RunListener:
    """A live bar on a terminal, plain lines elsewhere (a file, a pipe, CI). Default console: standard error."""
    console = console or Console(stderr=True)
    return _Bar(console) if console.is_terminal else _Lines(console)


class _Count:
    """What both forms count."""

    def __init__(self) -> None:
        self.system = ""
        self.total = 0
        self.done = 0

    def start(self, system: str, num_turns: int) -> None:
        self.system, self.total, self.done = short_name(system), num_turns, 0


class _Bar:
    """One line that is redrawn."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._count = _Count()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def begin(self, system: str, num_turns: int) -> None:
        self._count.start(system, num_turns)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("turns, {task.fields[in_flight]} under way"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task(escape(self._count.system), total=num_turns, in_flight=0)
        self._progress.start()

    def sent(self, in_flight: int) -> None:
        self._show(in_flight)

    def answered(self, record: TurnRecord, in_flight: int) -> None:
        self._count.done += 1
        self._show(in_flight)

    def ended_early(self, end: EarlyEnd) -> None:
        self._count.total -= end.turns_left
        self._show(None)
        self._console.print(f"{self._count.system}: {end}", markup=False, highlight=False)

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _show(self, in_flight: int | None) -> None:
        if self._progress is None or self._task is None:
            return
        self._progress.update(self._task, total=self._count.total, completed=self._count.done)
        if in_flight is not None:
            self._progress.update(self._task, in_flight=in_flight)


class _Lines:
    """A line for each tenth of the run."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._count = _Count()
        self._said = 0

    def begin(self, system: str, num_turns: int) -> None:
        self._count.start(system, num_turns)
        self._said = 0
        self._say(f"{num_turns} turns")

    def sent(self, in_flight: int) -> None:
        pass

    def answered(self, record: TurnRecord, in_flight: int) -> None:
        self._count.done += 1
        tenth = self._count.done * _LINES // max(1, self._count.total)
        if tenth > self._said:
            self._said = tenth
            self._say(f"{self._count.done}/{self._count.total} turns answered, {in_flight} under way")

    def ended_early(self, end: EarlyEnd) -> None:
        self._count.total -= end.turns_left
        self._say(str(end))

    def end(self) -> None:
        pass

    def _say(self, words: str) -> None:
        self._console.print(f"{self._count.system}: {words}", markup=False, highlight=False, soft_wrap=True)
