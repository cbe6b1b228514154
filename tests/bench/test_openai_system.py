"""A server of chat completions as a chat system, against a small one that speaks its protocol, well and badly."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from chat_server import WAIT_S, Reply, Server, chat_server, chunk, refuse, say, stream, usage

from pensieve.bench.openai_system import OpenAISystem
from pensieve.bench.systems import TurnRequest
from pensieve.errors import ConfigError, ModelUnavailable


def turn(index: int, text: str = "hi", **changes: Any) -> TurnRequest:
    system_text = changes.pop("system_text", None)
    return TurnRequest(
        "c",
        index,
        text,
        None,
        None,
        8,
        changes.pop("fixed_length", False),
        system_text=system_text,
        **changes,
    )


@pytest.fixture
def server() -> Iterator[Server]:
    with chat_server() as server:
        yield server


@pytest.fixture
def system(server: Server) -> Iterator[OpenAISystem]:
    system = OpenAISystem(server.url, api_key="secret", read_timeout_s=WAIT_S)
    yield system
    system.close()


def test_a_turn_is_streamed_and_timed(server: Server, system: OpenAISystem) -> None:
    result = system.start_turn(turn(0, system_text="Be brief.")).result(WAIT_S)
    assert (result.ok, result.text, result.finish_reason, result.num_output) == (True, "hello!", "stop", 2)
    assert result.first_token_s is not None
    assert 0 < result.first_token_s <= result.total_s
    assert result.receipt is None, "the server reported nothing"
    (asked,) = server.asked
    assert asked["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]
    assert (asked["model"], asked["max_tokens"], asked["temperature"], asked["stream"]) == (
        "tiny",
        8,
        0,
        True,
    )
    assert "ignore_eos" not in asked
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_history_is_sent_again_and_forgotten_at_the_end(server: Server, system: OpenAISystem) -> None:
    system.start_turn(turn(0, "one")).result(WAIT_S)
    system.start_turn(turn(1, "two")).result(WAIT_S)
    system.end_conversation("c")
    system.end_conversation("never seen")
    system.start_turn(turn(0, "three")).result(WAIT_S)
    roles = [[message["content"] for message in asked["messages"]] for asked in server.asked]
    assert roles == [["one"], ["one", "hello!", "two"], ["three"]]


def test_a_replay_puts_the_first_runs_answer_into_the_history(server: Server, system: OpenAISystem) -> None:
    system.start_turn(turn(0, "one", forced_answer=None)).result(WAIT_S)
    system.start_turn(turn(1, "two", forced_answer="what was said")).result(WAIT_S)
    assert [message["content"] for message in server.asked[1]["messages"]] == ["one", "what was said", "two"]


def test_cached_tokens_become_a_receipt(server: Server, system: OpenAISystem) -> None:
    server.reply = say("a", tail=(usage(50, 10, cached=0),))
    first = system.start_turn(turn(0)).result(WAIT_S)
    assert first.receipt is not None
    assert (first.receipt.gpu_tokens, first.receipt.recomputed_tokens, first.receipt.new_tokens) == (0, 0, 50)
    server.reply = say("b", tail=(usage(80, 7, cached=48),))
    second = system.start_turn(turn(1)).result(WAIT_S)
    assert second.receipt is not None
    assert (second.receipt.gpu_tokens, second.receipt.recomputed_tokens, second.receipt.new_tokens) == (
        48,
        12,
        20,
    )
    assert second.num_output == 7


def test_usage_without_the_cache_details_counts_tokens_only(server: Server, system: OpenAISystem) -> None:
    server.reply = say("a b c", tail=(usage(50, 3),))
    result = system.start_turn(turn(0)).result(WAIT_S)
    assert (result.num_output, result.receipt) == (3, None)


def test_fixed_length_asks_the_server_to_go_on(server: Server, system: OpenAISystem) -> None:
    system.start_turn(turn(0, fixed_length=True)).result(WAIT_S)
    assert (server.asked[0]["ignore_eos"], server.asked[0]["min_tokens"]) == (True, 8)


def test_an_event_of_several_lines_and_a_missing_last_blank_line(
    server: Server, system: OpenAISystem
) -> None:
    server.reply = lambda handler, _body: stream(
        handler, 'data: {"choices": [{"delta":', 'data:{"content": "x"}, "finish_reason": "length"}]}'
    )
    result = system.start_turn(turn(0)).result(WAIT_S)
    assert (result.text, result.finish_reason) == ("x", "length")


@pytest.mark.parametrize(
    ("reply", "code", "words"),
    [
        (refuse(500, b"boom"), "http_500", "HTTP 500: boom"),
        (
            refuse(404, b'{"error": {"message": "no such model", "code": "model_not_found"}}'),
            "model_not_found",
            "no such model",
        ),
        (refuse(401, b'{"detail": "who are you?"}'), "http_401", "who are you"),
        (
            refuse(400, b'{"error": {"message": "too long", "code": "context_length_exceeded"}}'),
            "context_length_exceeded",
            "too long",
        ),
        (
            refuse(
                400,
                b'{"object": "error", "message": "This model\'s maximum context length is 2048 tokens.", "code": 400}',
            ),
            "context_length_exceeded",
            "2048",
        ),
        (refuse(200, b'{"choices": []}'), "stream_broken", "without a finish_reason"),
        (lambda h, _b: stream(h, chunk("par"), "", chunk("tial"), ""), "stream_broken", "after 2 pieces"),
        (lambda h, _b: stream(h, chunk("x"), "", "data: {oops", ""), "stream_broken", "not JSON"),
        (lambda h, _b: stream(h, "data: [1]", ""), "stream_broken", "not an object"),
        (
            lambda h, _b: stream(h, 'data: {"error": {"message": "out of memory", "code": 500}}', ""),
            "server_error",
            "out of memory",
        ),
        (lambda h, _b: stream(h, 'data: {"choices": [7]}', ""), "bad_answer", "AttributeError"),
    ],
)
def test_what_a_server_does_wrong_fails_the_turn(
    server: Server, system: OpenAISystem, reply: Reply, code: str, words: str
) -> None:
    server.reply = reply
    result = system.start_turn(turn(0)).result(WAIT_S)
    assert (result.ok, result.error_code) == (False, code)
    assert words in (result.error or "")
    assert result.finish_reason is None


def test_a_connection_cut_in_the_middle_keeps_the_text_so_far(server: Server, system: OpenAISystem) -> None:
    def cut(handler: BaseHTTPRequestHandler, _body: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        handler.wfile.write((chunk("half") + "\n\n").encode())
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)

    server.reply = cut
    result = system.start_turn(turn(0)).result(WAIT_S)
    assert (result.error_code, result.text) == ("stream_broken", "half")


def test_a_failed_turn_is_not_part_of_the_history(server: Server, system: OpenAISystem) -> None:
    system.start_turn(turn(0, "one")).result(WAIT_S)
    server.reply = refuse(503, b"busy")
    assert system.start_turn(turn(1, "lost")).result(WAIT_S).error_code == "http_503"
    server.reply = say("back")
    system.start_turn(turn(1, "two")).result(WAIT_S)
    assert [message["content"] for message in server.asked[2]["messages"]] == ["one", "hello!", "two"]


def test_a_silent_server_times_out(server: Server) -> None:
    release = threading.Event()

    def reply(_handler: BaseHTTPRequestHandler, _body: dict[str, Any]) -> None:
        release.wait(WAIT_S)

    server.reply = reply
    system = OpenAISystem(server.url, "tiny", read_timeout_s=0.05)
    try:
        assert system.start_turn(turn(0)).result(WAIT_S).error_code == "timeout"
    finally:
        release.set()
        system.close()


def test_a_server_that_is_gone(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    system = OpenAISystem(url, "tiny")
    assert system.start_turn(turn(0)).result(WAIT_S).error_code == "unreachable"
    system.close()
    with pytest.raises(ModelUnavailable, match="does not name a model"):
        OpenAISystem(url)


def test_closing_fails_what_is_under_way_and_is_safe_twice(server: Server) -> None:
    release = threading.Event()
    started = threading.Event()

    def hold(handler: BaseHTTPRequestHandler, _body: dict[str, Any]) -> None:
        started.set()
        release.wait(WAIT_S)
        stream(handler, "data: [DONE]")

    server.reply = hold
    system = OpenAISystem(server.url, "tiny")
    future = system.start_turn(turn(0))
    assert started.wait(WAIT_S)
    system.close()  # the server is still silent
    system.close()
    assert future.result(0).error_code == "cancelled"
    assert system.start_turn(turn(0)).result(0).error_code == "cancelled"
    release.set()


def test_tokens_cannot_be_sent(system: OpenAISystem) -> None:
    result = system.start_turn(TurnRequest("c", 0, None, (1, 2), None, 8, False)).result(WAIT_S)
    assert result.error_code == "invalid_request"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host/?q=1", ""])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match="must look like http://host:port"):
        OpenAISystem(url, "tiny")


def test_v1_is_added_once(server: Server) -> None:
    for url in (server.url, server.url + "/v1", server.url + "/v1/"):
        system = OpenAISystem(url)
        assert system.model == "tiny"
        system.close()
