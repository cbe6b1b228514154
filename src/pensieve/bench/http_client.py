"""A small HTTP/1.1 client for streams, on asyncio's transports. Knows bytes, connections and statuses; never what a body means.

A load generator shares its machine with the server that it measures, so what it costs an event counts. Measured with 8 streams of
small events, JSON parsing included: httpx 91 to 116 µs of CPU an event (65 to 70 on uvloop), httpcore 90 (56), this 39 (13). What it leaves out:
redirects, proxies, compressed bodies, cookies and HTTP/2.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

from pensieve.bench.chat_stream import TurnFailed
from pensieve.errors import ConfigError

MAX_HEAD_BYTES = 1 << 16
MAX_ERROR_BYTES = 1 << 16  # of a refusal's body
KEEP_IDLE_S = 2.0  # a server may close a connection that idles; the usual limit is 5 s, and to lose that race fails a request
_USER_AGENT = "pensieve-bench"


class HttpBroken(Exception):
    """What came is no HTTP, or not all of it came."""


class ResponseReader:
    """Bytes of one response in, its body out, wherever the bytes are cut (RFC 9112)."""

    __slots__ = ("_buffer", "_chunked", "_left", "_place", "complete", "headers", "status")

    def __init__(self) -> None:
        self.status: int | None = None  # None: the head is not there yet
        self.headers: dict[str, str] = {}  # names in lower case
        self.complete = False
        self._buffer = b""
        self._place = "head"  # then "body", or "size", "chunk", "chunk end" and "trailer"
        self._chunked = False
        self._left: int | None = 0  # bytes of the body or chunk; None: to the connection's end

    @property
    def reusable(self) -> bool:
        """The connection can carry another exchange."""
        return (
            self.complete
            and self._left is not None
            and "close" not in self.headers.get("connection", "").lower()
            and not self._buffer
        )

    def feed(self, data: bytes) -> bytes:
        """The bytes of the body that are in it.

        Raises:
            HttpBroken: it is no HTTP.
        """
        self._buffer = self._buffer + data if self._buffer else data
        body = b""
        while not self.complete:
            match self._place:
                case "head":
                    more = self._head()
                case "body":
                    more, piece = self._take()
                    body = body + piece if body else piece
                case "size":
                    more = self._size()
                case "chunk":
                    more, piece = self._take()
                    body = body + piece if body else piece
                case "chunk end":
                    more = self._skip_line()
                case _:
                    more = self._trailer()
            if not more:
                break
        return body

    def finish(self) -> None:
        """The connection ended.

        Raises:
            HttpBroken: in the middle of the response.
        """
        if self.complete:
            return
        if self._place == "body" and self._left is None:
            self.complete = True
            return
        raise HttpBroken(
            "the connection ended in the middle of the answer"
            if self.status
            else "the connection ended before the answer"
        )

    def _head(self) -> bool:
        head, end, rest = self._buffer.partition(b"\r\n\r\n")
        if not end:
            if len(head) > MAX_HEAD_BYTES:
                raise HttpBroken(f"no end of the headers in {MAX_HEAD_BYTES} bytes")
            return False
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, words = first.partition(" ")
        if not version.startswith("HTTP/1.") or not words[:3].isdigit():
            raise HttpBroken(f"this is no HTTP/1.1 answer: {first[:80]!r}")
        self._buffer = rest
        status = int(words[:3])
        if 100 <= status < 200:
            return True  # "continue" and the like; the answer comes behind it
        self.status = status
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        if version == "HTTP/1.0":
            self.headers.setdefault("connection", "close")
        self._begin_body()
        return True

    def _begin_body(self) -> None:
        self._chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        if self._chunked:
            self._place = "size"
            return
        length = self.headers.get("content-length")
        if self.status in (204, 304):
            length = "0"
        if length is not None and not length.isdigit():
            raise HttpBroken(f"Content-Length is {length[:40]!r}")
        self._left = None if length is None else int(length)
        self._place = "body"
        self.complete = self._left == 0

    def _take(self) -> tuple[bool, bytes]:
        """What there is of the body or chunk, and whether that was its end."""
        if self._left is None:
            piece, self._buffer = self._buffer, b""
            return False, piece
        piece, self._buffer = self._buffer[: self._left], self._buffer[self._left :]
        self._left -= len(piece)
        if self._left:
            return False, piece
        if self._chunked:
            self._place = "chunk end"
        else:
            self.complete = True
        return True, piece

    def _size(self) -> bool:
        line, end, rest = self._buffer.partition(b"\r\n")
        if not end:
            return self._wait(line)
        try:
            self._left = int(line.split(b";")[0], 16)
        except ValueError:
            raise HttpBroken(f"a chunk's size is {line[:40]!r}") from None
        self._buffer = rest
        self._place = "chunk" if self._left else "trailer"
        return True

    def _skip_line(self) -> bool:
        line, end, rest = self._buffer.partition(b"\r\n")
        if not end:
            return self._wait(line)
        if line:
            raise HttpBroken("a chunk is longer than its size")
        self._buffer, self._place = rest, "size"
        return True

    def _trailer(self) -> bool:
        line, end, rest = self._buffer.partition(b"\r\n")
        if not end:
            return self._wait(line)
        self._buffer = rest
        self.complete = not line
        return True

    def _wait(self, line: bytes) -> bool:
        if len(line) > MAX_HEAD_BYTES:
            raise HttpBroken(f"no end of a line in {MAX_HEAD_BYTES} bytes")
        return False


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """What came back."""

    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes  # empty where the caller took it piece by piece


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time. The body is handed on inside the event loop's own call: no task wakes up for an event."""

    def __init__(self) -> None:
        self.closed = False
        self.idle_since_s = 0.0
        self.last_data_s = 0.0
        self.transport: asyncio.Transport | None = None
        self._reader = ResponseReader()
        self._done: asyncio.Future[HttpAnswer] | None = None
        self._on_body: Callable[[bytes], None] | None = None
        self._kept = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def begin(self, request: bytes, on_body: Callable[[bytes], None] | None) -> asyncio.Future[HttpAnswer]:
        """Send a request; `on_body` is given the body of a 200 as it comes."""
        assert self.transport is not None
        self._reader, self._on_body, self._kept = ResponseReader(), on_body, bytearray()
        self._done = asyncio.get_running_loop().create_future()
        self.last_data_s = time.perf_counter()
        self.transport.write(request)
        return self._done

    @property
    def reusable(self) -> bool:
        """It can carry another exchange."""
        return not self.closed and self._reader.reusable

    def close(self) -> None:
        self.closed = True
        if self._done is not None:
            self._done.cancel()  # (does nothing to one that has ended)
        if self.transport is not None:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        self.last_data_s = time.perf_counter()
        if self._done is None or self._done.done():
            self.close()  # nobody asked
            return
        try:
            body = self._reader.feed(data)
            if body:
                self._take(body)
        except Exception as error:  # ours and the callback's alike: the exchange fails, the loop goes on
            self._fail(error)
            return
        if self._reader.complete:
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._done is None or self._done.done():
            return
        try:
            self._reader.finish()
        except HttpBroken as error:
            self._fail(HttpBroken(f"{error} ({exc})") if exc else error)
            return
        self._end()

    def _take(self, body: bytes) -> None:
        if self._on_body is not None and self._reader.status == 200:
            self._on_body(body)
        elif self._reader.status == 200 or len(self._kept) < MAX_ERROR_BYTES:
            self._kept += body

    def _end(self) -> None:
        assert self._done is not None
        assert self._reader.status is not None
        self._done.set_result(HttpAnswer(self._reader.status, self._reader.headers, bytes(self._kept)))

    def _fail(self, error: Exception) -> None:
        assert self._done is not None
        if not self._done.done():
            self._done.set_exception(error)
        self.close()


class HttpClient:
    """Exchanges with one server, as many at once as there are callers. Sole owner of its connections."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        keep_connections: bool = True,
        connect_timeout_s: float = 10.0,
        read_timeout_s: float = 600.0,
    ) -> None:
        """Connect to nothing yet.

        Args:
            base_url: `http://host:port`, with or without a path.
            api_key: sent as a bearer token, never shown.
            keep_connections: use a connection again; False: a fresh one each time.
            connect_timeout_s: for a connection.
            read_timeout_s: for the next bytes of an answer.

        Raises:
            ConfigError: the URL is not one of HTTP.
        """
        wrong = f"the URL must look like http://host:port or http://host:port/v1, got {base_url!r}"
        try:
            parts = urlsplit(base_url.strip())
            port = parts.port
        except ValueError as error:
            raise ConfigError(wrong) from error
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.query
            or parts.fragment
            or "@" in parts.netloc
        ):
            raise ConfigError(wrong)
        if not base_url.isascii() or any(mark.isspace() for mark in base_url.strip()):
            raise ConfigError(wrong)
        if api_key is not None and (not api_key.isascii() or not api_key.isprintable()):
            raise ConfigError("the API key holds characters that cannot be sent in a header")
        self.url = base_url.strip().rstrip("/")
        self._host, self._port = parts.hostname, port or (443 if parts.scheme == "https" else 80)
        self._path = parts.path.rstrip("/")
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._keep = keep_connections
        self._connect_timeout_s, self._read_timeout_s = connect_timeout_s, read_timeout_s
        head = [f"Host: {parts.netloc}", f"User-Agent: {_USER_AGENT}", "Accept-Encoding: identity"]
        head += [f"Authorization: Bearer {api_key}"] if api_key else []
        head += [] if keep_connections else ["Connection: close"]
        self._head = "\r\n".join(head)
        self._idle: list[_Connection] = []

    async def get(self, path: str) -> HttpAnswer:
        """A whole answer. Raises as `post`."""
        return await self._exchange(
            f"GET {self._path}{path} HTTP/1.1\r\n{self._head}\r\n\r\n".encode("latin-1"), None
        )

    async def post(self, path: str, body: bytes, on_body: Callable[[bytes], None]) -> HttpAnswer:
        """Send JSON, and hand on the body of a 200 as it comes; any other status comes back with its body.

        Raises:
            TurnFailed: "unreachable", "timeout", "stream_broken", or whatever `on_body` raised.
        """
        head = f"POST {self._path}{path} HTTP/1.1\r\n{self._head}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return await self._exchange(head.encode("latin-1") + body, on_body)

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _exchange(self, request: bytes, on_body: Callable[[bytes], None] | None) -> HttpAnswer:
        connection = self._pick() or await self._connect()
        done = connection.begin(request, on_body)
        try:
            answer = await self._wait(connection, done)
        except HttpBroken as error:
            raise TurnFailed("stream_broken", str(error)) from error
        finally:
            if self._keep and done.done() and not done.cancelled() and connection.reusable:
                connection.idle_since_s = time.perf_counter()
                self._idle.append(connection)
            else:
                connection.close()
        return answer

    async def _wait(self, connection: _Connection, done: asyncio.Future[HttpAnswer]) -> HttpAnswer:
        """The answer, unless the server is silent for too long. Looked at now and then: a timer set anew for every event would cost more."""
        while True:
            silent_s = time.perf_counter() - connection.last_data_s
            if silent_s >= self._read_timeout_s:
                raise TurnFailed("timeout", f"the server was silent for {self._read_timeout_s:g} s")
            await asyncio.wait((done,), timeout=self._read_timeout_s - silent_s)
            if done.done():
                return done.result()

    def _pick(self) -> _Connection | None:
        """A connection that idles, the latest used; those that idled for long are closed."""
        oldest_s = time.perf_counter() - KEEP_IDLE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and connection.idle_since_s > oldest_s:
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection:
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    _Connection, self._host, self._port, ssl=self._ssl
                )
        except TimeoutError as error:
            raise TurnFailed(
                "unreachable", f"{self.url}: no connection in {self._connect_timeout_s:g} s"
            ) from error
        except (OSError, UnicodeError) as error:
            raise TurnFailed("unreachable", f"{self.url}: {error}") from error
        return connection
