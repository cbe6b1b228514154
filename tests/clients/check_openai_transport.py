"""openai-python: keys, errors as its exceptions, headers, retries, timeouts, leaving early, the asynchronous client."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
    OpenAI,
    RateLimitError,
    UnprocessableEntityError,
)
from shared import BASE, KEY, MAX_OPEN, MODEL, OTHER_KEY, STORY, URL, assert_hit, unique, until_idle

HELLO: list[Any] = [{"role": "user", "content": "Hello."}]


@pytest.fixture(scope="module")
def client() -> Iterator[OpenAI]:
    with OpenAI(base_url=BASE, api_key=KEY, max_retries=0) as client:
        yield client


def long_chat(client: OpenAI, **more: Any) -> Any:
    """Something that takes a while."""
    messages = [{"role": "user", "content": unique("Tell me all about the sea.")}]
    return client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=2000, extra_body={"ignore_eos": True}, **more
    )


@pytest.mark.parametrize("base", [BASE, BASE + "/"])
def test_a_base_url_may_end_with_a_slash(base: str) -> None:
    with OpenAI(base_url=base, api_key=KEY, max_retries=0) as client:
        assert client.models.retrieve(MODEL).id == MODEL
        assert client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2).choices


def test_a_base_url_without_v1_is_told_so() -> None:
    with (
        OpenAI(base_url=URL, api_key=KEY, max_retries=0) as client,
        pytest.raises(NotFoundError, match="/v1/chat/completions"),
    ):
        client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2)


def test_a_wrong_key_is_refused() -> None:
    with OpenAI(base_url=BASE, api_key="pk-wrong", max_retries=0) as client:
        for request in (
            client.models.list,
            lambda: client.responses.create(model=MODEL, input="Hello."),
            client.conversations.create,
        ):
            with pytest.raises(AuthenticationError) as raised:
                request()
            assert raised.value.code == "invalid_api_key" and raised.value.status_code == 401


def test_one_key_s_conversations_are_not_another_s(client: OpenAI) -> None:
    conversation = client.conversations.create()
    response = client.responses.create(
        model=MODEL, input=unique(STORY), max_output_tokens=4, conversation=conversation.id
    )
    with OpenAI(base_url=BASE, api_key=OTHER_KEY, max_retries=0) as other:
        for request in (
            lambda: other.conversations.retrieve(conversation.id),
            lambda: other.conversations.delete(conversation.id),
            lambda: other.responses.retrieve(response.id),
            lambda: other.responses.create(model=MODEL, input="Hello.", previous_response_id=response.id),
        ):
            with pytest.raises(NotFoundError):
                request()
    assert client.conversations.retrieve(conversation.id).id == conversation.id


def test_errors_are_the_client_s_own(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as raised:
        client.chat.completions.create(model=MODEL, messages=[], max_tokens=2)
    assert raised.value.param == "messages" and raised.value.request_id
    with pytest.raises(NotFoundError):
        client.embeddings.create(model=MODEL, input="Hello.")
    with pytest.raises(APIStatusError) as refused:
        client.post("/models", cast_to=object, body={})
    assert refused.value.status_code == 405
    with (
        pytest.raises(APIConnectionError),
        OpenAI(base_url="http://127.0.0.1:9/v1", api_key=KEY, max_retries=0) as unanswered,
    ):
        unanswered.models.list()


def test_a_full_server_says_so_and_a_retry_gets_through() -> None:
    with OpenAI(base_url=BASE, api_key=KEY, max_retries=0) as client:
        streams = [long_chat(client, stream=True) for _ in range(MAX_OPEN)]
        try:
            with pytest.raises(RateLimitError) as raised:
                client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2)
            assert (
                raised.value.type == "rate_limit_error"
                and int(raised.value.response.headers["retry-after"]) > 0
            )
            with ThreadPoolExecutor(1) as pool:
                patient = client.with_options(max_retries=5)
                waiting = pool.submit(
                    patient.chat.completions.create, model=MODEL, messages=HELLO, max_tokens=2
                )
                time.sleep(0.5)
                for stream in streams:
                    stream.close()
                assert waiting.result(60).choices
        finally:
            for stream in streams:
                stream.close()
    until_idle()


def test_raw_responses_have_headers(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, max_tokens=3)
    completion = raw.parse()
    assert raw.status_code == 200 and raw.headers["content-type"] == "application/json"
    assert raw.headers["x-pensieve-conversation"] == completion.model_extra["pensieve"]["conversation"]
    assert raw.headers["x-request-id"] == completion._request_id
    with client.chat.completions.with_streaming_response.create(
        model=MODEL, messages=HELLO, max_tokens=3, stream=True
    ) as streamed:
        assert streamed.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in streamed.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert (
        client.responses.with_raw_response.create(model=MODEL, input="Hello.", max_output_tokens=3)
        .parse()
        .output_text
    )


def test_a_retry_with_the_same_key_gets_the_first_answer(client: OpenAI) -> None:
    headers = {"Idempotency-Key": f"check-{uuid.uuid4()}"}
    arguments: dict[str, Any] = {
        "model": MODEL,
        "messages": HELLO,
        "max_tokens": 8,
        "temperature": 1.0,
        "extra_headers": headers,
    }
    first = client.chat.completions.create(**arguments)
    again = client.chat.completions.create(**arguments)
    assert (again.id, again.choices[0].message.content, again.usage) == (
        first.id,
        first.choices[0].message.content,
        first.usage,
    )
    with pytest.raises(UnprocessableEntityError) as raised:
        client.chat.completions.create(**arguments | {"max_tokens": 9})
    assert raised.value.code == "idempotency_key_reused"
    arguments = {
        "model": MODEL,
        "input": "Hello.",
        "max_output_tokens": 8,
        "extra_headers": {"Idempotency-Key": f"check-{uuid.uuid4()}"},
    }
    assert client.responses.create(**arguments).id == client.responses.create(**arguments).id


def test_a_client_that_gave_up_waiting_gets_its_answer_by_its_own_retry(client: OpenAI) -> None:
    headers = {"Idempotency-Key": f"check-{uuid.uuid4()}"}
    hasty = client.with_options(timeout=0.3, max_retries=8)
    messages = [{"role": "user", "content": unique("Tell me all about the sea.")}]
    answer = hasty.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=40, extra_headers=headers, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 40
    again = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=40, extra_headers=headers, extra_body={"ignore_eos": True}
    )
    assert again.id == answer.id


def test_a_request_that_timed_out_is_aborted(client: OpenAI) -> None:
    with pytest.raises(APITimeoutError):
        long_chat(client.with_options(timeout=0.5))
    until_idle()


@pytest.mark.parametrize("api", ["chat", "responses", "completions"])
def test_a_stream_that_is_closed_is_aborted(client: OpenAI, api: str) -> None:
    begin: Any = {
        "chat": lambda: long_chat(client, stream=True),
        "responses": lambda: client.responses.create(
            model=MODEL, input=unique("Go on."), max_output_tokens=2000, stream=True
        ),
        "completions": lambda: client.completions.create(
            model=MODEL, prompt=unique(STORY), max_tokens=2000, stream=True
        ),
    }
    with begin[api]() as stream:
        for _, _ in zip(range(8), stream, strict=False):
            pass
    until_idle()


def test_the_asynchronous_client() -> None:
    async def chat(client: AsyncOpenAI, number: int) -> str:
        messages = [{"role": "user", "content": unique(f"Number {number}. {STORY}")}]
        first = await client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=6, temperature=0
        )
        messages += [first.choices[0].message, {"role": "user", "content": "Go on."}]
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=messages,
            max_tokens=6,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert_hit(chunks[-1].usage.prompt_tokens_details.cached_tokens, first.usage.total_tokens)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    async def main() -> None:
        async with AsyncOpenAI(base_url=BASE, api_key=KEY, max_retries=0) as client:
            assert all(await asyncio.gather(*(chat(client, number) for number in range(4))))
            response = await client.responses.create(model=MODEL, input="Hello.", max_output_tokens=4)
            assert [item.type async for item in client.responses.input_items.list(response.id)] == ["message"]
            messages = [{"role": "user", "content": unique("Tell me all.")}]
            with pytest.raises(TimeoutError):  # the caller's own deadline cancels the request
                await asyncio.wait_for(
                    client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2000), 0.5
                )

    asyncio.run(main())
    until_idle()
