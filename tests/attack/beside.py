"""What runs beside an attack: probes of /health, a bystander who chats, and the machine's own noise. A process of its own, so that the
attacker's work does not delay the measuring; asked by a line on standard input, it answers with a line of JSON about the time since the last.

    python tests/attack/beside.py HOST PORT KEY     (KEY `-`: none)

Knows the standard library only.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from typing import Any

PROBE_S = 0.05  # between two probes of a kind
GIVE_UP_S = 60.0  # one probe or chat
NUM_TOKENS = 16
PROMPTS = (
    "Tell me about the sea.",
    "Name three fruits.",
    "What is a cache good for?",
    "How does one bake bread?",
)


class Window:
    """What was seen since the last look."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[str, float] = {}  # what began, and when
        self._reset()

    def _reset(self) -> None:
        self._worst: dict[str, float] = {}
        self._count: dict[str, int] = {}
        self._errors: dict[str, list[str]] = {}

    def begin(self, kind: str) -> None:
        with self._lock:
            self._under_way[kind] = time.monotonic()

    def end(self, kind: str, error: str | None = None) -> None:
        with self._lock:
            self._see(kind, time.monotonic() - self._under_way.pop(kind))
            if error is None:
                self._count[kind] = self._count.get(kind, 0) + 1
            else:
                self._errors.setdefault(kind, []).append(error)

    def see(self, kind: str, seconds: float) -> None:
        with self._lock:
            self._see(kind, seconds)

    def _see(self, kind: str, seconds: float) -> None:
        self._worst[kind] = max(self._worst.get(kind, 0.0), seconds)

    def take(self) -> dict[str, Any]:
        with self._lock:
            now_s = time.monotonic()
            for kind, begun_s in self._under_way.items():
                self._see(kind, now_s - begun_s)
            seen = {"worst": self._worst, "count": self._count, "errors": self._errors}
            self._reset()
            return seen


def probe(window: Window, host: str, port: int, kept: bool) -> None:
    """Ask /health again and again, on one connection or on a new one each time."""
    kind = "kept" if kept else "fresh"
    connection: socket.socket | None = None
    request = f"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: {'keep-alive' if kept else 'close'}\r\n\r\n".encode()
    while True:
        begun_s = time.monotonic()
        window.begin(kind)
        error = None
        try:
            if connection is None:
                connection = socket.create_connection((host, port), GIVE_UP_S)
            connection.sendall(request)
            answer = b""
            while b'"ok"}' not in answer:
                if not (piece := connection.recv(4096)):
                    raise ConnectionError("closed")
                answer += piece
        except OSError as caught:
            error = f"{type(caught).__name__}: {caught}"
        window.end(kind, error)
        if connection is not None and (error or not kept):
            connection.close()
            connection = None
        time.sleep(max(0.0, PROBE_S - (time.monotonic() - begun_s)))


def chat(host: str, port: int, key: str, prompt: str, window: Window | None = None) -> str:
    """A streamed chat's text. Raises: OSError, ValueError: it was not answered."""
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
    }
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {key}"} if key != "-" else {}
    )
    connection = http.client.HTTPConnection(host, port, timeout=GIVE_UP_S)
    with contextlib.closing(connection):
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body | {"stream": True, "ignore_eos": True}), headers
        )
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"{response.status} {response.read(300)!r}")
        text, ended, last_s = "", None, time.monotonic()
        while line := response.readline():
            if line.startswith(b"data: {"):
                if window is not None:
                    window.see("gap", time.monotonic() - last_s)
                last_s = time.monotonic()
                event = json.loads(line[6:])
                if "error" in event:
                    raise ValueError(f"within the stream: {event['error'].get('code')}")
                for choice in event["choices"]:
                    text += choice["delta"].get("content") or ""
                    ended = choice["finish_reason"] or ended
        if ended != "length":
            raise ValueError(f"a stream ended with {ended!r}, after {text!r}")
        return text


def chat_on(window: Window, host: str, port: int, key: str, right: dict[str, str]) -> None:
    """Ask the same things again and again; every answer is what it was before the attack."""
    turn = 0
    while True:
        prompt = PROMPTS[turn % len(PROMPTS)]
        turn += 1
        window.begin("chat")
        error = None
        try:
            text = chat(host, port, key, prompt, window)
            if text != right[prompt]:
                error = f"WRONG: {text!r} in place of {right[prompt]!r}"
        except (OSError, ValueError, http.client.HTTPException) as caught:
            error = f"{type(caught).__name__}: {caught}"
        window.end("chat", error)
        time.sleep(0.5 if error else 0.05)


def measure_noise(window: Window) -> None:
    """How much longer than asked a sleep takes: what this machine does to any process."""
    while True:
        begun_s = time.monotonic()
        time.sleep(0.01)
        window.see("noise", time.monotonic() - begun_s - 0.01)


def main() -> None:
    """Run until standard input ends."""
    host, port, key = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    right = {prompt: chat(host, port, key, prompt) for prompt in PROMPTS}
    window = Window()
    work: list[tuple[Any, tuple[Any, ...]]] = [(probe, (window, host, port, kept)) for kept in (False, True)]
    work += [(measure_noise, (window,)), (chat_on, (window, host, port, key, right))]
    for function, arguments in work:
        threading.Thread(target=function, args=arguments, daemon=True).start()
    print("{}", flush=True)
    for _ in sys.stdin:
        print(json.dumps(window.take()), flush=True)


class Beside:
    """The handle of such a process."""

    def __init__(self, host: str, port: int, key: str | None) -> None:
        command = [sys.executable, __file__, host, str(port), key or "-"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def look(self) -> dict[str, Any]:
        """What was seen since the last look."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the probes ended: the server did not answer them before the attack")
        return dict(json.loads(line))


if __name__ == "__main__":
    main()
