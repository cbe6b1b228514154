"""/v1/responses: turns that name what they go on from. Knows that API; never the cache."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request
from pydantic import Field, StrictBool, StrictInt, StrictStr
from starlette.responses import JSONResponse, Response

from pensieve.chat import ToolCall
from pensieve.core.request import MAX_LOGPROBS, FinishReason
from pensieve.errors import ConversationNotFound, PensieveError
from pensieve.server import idempotency
from pensieve.server.answers import Completed, completed_before, completed_now, composer, logprob_items
from pensieve.server.chat import pensieve_json
from pensieve.server.context import Asking, Caller, Context, Server, in_thread
from pensieve.server.errors import ApiError, error_body, not_found, unsupported
from pensieve.server.items import Input, Order, call_item, items_of, message_item, messages_of, output_items, page, path_items, text_part
from pensieve.server.output import Output, OutputEvent, OutputForm
from pensieve.server.schemas import (
    Body,
    Count,
    FunctionSpec,
    Identifier,
    Metadata,
    Name,
    Probability,
    Strict,
    Temperature,
    refuse_tuning,
    sampling_params,
)
from pensieve.server.sse import EventStream, event, unless_gone
from pensieve.server.turns import Answer
from pensieve.service import LEAF, TurnSpec
from pensieve.store.base import Turn
from pensieve.text import CallBegin, CallDelta, CallEnd, ChatText, ContentDelta

router = APIRouter()

PREFIX = "resp_"
PARAMS = "params"  # a turn's meta: what its response repeats of the request
DELETED = "deleted"  # a turn's meta: its response was deleted, but later turns stand on it


class ConversationRef(Strict):
    """`conversation` as an object."""

    id: Identifier


class ResponseTool(Strict):
    """A function; here its fields stand beside `type`."""

    type: StrictStr
    name: Name | None = None
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class ResponseToolChoice(Strict):
    """A function that must be called."""

    type: Literal["function"]
    name: Name


class Reasoning(Strict):
    """`reasoning`."""

    effort: StrictStr | None = None
    summary: StrictStr | None = None
    generate_summary: StrictStr | None = None


class TextFormat(Strict):
    """`text.format`."""

    type: StrictStr


class TextOptions(Strict):
    """`text`."""

    format: TextFormat | None = None
    verbosity: StrictStr | None = None


class ResponseStreamOptions(Strict):
    """`stream_options`."""

    include_obfuscation: StrictBool | None = None


class ResponseRequest(Body):
    """POST /v1/responses."""

    model: StrictStr | None = None  # None: the one that is served
    input: Input | None = None
    instructions: StrictStr | None = None
    previous_response_id: Identifier | None = None
    conversation: Identifier | ConversationRef | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    include: list[StrictStr] | None = None
    stream: StrictBool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: StrictBool | None = None
    background: StrictBool | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: StrictBool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Metadata = None
    user: StrictStr | None = None
    prompt_cache_key: StrictStr | None = None
    safety_identifier: StrictStr | None = None
    # beyond OpenAI's
    seed: StrictInt | None = None
    ignore_eos: StrictBool | None = None
    # known and not to be had, but for the value that means nothing
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    max_tool_calls: StrictInt | None = None
    prompt: Any = None
    service_tier: StrictStr | None = None
    prompt_cache_retention: StrictStr | None = None
    context_management: Any = None
    moderation: Any = None

    def refuse(self) -> None:
        """Refuse what this server has not."""
        if self.text is not None and self.text.format is not None and self.text.format.type != "text":
            raise unsupported("text.format", f"text.format {self.text.format.type!r} is not supported: answers are not constrained here")
        reasoning = self.reasoning
        if reasoning is not None and (reasoning.summary is not None or reasoning.generate_summary is not None):
            raise unsupported("reasoning.summary", "reasoning summaries are not supported: leave reasoning.summary out")
        refuse_tuning(
            reasoning.effort if reasoning is not None else None,
            self.text.verbosity if self.text is not None else None,
            self.service_tier,
            self.prompt_cache_retention,
        )
        for field in ("prompt", "max_tool_calls", "context_management", "moderation"):
            if getattr(self, field) is not None:
                raise unsupported(field, f"{field} is not supported: leave it out")
        for wanted in self.include or ():
            if wanted not in ("message.output_text.logprobs", "reasoning.encrypted_content"):
                raise unsupported("include", f"include {wanted!r} is not supported: this server has no such output")
        if self.previous_response_id is not None and self.conversation is not None:
            raise ApiError(
                400,
                "previous_response_id and conversation exclude each other: both say what to go on from",
                code="invalid_value",
                param="conversation",
            )
        if self.background and self.store is False:
            raise ApiError(400, "background needs store: the answer is fetched later", code="invalid_value", param="background")

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives; None: no log-probabilities at all."""
        wanted = "message.output_text.logprobs" in (self.include or ()) or bool(self.top_logprobs)
        return (self.top_logprobs or 0) if wanted else None

    def params(self) -> dict[str, Any]:
        """What a response object repeats."""
        choice = self.tool_choice
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_logprobs": self.top_logprobs or 0,
            "tools": [tool.model_dump() for tool in self.tools or ()],
            "tool_choice": choice.model_dump() if isinstance(choice, ResponseToolChoice) else choice or "auto",
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "truncation": self.truncation or "disabled",
            "previous_response_id": self.previous_response_id,
            "background": bool(self.background),
            "store": self.store is not False,
            "metadata": self.metadata or {},
            "user": self.user,
            "prompt_cache_key": self.prompt_cache_key,
            "safety_identifier": self.safety_identifier,
        }


@dataclass(frozen=True, slots=True)
class Record:
    """What the API remembers of an answer under way."""

    params: Mapping[str, Any]
    form: OutputForm
    named: bool  # it belongs to a conversation that the client named


# -- endpoints


@router.post("/v1/responses", summary="Answer input, going on from a response or a conversation")
async def create_response(
    request: Request, body: ResponseRequest, context: Server, caller: Asking, idempotency_key: Annotated[str | None, Header()] = None
) -> Response:
    """OpenAI's responses, streaming, in the background, and neither."""
    body.refuse()
    context.check_model(body.model)
    spec, record = await _spec(body, context, caller)
    held = await idempotency.claim(context, caller, idempotency_key, "responses", body, spec.turn_id)
    if isinstance(held, idempotency.Retry):
        if held.stored is not None:
            return _again(body, context, held.stored)
        assert held.live is not None
        answer = held.live
    else:
        created = Answer.now()
        meta: dict[str, object] = {"api": "responses", PARAMS: record.params, "named": record.named}
        answer = context.turns.start(composer(spec, context.text, record.form, created, meta), created=created, record=record)
        idempotency.release_on_failure(context, held, answer)

    def gone() -> None:
        if idempotency_key is None and not body.background:  # who sent a key, or asked for the background, will come back
            context.turns.abort(answer)

    if body.background and not body.stream:
        await _placed(answer)
        return JSONResponse(live_json(context, answer))
    if body.stream:
        await unless_gone(request, _placed(answer), gone)
        if answer.error is not None:
            raise answer.error
        return _stream_response(context, answer, 0, gone)
    done = await unless_gone(request, answer.result(), gone)
    completed = completed_now(answer, done, record.form, context.text, {PARAMS: record.params, "named": record.named})
    return JSONResponse(response_json(context, completed))


@router.get("/v1/responses/{response_id}", summary="A response, as an object or as the rest of its stream")
async def get_response(
    response_id: str,
    context: Server,
    caller: Asking,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0)] = None,
    include: Annotated[list[str] | None, Query()] = None,
    include_obfuscation: bool = False,
) -> Response:
    """A stored response; with `stream` its events again, from the one after `starting_after` on, also while it is under way."""
    turn_id = turn_of(response_id)
    answer = context.turns.find(caller.namespace, turn_id)
    if answer is not None and isinstance(answer.record, Record) and (not answer.ended or answer.error is not None):
        if not stream:
            return JSONResponse(live_json(context, answer))
        return _stream_response(context, answer, 0 if starting_after is None else starting_after + 1, lambda: None)
    turn = await _stored(context, caller, response_id)
    if not stream:
        return JSONResponse(response_json(context, completed_before(turn, await _conversation_of(context, caller, turn))))
    first = 0 if starting_after is None else starting_after + 1
    if answer is not None and isinstance(answer.record, Record):
        return _stream_response(context, answer, first, lambda: None)
    return _replay(context, completed_before(turn, await _conversation_of(context, caller, turn)), first)


@router.delete("/v1/responses/{response_id}", summary="Delete a response")
async def delete_response(response_id: str, context: Server, caller: Asking) -> dict[str, Any]:
    """The turn goes if nothing stands on it; otherwise only the response does."""
    turn = await _stored(context, caller, response_id)
    await in_thread(context.service.delete_turn, turn.id, namespace=caller.namespace)
    return {"id": response_id, "object": "response", "deleted": True}


@router.post("/v1/responses/{response_id}/cancel", summary="Stop a response that is under way")
async def cancel_response(response_id: str, context: Server, caller: Asking) -> dict[str, Any]:
    """What was said so far is kept."""
    answer = context.turns.find(caller.namespace, turn_of(response_id))
    if answer is None or not isinstance(answer.record, Record):
        await _stored(context, caller, response_id)
        raise ApiError(
            400, f"the response {response_id!r} has ended: there is nothing to cancel", code="invalid_value", param="response_id"
        )
    context.turns.abort(answer)
    while not answer.ended:
        await answer.changed()
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
    """Everything before the answer, what it went on from included."""
    turn = await _stored(context, caller, response_id)
    turns = await in_thread(context.store.path, caller.namespace, turn.id)
    own = turn.messages[:-1] if turn.messages and turn.messages[-1].role == "assistant" else turn.messages
    return page([*path_items(turns[:-1]), *items_of(turn.id, own)], limit, order, after)


# -- requests


def turn_of(response_id: str) -> str:
    """The turn behind a response's id."""
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
    conversation_id = body.conversation.id if isinstance(body.conversation, ConversationRef) else body.conversation
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
            max_new_tokens=body.max_output_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            seed=body.seed,
            logprobs=body.num_logprobs,
        ),
        ignore_eos=bool(body.ignore_eos),
        after=after,
        instructions=body.instructions,
        tools=form.tools,
        prefix=form.prefix(context.text),
        overflow={"auto": "truncate", "disabled": "refuse", None: None}[body.truncation],
        durable=body.store is not False,
    )
    return spec, Record(body.params(), form, conversation_id is not None)


def _form(body: ResponseRequest, text: ChatText) -> OutputForm:
    tools: dict[str, dict[str, object]] = {}
    for index, tool in enumerate(body.tools or ()):
        if tool.type != "function" or tool.name is None:
            raise unsupported(f"tools.{index}", f"tools.{index}: only functions can be called here, got type {tool.type!r}")
        if tool.name in tools:
            raise ApiError(400, f"tools.{index}: two functions are called {tool.name!r}", code="invalid_value", param=f"tools.{index}")
        # (OpenAI's clients send strict: true by default; here the schema is shown to the model, and not enforced: the response says strict false)
        tools[tool.name] = FunctionSpec(name=tool.name, description=tool.description, parameters=tool.parameters).tool()
    choice = body.tool_choice
    if not tools and choice not in (None, "none", "auto"):
        raise ApiError(400, "tool_choice needs tools", code="invalid_value", param="tool_choice")
    if not tools or choice == "none":
        return OutputForm(reasoning=text.has_reasoning)
    forced = choice.name if isinstance(choice, ResponseToolChoice) else "required" if choice == "required" else None
    if isinstance(choice, ResponseToolChoice) and choice.name not in tools:
        raise ApiError(400, f"tool_choice names {choice.name!r}, which is none of the tools", code="invalid_value", param="tool_choice")
    return OutputForm(tuple(tools.values()), body.parallel_tool_calls is not False, forced, text.has_reasoning and forced is None)


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


async def _placed(answer: Answer) -> None:
    """Wait until the answer has begun or failed, but not for long."""
    try:
        async with asyncio.timeout(0.5 if answer.record.params["background"] else 5.0):
            while not (answer.pieces or answer.ended):
                await answer.changed()
    except TimeoutError:
        return


# -- objects


def _status(reason: str, cancelled: bool = False) -> tuple[str, dict[str, str] | None]:
    """A response's status, and why it is incomplete."""
    if cancelled:
        return "cancelled", None
    if reason == FinishReason.LENGTH.value:
        return "incomplete", {"reason": "max_output_tokens"}
    if reason in (FinishReason.ABORT.value, "interrupted"):
        return "incomplete", {"reason": "interrupted"}
    return "completed", None


def response_json(context: Context, completed: Completed, *, cancelled: bool = False) -> dict[str, Any]:
    """A response that has ended."""
    status, incomplete = _status(completed.reason, cancelled or bool(completed.meta.get("cancelled")))
    params = completed.meta.get(PARAMS)
    params = params if isinstance(params, dict) else {}
    output = output_items(f"{completed.turn_id}_out", completed.message, "completed" if status == "completed" else "incomplete")
    if completed.logprobs and output and output[0]["type"] == "message":
        output[0]["content"][0]["logprobs"] = logprob_items(completed.logprobs, context.text)
    usage = completed.usage
    head = _head(context, completed.turn_id, completed.created, params, completed.conversation_id if completed.meta.get("named") else None)
    return head | {
        "status": status,
        "incomplete_details": incomplete,
        "output": output,
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": usage["cached_tokens"]},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["prompt_tokens"] + usage["completion_tokens"],
        },
        "pensieve": pensieve_json(completed),
    }


def live_json(context: Context, answer: Answer) -> dict[str, Any]:
    """A response that is under way, or just ended."""
    record: Record = answer.record
    if answer.done is not None and answer.timeout is None:
        completed = completed_now(answer, answer.done, record.form, context.text, {PARAMS: record.params, "named": record.named})
        return response_json(context, completed, cancelled=answer.cancelled)
    named = answer.turn.conversation_id if record.named else None
    head = _head(context, answer.id, answer.created, record.params, named or None)
    if answer.ended:
        error = error_body(answer.timeout or answer.error or PensieveError("the answer failed"))["error"]
        return head | {"status": "failed", "error": {"code": error["code"], "message": error["message"]}}
    return head | {"status": "in_progress" if answer.pieces else "queued"}


def _head(context: Context, turn_id: str, created: int, params: Mapping[str, Any], conversation_id: str | None) -> dict[str, Any]:
    return {
        "id": PREFIX + turn_id,
        "object": "response",
        "created_at": created,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": context.config.model,
        "output": [],
        "usage": None,
        "conversation": None if conversation_id is None else {"id": conversation_id},
        "max_tool_calls": None,
        "reasoning": {"effort": None, "summary": None},
        "text": {"format": {"type": "text"}},
        "service_tier": "default",
        "instructions": None,
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "metadata": {},
        **params,
    }


# -- streams


def _again(body: ResponseRequest, context: Context, turn: Turn) -> Response:
    completed = completed_before(turn, None)
    return _replay(context, completed, 0) if body.stream else JSONResponse(response_json(context, completed))


def _stream_response(context: Context, answer: Answer, first: int, gone: Any) -> EventStream:
    return EventStream(
        _from(_live_events(context, answer), first),
        on_gone=gone,
        stall_timeout_s=context.config.stall_timeout_s,
        on_open=context.metrics.streams.inc,
    )


def _replay(context: Context, completed: Completed, first: int) -> EventStream:
    """A stored answer's events. One that was cut off in the middle gets the whole text with the events that close it, under new numbers."""

    async def events() -> AsyncIterator[bytes]:
        numbered = list(_whole_events(context, completed))
        behind = first >= len(numbered)  # the live stream had more events than this one: its text came in many pieces
        start = next(i for i, (name, _) in enumerate(numbered) if name.endswith(".done")) if behind else 0
        for number, (name, value) in enumerate(numbered[start:], start=first if behind else 0):
            if number >= first:
                yield event(name, {"type": name, "sequence_number": number, **value})

    return EventStream(events(), on_gone=lambda: None, stall_timeout_s=context.config.stall_timeout_s)


async def _from(events: AsyncIterator[tuple[str, dict[str, Any]]], first: int) -> AsyncIterator[bytes]:
    number = 0
    async for name, value in events:
        if number >= first:
            yield event(name, {"type": name, "sequence_number": number, **value})
        number += 1


async def _live_events(context: Context, answer: Answer) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """A response's events. They follow from its pieces alone, so that whoever reads again reads the same, under the same numbers."""
    record: Record = answer.record
    named = answer.turn.conversation_id if record.named else None
    begun = _head(context, answer.id, answer.created, record.params, named or None)
    yield "response.created", {"response": begun}
    yield "response.in_progress", {"response": begun}
    items = _Items(f"{answer.id}_out")
    output = Output(context.text, record.form, answer.id)
    for item_event in items.take(output.feed(answer.turn.spec.prefix) if answer.turn.spec.prefix else ()):
        yield item_event
    with_logprobs = answer.turn.spec.sampling.logprobs is not None
    async for piece in answer.read():
        logprobs = logprob_items(piece.tokens, context.text) if with_logprobs else []
        for item_event in items.take(output.feed(piece.text), logprobs):
            yield item_event
    for item_event in items.take(output.finish()):
        yield item_event
    try:
        done = await answer.result()
    except PensieveError as error:
        body = error_body(error)["error"]
        yield "response.failed", {"response": begun | {"status": "failed", "error": {"code": body["code"], "message": body["message"]}}}
        return
    completed = completed_now(answer, done, record.form, context.text, {PARAMS: record.params, "named": record.named})
    response = response_json(context, completed, cancelled=answer.cancelled)
    for item_event in items.close(response["status"]):
        yield item_event
    yield _last(response), {"response": response}


def _whole_events(context: Context, completed: Completed) -> Iterator[tuple[str, dict[str, Any]]]:
    response = response_json(context, completed)
    begun = {**response, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    yield "response.created", {"response": begun}
    yield "response.in_progress", {"response": begun}
    items = _Items(f"{completed.turn_id}_out")
    events: list[OutputEvent] = [ContentDelta(completed.message.content)] if completed.message.content else []
    for index, call in enumerate(completed.message.tool_calls):
        events += [CallBegin(index, call.id, call.name), CallDelta(index, call.arguments), CallEnd(index)]
    yield from items.take(events)
    yield from items.close(response["status"])
    yield _last(response), {"response": response}


def _last(response: Mapping[str, Any]) -> str:
    return {"completed": "response.completed", "incomplete": "response.incomplete"}.get(response["status"], "response.cancelled")


class _Items:
    """Opens and closes a response's output items as its parts come."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._count = 0  # items so far
        self._text: list[str] | None = None  # of the message that is open
        self._logprobs: list[Any] = []
        self._call: tuple[CallBegin, list[str]] | None = None

    def take(self, events: Sequence[OutputEvent], logprobs: Sequence[Any] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
        for output_event in events:
            match output_event:
                case ContentDelta():
                    if self._text is None:
                        yield from self._open_message()
                    assert self._text is not None
                    self._text.append(output_event.text)
                    self._logprobs += logprobs
                    place = {"item_id": f"msg_{self._name}", "output_index": self._count - 1, "content_index": 0}
                    yield "response.output_text.delta", {**place, "delta": output_event.text, "logprobs": list(logprobs)}
                    logprobs = ()
                case CallBegin():
                    yield from self._close_message("completed")
                    self._call = (output_event, [])
                    self._count += 1
                    item = call_item(self._name, output_event.index, _call(output_event, ""), "in_progress")
                    yield "response.output_item.added", {"output_index": self._count - 1, "item": item}
                case CallDelta():
                    assert self._call is not None
                    self._call[1].append(output_event.arguments)
                    place = {"item_id": f"fc_{self._name}_{output_event.index}", "output_index": self._count - 1}
                    yield "response.function_call_arguments.delta", {**place, "delta": output_event.arguments}
                case CallEnd():
                    yield from self._close_call("completed")

    def close(self, status: str) -> Iterator[tuple[str, dict[str, Any]]]:
        item_status = "completed" if status == "completed" else "incomplete"
        yield from self._close_call(item_status)
        if self._count == 0:
            yield from self._open_message()
        yield from self._close_message(item_status)

    def _open_message(self) -> Iterator[tuple[str, dict[str, Any]]]:
        self._text, self._logprobs = [], []
        self._count += 1
        yield "response.output_item.added", {"output_index": self._count - 1, "item": message_item(self._name, None, "in_progress")}
        place = {"item_id": f"msg_{self._name}", "output_index": self._count - 1, "content_index": 0}
        yield "response.content_part.added", {**place, "part": text_part("")}

    def _close_message(self, status: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._text is None:
            return
        text, self._text = "".join(self._text), None
        place = {"item_id": f"msg_{self._name}", "output_index": self._count - 1, "content_index": 0}
        yield "response.output_text.done", {**place, "text": text, "logprobs": self._logprobs}
        yield "response.content_part.done", {**place, "part": text_part(text, self._logprobs)}
        item = message_item(self._name, text, status, self._logprobs)
        yield "response.output_item.done", {"output_index": self._count - 1, "item": item}

    def _close_call(self, status: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._call is None:
            return
        (begun, pieces), self._call = self._call, None
        arguments = "".join(pieces)
        place = {"item_id": f"fc_{self._name}_{begun.index}", "output_index": self._count - 1}
        yield "response.function_call_arguments.done", {**place, "name": begun.name, "arguments": arguments}
        item = call_item(self._name, begun.index, _call(begun, arguments), status)
        yield "response.output_item.done", {"output_index": self._count - 1, "item": item}


def _call(begun: CallBegin, arguments: str) -> ToolCall:
    return ToolCall(begun.id, begun.name, arguments)
