"""How messages, token ids and names are written in a database's columns. Knows values; never tables or connections.

All JSON is ASCII: it holds any string, lone surrogates and NUL included, in a column of any database.
"""

from __future__ import annotations

import json
import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pensieve.chat import Message, ToolCall
from pensieve.errors import InvalidRequest
from pensieve.store.base import Conversation, Turn

MAX_NAME_BYTES = 1024  # two of them fit an entry of a PostgreSQL index, which may have some 2,700

# The columns that make a value, in the order in which `conversation` and `turn` take them.
CONVERSATION = "id, namespace, leaf, created_s, updated_s, title, metadata, expires_s, pinned"
TURN = "id, parent, messages, token_ids, start, reply_reason, created_s, digest, meta"


@dataclass(frozen=True, slots=True)
class Content:
    """What a turn adds to its parent's path: the values, and how they are written. Made before a writer's time is spent on it."""

    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    messages_text: str
    blob: bytes
    meta_text: str

    @classmethod
    def of(cls, messages: Sequence[Message], token_ids: Sequence[int], meta: Mapping[str, object] | None) -> Content:
        """Copies: the caller's lists may change afterwards. Raises `InvalidRequest` for a token id that is none, or meta that JSON cannot hold."""
        messages, token_ids = tuple(messages), tuple(token_ids)
        return cls(messages, token_ids, messages_text(messages), pack(token_ids), json_text(meta, "a turn's meta"))


def columns(names: str, table: str) -> str:
    """A list of columns, each with its table's name."""
    return ", ".join(f"{table}.{name}" for name in names.split(", "))


def conversation(row: Sequence[Any]) -> Conversation:
    """From the columns of `CONVERSATION`."""
    id, namespace, leaf, created_s, updated_s, title, metadata, expires_s, pinned = row
    return Conversation(
        id,
        namespace,
        leaf,
        created_s,
        updated_s,
        None if title is None else title_from(title),
        json.loads(metadata),
        expires_s,
        bool(pinned),
    )


def turn(row: Sequence[Any]) -> Turn:
    """From the columns of `TURN`."""
    id, parent, messages, blob, start, reply_reason, created_s, digest, meta = row
    return Turn(id, parent, messages_from(messages), unpack(blob), start, reply_reason, created_s, bytes(digest), json.loads(meta))


def messages_text(messages: Sequence[Message]) -> str:
    """Messages as JSON: `[role, content]` each, and an object with the tools' fields where there are any."""
    rows: list[list[object]] = []
    for message in messages:
        extra: dict[str, object] = {}
        if message.tool_calls:
            extra["tool_calls"] = [[call.id, call.name, call.arguments] for call in message.tool_calls]
        if message.tool_call_id is not None:
            extra["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            extra["name"] = message.name
        rows.append([message.role, message.content, extra] if extra else [message.role, message.content])
    return json.dumps(rows)


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
        InvalidRequest: one is none.
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
    """A caller's mapping as JSON; None = an empty one.

    Raises:
        InvalidRequest: JSON cannot hold it. `what` it is, says the message.
    """
    try:
        return json.dumps(dict(value or {}), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{what} must be something that JSON can hold: {error}") from error


def title_text(title: str | None) -> str | None:
    """A title as JSON: it may hold anything."""
    return None if title is None else json.dumps(title)


def title_from(text: str) -> str:
    """A title from its JSON."""
    return str(json.loads(text))


def is_name(text: str) -> bool:
    """Whether a column that is compared can hold a text: not a lone surrogate, which has no UTF-8 form, nor NUL, which PostgreSQL lacks."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def check_names(**names: str | None) -> None:
    """Refuse what `is_name` says no to.

    Raises:
        InvalidRequest: with the name of the argument, spaces for underscores. Also if it is too long for an index.
    """
    for name, text in names.items():
        if text is not None and not is_name(text):
            raise InvalidRequest(f"{name.replace('_', ' ')} must be valid Unicode without NUL, got {text!r}")
        if text is not None and len(text.encode()) > MAX_NAME_BYTES:
            raise InvalidRequest(f"{name.replace('_', ' ')} must be at most {MAX_NAME_BYTES} bytes long, got {len(text.encode())}")


def new_id() -> str:
    """A random id."""
    return uuid.uuid4().hex
