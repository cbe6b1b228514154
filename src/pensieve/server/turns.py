"""Answers under way, as an event loop sees them. Knows the conversation service; never HTTP, bodies or events' names.

The service speaks on a thread of its own. What it says is collected and handed to the loop in one call, however many answers got a
token meanwhile: a wake-up a step, not one a token.

Times out by the loop's own clock: an answer whose time is up has ended for its readers, whether or not the engine says so. It counts as open
until the engine does, for until then it takes the engine's room; an engine that never does is replaced (`engine_vitals`).
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from pensieve.engine.messages import tenant_of
from pensieve.errors import EngineSilent, Overloaded, PensieveError
from pensieve.server.ended import MAX_OPEN_BYTES, EndedAnswers, bytes_of_piece
from pensieve.server.shares import Shares
from pensieve.service import ConversationService, PendingTurn, Piece, TurnDone, TurnSpec
from pensieve.service.turn import settle

ENDED_S = 600.0  # how long an answer can be read again after its end without the store
DRAIN_ABORT_S = 10.0  # how long answers that were aborted at the end of a drain get to end


class QueueTimeout(PensieveError):
    """A request got no first token in time."""

    code = "queue_timeout"
    http_status = 503


class RequestTimeout(PensieveError):
    """A request took longer than it may."""

    code = "request_timeout"
    http_status = 504


class AnswerTooLarge(PensieveError):
    """An answer under way takes more memory than all answers together may."""

    code = "answer_too_large"
    http_status = 400


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
    given_up: PensieveError | None = None  # why it was ended before the engine ended it
    ended_s: float | None = None
    first_piece_s: float | None = None  # loop clock
    num_bytes: int = 0  # of `pieces`, about
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
    def settled(self) -> bool:
        """It is known whether it is stored. One whose time was up may end before that."""
        return self.turn.future.done()

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
            raise copy.copy(
                self.error
            )  # (one that is raised gathers frames, and what is kept must not hold theirs)
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

    async def over(self, within_s: float) -> None:
        """Wait for the end.

        Raises:
            EngineSilent: it does not come within `within_s` seconds.
        """
        try:
            async with asyncio.timeout(within_s):
                while not self.ended:
                    await self.changed()
        except TimeoutError:
            raise EngineSilent(
                f"the answer did not end within {within_s:g} s: it ends when the engine has heard of it, look again later"
            ) from None

    async def changed(self) -> None:
        """Wait for a piece or the end."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def for_later(self) -> Answer:
        """An ended answer without what only its making took: the prompt, the history, what its error's raising gathered."""
        spec = self.turn.spec
        turn = PendingTurn(
            replace(
                spec,
                messages=(),
                instructions=None,
                tools=(),
                meta={},
                watch=None,
                compose=None,
                forced=None,
                raw=None,
            ),
            self.turn.submitted_s,
            conversation_id=self.turn.conversation_id,
            sampled=self.turn.sampled if spec.sampling.logprobs is not None else [],
            aborted=self.turn.aborted,
        )
        done = None if self.done is None else replace(self.done, prompt=(), logprobs=(), tops=())
        settle(turn.future, done, error=None if done is not None else copy.copy(self.error))
        return replace(self, turn=turn, done=done, error=copy.copy(self.error), _waiters=[])

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
        """At most `max_open` answers at once, running and waiting, divided among tenants as `Shares` says; beyond that a request is refused.

        `max_open_per_tenant` None: there are no tenants.
        """
        self._service = service
        self._loop = asyncio.get_running_loop()
        self.places = Shares(max_open, max_open_per_tenant)
        self._queue_timeout_s = queue_timeout_s
        self._request_timeout_s = request_timeout_s
        self._on_end = on_end
        self.watchers: list[Callable[[Answer], None]] = []  # more of those who are told of every end
        self.open: dict[str, Answer] = {}
        self._open_bytes = 0
        self._ended = EndedAnswers(self._loop, ENDED_S)
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
        tenant = tenant_of(spec.namespace)
        self.check_room(tenant)
        if self._open_bytes > MAX_OPEN_BYTES:
            raise Overloaded(
                f"the answers under way take {self._open_bytes >> 20} MB, at most {MAX_OPEN_BYTES >> 20} may before another begins: try again later"
            )
        answer: Answer

        def on_piece(piece: Piece) -> None:
            self._hand_in(answer, piece)

        pending = PendingTurn(spec, time.monotonic(), on_piece)
        answer = Answer(spec.namespace, pending, Answer.now() if created is None else created, record=record)
        self.open[answer.id] = answer
        self.places.take(tenant)
        self._idle.clear()
        pending.future.add_done_callback(lambda future: self._hand_in(answer, None))
        self._service.begin(pending)
        timers = [
            self._loop.call_later(self._queue_timeout_s, self._time_out, answer, True),
            self._loop.call_later(self._request_timeout_s, self._time_out, answer, False),
        ]
        pending.future.add_done_callback(lambda future: self._loop.call_soon_threadsafe(_cancel, timers))
        return answer

    def check_room(self, tenant: str) -> None:
        """See whether a tenant may have another turn answered now.

        Raises:
            Overloaded: as many are open as may be, or all that are left are kept for tenants that have fewer.
            Draining: the server is going down.
        """
        if self.draining:
            raise Draining("the server is shutting down: ask again in a moment")
        if self.places.has_room(tenant):
            return
        if len(self.open) >= self.places.total:
            raise Overloaded(
                f"{len(self.open)} requests are running or waiting, at most {self.places.total} may: try again later"
            )
        held = self.places.held(tenant)
        if held >= self.places.per_tenant:
            raise Overloaded(
                f"{held} requests of your keys are running or waiting, at most {self.places.per_tenant} may "
                "(--max-open-per-key): try again later"
            )
        raise Overloaded(
            f"{held} requests of your keys are running or waiting, and the places that are left are for other keys: try again later"
        )

    def find(self, namespace: str, turn_id: str) -> Answer | None:
        """An answer that is under way or ended a while ago."""
        answer = self.open.get(turn_id) or self._ended.get(turn_id)
        return answer if answer is not None and answer.namespace == namespace else None

    def forget(self, namespace: str, conversation_id: str) -> None:
        """Keep nothing of a conversation's ended answers: it was erased."""
        self._ended.forget(namespace, conversation_id)

    def forget_turn(self, namespace: str, turn_id: str) -> None:
        """Keep nothing of an ended answer: it was deleted."""
        self._ended.forget_turn(namespace, turn_id)

    def abort(self, answer: Answer) -> None:
        """End an answer early."""
        if not answer.ended:
            self._service.abort(answer.turn)

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
                if not answer.ended:  # (what is cut short now must not be taken for whole)
                    message = "the server is shutting down, and the answer was not whole in time: ask again in a moment"
                    self._give_up(answer, Draining(message))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), min(timeout_s, DRAIN_ABORT_S))

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
            if piece is None:
                self._end(answer)
            elif not answer.ended:
                if answer.first_piece_s is None:
                    answer.first_piece_s = self._loop.time()
                answer.pieces.append(piece)
                num_bytes = bytes_of_piece(piece)
                answer.num_bytes += num_bytes
                self._open_bytes += num_bytes
        if self._open_bytes > 2 * MAX_OPEN_BYTES:
            self._end_heaviest()
        for answer in dict.fromkeys(answer for answer, _ in inbox):
            answer.notify()

    def _end(self, answer: Answer) -> None:
        """The service is done with an answer: it is stored, or it never will be."""
        future: Future[TurnDone] = answer.turn.future
        if future.cancelled():
            answer.error = answer.error or PensieveError("the turn was cancelled")
        elif (error := future.exception()) is not None:
            answer.error = answer.error or error
        else:
            answer.done = future.result()
        answer.ended_s = self._loop.time()
        del self.open[answer.id]
        self._open_bytes -= answer.num_bytes
        self.places.give(tenant_of(answer.namespace))
        if not self.open:
            self._idle.set()
        self._ended.add(answer.for_later())
        self._on_end(answer)
        for watcher in self.watchers:
            watcher(answer)

    def _time_out(self, answer: Answer, waiting: bool) -> None:
        if answer.ended or (waiting and answer.first_piece_s is not None):
            return
        if waiting:
            error: PensieveError = QueueTimeout(
                f"no first token after {self._queue_timeout_s:g} s: the server is busy, try again later"
            )
        else:
            error = RequestTimeout(
                f"the answer took longer than the {self._request_timeout_s:g} s that a request may take"
            )
        self._give_up(answer, error)

    def _give_up(self, answer: Answer, error: PensieveError) -> None:
        """End an answer for its readers now. What was said of it is not stored, unless it is whole by now: a retry gets that, or a new answer."""
        answer.given_up = answer.error = error
        self._service.abort(answer.turn, keep=False)
        answer.notify()

    def _end_heaviest(self) -> None:
        heaviest = max(self.open.values(), key=lambda answer: 0 if answer.ended else answer.num_bytes)
        if not heaviest.ended:
            self._give_up(
                heaviest,
                AnswerTooLarge(
                    f"this answer takes {heaviest.num_bytes >> 20} MB of the {2 * MAX_OPEN_BYTES >> 20} that all answers under way may: "
                    "ask for fewer top_logprobs, or for fewer tokens"
                ),
            )
            self._open_bytes -= heaviest.num_bytes
            heaviest.pieces, heaviest.num_bytes = [], 0


def _cancel(timers: list[asyncio.TimerHandle]) -> None:
    for timer in timers:
        timer.cancel()
