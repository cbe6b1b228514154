"""curl and httpx: what is sent without any SDK, and what an SDK cannot see of the answers."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from shared import CHUNK, KEY, MODEL, STORY, URL, assert_hit, unique, until_idle

HELLO = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Hello."}],
    "max_tokens": 4,
    "temperature": 0,
}


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(base_url=URL, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
        yield client


def curl(path: str, *options: str, body: Any = None, key: str = KEY) -> str:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    arguments = [
        "curl",
        "-sS",
        "--max-time",
        "60",
        URL + path,
        "-H",
        f"Authorization: Bearer {key}",
        *options,
    ]
    if body is not None:
        arguments += ["-H", "Content-Type: application/json", "--data-binary", "@-"]
    return subprocess.run(
        arguments, input=json.dumps(body or ""), capture_output=True, text=True, check=True, timeout=70
    ).stdout


def test_curl_chats_and_its_second_turn_hits_the_cache() -> None:
    messages = [{"role": "user", "content": unique(STORY)}]
    first = json.loads(curl("/v1/chat/completions", body=HELLO | {"messages": messages}))
    messages += [first["choices"][0]["message"], {"role": "user", "content": "And on Friday?"}]
    second = json.loads(curl("/v1/chat/completions", body=HELLO | {"messages": messages}))
    assert_hit(second["usage"]["prompt_tokens_details"]["cached_tokens"], first["usage"]["total_tokens"])
    assert second["pensieve"]["conversation"] == first["pensieve"]["conversation"]


@pytest.mark.parametrize(
    "options", [(), ("--http1.0",), ("-H", "Expect: 100-continue"), ("-H", "Transfer-Encoding: chunked")]
)
def test_curl_streams(options: tuple[str, ...]) -> None:
    events = curl("/v1/chat/completions", "-N", *options, body=HELLO | {"stream": True}).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(
        json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events[:-2]
    )
    lines = curl(
        "/v1/responses",
        "-N",
        *options,
        body={"model": MODEL, "input": "Hello.", "max_output_tokens": 4, "stream": True},
    ).splitlines()
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert names[0] == "response.created" and names[-1] in ("response.completed", "response.incomplete")


def test_curl_that_is_interrupted_is_aborted() -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = json.dumps(
        HELLO
        | {
            "messages": [{"role": "user", "content": unique("All about the sea.")}],
            "max_tokens": 2000,
            "stream": True,
        }
    )
    arguments = [
        "curl",
        "-sSN",
        URL + "/v1/chat/completions",
        "-H",
        f"Authorization: Bearer {KEY}",
        "-H",
        "Content-Type: application/json",
    ]
    with subprocess.Popen([*arguments, "-d", body], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"data: ")
        process.terminate()
    until_idle()


def test_a_body_without_its_content_type_is_told_so(http: httpx.Client) -> None:
    for headers in (
        {},
        {"Content-Type": "application/x-www-form-urlencoded"},
    ):  # (the second is what `curl -d` sends)
        refused = http.post("/v1/chat/completions", content=json.dumps(HELLO), headers=headers)
        assert (
            refused.status_code == 400
            and "Content-Type: application/json" in refused.json()["error"]["message"]
        )


def test_a_slash_at_the_end_means_nothing(http: httpx.Client) -> None:
    assert http.get("/v1/models/").json() == http.get("/v1/models").json()
    assert http.post("/v1/chat/completions/", json=HELLO).status_code == 200
    made = http.post("/v1/conversations/", json={}).json()
    assert http.get(f"/v1/conversations/{made['id']}/").json() == made


def test_head_and_options(http: httpx.Client) -> None:
    for path in ("/", "/health", "/ready", "/v1/models", "/metrics"):
        head, get = http.head(path), http.get(path)
        assert (head.status_code, head.content) == (200, b"") and head.headers["content-type"] == get.headers[
            "content-type"
        ]
    refused = http.options("/v1/chat/completions")
    assert (
        refused.status_code == 405
        and refused.headers["allow"] == "POST"
        and refused.json()["error"]["message"]
    )
    assert "access-control-allow-origin" not in refused.headers  # other sites' scripts have no business here


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/responses/resp_none", 404),
        ("GET", "/v1/conversations/conv_none/items", 404),
    ],
)
def test_every_error_has_openai_s_form(http: httpx.Client, method: str, path: str, status: int) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status and answer.headers["x-request-id"]
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_keys_are_asked_for_and_looked_at() -> None:
    with httpx.Client(base_url=URL) as http:
        assert http.get("/health").status_code == http.get("/ready").status_code == 200
        for headers in (
            {},
            {"Authorization": KEY},
            {"Authorization": "Basic eDp5"},
            {"Authorization": "Bearer é"},
        ):
            refused = http.get(
                "/v1/models", headers={name: value.encode() for name, value in headers.items()}
            )
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert http.get("/v1/models", headers={"Authorization": f"bearer {KEY}"}).status_code == 200


def test_a_stream_over_a_kept_connection_lets_the_next_request_through(http: httpx.Client) -> None:
    for _ in range(3):
        with http.stream("POST", "/v1/chat/completions", json=HELLO | {"stream": True}) as stream:
            assert (
                stream.headers["cache-control"] == "no-cache"
                and list(stream.iter_lines())[-2] == "data: [DONE]"
            )
        assert (
            http.post("/v1/completions", json={"model": MODEL, "prompt": "Once", "max_tokens": 2}).status_code
            == 200
        )


def test_another_cache_salt_sees_nothing(http: httpx.Client) -> None:
    body = HELLO | {"messages": [{"role": "user", "content": unique(STORY)}]}
    cached = [
        http.post("/v1/chat/completions", json=body, headers={"X-Cache-Salt": salt}).json()["usage"][
            "prompt_tokens_details"
        ]["cached_tokens"]
        for salt in ("a", "a", "b")
    ]
    assert cached[0] == cached[2] == 0 and cached[1] > CHUNK


def test_the_description_names_every_route(http: httpx.Client) -> None:
    described = http.get("/openapi.json").json()
    assert {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/conversations",
        "/v1/models",
    } <= described["paths"].keys()
