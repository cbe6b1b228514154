"""A response as an object and as a stream of events, live or stored.

Knows their forms; never endpoints or requests.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pensieve.core.request import FinishReason
from pensieve.errors import PensieveError
from pensieve.message import ToolCall
from pensieve.server.answer import Answer
from pensieve.server.chat import cache_json, pensieve_json
from pensieve.server.completed import Completed, completed_now, logprob_items
from pensieve.server.context import Context
from pensieve.server.errors import error_body, status_of
from pensieve.server.items import call_item, message_item, output_items, text_part
from pensieve.server.writing import is_long
from pensieve.service import TurnDone
from pensieve.service.answer_parser import AnswerEvent
from pensieve.store import INTERRUPTED
from pensieve.text import CallBegin, CallDelta, CallEnd, ContentDelta

PREFIX = "resp_"
PARAMS = "params"  # key in a turn's meta: what its response repeats of the request


@dataclass(frozen=True, slots=True)
class Record:
    """What the API remembers of an answer under way."""

    params: Mapping[str, Any]
    named: bool  # whether the client named the conversation

    @property
    def meta(self) -> dict[str, object]:
        """What is stored of it with the turn."""
        return {PARAMS: self.params, "named": self.named}


def completed_response(answer: Answer, done: TurnDone) -> Completed:
    """The answer of a response that has just ended."""
    record: Record = answer.record
    return completed_now(answer, done, record.meta)


def _status(reason: str) -> tuple[str, dict[str, str] | None]:
    """A response's status, and why it is incomplete."""
    if reason == FinishReason.ABORT.value:
        return "cancelled", None
    if reason == FinishReason.LENGTH.value:
        return "incomplete", {"reason": "max_output_tokens"}
    if reason == INTERRUPTED:
        return "incomplete", {"reason": "interrupted"}
    return "completed", None


def response_json(context: Context, completed: Completed) -> dict[str, Any]:
    """A response that has ended."""
    status, incomplete = _status(completed.reason)
    params = completed.meta.get(PARAMS)
    params = params if isinstance(params, dict) else {}
    output = output_items(
        f"{completed.turn_id}_out", completed.message, "completed" if status == "completed" else "incomplete"
    )
    if completed.logprobs and output and output[0]["type"] == "message":
        output[0]["content"][0]["logprobs"] = logprob_items(completed.logprobs, context.text)
    usage = completed.usage
    head = _head(
        context,
        completed.turn_id,
        completed.created,
        params,
        completed.conversation_id if completed.meta.get("named") else None,
    )
    return head | {
        "status": status,
        "incomplete_details": incomplete,
        "output": output,
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": cache_json(usage),
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["prompt_tokens"] + usage["completion_tokens"],
        },
        "pensieve": pensieve_json(completed),
    }


def live_json(context: Context, answer: Answer) -> dict[str, Any]:
    """A response that is under way, or just ended."""
    record: Record = answer.record
    if answer.done is not None and answer.given_up is None:
        return response_json(context, completed_response(answer, answer.done))
    named = answer.turn.conversation_id if record.named else None
    head = _head(context, answer.id, answer.created, record.params, named or None)
    if answer.ended:
        if answer.turn.aborted and answer.given_up is None:
            return head | {"status": "cancelled"}
        return _failed(head, answer.given_up or answer.error or PensieveError("the answer failed"))
    return head | {"status": "in_progress" if answer.num_pieces else "queued"}


def _failed(head: Mapping[str, Any], error: BaseException) -> dict[str, Any]:
    """A response that failed. OpenAI's types have few codes; ours is in `type`."""
    status, body = status_of(error), error_body(error)["error"]
    code = "rate_limit_exceeded" if status == 429 else "server_error" if status >= 500 else "invalid_prompt"
    return {
        **head,
        "status": "failed",
        "error": {"code": code, "message": body["message"], "type": body["code"], "param": body["param"]},
    }


def _head(
    context: Context, turn_id: str, created: int, params: Mapping[str, Any], conversation_id: str | None
) -> dict[str, Any]:
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


# -- events


async def live_events(context: Context, answer: Answer) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """A response's events.

    They depend on its pieces only, so that every reader gets the same events, under the same numbers.
    """
    record: Record = answer.record
    named = answer.turn.conversation_id if record.named else None
    begun = _head(context, answer.id, answer.created, record.params, named or None)
    yield "response.created", {"response": begun}
    yield "response.in_progress", {"response": begun}
    items = _Items(f"{answer.id}_out")
    with_logprobs = answer.turn.spec.sampling.logprobs is not None
    async for piece in answer.read():
        logprobs = logprob_items(piece.tokens, context.text) if with_logprobs else []
        for item_event in items.take(piece.events, logprobs):
            yield item_event
    try:
        done = await answer.result()
    except PensieveError as error:
        yield "response.failed", {"response": _failed(begun, error)}
        return
    completed = completed_response(answer, done)
    long = is_long(answer.turn.spec.sampling, len(done.output))
    response = (
        await context.writing.made(lambda: response_json(context, completed))
        if long
        else response_json(context, completed)
    )
    for item_event in items.close(response["status"]):
        yield item_event
    yield _last(response), {"response": response}


def whole_events(context: Context, completed: Completed) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of a stored response: its text is one piece."""
    response = response_json(context, completed)
    begun = {**response, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    yield "response.created", {"response": begun}
    yield "response.in_progress", {"response": begun}
    items = _Items(f"{completed.turn_id}_out")
    events: list[AnswerEvent] = [ContentDelta(completed.message.content)] if completed.message.content else []
    for index, call in enumerate(completed.message.tool_calls):
        events += [CallBegin(index, call.id, call.name), CallDelta(index, call.arguments), CallEnd(index)]
    yield from items.take(events)
    yield from items.close(response["status"])
    yield _last(response), {"response": response}


def _last(response: Mapping[str, Any]) -> str:
    """The event that ends a stream.

    OpenAI's clients know none for a cancelled response: they accept this one, and read the status.
    """
    return "response.completed" if response["status"] == "completed" else "response.incomplete"


class _Items:
    """Opens and closes a response's output items as its parts arrive."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._count = 0  # number of items so far
        self._text: list[str] | None = None  # of the open message; None if there is none
        self._logprobs: list[Any] = []
        self._call: tuple[CallBegin, list[str]] | None = None

    def take(
        self, events: Sequence[AnswerEvent], logprobs: Sequence[Any] = ()
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for output_event in events:
            match output_event:
                case ContentDelta():
                    if self._text is None:
                        yield from self._open_message()
                    assert self._text is not None
                    self._text.append(output_event.text)
                    self._logprobs += logprobs
                    place = {
                        "item_id": f"msg_{self._name}",
                        "output_index": self._count - 1,
                        "content_index": 0,
                    }
                    yield (
                        "response.output_text.delta",
                        {**place, "delta": output_event.text, "logprobs": list(logprobs)},
                    )
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
                    place = {
                        "item_id": f"fc_{self._name}_{output_event.index}",
                        "output_index": self._count - 1,
                    }
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
        yield (
            "response.output_item.added",
            {"output_index": self._count - 1, "item": message_item(self._name, None, "in_progress")},
        )
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
