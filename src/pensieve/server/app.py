"""The application: routes, limits, work at start and end.

Knows the parts and their order; never what they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware

from pensieve import __version__
from pensieve.server import chat, completions, conversations, errors, ops, pensieve_api, responses
from pensieve.server.answer import Answer
from pensieve.server.context import Context
from pensieve.server.guard import GuardRules, RequestGuard
from pensieve.server.metrics import Metrics
from pensieve.server.sweeper import Sweeper

log = logging.getLogger(__name__)

# threads that wait for the store; asyncio would make 6 on a machine with 2 cores, and a few slow reads take
# all of them
NUM_THREADS = 32

MakeContext = Callable[[], Context]  # called in the event loop
Ended = Callable[[], None]  # called in a thread, after the last answer


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every failure."""

    error: ErrorDetail


_FAILURES: dict[int | str, dict[str, Any]] = {
    400: {
        "model": ErrorBody,
        "description": "The request is wrong; the message says what and how to mend it",
    },
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


def create_app(
    make_context: MakeContext, metrics: Metrics, rules: GuardRules, on_end: Ended = lambda: None
) -> FastAPI:
    """The ASGI application."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(NUM_THREADS, "server"))
        context = app.state.context = make_context()
        context.checks["store"] = context.store.trouble
        tasks = [asyncio.ensure_future(Sweeper(context).run())]
        if context.keys is not None:
            context.checks["keys"] = context.keys.trouble
            metrics.key_file_error.set_function(
                lambda: context.keys is not None and context.keys.trouble() is not None
            )
            tasks.append(asyncio.ensure_future(context.keys.watch()))
        context.answers.watchers += [context.totals.add, _observer(metrics)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await context.answers.drain(context.config.drain_timeout_s)
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
    for module in (chat, completions, responses, conversations, pensieve_api, ops):
        app.include_router(module.router)
    app.add_middleware(RequestGuard, metrics=metrics, rules=rules)
    if rules.origins:  # before the guard, because a browser sends preflight requests without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(rules.origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )
    return app


def _observer(metrics: Metrics) -> Callable[[Answer], None]:
    def observe(answer: Answer) -> None:
        if answer.done is not None:
            metrics.observe(answer.done.receipt)

    return observe
