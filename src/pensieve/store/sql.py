"""A conversation store in any SQL database: threads, checks of what callers pass, and the steps of `trees` and `answers` in transactions.

Knows the promises of `base`; never which database it is, tokens' meaning, models or caches. One thread writes (`writer`), with group
commit; how reading goes and how deleted bytes are overwritten is the database's own business.
"""

from __future__ import annotations

import builtins
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from pensieve.errors import ConversationConflict, InvalidRequest, StoreError
from pensieve.message import Message
from pensieve.store import answers, owners, rows, trees
from pensieve.store.values import Claim, Conversation, Erased, Owner, Turn
from pensieve.store.writer import C, Connection, GroupWriter, Job

log = logging.getLogger(__name__)

T = TypeVar("T")

PROBE_BYTES = 64 << 10  # a turn of some thousand tokens
MAX_IDS = 500  # in one query
MAX_INT = (1 << 63) - 1  # what databases count with


class SqlStore(Generic[C]):
    """A `ConversationStore` over a writer; a database's own class adds `_read`, `_scrub`, and its clock where several machines share it."""

    _writer: GroupWriter[C]
    _clock: Callable[[], float]  # seconds since the epoch

    def _read(self, query: Job[Connection, T]) -> T:
        """Run a query that sees one state, beside the writer."""
        raise NotImplementedError

    def _scrub(self) -> tuple[bool, bool]:
        """Overwrite what deleted rows left in the store's files: whether that was done, and whether nothing is left for sure."""
        raise NotImplementedError

    def _now_s(self, connection: Connection) -> float:
        """The time that leases go by."""
        return self._clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """See `ConversationStore.close`."""
        self._writer.close()

    # -- conversations

    def create(
        self,
        namespace: str,
        id: str | None = None,
        *,
        title: str | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> Conversation:
        """See `ConversationStore.create`."""
        return self._writer.call(
            self._creation(namespace, rows.new_id() if id is None else id, title, metadata)
        )

    def create_soon(self, namespace: str, id: str, *, title: str | None = None) -> Future[Conversation]:
        """See `ConversationStore.create_soon`."""
        return self._writer.submit(self._creation(namespace, id, title, None))

    def _creation(
        self, namespace: str, id: str, title: str | None, metadata: Mapping[str, object] | None
    ) -> Job[Connection, Conversation]:
        rows.check_names(namespace=namespace, conversation_id=id)
        rows.json_text(metadata, "a conversation's metadata")

        def job(connection: Connection) -> Conversation:
            now_s = self._clock()
            return trees.insert_conversation(
                connection, Conversation(id, namespace, None, now_s, now_s, title, metadata or {})
            )

        return job

    def get(self, namespace: str, id: str) -> Conversation:
        """See `ConversationStore.get`."""
        return self._read(lambda connection: trees.get(connection, namespace, id))

    def list(self, namespace: str, limit: int = 50, offset: int = 0) -> Sequence[Conversation]:
        """See `ConversationStore.list`."""
        if not (0 <= limit <= MAX_INT and 0 <= offset <= MAX_INT):
            raise InvalidRequest(
                f"limit and offset must lie in [0, 2**63), got limit={limit}, offset={offset}"
            )
        condition = "namespace = ? ORDER BY updated_s DESC, key DESC LIMIT ? OFFSET ?"
        return self._conversations(condition, (namespace, limit, offset)) if rows.is_name(namespace) else []

    def titles(self, namespace: str, ids: Sequence[str]) -> Mapping[str, str]:
        """See `ConversationStore.titles`."""
        wanted = [id for id in ids if rows.is_name(id)] if rows.is_name(namespace) else []

        def query(connection: Connection) -> Mapping[str, str]:
            found: dict[str, str] = {}
            for start in range(0, len(wanted), MAX_IDS):
                some = wanted[start : start + MAX_IDS]
                marks = ", ".join("?" * len(some))
                sql = f"SELECT id, title FROM conversations WHERE namespace = ? AND title IS NOT NULL AND id IN ({marks})"
                found |= {
                    str(id): rows.title_from(title)
                    for id, title in connection.execute(sql, (namespace, *some)).fetchall()
                }
            return found

        return self._read(query)

    def count(self, namespace: str) -> int:
        """See `ConversationStore.count`."""
        if not rows.is_name(namespace):
            return 0
        query = "SELECT count(*) FROM conversations WHERE namespace = ?"
        return int(self._read(lambda connection: connection.execute(query, (namespace,)).fetchone()[0]))

    def expired(self, now_s: float, limit: int = 100) -> Sequence[Conversation]:
        """See `ConversationStore.expired`."""
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
        """See `ConversationStore.fork`."""
        new_id = rows.new_id() if new_id is None else new_id
        rows.check_names(conversation_id=new_id)

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
        """See `ConversationStore.set_leaf`."""

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
        """See `ConversationStore.describe`."""
        text = rows.json_text(metadata, "a conversation's metadata")
        return self._set(namespace, id, title=rows.title_text(title), metadata=text)

    def set_ttl(self, namespace: str, id: str, ttl_s: float | None) -> Conversation:
        """See `ConversationStore.set_ttl`."""
        if ttl_s is not None and not (math.isfinite(ttl_s) and ttl_s >= 0):
            raise InvalidRequest(
                f"ttl_s must be a time in seconds, at least 0, or None for ever, got {ttl_s}"
            )
        expires_s = None if ttl_s is None else self._clock() + ttl_s
        return self._set(namespace, id, ttl_s=None if ttl_s is None else float(ttl_s), expires_s=expires_s)

    def touch(self, namespace: str, id: str) -> Future[None]:
        """See `ConversationStore.touch`."""
        return self._writer.submit(
            lambda connection: trees.touch(connection, trees.key_of(connection, namespace, id), self._clock())
        )

    def set_pinned(self, namespace: str, id: str, pinned: bool) -> Conversation:
        """See `ConversationStore.set_pinned`."""
        return self._set(namespace, id, pinned=int(pinned))

    def delete_unused(self, namespace: str, id: str) -> Future[bool]:
        """See `ConversationStore.delete_unused`."""
        return self._writer.submit(lambda connection: trees.delete_unused(connection, namespace, id))

    def delete(self, namespace: str, id: str) -> None:
        """See `ConversationStore.delete`."""
        self._writer.call(lambda connection: trees.delete_conversation(connection, namespace, id))

    def erase(self, namespace: str, id: str, *, overwrite: bool = True) -> Erased:
        """See `ConversationStore.erase`."""

        def job(connection: Connection) -> tuple[int, int]:
            connection.execute("INSERT INTO erasures (requested_s) VALUES (?)", (self._clock(),))
            return trees.delete_conversation(connection, namespace, id)

        turns, size = self._writer.call(job)
        return Erased(turns, size, self.overwrite() if overwrite else False)

    def erasures(self) -> int:
        """See `ConversationStore.erasures`."""
        return int(
            self._read(lambda connection: connection.execute("SELECT count(*) FROM erasures").fetchone()[0])
        )

    def overwrite(self) -> bool:
        """See `ConversationStore.overwrite`."""
        (last,) = self._read(lambda connection: connection.execute("SELECT max(id) FROM erasures").fetchone())
        done, complete = self._scrub()
        if done and last is not None:  # those that came meanwhile may have been missed
            self._writer.call(
                lambda connection: connection.execute("DELETE FROM erasures WHERE id <= ?", (last,))
            )
        return complete

    # -- the storage itself

    def trouble(self) -> str | None:
        """See `ConversationStore.trouble`."""
        return self._writer.trouble()

    def probe(self) -> None:
        """See `ConversationStore.probe`."""

        def job(connection: Connection) -> None:
            connection.execute("DELETE FROM probe")
            connection.execute("INSERT INTO probe (filler) VALUES (?)", (bytes(PROBE_BYTES),))

        self._writer.probe(job)

    # -- turns

    def path(self, namespace: str, turn_id: str | None) -> Sequence[Turn]:
        """See `ConversationStore.path`."""
        return (
            []
            if turn_id is None
            else self._read(lambda connection: trees.path(connection, namespace, turn_id))
        )

    def turn(self, namespace: str, turn_id: str) -> Turn:
        """See `ConversationStore.turn`."""
        return self._read(lambda connection: trees.get_turn(connection, namespace, turn_id))

    def leaves(self, namespace: str, turn_id: str) -> Sequence[Conversation]:
        """See `ConversationStore.leaves`."""
        return self._read(lambda connection: trees.leaves(connection, namespace, turn_id))

    def find(self, namespace: str, digests: Sequence[bytes]) -> tuple[int, Turn] | None:
        """See `ConversationStore.find`."""
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
        """See `ConversationStore.append`."""
        try:
            content = rows.Content.of(messages, token_ids, meta)
            rows.check_names(turn_id=turn_id, reply_reason=reply_reason)
        except InvalidRequest as error:
            return _failed(error)
        chosen, made = turn_id is not None, rows.new_id() if turn_id is None else turn_id

        def job(connection: Connection) -> Turn:
            key = trees.key_of(connection, namespace, conversation_id)
            if only_if_leaf and trees.get(connection, namespace, conversation_id).leaf != parent:
                raise ConversationConflict(
                    f"conversation {conversation_id!r} went on elsewhere while this turn was answered (another process uses the same store): "
                    "it was not stored; ask again"
                )
            if chosen:
                answers.check_free(connection, made, key)
                answers.discard_draft(connection, made)
            if claimed:
                answers.check_claimed(connection, namespace, made)
            at = trees.place(connection, namespace, key, parent, start, made)
            now_s = self._clock()
            turn = trees.insert_turn(connection, namespace, at, made, content, reply_reason, now_s)
            trees.set_leaf(connection, key, made, now_s)
            return turn

        return self._writer.submit(job)

    def home(self, namespace: str, turn_id: str) -> str | None:
        """See `ConversationStore.home`."""
        return self._read(lambda connection: trees.home(connection, namespace, turn_id))

    def delete_turn(self, namespace: str, turn_id: str) -> bool:
        """See `ConversationStore.delete_turn`."""
        return self._writer.call(
            lambda connection: trees.delete_turn(connection, namespace, turn_id, self._clock())
        )

    # -- answers under way

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
        """See `ConversationStore.draft`."""
        try:
            content = rows.Content.of(messages, token_ids, meta)
            rows.check_names(turn_id=turn_id, owner=owner)
        except InvalidRequest as error:
            return _failed(error)

        def job(connection: Connection) -> None:
            key = trees.key_of(connection, namespace, conversation_id)
            at = trees.place(connection, namespace, key, parent, start, turn_id)
            now_s = self._clock()
            if owner:
                owners.ensure(connection, owner, self._now_s(connection))
            answers.begin_draft(connection, at, turn_id, content, output_start, owner, now_s)
            trees.touch(connection, key, now_s)

        return self._writer.submit(job)

    def extend_draft(self, turn_id: str, output_ids: Sequence[int], text: str) -> Future[None]:
        """See `ConversationStore.extend_draft`."""
        try:
            ids = rows.pack(tuple(output_ids))
            rows.check_names(turn_id=turn_id)
        except InvalidRequest as error:
            return _failed(error)
        return self._writer.submit(lambda connection: answers.extend_draft(connection, turn_id, ids, text))

    def discard_draft(self, turn_id: str) -> Future[None]:
        """See `ConversationStore.discard_draft`."""
        try:
            rows.check_names(turn_id=turn_id)
        except InvalidRequest as error:
            return _failed(error)
        return self._writer.submit(lambda connection: answers.discard_draft(connection, turn_id))

    def join(self, owner: str, place: str) -> None:
        """See `ConversationStore.join`."""
        rows.check_names(owner=owner)
        self._writer.call(lambda connection: owners.join(connection, owner, place, self._now_s(connection)))

    def renew(self, owner: str, place: str) -> bool:
        """See `ConversationStore.renew`."""

        def job(connection: Connection) -> bool:
            now_s = self._now_s(connection)
            renewed = owners.renew(connection, owner, now_s)
            if not renewed:
                owners.join(connection, owner, place, now_s)
            return renewed

        return self._writer.call(job)

    def owners(self) -> Sequence[Owner]:
        """See `ConversationStore.owners`."""
        return self._read(lambda connection: owners.listed(connection, self._now_s(connection)))

    def leave(self, owner: str) -> int:
        """See `ConversationStore.leave`."""
        return self.recover_drafts(owner)

    def recover_drafts(self, owner: str | None = None, expires_s: float | None = None) -> int:
        """See `ConversationStore.recover_drafts`."""
        rows.check_names(owner=owner)

        def job(connection: Connection) -> int:
            if owner is not None and not owners.end(connection, owner, expires_s):
                return 0
            return answers.recover_drafts(connection, owner)

        return self._writer.call(job)

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
        """See `ConversationStore.claim`."""
        rows.check_names(namespace=namespace, idempotency_key=key, turn_id=turn_id, owner=owner)
        claimed_s = self._clock() if now_s is None else now_s

        def job(connection: Connection) -> Claim:
            owners.ensure(connection, owner, self._now_s(connection) if owner else 0.0)
            return answers.claim(connection, namespace, key, fingerprint, turn_id, owner, claimed_s)

        return self._writer.call(job)

    def release(self, namespace: str, key: str, turn_id: str | None = None) -> Future[None]:
        """See `ConversationStore.release`."""
        rows.check_names(namespace=namespace, idempotency_key=key, turn_id=turn_id)
        return self._writer.submit(lambda connection: answers.release(connection, namespace, key, turn_id))

    def purge(self, before_s: float) -> int:
        """See `ConversationStore.purge`."""
        return self._writer.call(lambda connection: answers.purge(connection, before_s))

    # -- inside

    def _conversations(self, condition: str, values: Sequence[Any]) -> builtins.list[Conversation]:
        """Those that can be read: one that is damaged is named in the log, and does not take the others with it."""
        query = f"SELECT {rows.CONVERSATION} FROM conversations WHERE {condition}"
        found = []
        for row in self._read(lambda connection: connection.execute(query, values).fetchall()):
            try:
                found.append(rows.conversation(row))
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


def _failed(error: InvalidRequest) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future
