"""Turns of conversations over one engine: queued, answered, streamed, made durable, acknowledged.

Knows no tensors, slots or HTTP.

Everything here happens on one thread, fed by a queue: calls, engine events and the store's acknowledgements
take turns, so no state needs a lock, and neither detokenising nor the database runs on the engine's step.
Rendering and tokenizing, which take time, are jobs of a `TextRunner`: while a turn's prompt is being made,
only turns of the same conversation wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Literal

from pensieve.config import ContextLimit
from pensieve.core.request import SamplingParams
from pensieve.engine.messages import (
    Command,
    Event,
)
from pensieve.errors import (
    EngineClosed,
)
from pensieve.message import Message
from pensieve.service.engine_client import DEFAULT_NAMESPACE, EngineClient
from pensieve.service.erasing import ERASE_WAIT_S, Eraser, Erasure
from pensieve.service.prompt import Prompts
from pensieve.service.service_thread import ServiceThread
from pensieve.service.turn import (
    Path,
    PendingTurn,
    Piece,
    TurnSpec,
    settle,
)
from pensieve.service.turn_runner import TurnRunner
from pensieve.service.turn_stores import TurnStores
from pensieve.store import Conversation, ConversationStore
from pensieve.text import ChatText, InlineRunner, TextRunner


class ConversationService:
    """Turns of many conversations; turns of one conversation are answered one after another.

    Attributes:
        engine: questions to the engine: its statistics, where chunks lie, keeps and hints.
        stores: where turns are stored; to be read from any thread.
        text: the model's tokenizer and template; None if only token ids are sent.
    """

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
            text: the model's tokenizer and template; None if only token ids are sent.
            store: where turns are made durable; None if nothing is stored.
            max_context: tokens of prompt and answer together.
            overflow: whether a longer prompt is refused or loses its oldest messages.
            ephemeral: a store in memory, for turns that are not to be durable; None if there are none.
            drafts: this process's name in the store, under which unfinished answers are stored; None to store
                finished ones only.
            limit: what would allow a longer context, for error messages.
            runner: what renders and tokenizes; None to do it on the service's thread.
        """
        self.text = text
        if runner is None and text is not None:
            runner = InlineRunner(text)
        self.stores = TurnStores(store, ephemeral, drafts)
        self._prompts = Prompts(text, self.stores.of, max_context, overflow, limit)
        self._thread = ServiceThread("pensieve-service", lambda: self._runner.fail_all())
        put = self._thread.put
        self.engine = EngineClient(put)
        self._runner = TurnRunner(text, runner, self.stores, self._prompts, self.engine, put)
        self._turns = self._runner.turns
        self._eraser = Eraser(
            self._turns, self.stores, self._prompts, self.engine, put=put, fail=self._runner.fail
        )

    def connect(self, post: Callable[[Command], None]) -> None:
        """Set where commands go: an engine's `post`."""
        self.engine.connect(post)

    # -- turns, from any thread

    def handle(self, events: list[Event]) -> None:
        """Take an engine's events (this is the engine's `emit`). Returns at once."""
        self._thread.put(lambda: self._runner.take(events))

    def start(self, spec: TurnSpec, on_piece: Callable[[Piece], None] | None = None) -> PendingTurn:
        """Answer a turn. `on_piece` is called with each piece of the answer, on the service's thread.

        If the future fails, which it does with a `PensieveError`, nothing is stored.
        """
        turn = PendingTurn(spec, time.monotonic(), on_piece)
        self.begin(turn)
        return turn

    def begin(self, turn: PendingTurn) -> None:
        """Answer a turn that the caller has made; see `start`."""
        if not self._thread.put(lambda: self._runner.begin(turn)):
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
        """Append messages to a conversation (created if new) and answer them; `on_text` is called with each
        piece of text.

        With `forced` the turn continues from that path instead of the stored one. With `replay`, token ids
        and how many of them are history, these ids are the prompt, whatever the messages say. In both cases
        nothing is stored.
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
        """Answer token ids, the first `history_tokens` of which belong to earlier turns.

        No text is made, nothing is stored.
        """
        raw = (tuple(tokens), history_tokens)
        return self.start(TurnSpec(namespace, sequence_id, (), sampling, ignore_eos=True, raw=raw))

    def abort(self, turn: PendingTurn, *, keep: bool = True) -> None:
        """End a turn early.

        The answer so far is stored; without `keep` only an answer that is complete by then.
        """
        self._thread.put(lambda: self._runner.abort(turn, keep=keep))

    # -- conversations, from any thread

    def delete(self, conversation_id: str, *, namespace: str = DEFAULT_NAMESPACE) -> Future[None]:
        """Delete a conversation: its turns in the store, and what is cached of it."""
        done: Future[None] = Future()
        if not self._thread.put(lambda: self._eraser.delete((namespace, conversation_id), done)):
            settle(done, error=EngineClosed("the service is closed"))
        return done

    def erase(
        self,
        conversation_id: str,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        overwrite: bool = True,
        within_s: float = ERASE_WAIT_S,
    ) -> Future[Erasure]:
        """Delete a conversation and overwrite its rows, and its KV in every tier (shared KV with its last
        reference).

        Without `overwrite` the rows are deleted only, and the store remembers to overwrite them: once for
        many conversations. The engine has `within_s` seconds to end the turn under way and to forget the KV.
        The rows are erased in any case, and the KV of an engine that does not answer in time when it is back.
        """
        done: Future[Erasure] = Future()
        key = (namespace, conversation_id)
        if not self._thread.put(lambda: self._eraser.erase(key, overwrite, within_s, done)):
            settle(done, error=EngineClosed("the service is closed"))
        return done

    def expired(self, now_s: float, limit: int) -> list[Conversation]:
        """Conversations of all namespaces whose ttl has passed, at most `limit` of each store.

        Waits for the stores.

        A conversation with an open turn is in use and has not expired.
        """
        found = self.stores.expired(now_s, limit)
        return [one for one in found if not self._turns.is_open((one.namespace, one.id))]

    def delete_turn(self, turn_id: str, *, namespace: str = DEFAULT_NAMESPACE) -> None:
        """Delete a turn; one that later turns follow is marked as deleted and stays. Waits for the store.

        Raises:
            ConversationNotFound: there is no such turn in this namespace.
        """
        assert self.stores.durable is not None
        self.stores.durable.delete_turn(namespace, turn_id)
        self._thread.put(lambda: self._prompts.forget(namespace))

    def close(self) -> None:
        """Stop the thread after the jobs that are queued; open turns fail with `EngineClosed`.

        Close the engine first.
        """
        self._thread.close()
