"""langchain-openai: ChatOpenAI over chat completions and over responses."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from shared import BASE, CALL_TOKENS, KEY, MODEL, STORY, assert_hit, patiently, sensible, unique


@tool
def say(word: str = "hello") -> str:
    """Say a word."""
    return unique(f"{word} was said.")


def model(**more: Any) -> ChatOpenAI:
    usual = {
        "base_url": BASE,
        "api_key": KEY,
        "model": MODEL,
        "max_tokens": 12,
        "temperature": 0,
        "max_retries": 0,
    }
    return ChatOpenAI(**usual | more)


def usage(message: AIMessage) -> tuple[int, int]:
    """All tokens, and those of the input that were cached."""
    assert message.usage_metadata is not None
    return message.usage_metadata["total_tokens"], message.usage_metadata["input_token_details"]["cache_read"]


APIS = pytest.mark.parametrize(
    "api",
    [{}, {"use_responses_api": True}, {"use_responses_api": True, "use_previous_response_id": True}],
    ids=["chat", "responses", "previous"],
)


@APIS
def test_a_chat_of_several_turns_hits_the_cache(api: dict[str, Any]) -> None:
    chat = model(**api)
    history: list[BaseMessage] = [SystemMessage("You tell stories."), HumanMessage(unique(STORY))]
    before = 0
    for words in ("And on Friday?", "And on Saturday?", "And on Sunday?"):
        answer = chat.invoke(history)
        assert (
            isinstance(answer, AIMessage) and answer.text and answer.response_metadata["model_name"] == MODEL
        )
        total, cached = usage(answer)
        if before:
            assert_hit(cached, before)
        before = total
        history += [answer, HumanMessage(words)]


@APIS
def test_a_stream_is_added_up_to_a_message_that_can_be_answered(api: dict[str, Any]) -> None:
    chat = model(stream_usage=True, **api)
    history: list[BaseMessage] = [HumanMessage(unique(STORY))]
    whole: AIMessageChunk | None = None
    pieces = 0
    for chunk in chat.stream(history):
        assert isinstance(chunk, AIMessageChunk)
        whole = chunk if whole is None else whole + chunk
        pieces += bool(chunk.text)
    assert whole is not None and whole.text and pieces > 3
    answer = chat.invoke([*history, whole, HumanMessage("Go on.")])
    assert_hit(usage(answer)[1], usage(whole)[0])


@APIS
@patiently
def test_a_tool_is_called_and_its_result_answered(api: dict[str, Any]) -> None:
    chat = model(**api | {"max_tokens": CALL_TOKENS})
    history: list[BaseMessage] = [HumanMessage(unique("Say hello."))]
    asked = chat.bind_tools([say], tool_choice="say").invoke(history)
    assert isinstance(asked, AIMessage)
    sensible(asked.tool_calls)
    (call,) = asked.tool_calls
    assert call["name"] == "say" and isinstance(call["args"], dict) and call["id"]
    result = say.invoke(call | {"args": {"word": "hello"}})
    assert isinstance(result, ToolMessage)
    answer = chat.bind_tools([say]).bind(max_tokens=12).invoke([*history, asked, result])
    assert_hit(usage(answer)[1], usage(asked)[0])


@pytest.mark.parametrize("choice", ["any", "required", True])
@APIS
@patiently
def test_a_required_call_comes_as_a_stream(api: dict[str, Any], choice: str | bool) -> None:
    chat = model(**api | {"max_tokens": CALL_TOKENS}).bind_tools(
        [say], tool_choice=choice, strict=True, parallel_tool_calls=False
    )
    whole: AIMessageChunk | None = None
    for chunk in chat.stream([HumanMessage(unique("Say hello."))]):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    sensible(whole.tool_calls)
    (call,) = whole.tool_calls
    assert call["name"] == "say" and isinstance(call["args"], dict)


def test_a_batch_and_the_asynchronous_calls() -> None:
    chat = model(max_tokens=4)
    assert all(answer.text for answer in chat.batch(["One.", "Two.", "Three."]))

    async def main() -> tuple[AIMessage, list[Any]]:
        answer = await chat.ainvoke("Hello.")
        return answer, [chunk async for chunk in chat.astream("Hello.")]

    answer, chunks = asyncio.run(main())
    assert "".join(chunk.text for chunk in chunks) == answer.text


def test_options_reach_the_server() -> None:
    whole = model(max_tokens=20).invoke("Tell me about the sea.").text
    word = whole.split()[4]
    assert (
        model(max_tokens=20, stop=[word]).invoke("Tell me about the sea.").text == whole[: whole.index(word)]
    )
    seeded = model(temperature=1.2, seed=5)
    seeded.invoke("Make up a name.")
    assert seeded.invoke("Make up a name.").text == seeded.invoke("Make up a name.").text
    measured = model(max_tokens=3, logprobs=True, top_logprobs=2).invoke("Hello.")
    assert len(measured.response_metadata["logprobs"]["content"]) == 3


def test_text_completion() -> None:
    llm = OpenAI(base_url=BASE, api_key=KEY, model=MODEL, max_tokens=8, temperature=0, max_retries=0, n=1)
    text = llm.invoke("Once upon a time")
    assert text and "".join(llm.stream("Once upon a time")) == text


def test_refusals_are_openai_s_exceptions() -> None:
    with pytest.raises(openai.BadRequestError, match="response_format"):
        model().with_structured_output(
            {"title": "City", "type": "object", "properties": {}}, method="json_mode"
        ).invoke("A city as JSON.")
    with pytest.raises(openai.AuthenticationError):
        model(api_key="pk-wrong").invoke("Hello.")
    with pytest.raises(openai.NotFoundError):
        model(model="gpt-4o").invoke("Hello.")


@patiently
def test_structured_output_by_calling_a_function() -> None:
    schema = {
        "title": "City",
        "description": "A city",
        "type": "object",
        "properties": {"name": {"type": "string"}},
    }
    found = (
        model(max_tokens=CALL_TOKENS)
        .with_structured_output(schema, method="function_calling")
        .invoke(unique("Name a city."))
    )
    sensible(found is not None)
    assert isinstance(found, dict)
