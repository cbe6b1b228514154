"""One answer a key: a retry gets the first try's answer if that is whole or on its way, and is answered anew if not. Knows keys and turns; never bodies' meaning.

What becomes of a key, by how its turn ended:

- whole (stop, length, a call of tools): the same answer, for as long as keys are remembered, also after a restart
- cancelled by its client: the same answer, cut where it was
- failed, timed out, given up at a shutdown, or lost with its server before it was whole: the key is free
- under way on this server: that answer, from its first token on; on another one: waited for, then 409
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel

from pensieve.server.context import Caller, Context, in_thread
from pensieve.server.errors import ApiError
from pensieve.server.turns import Answer
from pensieve.service import TurnSpec
from pensieve.store import Turn

MAX_KEY = 255
ELSEWHERE_S = 20.0  # how long a request waits for another server's answer
HERE_S = 2.0  # and until it is known what became of a try that ran out of time on this one
POLL_S = 0.25  # how often it looks


@dataclass(frozen=True, slots=True)
class Retry:
    """What is known of an earlier request with the same key."""

    live: Answer | None  # under way here, or ended a while ago
    stored: Turn | None
    conversation_id: str | None = None  # of the stored turn


@dataclass(frozen=True, slots=True)
class Claimed:
    """A key that is this request's."""

    namespace: str
    key: str


async def claim(
    context: Context, caller: Caller, key: str | None, endpoint: str, body: BaseModel, turn_id: str
) -> Claimed | Retry | None:
    """Take a key for a turn. None: the client sent no key.

    Raises:
        ApiError: the key is too long, or was used for another request, or its answer is still being made, by another server.
    """
    if key is None:
        return None
    if not 1 <= len(key) <= MAX_KEY:
        raise ApiError(
            400,
            f"Idempotency-Key must have 1 to {MAX_KEY} characters, got {len(key)}",
            code="invalid_value",
            param="Idempotency-Key",
        )
    fingerprint = _fingerprint(endpoint, body)
    began_s = time.monotonic()
    while True:
        # One at a time: the request that gets the key has begun its answer before the next one looks for it, for nothing is awaited between.
        async with context.claiming.setdefault((caller.namespace, key), asyncio.Lock()):
            found = await _claim(context, caller, key, fingerprint, turn_id)
        if not isinstance(found, float):
            return found
        if time.monotonic() - began_s >= found:
            message = (
                f"the request with Idempotency-Key {key!r} is still being answered: try again in a moment"
            )
            raise ApiError(
                409, message, code="conflict", param="Idempotency-Key", headers={"Retry-After": "2"}
            )
        await asyncio.sleep(POLL_S)


async def _claim(
    context: Context, caller: Caller, key: str, fingerprint: bytes, turn_id: str
) -> Claimed | Retry | float:
    """A number: the answer is being made by another server, or is just being given up here; so many seconds are to be waited."""
    service = context.service
    for _ in range(2):
        held = await in_thread(
            context.store.claim, caller.namespace, key, fingerprint, turn_id, owner=service.owner
        )
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
        ours = held.owner == service.owner
        if held.stored or ours:  # (a chat that is kept in memory only is not stored where claims are)
            turn = await in_thread(service.stored_turn, caller.namespace, held.turn_id)
            if turn is not None:
                return Retry(None, turn, await in_thread(service.home, caller.namespace, turn.id))
        if not ours or (live is not None and not live.turn.future.done()):
            return HERE_S if ours else ELSEWHERE_S
        # The first try failed, or never began: the key is free, unless another request has it by now.
        await asyncio.wrap_future(context.store.release(caller.namespace, key, held.turn_id))
    return ELSEWHERE_S


def start(context: Context, held: Claimed | None, spec: TurnSpec, created: int, record: Any = None) -> Answer:
    """Begin to answer a request that has claimed its key, if it has one; the key is let go if that, or the answer, fails.

    Raises:
        Overloaded, Draining: as `Turns.start`.
    """
    if held is None:
        return context.turns.start(spec, created=created, record=record)
    try:
        answer = context.turns.start(replace(spec, claimed=True), created=created, record=record)
    except BaseException:
        context.store.release(held.namespace, held.key, spec.turn_id)
        raise

    def ended(_: Any) -> None:
        future = answer.turn.future
        if future.cancelled() or future.exception() is not None or future.result().turn_id is None:
            context.store.release(held.namespace, held.key, answer.id)

    answer.turn.future.add_done_callback(ended)
    return answer


def _fingerprint(endpoint: str, body: BaseModel) -> bytes:
    sent = body.model_dump(mode="json", exclude_unset=True)
    sent.pop("stream", None)  # a retry may ask for the answer in one piece
    sent.pop("stream_options", None)
    return hashlib.blake2b(json.dumps([endpoint, sent], sort_keys=True).encode(), digest_size=16).digest()
