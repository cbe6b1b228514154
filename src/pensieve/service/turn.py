"""One turn: what a caller asks for, what it becomes on its way, what it ends as. Knows no queues, engines or stores."""

from __future__ import annotations

import enum
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from pensieve.core.request import FinishReason, SamplingParams
from pensieve.engine.messages import Receipt, Token
from pensieve.message import Message, chars_of
from pensieve.store import Conversation
from pensieve.text import Detokenizer, StopStrings

Tools = tuple[Mapping[str, object], ...]


class Leaf(enum.Enum):
    """Where a turn goes on when nobody says: from the end of its conversation."""

    LEAF = "leaf"


LEAF: Final = Leaf.LEAF


@dataclass(frozen=True, slots=True)
class Path:
    """A conversation so far: its messages, and the token log that the model saw of them."""

    messages: tuple[Message, ...] = ()
    tokens: tuple[int, ...] = ()
    left_out: int = 0  # oldest messages behind the system prompt that the log does not hold any more
    unlogged: int = 0  # newest messages that the log does not hold yet: they were added without an answer
    instructions: str | None = None  # with which the log begins
    stored_chars: int = 0  # of all messages that the store has of it, those that were left out included

    @property
    def chars(self) -> int:
        """Of its messages."""
        return chars_of(self.messages)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a turn belongs."""

    conversation_id: str
    parent: str | None  # the turn it follows
    new: tuple[Message, ...]  # messages that the parent's path does not hold
    conversation: Conversation | None = None  # as it is in the store; None: it is to be made


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is given, and where it came from."""

    tokens: tuple[int, ...] = ()
    history_tokens: int = 0  # of `tokens`, those of earlier turns
    reused_tokens: int = 0  # leading tokens that are those of the parent's log
    rewritten_at: int | None = None  # the template wrote earlier turns differently from this token on
    parent: str | None = None
    new: tuple[Message, ...] = ()
    path: Path = Path()  # what the new messages follow
    truncated_tokens: int = 0
    warning: str | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of an answer, as it is shown."""

    text: str  # perhaps empty: a token may end within a character
    tokens: tuple[Token, ...]  # sampled since the last piece


@dataclass(frozen=True, slots=True)
class Composed:
    """What an answer is stored as."""

    message: Message
    meta: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TurnDone:
    """An answered turn. When it is handed out, the turn is durable."""

    text: str  # without `TurnSpec.prefix`
    prompt: tuple[int, ...]  # all tokens the model was given
    output: tuple[int, ...]  # the answer's tokens as they stand in the log
    logprobs: tuple[float, ...]  # per sampled token, if asked for
    tops: tuple[tuple[tuple[int, float], ...], ...]
    reason: FinishReason
    receipt: Receipt
    turn_id: str | None  # None: not stored (a replay, or an answer that was aborted before its first token)
    warning: str | None  # what a rewriting template or a dropped turn cost
    message: Message | None = None  # the answer as stored; None: a replay


@dataclass(frozen=True, slots=True)
class TurnSpec:
    """A turn as a caller asks for it."""

    namespace: str
    conversation_id: (
        str | None
    )  # None: found by `after`, or else by `messages`, which are a whole history then
    messages: tuple[Message, ...]  # to append and answer
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    after: str | Leaf | None = (
        LEAF  # id of the turn that it follows; not the leaf: a branch. None: a new beginning
    )
    hint: str | None = None  # of a resent history: the conversation that it probably is
    instructions: str | None = None  # the system's words for this turn alone
    tools: Tools = ()
    prefix: str = ""  # what the answer is made to begin with
    overflow: Literal["refuse", "truncate"] | None = None  # None: the service's
    durable: bool = True  # False: kept in memory only, while the process lives
    must_exist: bool = False  # the conversation is not made if it is not there
    claimed: bool = False  # an idempotency key stands for it: it is stored only while that is so
    turn_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    meta: Mapping[str, object] = field(default_factory=dict)  # stored with the turn
    watch: Callable[[str], bool] | None = None  # is shown the answer piece by piece; says when it is enough
    compose: Callable[[TurnDone], Composed] | None = None  # None: the answer's text as an assistant's message
    forced: Path | None = None  # go on from here instead of what is stored, and store nothing
    raw: tuple[tuple[int, ...], int] | None = (
        None  # (tokens, history tokens): the prompt as it is, nothing stored
    )
    raw_text: bool = False  # with `raw`: the answer is wanted as text too


@dataclass(slots=True, eq=False)
class PendingTurn:
    """A turn on its way: wait on `future`, or abort it. Written by the service's thread only."""

    spec: TurnSpec
    submitted_s: float
    on_piece: Callable[[Piece], None] | None = None
    future: Future[TurnDone] = field(default_factory=Future)

    conversation_id: str = ""  # known once the turn has its place
    place: Place | None = None
    prompt: Prompt = field(default_factory=Prompt)
    writing: Future[Any] | None = None  # its prompt, or its answer's last words, while the text room is at it
    opened: bool = False  # the store knows of it
    created: bool = False  # its conversation was made for it, and nothing was stored there yet
    drafted: bool = False
    detokenizer: Detokenizer | None = None
    stops: StopStrings | None = None
    sampled: list[Token] = field(default_factory=list)
    unshown: list[Token] = field(default_factory=list)  # sampled since the last piece
    shown: list[str] = field(default_factory=list)
    num_drafted: int = 0  # of `sampled`, those in the draft
    text_drafted: int = 0  # of `shown`, those in the draft
    cut: tuple[int, str] | None = None  # at a stop string: whole tokens kept, text to encode anew
    aborted: bool = False
    discarded: bool = False  # aborted, and nothing of it is to be stored unless it is whole by then
    ending: bool = False  # its answer is whole and on its way into the store
    erased: bool = False  # its conversation is being erased: nothing more is stored

    @property
    def request_id(self) -> str:
        """The engine's name for it."""
        return self.spec.turn_id

    @property
    def namespace(self) -> str:
        """Whose it is."""
        return self.spec.namespace

    @property
    def key(self) -> tuple[str, str]:
        """Its conversation, and the engine's sequence."""
        return (self.spec.namespace, self.conversation_id)

    @property
    def stored(self) -> bool:
        """Its answer goes to the store."""
        return self.spec.forced is None and self.spec.raw is None


def settle(future: Future[Any], value: object = None, *, error: BaseException | None = None) -> None:
    """Resolve a future that its owner may have cancelled meanwhile."""
    if future.done() or not future.set_running_or_notify_cancel():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)
