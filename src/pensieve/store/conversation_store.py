"""Conversations that are durable: the store itself.

Knows messages, token ids and transactions; never which database, text or caches.

Turns form trees. A turn has a parent, and a conversation points to its newest turn, its leaf. Editing an old
message begins a branch; a fork is a second conversation that points into the same tree. Turns are immutable.
A deleted turn that others still build on is only marked deleted.

A turn stores only what it added to its parent's path. Its `start` says where in the path's token log its ids
begin: normally at the end of the parent's log, but earlier if a chat template rewrote earlier turns. So one
rule rebuilds every log, `path_tokens`: cut the log at `start`, append the turn's ids.
"""

from __future__ import annotations

import builtins
import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from pensieve.errors import ConversationConflict, InvalidRequest, StoreError
from pensieve.message import Message
from pensieve.store import answers, encoding, trees
from pensieve.store.answer_store import AnswerStore
from pensieve.store.values import Conversation, Erased, Turn
from pensieve.store.writer import Connection, Job, failed

log = logging.getLogger(__name__)

MAX_IDS = 500  # conversation ids in one query
MAX_INT = (1 << 63) - 1  # the largest integer that databases count with


class ConversationStore(AnswerStore):
    """Keeps conversations. Safe to call from any thread.

    A conversation or turn of another namespace does not exist for a caller. Every method raises `StoreError`
    if the storage fails. What a method changed is durable when it returns, power loss included.
    """

    # -- conversations

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
        return self._writer.call(
            self._creation(namespace, encoding.new_id() if id is None else id, title, metadata)
        )

    def create_soon(self, namespace: str, id: str, *, title: str | None = None) -> Future[Conversation]:
        """As `create`, but returns at once. What is asked of the store afterwards finds it."""
        return self._writer.submit(self._creation(namespace, id, title, None))

    def _creation(
        self, namespace: str, id: str, title: str | None, metadata: Mapping[str, object] | None
    ) -> Job[Conversation]:
        encoding.check_names(namespace=namespace, conversation_id=id)
        encoding.json_text(metadata, "a conversation's metadata")

        def job(connection: Connection) -> Conversation:
            now_s = self._clock()
            return trees.insert_conversation(
                connection, Conversation(id, namespace, None, now_s, now_s, title, metadata or {})
            )

        return job

    def get(self, namespace: str, id: str) -> Conversation:
        """Look a conversation up.

        Raises:
            ConversationNotFound: there is none of this id in this namespace.
        """
        return self._read(lambda connection: trees.get(connection, namespace, id))

    def list(self, namespace: str, limit: int = 50, offset: int = 0) -> Sequence[Conversation]:
        """The conversations of a namespace, the latest used first."""
        if not (0 <= limit <= MAX_INT and 0 <= offset <= MAX_INT):
            raise InvalidRequest(
                f"limit and offset must lie in [0, 2**63), got limit={limit}, offset={offset}"
            )
        condition = "namespace = ? ORDER BY updated_s DESC, key DESC LIMIT ? OFFSET ?"
        return (
            self._conversations(condition, (namespace, limit, offset)) if encoding.is_name(namespace) else []
        )

    def titles(self, namespace: str, ids: Sequence[str]) -> Mapping[str, str]:
        """The titles of those of these conversations that are there and have one."""
        wanted = [id for id in ids if encoding.is_name(id)] if encoding.is_name(namespace) else []

        def query(connection: Connection) -> Mapping[str, str]:
            found: dict[str, str] = {}
            for start in range(0, len(wanted), MAX_IDS):
                some = wanted[start : start + MAX_IDS]
                marks = ", ".join("?" * len(some))
                sql = f"SELECT id, title FROM conversations WHERE namespace = ? AND title IS NOT NULL AND id IN ({marks})"
                found |= {
                    str(id): encoding.title_from(title)
                    for id, title in connection.execute(sql, (namespace, *some)).fetchall()
                }
            return found

        return self._read(query)

    def count(self, namespace: str) -> int:
        """How many conversations a namespace has."""
        if not encoding.is_name(namespace):
            return 0
        query = "SELECT count(*) FROM conversations WHERE namespace = ?"
        return int(self._read(lambda connection: connection.execute(query, (namespace,)).fetchone()[0]))

    def expired(self, now_s: float, limit: int = 100) -> Sequence[Conversation]:
        """Conversations of all namespaces whose time has come and that are neither pinned nor being answered,
        the longest overdue first.
        """
        if limit < 0:
            raise InvalidRequest(f"limit must be at least 0, got {limit}")
        answered = "EXISTS (SELECT 1 FROM drafts WHERE drafts.conversation = conversations.key)"
        return self._conversations(
            f"expires_s <= ? AND pinned = 0 AND NOT {answered} ORDER BY expires_s, key LIMIT ?",
            (now_s, limit),
        )

    def fork(
        self, namespace: str, id: str, at: str | None = None, *, new_id: str | None = None
    ) -> Conversation:
        """Begin a conversation that shares another's turns up to `at` (None = its leaf), its title, its
        metadata and its time to live.

        Raises:
            ConversationNotFound: no such conversation or turn in this namespace.
            InvalidRequest: the new id is taken.
        """
        new_id = encoding.new_id() if new_id is None else new_id
        encoding.check_names(conversation_id=new_id)

        def job(connection: Connection) -> Conversation:
            origin = trees.get(connection, namespace, id)
            if at is not None:
                trees.check_turn(connection, namespace, at)
            now_s, leaf = self._clock(), origin.leaf if at is None else at
            expires_s = None if origin.ttl_s is None else now_s + origin.ttl_s
            fork = Conversation(
                new_id,
                namespace,
                leaf,
                now_s,
                now_s,
                origin.title,
                origin.metadata,
                expires_s,
                ttl_s=origin.ttl_s,
            )
            return trees.insert_conversation(connection, fork)

        return self._writer.call(job)

    def set_leaf(self, namespace: str, id: str, turn_id: str | None) -> Conversation:
        """Point a conversation to another turn: an earlier one, or another branch.

        Raises:
            ConversationNotFound: no such conversation or turn in this namespace.
        """

        def job(connection: Connection) -> Conversation:
            key = trees.key_of(connection, namespace, id)
            if turn_id is not None:
                trees.check_turn(connection, namespace, turn_id)
            trees.set_leaf(connection, key, turn_id, self._clock())
            return trees.get(connection, namespace, id)

        return self._writer.call(job)

    def describe(
        self, namespace: str, id: str, *, title: str | None, metadata: Mapping[str, object]
    ) -> Conversation:
        """Replace a conversation's title and metadata.

        Raises:
            ConversationNotFound: no such conversation in this namespace.
            InvalidRequest: the metadata is nothing that JSON can hold.
        """
        text = encoding.json_text(metadata, "a conversation's metadata")
        return self._set(namespace, id, title=encoding.title_text(title), metadata=text)

    def set_ttl(self, namespace: str, id: str, ttl_s: float | None) -> Conversation:
        """Say for how long a conversation is kept after its last use (this call, and each turn that begins or
        ends), in seconds; None: for ever.

        Raises:
            ConversationNotFound: no such conversation in this namespace.
            InvalidRequest: not a time.
        """
        if ttl_s is not None and not (math.isfinite(ttl_s) and ttl_s >= 0):
            raise InvalidRequest(
                f"ttl_s must be a time in seconds, at least 0, or None for ever, got {ttl_s}"
            )
        expires_s = None if ttl_s is None else self._clock() + ttl_s
        return self._set(namespace, id, ttl_s=None if ttl_s is None else float(ttl_s), expires_s=expires_s)

    def touch(self, namespace: str, id: str) -> Future[None]:
        """A turn of a conversation begins: its time to live begins anew.

        Nothing happens if it has none. Returns at once.
        """
        return self._writer.submit(
            lambda connection: trees.touch(connection, trees.key_of(connection, namespace, id), self._clock())
        )

    def set_pinned(self, namespace: str, id: str, pinned: bool) -> Conversation:
        """Say whether a conversation is to be kept.

        Raises:
            ConversationNotFound: no such conversation in this namespace.
        """
        return self._set(namespace, id, pinned=int(pinned))

    def delete_unused(self, namespace: str, id: str) -> Future[bool]:
        """Delete a conversation that was begun for an answer which then failed.

        One without any turn or draft. Returns at once.

        Returns:
            A future of whether it went; it stays if it was used after all, and nothing happens if there is
            none.
        """
        return self._writer.submit(lambda connection: trees.delete_unused(connection, namespace, id))

    def delete(self, namespace: str, id: str) -> None:
        """Delete a conversation, its drafts and its turns.

        Those that another conversation's paths run through become that one's.

        Raises:
            ConversationNotFound: no such conversation in this namespace.
        """
        self._writer.call(lambda connection: trees.delete_conversation(connection, namespace, id))

    def erase(self, namespace: str, id: str, *, overwrite: bool = True) -> Erased:
        """Delete a conversation as `delete` does, then overwrite what the storage still has of it.

        May take seconds.

        What cannot be overwritten now is remembered, durably and without a name: the method `overwrite` tries
        again. Without the argument `overwrite` it is only remembered. What lies outside the store's files is
        not reached: backups, snapshots and spare blocks of the file system or the drive.

        Raises:
            ConversationNotFound: no such conversation in this namespace.
        """

        def job(connection: Connection) -> tuple[int, int]:
            connection.execute("INSERT INTO erasures (requested_s) VALUES (?)", (self._clock(),))
            return trees.delete_conversation(connection, namespace, id)

        turns, size = self._writer.call(job)
        return Erased(turns, size, self.overwrite() if overwrite else False)

    def erasures(self) -> int:
        """How many conversations were deleted whose bytes may still be in the store's files, to be
        overwritten.
        """
        return int(
            self._read(lambda connection: connection.execute("SELECT count(*) FROM erasures").fetchone()[0])
        )

    def overwrite(self) -> bool:
        """Overwrite what deleted conversations left in the store's files; whether nothing is left.

        May take seconds.
        """
        (last,) = self._read(lambda connection: connection.execute("SELECT max(id) FROM erasures").fetchone())
        done, complete = self._scrub()
        if done and last is not None:  # those that came meanwhile may have been missed
            self._writer.call(
                lambda connection: connection.execute("DELETE FROM erasures WHERE id <= ?", (last,))
            )
        return complete

    # -- turns

    def path(self, namespace: str, turn_id: str | None) -> Sequence[Turn]:
        """The turns from the root to this one; none for None.

        Raises:
            ConversationNotFound: no such turn in this namespace.
        """
        return (
            []
            if turn_id is None
            else self._read(lambda connection: trees.path(connection, namespace, turn_id))
        )

    def turn(self, namespace: str, turn_id: str) -> Turn:
        """Look a turn up.

        Raises:
            ConversationNotFound: no such turn in this namespace.
        """
        return self._read(lambda connection: trees.get_turn(connection, namespace, turn_id))

    def leaves(self, namespace: str, turn_id: str) -> Sequence[Conversation]:
        """The conversations that end with this turn, the latest used first."""
        return self._read(lambda connection: trees.leaves(connection, namespace, turn_id))

    def find(self, namespace: str, digests: Sequence[bytes]) -> tuple[int, Turn] | None:
        """Recognise a history that was sent again.

        The longest part of it, from its first message on, that a stored turn ends with.

        Args:
            namespace: the caller's.
            digests: `chat.path_digests` of the history, one for each message, oldest first.

        Returns:
            Index into `digests` and the turn; of several such turns one that is a conversation's leaf rather
            than another, then the newest. None = nothing of it is known.
        """
        return self._read(lambda connection: trees.find(connection, namespace, digests))

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
        """Add a turn and make it the conversation's leaf; a draft of its id goes with that.

        Returns at once; the work is done elsewhere.

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
            A future that has the turn once it is durable, and not before. It fails with
            `ConversationNotFound` (no such conversation or parent), `ConversationConflict` (`only_if_leaf`,
            and it is not), `InvalidRequest` (`start` or a token id out of range, `turn_id` taken, meta that
            JSON cannot hold), `AnswerLost` (its draft was recovered, or its key answered, by another server)
            or `StoreError`; nothing is stored then, unless the error says that this is unknown. Its callbacks
            run on the store's thread: keep them short.
        """
        try:
            content = encoding.Content.of(messages, token_ids, meta)
            encoding.check_names(turn_id=turn_id, reply_reason=reply_reason)
        except InvalidRequest as error:
            return failed(error)
        chosen, made = turn_id is not None, encoding.new_id() if turn_id is None else turn_id

        def job(connection: Connection) -> Turn:
            key = trees.key_of(connection, namespace, conversation_id)
            if only_if_leaf and trees.get(connection, namespace, conversation_id).leaf != parent:
                raise ConversationConflict(
                    f"conversation {conversation_id!r} went on elsewhere while this turn was answered "
                    "(another process uses the same store): "
                    "it was not stored; ask again"
                )
            if chosen:
                answers.check_free(connection, made, key)
                answers.discard_draft(connection, made)
            if claimed:
                answers.check_claimed(connection, namespace, made)
            at = trees.insert_point(connection, namespace, key, parent, start, made)
            now_s = self._clock()
            turn = trees.insert_turn(connection, namespace, at, made, content, reply_reason, now_s)
            trees.set_leaf(connection, key, made, now_s)
            return turn

        return self._writer.submit(job)

    def home(self, namespace: str, turn_id: str) -> str | None:
        """The conversation that a turn was added to, or the one that inherited it.

        None = no such turn in this namespace.
        """
        return self._read(lambda connection: trees.home(connection, namespace, turn_id))

    def delete_turn(self, namespace: str, turn_id: str) -> bool:
        """Delete a turn if nothing depends on it.

        No turn, no draft and no conversation but its own, which then ends with the turn's parent.

        Otherwise it stays, its meta marked `{"deleted": true}`.

        Returns:
            Whether it went.

        Raises:
            ConversationNotFound: no such turn in this namespace.
        """
        return self._writer.call(
            lambda connection: trees.delete_turn(connection, namespace, turn_id, self._clock())
        )

    # -- inside

    def _conversations(self, condition: str, values: Sequence[Any]) -> builtins.list[Conversation]:
        """Those that can be read: one that is damaged is named in the log, and does not take the others with
        it.
        """
        query = f"SELECT {encoding.CONVERSATION} FROM conversations WHERE {condition}"
        found = []
        for row in self._read(lambda connection: connection.execute(query, values).fetchall()):
            try:
                found.append(encoding.conversation(row))
            except StoreError as error:
                log.error("%s", error.message)
        return found

    def _set(self, namespace: str, id: str, **changed: str | float | None) -> Conversation:
        """Replace columns of a conversation."""
        columns = ", ".join(f"{column} = ?" for column in changed)

        def job(connection: Connection) -> Conversation:
            key = trees.key_of(connection, namespace, id)
            connection.execute(f"UPDATE conversations SET {columns} WHERE key = ?", (*changed.values(), key))
            return trees.get(connection, namespace, id)

        return self._writer.call(job)
