"""Answers under way, as an event loop sees them. Knows the conversation service; never HTTP, bodies or events' names.

The service speaks on a thread of its own. What it says is collected and handed to the loop in one call, however many answers got a
token meanwhile: a wake-up a step, not one a token.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from pensieve.errors import Overloaded, PensieveError
from pensieve.messages import tenant_of
from pensieve.service import ConversationService, PendingTurn, Piece, TurnDone, TurnSpec

MAX_ENDED = 512  # answers that can be read again after their end without the store
ENDED_S = 600.0  # how long


class QueueTimeout(PensieveError):
    """A request got no first token in time."""

    code = "queue_timeout"
    http_status = 503


class RequestTimeout(PensieveError):
    """A request took longer than it may."""

    code = "request_timeout"
    http_status = 504


class Draining(PensieveError):
    """The server is going down and takes no new requests."""

    code = "shutting_down"
    http_status = 503


@dataclass(eq=False)
class Answer:
    """One answer: its pieces so far and its end. Any number of readers, each from any piece on."""

    namespace: str
    turn: PendingTurn
    created: int  # seconds since the epoch
    pieces: list[Piece] = field(default_factory=list)
    done: TurnDone | None = None
    error: BaseException | None = None
    record: Any = None  # what the API wants to remember of it
    timeout: PensieveError | None = None
    ended_s: float | None = None
    first_piece_s: float | None = None  # loop clock
    _waiters: list[asyncio.Future[None]] = field(default_factory=list)

    @staticmethod
    def now() -> int:
        """Seconds since the epoch, as clients are told them."""
        return int(time.time())

    @property
    def id(self) -> str:
        """The turn's id, without any API's prefix."""
        return self.turn.spec.turn_id

    @property
    def ended(self) -> bool:
        """No more pieces will come."""
        return self.done is not None or self.error is not None

    @property
    def stored(self) -> bool:
        """It is a turn now, and the store says what became of that."""
        return self.done is not None and self.done.turn_id is not None

    async def read(self, start: int = 0) -> AsyncIterator[Piece]:
        """The pieces from `start` on, as they come, until the end."""
        while True:
            while start < len(self.pieces):
                start += 1
                yield self.pieces[start - 1]
            if self.ended:
                return
            await self.changed()

    async def result(self) -> TurnDone:
        """The whole answer.

        Raises:
            PensieveError: it failed, or took too long.
        """
        while not self.ended:
            await self.changed()
        if self.error is not None:
            raise self.error
        if self.timeout is not None:
            raise self.timeout
        assert self.done is not None
        return self.done

    async def begun(self, within_s: float) -> None:
        """Wait for the first piece or the end, but no longer than `within_s` seconds."""
        try:
            async with asyncio.timeout(within_s):
                while not (self.pieces or self.ended):
                    await self.changed()
        except TimeoutError:
            return

    async def changed(self) -> None:
        """Wait for a piece or the end."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def notify(self) -> None:
        """Wake every reader."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class Turns:
    """All answers of a server. Used by the event loop alone, but for what the service's thread hands in."""

    def __init__(
        self,
        service: ConversationService,
        *,
        max_open: int,
        max_open_per_tenant: int | None = None,
        queue_timeout_s: float,
        request_timeout_s: float,
        on_end: Callable[[Answer], None] = lambda answer: None,
    ) -> None:
        """At most `max_open` answers at once, running and waiting, and of one tenant at most so many of them; beyond that a request is refused."""
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._max_open, self._max_open_per_tenant = max_open, max_open_per_tenant or max_open
        self._num_open: Counter[str] = Counter()  # by tenant
        self._queue_timeout_s = queue_timeout_s
        self._request_timeout_s = request_timeout_s
        self._on_end = on_end
        self.watchers: list[Callable[[Answer], None]] = []  # more of those who are told of every end
        self.open: dict[str, Answer] = {}
        self._ended: OrderedDict[str, Answer] = OrderedDict()
        self._inbox: list[tuple[Answer, Piece | None]] = []
        self._lock = threading.Lock()
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False
        self._given_up = False  # what was open when the server went down did not end in time

    def start(self, spec: TurnSpec, *, created: int | None = None, record: Any = None) -> Answer:
        """Have a turn answered. `created` is what its client is told of when, seconds since the epoch.

        Raises:
            Overloaded: as many are open as may be.
            Draining: the server is going down.
        """
        if self.draining:
            raise Draining("the server is shutting down: ask again in a moment")
        if len(self.open) >= self._max_open:
            raise Overloaded(f"{len(self.open)} requests are running or waiting, at most {self._max_open} may: try again later")
        tenant = tenant_of(spec.namespace)
        if self._num_open[tenant] >= self._max_open_per_tenant:
            raise Overloaded(
                f"{self._num_open[tenant]} requests of your keys are running or waiting, at most {self._max_open_per_tenant} may "
                "(--max-open-per-key): try again later"
            )
        answer: Answer

        def on_piece(piece: Piece) -> None:
            self._hand_in(answer, piece)

        pending = PendingTurn(spec, time.monotonic(), on_piece)
        answer = Answer(spec.namespace, pending, Answer.now() if created is None else created, record=record)
        self.open[answer.id] = answer
        self._num_open[tenant] += 1
        self._idle.clear()
        pending.future.add_done_callback(lambda future: self._hand_in(answer, None))
        self._service.begin(pending)
        timers = [
            self._loop.call_later(self._queue_timeout_s, self._time_out, answer, True),
            self._loop.call_later(self._request_timeout_s, self._time_out, answer, False),
        ]
        pending.future.add_done_callback(lambda future: self._loop.call_soon_threadsafe(_cancel, timers))
        return answer

    def find(self, namespace: str, turn_id: str) -> Answer | None:
        """An answer that is under way or ended a while ago."""
        answer = self.open.get(turn_id) or self._ended.get(turn_id)
        return answer if answer is not None and answer.namespace == namespace else None

    def abort(self, answer: Answer) -> None:
        """End an answer early."""
        if not answer.ended:
            self._service.abort(answer.turn, keep=answer.timeout is None)

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, and wait for what is open; what is not done in time is aborted."""
        self.draining = True
        if self._given_up:
            return
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            self._given_up = True
            for answer in list(self.open.values()):
                if answer.timeout is None:  # (what is cut short now must not be taken for whole)
                    answer.timeout = Draining("the server is shutting down, and the answer was not whole in time: ask again in a moment")
                self.abort(answer)
                answer.error = answer.timeout
                answer.notify()
            try:
                await asyncio.wait_for(self._idle.wait(), timeout_s)
            except TimeoutError:
                return

    # -- inside

    def _hand_in(self, answer: Answer, piece: Piece | None) -> None:
        with self._lock:
            self._inbox.append((answer, piece))
            if len(self._inbox) > 1:
                return  # the loop has been told already
        try:
            self._loop.call_soon_threadsafe(self._take)
        except RuntimeError:  # the loop is closed: nobody reads any more
            with self._lock:
                self._inbox.clear()

    def _take(self) -> None:
        with self._lock:
            inbox, self._inbox = self._inbox, []
        for answer, piece in inbox:
            if piece is not None:
                if answer.first_piece_s is None:
                    answer.first_piece_s = self._loop.time()
                answer.pieces.append(piece)
            else:
                self._end(answer)
        for answer in dict.fromkeys(answer for answer, _ in inbox):
            answer.notify()

    def _end(self, answer: Answer) -> None:
        future: Future[TurnDone] = answer.turn.future
        if future.cancelled():
            answer.error = PensieveError("the turn was cancelled")
        elif (error := future.exception()) is not None:
            answer.error = answer.error or error
        else:
            answer.done = future.result()
        answer.ended_s = self._loop.time()
        del self.open[answer.id]
        tenant = tenant_of(answer.namespace)
        self._num_open[tenant] -= 1
        if not self._num_open[tenant]:
            del self._num_open[tenant]
        if not self.open:
            self._idle.set()
        self._ended[answer.id] = answer
        while self._ended:
            oldest = next(iter(self._ended.values()))
            assert oldest.ended_s is not None
            if len(self._ended) <= MAX_ENDED and self._loop.time() - oldest.ended_s < ENDED_S:
                break
            self._ended.popitem(last=False)
        self._on_end(answer)
        for watcher in self.watchers:
            watcher(answer)

    def _time_out(self, answer: Answer, waiting: bool) -> None:
        if answer.ended or answer.timeout is not None or (waiting and answer.first_piece_s is not None):
            return
        if waiting:
            answer.timeout = QueueTimeout(f"no first token after {self._queue_timeout_s:g} s: the server is busy, try again later")
        else:
            answer.timeout = RequestTimeout(f"the answer took longer than the {self._request_timeout_s:g} s that a request may take")
        self.abort(answer)
        answer.error = answer.timeout
        answer.notify()


def _cancel(timers: list[asyncio.TimerHandle]) -> None:
    for timer in timers:
        timer.cancel()
