"""One turn: what a caller asks for, what it becomes on its way, what it ends as.

Knows no queues, engines or stores.
"""

from __future__ import annotations

import enum
import logging
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from pensieve.core.receipt import Receipt
from pensieve.core.request import FinishReason, SamplingParams
from pensieve.engine.messages import Token
from pensieve.errors import PensieveError
from pensieve.message import Message, chars_of
from pensieve.service.answer_parser import AnswerEvent, AnswerForm, AnswerParser
from pensieve.store import Conversation
from pensieve.text import Detokenizer, StopStrings
from pensieve.text.tool_format import Tools

log = logging.getLogger(__name__)


class Leaf(enum.Enum):
    """The default of `TurnSpec.after`: the turn follows the last one of its conversation."""

    LEAF = "leaf"


LEAF: Final = Leaf.LEAF


@dataclass(frozen=True, slots=True)
class Path:
    """A conversation so far: its messages, and the tokens that the model was given for them."""

    messages: tuple[Message, ...] = ()
    tokens: tuple[int, ...] = ()
    left_out: int = 0  # number of oldest messages behind the system prompt that `tokens` no longer holds
    unlogged: int = 0  # number of newest messages that `tokens` does not hold yet: added without an answer
    instructions: str | None = None  # the system prompt of one turn that `tokens` begins with, if any
    stored_chars: int = 0  # characters of all stored messages, including those that were left out

    @property
    def chars(self) -> int:
        """Characters of its messages."""
        return chars_of(self.messages)


@dataclass(frozen=True, slots=True)
class TurnPosition:
    """Where a turn goes in the tree of turns."""

    conversation_id: str
    parent: str | None  # id of the turn that it follows; None at the beginning
    new: tuple[Message, ...]  # messages that the parent's path does not hold
    conversation: Conversation | None = None  # as stored; None if the turn creates it


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens that the model is given, and where they came from."""

    tokens: tuple[int, ...] = ()
    history_tokens: int = 0  # number of leading `tokens` that belong to earlier turns
    reused_tokens: int = 0  # number of leading `tokens` that were taken from the parent's log as they are
    rewritten_at: int | None = None  # first token that the template wrote differently this time
    parent: str | None = None
    new: tuple[Message, ...] = ()
    path: Path = Path()  # what the new messages follow
    truncated_tokens: int = 0
    warning: str | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of an answer, as it is streamed."""

    text: str  # may be empty: a token can end within a character
    tokens: tuple[Token, ...]  # sampled since the previous piece
    events: tuple[AnswerEvent, ...] = ()  # what the turn's parser read in it; empty without `TurnSpec.form`


@dataclass(frozen=True, slots=True)
class TurnDone:
    """An answered turn. It is durable by the time a caller gets this."""

    text: str  # without the form's prefix
    prompt: tuple[int, ...]  # all tokens that the model was given
    output: tuple[int, ...]  # the answer's tokens as they stand in the log
    logprobs: tuple[float, ...]  # of each sampled token, if asked for
    tops: tuple[tuple[tuple[int, float], ...], ...]
    reason: FinishReason
    receipt: Receipt
    turn_id: str | None  # None if it was not stored: a replay, or aborted before its first token
    warning: str | None  # what a rewriting template or a truncated history cost
    message: Message | None = None  # the answer as a message; None if only token ids are wanted


@dataclass(frozen=True, slots=True)
class TurnSpec:
    """A turn as a caller asks for it."""

    namespace: str
    # None if it is to be found: by `after`, or else by `messages`, which are then the whole history
    conversation_id: str | None
    messages: tuple[Message, ...]  # to append and answer
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    # id of the turn that it follows; one that has a successor makes a branch; None begins a new path
    after: str | Leaf | None = LEAF
    hint: str | None = None  # id of the conversation that a resent history probably belongs to
    instructions: str | None = None  # system prompt of this turn alone
    form: AnswerForm | None = None  # how the answer is parsed; None if only its text is wanted
    overflow: Literal["refuse", "truncate"] | None = None  # None for the service's default
    durable: bool = True  # False to keep it in memory only, while the process lives
    must_exist: bool = False  # refuse an unknown conversation instead of creating it
    claimed: bool = False  # an idempotency key stands for it: it is stored only while that is so
    turn_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    # metadata to store with a finished answer; called on the service's thread
    answer_meta: Callable[[TurnDone], Mapping[str, object]] | None = None
    forced: Path | None = None  # continue from this path instead of the stored one, and store nothing
    raw: tuple[tuple[int, ...], int] | None = None  # (prompt, history tokens): use as it is, store nothing
    raw_text: bool = False  # with `raw`: the answer is wanted as text too

    @property
    def tools(self) -> Tools:
        """The functions that the model is told of."""
        return () if self.form is None else self.form.tools

    @property
    def prefix(self) -> str:
        """Text that the answer is made to begin with."""
        return "" if self.form is None else self.form.prefix


@dataclass(slots=True, eq=False)
class PendingTurn:
    """A turn on its way: wait on `future`, or abort it. Sole owner of the answer so far.

    Written by the service's thread only. `pieces` only grows: another thread may read those that `on_piece`
    was called for.
    """

    spec: TurnSpec
    submitted_s: float  # monotonic clock
    on_piece: Callable[[Piece], None] | None = None
    future: Future[TurnDone] = field(default_factory=Future)

    conversation_id: str = ""  # known once the turn has its position
    position: TurnPosition | None = None
    prompt: Prompt = field(default_factory=Prompt)
    writing: Future[Any] | None = (
        None  # the text room's job under way: the prompt, or the answer's last words
    )
    opened: bool = False  # the store knows of it
    created: bool = False  # its conversation was created for it, and no turn is stored there yet
    drafted: bool = False  # the store holds a draft of it
    detokenizer: Detokenizer | None = None  # None if only token ids are wanted
    stops: StopStrings | None = None
    parser: AnswerParser | None = None
    events: list[AnswerEvent] = field(default_factory=list)  # parsed, for the next piece
    sampled: list[Token] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    num_in_pieces: int = 0  # number of leading `sampled` tokens that `pieces` hold
    num_drafted: int = 0  # number of leading `sampled` tokens that the draft holds
    pieces_drafted: int = 0  # number of leading `pieces` whose text the draft holds
    cut: tuple[int, str] | None = None  # at a stop string: whole tokens kept, text to encode anew
    aborted: bool = False
    discarded: bool = False  # aborted, and not to be stored unless the answer is complete by then
    ending: bool = False  # the answer is complete and on its way into the store
    erased: bool = False  # its conversation is being erased: it is not stored

    @property
    def request_id(self) -> str:
        """The engine's name for it."""
        return self.spec.turn_id

    @property
    def namespace(self) -> str:
        """The namespace of its conversation and KV cache."""
        return self.spec.namespace

    @property
    def key(self) -> tuple[str, str]:
        """Namespace and id of its conversation, which are those of the engine's sequence too."""
        return (self.spec.namespace, self.conversation_id)

    @property
    def stored(self) -> bool:
        """Whether its answer goes to the store."""
        return self.spec.forced is None and self.spec.raw is None

    @property
    def text(self) -> str:
        """The answer's text so far."""
        return "".join(piece.text for piece in self.pieces)


def settle(future: Future[Any], value: object = None, *, error: BaseException | None = None) -> None:
    """Resolve a future that its owner may have cancelled meanwhile."""
    if future.done() or not future.set_running_or_notify_cancel():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)


def as_pensieve_error(what: str, error: BaseException) -> PensieveError:
    """An error as callers may see it: a `PensieveError` as it is, any other (a bug) logged and described by
    `what` failed.
    """
    if isinstance(error, PensieveError):
        return error
    log.error("%s", what, exc_info=error)
    return PensieveError(f"{what}: {type(error).__name__}: {error}")
