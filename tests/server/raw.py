"""Bytes to a server and back, as no HTTP client would send them."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from serving import Serving


@dataclass(frozen=True)
class Reply:
    """What came back until the server closed, or the time was up."""

    data: bytes
    seconds: float
    closed: bool

    @property
    def statuses(self) -> list[int]:
        """Of all answers in it, in their order."""
        return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) [A-Z]", self.data)]

    @property
    def status(self) -> int | None:
        return self.statuses[0] if self.statuses else None

    @property
    def message(self) -> str:
        """Of the error that the last answer is."""
        text: str = json.loads(self.data.rpartition(b"\r\n\r\n")[2])["error"]["message"]
        return text

    @property
    def head(self) -> bytes:
        return self.data.partition(b"\r\n\r\n")[0].lower()


def connect(server: Serving) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10)


def read(connection: socket.socket, within_s: float = 10.0) -> Reply:
    """Everything until the other side closes."""
    begun_s, data, closed = time.monotonic(), b"", False
    while (left_s := begun_s + within_s - time.monotonic()) > 0:
        connection.settimeout(left_s)
        try:
            piece = connection.recv(1 << 16)
        except TimeoutError:
            break
        except ConnectionError:
            closed = True
            break
        if not piece:
            closed = True
            break
        data += piece
    return Reply(data, time.monotonic() - begun_s, closed)


def exchange(server: Serving, *parts: bytes, within_s: float = 10.0) -> Reply:
    """Send, then read until the other side closes."""
    with connect(server) as connection:
        try:
            for part in parts:
                connection.sendall(part)
        except ConnectionError:  # refused before everything was sent
            pass
        return read(connection, within_s)


def flood(server: Serving, begin: bytes, parts: Iterable[bytes], within_s: float = 20.0) -> tuple[Reply, int]:
    """Send without end until the server refuses. Returns its answer and how many bytes it took."""
    sent = 0
    with connect(server) as connection:
        connection.settimeout(within_s)
        try:
            connection.sendall(begin)
            for part in parts:
                connection.sendall(part)
                sent += len(part)
        except (ConnectionError, TimeoutError):
            pass
        return read(connection), sent


def until(what: Callable[[], Any], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)
