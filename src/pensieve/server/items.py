"""Messages as items, their form in the Responses and Conversations APIs.

Knows both forms; never endpoints or open answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictStr

from pensieve.message import Message, ToolCall
from pensieve.server.chat_messages import Parts, text_of
from pensieve.server.errors import ApiError, unsupported
from pensieve.server.fields import Identifier, Name
from pensieve.store import Turn

MAX_ITEMS = 4096


class InputItem(BaseModel):
    """One item: a message, a call of a function, or its output."""

    model_config = ConfigDict(extra="allow")
    type: StrictStr | None = None  # None for a message
    role: StrictStr | None = None
    content: StrictStr | Parts | None = None
    call_id: Identifier | None = None
    name: Name | None = None
    arguments: StrictStr | None = None
    output: StrictStr | Parts | None = None


Items = Annotated[list[InputItem], Field(fail_fast=True, max_length=MAX_ITEMS)]
Input = StrictStr | Items


def messages_of(items: str | Sequence[InputItem], where: str = "input") -> tuple[Message, ...]:
    """Messages from items; calls that follow an assistant's text belong to the same message.

    Raises:
        ApiError: an item that this server does not support.
    """
    if isinstance(items, str):
        return (Message("user", items),)
    messages: list[Message] = []
    names: dict[str, str] = {}
    for index, item in enumerate(items):
        at = f"{where}.{index}"
        kind = item.type or "message"
        if kind == "message":
            messages.append(_message(item, at))
        elif kind == "function_call":
            call = ToolCall(
                _need(item.call_id, at, "call_id"),
                _need(item.name, at, "name"),
                _need(item.arguments, at, "arguments"),
            )
            names[call.id] = call.name
            last = messages[-1] if messages else None
            if last is not None and last.role == "assistant":
                messages[-1] = Message("assistant", last.content, (*last.tool_calls, call))
            else:
                messages.append(Message("assistant", "", (call,)))
        elif kind == "function_call_output":
            call_id = _need(item.call_id, at, "call_id")
            if item.output is None:
                raise ApiError(
                    400, f"{at}.output is required", code="missing_required_parameter", param=f"{at}.output"
                )
            messages.append(
                Message("tool", text_of(item.output, f"{at}.output"), (), call_id, names.get(call_id))
            )
        elif kind == "reasoning":
            continue  # earlier reasoning is not part of a prompt, as with OpenAI
        else:
            raise unsupported(
                at,
                f"{at}: items of type {kind!r} are not supported: "
                "this server takes messages, function calls and their outputs",
            )
    return tuple(messages)


def items_of(turn_id: str, messages: Sequence[Message], first: int = 0) -> list[dict[str, Any]]:
    """The items of a turn's messages, numbered from `first`."""
    items: list[dict[str, Any]] = []
    for index, message in enumerate(messages, start=first):
        items += (
            output_items(f"{turn_id}_{index}", message)
            if message.role == "assistant"
            else [_input_item(f"{turn_id}_{index}", message)]
        )
    return items


def output_items(name: str, message: Message, status: str = "completed") -> list[dict[str, Any]]:
    """An assistant's message as items: its text, then its calls. `name` makes their ids unique."""
    items: list[dict[str, Any]] = []
    if message.content or not message.tool_calls:
        items.append(message_item(name, message.content, status))
    items += [call_item(name, index, call, status) for index, call in enumerate(message.tool_calls)]
    return items


def message_item(name: str, text: str | None, status: str, logprobs: Sequence[Any] = ()) -> dict[str, Any]:
    """An assistant's text; None before the first token."""
    content = [] if text is None else [text_part(text, logprobs)]
    return {"id": f"msg_{name}", "type": "message", "role": "assistant", "status": status, "content": content}


def text_part(text: str, logprobs: Sequence[Any] = ()) -> dict[str, Any]:
    """A content part with an assistant's text."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def call_item(name: str, index: int, call: ToolCall, status: str) -> dict[str, Any]:
    """A function call as an item."""
    return {
        "id": f"fc_{name}_{index}",
        "type": "function_call",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": status,
    }


def path_items(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The items of a path, oldest first."""
    return [item for turn in turns for item in items_of(turn.id, turn.messages)]


def locate_item(turns: Sequence[Turn], item_id: str) -> tuple[Turn, int, int | None] | None:
    """The turn of an item, the index of its message, and of its call if it is one; None if there is no such
    item.
    """
    for turn in turns:
        for index, message in enumerate(turn.messages):
            name = f"{turn.id}_{index}"
            for item in (
                output_items(name, message) if message.role == "assistant" else [_input_item(name, message)]
            ):
                if item["id"] == item_id:
                    return (
                        turn,
                        index,
                        int(item_id.rpartition("_")[2]) if item["type"] == "function_call" else None,
                    )
    return None


def _message(item: InputItem, at: str) -> Message:
    role = {"developer": "system"}.get(item.role or "", item.role)
    if role not in ("system", "user", "assistant"):
        raise ApiError(
            400,
            f"{at}.role must be user, assistant, system or developer, got {item.role!r}",
            code="invalid_value",
            param=f"{at}.role",
        )
    if item.content is None:
        raise ApiError(
            400, f"{at}.content is required", code="missing_required_parameter", param=f"{at}.content"
        )
    return Message(role, text_of(item.content, f"{at}.content"))


def _input_item(name: str, message: Message) -> dict[str, Any]:
    if message.role == "tool":
        return {
            "id": f"fco_{name}",
            "type": "function_call_output",
            "call_id": message.tool_call_id or "",
            "output": message.content,
            "status": "completed",
        }
    content = [{"type": "input_text", "text": message.content}]
    return {
        "id": f"msg_{name}",
        "type": "message",
        "role": message.role,
        "status": "completed",
        "content": content,
    }


def _need(value: str | None, at: str, field: str) -> str:
    if value is None:
        raise ApiError(
            400, f"{at}.{field} is required", code="missing_required_parameter", param=f"{at}.{field}"
        )
    return value


Order = Literal["asc", "desc"]


def page(items: list[dict[str, Any]], limit: int, order: Order, after: str | None) -> dict[str, Any]:
    """A page of a list, as OpenAI gives lists.

    Raises:
        ApiError: `after` is not in the list.
    """
    if order == "desc":
        items = items[::-1]
    if after is not None:
        position = next((index for index, item in enumerate(items) if item["id"] == after), None)
        if position is None:
            raise ApiError(404, f"there is no item {after!r} here", code="not_found", param="after")
        items = items[position + 1 :]
    shown = items[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(items) > limit,
    }
