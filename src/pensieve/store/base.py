"""Conversations on disk: what is kept, and what any store promises. Knows messages and token ids; never text rendering or caches.

Turns form trees: a turn has a parent, a conversation points to its newest turn, its leaf. Editing an old message
makes a branch; a fork is a second conversation that points into the same tree. Nothing in a turn ever changes, but that
one which was to go and is still needed is marked so.

An answer under way is a draft: what of it is there survives a crash, and becomes a turn of its own then. A claim remembers
which turn a caller's idempotency key stands for: a whole answer, or one that its owner still makes. Owners are servers; each renews a lease
in the store, and the drafts and claims of one whose lease has lapsed are recovered by another.

A turn stores only what it added to its parent's path. Its `start` says where in the path's token log its ids begin:
normally at the parent's end, but further ahead when a chat template rewrote earlier turns. So one rule rebuilds
every log, `path_tokens`: cut the log at `start`, append the turn's ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

from pensieve.message import Message
from pensieve.store.values import (
    CLAIM_S,
    INTERRUPTED,
    LEASE_S,
    Claim,
    Conversation,
    Erased,
    Owner,
    Turn,
    path_messages,
    path_tokens,
)

__all__ = [
    "CLAIM_S",
    "INTERRUPTED",
    "LEASE_S",
    "Claim",
    "Conversation",
    "ConversationStore",
    "Erased",
    "Owner",
    "Turn",
    "path_messages",
    "path_tokens",
]


class ConversationStore(Protocol):
    """Keeps conversations. Safe to call from any thread.

    A conversation (or turn) of another namespace does not exist as far as a caller can tell. Every method raises
    `StoreError` if the storage fails, and what it changed is durable when it returns, power loss included.
    """

    def create(
        self,
        namespace: str,
        id: str | None = None,
        *,
        title: str | None = None,
        metadata: Mapping[str, object] | None = None,
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
        claimed: bool = False,
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
            claimed: an idempotency key stands for the turn: refuse to store it if that is no longer so.

        Returns:
            A future that has the turn once it is durable, and not before. It fails with `ConversationNotFound` (no such
            conversation or parent), `ConversationConflict` (`only_if_leaf`, and it is not), `InvalidRequest` (`start` or a token id out of
            range, `turn_id` taken, meta that JSON cannot hold), `AnswerLost` (its draft was recovered, or its key answered, by another server) or
            `StoreError`; nothing is stored then, unless the error says that this is unknown.
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
            owner: the server that writes the answer, as `join` knows it, so that another can recover the draft when it is dead; "": none.

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

    def join(self, owner: str, place: str) -> None:
        """Give a server a lease of `LEASE_S`, under which its drafts and claims are its own.

        Args:
            owner: a name that no other process has or had.
            place: where the process runs, for others on the same machine; see `place`.
        """
        ...

    def renew(self, owner: str, place: str) -> bool:
        """Renew a server's lease. False: it had lapsed and its answers were recovered by another; it has a new lease now."""
        ...

    def owners(self) -> Sequence[Owner]:
        """The servers that have a lease, lapsed ones included."""
        ...

    def leave(self, owner: str) -> int:
        """End a server's lease; what it left under way is recovered. Returns how many drafts."""
        ...

    def recover_drafts(self, owner: str | None = None, expires_s: float | None = None) -> int:
        """Make a turn of each draft whose writer is dead: a branch that no conversation ends with, and that can be gone on from.

        Its last message is the assistant's, as far as it came; its `reply_reason` is `INTERRUPTED`. Keys whose answer was not stored whole are free
        again, all in one transaction. A server that lives must not be recovered: its answers would be cut in two.

        Args:
            owner: whose; its lease ends. None = of all owners that have no lease.
            expires_s: only if the lease still ends then: it was neither renewed nor recovered by another server meanwhile.

        Returns:
            How many there were.
        """
        ...

    def claim(
        self,
        namespace: str,
        key: str,
        fingerprint: bytes,
        turn_id: str,
        now_s: float | None = None,
        *,
        owner: str = "",
    ) -> Claim:
        """Say which turn an idempotency key stands for, unless it stands for another one: claimed within the last `CLAIM_S`, and either stored
        whole or under way at an owner that was not recovered. Durable on return.

        Args:
            namespace: the caller's; the same key of another one is another key.
            key: as the caller sent it.
            fingerprint: of the request, so that the same key with another request can be told.
            turn_id: the turn that will answer it.
            now_s: seconds since the epoch; None = the store's clock.
            owner: the server that will answer it, as `join` knows it; "": one that never dies.

        Returns:
            This claim, `fresh`, or the first one.

        Raises:
            InvalidRequest: the key is nothing that a database can hold.
        """
        ...

    def release(self, namespace: str, key: str, turn_id: str | None = None) -> Future[None]:
        """Let go of a key whose answer failed, so that the next try is the first; nothing happens if it is not claimed. Returns at once.

        With `turn_id`, only if the key stands for that turn: a later try may have claimed it meanwhile.
        """
        ...

    def home(self, namespace: str, turn_id: str) -> str | None:
        """The conversation that a turn was added to, or the one that inherited it; None = no such turn in this namespace."""
        ...

    def purge(self, before_s: float) -> int:
        """Remove the claims made before this time whose answers are not under way; how many there were."""
        ...

    def fork(
        self, namespace: str, id: str, at: str | None = None, *, new_id: str | None = None
    ) -> Conversation:
        """Begin a conversation that shares another's turns up to `at` (None = its leaf), its title, its metadata and its time to live.

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

    def describe(
        self, namespace: str, id: str, *, title: str | None, metadata: Mapping[str, object]
    ) -> Conversation:
        """Replace a conversation's title and metadata.

        Raises:
            ConversationNotFound: no such conversation in this namespace.
            InvalidRequest: the metadata is nothing that JSON can hold.
        """
        ...

    def set_ttl(self, namespace: str, id: str, ttl_s: float | None) -> Conversation:
        """Say for how long a conversation is kept after its last use (this call, and each turn that begins or ends), in seconds; None: for ever.

        Raises:
            ConversationNotFound: no such conversation in this namespace.
            InvalidRequest: not a time.
        """
        ...

    def touch(self, namespace: str, id: str) -> Future[None]:
        """A turn of a conversation begins: its time to live begins anew. Nothing happens if it has none. Returns at once."""
        ...

    def set_pinned(self, namespace: str, id: str, pinned: bool) -> Conversation:
        """Say whether a conversation is to be kept.

        Raises:
            ConversationNotFound: no such conversation in this namespace.
        """
        ...

    def expired(self, now_s: float, limit: int = 100) -> Sequence[Conversation]:
        """Conversations of all namespaces whose time has come and that are neither pinned nor being answered, the longest overdue first."""
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

    def erase(self, namespace: str, id: str, *, overwrite: bool = True) -> Erased:
        """Delete a conversation as `delete` does, then overwrite what the storage still has of it. May take seconds.

        What cannot be overwritten now is remembered, durably and without a name: the method `overwrite` tries again. Without the argument
        `overwrite` it is only remembered.
        What lies outside the store's files is not reached: backups, snapshots and spare blocks of the file system or the drive.

        Raises:
            ConversationNotFound: no such conversation in this namespace.
        """
        ...

    def erasures(self) -> int:
        """How many conversations were deleted whose bytes may still be in the store's files, to be overwritten."""
        ...

    def overwrite(self) -> bool:
        """Overwrite what deleted conversations left in the store's files; whether nothing is left. May take seconds."""
        ...

    def trouble(self) -> str | None:
        """Why the next turn would not be stored, in a sentence: the last write failed, or does not end. None = nothing is known to be wrong."""
        ...

    def probe(self) -> None:
        """Write as much as a turn may have, to see whether the store works again.

        Raises:
            StoreError: it does not.
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
