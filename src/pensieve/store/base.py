"""Conversations on disk: what is kept, and what any store promises. Knows messages and token ids; never text rendering or caches.

Turns form trees: a turn has a parent, a conversation points to its newest turn, its leaf. Editing an old message
makes a branch; a fork is a second conversation that points into the same tree. Nothing in a turn ever changes, but that
one which was to go and is still needed is marked so.

An answer under way is a draft: what of it is there survives a crash, and becomes a turn of its own then. A claim remembers
which turn a caller's idempotency key stands for.

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

INTERRUPTED = "interrupted"  # the reply_reason of an answer that a crash cut short
CLAIM_S = 24 * 3600.0  # how long a claim holds


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
    expires_s: float | None = None  # when it may be erased, seconds since the epoch; None = never
    pinned: bool = False  # to be kept: does not expire while it is

    @property
    def key(self) -> str:
        """A name that no other conversation of any namespace has."""
        return f"{len(self.namespace)}:{self.namespace}:{self.id}"


@dataclass(frozen=True, slots=True)
class Claim:
    """What an idempotency key stands for."""

    turn_id: str  # the turn of the caller who came first
    fingerprint: bytes  # of the first caller's request
    fresh: bool  # nobody had this key: the caller is the first


@dataclass(frozen=True, slots=True)
class Erased:
    """What was erased with a conversation."""

    turns: int  # those that no other conversation's paths run through
    bytes: int  # of their messages, token ids and meta, and of drafts
    complete: bool  # nothing of it is left in the store's files; False = could not be done, or (PostgreSQL) cannot be known


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

    def create_soon(self, namespace: str, id: str, *, title: str | None = None) -> Future[Conversation]:
        """As `create`, but returns at once. What is asked of the store afterwards finds it."""
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

    def titles(self, namespace: str, ids: Sequence[str]) -> Mapping[str, str]:
        """The titles of those of these conversations that are there and have one."""
        ...

    def path(self, namespace: str, turn_id: str | None) -> Sequence[Turn]:
        """The turns from the root to this one; none for None.

        Raises:
            ConversationNotFound: no such turn in this namespace.
        """
        ...

    def turn(self, namespace: str, turn_id: str) -> Turn:
        """Look a turn up.

        Raises:
            ConversationNotFound: no such turn in this namespace.
        """
        ...

    def leaves(self, namespace: str, turn_id: str) -> Sequence[Conversation]:
        """The conversations that end with this turn, the latest used first."""
        ...

    def find(self, namespace: str, digests: Sequence[bytes]) -> tuple[int, Turn] | None:
        """Recognise a history that was sent again: the longest part of it, from its first message on, that a stored turn ends with.

        Args:
            namespace: the caller's.
            digests: `chat.path_digests` of the history, one for each message, oldest first.

        Returns:
            Index into `digests` and the turn; of several such turns one that is a conversation's leaf rather than another, then the
            newest. None = nothing of it is known.
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
        turn_id: str | None = None,
        meta: Mapping[str, object] | None = None,
    ) -> Future[Turn]:
        """Add a turn and make it the conversation's leaf; a draft of its id goes with that. Returns at once; the work is done elsewhere.

        Args:
            namespace: the caller's.
            conversation_id: the conversation that goes on.
            parent: turn that it follows. Not the leaf: the turn begins a branch.
            messages: what the turn adds to the chat.
            token_ids: what it adds to the token log, each in [0, 2**32).
            start: how many tokens of the parent's path are kept in front of them; None = all.
            reply_reason: why the answer ended.
            only_if_leaf: refuse to begin a branch: the conversation must still end with `parent`.
            turn_id: the turn's id; None = a random one.
            meta: kept with the turn.

        Returns:
            A future that has the turn once it is durable, and not before. It fails with `ConversationNotFound` (no such
            conversation or parent), `ConversationConflict` (`only_if_leaf`, and it is not), `InvalidRequest` (`start` or a token id out of
            range, `turn_id` taken, meta that JSON cannot hold) or `StoreError`; nothing is stored then, unless the error says that this is unknown.
            Its callbacks run on the store's thread: keep them short.
        """
        ...

    def draft(
        self,
        namespace: str,
        conversation_id: str,
        parent: str | None,
        turn_id: str,
        messages: Sequence[Message],
        token_ids: Sequence[int],
        start: int | None,
        output_start: int,
        meta: Mapping[str, object] | None = None,
        *,
        owner: str = "",
    ) -> Future[None]:
        """An answer begins: keep its turn's prompt side. A draft that has this id already begins anew.

        The draft ends with `append` of the same `turn_id`, with `discard_draft`, or with its conversation.

        Args:
            namespace: the caller's.
            conversation_id: the conversation that goes on.
            parent: turn that it follows.
            turn_id: what the turn will be called.
            messages: what the turn adds to the chat, without the answer.
            token_ids: what it adds to the token log before the answer (and the answer's first ids, if it has any).
            start: how many tokens of the parent's path are kept in front of them; None = all.
            output_start: position in the path's token log at which the answer begins; checked to lie within or at the end of `token_ids`.
            meta: kept with the turn.
            owner: who writes the answer: the process, so that another can recover its drafts when it is dead.

        Returns:
            A future that resolves when the draft is durable. It fails as `append`'s does.
        """
        ...

    def extend_draft(self, turn_id: str, output_ids: Sequence[int], text: str) -> Future[None]:
        """An answer goes on: keep these ids and this text behind what the draft has. Costs the same however long the answer is.

        Returns:
            A future that resolves when they are durable. It fails with `ConversationNotFound` (no such draft), `InvalidRequest` (a token id
            out of range) or `StoreError`.
        """
        ...

    def discard_draft(self, turn_id: str) -> Future[None]:
        """Forget a draft; nothing happens if there is none of this id."""
        ...

    def recover_drafts(self, owner: str | None = None) -> int:
        """Make a turn of each draft whose writer is dead: a branch that no conversation ends with, and that can be gone on from.

        Its last message is the assistant's, as far as it came; its `reply_reason` is `INTERRUPTED`. For the start of the only process that
        answers, or when another is known to be dead: a draft that is still written to would be cut in two.

        Args:
            owner: whose; None = everybody's.

        Returns:
            How many there were.
        """
        ...

    def claim(self, namespace: str, key: str, fingerprint: bytes, turn_id: str, now_s: float | None = None) -> Claim:
        """Say which turn an idempotency key stands for, unless somebody else did within the last `CLAIM_S`. Durable on return.

        Args:
            namespace: the caller's; the same key of another one is another key.
            key: as the caller sent it.
            fingerprint: of the request, so that the same key with another request can be told.
            turn_id: the turn that will answer it.
            now_s: seconds since the epoch; None = the store's clock.

        Returns:
            This claim, `fresh`, or the first one.

        Raises:
            InvalidRequest: the key is nothing that a database can hold.
        """
        ...

    def release(self, namespace: str, key: str, turn_id: str | None = None) -> None:
        """Let go of a key whose answer failed, so that the next try is the first; nothing happens if it is not claimed.

        With `turn_id`, only if the key stands for that turn: a later try may have claimed it meanwhile.
        """
        ...

    def purge(self, before_s: float) -> int:
        """Remove the claims made before this time; how many there were."""
        ...

    def fork(self, namespace: str, id: str, at: str | None = None, *, new_id: str | None = None) -> Conversation:
        """Begin a conversation that shares another's turns up to `at` (None = its leaf), its title, its metadata and its time to expire.

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

    def set_ttl(self, namespace: str, id: str, expires_s: float | None) -> Conversation:
        """Say when a conversation may be erased (seconds since the epoch), or that it never may: None.

        Raises:
            ConversationNotFound: no such conversation in this namespace.
            InvalidRequest: not a time.
        """
        ...

    def set_pinned(self, namespace: str, id: str, pinned: bool) -> Conversation:
        """Say whether a conversation is to be kept.

        Raises:
            ConversationNotFound: no such conversation in this namespace.
        """
        ...

    def expired(self, now_s: float, limit: int = 100) -> Sequence[Conversation]:
        """Conversations of all namespaces whose time has come and that are not pinned, the longest overdue first."""
        ...

    def count(self, namespace: str) -> int:
        """How many conversations a namespace has."""
        ...

    def delete_unused(self, namespace: str, id: str) -> Future[bool]:
        """Delete a conversation that was begun for an answer which then failed: one without any turn or draft. Returns at once.

        Returns:
            A future of whether it went; it stays if it was used after all, and nothing happens if there is none.
        """
        ...

    def delete(self, namespace: str, id: str) -> None:
        """Delete a conversation, its drafts and its turns; those that another conversation's paths run through become that one's.

        Raises:
            ConversationNotFound: no such conversation in this namespace.
        """
        ...

    def erase(self, namespace: str, id: str) -> Erased:
        """Delete a conversation as `delete` does, then overwrite what the storage still has of it. May take seconds.

        What lies outside the store's files is not reached: backups, snapshots and spare blocks of the file system or the drive.

        Raises:
            ConversationNotFound: no such conversation in this namespace.
        """
        ...

    def delete_turn(self, namespace: str, turn_id: str) -> bool:
        """Delete a turn if nothing depends on it: no turn, no draft and no conversation but its own, which then ends with the turn's parent.

        Otherwise it stays, its meta marked `{"deleted": true}`.

        Returns:
            Whether it went.

        Raises:
            ConversationNotFound: no such turn in this namespace.
        """
        ...

    def close(self) -> None:
        """Finish what was queued and let go of the storage. Afterwards every method raises `StoreError`."""
        ...
