"""/v1/conversations: conversations by name, and their items. Knows that API; never answers or the cache."""

from __future__ import annotations

import asyncio
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Query

from pensieve.errors import ConversationNotFound
from pensieve.message import Message, chars_of
from pensieve.server.bodies import BoundedRoute
from pensieve.server.context import Asking, Caller, Context, Server, in_thread
from pensieve.server.errors import ApiError, not_found
from pensieve.server.fields import Body, Metadata
from pensieve.server.items import (
    InputItem,
    Items,
    Order,
    items_of,
    locate_item,
    messages_of,
    page,
    path_items,
)
from pensieve.service.prompt import CHARS, check_stored, stored_chars
from pensieve.store import Conversation, Turn

router = APIRouter(route_class=BoundedRoute)

MAX_NEW_ITEMS = 20  # OpenAI's limit of one call


class CreateConversation(Body):
    """POST /v1/conversations."""

    metadata: Metadata = None
    items: Items | None = None


class UpdateConversation(Body):
    """POST /v1/conversations/{id}."""

    metadata: Metadata


class CreateItems(Body):
    """POST /v1/conversations/{id}/items."""

    items: Items


@router.post("/v1/conversations", summary="Begin a conversation")
async def create(context: Server, caller: Asking, body: CreateConversation | None = None) -> dict[str, Any]:
    """Create a conversation, with items if the body has some."""
    body = body or CreateConversation()
    messages = _messages(body.items or [])
    conversation = await in_thread(
        context.store.create, caller.namespace, f"conv_{uuid.uuid4().hex}", metadata=body.metadata or {}
    )
    if messages:
        await _append(context, caller, conversation, messages)
    return conversation_json(conversation)


@router.get("/v1/conversations/{conversation_id}", summary="A conversation")
async def retrieve(conversation_id: str, context: Server, caller: Asking) -> dict[str, Any]:
    """Look a conversation up."""
    return conversation_json(await get(context, caller, conversation_id))


@router.post("/v1/conversations/{conversation_id}", summary="Change a conversation's metadata")
async def update(
    conversation_id: str, body: UpdateConversation, context: Server, caller: Asking
) -> dict[str, Any]:
    """Replace a conversation's metadata."""
    conversation = await get(context, caller, conversation_id)
    changed = await in_thread(
        context.store.describe,
        caller.namespace,
        conversation.id,
        title=conversation.title,
        metadata=body.metadata or {},
    )
    return conversation_json(changed)


@router.delete("/v1/conversations/{conversation_id}", summary="Delete a conversation, erasing what it left")
async def delete(conversation_id: str, context: Server, caller: Asking) -> dict[str, Any]:
    """Delete a conversation; its rows and its KV are overwritten."""
    erased = await erase(context, caller, conversation_id)
    return {"id": conversation_id, "object": "conversation.deleted", "deleted": True, **erased}


@router.get("/v1/conversations/{conversation_id}/items", summary="A conversation's items")
async def list_items(
    conversation_id: str,
    context: Server,
    caller: Asking,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Order = "desc",
    after: str | None = None,
    include: Annotated[list[str] | None, Query()] = None,
) -> dict[str, Any]:
    """A page of a conversation's items."""
    return page(path_items(await _turns(context, caller, conversation_id)), limit, order, after)


@router.post("/v1/conversations/{conversation_id}/items", summary="Add items to a conversation")
async def create_items(
    conversation_id: str,
    body: CreateItems,
    context: Server,
    caller: Asking,
    include: Annotated[list[str] | None, Query()] = None,
) -> dict[str, Any]:
    """Add items without an answer; they become part of the next prompt."""
    messages = _messages(body.items)
    if not messages:
        raise ApiError(400, "items must not be empty", code="invalid_value", param="items")
    turn = await _append(context, caller, await get(context, caller, conversation_id), messages)
    items = items_of(turn.id, turn.messages)
    return page(items, len(items), "asc", None)


@router.get("/v1/conversations/{conversation_id}/items/{item_id}", summary="An item of a conversation")
async def retrieve_item(
    conversation_id: str,
    item_id: str,
    context: Server,
    caller: Asking,
    include: Annotated[list[str] | None, Query()] = None,
) -> dict[str, Any]:
    """One item."""
    for item in path_items(await _turns(context, caller, conversation_id)):
        if item["id"] == item_id:
            return item
    raise not_found(f"there is no item {item_id!r} in conversation {conversation_id!r}", "item_id")


@router.delete(
    "/v1/conversations/{conversation_id}/items/{item_id}", summary="Delete an item of a conversation"
)
async def delete_item(conversation_id: str, item_id: str, context: Server, caller: Asking) -> dict[str, Any]:
    """Delete an item: from its turn on the conversation becomes a branch without it, which the next turn
    computes again.
    """
    conversation = await get(context, caller, conversation_id)
    turns = await in_thread(context.store.path, caller.namespace, conversation.leaf)
    place = locate_item(turns, item_id)
    if place is None:
        raise not_found(f"there is no item {item_id!r} in conversation {conversation_id!r}", "item_id")
    turn, index, call = place
    first = next(i for i, other in enumerate(turns) if other.id == turn.id)
    messages = [message for other in turns[first:] for message in other.messages]
    kept = _without_call(messages[index], call) if call is not None else None
    messages[index : index + 1] = [] if kept is None else [kept]
    if messages:  # in one step, so that a crash does not lose the messages that follow
        appended = context.store.append(caller.namespace, conversation.id, turn.parent, messages, ())
        await in_thread(appended.result)
    else:
        await in_thread(context.store.set_leaf, caller.namespace, conversation.id, turn.parent)
    return conversation_json(conversation)


# -- shared with the other routes of conversations


async def get(context: Context, caller: Caller, conversation_id: str) -> Conversation:
    """One of the caller's conversations.

    Raises:
        ApiError: it does not exist.
    """
    try:
        conversation: Conversation = await in_thread(context.store.get, caller.namespace, conversation_id)
    except ConversationNotFound as error:
        raise not_found(error.message, "conversation_id", error.code) from error
    return conversation


async def erase(context: Context, caller: Caller, conversation_id: str) -> dict[str, Any]:
    """Delete a conversation, also one in memory only, and overwrite its rows and its KV.

    Returns how much was erased.

    Raises:
        ApiError: it does not exist.
    """
    try:
        erasing = context.service.erase(
            conversation_id, namespace=caller.namespace, within_s=context.config.operation_timeout_s
        )
        erasure = await asyncio.wrap_future(erasing)
    except ConversationNotFound as error:
        raise not_found(error.message, "conversation_id", error.code) from error
    context.answers.forget(caller.namespace, conversation_id)
    return {
        "turns": erasure.turns,
        "store_bytes": erasure.store_bytes,
        "kv_bytes": erasure.kv_bytes,
        "kv_chunks": erasure.kv_slots,
        "complete": erasure.complete,
    }


def conversation_json(conversation: Conversation) -> dict[str, Any]:
    """A conversation as OpenAI shows it."""
    return {
        "id": conversation.id,
        "object": "conversation",
        "created_at": int(conversation.created_s),
        "metadata": dict(conversation.metadata),
    }


def _messages(items: list[InputItem]) -> tuple[Message, ...]:
    if len(items) > MAX_NEW_ITEMS:
        raise ApiError(
            400,
            f"at most {MAX_NEW_ITEMS} items can be added at a time, got {len(items)}",
            code="invalid_value",
            param="items",
        )
    return messages_of(items, "items")


async def _append(
    context: Context, caller: Caller, conversation: Conversation, messages: tuple[Message, ...]
) -> Turn:
    before = (
        0 if conversation.leaf is None else await in_thread(_stored_chars, context, caller, conversation.leaf)
    )
    check_stored(num_chars := before + chars_of(messages))
    meta = {CHARS: num_chars}
    appended = context.store.append(
        caller.namespace, conversation.id, conversation.leaf, messages, (), only_if_leaf=True, meta=meta
    )
    turn: Turn = await in_thread(appended.result)
    return turn


def _stored_chars(context: Context, caller: Caller, turn_id: str) -> int:
    turn = context.store.turn(caller.namespace, turn_id)
    return stored_chars([turn] if CHARS in turn.meta else context.store.path(caller.namespace, turn_id))


async def _turns(context: Context, caller: Caller, conversation_id: str) -> list[Turn]:
    conversation = await get(context, caller, conversation_id)
    return list(await in_thread(context.store.path, caller.namespace, conversation.leaf))


def _without_call(message: Message, call: int) -> Message | None:
    calls = tuple(other for index, other in enumerate(message.tool_calls) if index != call)
    return Message(message.role, message.content, calls) if calls or message.content else None
