"""Answers under way in SQL, as steps inside a transaction: drafts and claims.

Drafts survive a crash. A claim says which turn answers a retry: a whole answer, or one under way; an
interrupted answer answers no retry. Knows tables; never threads or processes.
"""

from __future__ import annotations

import json
import logging

from pensieve.errors import AnswerLost, ConversationNotFound, InvalidRequest
from pensieve.message import Message
from pensieve.store import encoding, trees
from pensieve.store.values import CLAIM_S, INTERRUPTED, Claim
from pensieve.store.writer import Connection

log = logging.getLogger(__name__)

# Condition on a claim: its answer is under way.
_DRAFTED = "EXISTS (SELECT 1 FROM drafts WHERE drafts.turn_id = claims.turn_id)"


def check_free(connection: Connection, turn_id: str, conversation: int) -> None:
    """Refuse a turn id that a turn, or a draft of another conversation, has."""
    taken = connection.execute("SELECT reply_reason FROM turns WHERE id = ?", (turn_id,)).fetchone()
    if taken is not None and taken[0] == INTERRUPTED:
        raise _lost()
    draft = connection.execute("SELECT conversation FROM drafts WHERE turn_id = ?", (turn_id,)).fetchone()
    if taken is not None or (draft is not None and draft[0] != conversation):
        raise InvalidRequest(f"the turn id {turn_id!r} is taken: choose another one")


def check_claimed(connection: Connection, namespace: str, turn_id: str) -> None:
    """Refuse a turn whose key is claimed for another turn by now: one key must not get two answers."""
    if (
        connection.execute(
            "SELECT 1 FROM claims WHERE turn_id = ? AND namespace = ?", (turn_id, namespace)
        ).fetchone()
        is None
    ):
        raise _lost()


def _lost() -> AnswerLost:
    return AnswerLost(
        "this server was out of touch with its store for too long, and its answers were given up as "
        "interrupted: this one was not stored; ask again"
    )


def begin_draft(
    connection: Connection,
    at: trees.InsertPoint,
    turn_id: str,
    content: encoding.Content,
    output_start: int,
    owner: str,
    now_s: float,
) -> None:
    """Keep the prompt of a turn; removes an earlier draft of this id."""
    stop = at.start + len(content.token_ids)
    if not at.start <= output_start <= stop:
        raise InvalidRequest(
            f"a draft's output_start must lie in [{at.start}, {stop}], as its token ids do, got "
            f"{output_start}"
        )
    check_free(connection, turn_id, at.conversation)
    discard_draft(connection, turn_id)
    connection.execute(
        "INSERT INTO drafts (turn_id, owner, conversation, parent, start, token_ids, messages, meta, "
        "created_s) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            turn_id,
            owner,
            at.conversation,
            at.parent,
            at.start,
            content.blob,
            content.messages_text,
            content.meta_text,
            now_s,
        ),
    )


def extend_draft(connection: Connection, turn_id: str, ids: bytes, text: str) -> None:
    """Append to a draft's answer."""
    if connection.execute("SELECT 1 FROM drafts WHERE turn_id = ?", (turn_id,)).fetchone() is None:
        raise ConversationNotFound(
            f"there is no answer {turn_id!r} under way: it ended, or its conversation was deleted"
        )
    (last,) = connection.execute(
        "SELECT max(position) FROM draft_tokens WHERE turn_id = ?", (turn_id,)
    ).fetchone()
    connection.execute(
        "INSERT INTO draft_tokens (turn_id, position, ids, text) VALUES (?, ?, ?, ?)",
        (turn_id, 0 if last is None else last + 1, ids, json.dumps(text)),
    )


def discard_draft(connection: Connection, turn_id: str) -> None:
    """Remove a draft, if there is one."""
    connection.execute("DELETE FROM draft_tokens WHERE turn_id = ?", (turn_id,))
    connection.execute("DELETE FROM drafts WHERE turn_id = ?", (turn_id,))


def recover_drafts(connection: Connection, owner: str | None) -> int:
    """Make turns of an owner's drafts and free the keys claimed for them; returns the number of drafts.

    None stands for all owners without a lease.
    """
    whose, values = (
        ("NOT EXISTS (SELECT 1 FROM owners WHERE owners.id = {0}.owner)", ())
        if owner is None
        else ("{0}.owner = ?", (owner,))
    )
    found = connection.execute(
        "SELECT turn_id, conversation, namespace, parent, start, token_ids, messages, meta, drafts.created_s"
        " FROM drafts JOIN conversations ON conversations.key = drafts.conversation WHERE "
        f"{whose.format('drafts')}",
        values,
    ).fetchall()
    for turn_id, conversation, namespace, parent, start, prompt, messages, meta, created_s in found:
        pieces = connection.execute(
            "SELECT ids, text FROM draft_tokens WHERE turn_id = ? ORDER BY position", (turn_id,)
        ).fetchall()
        try:
            token_ids = encoding.unpack(bytes(prompt) + b"".join(bytes(ids) for ids, _ in pieces))
            answer = Message("assistant", "".join(json.loads(text) for _, text in pieces))
            content = encoding.Content.of(
                (*encoding.messages_from(messages), answer), token_ids, json.loads(meta)
            )
        except (
            ValueError,
            TypeError,
        ) as error:  # damaged on the disk: it must not keep the others from being recovered
            log.error("what was stored of the answer %s cannot be read, and is dropped: %s", turn_id, error)
        else:
            at = trees.insert_point(connection, namespace, conversation, parent, start, turn_id)
            trees.insert_turn(connection, namespace, at, turn_id, content, INTERRUPTED, created_s)
        discard_draft(connection, turn_id)
    # Not stored, or stored as a fragment just now. A whole turn whose client did not get the answer keeps its
    # key.
    whole = (
        "EXISTS (SELECT 1 FROM turns WHERE turns.id = claims.turn_id "
        f"AND coalesce(reply_reason, '') <> '{INTERRUPTED}')"
    )
    connection.execute(f"DELETE FROM claims WHERE {whose.format('claims')} AND NOT {whole}", values)
    return len(found)


def claim(
    connection: Connection,
    namespace: str,
    key: str,
    fingerprint: bytes,
    turn_id: str,
    owner: str,
    now_s: float,
) -> Claim:
    """Claim a key, or return the claim that it has."""
    row = connection.execute(
        f"""
        SELECT claims.turn_id, fingerprint, claims.owner, claims.created_s,
            turns.id IS NOT NULL, turns.reply_reason, {_DRAFTED},
            EXISTS (SELECT 1 FROM owners WHERE owners.id = claims.owner)
        FROM claims LEFT JOIN turns ON turns.id = claims.turn_id AND turns.namespace = claims.namespace
        WHERE claims.namespace = ? AND key = ?
        """,
        (namespace, key),
    ).fetchone()
    if row is not None:
        first, print_, first_owner, created_s, there, reason, drafted, is_known = row
        stored = bool(there) and reason != INTERRUPTED
        under_way = not there and (bool(is_known) or not first_owner)
        if (created_s > now_s - CLAIM_S or drafted) and (stored or under_way):
            return Claim(first, bytes(print_), fresh=False, stored=stored, owner=first_owner)
    release(connection, namespace, key)
    connection.execute(
        "INSERT INTO claims (namespace, key, fingerprint, turn_id, created_s, owner) VALUES (?, ?, ?, ?, ?, "
        "?)",
        (namespace, key, fingerprint, turn_id, now_s, owner),
    )
    return Claim(turn_id, fingerprint, fresh=True, owner=owner)


def release(connection: Connection, namespace: str, key: str, turn_id: str | None = None) -> None:
    """Free a key, if it is claimed for this turn."""
    if turn_id is None:
        connection.execute("DELETE FROM claims WHERE namespace = ? AND key = ?", (namespace, key))
    else:
        connection.execute(
            "DELETE FROM claims WHERE namespace = ? AND key = ? AND turn_id = ?", (namespace, key, turn_id)
        )


def purge(connection: Connection, before_s: float) -> int:
    """Remove old claims, except those of answers under way; returns how many there were."""
    old = f"created_s < ? AND NOT {_DRAFTED}"
    (count,) = connection.execute(f"SELECT count(*) FROM claims WHERE {old}", (before_s,)).fetchone()
    if count:
        connection.execute(f"DELETE FROM claims WHERE {old}", (before_s,))
    return int(count)
