"""Pensieve as a library: one model on a thread of this process, and conversations with it.

Knows messages and answers; never tokens or tiers.
"""

from __future__ import annotations

import queue
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as NotYet
from dataclasses import fields, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pensieve.core.request import SamplingParams
from pensieve.errors import ConfigError, ConversationNotFound, EngineClosed, InvalidRequest
from pensieve.message import Message
from pensieve.runtime.follower import follow_unless_first
from pensieve.runtime.loading import load_model
from pensieve.runtime.local import start
from pensieve.runtime.options import Options
from pensieve.service import DEFAULT_NAMESPACE, TurnSpec
from pensieve.store import MEMORY, open_store, path_messages, sqlite_path

if TYPE_CHECKING:
    from pensieve.core.receipt import Receipt
    from pensieve.service import Erasure, PendingTurn, Piece, TurnDone

LOOK_S = 0.2  # between two looks at an answer: a wait without a timeout would not see Ctrl-C everywhere


class Pensieve:
    """A loaded model whose conversations keep their KV cache between turns. Close it, or use it in `with`.

    Conversations may be used from several threads at once; their requests are computed together.
    """

    def __init__(
        self,
        model: str = "smollm2",
        *,
        store: str | None = None,
        progress: Callable[[str], None] | None = None,
        **options: Any,
    ) -> None:
        """Load a model and start its engine.

        Args:
            model: `smollm2`, a hub id, a folder or a `.gguf` file.
            store: where conversations are kept, as `pensieve serve --store` takes it; None to keep them in
                memory while this object lives.
            progress: called with a line of text about whatever takes time.
            options: fields of `Options`: gpu_cache_gb, cpu_cache_gb, dtype, device, max_context, threads ...

        Raises:
            ConfigError: an option is unknown or out of its range, or the caches do not fit.
            ModelUnavailable, ModelRefused: the model cannot be had, or cannot be served right.
            StoreError: the store cannot be opened.
        """
        known = {field.name for field in fields(Options)} - {"model"}
        if unknown := sorted(set(options) - known):
            raise ConfigError(f"unknown option {unknown[0]!r}: Pensieve() takes {', '.join(sorted(known))}")
        chosen = Options(model=model, **options)
        url = f"sqlite://{MEMORY}" if store is None else store
        sqlite_path(url)  # before a model is loaded for a store that cannot be opened
        follow_unless_first(chosen)
        loaded = load_model(chosen, must_talk=True, say=progress or (lambda line: None))
        self._store = open_store(url)
        try:
            self._runtime = start(chosen, loaded, store=self._store)
        except BaseException:
            self._store.close()
            raise
        self.model = loaded.resolved.label  # the model's name, for people
        self.max_context = self._runtime.sizes.max_context  # tokens of prompt and answer together
        self._closed = False

    def conversation(self, conversation_id: str | None = None, *, system: str | None = None) -> Conversation:
        """A conversation, new or continued.

        Args:
            conversation_id: its name; None for a new one with a drawn name. With a store it is found again by
                this name after a restart.
            system: the system message it begins with, if it is new.
        """
        return Conversation(self, conversation_id or f"conv_{uuid.uuid4().hex}", system)

    def close(self) -> None:
        """End answers under way, stop the engine, free the caches. May be called twice."""
        if not self._closed:
            self._closed = True
            self._runtime.close()
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, spec: TurnSpec, on_piece: Callable[[Piece], None] | None = None) -> PendingTurn:
        if self._closed:
            raise EngineClosed("this Pensieve was closed: make a new one")
        return self._runtime.service.start(spec, on_piece)


class Conversation:
    """One conversation: its turns build on each other, and each computes only what is new.

    Made by `Pensieve.conversation`. Turns of one conversation run one after the other.
    """

    def __init__(self, owner: Pensieve, conversation_id: str, system: str | None) -> None:
        self.id = conversation_id
        self.last: TurnDone | None = None  # the newest answer; None before the first
        self._owner = owner
        self._system = system

    @property
    def receipt(self) -> Receipt | None:
        """Where the last prompt's tokens came from, and what they cost; None before the first answer."""
        return None if self.last is None else self.last.receipt

    @property
    def messages(self) -> tuple[Message, ...]:
        """All messages so far, the oldest first.

        Raises:
            StoreError: the store cannot be read.
        """
        store = self._owner._store
        try:
            leaf = store.get(DEFAULT_NAMESPACE, self.id).leaf
        except ConversationNotFound:
            return ()
        return tuple(path_messages(store.path(DEFAULT_NAMESPACE, leaf)))

    def send(
        self,
        text: str,
        *,
        max_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
    ) -> TurnDone:
        """Say something and wait for the whole answer.

        Args:
            text: the user's message.
            max_tokens: the most tokens of the answer; None for `sampling`'s.
            sampling: how tokens are chosen; None for greedy.
            stop: strings that end the answer and are not part of it.

        Returns:
            The answer: `text`, `reason` it ended, `receipt`, `message`. It is in the store by then.

        Raises:
            InvalidRequest, ContextLengthExceeded: it cannot be answered as asked; the conversation is
                unchanged.
            EngineClosed: the engine has ended.
        """
        turn = self._owner._start(self._spec(text, max_tokens, sampling, stop))
        try:
            while True:
                try:
                    self.last = turn.future.result(timeout=LOOK_S)
                    return self.last
                except NotYet:
                    continue
        except KeyboardInterrupt:
            self._owner._runtime.service.abort(turn)
            raise

    def stream(
        self,
        text: str,
        *,
        max_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[Piece]:
        """Say something and get the answer piece by piece, as it is sampled.

        The turn begins when the first piece is asked for. Leaving the loop early ends the answer there: what
        was said so far stays in the conversation.

        Args:
            text, max_tokens, sampling, stop: as for `send`.

        Yields:
            Pieces with `text`, never empty.

        Raises:
            As `send`.
        """
        arrived: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        turn = self._owner._start(self._spec(text, max_tokens, sampling, stop), arrived.put)
        turn.future.add_done_callback(lambda done: arrived.put(None))
        try:
            while (piece := _next(arrived)) is not None:
                if piece.text:
                    yield piece
        finally:
            if not turn.future.done():
                self._owner._runtime.service.abort(turn)
            self.last = turn.future.result()

    def delete(self) -> Erasure:
        """Erase the conversation: its messages, its tokens and its KV cache.

        Returns:
            How much was erased.
        """
        self.last = None
        return self._owner._runtime.service.erase(self.id).result()

    def _spec(
        self, text: str, max_tokens: int | None, sampling: SamplingParams | None, stop: Sequence[str]
    ) -> TurnSpec:
        if not isinstance(text, str):
            raise InvalidRequest(f"a message must be a string, got {type(text).__name__}")
        messages = [Message("user", text)]
        if self._system is not None and not self.messages:
            messages.insert(0, Message("system", self._system))
        chosen = sampling or SamplingParams()
        if max_tokens is not None:
            chosen = replace(chosen, max_new_tokens=max_tokens)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        return TurnSpec(DEFAULT_NAMESPACE, self.id, tuple(messages), chosen, stops)


def _next(arrived: queue.SimpleQueue[Piece | None]) -> Piece | None:
    while True:
        try:
            return arrived.get(timeout=LOOK_S)
        except queue.Empty:
            continue
