"""The store of durable conversations.

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

    For a caller, a conversation or turn of another namespace does not exist. Every method raises `StoreError`
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
        """Create a conversation; None draws a random id.

        Raises:
            InvalidRequest: the id is taken in this namespace, or JSON cannot hold the metadata.
        """
        return self._writer.call(
            self._creation(namespace, encoding.new_id() if id is None else id, title, metadata)
        )

    def create_soon(self, namespace: str, id: str, *, title: str | None = None) -> Future[Conversation]:
        """Create a conversation like `create`, but return at once. Later calls find it."""
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
        """A conversation by its id.

        Raises:
            ConversationNotFound: this namespace has none of this id.
        """
        return self._read(lambda connection: trees.get(connection, namespace, id))

    def list(self, namespace: str, limit: int = 50, offset: int = 0) -> Sequence[Conversation]:
        """The conversations of a namespace, the last used first."""
        if not (0 <= limit <= MAX_INT and 0 <= offset <= MAX_INT):
            raise InvalidRequest(
                f"limit and offset must lie in [0, 2**63), got limit={limit}, offset={offset}"
            )
        condition = "namespace = ? ORDER BY updated_s DESC, key DESC LIMIT ? OFFSET ?"
        return (
            self._conversations(condition, (namespace, limit, offset)) if encoding.is_name(namespace) else []
        )

    def titles(self, namespace: str, ids: Sequence[str]) -> Mapping[str, str]:
        """The titles of those of these conversations that exist and have one, by id."""
        wanted = [id for id in ids if encoding.is_name(id)] if encoding.is_name(namespace) else []

        def query(connection: Connection) -> Mapping[str, str]:
            found: dict[str, str] = {}
            for start in range(0, len(wanted), MAX_IDS):
                some = wanted[start : start + MAX_IDS]
                marks = ", ".join("?" * len(some))
                sql = (
                    "SELECT id, title FROM conversations "
                    f"WHERE namespace = ? AND title IS NOT NULL AND id IN ({marks})"
                )
                found |= {
                    str(id): encoding.title_from(title)
                    for id, title in connection.execute(sql, (namespace, *some)).fetchall()
                }
            return found

        return self._read(query)

    def count(self, namespace: str) -> int:
        """The number of conversations of a namespace."""
        if not encoding.is_name(namespace):
            return 0
        query = "SELECT count(*) FROM conversations WHERE namespace = ?"
        return int(self._read(lambda connection: connection.execute(query, (namespace,)).fetchone()[0]))

    def expired(self, now_s: float, limit: int = 100) -> Sequence[Conversation]:
        """Conversations of all namespaces whose time to live has passed, the longest overdue first.

        Leaves out those that are pinned or being answered.
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
        """Create a conversation that shares another's turns up to `at`; None takes its leaf.

        Title, metadata and time to live are copied.

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
            InvalidRequest: JSON cannot hold the metadata.
        """
        text = encoding.json_text(metadata, "a conversation's metadata")
        return self._set(namespace, id, title=encoding.title_text(title), metadata=text)

    def set_ttl(self, namespace: str, id: str, ttl_s: float | None) -> Conversation:
        """Set how many seconds a conversation is kept after its last use; None keeps it for ever.

        This call, and the begin and end of each turn, are uses.

        Raises:
            ConversationNotFound: no such conversation in this namespace.
            InvalidRequest: `ttl_s` is negative or not finite.
        """
        if ttl_s is not None and not (math.isfinite(ttl_s) and ttl_s >= 0):
            raise InvalidRequest(
                f"ttl_s must be a time in seconds, at least 0, or None for ever, got {ttl_s}"
            )
        expires_s = None if ttl_s is None else self._clock() + ttl_s
        return self._set(namespace, id, ttl_s=None if ttl_s is None else float(ttl_s), expires_s=expires_s)

    def touch(self, namespace: str, id: str) -> Future[None]:
        """Restart a conversation's time to live, if it has one, since a turn begins. Returns at once."""
        return self._writer.submit(
            lambda connection: trees.touch(connection, trees.key_of(connection, namespace, id), self._clock())
        )

    def set_pinned(self, namespace: str, id: str, pinned: bool) -> Conversation:
        """Pin a conversation, so that it does not expire, or unpin it.

        Raises:
            ConversationNotFound: no such conversation in this namespace.
        """
        return self._set(namespace, id, pinned=int(pinned))

    def delete_unused(self, namespace: str, id: str) -> Future[bool]:
        """Delete a conversation that was created for an answer which then failed. Returns at once.

        Returns:
            A future that says whether it was deleted. It stays if it has a turn or a draft; nothing happens
            if it does not exist.
        """
        return self._writer.submit(lambda connection: trees.delete_unused(connection, namespace, id))

    def delete(self, namespace: str, id: str) -> None:
        """Delete a conversation, its drafts and its turns.

        Turns that another conversation's path needs are handed over to that conversation.

        Raises:
            ConversationNotFound: no such conversation in this namespace.
        """
        self._writer.call(lambda connection: trees.delete_conversation(connection, namespace, id))

    def erase(self, namespace: str, id: str, *, overwrite: bool = True) -> Erased:
        """Delete a conversation like `delete`, then overwrite its bytes in the storage. May take seconds.

        What cannot be overwritten now is remembered, durably and without a name; the method `overwrite` tries
        again. With `overwrite=False` it is only remembered. Bytes outside the store's files are not reached:
        backups, snapshots and spare blocks of the file system or the drive.

        Raises:
            ConversationNotFound: no such conversation in this namespace.
        """

        def job(connection: Connection) -> tuple[int, int]:
            connection.execute("INSERT INTO erasures (requested_s) VALUES (?)", (self._clock(),))
            return trees.delete_conversation(connection, namespace, id)

        turns, size = self._writer.call(job)
        return Erased(turns, size, self.overwrite() if overwrite else False)

    def erasures(self) -> int:
        """The number of deleted conversations whose bytes are still to be overwritten."""
        return int(
            self._read(lambda connection: connection.execute("SELECT count(*) FROM erasures").fetchone()[0])
        )

    def overwrite(self) -> bool:
        """Overwrite the bytes of deleted conversations in the store's files. May take seconds.

        Returns:
            Whether nothing of them is left.
        """
        (last,) = self._read(lambda connection: connection.execute("SELECT max(id) FROM erasures").fetchone())
        done, complete = self._scrub()
        if done and last is not None:  # those deleted meanwhile may have been missed
            self._writer.call(
                lambda connection: connection.execute("DELETE FROM erasures WHERE id <= ?", (last,))
            )
        return complete

    # -- turns

    def path(self, namespace: str, turn_id: str | None) -> Sequence[Turn]:
        """The turns from the root to this one; none if `turn_id` is None.

        Raises:
            ConversationNotFound: no such turn in this namespace.
        """
        return (
            []
            if turn_id is None
            else self._read(lambda connection: trees.path(connection, namespace, turn_id))
        )

    def turn(self, namespace: str, turn_id: str) -> Turn:
        """A turn by its id.

        Raises:
            ConversationNotFound: no such turn in this namespace.
        """
        return self._read(lambda connection: trees.get_turn(connection, namespace, turn_id))

    def leaves(self, namespace: str, turn_id: str) -> Sequence[Conversation]:
        """The conversations that end with this turn, the last used first."""
        return self._read(lambda connection: trees.leaves(connection, namespace, turn_id))

    def find(self, namespace: str, digests: Sequence[bytes]) -> tuple[int, Turn] | None:
        """Find the longest beginning of a history at whose end a stored turn ends.

        Args:
            namespace: the caller's.
            digests: `message.path_digests` of the history, one for each message, oldest first.

        Returns:
            Index into `digests` and the turn; None if nothing of the history is stored. Of several such turns
            it is one that is a conversation's leaf, if there is one, and of those the newest.
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
        """Add a turn and make it the conversation's leaf. Ends a draft of its id. Returns at once.

        Args:
            namespace: the caller's.
            conversation_id: the conversation that continues.
            parent: the turn before it; if that is not the leaf, the turn begins a branch.
            messages: the turn's messages.
            token_ids: the turn's token ids, each in [0, 2**32).
            start: how many tokens of the parent's path are kept before them; None keeps all.
            reply_reason: why the answer ended.
            only_if_leaf: refuse to begin a branch: the conversation must still end with `parent`.
            turn_id: the turn's id; None draws a random one.
            meta: kept with the turn.
            claimed: an idempotency key is claimed for the turn: refuse to store it if that is no longer so.

        Returns:
            A future that has the turn once it is durable. It fails with `ConversationNotFound` (no such
            conversation or parent), `ConversationConflict` (`only_if_leaf`, and the leaf is another turn),
            `InvalidRequest` (`start` or a token id out of range, `turn_id` taken, meta that JSON cannot
            hold), `AnswerLost` (another server recovered its draft, or answered its key) or `StoreError`.
            Nothing is stored then, unless the error says that this is unknown. Its callbacks run on the
            store's thread: keep them short.
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
        """The conversation that a turn was added to, or that inherited it; None if there is no such turn."""
        return self._read(lambda connection: trees.home(connection, namespace, turn_id))

    def delete_turn(self, namespace: str, turn_id: str) -> bool:
        """Delete a turn if only its own conversation, which then ends with its parent, depends on it.

        If another turn, draft or conversation does, the turn stays, its meta marked `{"deleted": true}`.

        Returns:
            Whether it was deleted.

        Raises:
            ConversationNotFound: no such turn in this namespace.
        """
        return self._writer.call(
            lambda connection: trees.delete_turn(connection, namespace, turn_id, self._clock())
        )

    # -- inside

    def _conversations(self, condition: str, values: Sequence[Any]) -> builtins.list[Conversation]:
        """The conversations that can be read. A damaged one is logged and left out."""
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
