"""The closed loop: users who think, ask and wait. Knows turns and due times; nothing of tokens, models or tables.

One thread holds a heap of due times and a queue of answers; there is no thread per user. A user's next turn is due its
think time after the previous answer. For two systems to be compared token by token the second run *replays* the first:
each turn is asked after exactly the history that the first run had there. Otherwise one near tie would give the two
conversations different histories, and nothing that follows could be compared.
"""

from __future__ import annotations

import heapq
import queue
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

from pensieve.bench.equality import Equality, Tolerance, compare_outputs, default_tolerance
from pensieve.bench.runs import EarlyEnd, Run, RunSettings, TurnRecord
from pensieve.bench.systems import ChatSystem, TurnRequest, TurnResult, failed_turn
from pensieve.errors import ConfigError, PensieveError
from pensieve.workloads.arrivals import ThinkTimes, think_class
from pensieve.workloads.conversations import Conversation, random_tokens, text_length_tokens

__all__ = ["Equality", "RunListener", "Tolerance", "compare_outputs", "default_tolerance", "run_users"]

TIMEOUT = "timeout"


class RunListener(Protocol):
    """Is told how a run goes, from the driver's thread."""

    def begin(self, system: str, num_turns: int) -> None:
        """A run starts that has at most `num_turns` turns."""
        ...

    def sent(self, in_flight: int) -> None:
        """A turn was sent; `in_flight` are unanswered now."""
        ...

    def answered(self, record: TurnRecord, in_flight: int) -> None:
        """A turn has its result."""
        ...

    def ended_early(self, end: EarlyEnd) -> None:
        """A conversation will not get its remaining turns."""
        ...

    def end(self) -> None:
        """The run is over, in whatever way."""
        ...


class _Silent:
    """Hears and says nothing."""

    def begin(self, system: str, num_turns: int) -> None:
        """Nothing."""

    def sent(self, in_flight: int) -> None:
        """Nothing."""

    def answered(self, record: TurnRecord, in_flight: int) -> None:
        """Nothing."""

    def ended_early(self, end: EarlyEnd) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


def run_users(
    system: ChatSystem,
    conversations: Sequence[Conversation],
    settings: RunSettings,
    progress: RunListener | None = None,
    replay: Run | None = None,
) -> Run:
    """Let users talk to a system until every conversation is over.

    User u of U takes conversations u, u + U, u + 2U, ... one after the other; users begin spread evenly over one
    request interval. A turn that fails ends its conversation and is recorded; the others go on. All conversations are
    ended at the system when the run is over and not before: a real user leaves without saying so.

    Args:
        system: what answers. It is not closed.
        conversations: what is said; ids must differ.
        settings: how users behave.
        progress: is told how it goes.
        replay: an earlier run of the same conversations. Turns that it never sent are not sent, and every turn comes
            with that run's tokens as its history, where the run knows them.

    Raises:
        ConfigError: there is no conversation, an id comes twice, or `replay` is of other conversations.
    """
    if not conversations:
        raise ConfigError("a run needs at least 1 conversation, got none")
    if len({c.id for c in conversations}) < len(conversations):
        raise ConfigError("two conversations of a run have the same id; give each its own")
    driver = _Driver(system, conversations, settings, progress or _Silent(), replay)
    return driver.run()


@dataclass(order=True, slots=True)
class _Due:
    """A turn somebody wants to send."""

    due_s: float
    order: int  # ties go in the order they were wanted
    user: int = field(compare=False)
    conversation: Conversation = field(compare=False)
    turn: int = field(compare=False)


@dataclass(slots=True, eq=False)
class _Flight:
    """A turn that was sent and is not answered."""

    due: _Due
    request: TurnRequest
    sent_s: float


class _Driver:
    """One run. Sole writer of the heap of due turns and of the records."""

    def __init__(
        self,
        system: ChatSystem,
        conversations: Sequence[Conversation],
        settings: RunSettings,
        progress: RunListener,
        replay: Run | None,
    ) -> None:
        self._system = system
        self._settings = settings
        self._progress = progress
        self._replayed = replay.by_key() if replay else None
        self._num_turns = {c.id: self._turns_to_send(c) for c in conversations}
        self._think = ThinkTimes(settings.request_interval_s, settings.jitter, settings.seed)
        num_users = min(settings.num_users or len(conversations), len(conversations))
        self._waiting = [
            [c for c in conversations[user::num_users] if self._num_turns[c.id]] for user in range(num_users)
        ]
        for mine in self._waiting:
            mine.reverse()  # the next one is popped off the end
        self._order = {c.id: index for index, c in enumerate(conversations)}
        self._due: list[_Due] = []
        self._flights: list[
            _Flight
        ] = []  # in the order they were sent, so the first is the first to time out
        self._answers: queue.SimpleQueue[tuple[_Flight, Future[TurnResult]]] = queue.SimpleQueue()
        self._records: list[TurnRecord] = []
        self._ends: list[EarlyEnd] = []
        self._wanted = 0
        self._start_s = time.monotonic()

    def run(self) -> Run:
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        if not any(self._waiting):
            raise ConfigError(
                "the run to be replayed holds no turn of these conversations; replay a run of the same ones"
            )
        self._progress.begin(self._system.name, sum(self._num_turns.values()))
        try:
            self._start_s = time.monotonic()
            for user in range(len(self._waiting)):
                self._take_next(user, user / len(self._waiting) * self._settings.request_interval_s)
            while self._due or self._flights:
                self._send_due()
                self._receive()
            for conversation_id in self._num_turns:
                self._system.end_conversation(conversation_id)
        finally:
            self._progress.end()
        records = tuple(sorted(self._records, key=lambda r: (self._order[r.key[0]], r.key[1])))
        duration_s = max(r.done_s for r in records) - min(r.sent_s for r in records)
        return Run(self._system.name, self._settings, records, tuple(self._ends), duration_s, started_at)

    def _now_s(self) -> float:
        return time.monotonic() - self._start_s

    def _turns_to_send(self, conversation: Conversation) -> int:
        if self._replayed is None:
            return len(conversation.turns)
        return sum((conversation.id, turn) in self._replayed for turn in range(len(conversation.turns)))

    def _take_next(self, user: int, due_s: float) -> None:
        """Let a user who is free begin its next conversation, if it has one."""
        if self._waiting[user]:
            self._want(user, self._waiting[user].pop(), 0, due_s)

    def _want(self, user: int, conversation: Conversation, turn: int, due_s: float) -> None:
        heapq.heappush(self._due, _Due(due_s, self._wanted, user, conversation, turn))
        self._wanted += 1

    def _send_due(self) -> None:
        """Send everything that is due."""
        while self._due and self._due[0].due_s <= self._now_s():
            due = heapq.heappop(self._due)
            flight = _Flight(due, self._request(due), self._now_s())
            self._flights.append(flight)
            try:
                future = self._system.start_turn(flight.request)
            except Exception as error:  # a system that breaks its promise fails this turn, not the run
                future = Future()
                future.set_exception(error)
            future.add_done_callback(lambda done, flight=flight: self._answers.put((flight, done)))  # type: ignore[misc]
            self._progress.sent(len(self._flights))

    def _receive(self) -> None:
        """Wait until an answer comes, a turn is due or one has timed out, and take what is there."""
        until_s = self._due[0].due_s if self._due else float("inf")
        if self._flights:
            until_s = min(until_s, self._flights[0].sent_s + self._settings.turn_timeout_s)
        try:
            flight, future = self._answers.get(timeout=max(0.0, until_s - self._now_s()))
            while True:
                if flight in self._flights:  # else it had timed out
                    self._settle(flight, _result_of(future, self._now_s() - flight.sent_s))
                flight, future = self._answers.get_nowait()
        except queue.Empty:
            pass
        while self._flights and self._now_s() - self._flights[0].sent_s >= self._settings.turn_timeout_s:
            late = self._flights[0]
            limit_s = self._settings.turn_timeout_s
            self._settle(
                late,
                failed_turn(
                    TIMEOUT,
                    f"no answer within {limit_s:g} s (turn_timeout_s)",
                    submitted_s=0.0,
                    total_s=limit_s,
                ),
            )

    def _settle(self, flight: _Flight, result: TurnResult) -> None:
        """Record a turn and decide what its user does next."""
        self._flights.remove(flight)
        due, now_s = flight.due, self._now_s()
        record = TurnRecord(
            due.user, think_class(due.user), flight.request, result, due.due_s, flight.sent_s, now_s
        )
        self._records.append(record)
        self._progress.answered(record, len(self._flights))
        next_turn = due.turn + 1
        left = self._num_turns[due.conversation.id] - next_turn
        if not result.ok:
            end = EarlyEnd(due.conversation.id, due.turn, left, result.error_code or "", result.error or "")
            self._ends.append(end)
            self._progress.ended_early(end)
        if result.ok and left:
            self._want(
                due.user, due.conversation, next_turn, now_s + self._think.think_s(due.user, next_turn)
            )
        else:
            self._take_next(due.user, now_s + self._think.think_s(due.user, next_turn))

    def _request(self, due: _Due) -> TurnRequest:
        conversation, turn, settings = due.conversation, due.turn, self._settings
        user_text, system_text, tokens = (
            conversation.turns[turn],
            conversation.system if turn == 0 else None,
            None,
        )
        if settings.vocab_size is not None:
            tokens = tuple(
                token
                for text in (system_text, user_text)
                if text
                for token in self._draw(text, settings.vocab_size)
            )
        before = self._before(conversation.id, turn)
        return TurnRequest(
            conversation.id,
            turn,
            user_text if tokens is None else None,
            tokens,
            forced_history=None if before is None else (*before.prompt_path, *before.output),
            max_new_tokens=settings.max_new_tokens,
            fixed_length=settings.fixed_length,
            system_text=system_text if tokens is None else None,
            forced_answer=before.text if before is not None and turn and tokens is None else None,
            forced_prompt=self._replayed[conversation.id, turn].result.prompt_path or None
            if self._replayed is not None
            else None,
        )

    def _draw(self, text: str, vocab_size: int) -> tuple[int, ...]:
        """Equal texts give equal tokens, so that a shared system prompt is shared here too."""
        return random_tokens(text_length_tokens(text), vocab_size, f"{self._settings.seed}/{text}")

    def _before(self, conversation_id: str, turn: int) -> TurnResult | None:
        """In a replay, what the first run had before this turn; None where there is nothing to force."""
        if self._replayed is None:
            return None
        if turn == 0:
            return _NOTHING
        before = self._replayed[conversation_id, turn - 1].result
        if not before.prompt_path and not before.text:
            return None  # a system that tells neither tokens nor text cannot be replayed
        return before


_NOTHING = failed_turn("", "", submitted_s=0.0, total_s=0.0)


def _result_of(future: Future[TurnResult], total_s: float) -> TurnResult:
    try:
        return future.result()
    except CancelledError:
        return failed_turn(
            "cancelled", "the system was closed before it answered", submitted_s=0.0, total_s=total_s
        )
    except PensieveError as error:
        return failed_turn(error.code, error.message, submitted_s=0.0, total_s=total_s)
    except Exception as error:
        return failed_turn(
            "internal_error", f"{type(error).__name__}: {error}", submitted_s=0.0, total_s=total_s
        )
