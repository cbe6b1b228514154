"""Questions to an engine, and its answers to them.

Knows commands, tags and futures; never turns, stores or what an answer means.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from pensieve.engine.messages import (
    CacheMap,
    Check,
    Checked,
    Command,
    Event,
    Forget,
    Forgotten,
    GetMap,
    GetRows,
    GetStats,
    HintAnswer,
    Idle,
    Keep,
    KeepAnswer,
    Lost,
    Stats,
    Warm,
)
from pensieve.errors import EngineClosed, PensieveError, error_from
from pensieve.service.service_thread import Job
from pensieve.service.turn import settle

Reply = KeepAnswer | HintAnswer | Forgotten | Checked | CacheMap | Stats | Lost

DEFAULT_NAMESPACE = "default"


class EngineClient:
    """Asks an engine, from any thread. Sole owner of the questions that are not answered yet.

    Each question returns a future of the event that answers it; it fails with a `PensieveError` if the engine
    is lost first.
    """

    def __init__(self, put: Callable[[Job], bool]) -> None:
        """`put` queues a job on the service's thread, so that commands leave in the order in which callers
        gave them.
        """
        self._put = put
        self._post: Callable[[Command], None] = _not_connected
        self._waiting: dict[str, Future[object]] = {}  # by tag; touched on the service's thread only

    def connect(self, post: Callable[[Command], None]) -> None:
        """Set where commands go: an engine's `post`."""
        self._post = post

    def post(self, command: Command) -> None:
        """Send a command that has no answer, at once."""
        self._post(command)

    # -- questions

    def stats(self) -> Future[object]:
        """The engine's `Stats`."""
        return self._ask(GetStats)

    def map(
        self, offset: int, limit: int, *, namespaces: tuple[str, ...] | None = None, tenant: str | None = None
    ) -> Future[object]:
        """Where chunks lie: a `CacheMap` with one row for each conversation, the latest active first."""
        return self._ask(lambda tag: GetMap(tag, offset, limit, namespaces, tenant))

    def rows(self, keys: Sequence[tuple[str, str]]) -> Future[object]:
        """A `CacheMap` with the rows of some conversations, named by namespace and id."""
        return self._ask(lambda tag: GetRows(tag, tuple(keys)))

    def check(self) -> Future[object]:
        """Verify every invariant of the cache: a `Checked`."""
        return self._ask(Check)

    def keep(self, conversation_id: str, keep: bool, *, namespace: str = DEFAULT_NAMESPACE) -> Future[object]:
        """Set or lift a keep on a conversation's cache: a `KeepAnswer`."""
        return self._ask(lambda tag: Keep(conversation_id, namespace, keep, tag))

    def warm(self, conversation_id: str, *, namespace: str = DEFAULT_NAMESPACE) -> Future[object]:
        """Hint that the user is typing, so that chunks are swapped in now: a `HintAnswer`."""
        return self._ask(lambda tag: Warm(conversation_id, namespace, tag))

    def idle(self, conversation_id: str, *, namespace: str = DEFAULT_NAMESPACE) -> Future[object]:
        """Hint that the user is done for now, so that chunks are evicted first: a `HintAnswer`."""
        return self._ask(lambda tag: Idle(conversation_id, namespace, tag))

    def erase(self, conversation_id: str, *, namespace: str = DEFAULT_NAMESPACE) -> Future[object]:
        """Free and zero everything cached of a conversation: a `Forgotten`."""
        return self._ask(lambda tag: Forget(conversation_id, namespace, True, tag))

    def forget(self, conversation_id: str, *, namespace: str = DEFAULT_NAMESPACE) -> None:
        """Free what is cached of a conversation; its stored turns stay."""
        self._post(Forget(conversation_id, namespace))

    # -- answers, on the service's thread

    def take(self, event: Event) -> None:
        """Hand an answer to the future that waits for it, if one does."""
        assert isinstance(event, Reply)
        future = self._waiting.pop(event.tag, None)
        if future is None:
            return
        if isinstance(event, Lost):
            settle(future, error=error_from(event.code, event.message))
        else:
            settle(future, event)

    def give_up(self, error: PensieveError) -> None:
        """Fail every question: no answer will come."""
        for future in self._waiting.values():
            settle(future, error=error)
        self._waiting.clear()

    def _ask(self, command: Callable[[str], Command]) -> Future[object]:
        """Post a command under a fresh tag, which the answer brings back."""
        answer: Future[object] = Future()

        def ask() -> None:
            tag = uuid.uuid4().hex
            self._waiting[tag] = answer
            self._post(command(tag))

        if not self._put(ask):
            settle(answer, error=EngineClosed("the service is closed"))
        return answer


def _not_connected(command: Command) -> None:
    raise EngineClosed(f"no engine is connected to answer {type(command).__name__}")
