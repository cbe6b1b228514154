"""/v1/responses: turns that name what they continue. Knows that API; never the cache."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import JSONResponse, Response

from pensieve.errors import ConversationNotFound
from pensieve.server import idempotency
from pensieve.server.answer import Answer
from pensieve.server.bodies import BoundedRoute
from pensieve.server.chat import EARLY_S
from pensieve.server.completed import Completed, completed_before, with_answer_meta
from pensieve.server.context import Asking, Caller, Context, Server, in_thread
from pensieve.server.errors import ApiError, not_found
from pensieve.server.fields import DEFAULT_NEW_TOKENS, sampling_params
from pensieve.server.items import Order, items_of, messages_of, page, path_items
from pensieve.server.request_tools import FunctionSpec, form_for, functions_of
from pensieve.server.response_events import (
    PREFIX,
    Record,
    completed_response,
    live_events,
    live_json,
    response_json,
    whole_events,
)
from pensieve.server.response_request import ConversationRef, ResponseRequest, ResponseToolChoice
from pensieve.server.sse import STREAMED, EventStream, event, event_of, unless_gone
from pensieve.server.writing import is_long
from pensieve.service import LEAF, TurnSpec
from pensieve.service.answer_parser import AnswerForm
from pensieve.store import Turn
from pensieve.text import ChatText

router = APIRouter(route_class=BoundedRoute)

WHOLE = frozenset(  # events that hold the log-probabilities of all tokens
    {
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
        "response.incomplete",
    }
)

BACKGROUND_S = 0.5  # how long a background request waits for an early error

DELETED = "deleted"  # key in a turn's meta: its response was deleted, but later turns follow it


# -- endpoints


@router.post(
    "/v1/responses", summary="Answer input, going on from a response or a conversation", responses=STREAMED
)
async def create_response(
    request: Request,
    body: ResponseRequest,
    context: Server,
    caller: Asking,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> Response:
    """OpenAI's responses: streamed, in the background, or neither."""
    body.refuse()
    context.check_model(body.model)
    spec, record = await _spec(body, context, caller)
    held = await idempotency.claim(context, caller, idempotency_key, "responses", body, spec.turn_id)
    if isinstance(held, idempotency.Retry):
        if held.stored is not None:
            return _again(body, context, held.stored, held.conversation_id)
        assert held.live is not None
        answer = held.live
    else:
        created = Answer.now()
        spec = with_answer_meta(spec, created, {"api": "responses"} | record.meta)
        answer = idempotency.start(context, held, spec, created, record)

    def gone() -> None:
        # a client that sent a key or asked for the background will come back
        if idempotency_key is None and not body.background:
            context.answers.abort(answer)

    if body.background and not body.stream:
        await answer.begun(BACKGROUND_S)
        return await context.writing.reply(lambda: live_json(context, answer), _is_long(answer))
    if body.stream:
        await unless_gone(request, answer.begun(BACKGROUND_S if body.background else EARLY_S), gone)
        if answer.error is not None:
            raise answer.error
        return _stream_response(context, answer, 0, gone)
    done = await unless_gone(request, answer.result(), gone)
    completed = completed_response(answer, done)
    return await context.writing.reply(
        lambda: response_json(context, completed), is_long(spec.sampling, len(done.output))
    )


@router.get(
    "/v1/responses/{response_id}",
    summary="A response, as an object or as the rest of its stream",
    responses=STREAMED,
)
async def get_response(
    response_id: str,
    context: Server,
    caller: Asking,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0)] = None,
    include: Annotated[list[str] | None, Query()] = None,
    include_obfuscation: bool = False,
) -> Response:
    """A response, also one under way; with `stream` its events, from the one after `starting_after` on."""
    answer = context.answers.find(caller.namespace, turn_of(response_id))
    live = answer if answer is not None and isinstance(answer.record, Record) else None
    first = 0 if starting_after is None else starting_after + 1
    turn = await _stored(context, caller, response_id) if live is None or live.stored else None
    # An answer that was given up has failed, even if it was stored.
    if live is not None and (stream or turn is None or live.given_up is not None):
        if stream:
            return _stream_response(context, live, first, lambda: None)
        return await context.writing.reply(lambda: live_json(context, live), _is_long(live))
    assert turn is not None
    completed = completed_before(turn, await _conversation_of(context, caller, turn))
    return _replay(context, completed, first) if stream else JSONResponse(response_json(context, completed))


@router.delete("/v1/responses/{response_id}", summary="Delete a response")
async def delete_response(response_id: str, context: Server, caller: Asking) -> dict[str, Any]:
    """Delete the turn, or only the response if later turns follow it."""
    turn = await _stored(context, caller, response_id)
    await in_thread(context.service.delete_turn, turn.id, namespace=caller.namespace)
    context.answers.forget_turn(caller.namespace, turn.id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.post("/v1/responses/{response_id}/cancel", summary="Stop a response that is under way")
async def cancel_response(response_id: str, context: Server, caller: Asking) -> dict[str, Any]:
    """Stop the answer; what was made of it so far is stored."""
    answer = context.answers.find(caller.namespace, turn_of(response_id))
    if answer is None or not isinstance(answer.record, Record):
        await _stored(context, caller, response_id)
        raise ApiError(
            400,
            f"the response {response_id!r} has ended: there is nothing to cancel",
            code="invalid_value",
            param="response_id",
        )
    if answer.stored:
        await _stored(context, caller, response_id)  # raises if it was deleted since
    context.answers.abort(answer)
    await answer.over(context.config.operation_timeout_s)
    return live_json(context, answer)


@router.get("/v1/responses/{response_id}/input_items", summary="What a response answered")
async def input_items(
    response_id: str,
    context: Server,
    caller: Asking,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Order = "desc",
    after: str | None = None,
    include: Annotated[list[str] | None, Query()] = None,
) -> dict[str, Any]:
    """All items before the answer, including those of earlier turns."""
    turn = await _stored(context, caller, response_id)
    turns = await in_thread(context.store.path, caller.namespace, turn.id)
    own = turn.messages[:-1] if turn.messages and turn.messages[-1].role == "assistant" else turn.messages
    return page([*path_items(turns[:-1]), *items_of(turn.id, own)], limit, order, after)


# -- requests


def turn_of(response_id: str) -> str:
    """The turn's id in a response's id."""
    if not response_id.startswith(PREFIX):
        raise not_found(f"there is no response {response_id!r}", "response_id", "response_not_found")
    return response_id.removeprefix(PREFIX)


async def _spec(body: ResponseRequest, context: Context, caller: Caller) -> tuple[TurnSpec, Record]:
    if body.input is None and body.previous_response_id is None and body.conversation is None:
        raise ApiError(400, "input is required", code="missing_required_parameter", param="input")
    messages = messages_of(body.input) if body.input is not None else ()
    if len(messages) > context.config.max_messages:
        raise ApiError(
            400,
            f"input has {len(messages)} messages, at most {context.config.max_messages} are taken",
            code="too_many_messages",
            param="input",
        )
    form = _form(body, context.text)
    conversation_id = (
        body.conversation.id if isinstance(body.conversation, ConversationRef) else body.conversation
    )
    after: Any = LEAF
    if conversation_id is not None:
        try:
            await in_thread(context.store.get, caller.namespace, conversation_id)
        except ConversationNotFound as error:
            raise not_found(error.message, "conversation", error.code) from error
    elif body.previous_response_id is not None:
        after = (await _stored(context, caller, body.previous_response_id, "previous_response_id")).id
    elif not messages:
        raise ApiError(400, "input must not be empty", code="invalid_value", param="input")
    spec = TurnSpec(
        caller.namespace,
        conversation_id,
        messages,
        sampling_params(
            body, max_new_tokens=body.max_output_tokens or DEFAULT_NEW_TOKENS, logprobs=body.num_logprobs
        ),
        ignore_eos=bool(body.ignore_eos),
        after=after,
        instructions=body.instructions,
        form=form,
        overflow={"auto": "truncate", "disabled": "refuse", None: None}[body.truncation],
        durable=body.store is not False,
        must_exist=True,
    )
    return spec, Record(body.params(), conversation_id is not None)


def _form(body: ResponseRequest, text: ChatText) -> AnswerForm:
    functions: list[tuple[str, FunctionSpec | None]] = []
    for tool in body.tools or ():
        function = None
        if tool.name is not None:
            function = FunctionSpec(name=tool.name, description=tool.description, parameters=tool.parameters)
        functions.append((tool.type, function))
    tools = functions_of(functions)
    parallel, choice = body.parallel_tool_calls is not False, body.tool_choice
    if isinstance(choice, ResponseToolChoice):
        return form_for(tools, None, choice.name, parallel, text)
    return form_for(tools, choice, None, parallel, text)


async def _stored(context: Context, caller: Caller, response_id: str, param: str = "response_id") -> Turn:
    try:
        turn: Turn = await in_thread(context.store.turn, caller.namespace, turn_of(response_id))
    except ConversationNotFound:
        raise not_found(f"there is no response {response_id!r}", param, "response_not_found") from None
    except ApiError:
        raise not_found(f"there is no response {response_id!r}", param, "response_not_found") from None
    if turn.meta.get(DELETED):
        raise not_found(f"the response {response_id!r} was deleted", param, "response_not_found")
    return turn


async def _conversation_of(context: Context, caller: Caller, turn: Turn) -> str | None:
    leaves = await in_thread(context.store.leaves, caller.namespace, turn.id)
    return leaves[0].id if leaves else None


# -- streams


def _is_long(answer: Answer) -> bool:
    return is_long(answer.turn.spec.sampling, len(answer.turn.sampled))


def _again(body: ResponseRequest, context: Context, turn: Turn, conversation_id: str | None) -> Response:
    completed = completed_before(turn, conversation_id)
    return _replay(context, completed, 0) if body.stream else JSONResponse(response_json(context, completed))


def _stream_response(context: Context, answer: Answer, first: int, gone: Any) -> EventStream:
    return EventStream(
        _from(context, answer, first),
        on_gone=gone,
        stall_timeout_s=context.config.stall_timeout_s,
        on_open=context.metrics.streams.inc,
    )


def _replay(context: Context, completed: Completed, first: int) -> EventStream:
    """The events of a stored answer.

    A client whose stream broke in the middle gets the whole text with the closing events, under new numbers.
    """

    async def events() -> AsyncIterator[bytes]:
        numbered = list(whole_events(context, completed))
        behind = first >= len(
            numbered
        )  # the live stream had more events, because its text came in many pieces
        start = next(i for i, (name, _) in enumerate(numbered) if name.endswith(".done")) if behind else 0
        for number, (name, value) in enumerate(numbered[start:], start=first if behind else 0):
            if number >= first:
                yield event(name, {"type": name, "sequence_number": number, **value})

    return EventStream(events(), on_gone=lambda: None, stall_timeout_s=context.config.stall_timeout_s)


async def _from(context: Context, answer: Answer, first: int) -> AsyncIterator[bytes]:
    number = 0
    async for name, value in live_events(context, answer):
        if number >= first:
            told = {"type": name, "sequence_number": number, **value}
            if name in WHOLE and _is_long(answer):
                yield event_of(name, await context.writing.text(told.copy))
            else:
                yield event(name, told)
        number += 1
