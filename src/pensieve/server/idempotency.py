"""Idempotency keys: a retry gets the answer of the first try if that is complete or open, else a new one.

Knows keys and turns; never what bodies mean.

What a key stands for, by how its turn ended:

- complete (stop, length, tool calls): the same answer, as long as keys are remembered, also after a restart
- cancelled by its client: the same answer, cut where it was
- failed, timed out, given up at a shutdown, or lost with its server before it was complete: the key is free
- open on this server: that answer, from its first token on; on another server: the retry waits, then gets 409
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel

from pensieve.server.answer import Answer
from pensieve.server.context import Caller, Context, in_thread
from pensieve.server.errors import ApiError
from pensieve.service import TurnSpec
from pensieve.store import Turn

MAX_KEY = 255
ELSEWHERE_S = 20.0  # how long a request waits for an answer of another server
HERE_S = 2.0  # how long it waits for a try on this server that timed out to be settled
POLL_S = 0.25  # how often it looks while it waits


@dataclass(frozen=True, slots=True)
class Retry:
    """The answer to an earlier request with the same key."""

    live: Answer | None  # open here, or ended a while ago
    stored: Turn | None
    conversation_id: str | None = None  # of the stored turn


@dataclass(frozen=True, slots=True)
class Claimed:
    """A key that stands for this request."""

    namespace: str
    key: str


async def claim(
    context: Context, caller: Caller, key: str | None, endpoint: str, body: BaseModel, turn_id: str
) -> Claimed | Retry | None:
    """Claim a key for a turn. Returns None if the client sent no key.

    Raises:
        ApiError: the key is too long, was used for another request, or its answer is still open on another
        server.
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
        # One at a time: the request that gets the key begins its answer before the next one looks for it,
        # because nothing is awaited between the two.
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
    """As `claim`; a number is how many seconds to wait for an answer that is open elsewhere, or being given
    up here.
    """
    stores = context.service.stores
    for _ in range(2):
        held = await in_thread(
            context.store.claim, caller.namespace, key, fingerprint, turn_id, owner=stores.owner
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
        live = context.answers.find(caller.namespace, held.turn_id)
        if live is not None and live.error is None:
            return Retry(live, None)
        ours = held.owner == stores.owner
        if held.stored or ours:  # a chat in memory only is not in the store that has the claims
            turn = await in_thread(stores.turn, caller.namespace, held.turn_id)
            if turn is not None:
                return Retry(None, turn, await in_thread(stores.conversation_of, caller.namespace, turn.id))
        if not ours or (live is not None and not live.turn.future.done()):
            return HERE_S if ours else ELSEWHERE_S
        # The first try failed or never began: the key is free, unless another request has claimed it by now.
        await asyncio.wrap_future(context.store.release(caller.namespace, key, held.turn_id))
    return ELSEWHERE_S


def start(context: Context, held: Claimed | None, spec: TurnSpec, created: int, record: Any = None) -> Answer:
    """Begin to answer a request that has claimed its key, if it sent one; the key is released if this or the
    answer fails.

    Raises:
        Overloaded, Draining: as `OpenAnswers.start`.
    """
    if held is None:
        return context.answers.start(spec, created=created, record=record)
    try:
        answer = context.answers.start(replace(spec, claimed=True), created=created, record=record)
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
