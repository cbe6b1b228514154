"""Encodes messages, token ids and names for a database's columns.

Knows values; never tables or connections. All JSON is ASCII: it holds any string, lone surrogates and NUL
included, in a column of any database.
"""

from __future__ import annotations

import hashlib
import json
import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pensieve.errors import InvalidRequest, StoreError
from pensieve.message import Message, ToolCall, json_pieces
from pensieve.store.values import Conversation, Turn

MAX_NAME_BYTES = 1024  # two of them fit into an entry of a PostgreSQL index, which may have about 2,700 bytes

# The columns of a value, in the order in which `conversation` and `turn` read them.
CONVERSATION = "id, namespace, leaf, created_s, updated_s, title, metadata, expires_s, pinned, ttl_s"
TURN = "id, parent, messages, token_ids, start, reply_reason, created_s, digest, meta, stop, checksum"


@dataclass(frozen=True, slots=True)
class Content:
    """A turn's values and their encoding, made before the writer's thread works on them."""

    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    messages_text: str
    blob: bytes
    meta_text: str

    @classmethod
    def of(
        cls, messages: Sequence[Message], token_ids: Sequence[int], meta: Mapping[str, object] | None
    ) -> Content:
        """Encode copies of the values.

        Raises:
            InvalidRequest: a token id is out of range, or JSON cannot hold the meta.
        """
        messages, token_ids = tuple(messages), tuple(token_ids)
        return cls(
            messages, token_ids, messages_text(messages), pack(token_ids), json_text(meta, "a turn's meta")
        )


def columns(names: str, table: str) -> str:
    """A list of columns, each with its table's name."""
    return ", ".join(f"{table}.{name}" for name in names.split(", "))


def conversation(row: Sequence[Any]) -> Conversation:
    """A conversation from the columns of `CONVERSATION`.

    Raises:
        StoreError: its title or metadata is not what was written.
    """
    id, namespace, leaf, created_s, updated_s, title, metadata, expires_s, pinned, ttl_s = row
    try:
        title, metadata = None if title is None else title_from(title), json.loads(metadata)
    except ValueError as error:
        raise StoreError(
            f"conversation {id!r} is damaged in the store ({error}): restore the store from a backup, or "
            "delete it"
        ) from error
    return Conversation(
        id, namespace, leaf, created_s, updated_s, title, metadata, expires_s, bool(pinned), ttl_s
    )


def turn(row: Sequence[Any]) -> Turn:
    """A turn from the columns of `TURN`.

    Raises:
        StoreError: they are not what was written.
    """
    id, parent, messages, blob, start, reply_reason, created_s, digest, meta, stop, written = row
    blob, digest = bytes(blob), bytes(digest)
    if written is not None and bytes(written) != checksum(
        id, parent, start, reply_reason, messages, blob, digest, meta
    ):
        raise damaged(id, "its checksum is another one")
    if len(blob) != 4 * (stop - start):
        raise damaged(id, f"it has {len(blob)} bytes of token ids for {stop - start} tokens")
    try:
        return Turn(
            id,
            parent,
            messages_from(messages),
            unpack(blob),
            start,
            reply_reason,
            created_s,
            digest,
            json.loads(meta),
        )
    except (
        ValueError,
        TypeError,
        InvalidRequest,
    ) as error:  # of a turn that was written before there were checksums
        raise damaged(id, str(error)) from error


def checksum(
    id: str,
    parent: str | None,
    start: int,
    reply_reason: str | None,
    messages: str,
    blob: bytes,
    digest: bytes,
    meta: str,
) -> bytes:
    """The hash of a turn's encoded columns. A turn that is read with another hash is not served."""
    hashed = hashlib.blake2b(
        json.dumps([id, parent, start, reply_reason]).encode(), digest_size=16, person=b"pensieve-turn"
    )
    for part in (messages.encode(), blob, digest, meta.encode()):
        hashed.update(len(part).to_bytes(8, "big"))
        hashed.update(part)
    return hashed.digest()


def damaged(turn_id: str, why: str) -> StoreError:
    """The error for a turn that is not what was written."""
    return StoreError(
        f"turn {turn_id!r} is not what was written to the store ({why}): it is not served; restore the store "
        "from a backup, or delete its conversation"
    )


def messages_text(messages: Sequence[Message]) -> str:
    """Messages as JSON: `[role, content]` each, with an object of the tool fields if there are any."""
    rows = []
    for message in messages:
        extra: dict[str, object] = {}
        if message.tool_calls:
            extra["tool_calls"] = [[call.id, call.name, call.arguments] for call in message.tool_calls]
        if message.tool_call_id is not None:
            extra["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            extra["name"] = message.name
        content = "".join(json_pieces(message.content))
        rest = f", {json.dumps(extra)}]" if extra else "]"
        rows.append(f"[{json.dumps(message.role)}, {content}{rest}")
    return f"[{', '.join(rows)}]"  # as json.dumps writes it


def messages_from(text: str) -> tuple[Message, ...]:
    """The messages that `messages_text` wrote."""
    messages = []
    for role, content, *extras in json.loads(text):
        extra = extras[0] if extras else {}
        calls = tuple(ToolCall(*call) for call in extra.get("tool_calls", ()))
        messages.append(Message(role, content, calls, extra.get("tool_call_id"), extra.get("name")))
    return tuple(messages)


def pack(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32.

    Raises:
        InvalidRequest: one is no integer in that range.
    """
    try:
        return struct.pack(f"<{len(token_ids)}I", *token_ids)
    except struct.error as error:
        wrong = next((i for i in token_ids if not isinstance(i, int) or not 0 <= i < 1 << 32), None)
        raise InvalidRequest(f"a token id must be an integer in [0, 2**32), got {wrong!r}") from error


def unpack(blob: bytes) -> tuple[int, ...]:
    """The token ids that `pack` wrote."""
    return struct.unpack(f"<{len(blob) // 4}I", blob)


def json_text(value: Mapping[str, object] | None, what: str) -> str:
    """A caller's mapping as JSON; None gives an empty one.

    Raises:
        InvalidRequest: JSON cannot hold it; the message calls it `what`.
    """
    try:
        return json.dumps(dict(value or {}), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{what} must be something that JSON can hold: {error}") from error


def title_text(title: str | None) -> str | None:
    """A title as JSON, which can hold any text."""
    return None if title is None else json.dumps(title)


def title_from(text: str) -> str:
    """A title from its JSON."""
    return str(json.loads(text))


def is_name(text: str) -> bool:
    """Whether any database can compare this text: it has neither lone surrogates nor NUL."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def check_names(**names: str | None) -> None:
    """Refuse texts that are not names as `is_name` defines them, or too long for an index.

    Raises:
        InvalidRequest: with the name of the argument, spaces for underscores.
    """
    for name, text in names.items():
        if text is not None and not is_name(text):
            raise InvalidRequest(f"{name.replace('_', ' ')} must be valid Unicode without NUL, got {text!r}")
        if text is not None and len(text.encode()) > MAX_NAME_BYTES:
            raise InvalidRequest(
                f"{name.replace('_', ' ')} must be at most {MAX_NAME_BYTES} bytes long, got "
                f"{len(text.encode())}"
            )


def new_id() -> str:
    """A random id."""
    return uuid.uuid4().hex
