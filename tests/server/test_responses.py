"""Responses and conversations over a real port."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import Serving, serving, tool_server

TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "weather",
    "parameters": {"type": "object", "properties": {}},
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


def respond(server: Serving, text: Any, n: int = 8, **more: Any) -> dict[str, Any]:
    response = server.post(
        "/v1/responses", {"model": "tiny", "input": text, "max_output_tokens": n, "temperature": 0} | more
    )
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def text_of(body: dict[str, Any]) -> str:
    return "".join(
        part["text"] for item in body["output"] if item["type"] == "message" for part in item["content"]
    )


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    events = []
    for block in response.text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        if "data" in lines:
            events.append(json.loads(lines["data"]))
            assert lines["event"] == events[-1]["type"]
    return events


def test_a_response_goes_on_from_another(server: Serving) -> None:
    first = respond(server, "hello from responses")
    assert (
        first["object"] == "response"
        and first["status"] == "incomplete"
        and first["incomplete_details"]["reason"] == "max_output_tokens"
    )
    second = respond(server, "and then?", previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    assert second["usage"]["input_tokens_details"]["cached_tokens"] == first["usage"]["total_tokens"] - 1
    fetched = server.client.get(f"/v1/responses/{first['id']}").json()
    for field in ("id", "output", "usage", "created_at", "status"):
        assert fetched[field] == first[field]
    branch = respond(server, "another way", previous_response_id=first["id"])
    assert branch["pensieve"]["conversation"] != second["pensieve"]["conversation"]
    items = server.client.get(f"/v1/responses/{second['id']}/input_items", params={"order": "asc"}).json()
    assert [item["role"] for item in items["data"]] == ["user", "assistant", "user"]


def test_instructions_are_for_one_response_only(server: Serving) -> None:
    first = respond(server, "who are you", instructions="You are a pirate.")
    same = respond(server, "again", previous_response_id=first["id"], instructions="You are a pirate.")
    assert same["usage"]["input_tokens_details"]["cached_tokens"] == first["usage"]["total_tokens"] - 1
    other = respond(server, "again", previous_response_id=first["id"])
    assert other["pensieve"]["warning"] is not None and "template_changed" in {
        miss["why"] for miss in other["pensieve"]["misses"]
    }
    assert same["instructions"] == "You are a pirate." and other["instructions"] is None


def test_a_stream_has_openai_s_events_and_can_be_read_again(server: Serving) -> None:
    response = server.post(
        "/v1/responses",
        {"model": "tiny", "input": "stream", "max_output_tokens": 9, "temperature": 0, "stream": True},
    )
    events = events_of(response)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    names = [event["type"] for event in events]
    assert names[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert names[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    final = events[-1]["response"]
    assert text == text_of(final) and final["pensieve"]["new_tokens"] > 0
    path = f"/v1/responses/{final['id']}"
    rest = events_of(server.client.get(path, params={"stream": True, "starting_after": 4}))
    assert rest == events[5:]
    server.context.answers._ended.clear()  # as after a restart: only the store remembers
    again = events_of(server.client.get(path, params={"stream": True}))
    assert "".join(event["delta"] for event in again if event["type"] == "response.output_text.delta") == text
    late = events_of(server.client.get(path, params={"stream": True, "starting_after": len(events) + 3}))
    assert (
        late[0]["sequence_number"] == len(events) + 4
        and late[0]["text"] == text
        and late[-1]["response"]["id"] == final["id"]
    )


def test_a_background_response_goes_on_without_its_client(server: Serving) -> None:
    server.worker.pause_s = 0.01
    begun = respond(server, "in the background", n=60, background=True)
    assert begun["status"] in ("queued", "in_progress") and begun["background"]
    with server.client.stream("GET", f"/v1/responses/{begun['id']}", params={"stream": True}) as stream:
        for _ in zip(range(8), stream.iter_lines(), strict=False):
            pass
    deadline = time.monotonic() + 20
    while (now := server.client.get(f"/v1/responses/{begun['id']}").json())["status"] in (
        "queued",
        "in_progress",
    ):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert now["usage"]["output_tokens"] == 60


def test_a_response_can_be_cancelled_and_keeps_what_was_said(server: Serving) -> None:
    server.worker.pause_s = 0.02
    begun = respond(server, "cancel me", n=200, background=True)
    while server.client.get(f"/v1/responses/{begun['id']}").json()["status"] != "in_progress":
        time.sleep(0.01)
    cancelled = server.post(f"/v1/responses/{begun['id']}/cancel", {}).json()
    assert cancelled["status"] == "cancelled" and text_of(cancelled)
    assert server.post(f"/v1/responses/{begun['id']}/cancel", {}).status_code in (200, 400)
    server.worker.pause_s = 0.0
    following = respond(server, "go on all the same", previous_response_id=begun["id"])
    assert following["usage"]["input_tokens_details"]["cached_tokens"] > 0


def test_a_conversation_holds_its_turns_and_items(server: Serving) -> None:
    made = server.post(
        "/v1/conversations",
        {"metadata": {"topic": "demo"}, "items": [{"role": "user", "content": "remember 7"}]},
    ).json()
    assert made["object"] == "conversation" and made["metadata"] == {"topic": "demo"}
    first = respond(server, "what was it?", conversation=made["id"])
    assert first["conversation"] == {"id": made["id"]}
    second = respond(server, "sure?", conversation={"id": made["id"]})
    assert second["usage"]["input_tokens_details"]["cached_tokens"] == first["usage"]["total_tokens"] - 1
    path = f"/v1/conversations/{made['id']}"
    items = server.client.get(path + "/items", params={"order": "asc", "limit": 100}).json()["data"]
    assert [item["role"] for item in items] == ["user", "user", "assistant", "user", "assistant"]
    assert items[2]["content"][0]["text"] == text_of(first)
    pages, after = [], None
    while True:
        page = server.client.get(
            path + "/items", params={"limit": 2} | ({"after": after} if after else {})
        ).json()
        pages += page["data"]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert pages == items[::-1]
    assert server.client.get(f"{path}/items/{items[3]['id']}").json() == items[3]
    server.post(
        f"{path}/items",
        {
            "items": [
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "one more"}]}
            ]
        },
    )
    third = respond(server, "now answer", conversation=made["id"])
    assert third["usage"]["input_tokens_details"]["cached_tokens"] == second["usage"]["total_tokens"] - 1
    assert server.client.delete(f"{path}/items/{items[1]['id']}").status_code == 200
    left = server.client.get(path + "/items", params={"order": "asc", "limit": 100}).json()["data"]
    assert len(left) == 7 and "what was it?" not in json.dumps(left)
    fourth = respond(server, "still there?", conversation=made["id"])
    assert fourth["status"] == "incomplete"
    changed = server.post(path, {"metadata": {"topic": "other"}}).json()
    assert changed["metadata"] == {"topic": "other"} == server.client.get(path).json()["metadata"]


def test_turns_on_a_named_conversation_queue(server: Serving) -> None:
    import threading

    made = server.post("/v1/conversations", {}).json()["id"]
    answers: list[dict[str, Any]] = []
    threads = [
        threading.Thread(target=lambda i=i: answers.append(respond(server, f"turn {i}", conversation=made)))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    items = server.client.get(f"/v1/conversations/{made}/items", params={"limit": 100}).json()["data"]
    assert len(items) == 8 and len({answer["id"] for answer in answers}) == 4


def test_deleting(server: Serving) -> None:
    first = respond(server, "delete me")
    second = respond(server, "on top", previous_response_id=first["id"])
    assert server.client.delete(f"/v1/responses/{first['id']}").json()["deleted"]
    assert server.client.get(f"/v1/responses/{first['id']}").status_code == 404
    third = respond(server, "still", previous_response_id=second["id"])  # what stands on it stands
    assert third["usage"]["input_tokens_details"]["cached_tokens"] > 0
    lone = respond(server, "lonely")
    assert server.client.delete(f"/v1/responses/{lone['id']}").status_code == 200
    gone = server.post("/v1/responses", {"model": "tiny", "input": "x", "previous_response_id": lone["id"]})
    assert gone.status_code == 404 and gone.json()["error"]["param"] == "previous_response_id"
    made = server.post("/v1/conversations", {}).json()["id"]
    respond(server, "secret words", conversation=made)
    erased = server.client.delete(f"/v1/conversations/{made}").json()
    assert erased["deleted"] and erased["store_bytes"] > 0 and erased["kv_bytes"] > 0 and erased["complete"]
    assert server.client.get(f"/v1/conversations/{made}").status_code == 404
    assert (
        server.post("/v1/responses", {"model": "tiny", "input": "x", "conversation": made}).status_code == 404
    )


def test_unstored_responses_cannot_be_fetched(server: Serving) -> None:
    first = respond(server, "not kept", store=False)
    server.context.answers._ended.clear()
    assert server.client.get(f"/v1/responses/{first['id']}").status_code == 404


def test_a_whole_history_as_input_is_recognised(server: Serving) -> None:
    first = respond(server, [{"role": "user", "content": "agents resend"}])
    resent = [
        {"role": "user", "content": "agents resend"},
        *first["output"],
        {"role": "user", "content": "next"},
    ]
    second = respond(server, resent)
    assert second["usage"]["input_tokens_details"]["cached_tokens"] == first["usage"]["total_tokens"] - 1


def test_functions_are_called_as_items() -> None:
    with tool_server() as server:
        server.say('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>')
        first = respond(server, "weather?", n=100, tools=[TOOL])
        (call,) = first["output"]
        assert (
            call["type"] == "function_call"
            and json.loads(call["arguments"]) == {"city": "Oslo"}
            and first["status"] == "completed"
        )
        stream = {
            "model": "tiny",
            "input": "weather?",
            "temperature": 0,
            "tools": [TOOL],
            "stream": True,
            "max_output_tokens": 100,
        }
        events = events_of(server.post("/v1/responses", stream))
        names = [event["type"] for event in events]
        assert "response.function_call_arguments.delta" in names and names[-1] == "response.completed"
        done = next(event for event in events if event["type"] == "response.function_call_arguments.done")
        assert json.loads(done["arguments"]) == {"city": "Oslo"}
        server.say("Rain.")
        output = [{"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}]
        second = respond(server, output, n=100, tools=[TOOL], previous_response_id=first["id"])
        assert text_of(second) == "Rain."
        assert second["usage"]["input_tokens_details"]["cached_tokens"] == first["usage"]["total_tokens"] - 1
        server.until_idle()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.type"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"input": None}, "input"),
        ({"input": [{"type": "computer_call"}]}, "input.0"),
        ({"previous_response_id": "resp_none"}, "previous_response_id"),
        ({"conversation": "conv_none"}, "conversation"),
        ({"previous_response_id": "resp_a", "conversation": "conv_b"}, "conversation"),
        ({"background": True, "store": False}, "background"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_refusals_name_their_field(server: Serving, change: dict[str, Any], param: str) -> None:
    response = server.post("/v1/responses", {"model": "tiny", "input": "hi"} | change)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] in (param, param.removesuffix(".type"))
