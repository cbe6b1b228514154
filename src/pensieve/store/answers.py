"""Answers under way in SQL, as steps inside a transaction: drafts, which survive a crash, and claims, which make a retry find them.

Knows tables; never threads, nor who writes an answer.
"""

from __future__ import annotations

import json

from pensieve.chat import Message
from pensieve.errors import ConversationNotFound, InvalidRequest
from pensieve.store import rows, trees
from pensieve.store.base import CLAIM_S, INTERRUPTED, Claim
from pensieve.store.writer import Connection


def check_free(connection: Connection, turn_id: str, conversation: int) -> None:
    """Refuse an id that a turn has, or a draft of another conversation."""
    taken = connection.execute("SELECT 1 FROM turns WHERE id = ?", (turn_id,)).fetchone()
    draft = connection.execute("SELECT conversation FROM drafts WHERE turn_id = ?", (turn_id,)).fetchone()
    if taken is not None or (draft is not None and draft[0] != conversation):
        raise InvalidRequest(f"the turn id {turn_id!r} is taken: choose another one")


def begin_draft(
    connection: Connection,
    at: trees.Place,
    turn_id: str,
    content: rows.Content,
    output_start: int,
    owner: str,
    now_s: float,
) -> None:
    """Keep the prompt side of a turn; what an earlier draft of this id had goes."""
    stop = at.start + len(content.token_ids)
    if not at.start <= output_start <= stop:
        raise InvalidRequest(f"a draft's output_start must lie in [{at.start}, {stop}], as its token ids do, got {output_start}")
    check_free(connection, turn_id, at.conversation)
    discard_draft(connection, turn_id)
    connection.execute(
        "INSERT INTO drafts (turn_id, owner, conversation, parent, start, token_ids, messages, meta, created_s) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (turn_id, owner, at.conversation, at.parent, at.start, content.blob, content.messages_text, content.meta_text, now_s),
    )


def extend_draft(connection: Connection, turn_id: str, ids: bytes, text: str) -> None:
    """Keep more of an answer, behind what is there."""
    if connection.execute("SELECT 1 FROM drafts WHERE turn_id = ?", (turn_id,)).fetchone() is None:
        raise ConversationNotFound(f"there is no answer {turn_id!r} under way: it ended, or its conversation was deleted")
    (last,) = connection.execute("SELECT max(position) FROM draft_tokens WHERE turn_id = ?", (turn_id,)).fetchone()
    connection.execute(
        "INSERT INTO draft_tokens (turn_id, position, ids, text) VALUES (?, ?, ?, ?)",
        (turn_id, 0 if last is None else last + 1, ids, json.dumps(text)),
    )


def discard_draft(connection: Connection, turn_id: str) -> None:
    """Remove a draft, if there is one."""
    connection.execute("DELETE FROM draft_tokens WHERE turn_id = ?", (turn_id,))
    connection.execute("DELETE FROM drafts WHERE turn_id = ?", (turn_id,))


def recover_drafts(connection: Connection, owner: str | None) -> int:
    """Make turns of drafts: how many."""
    query = (
        "SELECT turn_id, conversation, namespace, parent, start, token_ids, messages, meta, drafts.created_s"
        " FROM drafts JOIN conversations ON conversations.key = drafts.conversation"
    )
    if owner is None:
        found = connection.execute(query).fetchall()
    else:
        found = connection.execute(f"{query} WHERE owner = ?", (owner,)).fetchall()
    for turn_id, conversation, namespace, parent, start, prompt, messages, meta, created_s in found:
        pieces = connection.execute("SELECT ids, text FROM draft_tokens WHERE turn_id = ? ORDER BY position", (turn_id,)).fetchall()
        token_ids = rows.unpack(bytes(prompt) + b"".join(bytes(ids) for ids, _ in pieces))
        answer = Message("assistant", "".join(json.loads(text) for _, text in pieces))
        content = rows.Content.of((*rows.messages_from(messages), answer), token_ids, json.loads(meta))
        at = trees.place(connection, namespace, conversation, parent, start, turn_id)
        trees.insert_turn(connection, namespace, at, turn_id, content, INTERRUPTED, created_s)
        discard_draft(connection, turn_id)
    return len(found)


def claim(connection: Connection, namespace: str, key: str, fingerprint: bytes, turn_id: str, now_s: float) -> Claim:
    """Claim a key, or learn who did."""
    row = connection.execute(
        "SELECT turn_id, fingerprint FROM claims WHERE namespace = ? AND key = ? AND created_s > ?", (namespace, key, now_s - CLAIM_S)
    ).fetchone()
    if row is not None:
        return Claim(row[0], bytes(row[1]), fresh=False)
    release(connection, namespace, key)
    connection.execute(
        "INSERT INTO claims (namespace, key, fingerprint, turn_id, created_s) VALUES (?, ?, ?, ?, ?)",
        (namespace, key, fingerprint, turn_id, now_s),
    )
    return Claim(turn_id, fingerprint, fresh=True)


def release(connection: Connection, namespace: str, key: str, turn_id: str | None = None) -> None:
    """Let go of a key, if it stands for this turn."""
    if turn_id is None:
        connection.execute("DELETE FROM claims WHERE namespace = ? AND key = ?", (namespace, key))
    else:
        connection.execute("DELETE FROM claims WHERE namespace = ? AND key = ? AND turn_id = ?", (namespace, key, turn_id))


def purge(connection: Connection, before_s: float) -> int:
    """Remove old claims: how many."""
    (old,) = connection.execute("SELECT count(*) FROM claims WHERE created_s < ?", (before_s,)).fetchone()
    if old:
        connection.execute("DELETE FROM claims WHERE created_s < ?", (before_s,))
    return int(old)
