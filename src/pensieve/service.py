"""Conversations on top of an engine: messages in, text out, turns made durable. Knows text, store and messages; never tensors or slots.

Everything here happens on one thread of its own, fed by a queue: calls, engine events and the store's acknowledgements take turns, so nothing
needs a lock, and neither detokenising nor the database runs on the engine's step.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pensieve.chat import Message
from pensieve.core.request import FinishReason, SamplingParams
from pensieve.errors import ContextLengthExceeded, ConversationNotFound, EngineClosed, PensieveError, StoreError, error_from
from pensieve.messages import (
    Abort,
    Command,
    Event,
    Failed,
    Finished,
    Forget,
    GetStats,
    Keep,
    KeepAnswer,
    Receipt,
    Stats,
    Stop,
    Submit,
    Token,
)
from pensieve.store.base import ConversationStore, Turn, path_messages, path_tokens
from pensieve.text.chat import ChatText
from pensieve.text.detokenize import Detokenizer
from pensieve.text.overflow import truncate
from pensieve.text.stop import StopStrings, keep_tokens

log = logging.getLogger(__name__)

DEFAULT_NAMESPACE = "default"
# After an overflow the chat is cut to this share of the context, so that the next turns append again instead of cutting (and recomputing) each time.
TRUNCATE_TO = 0.75
ANSWER_SHARE = 0.25  # of the context, at most, that --overflow truncate makes free for the answer
MAX_SHORTENED = 1024  # conversations whose shortened path is remembered; the others' is cut anew at their next turn


@dataclass(frozen=True, slots=True)
class Path:
    """A conversation so far: its messages, and the token log that the model saw of them."""

    messages: tuple[Message, ...] = ()
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TurnDone:
    """An answered turn. When it is handed out, the turn is durable."""

    text: str
    prompt: tuple[int, ...]  # all tokens the model was given
    output: tuple[int, ...]  # the answer's tokens as they stand in the log
    logprobs: tuple[float, ...]  # per sampled token, if asked for
    tops: tuple[tuple[tuple[int, float], ...], ...]
    reason: FinishReason
    receipt: Receipt
    turn_id: str | None  # None: not stored (a replay, or an answer that was aborted before its first token)
    warning: str | None  # what a rewriting template or a dropped turn cost


@dataclass(slots=True, eq=False)
class PendingTurn:
    """A turn on its way: wait on `future`, or abort it."""

    request_id: str
    namespace: str
    conversation_id: str
    new: tuple[Message, ...]
    sampling: SamplingParams
    stop: tuple[str, ...]
    on_text: Callable[[str], None] | None
    forced: Path | None  # go on from here instead of what is stored, and store nothing
    raw: tuple[tuple[int, ...], int] | None  # (tokens, history tokens): the prompt as it is, nothing stored
    submitted_s: float
    future: Future[TurnDone] = field(default_factory=Future)

    tokens: tuple[int, ...] = ()
    parent: str | None = None  # the turn it follows
    history_tokens: int = 0  # of `tokens`, those of earlier turns
    reused_tokens: int = 0  # of the parent's log
    path: Path = field(default_factory=Path)
    truncated_tokens: int = 0
    warning: str | None = None
    detokenizer: Detokenizer | None = None
    stops: StopStrings | None = None
    sampled: list[Token] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    cut: tuple[int, str] | None = None  # at a stop string: whole tokens kept, text to encode anew
    aborted: bool = False


class ConversationService:
    """Turns of many conversations; turns of one conversation queue behind each other."""

    def __init__(
        self,
        text: ChatText | None,
        store: ConversationStore | None,
        *,
        max_context: int,
        overflow: Literal["refuse", "truncate"] = "refuse",
    ) -> None:
        """`text` may be None where only token ids are sent, `store` where nothing is to be kept. Call `connect` before use."""
        self._text = text
        self._store = store
        self._max_context = max_context
        self._overflow = overflow
        self._post: Callable[[Command], None] = _not_connected
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._turns: dict[str, PendingTurn] = {}
        self._lines: dict[tuple[str, str], deque[PendingTurn]] = {}  # conversations with a turn under way, and who waits behind it
        self._shortened: OrderedDict[tuple[str, str], tuple[str, Path]] = (
            OrderedDict()
        )  # after an overflow: leaf turn id, what its log holds
        self._answers: dict[object, Future[object]] = {}  # who waits for Stats and KeepAnswer
        self._closed = False
        self._gate = threading.Lock()  # nothing is queued behind the end mark
        self._thread = threading.Thread(target=self._run, name="pensieve-service", daemon=True)
        self._thread.start()

    def connect(self, post: Callable[[Command], None]) -> None:
        """Say where commands go: an engine's `post`."""
        self._post = post

    # -- from any thread

    def handle(self, events: list[Event]) -> None:
        """Take an engine's events in (this is the engine's `emit`). Returns at once."""
        self._enqueue(lambda: self._take_all(events))

    def send(
        self,
        conversation_id: str,
        messages: Sequence[Message],
        sampling: SamplingParams,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        on_text: Callable[[str], None] | None = None,
        forced: Path | None = None,
        replay: tuple[tuple[int, ...], int] | None = None,
    ) -> PendingTurn:
        """Append messages to a conversation (made if new) and answer them.

        `on_text` gets the answer's text piece by piece, on the service's thread. With `forced` the conversation goes on from that path
        instead; with `replay` the prompt is these tokens, of which so many are history, whatever the messages say. Nothing is stored then.
        The future fails with a `PensieveError`, and nothing is stored.
        """
        assert self._text is not None, "a service without text answers token ids only: complete()"
        if not ignore_eos:
            sampling = replace(sampling, stop_token_ids=sampling.stop_token_ids | self._text.stop_token_ids)
            stop = (*stop, *self._text.stop_strings)
        new, now_s = tuple(messages), time.monotonic()
        return self._accept(
            PendingTurn(_new_id(), namespace, conversation_id, new, sampling, tuple(stop), on_text, forced, replay, submitted_s=now_s)
        )

    def complete(
        self, sequence_id: str, tokens: Sequence[int], history_tokens: int, sampling: SamplingParams, *, namespace: str = DEFAULT_NAMESPACE
    ) -> PendingTurn:
        """Answer a path of token ids, of which `history_tokens` were put before the model by an earlier turn. No text, nothing stored."""
        raw, now_s = (tuple(tokens), history_tokens), time.monotonic()
        return self._accept(PendingTurn(_new_id(), namespace, sequence_id, (), sampling, (), None, None, raw, submitted_s=now_s))

    def abort(self, turn: PendingTurn) -> None:
        """End a turn early; what was said of the answer is kept and stored."""
        self._enqueue(lambda: self._abort(turn))

    def delete(self, conversation_id: str, *, namespace: str = DEFAULT_NAMESPACE) -> Future[None]:
        """Delete a conversation: its turns in the store, and what is cached of it."""
        done: Future[None] = Future()
        if not self._enqueue(lambda: self._delete(namespace, conversation_id, done)):
            done.set_exception(EngineClosed("the service is closed"))
        return done

    def forget(self, sequence_id: str, *, namespace: str = DEFAULT_NAMESPACE) -> None:
        """Free what is cached of a conversation; its turns stay."""
        self._post(Forget(sequence_id, namespace))

    def keep(self, conversation_id: str, keep: bool, *, namespace: str = DEFAULT_NAMESPACE) -> Future[object]:
        """Set or lift a keep on a conversation's cache; a `KeepAnswer` says what came of it."""
        tag = _new_id()
        return self._ask(tag, Keep(conversation_id, namespace, keep, tag))

    def stats(self) -> Future[object]:
        """The engine's `Stats`."""
        tag = _new_id()
        return self._ask(tag, GetStats(tag))

    def close(self) -> None:
        """Stop the thread after what is queued; turns still under way fail with `EngineClosed`. Close the engine first."""
        with self._gate:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join()

    # -- the thread

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:  # one turn's trouble must not end the others'
                log.exception("a job of the conversation service raised")
        error = EngineClosed("the engine was closed before this turn ended")
        for turn in list(self._turns.values()) + [turn for line in self._lines.values() for turn in line]:
            _settle(turn.future, error=error)
        for answer in self._answers.values():
            _settle(answer, error=error)

    def _enqueue(self, job: Callable[[], None]) -> bool:
        """Hand a job to the thread; False if the service is closed."""
        with self._gate:
            if not self._closed:
                self._jobs.put(job)
            return not self._closed

    def _accept(self, turn: PendingTurn) -> PendingTurn:
        if not self._enqueue(lambda: self._line_up(turn)):
            _settle(turn.future, error=EngineClosed("the service is closed"))
        return turn

    def _ask(self, key: object, command: Command) -> Future[object]:
        answer: Future[object] = Future()

        def ask() -> None:
            self._answers[key] = answer
            self._post(command)

        if not self._enqueue(ask):
            _settle(answer, error=EngineClosed("the service is closed"))
        return answer

    def _line_up(self, turn: PendingTurn) -> None:
        key = (turn.namespace, turn.conversation_id)
        if key in self._lines:
            self._lines[key].append(turn)
        else:
            self._lines[key] = deque()
            self._begin(turn)

    def _begin(self, turn: PendingTurn) -> None:
        try:
            if turn.aborted:
                raise EngineClosed("the turn was aborted while it waited for the one before it")
            self._prepare(turn)
        except PensieveError as error:
            self._fail(turn, error)
            return
        except Exception as error:
            log.exception("a turn could not be prepared")
            self._fail(turn, PensieveError(f"the turn could not be prepared: {type(error).__name__}: {error}"))
            return
        self._turns[turn.request_id] = turn
        history = min(turn.history_tokens, len(turn.tokens))
        self._post(Submit(turn.request_id, turn.conversation_id, turn.namespace, turn.tokens, history, turn.sampling, turn.submitted_s))

    def _prepare(self, turn: PendingTurn) -> None:
        """Find the path that the turn goes on from, and make its tokens."""
        if self._text is not None:
            turn.detokenizer = self._text.detokenizer() if turn.new else None
            turn.stops = StopStrings(turn.stop)
        if turn.raw is not None:
            turn.tokens, turn.history_tokens = turn.raw
            return
        assert self._text is not None
        turn.path = turn.forced if turn.forced is not None else self._stored_path(turn)
        history = turn.path.messages
        if history and history[-1].role == "assistant":
            extension = self._text.extend(turn.path.tokens, history, turn.new)
            turn.tokens, turn.reused_tokens, turn.warning = tuple(extension.tokens), extension.reused_tokens, extension.rewritten
            turn.history_tokens = len(turn.path.tokens) if turn.warning is None else self._count_history(history)
        else:
            turn.tokens = tuple(self._text.first([*history, *turn.new]))
        answer = min(turn.sampling.max_new_tokens, int(ANSWER_SHARE * self._max_context))
        if self._overflow == "truncate" and len(turn.tokens) + answer > self._max_context:
            self._truncate(turn, self._max_context - answer)

    def _count_history(self, messages: Sequence[Message]) -> int:
        assert self._text is not None
        return len(self._text.first(messages, add_generation_prompt=False)) if messages else 0

    def _stored_path(self, turn: PendingTurn) -> Path:
        if self._store is None:
            return Path()
        try:
            conversation = self._store.get(turn.namespace, turn.conversation_id)
        except ConversationNotFound:
            conversation = self._store.create(turn.namespace, turn.conversation_id)
        turn.parent = conversation.leaf
        leaf, shortened = self._shortened.get((turn.namespace, turn.conversation_id), (None, Path()))
        if leaf is not None and leaf == conversation.leaf:
            return shortened
        turns = self._store.path(turn.namespace, conversation.leaf)
        return Path(tuple(path_messages(turns)), tuple(path_tokens(turns)))

    def _truncate(self, turn: PendingTurn, room: int) -> None:
        """Leave out the oldest turns; what is left is a new path, computed anew after the system prompt."""
        assert self._text is not None
        messages = [*turn.path.messages, *turn.new]
        try:
            kept = truncate(messages, min(room, int(TRUNCATE_TO * self._max_context)), self._text.count)
        except ContextLengthExceeded:
            kept = truncate(messages, self._max_context - 1, self._text.count)
        if not kept.dropped:
            return
        before = len(turn.tokens)
        turn.tokens, turn.reused_tokens = tuple(self._text.first(kept.messages)), 0
        turn.path = Path(kept.messages[: len(kept.messages) - len(turn.new)], turn.path.tokens)
        turn.history_tokens = self._count_history(turn.path.messages)
        turn.truncated_tokens = before - len(turn.tokens)
        turn.warning = (
            f"the context of {self._max_context} tokens is full: the oldest {kept.dropped} messages ({turn.truncated_tokens} tokens) were left out, "
            "and what follows the system prompt is computed again"
        )

    # -- engine events

    def _take_all(self, events: list[Event]) -> None:
        for event in events:
            try:
                self._take(event)
            except Exception as error:  # one turn's trouble is that turn's
                log.exception("an event could not be handled")
                request_id = getattr(event, "request_id", None)
                if request_id in self._turns:
                    self._post(Abort(request_id))
                    self._fail(self._turns[request_id], PensieveError(f"the answer could not be handled: {type(error).__name__}: {error}"))

    def _take(self, event: Event) -> None:
        match event:
            case Token():
                if (turn := self._turns.get(event.request_id)) is not None:
                    self._take_token(turn, event)
            case Finished():
                if (turn := self._turns.get(event.request_id)) is not None:
                    self._take_end(turn, event)
            case Failed():
                if (turn := self._turns.get(event.request_id)) is not None:
                    self._fail(turn, error_from(event.code, event.message))
            case KeepAnswer():
                self._answer(event.tag, event)
            case Stats():
                self._answer(event.tag, event)

    def _answer(self, key: object, value: object) -> None:
        if (future := self._answers.pop(key, None)) is not None:
            _settle(future, value)

    def _take_token(self, turn: PendingTurn, token: Token) -> None:
        turn.sampled.append(token)
        if turn.detokenizer is not None and turn.cut is None:
            self._show(turn, turn.detokenizer.push((token.token_id,)))
            if turn.cut is not None:
                self._post(Stop(turn.request_id, turn.cut[0]))

    def _show(self, turn: PendingTurn, piece: str) -> None:
        assert turn.stops is not None
        piece, hit = turn.stops.feed(piece)
        self._say(turn, piece)
        if hit is not None:
            assert self._text is not None
            turn.cut = keep_tokens(self._text.detokenizer(), [token.token_id for token in turn.sampled], "".join(turn.shown))

    def _say(self, turn: PendingTurn, piece: str) -> None:
        if piece:
            turn.shown.append(piece)
            if turn.on_text is not None:
                try:
                    turn.on_text(piece)
                except Exception:
                    log.exception("on_text raised; the turn goes on without it")
                    turn.on_text = None

    def _take_end(self, turn: PendingTurn, event: Finished) -> None:
        output, reason = event.output, event.reason
        if turn.detokenizer is not None and turn.cut is None:
            assert turn.stops is not None
            self._show(turn, turn.detokenizer.finish())
            if turn.cut is None:
                self._say(turn, turn.stops.finish())
        if turn.cut is not None:
            assert self._text is not None
            reason = FinishReason.STOP
            output = (*output[: turn.cut[0]], *(self._text.encode_text(turn.cut[1]) if turn.cut[1] else ()))
        done = TurnDone(
            text="".join(turn.shown),
            prompt=turn.tokens,
            output=output,
            logprobs=tuple(token.logprob for token in turn.sampled[: len(output)] if token.logprob is not None),
            tops=tuple(token.top for token in turn.sampled[: len(output)]) if turn.sampling.logprobs else (),
            reason=reason,
            receipt=replace(event.receipt, truncated_tokens=turn.truncated_tokens, output_tokens=len(output)),
            turn_id=None,
            warning=turn.warning,
        )
        if self._store is None or turn.forced is not None or turn.raw is not None or (reason is FinishReason.ABORT and not output):
            self._finish(turn, done)
            return
        messages = (*turn.new, Message("assistant", done.text))
        appended = self._store.append(
            turn.namespace,
            turn.conversation_id,
            turn.parent,
            messages,
            (*turn.tokens[turn.reused_tokens :], *output),
            start=turn.reused_tokens,
            reply_reason=reason.value,
            only_if_leaf=True,
        )
        appended.add_done_callback(lambda future: self._jobs.put(lambda: self._acknowledge(turn, done, future)))

    def _acknowledge(self, turn: PendingTurn, done: TurnDone, appended: Future[Turn]) -> None:
        """The turn is durable, or could not be made so."""
        error = appended.exception()
        if error is not None:
            self._fail(turn, error if isinstance(error, PensieveError) else StoreError(f"the turn was not stored: {error}"))
            return
        turn_id = appended.result().id
        key = (turn.namespace, turn.conversation_id)
        if turn.truncated_tokens or key in self._shortened:
            messages = (*turn.path.messages, *turn.new, Message("assistant", done.text))
            self._shortened[key] = (turn_id, Path(messages, (*turn.tokens, *done.output)))
            self._shortened.move_to_end(key)
            if len(self._shortened) > MAX_SHORTENED:
                self._shortened.popitem(last=False)
        self._finish(turn, replace(done, turn_id=turn_id))

    # -- endings

    def _finish(self, turn: PendingTurn, done: TurnDone) -> None:
        self._leave(turn)
        _settle(turn.future, done)

    def _fail(self, turn: PendingTurn, error: PensieveError) -> None:
        self._leave(turn)
        _settle(turn.future, error=error)

    def _leave(self, turn: PendingTurn) -> None:
        self._turns.pop(turn.request_id, None)
        key = (turn.namespace, turn.conversation_id)
        line = self._lines[key]
        if line:
            following = line.popleft()
            self._jobs.put(lambda: self._begin(following))
        else:
            del self._lines[key]

    def _abort(self, turn: PendingTurn) -> None:
        turn.aborted = True
        if turn.request_id in self._turns:
            self._post(Abort(turn.request_id))

    def _delete(self, namespace: str, conversation_id: str, done: Future[None]) -> None:
        line = self._lines.get((namespace, conversation_id), deque())
        while line:
            _settle(line.popleft().future, error=ConversationNotFound(f"conversation {conversation_id!r} was deleted"))
        try:
            if self._store is not None:
                self._store.delete(namespace, conversation_id)
            self._shortened.pop((namespace, conversation_id), None)
            self._post(Forget(conversation_id, namespace))
        except PensieveError as error:
            _settle(done, error=error)
        else:
            _settle(done, None)


def _settle(future: Future[Any], value: object = None, *, error: PensieveError | None = None) -> None:
    """Resolve a future that its owner may have cancelled meanwhile."""
    if future.done() or not future.set_running_or_notify_cancel():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)


def _new_id() -> str:
    return uuid.uuid4().hex


def _not_connected(command: Command) -> None:
    raise EngineClosed(f"no engine is connected to answer {type(command).__name__}")
