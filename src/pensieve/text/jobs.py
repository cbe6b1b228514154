"""Jobs for a tokenizer and template, as values that can be sent to another process.

Knows text; never processes, stores or requests.

A tokenizer holds Python's interpreter lock while it works, and a chat template can loop for ever. So a
client's text is never rendered or tokenized on a shared thread: it is a job for a `TextRunner`. A server runs
jobs in processes of their own (`pensieve.text.workers`), a terminal runs them at once (`InlineRunner`).
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
from pensieve.text.chat_text import ChatText
from pensieve.text.overflow import Truncated, size_of, surely_exceed, truncate

log = logging.getLogger(__name__)

MESSAGE_CHARS = 64  # characters that are tokenized in the time in which a template writes a message
SIZED_CHARS = 1 << 17  # characters of tools; longer ones count as this many
CONTEXT_HOLDS = "that the context holds: send less"
T = TypeVar("T")
Tools = tuple[Mapping[str, object], ...]

# After an overflow the chat is cut to this share of the context, so that the next turns append again instead
# of cutting, and prefilling anew, each time.
TRUNCATE_TO = 0.75


class TextJob(ABC, Generic[T]):
    """A job for a tokenizer and template. It pickles, and so does its result."""

    @property
    @abstractmethod
    def num_chars(self) -> int:
        """Roughly the characters to be rendered and tokenized."""

    @abstractmethod
    def run(self, text: ChatText) -> T:
        """Run the job and return its result.

        Raises:
            PensieveError: the job has no result.
        """


def run_job(job: TextJob[T], text: ChatText) -> T:
    """Run a job.

    Raises:
        InvalidRequest: the tokenizer itself fails on this text: the Rust library panics, for example if a
            search needs too many tries.
        PensieveError: what the job raises.
    """
    try:
        return job.run(text)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # its module has no file, and it is no `Exception`
            raise
        raise InvalidRequest(f"the model's tokenizer fails at this text: {error}") from None


class TextRunner(Protocol):
    """Runs jobs."""

    def submit(self, job: TextJob[T], tenant: str = "") -> Future[T]:
        """Run a job for a tenant. Cancelling the future ends it. The future fails with a `PensieveError`."""
        ...


class InlineRunner:
    """Runs each job at once, in the calling thread: for a single user whose model is trusted."""

    def __init__(self, text: ChatText) -> None:
        self._text = text

    def submit(self, job: TextJob[T], tenant: str = "") -> Future[T]:
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
    """The token ids of text that is not a chat."""

    text: str
    max_tokens: int | None = None  # more raise an error
    add_special_tokens: bool = True
    way_out: str = CONTEXT_HOLDS  # for the error: whose limit it is, and what helps

    @property
    def num_chars(self) -> int:
        return len(self.text)

    def run(self, text: ChatText) -> tuple[int, ...]:
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
    """The token ids of an answer's last text, if it was cut inside a token."""

    text: str

    @property
    def num_chars(self) -> int:
        return len(self.text)

    def run(self, text: ChatText) -> tuple[int, ...]:
        return tuple(text.encode_text(self.text))


@dataclass(frozen=True, slots=True)
class EncodeChat(TextJob[tuple[int, ...]]):
    """The token ids of a chat as the model's prompt."""

    messages: tuple[Message, ...]
    max_tokens: int
    add_generation_prompt: bool = True
    way_out: str = CONTEXT_HOLDS

    @property
    def num_chars(self) -> int:
        """The characters of all messages, and the cost of writing each."""
        return chars_of(self.messages) + MESSAGE_CHARS * len(self.messages)

    def run(self, text: ChatText) -> tuple[int, ...]:
        """The ids.

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
    """The text of token ids, with control tokens."""

    ids: tuple[int, ...]

    @property
    def num_chars(self) -> int:
        """Roughly as many as a token has."""
        return 4 * len(self.ids)

    def run(self, text: ChatText) -> str:
        return text.decode_all(self.ids)


@dataclass(frozen=True, slots=True)
class WrittenChat:
    """A turn's prompt."""

    tokens: tuple[int, ...]  # after the tokens of the log that stay
    reused_tokens: int = 0  # leading tokens of the log that stay
    history_tokens: int = 0  # of all tokens, those of earlier turns
    warning: str | None = None  # a sentence if the template writes earlier turns differently; None if not
    dropped: int = 0  # messages left out because the context is full, the oldest first
    dropped_tokens: int = 0  # tokens of those messages; an estimate if they have many times the context's


@dataclass(frozen=True, slots=True)
class WriteChat(TextJob[WrittenChat]):
    """Write a turn's prompt: append to its conversation's token log, or render the chat as a whole."""

    history: tuple[Message, ...]  # the messages in the log
    new: tuple[Message, ...]  # the messages after it
    log: tuple[int, ...]  # empty if there is none, or if it cannot be continued
    max_context: int
    answer_tokens: int = 0  # tokens to leave for the answer, when truncating
    truncating: bool = False
    left_out: int = 0  # messages before `history` that are not even sent here, since they cannot fit
    left_out_chars: int = 0
    num_own: int = 0  # of `new`, the newest messages, which this turn itself brings
    tools: Tools = ()
    prefix: str = ""  # text that the answer must begin with
    way_out: str = "start with a larger --max-context"

    @property
    def num_chars(self) -> int:
        """The characters of the new messages; those of the log are rendered, but not tokenized."""
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
        """The whole chat as a prompt, and its number of tokens."""
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
        """The chat without its oldest turns, rendered anew after the system prompt.

        `num_tokens` is the number of tokens of the whole; None if they are too many to be counted. Returns
        None if no turn must be left out.
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
        """Tokens that were left out, estimated from the tokens a character of `kept`."""
        chars = max(1, chars_of(kept.messages))
        return max(
            0,
            round(
                num_tokens
                * (self.left_out_chars + chars_of(self.history) + chars_of(self.new) - chars)
                / chars
            ),
        )


_TURN_TOKENS = 5  # roughly what a template writes around a message


def _newest_turn(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages from the last user's on: they are never left out."""
    return messages[next((i for i in range(len(messages) - 1, -1, -1) if messages[i].role == "user"), 0) :]


def check_length(
    messages: Sequence[Message], tools_chars: int, max_chars: int, max_context: int, way_out: str
) -> None:
    """Refuse at once what cannot fit, by its characters alone.

    Raises:
        ContextLengthExceeded: it has more characters than the context's tokens can hold.
        InvalidRequest: there is no message to answer.
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
