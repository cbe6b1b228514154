"""Plays users: each sends the turns of its conversations when they are due.

Knows due times and this process's clock; never what a turn says.

One task per user. Closed and open loops are the same here: a conversation says when its next turn is due.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console

from pensieve.reporting.progress import SHOW_EVERY_S, Bar, Lines, open_bar

_TICK_S = 0.001  # an event loop may wake up a little early: its clock has coarse ticks


@dataclass(slots=True)
class RunProgress:
    """How far a run is, in turns."""

    num_turns: int
    sent: int = 0
    ended: int = 0  # answered or failed
    failed: int = 0
    skipped: int = 0  # turns that are never sent, because their conversation ended early
    output_tokens: int = 0

    @property
    def in_flight(self) -> int:
        return self.sent - self.ended


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """How a turn ended."""

    at_s: float  # since the run began
    output_tokens: int
    goes_on: bool  # False: the conversation's remaining turns are not sent
    failed: bool = False
    words: str | None = None  # shown to the user of the benchmark; None: nothing to say


class PlayedConversation(Protocol):
    """One conversation as its user plays it."""

    @property
    def num_turns(self) -> int: ...

    def due_s(self, turn: int, free_s: float) -> float:
        """When the turn is to be sent, if the user is free from `free_s` on. Seconds since the run began."""
        ...

    async def take_turn(self, turn: int, due_s: float) -> TurnEnd:
        """Send the turn now and wait for its end."""
        ...


@dataclass(frozen=True, slots=True)
class PlayedUser:
    """One user and its conversations, one after the other."""

    start_s: float
    conversations: Iterable[PlayedConversation]


class RunListener(Protocol):
    """Is told how a run goes, from the driver's event loop."""

    def begin(self, label: str, progress: RunProgress) -> None: ...

    def show(self, progress: RunProgress) -> None:
        """A turn was sent or has ended, or some time has passed."""
        ...

    def say(self, words: str) -> None:
        """Something that the user of the benchmark should read."""
        ...

    def end(self, progress: RunProgress) -> None:
        """The run is over, also if it was broken off."""
        ...


class ShownRun:
    """A listener that shows a bar on a terminal and lines elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        """`console`: None is standard error."""
        self._console = console
        self._bar: Bar | Lines | None = None
        self._begun_s = 0.0

    def begin(self, label: str, progress: RunProgress) -> None:
        self._begun_s = time.perf_counter()
        self._bar = open_bar(label, progress.num_turns, self._console)
        if not self._bar.live:
            self._bar.say(f"{progress.num_turns} turns")

    def show(self, progress: RunProgress) -> None:
        if self._bar is None:
            return
        total = progress.num_turns - progress.skipped
        words = f"{progress.ended}/{total} turns, {progress.in_flight} under way"
        if self._bar.live:
            elapsed_s = max(1e-9, time.perf_counter() - self._begun_s)
            words += f", {progress.output_tokens / elapsed_s:.0f} tokens/s"
        words += f", {progress.failed} failed" if progress.failed else ""
        self._bar.show(progress.ended, total, words)

    def say(self, words: str) -> None:
        if self._bar is not None:
            self._bar.say(words)

    def end(self, progress: RunProgress) -> None:
        if self._bar is not None:
            if self._bar.live:
                self.show(progress)
            self._bar.close()
            self._bar = None


class Driver:
    """One run. Sole owner of its clock and its progress."""

    def __init__(self, label: str, num_turns: int, listener: RunListener | None = None) -> None:
        """`num_turns` of all conversations, if none ends early."""
        self.progress = RunProgress(num_turns)
        self._label, self._listener = label, listener
        self._begun_s = time.perf_counter()

    def now_s(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._begun_s

    def since_begin_s(self, at_s: float) -> float:
        """A time of `time.perf_counter` in seconds since the run began."""
        return at_s - self._begun_s

    async def play(self, users: Iterable[PlayedUser]) -> None:
        """Play all users to the end of their last conversation."""
        if self._listener is not None:
            self._listener.begin(self._label, self.progress)
        ticker = asyncio.ensure_future(self._tick())
        self._begun_s = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as group:
                for user in users:
                    group.create_task(self._play(user))
        finally:
            ticker.cancel()
            if self._listener is not None:
                self._listener.end(self.progress)

    async def _play(self, user: PlayedUser) -> None:
        free_s = user.start_s
        for conversation in user.conversations:
            free_s = await self._converse(conversation, free_s)

    async def _converse(self, conversation: PlayedConversation, free_s: float) -> float:
        """One conversation, to its end or its first failed turn. Returns when that was."""
        progress = self.progress
        for turn in range(conversation.num_turns):
            due_s = conversation.due_s(turn, free_s)
            while (left_s := due_s - self.now_s()) > 0:
                await asyncio.sleep(max(left_s, _TICK_S))
            progress.sent += 1
            self._show()
            end = await conversation.take_turn(turn, due_s)
            free_s = end.at_s
            progress.ended += 1
            progress.output_tokens += end.output_tokens
            progress.failed += end.failed
            self._show()
            if not end.goes_on:
                progress.skipped += conversation.num_turns - turn - 1
                if end.words is not None and self._listener is not None:
                    self._listener.say(end.words)
                break
        return free_s

    def _show(self) -> None:
        if self._listener is not None:
            self._listener.show(self.progress)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(SHOW_EVERY_S)
            self._show()
