"""/v1/pensieve: the cache map, conversations, hints, pins, forks and recordings.

Knows that API; never how chunks are managed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.responses import Response

from pensieve.engine.messages import CacheMap, HintAnswer, KeepAnswer, MapRow, Stats, tenant_of
from pensieve.errors import ConversationNotFound, KeepRefused, error_from
from pensieve.message import Message
from pensieve.server.bodies import BoundedRoute
from pensieve.server.completed import ANSWER
from pensieve.server.context import Asking, Caller, Context, Server, in_thread
from pensieve.server.conversations import erase, get
from pensieve.server.errors import ApiError
from pensieve.server.fields import Body, Identifier
from pensieve.server.recorders import Recorder
from pensieve.server.responses import turn_of
from pensieve.server.sse import EventStream
from pensieve.server.totals import SOURCES, tiers_json
from pensieve.store import Conversation, Turn

router = APIRouter(prefix="/v1/pensieve", route_class=BoundedRoute)

MAX_ROWS = 500
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "Events, until the time is up"}
}


class ForkRequest(Body):
    """POST /v1/pensieve/conversations/{id}/fork."""

    at: Identifier | None = None  # id of a response or a turn; None for the last one


class TtlRequest(Body):
    """POST /v1/pensieve/conversations/{id}/ttl."""

    seconds: Annotated[float, Field(gt=0, le=10 * 366 * 86400.0)] | None  # None to keep it for ever


@router.get("/map", summary="Where every conversation's chunks lie")
async def cache_map(
    context: Server,
    caller: Asking,
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=0, le=MAX_ROWS)] = 200,
) -> dict[str, Any]:
    """Tiers, counters, and a row for each of the caller's conversations, the latest active first.

    If several tenants share the server, the counters are the caller's own, and the fill of the tiers is
    rounded.
    """
    asked = context.answer_to(context.service.engine.map(offset, limit, namespaces=(caller.namespace,)))
    stats, rows = await asyncio.gather(context.answer_to(context.service.engine.stats()), asked)
    assert isinstance(rows, CacheMap) and isinstance(stats, Stats)
    titles = await in_thread(context.store.titles, caller.namespace, [row.sequence_id for row in rows.rows])
    shared = context.keys is not None and len(context.keys.tenants) > 1
    return {
        "now": time.time(),
        "chunk_tokens": rows.chunk_tokens,
        "total": rows.total,
        "tiers": tiers_json(stats, exact=not shared),
        "stats": _own_stats_json(context, caller, rows.total) if shared else _stats_json(stats, context),
        "rows": [_row_json(row, titles.get(row.sequence_id)) for row in rows.rows],
    }


@router.get("/conversations", summary="The caller's conversations, and what resuming each would cost")
async def list_conversations(
    context: Server,
    caller: Asking,
    limit: Annotated[int, Query(ge=1, le=MAX_ROWS)] = 50,
    offset: Annotated[int, Query(ge=0)] = 0,
) -> dict[str, Any]:
    """The latest used first."""
    conversations, total = await asyncio.gather(
        in_thread(context.store.list, caller.namespace, limit, offset),
        in_thread(context.store.count, caller.namespace),
    )
    rows = await _rows(context, caller, [conversation.id for conversation in conversations])
    return {
        "object": "list",
        "data": [_conversation_json(one, rows.get(one.id)) for one in conversations],
        "total": total,
        "has_more": offset + len(conversations) < total,
    }


@router.get("/conversations/{conversation_id}", summary="A conversation with its messages")
async def show_conversation(conversation_id: str, context: Server, caller: Asking) -> dict[str, Any]:
    """One conversation: its messages, where its chunks are, what resuming it would cost."""
    conversation = await get(context, caller, conversation_id)
    turns = await in_thread(context.store.path, caller.namespace, conversation.leaf)
    rows = await _rows(context, caller, [conversation.id])
    messages = [_message_json(turn, message) for turn in turns for message in turn.messages]
    return _conversation_json(conversation, rows.get(conversation.id)) | {
        "messages": messages,
        "turns": [
            {
                "id": turn.id,
                "reply_reason": turn.reply_reason,
                "tokens": turn.stop,
                "created_at": turn.created_s,
            }
            for turn in turns
        ],
    }


@router.post("/conversations/{conversation_id}/warm", summary="The user is typing: swap in now")
async def warm(conversation_id: str, context: Server, caller: Asking) -> dict[str, Any]:
    """Swap a conversation's chunks in, if there is room that no request needs."""
    await get(context, caller, conversation_id)
    return _hint_json(
        conversation_id,
        await context.answer_to(context.service.engine.warm(conversation_id, namespace=caller.namespace)),
    )


@router.post(
    "/conversations/{conversation_id}/idle", summary="The user is done for now: its cache may go first"
)
async def idle(conversation_id: str, context: Server, caller: Asking) -> dict[str, Any]:
    """Let a conversation's chunks be evicted first."""
    await get(context, caller, conversation_id)
    return _hint_json(
        conversation_id,
        await context.answer_to(context.service.engine.idle(conversation_id, namespace=caller.namespace)),
    )


@router.post("/conversations/{conversation_id}/pin", summary="Never drop a conversation's cache")
async def pin(conversation_id: str, context: Server, caller: Asking) -> dict[str, Any]:
    """Keep a conversation's chunks: they may change tier but are not dropped.

    Refused if the budget of pins is used up.
    """
    conversation = await get(context, caller, conversation_id)
    answer = await context.answer_to(
        context.service.engine.keep(conversation_id, True, namespace=caller.namespace)
    )
    assert isinstance(answer, KeepAnswer)
    if answer.error is not None and answer.code != ConversationNotFound.code:
        raise error_from(answer.code or KeepRefused.code, answer.error)
    await in_thread(context.store.set_pinned, caller.namespace, conversation.id, True)
    row = (await _rows(context, caller, [conversation_id])).get(conversation_id)
    note = None if answer.error is None else "nothing is cached of it now: it is pinned from its next turn on"
    return {
        "id": conversation_id,
        "pinned": True,
        "chunks": 0 if row is None else len(row.cells),
        "note": note,
    }


@router.post("/conversations/{conversation_id}/unpin", summary="Lift a pin")
async def unpin(conversation_id: str, context: Server, caller: Asking) -> dict[str, Any]:
    """Lift a pin; a conversation without one stays as it is."""
    conversation = await get(context, caller, conversation_id)
    await context.answer_to(context.service.engine.keep(conversation_id, False, namespace=caller.namespace))
    await in_thread(context.store.set_pinned, caller.namespace, conversation.id, False)
    return {"id": conversation_id, "pinned": False, "chunks": 0, "note": None}


@router.post(
    "/conversations/{conversation_id}/fork", summary="Begin a conversation that shares another's turns"
)
async def fork(
    conversation_id: str, context: Server, caller: Asking, body: ForkRequest | None = None
) -> dict[str, Any]:
    """The fork shares turns and cache up to `at`."""
    at = body.at if body is not None else None
    if at is not None and at.startswith("resp_"):
        at = turn_of(at)
    await get(context, caller, conversation_id)
    try:
        forked = await in_thread(context.store.fork, caller.namespace, conversation_id, at)
    except ConversationNotFound as error:
        raise ApiError(404, error.message, code="not_found", param="at") from error
    return _conversation_json(forked, None)


@router.post(
    "/conversations/{conversation_id}/ttl",
    summary="Delete a conversation when it has been left alone for so long",
)
async def ttl(conversation_id: str, body: TtlRequest, context: Server, caller: Asking) -> dict[str, Any]:
    """Set how long a conversation is kept after now and after each turn; then it is erased. null keeps it for
    ever.
    """
    await get(context, caller, conversation_id)
    changed = await in_thread(context.store.set_ttl, caller.namespace, conversation_id, body.seconds)
    return _conversation_json(changed, None)


@router.delete("/conversations/{conversation_id}", summary="Delete a conversation, erasing what it left")
async def delete(conversation_id: str, context: Server, caller: Asking) -> dict[str, Any]:
    """Overwrite its rows and truncate the write-ahead log; zero its KV in every tier, shared KV with its last
    reference.
    """
    return {"id": conversation_id, "deleted": True, **await erase(context, caller, conversation_id)}


@router.post("/check", summary="Verify every invariant of the cache")
async def check(context: Server, caller: Asking) -> dict[str, Any]:
    """Only with --debug: with very many chunks it takes seconds, during which no answer goes on."""
    if not context.config.debug:
        raise ApiError(
            403,
            "the cache is verified on demand only where the server was started with --debug",
            code="not_allowed",
        )
    checked: Any = await context.answer_to(context.service.engine.check())
    return {
        "ok": checked.error is None,
        "error": checked.error,
        "leases": checked.leases,
        "used": list(checked.used),
    }


@router.get("/record", summary="Finished turns as they come, for `pensieve record`", responses=EVENTS)
async def record(
    context: Server,
    caller: Asking,
    duration_s: Annotated[float | None, Query(gt=0, allow_inf_nan=False)] = None,
) -> Response:
    """Lengths, times and salted hashes of the caller's own turns from now on, without text or token ids.

    One tenant may have a few recorders at once.
    """
    answers, recorders = context.answers, context.recorders
    if not recorders.has_room(caller.tenant):
        most = recorders.per_tenant
        raise ApiError(
            429,
            f"{recorders.held(caller.tenant)} recorders of your keys are at work, "
            f"at most {most} may: end one",
            code="too_many_recorders",
        )
    recorder = Recorder(caller.tenant, context.info.chunk_tokens)

    def on_open(change: int) -> None:
        if change > 0:
            if not recorders.take(caller.tenant):  # several requests came at the same moment
                raise ApiError(429, "too many recorders are at work: end one", code="too_many_recorders")
            answers.watchers.append(recorder.take)
        else:
            recorders.give(caller.tenant)
            answers.watchers.remove(recorder.take)
        context.metrics.streams.inc(change)

    events = recorder.events(answers, duration_s)
    return EventStream(
        events, on_gone=lambda: None, stall_timeout_s=context.config.stall_timeout_s, on_open=on_open
    )


# -- inside


async def _rows(context: Context, caller: Caller, ids: list[str]) -> dict[str, MapRow]:
    if not ids:
        return {}
    rows = await context.answer_to(
        context.service.engine.rows([(caller.namespace, conversation_id) for conversation_id in ids])
    )
    assert isinstance(rows, CacheMap)
    return {row.sequence_id: row for row in rows.rows}


def _message_json(turn: Turn, message: Message) -> dict[str, Any]:
    told = turn.meta.get(ANSWER) if message.role == "assistant" else None
    shown: dict[str, Any] = {"role": message.role, "content": message.content, "turn": turn.id}
    if message.tool_calls:
        shown["tool_calls"] = [
            {"id": call.id, "name": call.name, "arguments": call.arguments} for call in message.tool_calls
        ]
    if isinstance(told, dict):
        shown["pensieve"] = told.get("receipt")
    return shown


def _row_json(row: MapRow, title: str | None) -> dict[str, Any]:
    return {
        "id": row.sequence_id,
        "title": title or row.sequence_id,
        "idle_s": round(row.idle_s, 3),
        "active": row.active,
        "pinned": row.kept,
        "tokens": row.tokens,
        "resume_ms": None if row.resume_s is None else round(1e3 * row.resume_s, 2),
        "cells": row.cells,
    }


def _conversation_json(conversation: Conversation, row: MapRow | None) -> dict[str, Any]:
    return {
        "id": conversation.id,
        "object": "pensieve.conversation",
        "title": conversation.title or conversation.id,
        "created_at": conversation.created_s,
        "updated_at": conversation.updated_s,
        "pinned": conversation.pinned,
        "ttl_seconds": conversation.ttl_s,
        "expires_at": conversation.expires_s,
        "metadata": dict(conversation.metadata),
        "cells": "" if row is None else row.cells,
        "tokens": 0 if row is None else row.tokens,
        "resume_ms": None if row is None or row.resume_s is None else round(1e3 * row.resume_s, 2),
    }


def _hint_json(conversation_id: str, answer: object) -> dict[str, Any]:
    assert isinstance(answer, HintAnswer)
    return {"id": conversation_id, "chunks": answer.chunks, "note": answer.error}


def _own_stats_json(context: Context, caller: Caller, num_sequences: int) -> dict[str, Any]:
    """Those counters of `_stats_json` that concern only the caller's tenant, since the server started."""
    own = context.totals.of(caller.tenant)
    open_ = [
        answer for answer in context.answers.open.values() if tenant_of(answer.namespace) == caller.tenant
    ]
    running = sum(answer.first_piece_s is not None for answer in open_)
    return {
        "waiting": len(open_) - running,
        "running": running,
        "sequences": num_sequences,
        **own,
        "engine_restarts": context.engine.restarts,
        "hit_rates": _hit_rates(own),
    }


def _hit_rates(counts: Mapping[str, int]) -> dict[str, float]:
    prompt = sum(counts[f"{name}_tokens"] for name in SOURCES)
    return {name: counts[f"{name}_tokens"] / prompt if prompt else 0.0 for name in SOURCES}


def _stats_json(stats: Stats, context: Context) -> dict[str, Any]:
    shown = asdict(stats)
    del shown["tag"], shown["tiers"]
    return shown | {
        "evictions": dict(stats.evictions),
        "engine_restarts": context.engine.restarts,
        "hit_rates": _hit_rates(shown),
    }
