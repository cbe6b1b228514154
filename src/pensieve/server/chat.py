"""POST /v1/chat/completions: the whole history comes with every request, and is recognised.

Knows that API; never the cache.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from starlette.responses import JSONResponse, Response

from pensieve import __version__
from pensieve.server import idempotency
from pensieve.server.answer import Answer
from pensieve.server.bodies import BoundedRoute
from pensieve.server.chat_request import ChatRequest
from pensieve.server.completed import (
    Completed,
    completed_before,
    completed_now,
    finish_reason,
    logprob_items,
    with_answer_meta,
)
from pensieve.server.context import Asking, Caller, Context, Server
from pensieve.server.errors import ApiError
from pensieve.server.request_tools import ChosenTool, form_for, functions_of
from pensieve.server.sse import DONE, STREAMED, EventStream, data, unless_gone
from pensieve.server.writing import is_long
from pensieve.service import TurnSpec
from pensieve.service.answer_parser import AnswerEvent, AnswerForm
from pensieve.text import CallBegin, CallDelta, ChatText, ContentDelta, ReasoningDelta

router = APIRouter(route_class=BoundedRoute)

EARLY_S = 5.0  # an error within this time gets an HTTP status; later ones are events of the stream


@router.post(
    "/v1/chat/completions",
    summary="Answer a chat; its history is recognised and not computed again",
    responses=STREAMED,
)
async def chat_completions(
    request: Request,
    body: ChatRequest,
    context: Server,
    caller: Asking,
    idempotency_key: Annotated[str | None, Header()] = None,
    x_session_id: Annotated[str | None, Header()] = None,
    x_openwebui_chat_id: Annotated[str | None, Header()] = None,
) -> Response:
    """OpenAI's chat completions, streaming and not."""
    body.refuse()
    context.check_model(body.model)
    spec = _spec(body, context, caller, x_session_id or x_openwebui_chat_id)
    held = await idempotency.claim(context, caller, idempotency_key, "chat", body, spec.turn_id)
    if isinstance(held, idempotency.Retry):
        if held.stored is not None:
            return _again(body, context, completed_before(held.stored, held.conversation_id))
        assert held.live is not None
        answer = held.live
    else:
        created = Answer.now()
        spec = with_answer_meta(spec, created, {"api": "chat", "metadata": body.metadata or {}})
        answer = idempotency.start(context, held, spec, created)

    def gone() -> None:
        if idempotency_key is None:  # a client with a key will come back for the answer
            context.answers.abort(answer)

    if body.stream:
        await unless_gone(request, answer.begun(EARLY_S), gone)
        if answer.error is not None:
            raise answer.error
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(
            _stream(context, answer, include_usage),
            on_gone=gone,
            stall_timeout_s=context.config.stall_timeout_s,
            on_open=context.metrics.streams.inc,
            headers=_headers(answer.turn.conversation_id),
        )
    done = await unless_gone(request, answer.result(), gone)
    completed = completed_now(answer, done, {})
    return await context.writing.reply(
        lambda: completion_json(context, completed),
        is_long(spec.sampling, len(done.output)),
        _headers(completed.conversation_id),
    )


def _form(body: ChatRequest, text: ChatText) -> AnswerForm:
    """How the answer is read: which tools it may call, and which it must.

    Raises:
        ApiError: the tool choice names an unknown function.
    """
    tools = functions_of([(tool.type, tool.function) for tool in body.tools or ()])
    parallel, choice = body.parallel_tool_calls is not False, body.tool_choice
    if isinstance(choice, ChosenTool):
        return form_for(tools, None, choice.function.name, parallel, text)
    return form_for(tools, choice, None, parallel, text)


def _spec(body: ChatRequest, context: Context, caller: Caller, hint: str | None) -> TurnSpec:
    if len(body.messages) > context.config.max_messages:
        raise ApiError(
            400,
            f"messages has {len(body.messages)} entries, at most {context.config.max_messages} are taken",
            code="too_many_messages",
            param="messages",
        )
    messages = tuple(message.message(f"messages.{index}") for index, message in enumerate(body.messages))
    return TurnSpec(
        caller.namespace,
        None,
        messages,
        body.sampling(body.max_new_tokens, body.num_logprobs),
        body.stops(),
        bool(body.ignore_eos),
        hint=hint,
        form=_form(body, context.text),
        durable=body.store is not False,
    )


def _headers(conversation_id: str | None) -> dict[str, str]:
    return {} if not conversation_id else {"X-Pensieve-Conversation": conversation_id}


# -- bodies


def completion_json(context: Context, completed: Completed) -> dict[str, Any]:
    """A `chat.completion`."""
    message: dict[str, Any] = {"role": "assistant", "content": completed.message.content, "refusal": None}
    if completed.message.tool_calls:
        message["content"] = completed.message.content or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in completed.message.tool_calls
        ]
    choice = {
        "index": 0,
        "message": message,
        "logprobs": {"content": logprob_items(completed.logprobs, context.text), "refusal": None}
        if completed.logprobs
        else None,
        "finish_reason": finish_reason(completed.reason, completed.message),
    }
    return _head(context, completed.turn_id, completed.created, "chat.completion") | {
        "choices": [choice],
        "usage": usage_json(completed.usage),
        "pensieve": pensieve_json(completed),
    }


def usage_json(usage: Mapping[str, int]) -> dict[str, Any]:
    """`usage` of completions."""
    return {
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "total_tokens": usage["prompt_tokens"] + usage["completion_tokens"],
        "prompt_tokens_details": cache_json(usage),
    }


def cache_json(usage: Mapping[str, int]) -> dict[str, int]:
    """Cache hits among the tokens of a prompt; the others are cached from now on."""
    return {
        "cached_tokens": usage["cached_tokens"],
        "cache_write_tokens": usage["prompt_tokens"] - usage["cached_tokens"],
    }


def pensieve_json(completed: Completed) -> dict[str, Any]:
    """Our own part of an answer: the receipt, and the turn's ids."""
    return {"conversation": completed.conversation_id, "turn": completed.turn_id, **completed.receipt}


def _head(context: Context, turn_id: str, created: int, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{turn_id}",
        "object": kind,
        "created": created,
        "model": context.config.model,
        "system_fingerprint": f"pensieve-{__version__}",
    }


# -- streams


def _again(body: ChatRequest, context: Context, completed: Completed) -> Response:
    """A response with a stored answer, as a stream if the request asks for one."""
    if not body.stream:
        return JSONResponse(completion_json(context, completed), headers=_headers(completed.conversation_id))
    include_usage = bool(body.stream_options and body.stream_options.include_usage)

    async def events() -> AsyncIterator[bytes]:
        chunks = _Chunks(context, completed.turn_id, completed.created)
        yield chunks.delta({"role": "assistant", "content": completed.message.content})
        for index, call in enumerate(completed.message.tool_calls):
            yield chunks.delta({"tool_calls": [_call_json(index, call.id, call.name, call.arguments)]})
        for piece in chunks.end(completed, include_usage):
            yield piece

    return EventStream(
        events(),
        on_gone=lambda: None,
        stall_timeout_s=context.config.stall_timeout_s,
        headers=_headers(completed.conversation_id),
    )


async def _stream(context: Context, answer: Answer, include_usage: bool) -> AsyncIterator[bytes]:
    chunks = _Chunks(context, answer.id, answer.created)
    yield chunks.delta({"role": "assistant", "content": ""})
    with_logprobs = answer.turn.spec.sampling.logprobs is not None
    async for piece in answer.read():
        logprobs = (
            {"content": logprob_items(piece.tokens, context.text), "refusal": None} if with_logprobs else None
        )
        for event in piece.events:
            if logprobs is None and isinstance(event, ContentDelta):
                yield chunks.content(event.text)
            elif (delta := _delta(event)) is not None:
                yield chunks.delta(delta, logprobs)
                logprobs = None
        if logprobs is not None:
            yield chunks.delta({}, logprobs)
    done = await answer.result()
    for last in chunks.end(completed_now(answer, done, {}), include_usage):
        yield last


def _delta(event: AnswerEvent) -> dict[str, Any] | None:
    match event:
        case ContentDelta():
            return {"content": event.text}
        case ReasoningDelta():
            return {"reasoning_content": event.text}
        case CallBegin():
            return {"tool_calls": [_call_json(event.index, event.id, event.name, "")]}
        case CallDelta():
            return {"tool_calls": [{"index": event.index, "function": {"arguments": event.arguments}}]}
    return None


def _call_json(index: int, call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {
        "index": index,
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


class _Chunks:
    """The events of one stream of chat completions."""

    def __init__(self, context: Context, turn_id: str, created: int) -> None:
        self._head = _head(context, turn_id, created, "chat.completion.chunk")
        # Most events differ in their text only, so the JSON around it is encoded once.
        self._before, self._behind = self.delta({"content": "\0"}).split(b'"\\u0000"')

    def content(self, text: str) -> bytes:
        """A `delta` of content."""
        return self._before + json.dumps(text, ensure_ascii=False).encode() + self._behind

    def delta(self, delta: dict[str, Any], logprobs: Any = None) -> bytes:
        return data(
            self._head
            | {"choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": None}]}
        )

    def end(self, completed: Completed, include_usage: bool) -> list[bytes]:
        reason = finish_reason(completed.reason, completed.message)
        choices = [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": reason}]
        events = [data(self._head | {"choices": choices, "pensieve": pensieve_json(completed)})]
        if include_usage:
            events.append(data(self._head | {"choices": [], "usage": usage_json(completed.usage)}))
        return [*events, DONE]
