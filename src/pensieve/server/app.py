"""The application: routes, limits, what happens at start and end. Knows the pieces and their order; never what they do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware

from pensieve import __version__
from pensieve.errors import PensieveError
from pensieve.server import chat, completions, conversations, errors, native, ops, responses
from pensieve.server.context import Context
from pensieve.server.door import Door, DoorRules
from pensieve.server.metrics import Metrics

log = logging.getLogger(__name__)

SWEEP_S = 5.0  # how often conversations whose time is up are looked for
MAX_SWEPT = 64  # at a time
IDEMPOTENCY_S = 24 * 3600.0  # how long a key is remembered
PURGE_S = 3600.0
NUM_THREADS = 32  # that wait for the store; asyncio's own number is 6 on a machine with 2 cores, and a few slow reads would take all

MakeContext = Callable[[], Context]  # called in the event loop
Ended = Callable[[], None]  # called in a thread, after the last answer


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Every failure has this form."""

    error: ErrorDetail


_FAILURES: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request is wrong; the message says what and how to mend it"},
    401: {"model": ErrorBody, "description": "An API key is needed"},
    403: {"model": ErrorBody, "description": "Not allowed on this server"},
    404: {"model": ErrorBody, "description": "Not there, or not this key's"},
    409: {"model": ErrorBody, "description": "In conflict with another request"},
    413: {"model": ErrorBody, "description": "The body is too large"},
    422: {"model": ErrorBody, "description": "An Idempotency-Key that was used for another request"},
    429: {"model": ErrorBody, "description": "Too many requests: try again after Retry-After seconds"},
    500: {"model": ErrorBody, "description": "The server failed"},
    503: {"model": ErrorBody, "description": "Not ready: try again after Retry-After seconds"},
    504: {"model": ErrorBody, "description": "The answer took too long"},
}


def create_app(make_context: MakeContext, metrics: Metrics, rules: DoorRules, on_end: Ended = lambda: None) -> FastAPI:
    """The ASGI application."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(NUM_THREADS, "server"))
        context = app.state.context = make_context()
        tasks = [asyncio.ensure_future(_sweep(context))]
        if context.keys is not None:
            context.checks["keys"] = context.keys.trouble
            metrics.key_file_error.set_function(lambda: context.keys is not None and context.keys.trouble() is not None)
            tasks.append(asyncio.ensure_future(context.keys.watch()))
        context.turns.watchers.append(context.totals.add)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await context.turns.drain(context.config.drain_timeout_s)
            await asyncio.to_thread(on_end)

    app = FastAPI(
        title="Pensieve",
        version=__version__,
        summary="Conversations with a large language model that keep their KV cache between turns",
        docs_url=None,  # (their pages come from a CDN)
        redoc_url=None,
        lifespan=lifespan,
        responses=_FAILURES,
    )
    errors.install(app)
    for module in (chat, completions, responses, conversations, native, ops):
        app.include_router(module.router)
    app.add_middleware(Door, metrics=metrics, rules=rules)
    if rules.origins:  # before the door: a browser asks without a key whether a page may ask
        app.add_middleware(
            CORSMiddleware, allow_origins=sorted(rules.origins), allow_methods=["*"], allow_headers=["*"], expose_headers=["X-Request-Id"]
        )
    return app


async def _sweep(context: Context) -> None:
    """Delete conversations whose time is up, and forget old idempotency keys."""
    purged_s = 0.0
    while True:
        try:
            expired = await asyncio.to_thread(context.service.expired, time.time(), MAX_SWEPT)
            for conversation in expired:
                last = conversation is expired[-1]  # (overwriting rewrites the database: once is enough)
                try:
                    await asyncio.wrap_future(context.service.erase(conversation.id, namespace=conversation.namespace, overwrite=last))
                    context.turns.forget(conversation.namespace, conversation.id)
                    log.info("conversation %s is deleted: its time was up", conversation.id)
                except PensieveError as error:  # it is tried again next time; the others' time is up all the same
                    log.warning("conversation %s, whose time is up, could not be deleted: %s", conversation.id, error.message)
            if time.time() - purged_s > PURGE_S:
                purged_s = time.time()
                await asyncio.to_thread(context.store.purge, purged_s - IDEMPOTENCY_S)
        except PensieveError as error:
            log.warning("looking for conversations whose time is up failed: %s", error.message)
        except Exception:
            log.exception("looking for conversations whose time is up failed")
        await asyncio.sleep(SWEEP_S)
