"""Conversations and their trees of turns in SQL, as steps inside a transaction.

Knows tables; never threads, nor which database it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from pensieve.errors import ConversationNotFound, InvalidRequest
from pensieve.message import ROOT_DIGEST, path_digests
from pensieve.store import encoding
from pensieve.store.values import Conversation, Turn
from pensieve.store.writer import Connection

MAX_ASKED = 500  # digests in one query: each takes two of the values that a statement may have


@dataclass(frozen=True, slots=True)
class InsertPoint:
    """Where in a tree a new turn goes."""

    conversation: int  # key
    parent: str | None
    root: str  # the tree's first turn, perhaps the new one
    start: int  # position in the path's token log of the turn's first id
    digest: bytes  # of the parent's path


def get(connection: Connection, namespace: str, id: str) -> Conversation:
    """A conversation.

    Raises:
        ConversationNotFound: there is none of this id.
    """
    row = None
    if encoding.is_name(namespace) and encoding.is_name(id):
        row = connection.execute(
            f"SELECT {encoding.CONVERSATION} FROM conversations WHERE namespace = ? AND id = ?",
            (namespace, id),
        ).fetchone()
    if row is None:
        raise ConversationNotFound(f"there is no conversation {id!r}")
    return encoding.conversation(row)


def key_of(connection: Connection, namespace: str, id: str) -> int:
    """A conversation's key.

    Raises:
        ConversationNotFound: there is none of this id.
    """
    row = None
    if encoding.is_name(namespace) and encoding.is_name(id):
        row = connection.execute(
            "SELECT key FROM conversations WHERE namespace = ? AND id = ?", (namespace, id)
        ).fetchone()
    if row is None:
        raise ConversationNotFound(f"there is no conversation {id!r}")
    return int(row[0])


def insert_conversation(connection: Connection, made: Conversation) -> Conversation:
    """Add a conversation.

    Raises:
        InvalidRequest: its id is taken.
    """
    taken = connection.execute(
        "SELECT 1 FROM conversations WHERE namespace = ? AND id = ?", (made.namespace, made.id)
    ).fetchone()
    if taken is not None:
        raise InvalidRequest(
            f"there is a conversation {made.id!r} already: choose another id, or go on with that one"
        )
    connection.execute(
        f"INSERT INTO conversations ({encoding.CONVERSATION}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            made.id,
            made.namespace,
            made.leaf,
            made.created_s,
            made.updated_s,
            encoding.title_text(made.title),
            encoding.json_text(made.metadata, "a conversation's metadata"),
            made.expires_s,
            int(made.pinned),
            made.ttl_s,
        ),
    )
    return get(connection, made.namespace, made.id)


def get_turn(connection: Connection, namespace: str, turn_id: str) -> Turn:
    """A turn.

    Raises:
        ConversationNotFound: there is none of this id.
    """
    row = None
    if encoding.is_name(namespace) and encoding.is_name(turn_id):
        row = connection.execute(
            f"SELECT {encoding.TURN} FROM turns WHERE id = ? AND namespace = ?", (turn_id, namespace)
        ).fetchone()
    if row is None:
        raise ConversationNotFound(f"there is no turn {turn_id!r} in any conversation here")
    return encoding.turn(row)


def check_turn(connection: Connection, namespace: str, turn_id: str) -> tuple[str, int, bytes]:
    """The root of a turn's tree, and the number of tokens and the digest of its path.

    Raises:
        ConversationNotFound: there is no such turn.
    """
    row = None
    if encoding.is_name(namespace) and encoding.is_name(turn_id):
        row = connection.execute(
            "SELECT root, stop, digest FROM turns WHERE id = ? AND namespace = ?", (turn_id, namespace)
        ).fetchone()
    if row is None:
        raise ConversationNotFound(f"there is no turn {turn_id!r} in any conversation here")
    return str(row[0]), int(row[1]), bytes(row[2])


def insert_point(
    connection: Connection,
    namespace: str,
    conversation: int,
    parent: str | None,
    start: int | None,
    turn_id: str,
) -> InsertPoint:
    """Where a turn after `parent` goes.

    Raises:
        ConversationNotFound: there is no such parent.
        InvalidRequest: `start` is out of range.
    """
    root, parent_stop, digest = (
        (turn_id, 0, ROOT_DIGEST) if parent is None else check_turn(connection, namespace, parent)
    )
    begins = parent_stop if start is None else start
    if not 0 <= begins <= parent_stop:
        raise InvalidRequest(
            f"a turn's start must lie in [0, {parent_stop}], the tokens of its parent's path, got {start}"
        )
    return InsertPoint(conversation, parent, root, begins, digest)


def insert_turn(
    connection: Connection,
    namespace: str,
    at: InsertPoint,
    turn_id: str,
    content: encoding.Content,
    reply_reason: str | None,
    created_s: float,
) -> Turn:
    """Add a turn; leaves stay where they are."""
    digest = path_digests(content.messages, at.digest)[-1] if content.messages else at.digest
    stop = at.start + len(content.token_ids)
    checksum = encoding.checksum(
        turn_id,
        at.parent,
        at.start,
        reply_reason,
        content.messages_text,
        content.blob,
        digest,
        content.meta_text,
    )
    connection.execute(
        f"INSERT INTO turns ({encoding.TURN}, namespace, owner, root) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(
                turn_id,
                at.parent,
                content.messages_text,
                content.blob,
                at.start,
                reply_reason,
                created_s,
                digest,
                content.meta_text,
            ),
            *(stop, checksum, namespace, at.conversation, at.root),
        ),
    )
    meta = json.loads(content.meta_text)
    return Turn(
        turn_id,
        at.parent,
        content.messages,
        content.token_ids,
        at.start,
        reply_reason,
        created_s,
        digest,
        meta,
    )


def set_leaf(connection: Connection, conversation: int, turn_id: str | None, now_s: float) -> None:
    """Make a turn a conversation's leaf, which counts as a use."""
    connection.execute(
        "UPDATE conversations SET leaf = ?, updated_s = ? WHERE key = ?", (turn_id, now_s, conversation)
    )
    touch(connection, conversation, now_s)


def touch(connection: Connection, conversation: int, now_s: float) -> None:
    """Note a use of a conversation: its time to live, if it has one, restarts."""
    connection.execute(
        "UPDATE conversations SET expires_s = ? + ttl_s WHERE key = ? AND ttl_s IS NOT NULL",
        (now_s, conversation),
    )


def path(connection: Connection, namespace: str, turn_id: str) -> Sequence[Turn]:
    """The turns from the root to this one, each with its checksum verified."""
    check_turn(connection, namespace, turn_id)
    found = connection.execute(
        f"""
        WITH RECURSIVE up (id, parent, height) AS (
            SELECT id, parent, 0 FROM turns WHERE id = ?
            UNION ALL SELECT turns.id, turns.parent, height + 1 FROM turns JOIN up ON turns.id = up.parent
        )
        SELECT {encoding.columns(encoding.TURN, "turns")} FROM up
        JOIN turns ON turns.id = up.id ORDER BY height DESC
        """,
        (turn_id,),
    )
    turns, digest = [], ROOT_DIGEST
    for row in found:
        turn = encoding.turn(row)
        digest = path_digests(turn.messages, digest)[-1] if turn.messages else digest
        if turn.digest != digest:
            raise encoding.damaged(turn.id, "the messages of its path have another hash")
        turns.append(turn)
    return turns


def home(connection: Connection, namespace: str, turn_id: str) -> str | None:
    """The conversation that has a turn."""
    row = None
    if encoding.is_name(namespace) and encoding.is_name(turn_id):
        row = connection.execute(
            "SELECT conversations.id FROM turns JOIN conversations ON conversations.key = turns.owner WHERE "
            "turns.id = ? AND turns.namespace = ?",
            (turn_id, namespace),
        ).fetchone()
    return None if row is None else str(row[0])


def leaves(connection: Connection, namespace: str, turn_id: str) -> Sequence[Conversation]:
    """The conversations that end with a turn."""
    if not (encoding.is_name(namespace) and encoding.is_name(turn_id)):
        return []
    found = connection.execute(
        f"SELECT {encoding.CONVERSATION} FROM conversations WHERE leaf = ? AND namespace = ? "
        "ORDER BY updated_s DESC, key DESC",
        (turn_id, namespace),
    )
    return [encoding.conversation(row) for row in found]


def find(connection: Connection, namespace: str, digests: Sequence[bytes]) -> tuple[int, Turn] | None:
    """The longest beginning of a history that a turn ends with.

    Searches from its end: most histories are known except for the last message.
    """
    if not encoding.is_name(namespace):
        return None
    for stop in range(len(digests), 0, -MAX_ASKED):
        asked = {
            digest: index
            for index, digest in enumerate(digests[max(0, stop - MAX_ASKED) : stop], max(0, stop - MAX_ASKED))
        }
        values = ", ".join(["(?, ?)"] * len(asked))
        row = connection.execute(
            f"""
            WITH asked (number, digest) AS (VALUES {values})
            SELECT number, digest FROM asked
            WHERE EXISTS (SELECT 1 FROM turns WHERE turns.namespace = ? AND turns.digest = asked.digest)
            ORDER BY number DESC LIMIT 1
            """,
            (*(value for digest, index in asked.items() for value in (index, digest)), namespace),
        ).fetchone()
        if row is not None:
            return int(row[0]), _best(connection, namespace, bytes(row[1]))
    return None


def _best(connection: Connection, namespace: str, digest: bytes) -> Turn:
    """Of the turns with this digest, the newest that is a leaf, or else the newest.

    Each query walks an index from the newest turn on and stops at the first hit.
    """
    for condition in ("AND EXISTS (SELECT 1 FROM conversations WHERE conversations.leaf = turns.id)", ""):
        row = connection.execute(
            f"SELECT {encoding.TURN} FROM turns WHERE namespace = ? AND digest = ? {condition} ORDER BY "
            "created_s DESC LIMIT 1",
            (namespace, digest),
        ).fetchone()
        if row is not None:
            return encoding.turn(row)
    raise AssertionError("a turn vanished inside a transaction")


def delete_unused(connection: Connection, namespace: str, id: str) -> bool:
    """Delete a conversation without turns and drafts; returns whether it was deleted."""
    row = None
    if encoding.is_name(namespace) and encoding.is_name(id):
        row = connection.execute(
            """
            SELECT key FROM conversations WHERE namespace = ? AND id = ? AND leaf IS NULL
            AND NOT EXISTS (SELECT 1 FROM turns WHERE owner = key)
            AND NOT EXISTS (SELECT 1 FROM drafts WHERE conversation = key)
            """,
            (namespace, id),
        ).fetchone()
    if row is None:
        return False
    connection.execute("DELETE FROM conversations WHERE key = ?", (row[0],))
    return True


def delete_conversation(connection: Connection, namespace: str, id: str) -> tuple[int, int]:
    """Delete a conversation, its drafts and claims, and its turns that no other conversation needs.

    Returns:
        The number of turns deleted, and their bytes with those of the drafts.
    """
    key = key_of(connection, namespace, id)
    drafts = "SELECT turn_id FROM drafts WHERE conversation = ?"
    size = _sum(
        connection,
        f"SELECT sum(length(ids) + length(text)) FROM draft_tokens WHERE turn_id IN ({drafts})",
        key,
    )
    size += _sum(
        connection,
        "SELECT sum(length(messages) + length(token_ids) + length(meta)) FROM drafts WHERE conversation = ?",
        key,
    )
    connection.execute(f"DELETE FROM claims WHERE turn_id IN ({drafts})", (key,))
    connection.execute(f"DELETE FROM draft_tokens WHERE turn_id IN ({drafts})", (key,))
    connection.execute("DELETE FROM drafts WHERE conversation = ?", (key,))
    for heir, turn_id in _heirs(connection, key):
        connection.execute("UPDATE turns SET owner = ? WHERE id = ?", (heir, turn_id))
    turns = _sum(connection, "SELECT count(*) FROM turns WHERE owner = ?", key)
    size += _sum(
        connection,
        "SELECT sum(length(messages) + length(token_ids) + length(meta)) FROM turns WHERE owner = ?",
        key,
    )
    connection.execute("UPDATE conversations SET leaf = NULL WHERE key = ?", (key,))
    connection.execute("DELETE FROM claims WHERE turn_id IN (SELECT id FROM turns WHERE owner = ?)", (key,))
    connection.execute("DELETE FROM turns WHERE owner = ?", (key,))
    connection.execute("DELETE FROM conversations WHERE key = ?", (key,))
    return turns, size


def _sum(connection: Connection, sql: str, key: int) -> int:
    return int(connection.execute(sql, (key,)).fetchone()[0] or 0)


def _heirs(connection: Connection, key: int) -> Sequence[tuple[int, str]]:
    """Turns of a conversation that another one needs, each with the first one that does.

    A conversation needs the turns above its own turns, its drafts and its leaf.
    """
    return connection.execute(
        """
        WITH RECURSIVE
            trees (root) AS (SELECT DISTINCT root FROM turns WHERE owner = ?),
            users (id, parent, key) AS (
                SELECT id, parent, owner FROM turns WHERE root IN (SELECT root FROM trees)
                UNION
                SELECT turns.id, turns.parent, conversations.key FROM turns
                JOIN conversations ON conversations.leaf = turns.id
                WHERE turns.root IN (SELECT root FROM trees)
                UNION
                SELECT turns.id, turns.parent, drafts.conversation FROM turns
                JOIN drafts ON drafts.parent = turns.id
                WHERE turns.root IN (SELECT root FROM trees)
            ),
            needed (id, parent, key) AS (
                SELECT id, parent, key FROM users WHERE key <> ?
                UNION
                SELECT turns.id, turns.parent, needed.key FROM turns JOIN needed ON turns.id = needed.parent
            )
        SELECT min(needed.key), turns.id FROM needed JOIN turns ON turns.id = needed.id
        WHERE turns.owner = ? GROUP BY turns.id
        """,
        (key, key, key),
    ).fetchall()


def delete_turn(connection: Connection, namespace: str, turn_id: str, now_s: float) -> bool:
    """Delete a turn that only its own conversation depends on, or mark it; returns whether it was deleted."""
    turn = get_turn(connection, namespace, turn_id)
    (owner,) = connection.execute("SELECT owner FROM turns WHERE id = ?", (turn_id,)).fetchone()
    connection.execute(
        "DELETE FROM claims WHERE turn_id = ?", (turn_id,)
    )  # a key must not bring back what was deleted
    needed = connection.execute(
        """
        SELECT 1 FROM turns WHERE parent = ?
        UNION ALL SELECT 1 FROM drafts WHERE parent = ?
        UNION ALL SELECT 1 FROM conversations WHERE leaf = ? AND key <> ?
        LIMIT 1
        """,
        (turn_id, turn_id, turn_id, owner),
    ).fetchone()
    if needed is not None:
        _mark_deleted(connection, turn)
        return False
    for (key,) in connection.execute("SELECT key FROM conversations WHERE leaf = ?", (turn_id,)).fetchall():
        set_leaf(connection, key, turn.parent, now_s)
    connection.execute("DELETE FROM turns WHERE id = ?", (turn_id,))
    return True


def _mark_deleted(connection: Connection, turn: Turn) -> None:
    meta = encoding.json_text({**turn.meta, "deleted": True}, "a turn's meta")
    messages, blob = connection.execute(
        "SELECT messages, token_ids FROM turns WHERE id = ?", (turn.id,)
    ).fetchone()
    checksum = encoding.checksum(
        turn.id, turn.parent, turn.start, turn.reply_reason, messages, bytes(blob), turn.digest, meta
    )
    connection.execute("UPDATE turns SET meta = ?, checksum = ? WHERE id = ?", (meta, checksum, turn.id))
