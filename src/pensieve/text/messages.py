"""What people and models say to each other: one frozen message. Knows roles; never tokens, templates or conversations."""

from __future__ import annotations

from dataclasses import dataclass

from pensieve.errors import InvalidRequest

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat.

    Raises:
        InvalidRequest: the role is not one of `ROLES`, or the content is not text.
    """

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InvalidRequest(f"a message's role must be one of {', '.join(ROLES)}, got {self.role!r}")
        if not isinstance(self.content, str):
            raise InvalidRequest(f"a message's content must be text, got {type(self.content).__name__} (role {self.role!r})")
