"""Conversations in one SQLite file. Knows SQL and the promises of `base`; never tokens' meaning, models or caches.

One thread writes (`writer`), with group commit; readers have connections of their own and never wait for it. An
in-memory database has a single connection, so there the writer's thread reads too.
"""

from __future__ import annotations

import builtins
import json
import sqlite3
import struct
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from pensieve.chat import Message
from pensieve.errors import ConversationConflict, ConversationNotFound, InvalidRequest, StoreError
from pensieve.store.base import Conversation, Turn
from pensieve.store.schema import MIGRATIONS, Migration, connect, open_for_writing
from pensieve.store.writer import GroupWriter

T = TypeVar("T")

MEMORY = ":memory:"
CONVERSATION = "id, namespace, leaf, created_s, updated_s, title, metadata"
TURN = "id, parent, messages, token_ids, start, reply_reason, created_s"


def default_path() -> Path:
    """Where conversations are kept unless the user says otherwise: in their data directory."""
    import platformdirs

    return Path(platformdirs.user_data_dir("pensieve", appauthor=False)) / "conversations.db"


class SqliteStore:
    """A `ConversationStore` in a SQLite file.

    Several processes may use the same file; a write waits for the others' for `busy_timeout_s` and then fails.

    Args:
        path: the file, made if it is not there; ":memory:" for a store that ends with this object.
        busy_timeout_s: how long to wait for another process's lock.
        clock: seconds since the epoch.
        migrations: the schema's history.

    Raises:
        StoreError: the file cannot be opened, is not a conversation store, or is one of a newer program.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        busy_timeout_s: float = 5.0,
        clock: Callable[[], float] = time.time,
        migrations: Sequence[Migration] = MIGRATIONS,
    ) -> None:
        self._path = None if str(path) == MEMORY else Path(path)
        self._name = str(path)
        self._busy_timeout_s = busy_timeout_s
        self._clock = clock
        self._writer = GroupWriter(open_for_writing(self._path, busy_timeout_s, migrations), self._name)
        self._readers: builtins.list[sqlite3.Connection] = []  # idle ones; as many as were ever in use at once
        self._readers_lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> SqliteStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def create(
        self, namespace: str, id: str | None = None, *, title: str | None = None, metadata: Mapping[str, object] | None = None
    ) -> Conversation:
        """See `ConversationStore.create`."""
        id = _new_id() if id is None else id
        _check_text(namespace=namespace, id=id, title=title)
        text = _metadata_text(metadata or {})
        return self._writer.call(lambda connection: self._insert(connection, namespace, id, None, title, text))

    def get(self, namespace: str, id: str) -> Conversation:
        """See `ConversationStore.get`."""
        return self._read(lambda connection: _get(connection, namespace, id))

    def list(self, namespace: str, limit: int = 50, offset: int = 0) -> Sequence[Conversation]:
        """See `ConversationStore.list`."""
        if limit < 0 or offset < 0:
            raise InvalidRequest(f"limit and offset must be at least 0, got limit={limit}, offset={offset}")

        def query(connection: sqlite3.Connection) -> Sequence[Conversation]:
            rows = connection.execute(
                f"SELECT {CONVERSATION} FROM conversations WHERE namespace = ? ORDER BY updated_s DESC, key DESC LIMIT ? OFFSET ?",
                (namespace, limit, offset),
            )
            return [_conversation(row) for row in rows]

        return self._read(query)

    def path(self, namespace: str, turn_id: str | None) -> Sequence[Turn]:
        """See `ConversationStore.path`."""
        if turn_id is None:
            return []

        def query(connection: sqlite3.Connection) -> Sequence[Turn]:
            _check_turn(connection, namespace, turn_id)
            rows = connection.execute(
                f"""
                WITH RECURSIVE up (id, parent, height) AS (
                    SELECT id, parent, 0 FROM turns WHERE id = ?
                    UNION ALL SELECT turns.id, turns.parent, height + 1 FROM turns JOIN up ON turns.id = up.parent
                )
                SELECT {", ".join(f"turns.{column}" for column in TURN.split(", "))}
                FROM up JOIN turns ON turns.id = up.id ORDER BY height DESC
                """,
                (turn_id,),
            )
            return [_turn(row) for row in rows]

        return self._read(query)

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
        """See `ConversationStore.append`."""
        messages, token_ids = tuple(messages), tuple(token_ids)  # the caller's lists may have changed when the job runs
        try:
            blob = _pack(token_ids)
        except InvalidRequest as error:
            failed: Future[Turn] = Future()
            failed.set_exception(error)
            return failed
        text = json.dumps([[message.role, message.content] for message in messages])  # ASCII: holds any string
        turn_id = _new_id()

        def job(connection: sqlite3.Connection) -> Turn:
            key = _key(connection, namespace, conversation_id)
            if only_if_leaf:
                (leaf,) = connection.execute("SELECT leaf FROM conversations WHERE key = ?", (key,)).fetchone()
                if leaf != parent:
                    raise ConversationConflict(
                        f"conversation {conversation_id!r} went on elsewhere while this turn was answered (another process uses the same store): "
                        "it was not stored; ask again"
                    )
            root, parent_stop = (turn_id, 0) if parent is None else _check_turn(connection, namespace, parent)
            begins = parent_stop if start is None else start
            if not 0 <= begins <= parent_stop:
                raise InvalidRequest(f"a turn's start must lie in [0, {parent_stop}], the tokens of its parent's path, got {start}")
            now_s = self._clock()
            connection.execute(
                "INSERT INTO turns (id, namespace, owner, root, parent, start, stop, token_ids, messages, reply_reason, created_s)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (turn_id, namespace, key, root, parent, begins, begins + len(token_ids), blob, text, reply_reason, now_s),
            )
            connection.execute("UPDATE conversations SET leaf = ?, updated_s = ? WHERE key = ?", (turn_id, now_s, key))
            return Turn(turn_id, parent, messages, token_ids, begins, reply_reason, now_s)

        return self._writer.submit(job)

    def fork(self, namespace: str, id: str, at: str | None = None, *, new_id: str | None = None) -> Conversation:
        """See `ConversationStore.fork`."""
        new_id = _new_id() if new_id is None else new_id
        _check_text(id=new_id)

        def job(connection: sqlite3.Connection) -> Conversation:
            origin = _get(connection, namespace, id)
            leaf = origin.leaf if at is None else at
            if at is not None:
                _check_turn(connection, namespace, at)
            return self._insert(connection, namespace, new_id, leaf, origin.title, _metadata_text(origin.metadata))

        return self._writer.call(job)

    def set_leaf(self, namespace: str, id: str, turn_id: str | None) -> Conversation:
        """See `ConversationStore.set_leaf`."""

        def job(connection: sqlite3.Connection) -> Conversation:
            key = _key(connection, namespace, id)
            if turn_id is not None:
                _check_turn(connection, namespace, turn_id)
            connection.execute("UPDATE conversations SET leaf = ?, updated_s = ? WHERE key = ?", (turn_id, self._clock(), key))
            return _get(connection, namespace, id)

        return self._writer.call(job)

    def describe(self, namespace: str, id: str, *, title: str | None, metadata: Mapping[str, object]) -> Conversation:
        """See `ConversationStore.describe`."""
        _check_text(title=title)
        text = _metadata_text(metadata)

        def job(connection: sqlite3.Connection) -> Conversation:
            key = _key(connection, namespace, id)
            connection.execute("UPDATE conversations SET title = ?, metadata = ? WHERE key = ?", (title, text, key))
            return _get(connection, namespace, id)

        return self._writer.call(job)

    def delete(self, namespace: str, id: str) -> None:
        """See `ConversationStore.delete`."""

        def job(connection: sqlite3.Connection) -> None:
            key = _key(connection, namespace, id)
            connection.executemany("UPDATE turns SET owner = ? WHERE id = ?", _heirs(connection, key))
            connection.execute("UPDATE conversations SET leaf = NULL WHERE key = ?", (key,))
            connection.execute("DELETE FROM turns WHERE owner = ?", (key,))
            connection.execute("DELETE FROM conversations WHERE key = ?", (key,))

        self._writer.call(job)

    def close(self) -> None:
        """See `ConversationStore.close`."""
        self._writer.close()
        with self._readers_lock:
            self._closed = True
            while self._readers:
                self._readers.pop().close()

    def _insert(
        self, connection: sqlite3.Connection, namespace: str, id: str, leaf: str | None, title: str | None, metadata: str
    ) -> Conversation:
        now_s = self._clock()
        try:
            connection.execute(
                f"INSERT INTO conversations ({CONVERSATION}) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (id, namespace, leaf, now_s, now_s, title, metadata),
            )
        except sqlite3.IntegrityError as error:
            raise InvalidRequest(f"there is a conversation {id!r} already: choose another id, or go on with that one") from error
        return _get(connection, namespace, id)

    def _read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Run a query on a connection that nobody else uses meanwhile."""
        if self._path is None:
            return self._writer.call(query)
        with self._readers_lock:
            if self._closed:
                raise StoreError(f"the conversation store {self._name} is closed")
            connection = self._readers.pop() if self._readers else None
        try:
            if connection is None:
                connection = connect(self._path, self._busy_timeout_s, read_only=True)
            connection.execute("BEGIN")  # all of a query's statements see one state
            try:
                return query(connection)
            finally:
                connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            raise StoreError(f"the conversation store {self._name} cannot be read: {error}") from error
        finally:
            if connection is not None:
                self._give_back(connection)

    def _give_back(self, connection: sqlite3.Connection) -> None:
        with self._readers_lock:
            if self._closed or connection.in_transaction:
                connection.close()
            else:
                self._readers.append(connection)


def _get(connection: sqlite3.Connection, namespace: str, id: str) -> Conversation:
    row = connection.execute(f"SELECT {CONVERSATION} FROM conversations WHERE namespace = ? AND id = ?", (namespace, id)).fetchone()
    if row is None:
        raise ConversationNotFound(f"there is no conversation {id!r}")
    return _conversation(row)


def _key(connection: sqlite3.Connection, namespace: str, id: str) -> int:
    row = connection.execute("SELECT key FROM conversations WHERE namespace = ? AND id = ?", (namespace, id)).fetchone()
    if row is None:
        raise ConversationNotFound(f"there is no conversation {id!r}")
    return int(row[0])


def _check_turn(connection: sqlite3.Connection, namespace: str, turn_id: str) -> tuple[str, int]:
    """The root of a turn's tree and the number of tokens of its path."""
    row = connection.execute("SELECT root, stop FROM turns WHERE id = ? AND namespace = ?", (turn_id, namespace)).fetchone()
    if row is None:
        raise ConversationNotFound(f"there is no turn {turn_id!r} in any conversation here")
    return str(row[0]), int(row[1])


def _heirs(connection: sqlite3.Connection, key: int) -> Sequence[tuple[int, str]]:
    """Turns of a conversation that others need, each with the first who does: those with turns below it, or their leaf."""
    return connection.execute(
        """
        WITH RECURSIVE
            trees (root) AS (SELECT DISTINCT root FROM turns WHERE owner = :key),
            needed (id, parent, key) AS (
                SELECT id, parent, owner FROM turns WHERE root IN (SELECT root FROM trees) AND owner <> :key
                UNION
                SELECT turns.id, turns.parent, conversations.key FROM turns JOIN conversations ON conversations.leaf = turns.id
                WHERE turns.root IN (SELECT root FROM trees) AND conversations.key <> :key
                UNION
                SELECT turns.id, turns.parent, needed.key FROM turns JOIN needed ON turns.id = needed.parent
            )
        SELECT min(needed.key), turns.id FROM needed JOIN turns ON turns.id = needed.id WHERE turns.owner = :key GROUP BY turns.id
        """,
        {"key": key},
    ).fetchall()


def _conversation(row: tuple[Any, ...]) -> Conversation:
    id, namespace, leaf, created_s, updated_s, title, metadata = row
    return Conversation(id, namespace, leaf, created_s, updated_s, title, json.loads(metadata))


def _turn(row: tuple[Any, ...]) -> Turn:
    id, parent, messages, blob, start, reply_reason, created_s = row
    stored = tuple(Message(role, content) for role, content in json.loads(messages))
    return Turn(id, parent, stored, _unpack(blob), start, reply_reason, created_s)


def _pack(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32."""
    try:
        return struct.pack(f"<{len(token_ids)}I", *token_ids)
    except struct.error as error:
        wrong = next((i for i in token_ids if not isinstance(i, int) or not 0 <= i < 1 << 32), None)
        raise InvalidRequest(f"a token id must be an integer in [0, 2**32), got {wrong!r}") from error


def _unpack(blob: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(blob) // 4}I", blob)


def _metadata_text(metadata: Mapping[str, object]) -> str:
    try:
        return json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"a conversation's metadata must be something that JSON can hold: {error}") from error


def _check_text(**texts: str | None) -> None:
    """Names must have a UTF-8 form: a lone surrogate has none."""
    for name, text in texts.items():
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"a conversation's {name} must be valid Unicode, got {text!r}") from error


def _new_id() -> str:
    return uuid.uuid4().hex
