"""openai-python: responses and conversations."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from openai.types.conversations import Conversation
from openai.types.responses import Response, ResponseFunctionToolCall
from shared import (
    BASE,
    CALL_TOKENS,
    KEY,
    MODEL,
    STORY,
    WORD,
    assert_hit,
    is_object,
    patiently,
    sensible,
    unique,
)

SAY: dict[str, Any] = {"type": "function", "name": "say", "description": "Say a word", "parameters": WORD}


@pytest.fixture(scope="module")
def client() -> Iterator[OpenAI]:
    with OpenAI(base_url=BASE, api_key=KEY, max_retries=0) as client:
        yield client


def strict(value: Any) -> Any:
    """An object as its own type sees it: every field that must be there is, and of a kind that the type knows."""
    type(value).model_validate(value.to_dict(mode="json"), strict=False)
    return value


def respond(client: OpenAI, words: Any, most: int = 12, **more: Any) -> Response:
    response = client.responses.create(
        model=MODEL, input=words, max_output_tokens=most, **({"temperature": 0} | more)
    )
    assert isinstance(response, Response)
    return strict(response)


def usage(response: Response) -> tuple[int, int]:
    """All tokens, and those of the input that were cached."""
    assert response.usage is not None
    return response.usage.total_tokens, response.usage.input_tokens_details.cached_tokens


def test_a_response_is_created_retrieved_and_deleted(client: OpenAI) -> None:
    made = respond(client, "Name a colour.", 6, metadata={"purpose": "check"}, instructions="Be brief.")
    assert (
        made.output_text and made.status in ("completed", "incomplete") and made.instructions == "Be brief."
    )
    assert made.metadata == {"purpose": "check"} and made.usage is not None and made.usage.output_tokens <= 6
    fetched = strict(client.responses.retrieve(made.id))
    assert (
        fetched.output_text == made.output_text
        and fetched.usage == made.usage
        and fetched.metadata == made.metadata
    )
    assert client.responses.delete(made.id) is None
    with pytest.raises(NotFoundError) as raised:
        client.responses.retrieve(made.id)
    assert raised.value.code == "response_not_found"


def test_a_response_goes_on_from_the_one_before_and_hits_the_cache(client: OpenAI) -> None:
    first = respond(client, unique(STORY))
    second = respond(client, "And on Friday?", previous_response_id=first.id)
    assert_hit(usage(second)[1], usage(first)[0])
    third = respond(client, [{"role": "user", "content": "And on Saturday?"}], previous_response_id=second.id)
    assert_hit(usage(third)[1], usage(second)[0])
    assert third.previous_response_id == second.id
    other = respond(client, "And on Sunday?", previous_response_id=first.id)
    assert_hit(usage(other)[1], usage(first)[0], branch=True)


def test_output_items_can_be_sent_back_as_input(client: OpenAI) -> None:
    history: list[Any] = [{"role": "user", "content": unique(STORY)}]
    first = respond(client, history)
    for branch, items in enumerate(
        (first.output, [item.model_dump() for item in first.output])
    ):  # (a dump holds every field of its type)
        second = respond(
            client,
            [*history, *items, {"role": "user", "content": [{"type": "input_text", "text": "And then?"}]}],
        )
        assert_hit(usage(second)[1], usage(first)[0], branch=bool(branch))


def test_input_items_are_listed(client: OpenAI) -> None:
    first = respond(client, "One.", 4)
    second = respond(client, "Two.", 4, previous_response_id=first.id)
    items = [
        strict(item) for item in client.responses.input_items.list(second.id, order="asc", limit=2)
    ]  # (several pages)
    assert [item.role for item in items] == ["user", "assistant", "user"]
    assert [item.content[0].text for item in items] == ["One.", first.output_text, "Two."]
    assert [item.id for item in client.responses.input_items.list(second.id)] == [
        item.id for item in items[::-1]
    ]


def test_a_stream_has_typed_events_and_can_be_picked_up(client: OpenAI) -> None:
    with client.responses.create(
        model=MODEL, input="Count to five.", max_output_tokens=10, temperature=0, stream=True
    ) as stream:
        events = [strict(event) for event in stream]
    assert [event.type for event in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert all(event.type == type(event).model_fields["type"].annotation.__args__[0] for event in events)
    final = events[-1].response
    assert (
        "".join(event.delta for event in events if event.type == "response.output_text.delta")
        == final.output_text
    )
    with client.responses.retrieve(final.id, stream=True, starting_after=3) as stream:
        rest = [strict(event) for event in stream]
    assert [event.sequence_number for event in rest] == [event.sequence_number for event in events[4:]]
    assert rest[-1].response.output_text == final.output_text


def test_the_stream_helper_collects_a_response(client: OpenAI) -> None:
    words = "Answer with one word. What is the capital of France?"
    with client.responses.stream(model=MODEL, input=words, max_output_tokens=200, temperature=0) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert final.status == "completed" and "".join(deltas) == final.output_text


@patiently
def test_a_function_is_called_and_its_result_answered(client: OpenAI) -> None:
    words = unique("Say hello.")
    first = respond(client, words, CALL_TOKENS, tools=[SAY], tool_choice={"type": "function", "name": "say"})
    calls = [item for item in first.output if isinstance(item, ResponseFunctionToolCall)]
    sensible(calls and first.status == "completed")
    assert (
        [call.name for call in calls] == ["say"] and is_object(calls[0].arguments) and len(first.output) == 1
    )
    output = {"type": "function_call_output", "call_id": calls[0].call_id, "output": unique("It was said.")}
    second = respond(client, [output], tools=[SAY], previous_response_id=first.id)
    assert_hit(usage(second)[1], usage(first)[0])
    items = [strict(item) for item in client.responses.input_items.list(second.id, order="asc")]
    assert [item.type for item in items] == ["message", "function_call", "function_call_output"]
    other = output | {"output": unique("It was not said.")}
    resent = respond(client, [{"role": "user", "content": words}, *first.output, other], tools=[SAY])
    assert_hit(usage(resent)[1], usage(first)[0], branch=True)


@patiently
def test_a_required_call_comes_as_events(client: OpenAI) -> None:
    with client.responses.create(
        model=MODEL,
        input=unique("Say hello."),
        tools=[SAY | {"strict": True}],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=CALL_TOKENS,
        temperature=0,
        stream=True,
    ) as stream:
        events = [strict(event) for event in stream]
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    sensible(deltas and events[-1].type == "response.completed")
    (done,) = (event for event in events if event.type == "response.function_call_arguments.done")
    assert "".join(deltas) == done.arguments and is_object(done.arguments)
    assert events[-1].response.output[0].arguments == done.arguments


def test_a_background_response_is_waited_for(client: OpenAI) -> None:
    begun = respond(client, "Tell me about the sea.", 20, background=True)
    assert begun.status in ("queued", "in_progress") and begun.background
    deadline = time.monotonic() + 60
    while (now := strict(client.responses.retrieve(begun.id))).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert now.output_text and now.usage is not None and now.usage.output_tokens <= 20


def test_a_background_response_is_cancelled(client: OpenAI) -> None:
    with client.responses.create(
        model=MODEL,
        input=unique("Tell me all about the sea."),
        max_output_tokens=1000,
        background=True,
        stream=True,
    ) as stream:
        seen = []
        for event in stream:
            seen.append(strict(event))
            if event.type == "response.output_text.delta":
                break
    response_id = seen[0].response.id
    cancelled = strict(client.responses.cancel(response_id))
    assert cancelled.status == "cancelled" and cancelled.output_text
    assert strict(client.responses.retrieve(response_id)).status == "cancelled"
    with client.responses.retrieve(response_id, stream=True) as stream:
        last = [strict(event) for event in stream][-1]
    assert last.response.status == "cancelled"
    following = respond(client, "Go on.", previous_response_id=response_id)
    assert usage(following)[1] > 0


def test_a_cancelled_stream_ends_for_who_reads_it(client: OpenAI) -> None:
    with client.responses.create(
        model=MODEL, input=unique("All about the sea."), max_output_tokens=1000, stream=True
    ) as stream:
        events = [strict(next(stream))]
        client.responses.cancel(events[0].response.id)
        events += [strict(event) for event in stream]
    assert events[-1].type == "response.incomplete" and events[-1].response.status == "cancelled"


def test_a_conversation_from_its_beginning_to_its_end(client: OpenAI) -> None:
    made = strict(
        client.conversations.create(
            metadata={"topic": "demo"}, items=[{"role": "user", "content": unique(STORY)}]
        )
    )
    assert isinstance(made, Conversation) and made.id.startswith("conv_")
    first = respond(client, "What came on Wednesday?", conversation=made.id)
    second = respond(client, "And on Friday?", conversation={"id": made.id})
    assert first.conversation is not None and first.conversation.id == made.id
    assert_hit(usage(second)[1], usage(first)[0])
    items = [strict(item) for item in client.conversations.items.list(made.id, order="asc", limit=2)]
    assert [item.role for item in items] == ["user", "user", "assistant", "user", "assistant"]
    assert items[2].content[0].text == first.output_text
    assert strict(client.conversations.items.retrieve(items[1].id, conversation_id=made.id)) == items[1]
    added = strict(
        client.conversations.items.create(
            made.id, items=[{"type": "message", "role": "user", "content": "One more thing."}]
        )
    )
    assert [item.role for item in added.data] == ["user"]
    third = respond(client, "Go on.", conversation=made.id)
    assert_hit(usage(third)[1], usage(second)[0])
    assert strict(client.conversations.items.delete(added.data[0].id, conversation_id=made.id)).id == made.id
    assert added.data[0].id not in [item.id for item in client.conversations.items.list(made.id)]
    assert strict(client.conversations.update(made.id, metadata={"topic": "other"})).metadata == {
        "topic": "other"
    }
    assert strict(client.conversations.retrieve(made.id)).metadata == {"topic": "other"}
    gone = strict(client.conversations.delete(made.id))
    assert gone.deleted and gone.id == made.id
    with pytest.raises(NotFoundError):
        client.conversations.retrieve(made.id)
    with pytest.raises(NotFoundError) as raised:
        respond(client, "Hello?", conversation=made.id)
    assert raised.value.param == "conversation"


@patiently
def test_calls_are_items_of_a_conversation(client: OpenAI) -> None:
    made = client.conversations.create()
    named = {"type": "function", "name": "say"}
    first = respond(
        client, unique("Say hello."), CALL_TOKENS, conversation=made.id, tools=[SAY], tool_choice=named
    )
    calls = [item for item in first.output if item.type == "function_call"]
    sensible(calls)
    (call,) = calls
    output = {"type": "function_call_output", "call_id": call.call_id, "output": unique("It was said.")}
    second = respond(client, [output], conversation=made.id, tools=[SAY])
    assert_hit(usage(second)[1], usage(first)[0])
    kinds = [strict(item).type for item in client.conversations.items.list(made.id, order="asc")]
    assert kinds[:2] == ["message", "function_call"] and "function_call_output" in kinds


def test_log_probabilities(client: OpenAI) -> None:
    response = respond(client, "Hello.", 4, include=["message.output_text.logprobs"], top_logprobs=2)
    logprobs = response.output[0].content[0].logprobs
    assert len(logprobs) >= 3 and all(len(token.top_logprobs) == 2 for token in logprobs)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"max_tool_calls": 2}, "max_tool_calls"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"background": True, "store": False}, "background"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(client: OpenAI, change: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as raised:
        respond(client, "Hello.", **change)
    assert raised.value.param == param and raised.value.type == "invalid_request_error"


def test_unstored_responses_are_not_to_be_had_later(client: OpenAI) -> None:
    made = respond(client, "Off the record.", 4, store=False)
    with pytest.raises(NotFoundError):
        respond(client, "And?", previous_response_id=made.id)
    with pytest.raises(NotFoundError):
        client.responses.retrieve("resp_unheard_of")
