"""What an attacker or an unlucky user does to a server: no 5xx, no hang, nothing left behind."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote, unquote

import httpx
import pytest
from serving import Serving, tool_server

from pensieve.server import sweeper
from pensieve.store import Claim

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
LONE = '"\\ud800"'  # half of a surrogate pair, as JSON can spell it


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with pytest.MonkeyPatch.context() as patch, tool_server(config={"max_body_bytes": 4 << 20}) as running:
        patch.setattr(sweeper, "SWEEP_S", 0.2)
        yield running


@pytest.fixture(autouse=True)
def _as_before(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        running: Serving = request.getfixturevalue("server")
        running.worker.script, running.worker.pause_s = None, 0.0
        running.until_idle()


def own(conversation: str, action: str = "") -> str:
    return f"/v1/pensieve/conversations/{conversation}" + (f"/{action}" if action else "")


def send(server: Serving, path: str, text: str, method: str = "POST", **headers: str) -> httpx.Response:
    """A body as it is, whatever it is."""
    return server.client.request(
        method, path, content=text.encode("utf-8"), headers={"Content-Type": "application/json"} | headers
    )


def put(template: str, *values: str) -> str:
    """JSON text with these values, JSON text too, for its `%s`."""
    return template % values


def refused(response: httpx.Response) -> str:
    """The request was the client's fault, and it is told so in the form of all errors."""
    assert 400 <= response.status_code < 500, (response.status_code, response.text[:300])
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["code"]
    message: str = error["message"]
    return message


def begin(server: Serving, text: str, n: int = 8, **more: Any) -> str:
    """A response in the background; returns its id."""
    body = {
        "model": "tiny",
        "input": text,
        "max_output_tokens": n,
        "temperature": 0,
        "background": True,
    } | more
    response = server.post(RESPONSES, body)
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def ended(server: Serving, response_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + 20
    while True:
        body: dict[str, Any] = server.client.get(f"/v1/responses/{response_id}").json()
        if body.get("status") not in ("queued", "in_progress"):
            return body
        assert time.monotonic() < deadline
        time.sleep(0.01)


def until(what: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


# -- bodies


def deep(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


def chat(**more: str) -> str:
    """A chat's body as text; values are JSON text."""
    fields = {"model": '"tiny"', "messages": '[{"role":"user","content":"hi"}]', "max_tokens": "2"} | more
    return "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"


def respond(**more: str) -> str:
    return (
        "{"
        + ",".join(
            f'"{name}":{value}'
            for name, value in ({"input": '"hi"', "max_output_tokens": "2"} | more).items()
        )
        + "}"
    )


@pytest.mark.parametrize("depth", [200, 900, 100_000])
def test_nesting_without_end_is_refused(server: Serving, depth: int) -> None:
    nested = deep(depth)
    for key in ("", f"deep-{depth}"):
        headers = {"Idempotency-Key": key} if key else {}
        tool = put('[{"type":"function","function":{"name":"f","parameters":%s}}]', nested)
        refused(send(server, CHAT, chat(tools=tool), **headers))
        refused(
            send(
                server,
                CHAT,
                chat(messages=put('[{"role":"user","content":"x","annotations":[%s]}]', nested)),
                **headers,
            )
        )
        refused(
            send(
                server,
                RESPONSES,
                respond(tools=put('[{"type":"function","name":"f","parameters":%s}]', nested)),
                **headers,
            )
        )
        refused(
            send(
                server,
                RESPONSES,
                respond(input=put('[{"role":"user","content":"x","more":%s}]', nested)),
                **headers,
            )
        )
    refused(send(server, CHAT, "[" * depth + "]" * depth))


@pytest.mark.parametrize("depth", [50, 2000, 100_000])
def test_arguments_of_calls_are_text_however_deep(server: Serving, depth: int) -> None:
    arguments = json.dumps(deep(depth) if depth < 100 else "[" * depth)
    history = '[{"role":"user","content":"x"},{"role":"assistant","tool_calls":[{"id":"c","type":"function","function":{"name":"f","arguments":%s}}]},{"role":"tool","tool_call_id":"c","content":"y"}]'
    response = send(server, CHAT, chat(messages=put(history, arguments)))
    assert response.status_code in (200, 400), response.text[:300]  # (400: too long for the context)
    items = '[{"type":"function_call","call_id":"c","name":"f","arguments":%s},{"type":"function_call_output","call_id":"c","output":"y"}]'
    assert send(server, RESPONSES, respond(input=put(items, arguments))).status_code in (200, 400)
    made = send(server, "/v1/conversations", put('{"items":%s}', put(items, arguments)))
    assert made.status_code == 200
    assert server.client.get(f"/v1/conversations/{made.json()['id']}/items").status_code == 200


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 5000])
def test_numbers_that_json_lacks_are_refused(server: Serving, number: str) -> None:
    for field in (
        "temperature",
        "top_p",
        "max_tokens",
        "seed",
        "top_k",
        "min_p",
        "presence_penalty",
        "logit_bias",
        "metadata",
        "top_logprobs",
    ):
        refused(send(server, CHAT, chat(**{field: number})))
    for field in (
        "temperature",
        "top_p",
        "max_output_tokens",
        "seed",
        "max_tool_calls",
        "prompt",
        "top_logprobs",
    ):
        refused(send(server, RESPONSES, respond(**{field: number})))
    for stream in ("true", "false"):
        parameters = put('[{"type":"function","name":"f","parameters":{"a":%s}}]', number)
        refused(send(server, RESPONSES, respond(tools=parameters, stream=stream)))
    conversation = server.ask("numbers")["pensieve"]["conversation"]
    refused(send(server, own(conversation, "ttl"), put('{"seconds":%s}', number)))
    refused(send(server, "/detokenize", put('{"tokens":[%s]}', number)))
    refused(send(server, "/v1/completions", put('{"model":"tiny","prompt":[%s]}', number)))


@pytest.mark.parametrize("number", ["-1", "9223372036854775808", "18446744073709551616", "1" + "0" * 400])
def test_numbers_past_any_range_are_refused(server: Serving, number: str) -> None:
    for field in ("max_tokens", "top_logprobs", "temperature"):
        refused(send(server, CHAT, chat(**{field: number})))
    if number != "-1":
        refused(send(server, CHAT, chat(seed=number)))
        refused(send(server, RESPONSES, respond(seed=number)))
    refused(send(server, "/v1/completions", put('{"model":"tiny","echo":true,"prompt":[%s]}', number)))
    refused(send(server, "/detokenize", put('{"tokens":[%s]}', number)))
    conversation = server.ask("ranges")["pensieve"]["conversation"]
    refused(send(server, own(conversation, "ttl"), put('{"seconds":%s}', number)))
    for query in (
        "/v1/pensieve/conversations?limit=",
        f"/v1/conversations/{conversation}/items?limit=",
        "/v1/pensieve/map?limit=",
    ):
        refused(server.client.get(query + number))
    for query in ("/v1/pensieve/conversations?offset=", "/v1/pensieve/map?offset="):
        assert server.client.get(query + number).status_code in (200, 400)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat(metadata=put('{"a":%s}', LONE))),
        (CHAT, chat(metadata=put('{%s:"a"}', LONE))),
        (CHAT, chat(messages=put('[{"role":"user","content":%s}]', LONE))),
        (CHAT, chat(messages=put('[{"role":%s,"content":"x"}]', LONE))),
        (CHAT, chat(messages=put('[{"role":"tool","tool_call_id":%s,"name":%s,"content":"x"}]', LONE, LONE))),
        (CHAT, chat(model=LONE)),
        (CHAT, chat(stop=LONE)),
        (CHAT, chat(user=LONE)),
        (CHAT, chat()[:-1] + put(",%s:1}", LONE)),
        (CHAT, LONE),
        (CHAT, f"[{LONE}]"),
        (RESPONSES, respond(instructions=LONE)),
        (RESPONSES, respond(conversation=LONE)),
        (RESPONSES, respond(previous_response_id=LONE)),
        (RESPONSES, respond(tools=put('[{"type":"function","name":"f","description":%s}]', LONE))),
        (RESPONSES, respond(tools=put('[{"type":"function","name":%s}]', LONE))),
        (
            RESPONSES,
            respond(
                input=put('[{"role":"user","content":[{"type":"input_text","text":"x","more":%s}]}]', LONE)
            ),
        ),
        ("/v1/conversations", put('{"items":[{"role":"user","content":%s}]}', LONE)),
        ("/v1/conversations", put('{"metadata":{"a":%s}}', LONE)),
        ("/v1/completions", put('{"model":"tiny","prompt":%s}', LONE)),
        ("/tokenize", put('{"prompt":%s}', LONE)),
    ],
)
def test_half_characters_are_refused_everywhere(server: Serving, path: str, body: str) -> None:
    refused(send(server, path, body))


def test_half_characters_within_arguments_are_only_text(server: Serving) -> None:
    arguments = json.dumps('{"a":"\\ud800"}')  # the text of an escape, not the half character
    call = put(
        '{"role":"assistant","tool_calls":[{"id":"c","type":"function","function":{"name":"f","arguments":%s}}]}',
        arguments,
    )
    assert (
        send(
            server, CHAT, chat(messages=put('[%s,{"role":"tool","tool_call_id":"c","content":"x"}]', call))
        ).status_code
        == 200
    )


@pytest.mark.parametrize(
    "body",
    ["", "{", "null", "[]", "1", '"text"', "true", "\0", "{}{}", '{"model":"tiny"', "\ufeff{}", "a=1&b=2"],
)
def test_bodies_that_are_no_requests(server: Serving, body: str) -> None:
    for path in (CHAT, RESPONSES, "/v1/completions", "/tokenize", "/detokenize"):
        refused(send(server, path, body))
    for kind in (
        "text/plain",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
        "",
        "nonsense",
    ):
        refused(send(server, CHAT, body, **{"Content-Type": kind}))


# -- names and headers

NAMES = [
    "%00",
    "a%00b",
    "%ff%fe",
    "..",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "a/b",
    "%2F",
    "temp_x",
    "resp_",
    "resp_%00",
    "x" * 5000,
]
NAMES += ["%ED%A0%80", "'%3B--", "%0d%0aX-Evil:%20y", quote("é🙂"), "*", "%25", "%20", "-", "resp_resp_x"]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:30])
def test_names_are_only_looked_up(server: Serving, name: str) -> None:
    known = server.ask("names")["pensieve"]
    conversation, response = known["conversation"], "resp_" + known["turn"]
    paths = [
        *(
            ("GET", "/v1/conversations/{}", ""),
            ("POST", "/v1/conversations/{}", '{"metadata":{}}'),
            ("DELETE", "/v1/conversations/{}", ""),
        ),
        *(
            ("GET", "/v1/conversations/{}/items", ""),
            ("POST", "/v1/conversations/{}/items", '{"items":[{"role":"user","content":"x"}]}'),
        ),
        *(
            ("GET", f"/v1/conversations/{conversation}/items/{{}}", ""),
            ("DELETE", f"/v1/conversations/{conversation}/items/{{}}", ""),
        ),
        *(
            ("GET", "/v1/responses/{}", ""),
            ("DELETE", "/v1/responses/{}", ""),
            ("POST", "/v1/responses/{}/cancel", ""),
        ),
        *(("GET", "/v1/responses/{}/input_items", ""), ("GET", own("{}"), ""), ("DELETE", own("{}"), "")),
        *(("POST", own("{}", action), "") for action in ("warm", "idle", "pin", "unpin", "fork")),
        *(
            ("POST", own("{}", "ttl"), '{"seconds":5}'),
            ("GET", "/v1/models/{}", ""),
            ("GET", "/static/{}", ""),
        ),
        ("GET", f"/v1/conversations/{conversation}/items?after={{}}", ""),
        ("GET", f"/v1/responses/{response}/input_items?after={{}}", ""),
    ]
    for method, path, body in paths:
        answer = send(server, path.format(name), body, method)
        assert answer.status_code in (307, 400, 404, 405) or name in ("..", "a/b", "%2F"), (
            method,
            path,
            answer.status_code,
            answer.text,
        )
        assert answer.status_code < 500 and "x-evil" not in answer.headers and "root:" not in answer.text
    plain = unquote(name)
    for field in ("conversation", "previous_response_id"):
        refused(server.post(RESPONSES, {"input": "x", "max_output_tokens": 2, field: plain}))
    refused(server.post(own(conversation, "fork"), {"at": plain}))


VALUES = [
    b"",
    b"a" * 300,
    b"a" * 20_000,
    b"a" * 70_000,
    bytes(range(0x80, 0x100)),
    "é🙂".encode(),
    b"\xed\xa0\x80",
    b"a\tb",
    b"a\x1fb",
]
VALUES += [
    b"a\x00b",
    b"a\x7fb",
    b"a\r\nX-Evil: 1",
    b"a\nb",
    b"Bearer \xff",
    b"9" * 30,
    b"-1",
    b"chunked, identity",
]


@pytest.mark.parametrize(
    "name",
    [
        "Idempotency-Key",
        "X-Cache-Salt",
        "X-Session-ID",
        "Authorization",
        "Content-Type",
        "Content-Length",
        "Host",
    ],
)
def test_headers_of_any_bytes(server: Serving, name: str) -> None:
    body = chat().encode()
    for value in VALUES:
        headers = {
            "Host": b"x",
            "Content-Type": b"application/json",
            "Content-Length": str(len(body)).encode(),
            "Connection": b"close",
        }
        headers[name] = value
        head = b"".join(key.encode() + b": " + line + b"\r\n" for key, line in headers.items())
        answer = exchange(
            server,
            b"POST /v1/chat/completions HTTP/1.1\r\n" + head + b"\r\n" + body,
            shut=name == "Content-Length",
        )
        first = answer.split(b"\r\n", 1)[0]
        assert answer == b"" or b" 200 " in first or b" 4" in first, (value[:30], answer[:200])
        assert b"x-evil" not in answer.split(b"\r\n\r\n")[0].lower()


def exchange(server: Serving, sent: bytes, *, shut: bool = False) -> bytes:
    """Send bytes, read until the other side closes. `shut`: say that no more will come."""
    answer = b""
    with socket.create_connection(
        ("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20
    ) as connection:
        try:
            connection.sendall(sent)
            if shut:
                connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(1 << 16):
                answer += piece
        except (ConnectionResetError, BrokenPipeError):  # refused before everything was read
            pass
    return answer


# -- failures leave nothing behind


def test_what_is_far_too_long_is_refused_before_it_is_tokenized(server: Serving) -> None:
    seen: list[int] = []
    encode = server.text.encode_prompt

    def counting(text: str, *options: Any, **more: Any) -> list[int]:
        seen.append(len(text))
        return encode(text, *options, **more)

    server.text.encode_prompt = counting  # type: ignore[method-assign]
    try:
        long = "words and more words " * 150_000
        for path, body in (
            (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": long}]}),
            (
                CHAT,
                {
                    "model": "tiny",
                    "messages": [{"role": "assistant", "content": long}, {"role": "user", "content": "x"}],
                },
            ),
            (RESPONSES, {"input": long}),
            (RESPONSES, {"input": "x", "instructions": long}),
            (RESPONSES, {"input": long, "truncation": "auto"}),
            ("/v1/completions", {"model": "tiny", "prompt": long}),
        ):
            refused = server.post(path, body)
            assert (
                refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
            ), refused.text[:300]
    finally:
        del server.text.encode_prompt
    assert sum(seen) < len(long) / 10


def test_a_turn_that_fails_leaves_no_empty_conversation(server: Serving) -> None:
    def empty() -> list[str]:
        listed = server.client.get("/v1/pensieve/conversations", params={"limit": 500}).json()["data"]
        return [
            one["title"]
            for one in listed
            if one["id"].startswith("chat_") and server.store.get("default", one["id"]).leaf is None
        ]

    refused(
        server.post(
            CHAT,
            {"model": "tiny", "messages": [{"role": "user", "content": "too much " * 300}], "max_tokens": 2},
        )
    )
    server.worker.pause_s = 0.3  # the client leaves before the first token
    with pytest.raises(httpx.ReadTimeout):
        server.client.post(
            CHAT,
            json={"model": "tiny", "messages": [{"role": "user", "content": "gone early"}], "max_tokens": 50},
            timeout=0.2,
        )
    server.worker.pause_s = 0.0
    until(lambda: not server.context.answers.open)
    until(lambda: not empty())


def test_retries_that_race_the_first_try_get_its_answer(server: Serving) -> None:
    claim = server.store.claim

    def slow(*arguments: Any, **more: Any) -> Claim:
        held = claim(*arguments, **more)
        if held.fresh:
            time.sleep(0.3)  # who came first is the last to hear of it
        return held

    server.store.claim = slow  # type: ignore[method-assign]
    try:
        for path, body in (
            (
                CHAT,
                {"model": "tiny", "messages": [{"role": "user", "content": "once only"}], "max_tokens": 8},
            ),
            (RESPONSES, {"input": "once only", "max_output_tokens": 8}),
        ):
            key = {"Idempotency-Key": "race" + path}
            with ThreadPoolExecutor(6) as pool:
                answers = list(pool.map(lambda _: server.client.post(path, json=body, headers=key), range(6)))  # noqa: B023
            assert {answer.status_code for answer in answers} == {200}
            assert len({answer.json()["id"] for answer in answers}) == 1
    finally:
        server.store.claim = claim  # type: ignore[method-assign]


def test_a_failed_try_lets_only_its_own_claim_go(server: Serving) -> None:
    store = server.store
    first = store.claim("n", "k", b"f", "turn-1")
    store.release("n", "k", "turn-1")
    second = store.claim("n", "k", b"f", "turn-2")
    store.release("n", "k", "turn-1")  # late
    assert first.fresh and second.fresh and not store.claim("n", "k", b"f", "turn-3").fresh


# -- deleting, forking, cancelling at the worst moment


@pytest.fixture
def conversation(server: Serving) -> str:
    made: str = server.post("/v1/conversations", {}).json()["id"]
    return made


def stream(server: Serving, conversation: str, said: list[str], n: int = 200) -> threading.Thread:
    """A stream on a conversation, its lines put into `said`; returns once it has begun."""
    body = {
        "input": "stream",
        "conversation": conversation,
        "max_output_tokens": n,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }

    def read() -> None:
        with httpx.stream("POST", server.url + RESPONSES, json=body, timeout=30) as response:
            said.extend(response.iter_lines())

    thread = threading.Thread(target=read)
    server.worker.pause_s = 0.01
    thread.start()
    until(lambda: any(answer.num_pieces for answer in server.context.answers.open.values()))
    return thread


def test_deleting_a_conversation_that_speaks(server: Serving, conversation: str) -> None:
    said: list[str] = []
    thread = stream(server, conversation, said)
    with ThreadPoolExecutor(4) as pool:
        deleted = [
            pool.submit(server.client.delete, path)
            for path in (own(conversation), own(conversation), f"/v1/conversations/{conversation}")
        ]
        late = pool.submit(
            server.post, RESPONSES, {"input": "late", "conversation": conversation, "max_output_tokens": 50}
        )
    statuses = sorted(one.result().status_code for one in deleted)
    assert statuses[0] == 200 and set(statuses) <= {200, 404}, [one.result().text for one in deleted]
    assert late.result().status_code in (200, 404)  # (200: it was over before the first of them was heard)
    thread.join(20)
    assert not thread.is_alive() and any(
        '"status":"cancelled"' in line or "response.failed" in line for line in said
    )
    assert server.client.get(own(conversation)).status_code == 404
    assert server.client.delete(own(conversation)).status_code == 404
    for action in ("pin", "unpin", "warm", "idle", "fork"):
        assert server.post(own(conversation, action), {}).status_code == 404
    assert server.post(own(conversation, "ttl"), {"seconds": 1}).status_code == 404
    server.until_idle()
    assert conversation not in {row["id"] for row in server.client.get("/v1/pensieve/map").json()["rows"]}


def test_a_deleted_conversation_does_not_come_back(server: Serving, conversation: str) -> None:
    """A turn that passed the door just before the conversation went."""
    get = server.store.get

    def passed(namespace: str, id: str) -> Any:
        found = get(namespace, id)
        server.store.get = get  # type: ignore[method-assign]
        server.client.delete(own(conversation))
        return found

    server.store.get = passed  # type: ignore[method-assign]
    try:
        refused(
            server.post(
                RESPONSES, {"input": "too late", "conversation": conversation, "max_output_tokens": 4}
            )
        )
    finally:
        server.store.get = get  # type: ignore[method-assign]
    assert server.client.get(own(conversation)).status_code == 404


def test_turns_that_come_while_a_conversation_is_deleted(server: Serving, conversation: str) -> None:
    said: list[str] = []
    thread = stream(server, conversation, said)
    erase = server.store.erase

    def slow_erase(*names: Any, **more: Any) -> Any:
        time.sleep(0.5)
        return erase(*names, **more)

    server.store.erase = slow_erase  # type: ignore[method-assign]
    try:
        with ThreadPoolExecutor(1) as pool:
            deleted = pool.submit(server.client.delete, own(conversation))
            thread.join(20)  # its turn is over, its rows are still there
            late = server.post(
                RESPONSES, {"input": "in between", "conversation": conversation, "max_output_tokens": 4}
            )
        assert deleted.result().status_code == 200
        assert late.status_code == 404, late.text
    finally:
        server.store.erase = erase  # type: ignore[method-assign]
    server.until_idle()
    assert conversation not in {row["id"] for row in server.client.get("/v1/pensieve/map").json()["rows"]}


def test_forking_a_conversation_that_speaks(server: Serving, conversation: str) -> None:
    server.post(
        RESPONSES, {"input": "first", "conversation": conversation, "max_output_tokens": 8, "temperature": 0}
    )
    said: list[str] = []
    thread = stream(server, conversation, said, n=60)
    forked = server.post(own(conversation, "fork"), {}).json()["id"]
    in_fork = server.post(
        RESPONSES, {"input": "aside", "conversation": forked, "max_output_tokens": 8, "temperature": 0}
    )
    assert in_fork.status_code == 200 and in_fork.json()["usage"]["input_tokens_details"]["cached_tokens"] > 0
    thread.join(20)
    assert any("response.incomplete" in line for line in said)
    assert (
        len(server.client.get(own(forked)).json()["turns"]) == 2
        and len(server.client.get(own(conversation)).json()["turns"]) == 2
    )
    assert server.client.delete(own(conversation)).status_code == 200
    assert len(server.client.get(own(forked)).json()["turns"]) == 2


def test_cancelling_twice_and_what_waits_in_line(server: Serving, conversation: str) -> None:
    server.worker.pause_s = 0.01
    running = begin(server, "long", 300, conversation=conversation)
    waiting = begin(server, "behind it", 300, conversation=conversation)
    cancelled = server.post(f"/v1/responses/{waiting}/cancel", {})
    assert cancelled.status_code == 200 and cancelled.json()["status"] == "cancelled"
    assert server.client.get(f"/v1/responses/{running}").json()["status"] in (
        "queued",
        "in_progress",
    )  # it had not to be waited for
    for _ in range(2):
        again = server.post(f"/v1/responses/{running}/cancel", {})
        assert again.status_code == 200 and again.json()["status"] == "cancelled"
    assert ended(server, running)["status"] == ended(server, waiting)["status"] == "cancelled"
    server.client.delete(f"/v1/responses/{running}")
    assert (
        server.post(f"/v1/responses/{running}/cancel", {}).status_code == 404
    )  # what was deleted is not shown again


def test_cancelling_before_the_first_token_is_remembered(server: Serving) -> None:
    server.worker.pause_s = 0.3
    begun = begin(server, "not a word", 20)
    assert server.post(f"/v1/responses/{begun}/cancel", {}).json()["status"] == "cancelled"
    assert server.client.get(f"/v1/responses/{begun}").json()["status"] == "cancelled"


def test_what_is_not_stored_can_be_deleted_and_goes_by_itself(server: Serving) -> None:
    kept = server.ask("in memory only", store=False)["pensieve"]["conversation"]
    assert kept.startswith("temp_") and server.client.get(own(kept)).status_code == 404
    assert server.client.delete(own(kept)).json()["deleted"]
    assert server.client.delete(own(kept)).status_code == 404
    other = server.ask("in memory only, too", store=False)["pensieve"]["conversation"]
    assert [one.id for one in server.context.service.expired(time.time() + 4000, 10)] == [other]
    assert not server.context.service.expired(time.time(), 10)
    assert server.client.delete(own(other)).status_code == 200


@pytest.mark.parametrize("seconds", [0, -5, "soon", None, True, 1e-9])
def test_times_to_live(server: Serving, conversation: str, seconds: Any) -> None:
    answer = server.post(own(conversation, "ttl"), {"seconds": seconds})
    assert answer.status_code == (200 if seconds is None or seconds is True or seconds == 1e-9 else 400)
    if seconds == 1e-9:
        until(lambda: server.client.get(own(conversation)).status_code == 404)


def test_one_conversation_that_cannot_be_deleted_keeps_no_other(server: Serving) -> None:
    stuck, free = (server.post("/v1/conversations", {}).json()["id"] for _ in range(2))
    erase = server.context.service.erase

    def failing(id: str, **more: Any) -> Any:
        if id == stuck:
            return erase("never-was", **more)
        return erase(id, **more)

    server.context.service.erase = failing  # type: ignore[method-assign,assignment]
    try:
        for conversation in (stuck, free):
            server.post(own(conversation, "ttl"), {"seconds": 1e-9})
        until(lambda: server.client.get(own(free)).status_code == 404)
    finally:
        server.context.service.erase = erase  # type: ignore[method-assign]
    until(lambda: server.client.get(own(stuck)).status_code == 404)


def test_deleting_an_item_while_its_conversation_speaks(server: Serving, conversation: str) -> None:
    server.post(
        RESPONSES, {"input": "first", "conversation": conversation, "max_output_tokens": 8, "temperature": 0}
    )
    items = server.client.get(f"/v1/conversations/{conversation}/items", params={"order": "asc"}).json()[
        "data"
    ]
    said: list[str] = []
    thread = stream(server, conversation, said, n=40)
    assert server.client.delete(f"/v1/conversations/{conversation}/items/{items[0]['id']}").status_code == 200
    thread.join(20)
    assert any(
        "conversation_conflict" in line for line in said
    )  # what it went on from is not the conversation's any more
    left = server.client.get(f"/v1/conversations/{conversation}/items", params={"order": "asc"}).json()[
        "data"
    ]
    assert [item["role"] for item in left] == ["assistant"]
