"""What is asked of a tokenizer and template, as values that can be sent to another process.

Knows text; never processes, stores or requests.

A tokenizer keeps Python's interpreter to itself while it works, and a chat template can loop for ever. So
nothing of a client's is rendered or tokenized where others wait: it is a job for a `TextRunner`. A server's
runs jobs in processes of their own (`pensieve.text.workers`), a terminal's runs them at once
(`InlineRunner`).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from pensieve.errors import ContextLengthExceeded, InvalidRequest, PensieveError
from pensieve.message import Message, chars_of
from pensieve.text.chat import ChatText
from pensieve.text.overflow import Truncated, size_of, surely_exceed, truncate

log = logging.getLogger(__name__)

MESSAGE_CHARS = 64  # that are tokenized in the time that a template takes to write a message
SIZED_CHARS = 1 << 17  # of tools; what is longer is as long as this
CONTEXT_HOLDS = "that the context holds: send less"
T = TypeVar("T")
Tools = tuple[Mapping[str, object], ...]

# After an overflow the chat is cut to this share of the context, so that the next turns append again instead
# of cutting (and recomputing) each time.
TRUNCATE_TO = 0.75


class TextJob(ABC, Generic[T]):
    """A question to a tokenizer and template. Pickles, and so does its answer."""

    @property
    @abstractmethod
    def num_chars(self) -> int:
        """About how many characters have to be rendered and tokenized."""

    @abstractmethod
    def run(self, text: ChatText) -> T:
        """The answer.

        Raises:
            PensieveError: the question has none.
        """


def run_job(job: TextJob[T], text: ChatText) -> T:
    """Run a job.

    Raises:
        InvalidRequest: the tokenizer itself fails at this text: the Rust library panics, for one when a
            search needs too many tries.
        PensieveError: what the job raises.
    """
    try:
        return job.run(text)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # (of a module without a file, and no `Exception`)
            raise
        raise InvalidRequest(f"the model's tokenizer fails at this text: {error}") from None


class TextRunner(Protocol):
    """Who runs jobs."""

    def submit(self, job: TextJob[T], tenant: str = "") -> Future[T]:
        """Run a job for a tenant; cancelling the future ends it. The future fails with a `PensieveError`."""
        ...


class InlineRunner:
    """Runs each job at once, in the thread that asks: for one user at a time, whose model is trusted."""

    def __init__(self, text: ChatText) -> None:
        self._text = text

    def submit(self, job: TextJob[T], tenant: str = "") -> Future[T]:
        """See `TextRunner`."""
        future: Future[T] = Future()
        try:
            future.set_result(run_job(job, self._text))
        except PensieveError as error:
            future.set_exception(error)
        except Exception as error:
            log.exception("text could not be read")
            future.set_exception(
                PensieveError(f"the text could not be read: {type(error).__name__}: {error}")
            )
        return future


@dataclass(frozen=True, slots=True)
class EncodeText(TextJob[tuple[int, ...]]):
    """The token ids of text that is no chat."""

    text: str
    max_tokens: int | None = None  # more are an error
    add_special_tokens: bool = True
    way_out: str = CONTEXT_HOLDS  # for the error: whose limit it is, and what helps

    @property
    def num_chars(self) -> int:
        """Its length."""
        return len(self.text)

    def run(self, text: ChatText) -> tuple[int, ...]:
        """Its ids.

        Raises:
            ContextLengthExceeded: they are more than `max_tokens`.
        """
        if self.max_tokens is not None:
            many = len(self.text) > text.most_chars(self.max_tokens)
            if many or surely_exceed(
                [self.text], self.max_tokens, lambda piece: len(text.encode_prompt(piece, False))
            ):
                raise ContextLengthExceeded(
                    f"the text has more than the {self.max_tokens} tokens {self.way_out}"
                )
        return tuple(text.encode_prompt(self.text, self.add_special_tokens))


@dataclass(frozen=True, slots=True)
class EncodeRest(TextJob[tuple[int, ...]]):
    """The token ids of an answer's last words, where it was cut within a token."""

    text: str

    @property
    def num_chars(self) -> int:
        """Its length."""
        return len(self.text)

    def run(self, text: ChatText) -> tuple[int, ...]:
        """Its ids."""
        return tuple(text.encode_text(self.text))


@dataclass(frozen=True, slots=True)
class EncodeChat(TextJob[tuple[int, ...]]):
    """The token ids of a chat as it would be put before the model."""

    messages: tuple[Message, ...]
    max_tokens: int
    add_generation_prompt: bool = True
    way_out: str = CONTEXT_HOLDS

    @property
    def num_chars(self) -> int:
        """Of all messages, and what a template takes to write each."""
        return chars_of(self.messages) + MESSAGE_CHARS * len(self.messages)

    def run(self, text: ChatText) -> tuple[int, ...]:
        """Their ids.

        Raises:
            InvalidRequest: the template refuses these messages.
            ContextLengthExceeded: they surely have more than `max_tokens`.
        """
        if chars_of(self.messages) > text.most_chars(self.max_tokens) or text.exceeds(
            self.messages, self.max_tokens
        ):
            raise ContextLengthExceeded(
                f"the messages have more than the {self.max_tokens} tokens {self.way_out}"
            )
        return tuple(text.first(self.messages, self.add_generation_prompt))


@dataclass(frozen=True, slots=True)
class DecodeIds(TextJob[str]):
    """The text of token ids, control tokens written out."""

    ids: tuple[int, ...]

    @property
    def num_chars(self) -> int:
        """About as many as a token has."""
        return 4 * len(self.ids)

    def run(self, text: ChatText) -> str:
        """Their text."""
        return text.decode_all(self.ids)


@dataclass(frozen=True, slots=True)
class WrittenChat:
    """A turn's prompt."""

    tokens: tuple[int, ...]  # behind those of the log that stay
    reused_tokens: int = 0  # leading tokens of the log that stay
    history_tokens: int = 0  # of all tokens, those of earlier turns
    warning: str | None = None  # the template writes earlier turns differently: a sentence
    dropped: int = 0  # messages left out because the context is full, oldest first
    dropped_tokens: int = 0  # how many tokens those have (about, if they are many times the context)


@dataclass(frozen=True, slots=True)
class WriteChat(TextJob[WrittenChat]):
    """Put a turn before the model.

    Append it to its conversation's token log, or write the chat as a whole.
    """

    history: tuple[Message, ...]  # what the log holds
    new: tuple[Message, ...]  # what follows it
    log: tuple[int, ...]  # empty: there is none, or it cannot be gone on from
    max_context: int
    answer_tokens: int = 0  # to be left for the answer, when truncating
    truncating: bool = False
    left_out: int = 0  # messages in front of `history` that are not even sent here, since they cannot fit
    left_out_chars: int = 0
    num_own: int = 0  # of `new`, the newest that the turn itself brings
    tools: Tools = ()
    prefix: str = ""  # what the answer is made to begin with
    way_out: str = "start with a larger --max-context"

    @property
    def num_chars(self) -> int:
        """The new ones; what the log holds is rendered, but not tokenized."""
        history = chars_of(self.history)
        written = MESSAGE_CHARS * (len(self.history) + len(self.new))
        return (
            chars_of(self.new)
            + written
            + (history // 8 if self.log else history)
            + size_of(self.tools, SIZED_CHARS)
        )

    def run(self, text: ChatText) -> WrittenChat:
        """The prompt.

        Raises:
            InvalidRequest: the template refuses these messages.
            ContextLengthExceeded: not even the newest turn fits.
        """
        must_fit = _newest_turn(self.new) if self.truncating else self.new
        if text.exceeds(must_fit, self.max_context, self.tools):
            raise ContextLengthExceeded(
                f"the new messages have more than the {self.max_context} tokens that the context holds: "
                f"shorten them, or {self.way_out}"
            )
        whole = (*self.history, *self.new)
        if self.truncating and (self.left_out or text.exceeds(whole, self.max_context, self.tools)):
            written, num_tokens = None, None
        else:
            written, num_tokens = self._write(text)
        if written is None or (
            self.truncating and num_tokens is not None and num_tokens + self.answer_tokens > self.max_context
        ):
            written = self._truncate(text, num_tokens) or written
        assert written is not None
        if self.prefix:
            written = replace(written, tokens=(*written.tokens, *text.encode_answer(self.prefix)))
        return written

    def _options(self) -> dict[str, Any]:
        return {"tools": self.tools} if self.tools else {}

    def _write(self, text: ChatText) -> tuple[WrittenChat, int]:
        """Everything, and how many tokens it has."""
        if not (self.log and self.history and self.history[-1].role == "assistant"):
            tokens = text.first([*self.history, *self.new], **self._options())
            return WrittenChat(tuple(tokens)), len(tokens)
        extension = text.extend(self.log, self.history, self.new, **self._options())
        known = len(self.log) if extension.rewritten is None else self._count(text, self.history)
        reused, num_tokens = extension.reused_tokens, len(extension.tokens)
        return WrittenChat(
            tuple(extension.tokens[reused:]), reused, min(known, num_tokens), extension.rewritten
        ), num_tokens

    def _count(self, text: ChatText, messages: Sequence[Message]) -> int:
        return len(text.first(messages, add_generation_prompt=False, **self._options())) if messages else 0

    def _truncate(self, text: ChatText, num_tokens: int | None) -> WrittenChat | None:
        """Without the oldest turns, computed anew behind the system prompt; None if none need be left out.

        `num_tokens` is of the whole; None if there are too many to be counted.
        """
        messages = [*self.history, *self.new]
        room = self.max_context - self.answer_tokens

        def count(some: Sequence[Message]) -> int:
            if text.exceeds(some, self.max_context, self.tools):
                raise ContextLengthExceeded(
                    f"the system prompt and the newest turn alone have more than the {self.max_context} "
                    "tokens that the context holds:"
                    f" shorten the message, or {self.way_out}"
                )
            return len(text.first(some, **self._options()))

        def weigh(message: Message) -> int:
            return len(text.encode_prompt(message.content[: 4 * self.max_context], False)) + _TURN_TOKENS

        try:
            kept = truncate(messages, min(room, int(TRUNCATE_TO * self.max_context)), count, weigh=weigh)
        except ContextLengthExceeded:
            kept = truncate(messages, self.max_context - 1, count, self.way_out, weigh=weigh)
        dropped = kept.dropped + self.left_out
        if not dropped:
            return None
        tokens = tuple(text.first(kept.messages, **self._options()))
        earlier = kept.messages[: len(kept.messages) - self.num_own]
        gone = self._num_gone(kept, len(tokens)) if num_tokens is None else num_tokens - len(tokens)
        return WrittenChat(tokens, 0, min(len(tokens), self._count(text, earlier)), None, dropped, gone)

    def _num_gone(self, kept: Truncated, num_tokens: int) -> int:
        """About how many tokens were left out, where counting them would take too long.

        As many a character as what is kept has.
        """
        chars = max(1, chars_of(kept.messages))
        return max(
            0,
            round(
                num_tokens
                * (self.left_out_chars + chars_of(self.history) + chars_of(self.new) - chars)
                / chars
            ),
        )


_TURN_TOKENS = 5  # about what a template writes around a message


def _newest_turn(messages: Sequence[Message]) -> Sequence[Message]:
    """From the last user's message on: what is never left out."""
    return messages[next((i for i in range(len(messages) - 1, -1, -1) if messages[i].role == "user"), 0) :]


def check_length(
    messages: Sequence[Message], tools_chars: int, max_chars: int, max_context: int, way_out: str
) -> None:
    """Refuse at once what cannot fit, by its characters alone.

    Raises:
        ContextLengthExceeded: it has more characters than the context's tokens can hold.
        InvalidRequest: there is nothing to answer.
    """
    if not messages:
        raise InvalidRequest("there is nothing to answer: send at least one message")
    size = chars_of(messages) + tools_chars
    if size > max_chars:
        raise ContextLengthExceeded(
            f"the messages and tools have {size} characters or more, and the {max_context} tokens of the "
            f"context hold at most {max_chars}:"
            f" shorten them, or {way_out}"
        )
