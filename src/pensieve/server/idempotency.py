"""Exactly one turn a key: who retries gets the first try's answer. Knows keys and turns; never bodies' meaning."""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from pensieve.errors import ConversationNotFound
from pensieve.server.context import Caller, Context, in_thread
from pensieve.server.errors import ApiError
from pensieve.server.turns import Answer
from pensieve.store.base import Turn

MAX_KEY = 255


@dataclass(frozen=True, slots=True)
class Retry:
    """What is known of an earlier request with the same key."""

    live: Answer | None  # under way, or ended a while ago
    stored: Turn | None


@dataclass(frozen=True, slots=True)
class Claimed:
    """A key that is this request's."""

    namespace: str
    key: str


async def claim(context: Context, caller: Caller, key: str | None, endpoint: str, body: BaseModel, turn_id: str) -> Claimed | Retry | None:
    """Take a key for a turn. None: the client sent no key.

    Raises:
        ApiError: the key is too long, or was used for another request.
    """
    if key is None:
        return None
    if not 1 <= len(key) <= MAX_KEY:
        raise ApiError(
            400, f"Idempotency-Key must have 1 to {MAX_KEY} characters, got {len(key)}", code="invalid_value", param="Idempotency-Key"
        )
    fingerprint = _fingerprint(endpoint, body)
    # One at a time: who gets the key has begun its answer before the next one looks for it, for nothing is awaited between.
    async with context.claiming.setdefault((caller.namespace, key), asyncio.Lock()):
        return await _claim(context, caller, key, fingerprint, turn_id)


async def _claim(context: Context, caller: Caller, key: str, fingerprint: bytes, turn_id: str) -> Claimed | Retry:
    for _ in range(3):
        held = await in_thread(context.store.claim, caller.namespace, key, fingerprint, turn_id)
        if held.fresh:
            return Claimed(caller.namespace, key)
        if held.fingerprint != fingerprint:
            raise ApiError(
                422,
                f"Idempotency-Key {key!r} was used for another request: use a new key for a new request",
                code="idempotency_key_reused",
                param="Idempotency-Key",
            )
        live = context.turns.find(caller.namespace, held.turn_id)
        if live is not None and live.error is None:
            return Retry(live, None)
        if live is not None and not live.settled:
            raise ApiError(
                409,
                f"the first request with Idempotency-Key {key!r} ran out of time and is being ended: try again in a moment",
                code="conflict",
                param="Idempotency-Key",
                headers={"Retry-After": "2"},
            )
        try:
            return Retry(None, await in_thread(context.store.turn, caller.namespace, held.turn_id))
        except ConversationNotFound:  # the first try failed, or died with its process: nothing was stored, so this one is the first
            await in_thread(context.store.release, caller.namespace, key, held.turn_id)
    raise ApiError(
        409, f"Idempotency-Key {key!r} is being used by another request right now: try again", code="conflict", param="Idempotency-Key"
    )


def release_on_failure(context: Context, held: Claimed | None, answer: Answer) -> None:
    """Let the key go if the answer failed, so that a retry may try."""
    if held is None:
        return

    def ended(_: Any) -> None:
        future = answer.turn.future
        if future.cancelled() or future.exception() is not None or future.result().turn_id is None:
            context.store.release(held.namespace, held.key, answer.id)

    answer.turn.future.add_done_callback(ended)


def _fingerprint(endpoint: str, body: BaseModel) -> bytes:
    sent = body.model_dump(mode="json", exclude_unset=True)
    sent.pop("stream", None)  # a retry may ask for the answer in one piece
    sent.pop("stream_options", None)
    return hashlib.blake2b(json.dumps([endpoint, sent], sort_keys=True).encode(), digest_size=16).digest()
