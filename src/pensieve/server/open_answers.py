"""The answers that are open, as an event loop sees them.

Knows the conversation service; never HTTP or bodies.

The service speaks on a thread of its own. Its pieces stay where they are, in the `PendingTurn`; the loop is
told how many there are, in one call for all answers that got a token meanwhile: one wake-up a step, not one a
token.

Answers time out by the loop's clock: then an answer has ended for its readers, whether or not the engine has
ended it. It counts as open until the engine has, because it takes room in the engine until then. An engine
that never does is replaced (`engine.vitals`).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from pensieve.engine.messages import tenant_of
from pensieve.errors import Overloaded, PensieveError
from pensieve.server.answer import Answer
from pensieve.server.ended import MAX_OPEN_BYTES, EndedAnswers, bytes_of_piece
from pensieve.server.shares import Shares
from pensieve.service import ConversationService, PendingTurn, TurnSpec

ENDED_S = 600.0  # how long an answer can be read again after its end without the store
DRAIN_ABORT_S = 10.0  # how long answers that were aborted at the end of a drain get to end


class QueueTimeout(PensieveError):
    """A request had no first token in time."""

    code = "queue_timeout"
    http_status = 503


class RequestTimeout(PensieveError):
    """A request took longer than a request may take."""

    code = "request_timeout"
    http_status = 504


class AnswerTooLarge(PensieveError):
    """An open answer takes more memory than all open answers together may take."""

    code = "answer_too_large"
    http_status = 400


class Draining(PensieveError):
    """The server is shutting down and takes no new requests."""

    code = "shutting_down"
    http_status = 503


class OpenAnswers:
    """All open answers of a server, and the latest that ended.

    Used by the event loop only, except for `_hand_in`.

    Attributes:
        open: answers that the engine has not ended, by turn id.
        places: how many of them each tenant has.
        watchers: called with every answer that ends.
        draining: whether the server is shutting down and takes no new requests.
    """

    def __init__(
        self,
        service: ConversationService,
        *,
        max_open: int,
        max_open_per_tenant: int | None = None,
        queue_timeout_s: float,
        request_timeout_s: float,
    ) -> None:
        """Refuse requests beyond `max_open` open answers, which are divided among tenants by `Shares`.

        `max_open_per_tenant` is None if there is one tenant only.
        """
        self._service = service
        self._loop = asyncio.get_running_loop()
        self.places = Shares(max_open, max_open_per_tenant)
        self._queue_timeout_s = queue_timeout_s
        self._request_timeout_s = request_timeout_s
        self.watchers: list[Callable[[Answer], None]] = []
        self.open: dict[str, Answer] = {}
        self._open_bytes = 0
        self._ended = EndedAnswers(self._loop, ENDED_S)
        self._inbox: list[tuple[Answer, bool]] = []  # a new piece of an answer, or (True) its end
        self._lock = threading.Lock()
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False
        self._given_up = False  # at a shutdown, open answers did not end in time

    def start(self, spec: TurnSpec, *, created: int | None = None, record: Any = None) -> Answer:
        """Have a turn answered. `created`, in seconds since the epoch, is now if it is None.

        Raises:
            Overloaded: as many answers are open as may be.
            Draining: the server is shutting down.
        """
        tenant = tenant_of(spec.namespace)
        self.check_room(tenant)
        if self._open_bytes > MAX_OPEN_BYTES:
            raise Overloaded(
                f"the answers under way take {self._open_bytes >> 20} MB, "
                f"at most {MAX_OPEN_BYTES >> 20} may before another begins: try again later"
            )
        turn = PendingTurn(spec, time.monotonic())
        answer = Answer(turn, Answer.now() if created is None else created, record=record)
        turn.on_piece = lambda piece: self._hand_in(answer, False)
        self.open[answer.id] = answer
        self.places.take(tenant)
        self._idle.clear()
        turn.future.add_done_callback(lambda future: self._hand_in(answer, True))
        self._service.begin(turn)
        timers = [
            self._loop.call_later(self._queue_timeout_s, self._time_out, answer, True),
            self._loop.call_later(self._request_timeout_s, self._time_out, answer, False),
        ]
        turn.future.add_done_callback(lambda future: self._loop.call_soon_threadsafe(_cancel, timers))
        return answer

    def check_room(self, tenant: str) -> None:
        """Check that a tenant may have another turn answered now.

        Raises:
            Overloaded: as many answers are open as may be, or the free places are reserved for tenants that
            have fewer.
            Draining: the server is shutting down.
        """
        if self.draining:
            raise Draining("the server is shutting down: ask again in a moment")
        if self.places.has_room(tenant):
            return
        if len(self.open) >= self.places.total:
            raise Overloaded(
                f"{len(self.open)} requests are running or waiting, at most {self.places.total} may: "
                "try again later"
            )
        held = self.places.held(tenant)
        if held >= self.places.per_tenant:
            raise Overloaded(
                f"{held} requests of your keys are running or waiting, "
                f"at most {self.places.per_tenant} may (--max-open-per-key): try again later"
            )
        raise Overloaded(
            f"{held} requests of your keys are running or waiting, "
            "and the places that are left are for other keys: try again later"
        )

    def find(self, namespace: str, turn_id: str) -> Answer | None:
        """An answer that is open or ended a while ago; None if this namespace has none."""
        answer = self.open.get(turn_id) or self._ended.get(turn_id)
        return answer if answer is not None and answer.namespace == namespace else None

    def forget(self, namespace: str, conversation_id: str) -> None:
        """Forget the ended answers of a conversation that was erased."""
        self._ended.forget(namespace, conversation_id)

    def forget_turn(self, namespace: str, turn_id: str) -> None:
        """Forget an ended answer that was deleted."""
        self._ended.forget_turn(namespace, turn_id)

    def abort(self, answer: Answer) -> None:
        """End an answer early."""
        if not answer.ended:
            self._service.abort(answer.turn)

    async def drain(self, timeout_s: float) -> None:
        """Take no new requests and wait for the open answers; abort those that do not end in time."""
        self.draining = True
        if self._given_up:
            return
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            self._given_up = True
            for answer in list(self.open.values()):
                if not answer.ended:  # an answer that is cut short must not be taken for complete
                    message = (
                        "the server is shutting down, and the answer was not whole in time: "
                        "ask again in a moment"
                    )
                    self._give_up(answer, Draining(message))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), min(timeout_s, DRAIN_ABORT_S))

    # -- inside

    def _hand_in(self, answer: Answer, at_end: bool) -> None:
        """Tell the loop of a new piece, or of the end. Called on the service's thread."""
        with self._lock:
            self._inbox.append((answer, at_end))
            if len(self._inbox) > 1:
                return  # the loop has been woken already
        try:
            self._loop.call_soon_threadsafe(self._take)
        except RuntimeError:  # the loop is closed, and with it all readers
            with self._lock:
                self._inbox.clear()

    def _take(self) -> None:
        with self._lock:
            inbox, self._inbox = self._inbox, []
        for answer, at_end in inbox:
            if at_end:
                self._end(answer)
            elif not answer.ended:
                if answer.first_piece_s is None:
                    answer.first_piece_s = self._loop.time()
                num_bytes = bytes_of_piece(answer.turn.pieces[answer.num_pieces])
                answer.num_pieces += 1
                answer.num_bytes += num_bytes
                self._open_bytes += num_bytes
        if self._open_bytes > 2 * MAX_OPEN_BYTES:
            self._end_heaviest()
        for answer in dict.fromkeys(answer for answer, _ in inbox):
            answer.notify()

    def _end(self, answer: Answer) -> None:
        """The service is done with an answer: it is stored, or it never will be."""
        future = answer.turn.future
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
        """End an answer for its readers now.

        It is stored only if it is complete by now; a retry gets that answer, or a new one.
        """
        answer.given_up = answer.error = error
        self._service.abort(answer.turn, keep=False)
        answer.notify()

    def _end_heaviest(self) -> None:
        heaviest = max(self.open.values(), key=lambda answer: 0 if answer.ended else answer.num_bytes)
        if not heaviest.ended:
            message = (
                f"this answer takes {heaviest.num_bytes >> 20} MB of the {2 * MAX_OPEN_BYTES >> 20} "
                "that all answers under way may: ask for fewer top_logprobs, or for fewer tokens"
            )
            self._give_up(heaviest, AnswerTooLarge(message))
            self._open_bytes -= heaviest.num_bytes
            heaviest.drop_pieces()


def _cancel(timers: list[asyncio.TimerHandle]) -> None:
    for timer in timers:
        timer.cancel()
