"""The store's values: turns, conversations, claims, owners. Knows messages and token ids; never databases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pensieve.message import Message

INTERRUPTED = "interrupted"  # the reply_reason of an answer that a crash interrupted
CLAIM_S = 24 * 3600.0  # seconds that a claim holds
LEASE_S = 15.0  # seconds after which a server that has not renewed its lease is taken for dead


@dataclass(frozen=True, slots=True)
class Turn:
    """One step of a conversation: usually a user's message and the answer. Immutable."""

    id: str  # unique in the store; not a credential
    parent: str | None  # turn id; None for the first turn of its path
    messages: tuple[Message, ...]  # what this turn added to the chat
    token_ids: tuple[
        int, ...
    ]  # this turn's part of the token log: its prompt's new ids, then the sampled ones
    # position in the path's token log of the first of `token_ids`; later ids of the parent's path are void
    start: int
    # why the answer ended, such as "stop" or "length"; None if the turn has no answer
    reply_reason: str | None
    created_s: float  # seconds since the epoch
    digest: bytes  # `message.extend_digest` over all messages of the path that ends with this turn
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
    leaf: str | None  # id of the newest turn; None if there is none yet
    created_s: float  # seconds since the epoch
    updated_s: float  # when the leaf last moved, seconds since the epoch
    title: str | None = None
    metadata: Mapping[str, object] = field(default_factory=dict)  # the caller's, anything JSON can hold
    expires_s: float | None = (
        None  # when it may be erased, in seconds since the epoch: `ttl_s` after its last use; None for never
    )
    pinned: bool = False  # a pinned conversation does not expire
    ttl_s: float | None = None  # seconds that it is kept after the begin or end of a turn; None for ever

    @property
    def key(self) -> str:
        """A name that no other conversation of any namespace has."""
        return f"{len(self.namespace)}:{self.namespace}:{self.id}"


@dataclass(frozen=True, slots=True)
class Claim:
    """The turn that an idempotency key is claimed for."""

    turn_id: str  # the turn of the first request with this key
    fingerprint: bytes  # of that request
    fresh: bool  # the key was free: this request is the first
    stored: bool = False  # whether the turn is stored whole, and so is the answer
    owner: str = ""  # the server that generates the answer, while the turn is not stored


@dataclass(frozen=True, slots=True)
class Owner:
    """A server that has answers under way in the store."""

    id: str  # drawn anew at each start of a server
    process: str  # its process, as `processes.own_process` identifies it
    expires_s: float  # when its lease ends, by the store's clock
    lapsed: bool  # whether that time has passed


@dataclass(frozen=True, slots=True)
class Erased:
    """The result of erasing a conversation."""

    turns: int  # turns that no other conversation needs
    bytes: int  # of their messages, token ids and meta, and of drafts
    # whether nothing of it is left in the store's files; False if bytes are left (see `overwrite`), or if
    # that is unknown (PostgreSQL)
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
