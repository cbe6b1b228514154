"""The application: routes, limits, what happens at start and end. Knows the pieces and their order; never what they do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pensieve import __version__
from pensieve.server import chat, completions, conversations, errors, native, ops, responses
from pensieve.server.context import Context, tenant_by_key
from pensieve.server.errors import ApiError, error_response
from pensieve.server.metrics import Metrics
from pensieve.server.sweeper import Sweeper

log = logging.getLogger(__name__)

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


def create_app(
    make_context: MakeContext, metrics: Metrics, max_body_bytes: int, on_end: Ended = lambda: None, *, hosts: frozenset[str] | None = None
) -> FastAPI:
    """The ASGI application. `hosts` are the names by which it may be called; None: any."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        context = app.state.context = make_context()
        context.checks["store"] = context.store.trouble
        sweeper = asyncio.ensure_future(Sweeper(context).run())
        try:
            yield
        finally:
            sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sweeper
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
    app.add_middleware(Door, metrics=metrics, max_body_bytes=max_body_bytes, hosts=hosts)
    return app


class Door:
    """Counts requests, gives each an id, and refuses those for other hosts, those without a key and those whose bodies are too large, before anything reads them.

    A server without keys trusts everybody on this machine. A page from elsewhere must not become one of them by giving its own name this
    machine's address (DNS rebinding), hence `hosts`.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, max_body_bytes: int, hosts: frozenset[str] | None) -> None:
        self._app = app
        self._hosts = hosts
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = _as_routed(scope)
        request_id = f"req_{uuid.uuid4().hex}"
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        host = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
        status = 0

        async def counting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        num_bytes = 0

        async def limited_receive() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise HTTPException(413, self._too_large(num_bytes))
            return message

        try:
            if self._hosts is not None and _without_port(host) not in self._hosts:
                message = f"this server has no keys and answers to {', '.join(sorted(self._hosts))} only, not to {host!r}: start it with --api-key-file"
                await error_response(ApiError(403, message, code="host_not_allowed"))(scope, receive, counting_send)
                return
            if length.isdigit() and int(length) > self._max_body_bytes:
                too_large = ApiError(413, self._too_large(int(length)), code="request_too_large", headers={"Connection": "close"})
                await error_response(too_large)(scope, receive, counting_send)
                return
            if scope["method"] not in ("GET", "HEAD", "OPTIONS"):  # nobody's body is read, and nothing said of it, without a key
                authorization = next((value for name, value in scope["headers"] if name == b"authorization"), b"").decode("latin-1")
                try:
                    tenant_by_key(scope["app"].state.context.keys, authorization)
                except ApiError as error:
                    error.headers["Connection"] = "close"
                    await error_response(error)(scope, receive, counting_send)
                    return
            await self._app(scope, limited_receive, counting_send)
        except Exception as error:
            log.error("%s %s failed (%s)", scope["method"], scope["path"], request_id, exc_info=error)
            if status:  # too late for another answer
                raise
            await error_response(error)(scope, receive, counting_send)
        finally:
            route = scope.get("route")
            self._metrics.requests.labels(getattr(route, "path", "other"), str(status)).inc()

    def _too_large(self, num_bytes: int) -> str:
        return f"the body has {num_bytes} bytes or more, at most {self._max_body_bytes} are taken (--max-body)"


def _without_port(host: str) -> str:
    name, _, port = host.rpartition(":")
    return name if name and port.isdigit() else host


def _as_routed(scope: Scope) -> Scope:
    """A request as the routes know it: HEAD is a GET whose body the HTTP server leaves out, and a slash at the end means nothing."""
    path = scope["path"]
    if scope["method"] != "HEAD" and not path.endswith("/"):
        return scope
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "method": method, "path": path.rstrip("/") or "/"}
