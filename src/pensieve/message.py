"""Messages, tool calls, and the hash that recognises a history. Knows roles and words; never tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pensieve.errors import InvalidRequest

ROLES = ("system", "user", "assistant", "tool")
DIGEST_BYTES = 16
MAX_CANONICAL_CHARS = 1 << 16  # longer arguments count as they are written: parsing takes a second a megabyte
PIECE_CHARS = 1 << 16
ROOT_DIGEST = hashlib.blake2b(b"", digest_size=DIGEST_BYTES, person=b"pensieve-chat").digest()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One function that an assistant's message asks to be called."""

    id: str  # unique in its conversation; a tool's answer names it
    name: str
    arguments: str  # JSON text, as the model wrote it: perhaps not valid

    def __reduce__(self) -> tuple[type[ToolCall], tuple[str, str, str]]:
        return ToolCall, (self.id, self.name, self.arguments)


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat.

    Raises:
        InvalidRequest: the role is not one of `ROLES`, the content is not text, or a message of another role
            has a tool's fields.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()  # of an assistant
    tool_call_id: str | None = None  # of a tool: the call that it answers
    name: str | None = None  # of a tool: the function that was called

    def __reduce__(
        self,
    ) -> tuple[
        type[Message], tuple[object, ...]
    ]:  # (a tenth of the time that a frozen dataclass takes by itself)
        return Message, (self.role, self.content, self.tool_calls, self.tool_call_id, self.name)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InvalidRequest(f"a message's role must be one of {', '.join(ROLES)}, got {self.role!r}")
        if not isinstance(self.content, str):
            raise InvalidRequest(
                f"a message's content must be text, got {type(self.content).__name__} (role {self.role!r})"
            )
        if self.tool_calls and self.role != "assistant":
            raise InvalidRequest(
                f"only an assistant's message can call tools, got tool_calls on a {self.role} message"
            )
        if self.tool_call_id is not None and self.role != "tool":
            raise InvalidRequest(
                f"only a tool's message answers a call, got tool_call_id on a {self.role} message"
            )


def chars_of(messages: Iterable[Message]) -> int:
    """Characters of messages, calls and their arguments included."""
    return sum(
        len(message.content)
        + (
            sum(len(call.name) + len(call.arguments) for call in message.tool_calls)
            if message.tool_calls
            else 0
        )
        for message in messages
    )


def extend_digest(parent: bytes, message: Message) -> bytes:
    """The hash of a history with one more message: equal hashes mean the same messages from the first one on.

    White space around an assistant's words does not count (clients trim it), nor do the ids of tool calls
    (some clients make their own).
    """
    calls = [[call.name, _canonical(call.arguments)] for call in message.tool_calls]
    content = message.content.strip() if message.role == "assistant" else message.content
    # the hash of json.dumps([role, content, calls]): ASCII, which holds any string, lone surrogates included
    found = hashlib.blake2b(parent + f"[{json.dumps(message.role)}, ".encode(), digest_size=DIGEST_BYTES)
    for piece in json_pieces(content):
        found.update(piece.encode())
    found.update(f", {json.dumps(calls)}]".encode())
    return found.digest()


def json_pieces(text: str) -> Iterator[str]:
    """`json.dumps(text)` in pieces: at once it would keep other threads waiting, 0.1 s for 16 MB."""
    yield '"'
    for start in range(0, len(text), PIECE_CHARS):
        yield json.dumps(text[start : start + PIECE_CHARS])[1:-1]
    yield '"'


def path_digests(messages: Iterable[Message], parent: bytes = ROOT_DIGEST) -> list[bytes]:
    """The hash of the history up to and with each message."""
    digests = []
    for message in messages:
        parent = extend_digest(parent, message)
        digests.append(parent)
    return digests


def _canonical(arguments: str) -> str:
    """A call's arguments with normal white space and key order; unchanged if not JSON, too deep or long."""
    if len(arguments) > MAX_CANONICAL_CHARS:
        return arguments
    try:
        return json.dumps(json.loads(arguments), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments
