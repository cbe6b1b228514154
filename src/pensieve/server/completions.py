"""POST /v1/completions: text is continued.

Knows that API; never conversations: cache hits are found by tokens only.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from pensieve.engine.messages import Token
from pensieve.errors import ContextLengthExceeded
from pensieve.server.answer import Answer
from pensieve.server.bodies import BoundedRoute
from pensieve.server.chat import EARLY_S, usage_json
from pensieve.server.completed import receipt_json, usage_of
from pensieve.server.completion_request import CompletionRequest
from pensieve.server.context import Asking, Context, Server
from pensieve.server.sse import DONE, STREAMED, EventStream, data, unless_gone
from pensieve.server.writing import is_long
from pensieve.service import TurnDone, TurnSpec
from pensieve.text import DecodeIds, EncodeText

router = APIRouter(route_class=BoundedRoute)


@router.post("/v1/completions", summary="Go on with a text", responses=STREAMED)
async def completions(request: Request, body: CompletionRequest, context: Server, caller: Asking) -> Response:
    """OpenAI's (older) text completions, streaming and not."""
    body.refuse()
    context.check_model(body.model)
    prompt = body.one_prompt()
    tokens, written = await _read(context, prompt, bool(body.echo), caller.tenant)
    spec = TurnSpec(
        caller.namespace,
        None,
        (),
        body.sampling(body.max_tokens if body.max_tokens is not None else 16, body.logprobs),
        body.stops(),
        bool(body.ignore_eos),
        raw=(tokens, 0),
        raw_text=True,
    )
    answer = context.answers.start(spec)

    def gone() -> None:
        context.answers.abort(answer)

    echo = written if body.echo else ""
    if body.stream:
        await unless_gone(request, answer.begun(EARLY_S), gone)
        if answer.error is not None:
            raise answer.error
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        events = _stream(context, answer, echo, include_usage)
        return EventStream(
            events,
            on_gone=gone,
            stall_timeout_s=context.config.stall_timeout_s,
            on_open=context.metrics.streams.inc,
        )
    done = await unless_gone(request, answer.result(), gone)

    def whole() -> dict[str, Any]:
        logprobs = None
        if spec.sampling.logprobs is not None:
            logprobs = _logprobs(context, answer.turn.sampled[: len(done.output)], len(echo))
        choice = {"index": 0, "text": echo + done.text, "logprobs": logprobs, "finish_reason": _reason(done)}
        told = {
            "choices": [choice],
            "usage": usage_json(usage_of(done)),
            "pensieve": receipt_json(done.receipt, done.warning),
        }
        return _head(context, answer) | told

    return await context.writing.reply(whole, is_long(spec.sampling, len(done.output)))


async def _read(
    context: Context, prompt: str | list[int], wants_text: bool, tenant: str
) -> tuple[tuple[int, ...], str]:
    """The prompt as token ids, and as text if `wants_text`."""
    limit = context.info.max_context
    way_out = "that the context holds: shorten it" + (
        "" if context.info.limit is None else f", or {context.info.limit.way_out()}"
    )
    if isinstance(prompt, str):
        return await context.written(EncodeText(prompt, limit, way_out=way_out), tenant), prompt
    if len(prompt) > limit:
        raise ContextLengthExceeded(f"the prompt has {len(prompt)} tokens, more than the {limit} {way_out}")
    context.check_tokens(prompt, "prompt")
    ids = tuple(prompt)
    return ids, await context.written(DecodeIds(ids), tenant) if wants_text else ""


async def _stream(context: Context, answer: Answer, echo: str, include_usage: bool) -> AsyncIterator[bytes]:
    head = _head(context, answer)
    offset = len(echo)

    def chunk(text: str, logprobs: Any = None, reason: str | None = None, **more: Any) -> bytes:
        return data(
            head
            | {"choices": [{"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}], **more}
        )

    if echo:
        yield chunk(echo)
    async for piece in answer.read():
        logprobs = (
            _logprobs(context, piece.tokens, offset)
            if answer.turn.spec.sampling.logprobs is not None
            else None
        )
        offset += len(piece.text)
        yield chunk(piece.text, logprobs)
    done = await answer.result()
    yield chunk("", None, _reason(done), pensieve=receipt_json(done.receipt, done.warning))
    if include_usage:
        yield data(head | {"choices": [], "usage": usage_json(usage_of(done))})
    yield DONE


def _head(context: Context, answer: Answer) -> dict[str, Any]:
    return {
        "id": f"cmpl-{answer.id}",
        "object": "text_completion",
        "created": answer.created,
        "model": context.config.model,
    }


def _reason(done: TurnDone) -> str:
    return "length" if done.reason.value == "length" else "stop"


def _logprobs(context: Context, tokens: tuple[Token, ...] | list[Token], offset: int) -> dict[str, Any]:
    """Log-probabilities in the older form: four parallel lists."""
    written = [context.text.token_text(token.token_id) for token in tokens]
    offsets = []
    for text in written:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": written,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            {context.text.token_text(token_id): logprob for token_id, logprob in token.top}
            for token in tokens
        ],
        "text_offset": offsets,
    }
