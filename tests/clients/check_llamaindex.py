"""llama-index-llms-openai-like: OpenAILike over chat and text completions, OpenAILikeResponses, chat engines and agents on top."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import openai
import pytest
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike, OpenAILikeResponses
from pydantic import Field
from shared import BASE, BRIEF, CALL_TOKENS, KEY, MODEL, STORY, assert_hit, patiently, sensible, unique


def say(word: str = "hello") -> str:
    """Say a word"""
    return unique(f"{word} was said.")


def model(**more: Any) -> OpenAILike:
    usual = {
        "model": MODEL,
        "api_base": BASE,
        "api_key": KEY,
        "is_chat_model": True,
        "max_tokens": 12,
        "temperature": 0,
        "max_retries": 0,
    }
    return OpenAILike(**usual | {"is_function_calling_model": True, "context_window": 8192} | more)


def responses(**more: Any) -> OpenAILikeResponses:
    usual = {
        "model": MODEL,
        "api_base": BASE,
        "api_key": KEY,
        "max_output_tokens": 12,
        "temperature": 0,
        "max_retries": 0,
    }
    return OpenAILikeResponses(**usual | {"is_function_calling_model": True, "context_window": 8192} | more)


def usage(answer: ChatResponse) -> tuple[int, int]:
    """All tokens, and those of the input that were cached."""
    told = answer.raw.usage
    details = (
        told.prompt_tokens_details if hasattr(told, "prompt_tokens_details") else told.input_tokens_details
    )
    return told.total_tokens, details.cached_tokens


MODELS = pytest.mark.parametrize("make", [model, responses])


@MODELS
def test_a_chat_of_several_turns_hits_the_cache(make: Any) -> None:
    llm = make()
    history = [ChatMessage("You tell stories.", role=MessageRole.SYSTEM), ChatMessage(unique(STORY))]
    before = 0
    for words in ("And on Friday?", "And on Saturday?", "And on Sunday?"):
        answer = llm.chat(history)
        assert answer.message.content
        total, cached = usage(answer)
        if before:
            assert_hit(cached, before)
        before = total
        history += [answer.message, ChatMessage(words)]


@MODELS
def test_a_stream_says_what_the_answer_says(make: Any) -> None:
    llm = make()
    history = [ChatMessage("Count to five.")]
    pieces = list(llm.stream_chat(history))
    assert (
        len(pieces) > 3
        and "".join(piece.delta or "" for piece in pieces) == llm.chat(history).message.content
    )


def test_responses_that_are_followed_by_their_ids() -> None:
    llm = responses(track_previous_responses=True)
    first = llm.chat([ChatMessage(unique(STORY))])
    second = llm.chat([ChatMessage("And on Friday?")])
    assert_hit(usage(second)[1], usage(first)[0])


class Answers(BaseEventHandler):
    """Hears what models answer below an engine, which shows words only."""

    answers: list[Any] = Field(default_factory=list)

    def handle(self, event: BaseEvent, **_: Any) -> None:
        if isinstance(event, LLMChatEndEvent) and event.response is not None:
            self.answers.append(event.response)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_chat_engine_s_memory_hits_the_cache(stream: bool) -> None:
    heard = Answers()
    get_dispatcher().add_event_handler(heard)
    llm = model(additional_kwargs={"stream_options": {"include_usage": True}}) if stream else model()
    engine = SimpleChatEngine.from_defaults(llm=llm, system_prompt="You tell stories.")
    for words in (unique(STORY), "And on Friday?", "And on Saturday?"):
        assert "".join(engine.stream_chat(words).response_gen) if stream else engine.chat(words).response
    get_dispatcher().event_handlers.remove(heard)
    assert [message.role for message in engine.chat_history] == [MessageRole.USER, MessageRole.ASSISTANT] * 3
    for before, answer in itertools.pairwise(heard.answers):
        assert_hit(usage(answer)[1], usage(before)[0])
    assert len(heard.answers) == 3


@MODELS
@patiently
def test_a_tool_is_called_and_its_result_answered(make: Any) -> None:
    llm = make(**{"max_tokens" if make is model else "max_output_tokens": CALL_TOKENS})
    tool = FunctionTool.from_defaults(say)
    history = [ChatMessage(unique("Say hello."))]
    asked = llm.chat_with_tools(
        [tool], chat_history=history, tool_required=True, allow_parallel_tool_calls=False
    )
    calls = llm.get_tool_calls_from_response(asked, error_on_no_tool_call=False)
    sensible(calls)
    (call,) = calls
    assert call.tool_name == "say" and isinstance(call.tool_kwargs, dict)
    result = tool(word="hello")
    history += [
        asked.message,
        ChatMessage(result.content, role=MessageRole.TOOL, additional_kwargs={"tool_call_id": call.tool_id}),
    ]
    answer = llm.chat_with_tools([tool], chat_history=history, tool_choice="auto")
    assert_hit(usage(answer)[1], usage(asked)[0])


@patiently
def test_a_required_call_comes_as_a_stream() -> None:
    llm = model(max_tokens=CALL_TOKENS)
    *_, last = llm.stream_chat_with_tools(
        [FunctionTool.from_defaults(say)], user_msg=unique("Say hello."), tool_required=True
    )
    calls = llm.get_tool_calls_from_response(last, error_on_no_tool_call=False)
    sensible(calls)
    assert calls[0].tool_name == "say"


@MODELS
def test_an_agent_with_tools_to_hand(make: Any) -> None:
    async def main() -> str:
        agent = FunctionAgent(tools=[say], llm=make(), system_prompt=BRIEF)
        return str(await agent.run("What is the capital of France?"))

    assert asyncio.run(main()).strip()


def test_text_completion() -> None:
    llm = model(is_chat_model=False)
    text = llm.complete("Once upon a time").text
    assert text and "".join(piece.delta or "" for piece in llm.stream_complete("Once upon a time")) == text
    assert asyncio.run(llm.acomplete("Once upon a time")).text == text
    assert model().complete("Once upon a time").text


def test_options_reach_the_server() -> None:
    history = [ChatMessage("Make up a name.")]
    llm = model(temperature=1.2, additional_kwargs={"seed": 5, "stop": ["\n"]})
    llm.chat(history)
    assert llm.chat(history).message.content == llm.chat(history).message.content
    measured = model(logprobs=True, top_logprobs=2, max_tokens=3).chat([ChatMessage("Hello.")])
    assert measured.logprobs is not None and len(measured.logprobs) == 3


@MODELS
def test_failures_are_openai_s_exceptions(make: Any) -> None:
    with pytest.raises(openai.AuthenticationError):
        make(api_key="pk-wrong").chat([ChatMessage("Hello.")])
    with pytest.raises(openai.NotFoundError):
        make(model="gpt-4o").chat([ChatMessage("Hello.")])
    with pytest.raises(openai.BadRequestError, match="service_tier"):
        make(additional_kwargs={"service_tier": "priority"}).chat([ChatMessage("Hello.")])
