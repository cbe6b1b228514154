"""Routes about the server itself: models, tokens, health, metrics, the page. Knows no conversations."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field, StrictBool, StrictInt, StrictStr
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response

from pensieve import __version__
from pensieve.engine.messages import Stats
from pensieve.server.bodies import BoundedRoute
from pensieve.server.chat_messages import Messages
from pensieve.server.context import Asking, Context, Server
from pensieve.server.errors import ApiError, not_found
from pensieve.server.fields import Body
from pensieve.text import DecodeIds, EncodeChat, EncodeText

router = APIRouter(route_class=BoundedRoute)

STATIC = Path(__file__).parent / "static"
# Scripts and styles come from this server only, whatever a model or a user wrote into a chat.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
# A name from a request is looked up here and never joined to a path.
ASSETS = {
    path.relative_to(STATIC).as_posix(): path
    for path in STATIC.rglob("*")
    if path.suffix in MEDIA_TYPES and path.is_file()
}
STATS_TIMEOUT_S = 2.0
MAX_DECODED = 1 << 18  # token ids that one request may have decoded


class TokenizeRequest(Body):
    """POST /tokenize: a text, or messages as a chat would be put before the model."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: Messages | None = None
    add_special_tokens: StrictBool = True
    add_generation_prompt: StrictBool = True


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: StrictStr | None = None
    tokens: Annotated[
        list[Annotated[StrictInt, Field(ge=0, lt=1 << 32)]], Field(fail_fast=True, max_length=MAX_DECODED)
    ]


@router.get("/v1/models", summary="The model that is served")
async def models(context: Server, caller: Asking) -> dict[str, Any]:
    """A list of the one model."""
    return {"object": "list", "data": [_model_json(context)]}


@router.get("/v1/models/{model:path}", summary="A model")
async def model(model: str, context: Server, caller: Asking) -> dict[str, Any]:
    """The model, if it is served here."""
    context.check_model(model)
    return _model_json(context)


@router.post("/tokenize", summary="Text or messages to token ids")
async def tokenize(body: TokenizeRequest, context: Server, caller: Asking) -> Response:
    """Token ids of a prompt or a chat; at most twice the context."""
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "send either prompt or messages", code="invalid_value", param="prompt")
    limit, way_out = 2 * context.info.max_context, "that are counted at a time, two contexts: send less"
    if body.messages is not None:
        messages = tuple(message.message(f"messages.{index}") for index, message in enumerate(body.messages))
        tokens = await context.written(
            EncodeChat(messages, limit, body.add_generation_prompt, way_out), caller.tenant
        )
    else:
        assert body.prompt is not None
        tokens = await context.written(
            EncodeText(body.prompt, limit, body.add_special_tokens, way_out), caller.tenant
        )
    return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": context.info.max_context})


@router.post("/detokenize", summary="Token ids to text")
async def detokenize(body: DetokenizeRequest, context: Server, caller: Asking) -> dict[str, Any]:
    """The text of token ids, control tokens written out."""
    context.check_tokens(body.tokens, "tokens")
    return {"prompt": await context.written(DecodeIds(tuple(body.tokens)), caller.tenant)}


@router.get("/health", summary="Alive")
async def health(context: Server) -> dict[str, str]:
    """Whether this process answers at all."""
    return {"status": "ok"}


@router.get("/ready", summary="Ready for turns")
async def ready(context: Server) -> Response:
    """Whether a turn sent now would be answered."""
    state, troubles = "draining" if context.answers.draining else context.engine.state, context.troubles()
    if state == "ready" and troubles:
        state = "troubled"
    body = {"status": state, "engine_restarts": context.engine.restarts} | (
        {"troubles": troubles} if troubles else {}
    )
    return JSONResponse(body, 200 if state == "ready" else 503)


@router.get("/version", summary="Version")
async def version(context: Server) -> dict[str, Any]:
    """Version, model and context of this server."""
    info = context.info
    return {
        "version": __version__,
        "model": info.model,
        "weights": info.weights,
        "dtype": info.dtype,
        "device": info.device,
        "instructions": info.instructions,
        "max_context": info.max_context,
        "chunk_tokens": info.chunk_tokens,
    }


@router.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
async def metrics(context: Server) -> Response:
    """The text that Prometheus reads."""
    stats: object = None
    if context.engine.state == "ready":
        try:
            stats = await asyncio.wait_for(
                asyncio.wrap_future(context.service.engine.stats()), STATS_TIMEOUT_S
            )
        except Exception:  # the engine is busy or restarting: its counters are left out this time
            stats = None
    text = context.metrics.render(stats if isinstance(stats, Stats) else None, context.engine.restarts)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The web page."""
    return _file("index.html")


@router.get("/static/{name:path}", include_in_schema=False)
async def asset(name: str) -> Response:
    """Scripts, styles and pictures of the page."""
    return _file(name)


def _file(name: str) -> Response:
    path = ASSETS.get(name)
    if path is None:
        raise not_found(f"there is no {name!r} here")
    return FileResponse(path, media_type=MEDIA_TYPES[path.suffix], headers=PAGE_HEADERS)


def _model_json(context: Context) -> dict[str, Any]:
    return {
        "id": context.config.model,
        "object": "model",
        "created": int(context.started_s),
        "owned_by": "pensieve",
        "max_model_len": context.info.max_context,
    }
