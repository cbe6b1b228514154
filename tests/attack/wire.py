"""HTTP by hand: requests that no client library would send, each with a deadline. Knows bytes and sockets; never what they mean."""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

CHUNK = 256 * 1024


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """As clients write it."""
        return f"http://{self.host}:{self.port}"

    def connect(self, timeout_s: float = 10.0) -> socket.socket:
        """A connection that nothing was sent on."""
        return socket.create_connection((self.host, self.port), timeout_s)


@dataclass
class Reply:
    """What came back for one request."""

    how: str  # answered, closed (without an answer), timeout, refused (no connection)
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)  # names in lower case
    body: bytes = b""
    seconds: float = 0.0
    sent: int = 0  # bytes

    @property
    def json(self) -> Any:
        """The body; None: it is no JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def code(self) -> str:
        """Of an error's body."""
        found = self.json
        return (
            str(found["error"].get("code"))
            if isinstance(found, dict) and isinstance(found.get("error"), dict)
            else ""
        )

    def __str__(self) -> str:
        told = f"{self.status} {self.code}".strip() if self.how == "answered" else self.how
        return f"{told} in {self.seconds:.2f} s"


def head(
    method: str,
    target: str,
    key: str | None = None,
    headers: Iterable[tuple[str, str]] = (),
    host: str | None = "localhost",
) -> bytes:
    """A request line and header lines, ended."""
    lines = [f"{method} {target} HTTP/1.1"]
    if host is not None:
        lines.append(f"Host: {host}")
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    lines += [f"{name}: {value}" for name, value in headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def send(address: Address, pieces: Iterable[bytes], timeout_s: float = 20.0, method: str = "POST") -> Reply:
    """Send bytes on a new connection until there is an answer, then read it."""
    begun_s = time.monotonic()
    sent = 0

    def reply(how: str, **keywords: Any) -> Reply:
        return Reply(how, seconds=time.monotonic() - begun_s, sent=sent, **keywords)

    try:
        connection = address.connect(min(timeout_s, 10.0))
    except OSError:
        return reply("refused")
    with connection:
        deadline = begun_s + timeout_s
        poll = select.poll()  # (select takes no number above 1,023)
        poll.register(connection, select.POLLIN | select.POLLOUT)
        try:
            for piece in pieces:
                view = memoryview(piece)
                while view:
                    left_s = deadline - time.monotonic()
                    if left_s <= 0:
                        return reply("timeout")
                    ready = sum(events for _, events in poll.poll(1000 * left_s))
                    if ready & ~select.POLLOUT:
                        break
                    if ready:
                        num_bytes = connection.send(view[:CHUNK])
                        sent += num_bytes
                        view = view[num_bytes:]
                if view:
                    break
        except OSError:
            pass  # it was closed; the answer may be there all the same
        try:
            return reply("answered", **read_answer(connection, method, deadline))
        except TimeoutError:
            return reply("timeout")
        except (OSError, http.client.HTTPException, ValueError):
            return reply("closed")


def read_answer(connection: socket.socket, method: str, deadline: float) -> dict[str, Any]:
    """Status, headers and body of the answer on a connection."""
    connection.settimeout(max(0.05, deadline - time.monotonic()))
    response = http.client.HTTPResponse(connection, method=method)
    try:
        response.begin()
        body = b""
        while piece := response.read(CHUNK):
            body += piece
            if time.monotonic() > deadline:
                raise TimeoutError
        return {
            "status": response.status,
            "headers": {name.lower(): value for name, value in response.getheaders()},
            "body": body,
        }
    finally:
        response.close()


def post(
    address: Address,
    path: str,
    body: Any,
    key: str | None = None,
    timeout_s: float = 20.0,
    method: str = "POST",
    **headers: str,
) -> Reply:
    """A whole request. `body`: bytes as they are, None: no body, anything else as JSON; a header's `_` is a hyphen."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    named = [(name.replace("_", "-"), value) for name, value in headers.items()]
    if data and not any(name.lower() == "content-type" for name, _ in named):
        named.append(("Content-Type", "application/json"))
    if data or method == "POST":
        named.append(("Content-Length", str(len(data))))
    return send(
        address, [head(method, path, key, [*named, ("Connection", "close")]), data], timeout_s, method
    )


def get(
    address: Address, path: str, key: str | None = None, timeout_s: float = 20.0, **headers: str
) -> Reply:
    """A GET."""
    return post(address, path, None, key, timeout_s, "GET", **headers)


def events(
    address: Address, path: str, body: Any, key: str | None, timeout_s: float, **headers: str
) -> Iterator[dict[str, Any]]:
    """A streamed answer's events, as JSON; first one of our own: `{"status": N}`. The connection closes with the iterator."""
    deadline = time.monotonic() + timeout_s
    connection = http.client.HTTPConnection(address.host, address.port, timeout=timeout_s)
    sent = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    with contextlib.closing(connection):
        connection.request(
            "POST",
            path,
            json.dumps(body),
            sent | {name.replace("_", "-"): value for name, value in headers.items()},
        )
        response = connection.getresponse()
        yield {"status": response.status}
        if response.status != 200:
            yield json.loads(response.read() or b"{}")
            return
        while line := response.readline():
            if time.monotonic() > deadline:
                raise TimeoutError
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])
