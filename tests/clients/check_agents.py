"""openai-agents: agents with function tools and sessions, over responses and over chat completions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from agents import (
    Agent,
    MaxTurnsExceeded,
    ModelBehaviorError,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIConversationsSession,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    RunResult,
    SQLiteSession,
    function_tool,
    handoff,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from shared import (
    BASE,
    BRIEF,
    CALL_TOKENS,
    KEY,
    MODEL,
    STORY,
    Astray,
    assert_hit,
    patiently,
    sensible,
    unique,
)

set_tracing_disabled(True)
# Over responses an agent takes an answer that was cut off at its limit for a failure: the questions are such that this model comes to an end.
SHORT = ModelSettings(max_tokens=300, temperature=0)
BOTH = pytest.mark.parametrize(
    "api", [OpenAIResponsesModel, OpenAIChatCompletionsModel], ids=["responses", "chat"]
)
told: list[str] = []


@function_tool
def get_time() -> str:
    """The time."""
    told.append("noon")
    return unique("It is noon.")


def run(main: Callable[[AsyncOpenAI], Awaitable[None]]) -> None:
    """One check, with a client of its own event loop."""

    async def with_client() -> None:
        async with AsyncOpenAI(base_url=BASE, api_key=KEY, max_retries=0) as client:
            try:
                await main(client)
            except (
                ModelBehaviorError
            ) as error:  # an answer that was cut off, or a call of nothing that there is
                raise Astray from error

    asyncio.run(with_client())


def usage(result: Any) -> tuple[int, int]:
    """All tokens of a run's last request, and those of its input that were cached."""
    last = result.raw_responses[-1].usage
    return last.total_tokens, last.input_tokens_details.cached_tokens


@BOTH
@patiently
def test_a_session_of_several_turns_hits_the_cache(api: Any, tmp_path: Path) -> None:
    async def main(client: AsyncOpenAI) -> None:
        session = SQLiteSession("chat", tmp_path / "sessions.db")
        agent = Agent("Keeper", instructions=BRIEF, model=api(MODEL, client), model_settings=SHORT)
        before = 0
        for words in (unique(STORY + "What animal came?"), "And on Tuesday?", "What is 2 + 2?"):
            result = await Runner.run(agent, words, session=session)
            assert isinstance(result, RunResult) and result.final_output
            total, cached = usage(result)
            if before:
                assert_hit(cached, before)
            before = total
        assert len(await session.get_items()) == 6

    run(main)


@BOTH
@patiently
def test_a_history_that_is_sent_again_hits_the_cache(api: Any) -> None:
    async def main(client: AsyncOpenAI) -> None:
        agent = Agent("Keeper", instructions=BRIEF, model=api(MODEL, client), model_settings=SHORT)
        first = await Runner.run(agent, unique(STORY + "What animal came?"))
        second = await Runner.run(
            agent, [*first.to_input_list(), {"role": "user", "content": "And on Tuesday?"}]
        )
        assert_hit(usage(second)[1], usage(first)[0])

    run(main)


@BOTH
@pytest.mark.parametrize("choice", ["required", "get_time"])
@patiently
def test_a_tool_is_called_and_its_result_answered(api: Any, choice: str) -> None:
    async def main(client: AsyncOpenAI) -> None:
        settings = ModelSettings(max_tokens=CALL_TOKENS, temperature=0, tool_choice=choice)
        agent = Agent(
            "Clerk", instructions=BRIEF, model=api(MODEL, client), model_settings=settings, tools=[get_time]
        )
        told.clear()
        result = await Runner.run(agent, unique("What time is it?"))
        kinds = [item.type for item in result.new_items]
        sensible("tool_call_item" in kinds)
        assert "tool_call_output_item" in kinds and kinds[-1] == "message_output_item", kinds
        assert told and result.final_output
        first, second = (response.usage for response in result.raw_responses[:2])
        assert_hit(second.input_tokens_details.cached_tokens, first.total_tokens)

    run(main)


@BOTH
@patiently
def test_a_streamed_run(api: Any, tmp_path: Path) -> None:
    async def main(client: AsyncOpenAI) -> None:
        session = SQLiteSession("streamed", tmp_path / "sessions.db")
        agent = Agent(
            "Keeper",
            instructions=BRIEF,
            model=api(MODEL, client),
            model_settings=SHORT.resolve(ModelSettings(include_usage=True)),
        )
        before = 0
        for words in (unique(STORY + "What animal came?"), "And on Tuesday?"):
            result = Runner.run_streamed(agent, words, session=session)
            deltas = [
                event.data.delta
                async for event in result.stream_events()
                if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
            ]
            assert "".join(deltas) == result.final_output and len(deltas) > 3
            total, cached = usage(result)
            if before:
                assert_hit(cached, before)
            before = total

    run(main)


@BOTH
@patiently
def test_a_streamed_call(api: Any) -> None:
    async def main(client: AsyncOpenAI) -> None:
        settings = ModelSettings(
            max_tokens=CALL_TOKENS, temperature=0, tool_choice="required", parallel_tool_calls=False
        )
        agent = Agent(
            "Clerk",
            instructions=BRIEF,
            model=api(MODEL, client),
            model_settings=settings,
            tools=[get_time],
            tool_use_behavior="stop_on_first_tool",
        )
        result = Runner.run_streamed(agent, unique("What time is it?"))
        names = [
            event.name async for event in result.stream_events() if event.type == "run_item_stream_event"
        ]
        sensible("tool_called" in names)
        assert names == ["tool_called", "tool_output"] and "It is noon." in result.final_output

    run(main)


@patiently
def test_going_on_from_a_response_and_in_a_conversation() -> None:
    async def main(client: AsyncOpenAI) -> None:
        agent = Agent(
            "Keeper", instructions=BRIEF, model=OpenAIResponsesModel(MODEL, client), model_settings=SHORT
        )
        first = await Runner.run(agent, unique(STORY + "What animal came?"))
        second = await Runner.run(agent, "And on Tuesday?", previous_response_id=first.last_response_id)
        assert_hit(usage(second)[1], usage(first)[0])
        conversation = await client.conversations.create()
        first = await Runner.run(agent, unique(STORY + "What animal came?"), conversation_id=conversation.id)
        second = await Runner.run(agent, "And on Tuesday?", conversation_id=conversation.id)
        assert_hit(usage(second)[1], usage(first)[0])

    run(main)


@patiently
def test_tools_going_on_from_a_response() -> None:
    async def main(client: AsyncOpenAI) -> None:
        settings = ModelSettings(max_tokens=CALL_TOKENS, temperature=0, tool_choice="required")
        agent = Agent(
            "Clerk",
            instructions=BRIEF,
            model=OpenAIResponsesModel(MODEL, client),
            model_settings=settings,
            tools=[get_time],
        )
        result = await Runner.run(agent, unique("What time is it?"), auto_previous_response_id=True)
        first, second = (response.usage for response in result.raw_responses[:2])
        assert_hit(second.input_tokens_details.cached_tokens, first.total_tokens)

    run(main)


@patiently
def test_a_session_that_is_the_server_s_conversation() -> None:
    async def main(client: AsyncOpenAI) -> None:
        session = OpenAIConversationsSession(openai_client=client)
        agent = Agent(
            "Keeper", instructions=BRIEF, model=OpenAIResponsesModel(MODEL, client), model_settings=SHORT
        )
        first = await Runner.run(agent, unique(STORY + "What animal came?"), session=session)
        second = await Runner.run(agent, "And on Tuesday?", session=session)
        assert_hit(usage(second)[1], usage(first)[0])
        items = await session.get_items()
        assert [item["role"] for item in items] == ["user", "assistant"] * 2
        popped = await session.pop_item()
        assert popped is not None and len(await session.get_items()) == 3
        await session.clear_session()

    run(main)


@BOTH
@patiently
def test_an_agent_hands_over_to_another(api: Any) -> None:
    async def main(client: AsyncOpenAI) -> None:
        clock = Agent("Clock", instructions=BRIEF, model=api(MODEL, client), model_settings=SHORT)
        settings = ModelSettings(
            max_tokens=CALL_TOKENS, temperature=0, tool_choice="required", parallel_tool_calls=False
        )
        to_clock = handoff(clock, tool_name_override="get_time", tool_description_override="The time.")
        door = Agent(
            "Door", instructions=BRIEF, model=api(MODEL, client), model_settings=settings, handoffs=[to_clock]
        )
        result = await Runner.run(door, unique("What time is it?"))
        sensible(result.last_agent is clock)
        assert result.last_agent.name == "Clock" and result.final_output

    run(main)


@BOTH
@patiently
def test_failures_are_openai_s_exceptions(api: Any) -> None:
    async def main(client: AsyncOpenAI) -> None:
        agent = Agent("Keeper", instructions=BRIEF, model=api("gpt-4o", client), model_settings=SHORT)
        with pytest.raises(openai.NotFoundError):
            await Runner.run(agent, "Hello.")
        agent = Agent(
            "Keeper",
            instructions=BRIEF,
            model=api(MODEL, client),
            model_settings=SHORT,
            output_type=list[str],
        )
        with pytest.raises(openai.BadRequestError, match="not constrained"):
            await Runner.run(agent, "Hello.", run_config=RunConfig(tracing_disabled=True))

    run(main)


@BOTH
@patiently
def test_an_agent_that_never_ends_is_stopped(api: Any) -> None:
    async def main(client: AsyncOpenAI) -> None:
        settings = ModelSettings(max_tokens=CALL_TOKENS, temperature=0, tool_choice="required")
        agent = Agent(
            "Clerk",
            model=api(MODEL, client),
            model_settings=settings,
            tools=[get_time],
            reset_tool_choice=False,
        )
        try:
            await Runner.run(agent, unique("What time is it?"), max_turns=2)
        except MaxTurnsExceeded:
            return
        raise Astray

    run(main)
