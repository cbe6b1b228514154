"""Questions to an engine that it answers by event. Knows tags and futures; never what is asked."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import Future

from pensieve.engine.messages import (
    CacheMap,
    Checked,
    Command,
    Event,
    Forgotten,
    HintAnswer,
    KeepAnswer,
    Lost,
    Stats,
)
from pensieve.errors import PensieveError, error_from
from pensieve.service.turn import settle

Answer = KeepAnswer | HintAnswer | Forgotten | Checked | CacheMap | Stats | Lost


class Questions:
    """Who waits for which answer. Used by one thread."""

    def __init__(self) -> None:
        self._waiting: dict[str, Future[object]] = {}

    def ask(
        self, answer: Future[object], command: Callable[[str], Command], post: Callable[[Command], None]
    ) -> None:
        """Post a command under a fresh tag; `answer` gets the event that comes back with it."""
        tag = uuid.uuid4().hex
        self._waiting[tag] = answer
        post(command(tag))

    def take(self, event: Event) -> None:
        """Hand an answer to whoever asked, if anybody did."""
        assert isinstance(event, Answer)
        future = self._waiting.pop(event.tag, None)
        if future is None:
            return
        if isinstance(event, Lost):
            settle(future, error=error_from(event.code, event.message))
        else:
            settle(future, event)

    def give_up(self, error: PensieveError) -> None:
        """Nobody will answer any more."""
        for future in self._waiting.values():
            settle(future, error=error)
        self._waiting.clear()
