"""Requests that no test author wrote: generated from the API's own description, half sent, read slowly, left in the
middle, or no HTTP at all.
"""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from serving import Serving, tool_server

from pensieve.server.app import create_app
from pensieve.server.guard import GuardRules
from pensieve.server.metrics import Metrics

schemathesis = pytest.importorskip("schemathesis")
from schemathesis import checks  # noqa: E402  (part of what may be missing)


def _no_context() -> Any:
    raise AssertionError("this application is described, not run")


SCHEMA = schemathesis.openapi.from_dict(create_app(_no_context, Metrics(), GuardRules()).openapi())
OPERATIONS = {found.ok().label: found.ok() for found in SCHEMA.get_all_operations()}
del OPERATIONS["GET /v1/pensieve/record"]  # it has no end
POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
HANG_S = 30.0


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with tool_server(config={"max_body_bytes": 1 << 20, "stall_timeout_s": 2.0}) as running:
        yield running
        clear(running)


@pytest.fixture(autouse=True)
def _as_before(server: Serving) -> Iterator[None]:
    yield
    server.worker.script, server.worker.pause_s = None, 0.0
    server.until_idle()


def clear(server: Serving) -> None:
    """Delete whatever there is: then no slot of any tier is used."""
    server.until_idle()
    while listed := server.client.get("/v1/pensieve/conversations", params={"limit": 500}).json()["data"]:
        for one in listed:
            assert server.client.delete(f"/v1/pensieve/conversations/{one['id']}").status_code == 200
    for row in server.client.get("/v1/pensieve/map", params={"limit": 500}).json()[
        "rows"
    ]:  # what is cached and not stored
        assert server.client.delete(f"/v1/pensieve/conversations/{row['id']}").status_code == 200
    checked = server.client.post("/v1/pensieve/check").json()
    assert checked["ok"] and checked["leases"] == 0 and set(checked["used"]) == {0}, checked


def known(server: Serving) -> dict[str, str]:
    """Names of things that are there, so that requests get past the door."""
    body = server.ask("known", n=4)["pensieve"]
    items = server.client.get(f"/v1/conversations/{body['conversation']}/items").json()["data"]
    return {
        "conversation_id": body["conversation"],
        "response_id": "resp_" + body["turn"],
        "item_id": items[0]["id"],
        "model": "tiny",
    }


def examine(server: Serving, label: str, mode: Any, num_examples: int, *, repeat: bool) -> None:
    operation = OPERATIONS[label]

    @settings(
        max_examples=num_examples,
        derandomize=repeat,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), at_home=st.booleans())
    def example(case: Any, at_home: bool) -> None:
        if at_home:
            there = known(server)
            for name in case.path_parameters or ():
                case.path_parameters[name] = there[name]
            if isinstance(case.body, dict):
                if "model" in case.body:
                    case.body["model"] = "tiny"
                for field, name in (
                    ("conversation", "conversation_id"),
                    ("previous_response_id", "response_id"),
                ):
                    if isinstance(case.body.get(field), str):
                        case.body[field] = there[name]
                for field in ("max_tokens", "max_output_tokens", "max_completion_tokens"):
                    if isinstance(case.body.get(field), int):
                        case.body[field] = min(case.body[field], 20)
        response = case.call(base_url=server.url, timeout=HANG_S)
        case.validate_response(response, checks=CHECKS)

    try:
        example()
    except Unsatisfiable:
        assert mode is NEGATIVE  # any text will do as a name: nothing is unfit


@pytest.mark.parametrize("mode", [POSITIVE, NEGATIVE], ids=["fit", "unfit"])
@pytest.mark.parametrize("label", OPERATIONS)
def test_requests_made_from_the_description(server: Serving, label: str, mode: Any) -> None:
    examine(server, label, mode, 12, repeat=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", [POSITIVE, NEGATIVE], ids=["fit", "unfit"])
@pytest.mark.parametrize("label", OPERATIONS)
def test_many_requests_made_from_the_description(server: Serving, label: str, mode: Any) -> None:
    examine(server, label, mode, 150, repeat=False)


# -- below HTTP


def port_of(server: Serving) -> int:
    return int(server.url.rpartition(":")[2])


def request(path: str, body: dict[str, Any]) -> bytes:
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    return head.encode() + text


STREAMS = (
    (
        "/v1/chat/completions",
        {"model": "tiny", "messages": [{"role": "user", "content": "stream"}], "max_tokens": 60},
    ),
    ("/v1/responses", {"input": "stream", "max_output_tokens": 60}),
    ("/v1/completions", {"model": "tiny", "prompt": "stream", "max_tokens": 60}),
)


def test_clients_that_leave_at_any_moment(server: Serving) -> None:
    server.worker.pause_s = 0.002
    rng = random.Random(1)

    def leave(number: int) -> None:
        path, body = STREAMS[number % len(STREAMS)]
        sent = request(path, {**body, "stream": number % 4 != 3, "temperature": 0})
        stop_sending, read_bytes, wait_s = (
            rng.randrange(len(sent) + 200),
            rng.randrange(4000),
            rng.uniform(0, 0.1),
        )
        with socket.create_connection(("127.0.0.1", port_of(server)), timeout=HANG_S) as connection:
            connection.sendall(sent[:stop_sending])
            if stop_sending >= len(sent) and read_bytes > 2000:
                got = 0
                while got < read_bytes and (piece := connection.recv(500)):
                    got += len(piece)
            time.sleep(wait_s)
            if number % 2:  # a reset instead of a farewell
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(leave, range(80)))
    server.until_idle()


def test_many_streams_at_once_read_slowly(server: Serving) -> None:
    server.worker.pause_s = 0.001

    def read(number: int) -> str:
        path, body = STREAMS[number % 2]
        with httpx.stream(
            "POST", server.url + path, json={**body, "stream": True, "temperature": 0}, timeout=HANG_S
        ) as response:
            assert response.status_code == 200
            text = ""
            for piece in response.iter_text():
                text += piece
                if number % 5 == 0:
                    time.sleep(0.01)
        return text

    with ThreadPoolExecutor(60) as pool:
        texts = list(pool.map(read, range(60)))
    assert all(
        ("[DONE]" in text) or ("response.incomplete" in text) or ("response.completed" in text)
        for text in texts
    )
    server.until_idle()


def test_bodies_that_never_end(server: Serving) -> None:
    """Half a body keeps a connection, and nothing else."""
    held = []
    for path, body in STREAMS * 5:
        connection = socket.create_connection(("127.0.0.1", port_of(server)), timeout=HANG_S)
        connection.sendall(request(path, body)[:-3])
        held.append(connection)
    assert server.ask("meanwhile", n=3)["choices"][0]["message"]["content"] is not None
    assert not server.context.answers.open
    for connection in held:
        connection.close()


def test_chunked_bodies_are_counted(server: Serving) -> None:
    def pieces() -> Iterator[bytes]:
        yield b'{"input":"'
        for _ in range(40):
            yield b"x" * 65536
        yield b'"}'

    with httpx.Client(timeout=HANG_S) as client:
        try:
            answer = client.post(
                server.url + "/v1/responses", content=pieces(), headers={"Content-Type": "application/json"}
            )
        except (httpx.WriteError, httpx.ReadError):  # it hung up before everything was sent
            return
    assert answer.status_code == 413


GARBAGE = (
    b"\0" * 500,
    b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(range(256)),  # a TLS client
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET " + b"/" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nX" + b": y" * 40_000,
    b"POST /v1/responses HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 50\r\n\r\n{}",
    b"POST /v1/responses HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
    b"POST /v1/responses HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/responses HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\nGET /health HTTP/1.1\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n\r\n",
    b"GET http://elsewhere/../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    b"CONNECT elsewhere:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 200,
)


@pytest.mark.parametrize("sent", GARBAGE, ids=range(len(GARBAGE)))
def test_what_is_no_http(server: Serving, sent: bytes) -> None:
    answer = b""
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=HANG_S) as connection:
        try:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(1 << 16):
                answer += piece
        except (ConnectionResetError, BrokenPipeError):
            pass
    assert b"HTTP/1.1 5" not in answer and b"root:" not in answer, answer[:300]
    assert server.client.get("/health").status_code == 200


def test_random_bytes(server: Serving) -> None:
    rng = random.Random(2)
    whole = request(*STREAMS[0])
    for _ in range(60):
        sent = bytearray(whole)
        for _ in range(rng.randrange(1, 6)):
            sent[rng.randrange(len(sent))] = rng.randrange(256)
        with socket.create_connection(("127.0.0.1", port_of(server)), timeout=HANG_S) as connection:
            try:
                connection.sendall(bytes(sent))
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(1 << 16)
            except (ConnectionResetError, BrokenPipeError):
                continue
        assert not answer.startswith(b"HTTP/1.1 5"), (bytes(sent), answer)
    assert threading.active_count() < 200
