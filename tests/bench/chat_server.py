"""A small server that speaks chat completions, well and badly, for the tests of those who ask it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WAIT_S = 30.0
Reply = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


class Server(ThreadingHTTPServer):
    """Answers completions with `reply`, keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply: Reply = say("hello", "!")
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        body = json.dumps({"object": "list", "data": [{"id": "tiny"}]}).encode()
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.headers.append(dict(self.headers))
        self.server.reply(self, body)


def stream(handler: BaseHTTPRequestHandler, *lines: str) -> None:
    """Send raw lines of an event stream; the connection closes at its end."""
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.end_headers()
    handler.wfile.write("".join(line + "\n" for line in lines).encode())


def chunk(content: str | None = None, finish: str | None = None) -> str:
    delta = {} if content is None else {"content": content}
    return "data: " + json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def usage(prompt: int, output: int, cached: int | None = None) -> str:
    body: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": output}
    if cached is not None:
        body["prompt_tokens_details"] = {"cached_tokens": cached}
    return "data: " + json.dumps({"choices": [], "usage": body})


def say(*pieces: str, tail: tuple[str, ...] = ()) -> Reply:
    """A whole and healthy answer."""
    lines = [": keep-alive", "", chunk(""), ""]
    for piece in pieces:
        lines += [chunk(piece), ""]
    lines += [chunk(None, "stop"), "", *tail, "", "data: [DONE]", ""]
    return lambda handler, _body: stream(handler, *lines)


def refuse(status: int, body: bytes) -> Reply:
    def reply(handler: BaseHTTPRequestHandler, _body: dict[str, Any]) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return reply


class Model:
    """A reply that counts: two tokens a word, ten for the template; it remembers what it was sent, and stops by itself after three tokens.

    `refuses` are fields that it refuses by name, `ignores` fields that it takes and does not heed; `before` may answer the measured requests
    (those for `measured_tokens`) in another way.
    """

    TEMPLATE, NATURAL = 10, 3

    def __init__(
        self, *, refuses: tuple[str, ...] = (), ignores: tuple[str, ...] = (), counts: bool = True
    ) -> None:
        self.refuses, self.ignores, self.counts = refuses, ignores, counts
        self.before: Callable[[int, dict[str, Any]], Reply | None] = lambda index, body: None
        self.measured: list[dict[str, Any]] = []  # requests for answers of `measured_tokens`
        self.measured_tokens = 0
        self._lock = threading.Lock()
        self._seen: dict[str, int] = {}

    def __call__(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        for name in self.refuses:
            if name in body:
                refuse(
                    422, json.dumps({"detail": f"Unexpected fields in the request: {{'{name}'}}"}).encode()
                )(handler, body)
                return
        if body["max_tokens"] == self.measured_tokens:
            with self._lock:
                self.measured.append(body)
                index = len(self.measured) - 1
            if (other := self.before(index, body)) is not None:
                other(handler, body)
                return
        heeded = {name for name in ("ignore_eos", "min_tokens", "generation_config") if name in body} - set(
            self.ignores
        )
        output = body["max_tokens"] if heeded else min(self.NATURAL, body["max_tokens"])
        self.answer(handler, body, output)

    def answer(
        self, handler: BaseHTTPRequestHandler, body: dict[str, Any], output: int, *, with_usage: bool = True
    ) -> None:
        """An answer of `output` tokens, three to a piece."""
        prompt = self.prompt_tokens(body["messages"])
        lines = [chunk(""), ""]
        words = [f"w{position} " for position in range(output)]
        for start in range(0, output, 3):
            lines += [chunk("".join(words[start : start + 3])), ""]
        lines += [chunk(None, "length"), ""]
        cached = max(
            (self._seen[key] for key in self._keys(body["messages"])[:-1] if key in self._seen), default=0
        )
        self._seen[self._keys([*body["messages"], {"role": "assistant", "content": "".join(words)}])[-1]] = (
            prompt + output
        )
        if self.counts and with_usage and "stream_options" in body:
            lines += [usage(prompt, output, cached=cached), ""]
        stream(handler, *lines, "data: [DONE]", "")

    def prompt_tokens(self, messages: list[dict[str, str]]) -> int:
        return self.TEMPLATE + 2 * sum(len(message["content"].split()) for message in messages)

    def _keys(self, messages: list[dict[str, str]]) -> list[str]:
        return [json.dumps(messages[: length + 1]) for length in range(len(messages))]


@contextmanager
def chat_server() -> Iterator[Server]:
    """A running one."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
