"""Runs conversations on one system, in a closed loop of users who think, ask and wait.

Knows turns and think times; never models or tables.

To compare two systems token by token, the second run *replays* the first: each turn is sent after exactly the
history that the first run had there. Otherwise a single near tie would give a conversation two different
histories, and none of its later turns could be compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pensieve.bench.driver import Driver, PlayedUser, RunListener, TurnEnd
from pensieve.bench.runs import EarlyEnd, Run, RunSettings, TurnRecord, short_name
from pensieve.bench.systems import ChatSystem, TurnRequest, TurnResult, failed_turn
from pensieve.errors import ConfigError, PensieveError
from pensieve.workloads.arrivals import ThinkTimes, think_class
from pensieve.workloads.conversations import Conversation, random_tokens, text_length_tokens

TIMEOUT = "timeout"


def run_users(
    system: ChatSystem,
    conversations: Sequence[Conversation],
    settings: RunSettings,
    listener: RunListener | None = None,
    replay: Run | None = None,
) -> Run:
    """Let users talk to a system until every conversation is over.

    User u of U takes conversations u, u + U, u + 2U, ... one after the other; users start spread evenly over
    one request interval. A failed turn ends its conversation and is recorded; the others continue. The system
    is told of the end of conversations only when the run is over: a real user leaves without notice.

    Args:
        system: what answers. It is not closed.
        conversations: what is said; ids must differ.
        settings: how users behave.
        listener: is told how the run goes.
        replay: an earlier run of the same conversations. Turns that it did not send are not sent, and every
            turn has that run's tokens as its history, where the run knows them.

    Raises:
        ConfigError: there is no conversation, an id comes twice, or `replay` is of other conversations.
    """
    if not conversations:
        raise ConfigError("a run needs at least 1 conversation, got none")
    if len({c.id for c in conversations}) < len(conversations):
        raise ConfigError("two conversations of a run have the same id; give each its own")
    requests = _Requests(settings, replay)
    num_turns = {c.id: requests.num_turns(c) for c in conversations}
    if not any(num_turns.values()):
        raise ConfigError(
            "the run to be replayed holds no turn of these conversations; replay a run of the same ones"
        )
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    driver = Driver(short_name(system.name), sum(num_turns.values()), listener)
    stage = _Stage(
        system,
        settings,
        driver,
        requests,
        ThinkTimes(settings.request_interval_s, settings.jitter, settings.seed),
    )
    num_users = min(settings.num_users or len(conversations), len(conversations))
    users = []
    for user in range(num_users):
        mine = [c for c in conversations[user::num_users] if num_turns[c.id]]
        start_s = user / num_users * settings.request_interval_s
        memory = _User(user)
        users.append(PlayedUser(start_s, [_Talk(stage, memory, c, num_turns[c.id]) for c in mine]))
    asyncio.run(driver.play(users))
    for conversation_id in num_turns:
        system.end_conversation(conversation_id)
    order = {c.id: index for index, c in enumerate(conversations)}
    records = tuple(sorted(stage.records, key=lambda r: (order[r.key[0]], r.key[1])))
    duration_s = max(r.done_s for r in records) - min(r.sent_s for r in records)
    return Run(system.name, settings, records, tuple(stage.early_ends), duration_s, started_at)


@dataclass(slots=True)
class _Stage:
    """What all conversations of a run share, and what they leave."""

    system: ChatSystem
    settings: RunSettings
    driver: Driver
    requests: _Requests
    think: ThinkTimes
    records: list[TurnRecord] = field(default_factory=list)
    early_ends: list[EarlyEnd] = field(default_factory=list)


@dataclass(slots=True)
class _User:
    number: int
    turns_taken: int = 0  # of its latest conversation; the user thinks after each


@dataclass(slots=True)
class _Talk:
    """A `PlayedConversation`."""

    stage: _Stage
    user: _User
    conversation: Conversation
    num_turns: int

    def due_s(self, turn: int, free_s: float) -> float:
        # the user also thinks between two conversations, but not before its first
        taken, user = self.user.turns_taken, self.user.number
        return free_s + self.stage.think.think_s(user, taken) if taken else free_s

    async def take_turn(self, turn: int, due_s: float) -> TurnEnd:
        stage, user = self.stage, self.user.number
        request = stage.requests.make(self.conversation, turn)
        sent_s = stage.driver.now_s()
        result = await _ask(stage.system, request, stage.settings.turn_timeout_s)
        now_s = stage.driver.now_s()
        stage.records.append(TurnRecord(user, think_class(user), request, result, due_s, sent_s, now_s))
        self.user.turns_taken = turn + 1
        if result.ok:
            return TurnEnd(now_s, result.num_output, goes_on=True)
        left = self.num_turns - turn - 1
        end = EarlyEnd(self.conversation.id, turn, left, result.error_code or "", result.error or "")
        stage.early_ends.append(end)
        return TurnEnd(now_s, 0, goes_on=False, failed=not end.context_full, words=str(end))


async def _ask(system: ChatSystem, request: TurnRequest, timeout_s: float) -> TurnResult:
    """The result of a turn. An answer that comes after the timeout is ignored."""
    begun_s = asyncio.get_running_loop().time()
    try:
        future = system.start_turn(request)
    except Exception as error:  # a system that breaks its contract fails this turn, not the run
        future = Future()
        future.set_exception(error)
    if not await _is_done(future, timeout_s):
        message = f"no answer within {timeout_s:g} s (turn_timeout_s)"
        return failed_turn(TIMEOUT, message, submitted_s=0.0, total_s=timeout_s)
    return _result_of(future, asyncio.get_running_loop().time() - begun_s)


async def _is_done(future: Future[TurnResult], timeout_s: float) -> bool:
    """Wait for a future without cancelling it at the timeout: its system may still set its result."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def wake(_: Future[TurnResult]) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(done.set)

    future.add_done_callback(wake)
    try:
        async with asyncio.timeout(timeout_s):
            await done.wait()
    except TimeoutError:
        return False
    return True


class _Requests:
    """Makes the requests of a run: from its conversations, or as an earlier run sent them."""

    def __init__(self, settings: RunSettings, replay: Run | None) -> None:
        self._settings = settings
        self._replayed = replay.by_key() if replay else None

    def num_turns(self, conversation: Conversation) -> int:
        """Turns of a conversation that are sent."""
        if self._replayed is None:
            return len(conversation.turns)
        return sum((conversation.id, turn) in self._replayed for turn in range(len(conversation.turns)))

    def make(self, conversation: Conversation, turn: int) -> TurnRequest:
        settings = self._settings
        user_text, system_text = conversation.turns[turn], conversation.system if turn == 0 else None
        tokens = None
        if settings.vocab_size is not None:
            texts = [text for text in (system_text, user_text) if text]
            tokens = tuple(token for text in texts for token in self._draw(text, settings.vocab_size))
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
        """Equal texts give equal tokens, so a shared system prompt is shared as tokens too."""
        return random_tokens(text_length_tokens(text), vocab_size, f"{self._settings.seed}/{text}")

    def _before(self, conversation_id: str, turn: int) -> TurnResult | None:
        """In a replay, the first run's result before this turn. None if there is none to force."""
        if self._replayed is None:
            return None
        if turn == 0:
            return _NOTHING
        before = self._replayed[conversation_id, turn - 1].result
        if not before.prompt_path and not before.text:
            return None  # a system that reports neither tokens nor text cannot be replayed
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
