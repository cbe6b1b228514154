"""What a store keeps and says: turns, conversations, claims, owners.

Knows messages and token ids; never databases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pensieve.message import Message

INTERRUPTED = "interrupted"  # the reply_reason of an answer that a crash cut short
CLAIM_S = 24 * 3600.0  # how long a claim holds
LEASE_S = 15.0  # a server that has not renewed its lease for so long is taken for dead


@dataclass(frozen=True, slots=True)
class Turn:
    """One step of a conversation: usually a user's message and the answer. Immutable."""

    id: str  # unique in the store; not a credential
    parent: str | None  # turn id; None = the first of its path
    messages: tuple[Message, ...]  # what this turn added to the chat
    token_ids: tuple[
        int, ...
    ]  # what this turn added to the token log: its prompt's new ids, then the sampled ones
    # position in the path's token log of the first of `token_ids`; what the parent's path has after it is
    # void
    start: int
    # why the answer ended, such as "stop" or "length"; None = no answer in this turn
    reply_reason: str | None
    created_s: float  # seconds since the epoch
    digest: bytes  # `chat.extend_digest` over all messages of the path that ends with this turn
    meta: Mapping[str, object] = field(default_factory=dict)  # the caller's, anything JSON can hold

    @property
    def stop(self) -> int:
        """Number of tokens of the path that ends with this turn."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A pointer into a tree of turns."""

    id: str  # unique in its namespace; not a credential
    namespace: str
    leaf: str | None  # id of the newest turn; None = nothing said yet
    created_s: float  # seconds since the epoch
    updated_s: float  # when the leaf last moved, seconds since the epoch
    title: str | None = None
    metadata: Mapping[str, object] = field(default_factory=dict)  # the caller's, anything JSON can hold
    expires_s: float | None = (
        None  # when it may be erased, seconds since the epoch: `ttl_s` after its last use; None = never
    )
    pinned: bool = False  # to be kept: does not expire while it is
    ttl_s: float | None = None  # how long it is kept without a turn that begins or ends; None = for ever

    @property
    def key(self) -> str:
        """A name that no other conversation of any namespace has."""
        return f"{len(self.namespace)}:{self.namespace}:{self.id}"


@dataclass(frozen=True, slots=True)
class Claim:
    """What an idempotency key stands for."""

    turn_id: str  # the turn of the first request with this key
    fingerprint: bytes  # of that request
    fresh: bool  # the key was free: this request is the first
    stored: bool = False  # the turn is stored, whole: it is the answer
    owner: str = ""  # the server that answers the first request, while the turn is not stored


@dataclass(frozen=True, slots=True)
class Owner:
    """A server that has answers under way in the store."""

    id: str  # drawn anew at each start of a server
    process: str  # its process, as `processes.own_process` identifies it
    expires_s: float  # when its lease ends, by the store's clock
    lapsed: bool  # that time has passed


@dataclass(frozen=True, slots=True)
class Erased:
    """What was erased with a conversation."""

    turns: int  # those that no other conversation's paths run through
    bytes: int  # of their messages, token ids and meta, and of drafts
    # nothing of it is left in the store's files; False = not yet (see `overwrite`), or (PostgreSQL) cannot be
    # known
    complete: bool


def path_tokens(turns: Iterable[Turn]) -> list[int]:
    """The token log of a path.

    Args:
        turns: root to leaf, as `ConversationStore.path` gives them.
    """
    log: list[int] = []
    for turn in turns:
        del log[turn.start :]
        log += turn.token_ids
    return log


def path_messages(turns: Iterable[Turn]) -> list[Message]:
    """The messages of a path, oldest first."""
    return [message for turn in turns for message in turn.messages]
