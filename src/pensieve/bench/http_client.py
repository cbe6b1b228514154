"""A small HTTP/1.1 client for streams, on asyncio's transports. Knows bytes, connections and statuses; never
what a body means.

A load generator shares its machine with the server that it measures, so its CPU time per event counts.
Measured with 8 streams of small events, JSON parsing included: httpx 91 to 116 µs an event (65 to 70 on
uvloop), httpcore 90 (56), a client like this one 39 (13): the difference is that no task wakes up for an
event. It has no redirects, proxies, compressed bodies, cookies or HTTP/2.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools

from pensieve.bench.chat_stream import TurnFailed
from pensieve.errors import ConfigError

MAX_HEAD_BYTES = 1 << 16
MAX_ERROR_BYTES = 1 << 16  # of a refusal's body
# Servers close idle connections, usually after 5 s; a request sent at that moment would fail.
KEEP_IDLE_S = 2.0
_USER_AGENT = "pensieve-bench"


class HttpBroken(Exception):
    """The response is not HTTP, or is incomplete."""


class ResponseReader:
    """Bytes of one response in, its body out, wherever the bytes are cut. llhttp parses (through httptools)."""

    __slots__ = (
        "_body",
        "_head_bytes",
        "_kept_open",
        "_parser",
        "_to_the_end",
        "_trailing",
        "complete",
        "headers",
        "status",
    )

    def __init__(self) -> None:
        self.status: int | None = None  # None: the head is not complete
        self.headers: dict[str, str] = {}  # names in lower case
        self.complete = False
        self._parser = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._head_bytes = 0
        self._kept_open = False  # the server keeps the connection open
        self._to_the_end = False  # the body ends with the connection
        self._trailing = False  # bytes came after the end

    @property
    def reusable(self) -> bool:
        """The connection can carry another exchange."""
        return self.complete and self._kept_open and not self._to_the_end and not self._trailing

    def feed(self, data: bytes) -> bytes:
        """Parse; return the bytes of the body in `data`.

        Raises:
            HttpBroken: it is not HTTP.
        """
        if self.complete:
            self._trailing |= bool(data)
            return b""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if not self.complete:  # (an error behind the end is another message's)
                raise HttpBroken(f"this is not an HTTP/1.1 response: {error}") from error
            self._trailing = True
        if self.status is None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                raise HttpBroken(f"the headers are longer than {MAX_HEAD_BYTES} bytes")
        body = b"".join(self._body)
        self._body.clear()
        return body

    def finish(self) -> None:
        """The connection ended.

        Raises:
            HttpBroken: in the middle of the response.
        """
        if self.complete:
            return
        if self._to_the_end:
            self.complete = True
            return
        raise HttpBroken(
            "the connection ended in the middle of the response"
            if self.status
            else "the connection ended before the response"
        )

    # -- called by the parser

    def on_message_begin(self) -> None:
        self._trailing |= self.complete

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.complete:
            self.headers[name.decode("latin-1").lower()] = value.decode("latin-1").strip()

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self.complete or 100 <= status < 200:
            return  # "100 Continue" and the like: the response follows
        self.status = status
        framed = (
            "content-length" in self.headers or "chunked" in self.headers.get("transfer-encoding", "").lower()
        )
        self._kept_open = self._parser.should_keep_alive()
        self._to_the_end = not framed and status not in (204, 304)

    def on_body(self, body: bytes) -> None:
        if not self.complete:
            self._body.append(body)

    def on_message_complete(self) -> None:
        if self.status is None:
            self.headers.clear()  # of an interim response
        else:
            self.complete = True


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """A complete response."""

    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes  # empty if the caller took it piece by piece


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time. Passes the body on inside the event loop's own call: no task
    wakes up.
    """

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
        """Send a request; `on_body` gets the body of a 200 piece by piece."""
        assert self.transport is not None
        self._reader, self._on_body, self._kept = ResponseReader(), on_body, bytearray()
        self._done = asyncio.get_running_loop().create_future()
        self.last_data_s = time.perf_counter()
        self.transport.write(request)
        return self._done

    @property
    def reusable(self) -> bool:
        """The connection can carry another exchange."""
        return not self.closed and self._reader.reusable

    def close(self) -> None:
        self.closed = True
        if self._done is not None:
            self._done.cancel()  # (no effect on one that has ended)
        if self.transport is not None:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        self.last_data_s = time.perf_counter()
        if self._done is None or self._done.done():
            self.close()  # no request is open
            return
        try:
            body = self._reader.feed(data)
            if body:
                self._take(body)
        except Exception as error:  # the parser's and the callback's alike: only this exchange fails
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
        """A complete response. Raises as `post` does."""
        return await self._exchange(
            f"GET {self._path}{path} HTTP/1.1\r\n{self._head}\r\n\r\n".encode("latin-1"), None
        )

    async def post(self, path: str, body: bytes, on_body: Callable[[bytes], None]) -> HttpAnswer:
        """Send JSON; `on_body` gets the body of a 200 piece by piece. Any other status is returned with its
        body.

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
        """The response, unless the server is silent for too long. Polled: a timer reset for every event would
        cost more.
        """
        while True:
            silent_s = time.perf_counter() - connection.last_data_s
            if silent_s >= self._read_timeout_s:
                raise TurnFailed("timeout", f"the server was silent for {self._read_timeout_s:g} s")
            await asyncio.wait((done,), timeout=self._read_timeout_s - silent_s)
            if done.done():
                return done.result()

    def _pick(self) -> _Connection | None:
        """The idle connection that was used last, or None. Closes those that have been idle for too long."""
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
