"""Messages as clients send them. Knows OpenAI's form of them; never endpoints, prompts or answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from pensieve.message import Message, ToolCall
from pensieve.server.errors import ApiError, unsupported
from pensieve.server.fields import Identifier, Name, Strict

MAX_MESSAGES = 4096  # a server's own limit may be lower
MAX_PARTS = 4096  # of one message
MAX_CALLS = 1024  # of one message


class ContentPart(BaseModel):
    """A part of a message. Only text is supported; other fields belong to parts that are refused by name."""

    model_config = ConfigDict(extra="allow")
    type: StrictStr
    text: StrictStr | None = None
    refusal: StrictStr | None = None


class FunctionCall(Strict):
    """The function call in a tool call."""

    name: Name
    arguments: StrictStr


class CallItem(Strict):
    """A tool call of an assistant's message."""

    id: Identifier
    type: Literal["function"] = "function"
    function: FunctionCall
    index: StrictInt | None = None  # some clients send the objects of their stream back


Parts = Annotated[list[ContentPart], Field(fail_fast=True, max_length=MAX_PARTS)]


class ChatMessage(Strict):
    """A message as clients resend it: answers come back with fields that have no meaning here, such as
    `refusal`.
    """

    role: StrictStr
    content: StrictStr | Parts | None = None
    name: StrictStr | None = None
    tool_calls: Annotated[list[CallItem], Field(fail_fast=True, max_length=MAX_CALLS)] | None = None
    tool_call_id: Identifier | None = None
    refusal: StrictStr | None = None
    annotations: list[Any] | None = None
    audio: Any = None
    function_call: Any = None
    reasoning: StrictStr | None = None
    reasoning_content: StrictStr | None = None

    def message(self, where: str) -> Message:
        """The message in our form.

        Raises:
            ApiError: a field is wrong or not supported.
        """
        role = {"developer": "system"}.get(self.role, self.role)
        if role not in ("system", "user", "assistant", "tool"):
            hint = ": answer calls with the role 'tool'" if role == "function" else ""
            raise ApiError(
                400,
                f"{where}.role must be system, developer, user, assistant or tool, got {self.role!r}{hint}",
                code="invalid_value",
                param=f"{where}.role",
            )
        if self.function_call is not None:
            raise unsupported(
                f"{where}.function_call", "function_call is the old form of tool_calls: send tool_calls"
            )
        if self.audio is not None:
            raise unsupported(f"{where}.audio", "audio is not supported: this server reads and writes text")
        text = (
            self.refusal
            if self.content is None and self.refusal
            else text_of(self.content, f"{where}.content")
        )
        if self.content is None and role != "assistant":
            raise ApiError(
                400,
                f"{where}.content is required for role {self.role!r}",
                code="missing_required_parameter",
                param=f"{where}.content",
            )
        calls = tuple(
            ToolCall(call.id, call.function.name, call.function.arguments) for call in self.tool_calls or ()
        )
        if calls and role != "assistant":
            raise ApiError(
                400,
                f"{where}.tool_calls belongs to an assistant's message",
                code="invalid_value",
                param=f"{where}.tool_calls",
            )
        if role == "tool" and self.tool_call_id is None:
            raise ApiError(
                400,
                f"{where}.tool_call_id is required for role 'tool'",
                code="missing_required_parameter",
                param=f"{where}.tool_call_id",
            )
        return Message(
            role,
            text,
            calls,
            self.tool_call_id if role == "tool" else None,
            self.name if role == "tool" else None,
        )


Messages = Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]


def text_of(content: str | list[ContentPart] | None, where: str) -> str:
    """The text of a message's content.

    Raises:
        ApiError: a part is not text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        if part.type in ("text", "input_text", "output_text") and part.text is not None:
            texts.append(part.text)
        elif part.type == "refusal" and part.refusal is not None:
            texts.append(part.refusal)
        else:
            what = {
                "image_url": "images",
                "input_image": "images",
                "input_audio": "audio",
                "file": "files",
                "input_file": "files",
            }.get(part.type)
            message = (
                f"{what} are not supported"
                if what
                else f"a content part of type {part.type!r} without text is not supported"
            )
            raise unsupported(f"{where}.{index}", f"{where}.{index}: {message}: this server reads text")
    return "".join(texts)
