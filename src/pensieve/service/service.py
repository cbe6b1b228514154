"""Turns of many conversations over one engine: queued, answered, streamed, made durable, acknowledged. Knows no tensors, slots or HTTP.

Everything here happens on one thread of its own, fed by a queue: calls, engine events and the store's acknowledgements take turns, so nothing
needs a lock, and neither detokenising nor the database runs on the engine's step. What takes time, rendering and tokenizing, is a job for a
`TextRunner`: a turn whose prompt is being made holds its conversation's line, and nothing else.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, cast

from pensieve.config import ContextLimit
from pensieve.core.request import FinishReason, SamplingParams
from pensieve.engine.messages import (
    Abort,
    CacheMap,
    Check,
    Command,
    Event,
    Failed,
    Finished,
    Forget,
    Forgotten,
    GetMap,
    GetRows,
    GetStats,
    Idle,
    Keep,
    Stop,
    Submit,
    Token,
    Warm,
    tenant_of,
)
from pensieve.errors import (
    ConversationNotFound,
    EngineClosed,
    EngineSilent,
    InvalidRequest,
    PensieveError,
    StoreError,
    error_from,
)
from pensieve.message import Message, chars_of
from pensieve.service.answer import AnswerText
from pensieve.service.prompt import CHARS, INSTRUCTIONS, LEFT_OUT, TOOLS, Prompts
from pensieve.service.questions import Questions
from pensieve.service.turn import (
    LEAF,
    Composed,
    Path,
    PendingTurn,
    Piece,
    Place,
    Prompt,
    TurnDone,
    TurnSpec,
    settle,
)
from pensieve.store import Conversation, ConversationStore, Erased, Turn
from pensieve.text import ChatText, EncodeRest, InlineRunner, TextJob, TextRunner, WrittenChat

log = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_NAMESPACE = "default"
EPHEMERAL = "temp_"  # what the ids of conversations begin with that are kept in memory only
EPHEMERAL_S = 3600.0  # how long they are kept after their last turn
TITLE_CHARS = 60
DRAFT_TOKENS = 32  # an answer under way is in the store up to its last so many tokens


@dataclass(frozen=True, slots=True)
class Erasure:
    """What deleting a conversation erased."""

    turns: int
    store_bytes: int
    kv_slots: int
    kv_bytes: int
    # False: the rows are gone, but the write-ahead log could not be truncated yet (something reads it), or the engine has not said yet that
    # it forgot the KV, which it does before anything else once it is back.
    complete: bool


class ConversationService:
    """Turns of many conversations; turns of one conversation queue behind each other."""

    def __init__(
        self,
        text: ChatText | None,
        store: ConversationStore | None,
        *,
        max_context: int,
        overflow: Literal["refuse", "truncate"] = "refuse",
        ephemeral: ConversationStore | None = None,
        drafts: str | None = None,
        limit: ContextLimit | None = None,
        runner: TextRunner | None = None,
    ) -> None:
        """Call `connect` before use.

        Args:
            text: None where only token ids are sent.
            store: None where nothing is to be kept.
            max_context: tokens of prompt and answer.
            overflow: what becomes of a prompt past it.
            ephemeral: where turns go that are not to be durable; None: nowhere.
            drafts: this process's name in the store, under which answers are kept while they are made; None: only whole answers are kept.
            limit: what would allow a longer context, for the errors of those who ask for it.
            runner: who renders and tokenizes; None: this service's thread itself.
        """
        self._text = text
        self._runner = InlineRunner(text) if runner is None and text is not None else runner
        self._durable = store
        self._ephemeral = ephemeral
        self._drafts = drafts
        self._prompts = Prompts(text, self._store_of, max_context, overflow, limit)
        self._post: Callable[[Command], None] = _not_connected
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._turns: dict[str, PendingTurn] = {}  # given to the engine
        self._writing: dict[str, PendingTurn] = {}  # whose prompts are being made
        self._lines: dict[
            tuple[str, str], deque[PendingTurn]
        ] = {}  # conversations with a turn under way, and who waits behind it
        self._going: Counter[tuple[str, str]] = (
            Counter()
        )  # conversations that are being erased: nothing begins there any more
        self._answers = AnswerText(text)
        self._questions = Questions()
        self._closed = False
        self._gate = threading.Lock()  # nothing is queued behind the end mark
        self._thread = threading.Thread(target=self._run, name="pensieve-service", daemon=True)
        self._thread.start()

    def connect(self, post: Callable[[Command], None]) -> None:
        """Say where commands go: an engine's `post`."""
        self._post = post

    @property
    def owner(self) -> str:
        """This process's name in the store, under which it answers; "" if it has none."""
        return self._drafts or ""

    @property
    def text(self) -> ChatText | None:
        """The model's tokenizer and template."""
        return self._text

    # -- turns, from any thread

    def handle(self, events: list[Event]) -> None:
        """Take an engine's events in (this is the engine's `emit`). Returns at once."""
        self._enqueue(lambda: self._take_all(events))

    def start(self, spec: TurnSpec, on_piece: Callable[[Piece], None] | None = None) -> PendingTurn:
        """Answer a turn. `on_piece` gets the answer piece by piece, on the service's thread.

        The future fails with a `PensieveError`, and nothing is stored then.
        """
        turn = PendingTurn(spec, time.monotonic(), on_piece)
        self.begin(turn)
        return turn

    def begin(self, turn: PendingTurn) -> None:
        """Answer a turn that its caller has made, see `start`."""
        if not self._enqueue(lambda: self._line_up(turn)):
            settle(turn.future, error=EngineClosed("the service is closed"))

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
        """Append messages to a conversation (made if new) and answer them; `on_text` gets the answer's text piece by piece.

        With `forced` the conversation goes on from that path instead; with `replay` the prompt is these tokens, of which so many are history,
        whatever the messages say. Nothing is stored then.
        """
        spec = TurnSpec(
            namespace,
            conversation_id,
            tuple(messages),
            sampling,
            tuple(stop),
            ignore_eos,
            forced=forced,
            raw=replay,
            raw_text=True,
        )
        return self.start(
            spec, None if on_text is None else lambda piece: on_text(piece.text) if piece.text else None
        )

    def complete(
        self,
        sequence_id: str,
        tokens: Sequence[int],
        history_tokens: int,
        sampling: SamplingParams,
        *,
        namespace: str = DEFAULT_NAMESPACE,
    ) -> PendingTurn:
        """Answer a path of token ids, of which `history_tokens` were put before the model by an earlier turn. No text, nothing stored."""
        return self.start(
            TurnSpec(
                namespace, sequence_id, (), sampling, ignore_eos=True, raw=(tuple(tokens), history_tokens)
            )
        )

    def abort(self, turn: PendingTurn, *, keep: bool = True) -> None:
        """End a turn early; what was said of the answer is stored, or without `keep` nothing is unless the answer is whole by then."""
        self._enqueue(lambda: self._abort(turn, keep))

    # -- conversations, from any thread

    def delete(self, conversation_id: str, *, namespace: str = DEFAULT_NAMESPACE) -> Future[None]:
        """Delete a conversation: its turns in the store, and what is cached of it."""
        done: Future[None] = Future()
        self._ask_thread(done, lambda: self._delete(namespace, conversation_id, done))
        return done

    def erase(
        self,
        conversation_id: str,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        overwrite: bool = True,
        within_s: float | None = None,
    ) -> Future[Erasure]:
        """Delete a conversation and overwrite what it left: its rows, and its KV in every tier (shared KV with its last reference).

        Without `overwrite` the rows are only deleted, and the store remembers that they are to be overwritten: once for many conversations. The
        engine gets `within_s` seconds (default: `ERASE_WAIT_S`) to end what it has under way and to forget; the rows go in any case, and the KV
        when the engine is back.
        """
        done: Future[Erasure] = Future()
        self._ask_thread(
            done,
            lambda: self._erase(
                namespace, conversation_id, overwrite, ERASE_WAIT_S if within_s is None else within_s, done
            ),
        )
        return done

    def expired(self, now_s: float, limit: int) -> list[Conversation]:
        """Conversations of all namespaces whose time has come (seconds since the epoch), at most so many a store. Waits for the stores.

        One that has a turn waiting or under way is in use.
        """
        stores = [store for store in (self._ephemeral, self._durable) if store is not None]
        found = [conversation for store in stores for conversation in store.expired(now_s, limit)]
        return [
            conversation
            for conversation in found
            if (conversation.namespace, conversation.id) not in self._lines
        ]

    def stored_turn(self, namespace: str, turn_id: str) -> Turn | None:
        """A turn of either store; None if it is in none. Waits for the stores."""
        for store in (self._ephemeral, self._durable):
            with suppress(ConversationNotFound):
                if store is not None:
                    return store.turn(namespace, turn_id)
        return None

    def home(self, namespace: str, turn_id: str) -> str | None:
        """The conversation that a turn of either store is in; None if it is in none. Waits for the stores."""
        stores = (store for store in (self._ephemeral, self._durable) if store is not None)
        return next((home for store in stores if (home := store.home(namespace, turn_id)) is not None), None)

    def forget(self, sequence_id: str, *, namespace: str = DEFAULT_NAMESPACE) -> None:
        """Free what is cached of a conversation; its turns stay."""
        self._post(Forget(sequence_id, namespace))

    def keep(self, conversation_id: str, keep: bool, *, namespace: str = DEFAULT_NAMESPACE) -> Future[object]:
        """Set or lift a keep on a conversation's cache; a `KeepAnswer` says what came of it."""
        return self._ask(lambda tag: Keep(conversation_id, namespace, keep, tag))

    def delete_turn(self, turn_id: str, *, namespace: str = DEFAULT_NAMESPACE) -> None:
        """Delete a turn that nothing stands on; one that something does stays, marked. Waits for the store.

        Raises:
            ConversationNotFound: there is no such turn in this namespace.
        """
        assert self._durable is not None
        self._durable.delete_turn(namespace, turn_id)
        self._enqueue(lambda: self._prompts.forget(namespace))

    def warm(self, conversation_id: str, *, namespace: str = DEFAULT_NAMESPACE) -> Future[object]:
        """Its user is typing: swap in what lies below. A `HintAnswer` says what came of it."""
        return self._ask(lambda tag: Warm(conversation_id, namespace, tag))

    def idle(self, conversation_id: str, *, namespace: str = DEFAULT_NAMESPACE) -> Future[object]:
        """Its user is done for now: its cache may go first. A `HintAnswer` says what came of it."""
        return self._ask(lambda tag: Idle(conversation_id, namespace, tag))

    # -- the engine, from any thread

    def stats(self) -> Future[object]:
        """The engine's `Stats`."""
        return self._ask(GetStats)

    def map(
        self, offset: int, limit: int, *, namespaces: tuple[str, ...] | None = None, tenant: str | None = None
    ) -> Future[object]:
        """Where chunks lie, a row a conversation, the latest active first: a `CacheMap`."""
        return self._ask(lambda tag: GetMap(tag, offset, limit, namespaces, tenant))

    def rows(self, keys: Sequence[tuple[str, str]]) -> Future[object]:
        """The rows of some conversations, by namespace and id: a `CacheMap`."""
        return self._ask(lambda tag: GetRows(tag, tuple(keys)))

    def check(self) -> Future[object]:
        """Verify every invariant of the cache: a `Checked`."""
        return self._ask(Check)

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
        for turn in [*self._turns.values(), *self._writing.values()] + [
            turn for line in self._lines.values() for turn in line
        ]:
            settle(turn.future, error=error)
        self._questions.give_up(error)

    def _enqueue(self, job: Callable[[], None]) -> bool:
        """Hand a job to the thread; False if the service is closed."""
        with self._gate:
            if not self._closed:
                self._jobs.put(job)
            return not self._closed

    def _ask_thread(
        self, done: Future[object] | Future[None] | Future[Erasure], job: Callable[[], None]
    ) -> None:
        if not self._enqueue(job):
            settle(done, error=EngineClosed("the service is closed"))

    def _ask(self, command: Callable[[str], Command]) -> Future[object]:
        answer: Future[object] = Future()
        self._ask_thread(answer, lambda: self._questions.ask(answer, command, self._post))
        return answer

    def _store_of(self, conversation_id: str) -> ConversationStore | None:
        return (
            self._ephemeral
            if self._ephemeral is not None and conversation_id.startswith(EPHEMERAL)
            else self._durable
        )

    # -- turns begin

    def _line_up(self, turn: PendingTurn) -> None:
        """Find the turn's conversation, and its place behind a turn of it that is under way."""
        spec = turn.spec
        try:
            if spec.conversation_id is not None:
                turn.conversation_id = spec.conversation_id
                place = None
            else:
                place = self._recognise(spec)
                turn.conversation_id = place.conversation_id
        except Exception as error:
            settle(turn.future, error=_as_ours("the turn's history could not be looked up", error))
            return
        if turn.key in self._going:
            settle(
                turn.future,
                error=ConversationNotFound(f"conversation {turn.conversation_id!r} is being deleted"),
            )
        elif turn.key in self._lines:
            self._lines[turn.key].append(turn)
        else:
            self._lines[turn.key] = deque()
            self._begin(turn, place)

    def _recognise(self, spec: TurnSpec) -> Place:
        new_id = ("chat_" if spec.durable or self._ephemeral is None else EPHEMERAL) + uuid.uuid4().hex
        store = self._store_of(new_id)
        if store is None:
            return Place(new_id, None, spec.messages)

        def busy(conversation_id: str) -> bool:
            key = (spec.namespace, conversation_id)
            return key in self._lines or key in self._going

        return self._prompts.recognise(spec, store, busy, new_id)

    def _begin(self, turn: PendingTurn, place: Place | None = None) -> None:
        try:
            if turn.aborted:
                raise EngineClosed("the turn was aborted while it waited for the one before it")
            self._prepare(turn, place)
        except Exception as error:
            self._fail(turn, _as_ours("the turn could not be prepared", error))

    def _touch(self, turn: PendingTurn) -> None:
        """A turn that begins is a use of its conversation."""
        store, conversation = (
            self._store_of(turn.conversation_id),
            None if turn.place is None else turn.place.conversation,
        )
        if store is not None and conversation is not None and conversation.ttl_s is not None:
            store.touch(turn.namespace, turn.conversation_id)

    def _prepare(self, turn: PendingTurn, place: Place | None) -> None:
        """Find the turn's place and have its prompt made."""
        spec = turn.spec
        self._answers.begin(turn)
        if spec.raw is not None:
            tokens, history_tokens = spec.raw
            turn.prompt = Prompt(tokens, min(history_tokens, len(tokens)))
            self._submit(turn)
            return
        if self._text is None or self._runner is None:
            raise InvalidRequest("this model has no tokenizer here: send token ids")
        turn.place = place if place is not None else self._prompts.locate(spec, turn.conversation_id)
        path, job = self._prompts.job(spec, turn.place)
        self._writing[turn.request_id] = turn
        self._have_written(turn, job, lambda written: self._written(turn, path, written))

    def _have_written(self, turn: PendingTurn, job: TextJob[T], take: Callable[[T], None]) -> None:
        """Have the text room do a turn's job, and go on with its answer, here; a turn that ended meanwhile does not."""
        assert self._runner is not None
        future = self._runner.submit(job, tenant_of(turn.namespace))
        turn.writing = future

        def go_on(
            done: Future[T],
        ) -> None:  # (it does not name `future`, which keeps its callbacks and would keep the turn)
            if turn.writing is not done:
                return
            turn.writing = None
            try:
                take(done.result())
            except Exception as error:
                self._fail(turn, _as_ours("the turn's text could not be handled", error))

        future.add_done_callback(lambda done: self._enqueue(lambda: go_on(done)))

    def _written(self, turn: PendingTurn, path: Path, written: WrittenChat) -> None:
        assert turn.place is not None
        del self._writing[turn.request_id]
        turn.prompt = self._prompts.take(turn.spec, turn.place, path, written)
        self._submit(turn)

    def _submit(self, turn: PendingTurn) -> None:
        """Give a turn to the engine."""
        sampling, prompt = turn.spec.sampling, turn.prompt
        if turn.detokenizer is not None and not turn.spec.ignore_eos:
            assert self._text is not None
            sampling = replace(sampling, stop_token_ids=sampling.stop_token_ids | self._text.stop_token_ids)
        self._turns[turn.request_id] = turn
        self._touch(turn)
        self._post(
            Submit(
                turn.request_id,
                turn.conversation_id,
                turn.namespace,
                prompt.tokens,
                prompt.history_tokens,
                sampling,
                turn.submitted_s,
            )
        )

    def _open(self, turn: PendingTurn) -> None:
        """Tell the store of a turn that has its first token: nothing of that holds the first token up, and nothing is there before it."""
        turn.opened = True
        store, place = self._store_of(turn.conversation_id), turn.place
        if not turn.stored or store is None or place is None:
            return
        title = _title(turn.spec.messages)
        if place.conversation is None:
            made = store.create_soon(turn.namespace, turn.conversation_id, title=title)
            made.add_done_callback(lambda future: self._jobs.put(lambda: self._opened(turn, future)))
            turn.created = True
        elif place.conversation.title is None and place.conversation.leaf is None:
            store.describe(
                turn.namespace, turn.conversation_id, title=title, metadata=place.conversation.metadata
            )
        if store is self._ephemeral:
            store.set_ttl(turn.namespace, turn.conversation_id, EPHEMERAL_S)
        elif self._drafts is not None:
            store.draft(
                turn.namespace,
                turn.conversation_id,
                turn.prompt.parent,
                turn.request_id,
                turn.prompt.new,
                turn.prompt.tokens[turn.prompt.reused_tokens :],
                turn.prompt.reused_tokens,
                len(turn.prompt.tokens),
                self._meta(turn),
                owner=self._drafts,
            )
            turn.drafted = True

    def _opened(self, turn: PendingTurn, made: Future[Conversation]) -> None:
        """A turn's conversation was made, or could not be: then it has nowhere to go."""
        if (error := made.exception()) is not None and turn.request_id in self._turns:
            self._post(Abort(turn.request_id))
            self._fail(turn, _as_ours("the conversation could not be made", error))

    def _meta(self, turn: PendingTurn) -> dict[str, object]:
        """What is stored with a turn: the caller's words, and what a later turn's prompt needs to know."""
        meta: dict[str, object] = {
            **turn.spec.meta,
            CHARS: turn.prompt.path.stored_chars + chars_of(turn.prompt.new),
        }
        if turn.prompt.path.left_out:
            meta[LEFT_OUT] = turn.prompt.path.left_out
        if turn.spec.instructions is not None:
            meta[INSTRUCTIONS] = turn.spec.instructions
        if turn.spec.tools:
            meta[TOOLS] = [dict(tool) for tool in turn.spec.tools]
        return meta

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
                    self._fail(self._turns[request_id], _as_ours("the answer could not be handled", error))

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
            case _:
                self._questions.take(event)

    def _take_token(self, turn: PendingTurn, token: Token) -> None:
        num_kept = self._answers.take(turn, token)
        if not turn.opened:
            self._open(turn)
        if num_kept is not None:
            self._post(Stop(turn.request_id, num_kept))
        if turn.drafted and len(turn.sampled) - turn.num_drafted >= DRAFT_TOKENS and turn.cut is None:
            self._extend_draft(turn)

    def _extend_draft(self, turn: PendingTurn) -> None:
        store = self._store_of(turn.conversation_id)
        assert store is not None
        ids = [token.token_id for token in turn.sampled[turn.num_drafted :]]
        extended = store.extend_draft(turn.request_id, ids, "".join(turn.shown[turn.text_drafted :]))
        extended.add_done_callback(lambda future: self._extended(turn, future))
        turn.num_drafted, turn.text_drafted = len(turn.sampled), len(turn.shown)

    def _extended(self, turn: PendingTurn, extended: Future[None]) -> None:
        """An answer whose draft is gone (another server took it over, or its conversation is deleted) will not be stored: no need to go on."""
        if isinstance(extended.exception(), ConversationNotFound):
            self._enqueue(lambda: self._abort(turn))

    # -- turns end

    def _take_end(self, turn: PendingTurn, event: Finished) -> None:
        if rest := self._answers.end(turn):
            self._have_written(
                turn, EncodeRest(rest), lambda ids: self._end(turn, self._answers.finish(turn, event, ids))
            )
        else:
            self._end(turn, self._answers.finish(turn, event, ()))

    def _end(self, turn: PendingTurn, done: TurnDone) -> None:
        """Have an answer that is whole made durable."""
        prompt = turn.prompt
        store = self._store_of(turn.conversation_id)
        if turn.discarded and done.reason is FinishReason.ABORT:
            self._fail(turn, EngineClosed("the turn was given up before its answer was whole"))
            return
        if turn.erased:  # (an answer that is cut short by that must not be taken for whole)
            self._fail(turn, ConversationNotFound(f"conversation {turn.conversation_id!r} was deleted"))
            return
        if store is None or not turn.stored or (done.reason is FinishReason.ABORT and not done.output):
            self._finish(turn, done)
            return
        if not turn.opened:
            self._open(turn)
        composed = (
            Composed(Message("assistant", turn.spec.prefix + done.text))
            if turn.spec.compose is None
            else turn.spec.compose(done)
        )
        done = replace(done, message=composed.message)
        turn.ending = True
        appended = store.append(
            turn.namespace,
            turn.conversation_id,
            prompt.parent,
            (*prompt.new, composed.message),
            (*prompt.tokens[prompt.reused_tokens :], *done.output),
            start=prompt.reused_tokens,
            reply_reason=done.reason.value,
            only_if_leaf=turn.spec.after is LEAF and turn.spec.conversation_id is not None,
            turn_id=turn.request_id,
            meta=self._meta(turn)
            | {CHARS: prompt.path.stored_chars + chars_of((*prompt.new, composed.message))}
            | dict(composed.meta),
            claimed=turn.spec.claimed
            and store is self._durable,  # (claims are kept in the durable store alone)
        )
        appended.add_done_callback(
            lambda future: self._jobs.put(lambda: self._acknowledge(turn, done, future))
        )

    def _acknowledge(self, turn: PendingTurn, done: TurnDone, appended: Future[Turn]) -> None:
        """The turn is durable, or could not be made so."""
        error = appended.exception()
        if error is not None:
            self._fail(
                turn,
                error
                if isinstance(error, PensieveError)
                else StoreError(f"the turn was not stored: {error}"),
            )
            return
        turn.drafted = turn.created = False  # (the store dropped the draft in the same transaction)
        assert done.message is not None
        path = turn.prompt.path
        own = (*turn.prompt.new, done.message)
        log, num_chars = (*turn.prompt.tokens, *done.output), path.stored_chars + chars_of(own)
        self._prompts.remember(
            turn.namespace,
            turn.request_id,
            Path(
                (*path.messages, *own),
                log,
                path.left_out,
                instructions=turn.spec.instructions,
                stored_chars=num_chars,
            ),
        )
        if turn.place is not None and turn.place.conversation is not None and turn.place.conversation.pinned:
            self._post(Keep(turn.conversation_id, turn.namespace, True))
        self._finish(turn, replace(done, turn_id=appended.result().id))

    def _finish(self, turn: PendingTurn, done: TurnDone) -> None:
        self._leave(turn)
        settle(turn.future, done)

    def _fail(self, turn: PendingTurn, error: PensieveError) -> None:
        self._leave(turn)
        settle(turn.future, error=error)

    def _leave(self, turn: PendingTurn) -> None:
        self._turns.pop(turn.request_id, None)
        self._writing.pop(turn.request_id, None)
        if turn.writing is not None:
            turn.writing.cancel()
            turn.writing = None
        store = self._store_of(turn.conversation_id)
        if turn.drafted:
            turn.drafted = False
            assert store is not None
            store.discard_draft(turn.request_id)
        line = self._lines[turn.key]
        if line:
            following = line.popleft()
            following.created = turn.created
            self._jobs.put(lambda: self._begin(following))
            return
        del self._lines[turn.key]
        if turn.created:  # nothing was said in it: nobody would know what it is
            assert store is not None
            store.delete_unused(turn.namespace, turn.conversation_id).add_done_callback(
                lambda gone: self._forget_unused(turn, gone)
            )

    def _forget_unused(self, turn: PendingTurn, gone: Future[bool]) -> None:
        if gone.exception() is None and gone.result():
            self._post(Forget(turn.conversation_id, turn.namespace))

    def _abort(self, turn: PendingTurn, keep: bool = True) -> None:
        turn.aborted = True
        turn.discarded |= not keep
        line = self._lines.get(turn.key)
        if turn.request_id in self._turns:
            self._post(Abort(turn.request_id))
        elif turn.request_id in self._writing:
            self._fail(turn, EngineClosed("the turn was aborted while its prompt was being made"))
        elif line is not None and turn in line:
            line.remove(turn)
            settle(
                turn.future, error=EngineClosed("the turn was aborted while it waited for the one before it")
            )

    # -- conversations end

    def _stop_line(self, namespace: str, conversation_id: str) -> bool:
        """Nobody waits for a conversation that is being deleted; the turn under way is aborted by the engine.

        Returns whether a turn that would have made the conversation is ended by this: then it was there, though the store does not know it.
        """
        key, deleted = (
            (namespace, conversation_id),
            ConversationNotFound(f"conversation {conversation_id!r} was deleted"),
        )
        line = self._lines.get(key, deque())
        while line:
            settle(line.popleft().future, error=deleted)
        self._prompts.forget(namespace)
        unborn = False
        for turn in [turn for turn in (*self._turns.values(), *self._writing.values()) if turn.key == key]:
            is_unborn = not turn.opened and turn.place is not None and turn.place.conversation is None
            unborn |= is_unborn
            if is_unborn and turn.request_id in self._turns:
                self._post(Abort(turn.request_id))
            if is_unborn or turn.request_id in self._writing:
                self._fail(turn, deleted)
        return unborn

    def _delete(self, namespace: str, conversation_id: str, done: Future[None]) -> None:
        unborn = self._stop_line(namespace, conversation_id)
        try:
            if (store := self._store_of(conversation_id)) is not None and not unborn:
                store.delete(namespace, conversation_id)
            self._post(Forget(conversation_id, namespace))
        except PensieveError as error:
            settle(done, error=error)
        else:
            settle(done, None)

    def _erase(
        self, namespace: str, conversation_id: str, overwrite: bool, within_s: float, done: Future[Erasure]
    ) -> None:
        """First the turn under way, whose end would otherwise write again; then, off this thread, the rows; then the KV.

        What is cached without being stored, a completed text for one, has KV alone.
        """
        store = self._store_of(conversation_id)
        unknown: PensieveError | None = None
        try:
            if store is not None:
                store.get(namespace, conversation_id)  # before anything is stopped
        except ConversationNotFound as error:
            store, unknown = None, error
        except PensieveError as error:
            settle(done, error=error)
            return
        if self._stop_line(namespace, conversation_id):
            unknown = None
        self._going[namespace, conversation_id] += 1
        under_way = [turn for turn in self._turns.values() if turn.key == (namespace, conversation_id)]
        waits: list[Future[TurnDone]] = []
        for turn in under_way:
            turn.erased = True
            self._abort(turn)
            waits.append(turn.future)

        def carry_out() -> None:
            try:
                began_s = time.monotonic()
                if wait(waits, within_s / 2).not_done:
                    self._enqueue(lambda: self._drop(under_way))
                    if wait(waits, ERASE_WAIT_S).not_done:
                        raise StoreError("a turn of the conversation is still being stored: try again")
                if unknown is not None and not self._is_cached(namespace, conversation_id, within_s / 2):
                    raise unknown
                erased = Erased(0, 0, complete=True)
                if store is not None:
                    erased = store.erase(
                        namespace, conversation_id, overwrite=overwrite or store is self._ephemeral
                    )
                kv, forgot = Forgotten("", 0, 0), True
                asked = self._ask(lambda tag: Forget(conversation_id, namespace, True, tag))
                try:
                    kv = cast(
                        Forgotten, asked.result(max(within_s / 4, began_s + within_s - time.monotonic()))
                    )
                except TimeoutError:  # it has been told, and forgets once it is back
                    forgot = False
                except PensieveError:  # the engine died meanwhile, and its memory with it
                    pass
                settle(
                    done, Erasure(erased.turns, erased.bytes, kv.slots, kv.bytes, erased.complete and forgot)
                )
            except BaseException as error:
                settle(done, error=_as_ours("the conversation could not be erased", error))
            finally:
                self._enqueue(lambda: self._gone((namespace, conversation_id)))

        threading.Thread(target=carry_out, name="pensieve-erase", daemon=True).start()

    def _drop(self, turns: list[PendingTurn]) -> None:
        """End turns of a conversation that is being erased without the engine, which does not say that they have ended."""
        for turn in turns:
            if turn.request_id in self._turns and not turn.ending:
                self._fail(turn, ConversationNotFound(f"conversation {turn.conversation_id!r} was deleted"))

    def _is_cached(self, namespace: str, conversation_id: str, within_s: float) -> bool:
        try:
            return bool(cast(CacheMap, self.rows([(namespace, conversation_id)]).result(within_s)).rows)
        except TimeoutError:
            raise EngineSilent(
                f"the engine did not say within {within_s:g} s whether it has conversation {conversation_id!r}: try again"
            ) from None
        except PensieveError:  # the engine died, and its memory with it
            return False

    def _gone(self, key: tuple[str, str]) -> None:
        self._going[key] -= 1
        if not self._going[key]:
            del self._going[key]
        self._prompts.forget(key[0])


ERASE_WAIT_S = 60.0  # how long an erasure waits for the turn under way to end


def _title(messages: Sequence[Message]) -> str | None:
    """What to call a conversation that nobody named: how its user begins."""
    words = next((message.content for message in messages if message.role == "user"), "").split()
    return " ".join(words)[:TITLE_CHARS] or None


def _as_ours(what: str, error: BaseException) -> PensieveError:
    if isinstance(error, PensieveError):
        return error
    log.error("%s", what, exc_info=error)
    return PensieveError(f"{what}: {type(error).__name__}: {error}")


def _not_connected(command: Command) -> None:
    raise EngineClosed(f"no engine is connected to answer {type(command).__name__}")
