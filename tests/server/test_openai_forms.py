"""What OpenAI's clients hold a server to; tests/clients has the clients themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import Serving, serving, tool_server

CALL = '<tool_call>\n{"name": "%s", "arguments": {"word": "hello"}}\n</tool_call>'


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def caller() -> Iterator[Serving]:
    """One whose template knows tools."""
    with tool_server() as running:
        yield running


@pytest.fixture(autouse=True)
def _as_before(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in ("server", "caller"):
        if name in request.fixturenames:
            running: Serving = request.getfixturevalue(name)
            running.worker.script, running.worker.pause_s = None, 0.0
            running.until_idle()


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    return [
        json.loads(line.removeprefix("data: "))
        for line in response.text.splitlines()
        if line.startswith("data: {")
    ]


def tool(name: str, **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"word": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def ask(server: Serving, *messages: dict[str, Any], n: int = 100, **more: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": messages, "max_tokens": n, "temperature": 0} | more
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


# -- usage


def test_usage_says_how_much_of_a_prompt_is_cached_and_how_much_is_from_now_on(server: Serving) -> None:
    first = server.ask("where do the tokens go")
    second = server.ask("where do the tokens go", first["choices"][0]["message"]["content"], "and then")
    details = second["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] == first["usage"]["total_tokens"] - 1
    assert details["cached_tokens"] + details["cache_write_tokens"] == second["usage"]["prompt_tokens"]
    body = {"model": "tiny", "input": "and over responses", "max_output_tokens": 4}
    whole = server.post("/v1/responses", body).json()["usage"]
    streamed = events_of(server.post("/v1/responses", body | {"stream": True}))[-1]["response"]["usage"]
    for usage in (whole, streamed):
        assert sum(usage["input_tokens_details"].values()) == usage["input_tokens"]
        assert usage["output_tokens_details"] == {"reasoning_tokens": 0}


# -- how responses end


def test_a_cancelled_response_ends_its_stream_with_an_event_that_clients_know(server: Serving) -> None:
    server.worker.pause_s = 0.02
    body = {"model": "tiny", "input": "cancel me while I read", "max_output_tokens": 200, "stream": True}
    events = []
    with server.client.stream("POST", "/v1/responses", json=body) as stream:
        for line in stream.iter_lines():
            if not line.startswith("data: {"):
                continue
            events.append(json.loads(line.removeprefix("data: ")))
            if len(events) == 6:
                response_id = events[0]["response"]["id"]
                assert server.post(f"/v1/responses/{response_id}/cancel", {}).json()["status"] == "cancelled"
    assert events[-1]["type"] == "response.incomplete" and events[-1]["response"]["status"] == "cancelled"
    server.context.answers._ended.clear()  # as after a restart: only the store remembers
    stored = server.client.get(f"/v1/responses/{response_id}").json()
    assert stored["status"] == "cancelled" and stored["output"] == events[-1]["response"]["output"]
    again = events_of(server.client.get(f"/v1/responses/{response_id}", params={"stream": True}))
    assert again[-1]["type"] == "response.incomplete" and again[-1]["response"]["status"] == "cancelled"


def test_a_failed_response_has_a_code_that_openai_has_and_ours_beside_it() -> None:
    with serving(config={"request_timeout_s": 0.3}) as server:
        server.worker.pause_s = 0.02
        body = {"model": "tiny", "input": "too slow", "max_output_tokens": 300}
        failed = events_of(server.post("/v1/responses", body | {"stream": True}))[-1]
        assert failed["type"] == "response.failed" and failed["response"]["status"] == "failed"
        error = failed["response"]["error"]
        assert (error["code"], error["type"], error["param"]) == ("server_error", "request_timeout", None)
        assert server.client.get(f"/v1/responses/{failed['response']['id']}").json()["error"] == error
        server.until_idle()


# -- functions


def test_strict_functions_are_taken_and_said_not_to_be(caller: Serving) -> None:
    caller.say(CALL % "say")
    answer = ask(caller, user("say hello"), tools=[tool("say", strict=True)])
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "say"
    flat = {"type": "function", "strict": True, **tool("say")["function"]}
    response = caller.post(
        "/v1/responses", {"model": "tiny", "input": "say hello", "max_output_tokens": 100, "tools": [flat]}
    ).json()
    assert response["output"][0]["type"] == "function_call"
    assert response["tools"] == [flat | {"strict": False, "description": None}]


@pytest.mark.parametrize("name", ["say", "required"])
def test_a_call_that_is_required_of_one_function_is_a_call_of_that_one(caller: Serving, name: str) -> None:
    caller.say('{"word": "hello"}}\n</tool_call>')  # (the answer is made to begin with the function's name)
    for choice in ("required", {"type": "function", "function": {"name": name}}):
        message = ask(caller, user("say hello"), tools=[tool(name)], tool_choice=choice)["choices"][0][
            "message"
        ]
        assert [call["function"]["name"] for call in message["tool_calls"]] == [name]
    flat = {"type": "function", **tool(name)["function"]}
    flat_choices: tuple[Any, ...] = ("required", {"type": "function", "name": name})
    for choice in flat_choices:
        body = {
            "model": "tiny",
            "input": "say hello",
            "max_output_tokens": 100,
            "tools": [flat],
            "tool_choice": choice,
        }
        assert [item["name"] for item in caller.post("/v1/responses", body).json()["output"]] == [name]


def test_of_several_functions_the_model_chooses_the_required_one(caller: Serving) -> None:
    caller.say('sing", "arguments": {"word": "hello"}}\n</tool_call>')
    tools = [tool("say"), tool("sing")]
    message = ask(caller, user("sing hello"), tools=tools, tool_choice="required")["choices"][0]["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["sing"]


def test_who_names_a_function_gets_its_call_and_nothing_behind_it(caller: Serving) -> None:
    caller.say('{"word": "hello"}}\n</tool_call>\nI said hello.\n' + CALL % "say")
    chosen = {"type": "function", "function": {"name": "say"}}
    named = ask(caller, user("say hello"), tools=[tool("say")], tool_choice=chosen)
    message = named["choices"][0]["message"]
    assert (
        message["content"] is None
        and len(message["tool_calls"]) == 1
        and named["choices"][0]["finish_reason"] == "tool_calls"
    )
    free = ask(caller, user("say hello"), tools=[tool("say")], tool_choice="required")
    assert len(free["choices"][0]["message"]["tool_calls"]) == 2
    assert named["usage"]["completion_tokens"] < free["usage"]["completion_tokens"]


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_tools_that_may_not_be_called_this_time_leave_the_prompt_as_it_was(caller: Serving, api: str) -> None:
    caller.say(CALL % "say")
    question = f"say hello over {api}"
    if api == "chat":
        first = ask(caller, user(question), tools=[tool("say")])
        call = first["choices"][0]["message"]
        result = {"role": "tool", "tool_call_id": call["tool_calls"][0]["id"], "content": "it was said"}
        second = ask(caller, user(question), call, result, tools=[tool("say")], tool_choice="none")
        assert (
            "tool_calls" not in second["choices"][0]["message"]
            and "<tool_call>" in second["choices"][0]["message"]["content"]
        )
        details, before = second["usage"]["prompt_tokens_details"], first["usage"]["total_tokens"]
    else:
        body: dict[str, Any] = {
            "model": "tiny",
            "max_output_tokens": 100,
            "tools": [{"type": "function", **tool("say")["function"]}],
        }
        first = caller.post("/v1/responses", body | {"input": question}).json()
        output = {
            "type": "function_call_output",
            "call_id": first["output"][0]["call_id"],
            "output": "it was said",
        }
        following = {"input": [output], "previous_response_id": first["id"], "tool_choice": "none"}
        second = caller.post("/v1/responses", body | following).json()
        assert [item["type"] for item in second["output"]] == ["message"]
        details, before = second["usage"]["input_tokens_details"], first["usage"]["total_tokens"]
    assert details["cached_tokens"] == before - 1 and second["pensieve"]["warning"] is None


# -- HTTP


def test_head_is_a_get_without_its_body(server: Serving) -> None:
    for path in ("/", "/health", "/v1/models"):
        head, get = server.client.head(path), server.client.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == get.headers["content-type"]
    assert server.client.head("/v1/models/gpt-4").status_code == 404
    assert server.client.head("/v1/chat/completions").status_code == 405


def test_a_slash_at_the_end_means_nothing(server: Serving) -> None:
    assert server.client.get("/v1/models/").json() == server.client.get("/v1/models").json()
    body = {"model": "tiny", "messages": [user("hi")], "max_tokens": 2}
    assert (
        server.client.post("/v1/chat/completions/", json=body).status_code == 200
    )  # (and no redirection, which curl would not follow)
    made = server.client.post("/v1/conversations/", json={}).json()["id"]
    assert server.client.delete(f"/v1/conversations/{made}/").json()["deleted"]


def test_other_sites_scripts_are_not_let_in(server: Serving) -> None:
    asked = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    preflight = server.client.options("/v1/chat/completions", headers=asked)
    assert preflight.status_code == 405 and preflight.headers["allow"] == "POST"
    assert not any(name.startswith("access-control") for name in preflight.headers)


def test_every_answer_has_an_id(server: Serving) -> None:
    stream = server.post(
        "/v1/chat/completions", {"model": "tiny", "messages": [user("hi")], "max_tokens": 2, "stream": True}
    )
    answers = [
        stream,
        server.client.get("/v1/models"),
        server.client.get("/nowhere"),
        server.post("/v1/responses", {}),
    ]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == len(answers) and all(name.startswith("req_") for name in ids)


def test_an_error_of_our_own_has_the_form_and_the_id_of_any_other(
    server: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server.context, "service", None)
    failed = server.client.get("/v1/pensieve/map")
    monkeypatch.undo()
    assert failed.status_code == 500 and failed.json()["error"]["code"] == "internal_error"
    assert failed.headers["x-request-id"] in caplog.text
    counted = 'pensieve_requests_total{endpoint="/v1/pensieve/map",status="500"} 1.0'
    assert counted in server.client.get("/metrics").text


def test_a_base_url_without_v1_is_told_where_the_api_is(server: Serving) -> None:
    assert "/v1/chat/completions" in server.post("/chat/completions", {}).json()["error"]["message"]
    assert "/v1" not in server.client.get("/nowhere").json()["error"]["message"]


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "application/x-www-form-urlencoded"}])
def test_a_body_that_is_not_sent_as_json_is_told_so(server: Serving, headers: dict[str, str]) -> None:
    body = json.dumps({"model": "tiny", "messages": [user("hi")]})
    refused = server.client.post("/v1/chat/completions", content=body, headers=headers)
    assert (
        refused.status_code == 400 and "Content-Type: application/json" in refused.json()["error"]["message"]
    )


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        ("chat/completions", {"prompt_cache_options": {"mode": "explicit"}}, "prompt_cache_options"),
        ("chat/completions", {"moderation": {"model": "x"}}, "moderation"),
        ("responses", {"prompt_cache_options": {"mode": "explicit"}}, "prompt_cache_options"),
        (
            "responses",
            {"text": {"format": {"type": "json_schema", "name": "x", "strict": True, "schema": {}}}},
            "text.format",
        ),
    ],
)
def test_newer_fields_are_refused_by_name(
    server: Serving, path: str, change: dict[str, Any], param: str
) -> None:
    body = (
        {"model": "tiny", "messages": [user("hi")]}
        if path == "chat/completions"
        else {"model": "tiny", "input": "hi"}
    )
    error = server.post(f"/v1/{path}", body | change).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", param)
