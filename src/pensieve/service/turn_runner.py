"""The way of a turn: its position, its prompt, the engine's tokens, the store's acknowledgement.

Knows all of these; never threads or HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

from pensieve.core.request import FinishReason
from pensieve.engine.messages import (
    Abort,
    Event,
    Failed,
    Finished,
    Keep,
    Stop,
    Submit,
    Token,
    tenant_of,
)
from pensieve.errors import (
    ConversationNotFound,
    EngineClosed,
    InvalidRequest,
    PensieveError,
    StoreError,
    error_from,
)
from pensieve.message import chars_of
from pensieve.service.answer_text import AnswerText
from pensieve.service.engine_client import EngineClient
from pensieve.service.open_turns import OpenTurns
from pensieve.service.prompt import Prompts
from pensieve.service.service_thread import Job
from pensieve.service.turn import (
    Path,
    PendingTurn,
    Prompt,
    TurnDone,
    TurnPosition,
    TurnSpec,
    as_pensieve_error,
    settle,
)
from pensieve.service.turn_stores import TurnStores
from pensieve.store import Conversation, Turn
from pensieve.text import ChatText, EncodeRest, TextJob, TextRunner, WrittenChat

log = logging.getLogger(__name__)

T = TypeVar("T")


class TurnRunner:
    """Answers turns; those of one conversation one after another. Used by the service's thread only.

    Attributes:
        turns: those that are open.
    """

    def __init__(
        self,
        text: ChatText | None,
        runner: TextRunner | None,
        stores: TurnStores,
        prompts: Prompts,
        engine: EngineClient,
        put: Callable[[Job], bool],
    ) -> None:
        """`put` queues a job on the service's thread; the others are as `ConversationService` has them."""
        self.turns = OpenTurns()
        self._text = text
        self._runner = runner
        self._stores = stores
        self._prompts = prompts
        self._engine = engine
        self._put = put
        self._answers = AnswerText(text)

    # -- turns begin

    def begin(self, turn: PendingTurn) -> None:
        """Find the turn's conversation, and begin the turn unless an earlier one of that conversation is
        open.
        """
        spec, position = turn.spec, None
        try:
            if spec.conversation_id is not None:
                turn.conversation_id = spec.conversation_id
            else:
                position = self._recognise(spec)
                turn.conversation_id = position.conversation_id
        except Exception as error:
            settle(turn.future, error=as_pensieve_error("the turn's history could not be looked up", error))
            return
        if self.turns.is_erasing(turn.key):
            deleted = ConversationNotFound(f"conversation {turn.conversation_id!r} is being deleted")
            settle(turn.future, error=deleted)
        elif self.turns.enter(turn):
            self._start(turn, position)

    def _recognise(self, spec: TurnSpec) -> TurnPosition:
        new_id = self._stores.new_id(durable=spec.durable)
        store = self._stores.of(new_id)
        if store is None:
            return TurnPosition(new_id, None, spec.messages)

        def busy(conversation_id: str) -> bool:
            key = (spec.namespace, conversation_id)
            return self.turns.is_open(key) or self.turns.is_erasing(key)

        return self._prompts.recognise(spec, store, busy, new_id)

    def _start(self, turn: PendingTurn, position: TurnPosition | None = None) -> None:
        try:
            if turn.aborted:
                raise EngineClosed("the turn was aborted while it waited for the one before it")
            self._prepare(turn, position)
        except Exception as error:
            self.fail(turn, as_pensieve_error("the turn could not be prepared", error))

    def _prepare(self, turn: PendingTurn, position: TurnPosition | None) -> None:
        """Find the turn's position and have its prompt made."""
        spec = turn.spec
        self._answers.begin(turn)
        if spec.raw is not None:
            tokens, history_tokens = spec.raw
            turn.prompt = Prompt(tokens, min(history_tokens, len(tokens)))
            self._submit(turn)
            return
        if self._text is None or self._runner is None:
            raise InvalidRequest("this model has no tokenizer here: send token ids")
        position = position or self._prompts.locate(spec, turn.conversation_id)
        turn.position = position
        path, job = self._prompts.job(spec, position)
        self.turns.writing[turn.request_id] = turn

        def written(chat: WrittenChat) -> None:
            del self.turns.writing[turn.request_id]
            turn.prompt = self._prompts.take(spec, position, path, chat)
            self._submit(turn)

        self._run_text_job(turn, job, written)

    def _run_text_job(self, turn: PendingTurn, job: TextJob[T], take: Callable[[T], None]) -> None:
        """Have the text room do a turn's job, then call `take` with the result, on this thread, unless the
        turn has ended meanwhile.
        """
        assert self._runner is not None
        future = self._runner.submit(job, tenant_of(turn.namespace))
        turn.writing = future

        def go_on(done: Future[T]) -> None:
            # (It must not name `future`: a future keeps its callbacks, and this one keeps the turn.)
            if turn.writing is not done:
                return
            turn.writing = None
            try:
                take(done.result())
            except Exception as error:
                self.fail(turn, as_pensieve_error("the turn's text could not be handled", error))

        future.add_done_callback(lambda done: self._put(lambda: go_on(done)))

    def _submit(self, turn: PendingTurn) -> None:
        """Give a turn to the engine."""
        sampling, prompt = turn.spec.sampling, turn.prompt
        if turn.detokenizer is not None and not turn.spec.ignore_eos:
            assert self._text is not None
            sampling = replace(sampling, stop_token_ids=sampling.stop_token_ids | self._text.stop_token_ids)
        self.turns.in_engine[turn.request_id] = turn
        self._stores.touch(turn)
        submit = Submit(
            turn.request_id,
            turn.conversation_id,
            turn.namespace,
            prompt.tokens,
            prompt.history_tokens,
            sampling,
            turn.submitted_s,
        )
        self._engine.post(submit)

    # -- turns go on

    def take(self, events: list[Event]) -> None:
        for event in events:
            try:
                self._take_event(event)
            except Exception as error:  # an event that cannot be handled fails its own turn only
                log.exception("an event could not be handled")
                turn = self.turns.in_engine.get(getattr(event, "request_id", ""))
                if turn is not None:
                    self._engine.post(Abort(turn.request_id))
                    self.fail(turn, as_pensieve_error("the answer could not be handled", error))

    def _take_event(self, event: Event) -> None:
        if not isinstance(event, Token | Finished | Failed):
            self._engine.take(event)
        elif (turn := self.turns.in_engine.get(event.request_id)) is None:
            return
        elif isinstance(event, Token):
            self._take_token(turn, event)
        elif isinstance(event, Finished):
            self._take_end(turn, event)
        else:
            self.fail(turn, error_from(event.code, event.message))

    def _take_token(self, turn: PendingTurn, token: Token) -> None:
        num_kept = self._answers.take(turn, token)
        if not turn.opened:
            self._open(turn)
        if num_kept is not None:
            self._engine.post(Stop(turn.request_id, num_kept))
        if (extended := self._stores.extend_draft(turn)) is not None:
            extended.add_done_callback(lambda future: self._extended(turn, future))

    def _open(self, turn: PendingTurn) -> None:
        """The turn has its first token: tell the store, which must neither hold that token up nor know the
        turn before it.
        """
        if (created := self._stores.open(turn)) is not None:
            created.add_done_callback(lambda future: self._put(lambda: self._created(turn, future)))

    def _created(self, turn: PendingTurn, created: Future[Conversation]) -> None:
        """A turn whose conversation could not be created cannot be stored: it fails."""
        if (error := created.exception()) is not None and turn.request_id in self.turns.in_engine:
            self._engine.post(Abort(turn.request_id))
            self.fail(turn, as_pensieve_error("the conversation could not be made", error))

    def _extended(self, turn: PendingTurn, extended: Future[None]) -> None:
        """A turn whose draft is gone (deleted, or taken over by another server) will not be stored: it is
        aborted.
        """
        if isinstance(extended.exception(), ConversationNotFound):
            self._put(lambda: self.abort(turn))

    def abort(self, turn: PendingTurn, *, keep: bool = True) -> None:
        turn.aborted = True
        turn.discarded |= not keep
        if turn.request_id in self.turns.in_engine:
            self._engine.post(Abort(turn.request_id))
        elif turn.request_id in self.turns.writing:
            self.fail(turn, EngineClosed("the turn was aborted while its prompt was being made"))
        elif self.turns.withdraw(turn):
            error = EngineClosed("the turn was aborted while it waited for the one before it")
            settle(turn.future, error=error)

    # -- turns end

    def _take_end(self, turn: PendingTurn, event: Finished) -> None:
        def end(rest: Sequence[int]) -> None:
            self._end(turn, self._answers.finish(turn, event, rest))

        if rest := self._answers.end(turn):
            self._run_text_job(turn, EncodeRest(rest), end)
        else:
            end(())

    def _end(self, turn: PendingTurn, done: TurnDone) -> None:
        """Have a complete answer made durable."""
        if turn.discarded and done.reason is FinishReason.ABORT:
            self.fail(turn, EngineClosed("the turn was given up before its answer was whole"))
        elif turn.erased:  # the erasure cut the answer short, so it must not be taken for complete
            self.fail(turn, ConversationNotFound(f"conversation {turn.conversation_id!r} was deleted"))
        elif not self._stores.takes(turn, done):
            self._finish(turn, done)
        else:
            if not turn.opened:
                self._open(turn)
            turn.ending = True
            appended = self._stores.append(turn, done)
            appended.add_done_callback(
                lambda future: self._put(lambda: self._acknowledge(turn, done, future))
            )

    def _acknowledge(self, turn: PendingTurn, done: TurnDone, appended: Future[Turn]) -> None:
        """The turn is durable, or could not be made so."""
        error = appended.exception()
        if error is not None:
            if not isinstance(error, PensieveError):
                error = StoreError(f"the turn was not stored: {error}")
            self.fail(turn, error)
            return
        turn.drafted = turn.created = False  # the store dropped the draft in the same transaction
        assert done.message is not None
        path, own = turn.prompt.path, (*turn.prompt.new, done.message)
        follower = Path(
            (*path.messages, *own),
            (*turn.prompt.tokens, *done.output),
            path.left_out,
            instructions=turn.spec.instructions,
            stored_chars=path.stored_chars + chars_of(own),
        )
        self._prompts.remember(turn.namespace, turn.request_id, follower)
        conversation = None if turn.position is None else turn.position.conversation
        if conversation is not None and conversation.pinned:
            self._engine.post(Keep(turn.conversation_id, turn.namespace, True))
        self._finish(turn, replace(done, turn_id=appended.result().id))

    def _finish(self, turn: PendingTurn, done: TurnDone) -> None:
        self._leave(turn)
        settle(turn.future, done)

    def fail(self, turn: PendingTurn, error: PensieveError) -> None:
        self._leave(turn)
        settle(turn.future, error=error)

    def _leave(self, turn: PendingTurn) -> None:
        """A turn has ended: begin the next one of its conversation."""
        if turn.writing is not None:
            turn.writing.cancel()
            turn.writing = None
        self._stores.discard(turn)
        following = self.turns.leave(turn)
        if following is not None:
            following.created = turn.created
            if not self._put(lambda: self._start(following)):
                settle(following.future, error=EngineClosed("the service is closed"))
        elif turn.created:  # no turn was stored in it, so no client could name it
            deleted = self._stores.delete_unused(turn)
            deleted.add_done_callback(lambda future: self._forget_unused(turn, future))

    def _forget_unused(self, turn: PendingTurn, deleted: Future[bool]) -> None:
        if deleted.exception() is None and deleted.result():
            self._engine.forget(turn.conversation_id, namespace=turn.namespace)

    def fail_all(self) -> None:
        """The thread ends: fail what is still open."""
        error = EngineClosed("the engine was closed before this turn ended")
        for turn in self.turns:
            settle(turn.future, error=error)
        self._engine.give_up(error)
