"""Conversations on disk: what is kept, and what any store promises. Knows messages and token ids; never text rendering or caches.

Turns form trees: a turn has a parent, a conversation points to its newest turn, its leaf. Editing an old message
makes a branch; a fork is a second conversation that points into the same tree. Nothing in a turn ever changes.

A turn stores only what it added to its parent's path. Its `start` says where in the path's token log its ids begin:
normally at the parent's end, but further ahead when a chat template rewrote earlier turns. So one rule rebuilds
every log, `path_tokens`: cut the log at `start`, append the turn's ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from pensieve.chat import Message


@dataclass(frozen=True, slots=True)
class Turn:
    """One step of a conversation: usually a user's message and the answer. Immutable."""

    id: str  # unique in the store; not a credential
    parent: str | None  # turn id; None = the first of its path
    messages: tuple[Message, ...]  # what this turn added to the chat
    token_ids: tuple[int, ...]  # what this turn added to the token log: its prompt's new ids, then the sampled ones
    start: int  # position in the path's token log of the first of `token_ids`; what the parent's path has after it is void
    reply_reason: str | None  # why the answer ended, such as "stop" or "length"; None = no answer in this turn
    created_s: float  # seconds since the epoch

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

    @property
    def key(self) -> str:
        """A name that no other conversation of any namespace has."""
        return f"{len(self.namespace)}:{self.namespace}:{self.id}"


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


class ConversationStore(Protocol):
    """Keeps conversations. Safe to call from any thread.

    A conversation (or turn) of another namespace does not exist as far as a caller can tell. Every method raises
    `StoreError` if the storage fails, and what it changed is durable when it returns, power loss included.
    """

    def create(
        self, namespace: str, id: str | None = None, *, title: str | None = None, metadata: Mapping[str, object] | None = None
    ) -> Conversation:
        """Begin a conversation; without an id it gets a random one.

        Raises:
            InvalidRequest: the id is taken in this namespace, or the metadata is nothing that JSON can hold.
        """
        ...

    def get(self, namespace: str, id: str) -> Conversation:
        """Look a conversation up.

        Raises:
            ConversationNotFound: there is none of this id in this namespace.
        """
        ...

    def list(self, namespace: str, limit: int = 50, offset: int = 0) -> Sequence[Conversation]:
        """The conversations of a namespace, the latest used first."""
        ...

    def path(self, namespace: str, turn_id: str | None) -> Sequence[Turn]:
        """The turns from the root to this one; none for None.

        Raises:
            ConversationNotFound: no such turn in this namespace.
        """
        ...

    def append(
        self,
        namespace: str,
        conversation_id: str,
        parent: str | None,
        messages: Sequence[Message],
        token_ids: Sequence[int],
        *,
        start: int | None = None,
        reply_reason: str | None = None,
        only_if_leaf: bool = False,
    ) -> Future[Turn]:
        """Add a turn and make it the conversation's leaf. Returns at once; the work is done elsewhere.

        Args:
            namespace: the caller's.
            conversation_id: the conversation that goes on.
            parent: turn that it follows. Not the leaf: the turn begins a branch.
            messages: what the turn adds to the chat.
            token_ids: what it adds to the token log, each in [0, 2**32).
            start: how many tokens of the parent's path are kept in front of them; None = all.
            reply_reason: why the answer ended.
            only_if_leaf: refuse to begin a branch: the conversation must still end with `parent`.

        Returns:
            A future that has the turn once it is durable, and not before. It fails with `ConversationNotFound` (no such
            conversation or parent), `ConversationConflict` (`only_if_leaf`, and it is not), `InvalidRequest` (`start` or an id out of
            range) or `StoreError`; nothing is stored then.
            Its callbacks run on the store's thread: keep them short.
        """
        ...

    def fork(self, namespace: str, id: str, at: str | None = None, *, new_id: str | None = None) -> Conversation:
        """Begin a conversation that shares another's turns up to `at` (None = its leaf), its title and metadata.

        Raises:
            ConversationNotFound: no such conversation or turn in this namespace.
            InvalidRequest: the new id is taken.
        """
        ...

    def set_leaf(self, namespace: str, id: str, turn_id: str | None) -> Conversation:
        """Point a conversation to another turn: an earlier one, or another branch.

        Raises:
            ConversationNotFound: no such conversation or turn in this namespace.
        """
        ...

    def describe(self, namespace: str, id: str, *, title: str | None, metadata: Mapping[str, object]) -> Conversation:
        """Replace a conversation's title and metadata.

        Raises:
            ConversationNotFound: no such conversation in this namespace.
            InvalidRequest: the metadata is nothing that JSON can hold.
        """
        ...

    def delete(self, namespace: str, id: str) -> None:
        """Delete a conversation and its turns; those that another conversation's paths run through become that one's.

        Raises:
            ConversationNotFound: no such conversation in this namespace.
        """
        ...

    def close(self) -> None:
        """Finish what was queued and let go of the storage. Afterwards every method raises `StoreError`."""
        ...
