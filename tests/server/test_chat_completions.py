"""Chat completions over a real port: recognised histories, receipts, streams, tools, refusals."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import Serving, serving, tool_server

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving() as running:
        yield running


@pytest.fixture(autouse=True)
def _as_before(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        running: Serving = request.getfixturevalue("server")
        running.worker.script, running.worker.pause_s = None, 0.0
        running.until_idle()


def text_of(body: dict[str, Any]) -> str:
    content = body["choices"][0]["message"]["content"]
    assert isinstance(content, str)
    return content


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    events = [
        line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")
    ]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def test_a_resent_history_is_recognised_and_not_computed_again(server: Serving) -> None:
    first = server.ask("recognise me")
    assert (
        first["object"] == "chat.completion" and first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    )
    second = server.ask("recognise me", text_of(first), "and now?")
    receipt = second["pensieve"]
    known = first["usage"]["total_tokens"] - 1  # the last sampled token has no KV yet
    assert receipt["conversation"] == first["pensieve"]["conversation"]
    assert receipt["gpu_tokens"] == second["usage"]["prompt_tokens_details"]["cached_tokens"] == known
    assert (
        receipt["gpu_tokens"] + receipt["cpu_tokens"] + receipt["recomputed_tokens"] + receipt["new_tokens"]
        == receipt["prompt_tokens"]
    )
    assert [miss["why"] for miss in receipt["misses"]] == ["unfinished", "new"]
    assert (
        sum(miss["stop"] - miss["start"] for miss in receipt["misses"])
        == receipt["recomputed_tokens"] + receipt["new_tokens"]
    )


def test_an_answer_whose_text_would_be_other_tokens_still_hits(server: Serving) -> None:
    letters = [server.text.encode_answer(letter)[0] for letter in "there"]
    assert letters != list(
        server.text.encode_answer("there")
    )  # a tokenizer does not encode it letter by letter
    server.worker.script = (*letters, min(server.text.stop_token_ids))
    first = server.ask("say a word", n=20)
    assert text_of(first) == "there"
    second = server.ask("say a word", "there", "and another", n=20)
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == first["usage"]["total_tokens"] - 1


def test_white_space_around_an_answer_does_not_matter(server: Serving) -> None:
    first = server.ask("mind the gap")
    second = server.ask("mind the gap", f"  {text_of(first)}\n", "next")
    assert second["pensieve"]["conversation"] == first["pensieve"]["conversation"]


def test_a_changed_history_forks_at_the_point_of_divergence(server: Serving) -> None:
    one = server.ask("fork here", n=20)
    two = server.ask("fork here", text_of(one), "second question of this chat", n=20)
    kept = one["usage"]["total_tokens"] - 1
    changed = server.ask("fork here", text_of(one), "another second question", n=20)
    assert changed["pensieve"]["conversation"] != two["pensieve"]["conversation"]
    assert (
        changed["pensieve"]["gpu_tokens"] >= kept // 8 * 8
    )  # whole chunks are shared, the partial one is the first one's own
    edited = server.ask("fork here", "no, that was not the answer", "second question of this chat")
    assert edited["pensieve"]["conversation"] not in (
        one["pensieve"]["conversation"],
        changed["pensieve"]["conversation"],
    )
    shortened = server.ask("fork here", n=20)
    assert text_of(shortened) == text_of(one)  # greedy: asked again, answered the same


def test_a_retry_of_the_same_question_is_a_branch_of_its_own(server: Serving) -> None:
    first = server.ask("regenerate this")
    following = server.ask("regenerate this", text_of(first), "go on")
    again = server.ask("regenerate this", text_of(first), "go on")
    assert text_of(again) == text_of(following)
    assert again["pensieve"]["conversation"] != following["pensieve"]["conversation"]


def test_resent_histories_at_the_same_time_fork_instead_of_waiting(server: Serving) -> None:
    first = server.ask("two tabs")
    server.worker.pause_s = 0.01
    answers: list[dict[str, Any]] = []
    threads = [
        threading.Thread(
            target=lambda i=i: answers.append(server.ask("two tabs", text_of(first), f"tab {i}", n=12))
        )
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answer["pensieve"]["conversation"] for answer in answers}) == 3


def test_a_stream_says_what_the_whole_answer_says(server: Serving) -> None:
    whole = server.ask("stream me", n=12)
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "stream me"}],
        "max_tokens": 12,
        "temperature": 0,
        "stream": True,
    }
    chunks = chunks_of(
        server.post("/v1/chat/completions", body | {"stream_options": {"include_usage": True}})
    )
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(
        chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"]
    ) == text_of(whole)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 12
    assert (
        chunks[-2]["choices"][0]["finish_reason"] == "length"
        and chunks[-2]["pensieve"]["output_tokens"] == 12
    )
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_stop_strings_seeds_and_logprobs(server: Serving) -> None:
    server.say("one two three STOP four")
    body = server.ask("until the mark", n=50, stop="STOP")
    assert text_of(body) == "one two three " and body["choices"][0]["finish_reason"] == "stop"
    server.worker.script = None
    with_logprobs = server.ask("how sure", n=4, logprobs=True, top_logprobs=0)
    content = with_logprobs["choices"][0]["logprobs"]["content"]
    assert len(content) == 4 and {"token", "logprob", "bytes", "top_logprobs"} <= content[0].keys()


def test_an_answer_does_not_end_at_a_stop_string_before_min_tokens(server: Serving) -> None:
    server.say("one STOP two STOP three")
    early = server.ask("until a mark", n=50, stop="STOP")
    late = server.ask(
        "until a later mark", n=50, stop="STOP", min_tokens=early["usage"]["completion_tokens"] + 4
    )
    assert text_of(early) == "one " and text_of(late) == "one STOP two "


def test_concurrent_streams_of_many_users(server: Serving) -> None:
    answers: dict[int, str] = {}

    def user(number: int) -> None:
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": f"user {number}"}],
            "max_tokens": 10,
            "temperature": 0,
        }
        response = server.post("/v1/chat/completions", body | {"stream": True})
        answers[number] = "".join(
            chunk["choices"][0]["delta"].get("content", "") for chunk in chunks_of(response)
        )

    threads = [threading.Thread(target=user, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(answers[number] == text_of(server.ask(f"user {number}", n=10)) for number in range(16))


def test_a_client_that_leaves_aborts_its_request_and_frees_its_pins(server: Serving) -> None:
    server.worker.pause_s = 0.02
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "leave me"}],
        "max_tokens": 300,
        "temperature": 0,
        "stream": True,
    }
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        for _ in zip(range(4), response.iter_lines(), strict=False):
            pass
        assert server.context.answers.open
    deadline = time.monotonic() + 10
    while server.context.answers.open:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    stats = server.client.get("/v1/pensieve/map").json()["stats"]
    assert stats["running"] == stats["waiting"] == 0


def test_a_client_that_leaves_before_the_answer_aborts_too(server: Serving) -> None:
    server.worker.pause_s = 0.02
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "never mind"}],
        "max_tokens": 300,
        "temperature": 0,
    }
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/v1/chat/completions", json=body, timeout=0.3)
    server.until_idle()


def test_an_unstored_chat_leaves_nothing_in_the_store_and_still_hits(server: Serving) -> None:
    before = server.store.count("default")
    first = server.ask("off the record", store=False)
    second = server.ask("off the record", text_of(first), "more", store=False)
    assert server.store.count("default") == before
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == first["usage"]["total_tokens"] - 1


def test_what_is_off_the_record_never_joins_what_is_on_it(server: Serving) -> None:
    first = server.ask("on the record")
    before = server.store.count("default")
    off = server.ask("on the record", text_of(first), "off now", store=False)
    assert (
        off["pensieve"]["conversation"] != first["pensieve"]["conversation"]
        and server.store.count("default") == before
    )
    assert off["usage"]["prompt_tokens_details"]["cached_tokens"] > 0  # the same tokens are the same tokens
    after = server.ask("on the record", text_of(first), "off now", text_of(off), "on again")
    assert after["pensieve"]["conversation"] == first["pensieve"]["conversation"]


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"n": 2}, "n", "one answer"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not constrained"),
        ({"audio": {"voice": "x"}}, "audio", "not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "text"),
        ({"functions": []}, "functions", "tools"),
        ({"function_call": "auto"}, "function_call", "tool_choice"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
        ({"service_tier": "priority"}, "service_tier", "auto"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "8"}, "max_tokens", "integer"),
        ({"min_tokens": -1}, "min_tokens", "greater than or equal to 0"),
        ({"min_tokens": 2.0}, "min_tokens", "integer"),
        ({"min_tokens": 5}, "min_tokens", "at most the limit of the answer's tokens, 4, got 5"),
        ({"wibble": 1}, "wibble", "unknown parameter"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "king"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id", "required"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}
                ]
            },
            "messages.0.content.0",
            "images",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools.0", "functions"),
        ({"tools": [WEATHER, WEATHER]}, "tools.1", "two functions"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    server: Serving, change: dict[str, Any], param: str, words: str
) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4} | change
    response = server.post("/v1/chat/completions", body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param and words in error["message"], error


def test_other_refusals(server: Serving) -> None:
    unknown = server.post(
        "/v1/chat/completions", {"model": "gpt-4", "messages": [{"role": "user", "content": "hi"}]}
    )
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"
    long = server.post(
        "/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "x y z " * 400}]}
    )
    assert long.status_code == 400 and long.json()["error"]["code"] == "context_length_exceeded"
    assert "400" in long.json()["error"]["message"]
    half = server.client.post(
        "/v1/chat/completions",
        content=b'{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}',
        headers={"content-type": "application/json"},
    )
    assert half.status_code == 400 and "surrogate" in half.json()["error"]["message"]
    broken = server.client.post(
        "/v1/chat/completions", content=b"{nope", headers={"content-type": "application/json"}
    )
    assert broken.status_code == 400 and broken.json()["error"]["code"] == "invalid_json"
    assert server.client.get("/v1/nowhere").json()["error"]["code"] == "not_found"
    assert server.client.get("/v1/chat/completions").status_code == 405


def test_a_failure_before_the_first_token_of_a_stream_has_its_status(server: Serving) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x y z " * 400}], "stream": True}
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"


def test_overflow_truncates_where_it_may() -> None:
    with serving(max_context=120, overflow="truncate", slots=(64, 16)) as server:
        contents: list[str] = ["the first thing that was said in this chat"]
        for turn in range(8):
            answer = server.ask(*contents, n=10)
            contents += [text_of(answer), f"and question number {turn} goes on and on"]
        assert answer["pensieve"]["truncated_tokens"] == 0 or "left out" in answer["pensieve"]["warning"]
        last = server.ask(*contents, n=10)
        assert last["usage"]["total_tokens"] <= 120
        server.until_idle()


def test_tools_are_called_and_answered() -> None:
    with tool_server() as server:
        server.say(
            'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
        )
        question = [{"role": "user", "content": "weather in Oslo?"}]
        body = {
            "model": "tiny",
            "messages": question,
            "max_tokens": 100,
            "temperature": 0,
            "tools": [WEATHER],
        }
        whole = server.post("/v1/chat/completions", body).json()
        choice = whole["choices"][0]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Let me look."
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "get_weather" and json.loads(call["function"]["arguments"]) == {
            "city": "Oslo"
        }
        chunks = chunks_of(server.post("/v1/chat/completions", body | {"stream": True}))
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
        assert calls[0]["function"]["name"] == "get_weather" and calls[0]["id"].startswith("call_")
        assert json.loads("".join(part["function"]["arguments"] for part in calls)) == {"city": "Oslo"}
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
        server.say("It rains.")
        resent = [
            *question,
            choice["message"],
            {"role": "tool", "tool_call_id": call["id"], "content": "rain"},
        ]
        after = server.post("/v1/chat/completions", body | {"messages": resent}).json()
        assert text_of(after) == "It rains."
        assert (
            after["pensieve"]["conversation"] == chunks[-1]["pensieve"]["conversation"]
        )  # the newest that ends like this
        assert after["usage"]["prompt_tokens_details"]["cached_tokens"] == whole["usage"]["total_tokens"] - 1
        server.until_idle()


def test_a_tool_can_be_forced_and_calls_can_be_limited_to_one() -> None:
    with tool_server() as server:
        server.say('{"city": "Rome"}}\n</tool_call>')
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 100,
            "temperature": 0,
            "tools": [WEATHER],
        }
        forced = server.post(
            "/v1/chat/completions",
            body | {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
        ).json()
        (call,) = forced["choices"][0]["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
        one = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "%s"}}\n</tool_call>\n'
        server.say(one % "Bern" + one % "Basel")
        both = server.post("/v1/chat/completions", body).json()
        assert len(both["choices"][0]["message"]["tool_calls"]) == 2
        single = server.post("/v1/chat/completions", body | {"parallel_tool_calls": False}).json()
        assert len(single["choices"][0]["message"]["tool_calls"]) == 1
        assert single["usage"]["completion_tokens"] < both["usage"]["completion_tokens"]
        none = server.post("/v1/chat/completions", body | {"tool_choice": "none"}).json()
        assert "tool_calls" not in none["choices"][0]["message"]
        wrong = server.post(
            "/v1/chat/completions", body | {"tool_choice": {"type": "function", "function": {"name": "fly"}}}
        )
        assert wrong.status_code == 400 and "fly" in wrong.json()["error"]["message"]
        server.until_idle()


def test_one_key_one_turn(server: Serving) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "exactly once"}],
        "max_tokens": 9,
        "temperature": 1.0,
    }
    key = {"Idempotency-Key": "k-1"}
    first = server.post("/v1/chat/completions", body, **key).json()
    again = server.post("/v1/chat/completions", body, **key).json()
    assert (again["id"], text_of(again), again["usage"]) == (first["id"], text_of(first), first["usage"])
    streamed = chunks_of(server.post("/v1/chat/completions", body | {"stream": True}, **key))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in streamed) == text_of(first)
    other = server.post("/v1/chat/completions", body | {"max_tokens": 5}, **key)
    assert other.status_code == 422 and other.json()["error"]["code"] == "idempotency_key_reused"
    server.context.answers._ended.clear()  # as after a restart: only the store remembers
    stored = server.post("/v1/chat/completions", body, **key).json()
    assert (stored["id"], text_of(stored), stored["usage"]) == (first["id"], text_of(first), first["usage"])
    assert stored["pensieve"]["new_tokens"] == first["pensieve"]["new_tokens"]


def test_a_stream_with_a_key_can_be_broken_off_and_had_again(server: Serving) -> None:
    server.worker.pause_s = 0.01
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "broken off"}],
        "max_tokens": 40,
        "temperature": 0,
        "stream": True,
    }
    with server.client.stream(
        "POST", "/v1/chat/completions", json=body, headers={"Idempotency-Key": "k-2"}
    ) as response:
        for _ in zip(range(4), response.iter_lines(), strict=False):
            pass
    again = chunks_of(server.post("/v1/chat/completions", body, **{"Idempotency-Key": "k-2"}))
    assert again[-1]["pensieve"]["output_tokens"] == 40
    server.until_idle()


def test_a_failed_turn_lets_its_key_go(server: Serving) -> None:
    long = {"model": "tiny", "messages": [{"role": "user", "content": "x y z " * 400}]}
    key = {"Idempotency-Key": "k-3"}
    assert server.post("/v1/chat/completions", long, **key).status_code == 400
    deadline = time.monotonic() + 5
    while True:  # (the key is let go just after the answer)
        short = server.post(
            "/v1/chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": "short"}], "max_tokens": 3},
            **key,
        )
        if short.status_code == 200 or time.monotonic() > deadline:
            break
    assert short.status_code == 200
