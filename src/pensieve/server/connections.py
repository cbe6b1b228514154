"""Connections: what a client may send and how long it may take, before there is a request.

Knows bytes, HTTP's framing and clocks; never routes or keys.

uvicorn's protocol over httptools has no limits: it keeps an endless header in memory, and a silent connection
for ever. Its protocol over h11 limits heads, but not time, and takes 150 us more of the event loop for each
request; counting here takes 20 us.

A connection is *waiting* while it has no complete request head. Each wait, each body and each answer has a
time limit. Beyond the limit of connections, the one that has waited longest is closed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from http import HTTPStatus
from typing import Any, NoReturn

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 << 10  # request line, headers and trailers of one request
MAX_HEADERS = 512  # headers of one request; each takes two objects
MAX_PIPELINED = 8  # requests of one connection that wait for the one before them
SLICE_BYTES = 16 << 10  # given to the parser at once, so that a head is refused close to its limit
BODY_BYTES_PER_S = 8 << 10  # a body that arrives more slowly is refused (64 kbit/s)
LINGER_S = 2.0  # how long a client that is still sending may read why it was refused
DISCARDED_BYTES = 1 << 20  # read from a refused client meanwhile
LOG_EVERY_S = 60.0


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits of one connection, and of all together."""

    header_timeout_s: float = 20.0  # to a complete head; a body must make progress within it too
    stall_timeout_s: float = 60.0  # a client that reads nothing for this long is disconnected
    max_connections: int = 1 << 20


class Phase(Enum):
    """The state of a connection's newest request."""

    IDLE = auto()  # no request
    HEAD = auto()  # its head is arriving
    BODY = auto()  # its body is arriving
    WHOLE = auto()  # complete, and being answered


@dataclass(slots=True)
class Connections:
    """All connections of one server. Used by the event loop only."""

    limits: ConnectionLimits
    # called with the reason for each connection that was refused or closed
    on_refused: Callable[[str], None] = lambda reason: None
    # connections without a complete head, the longest waiting first
    waiting: dict[LimitedProtocol, None] = field(default_factory=dict)
    _refused: Counter[str] = field(default_factory=Counter)
    _logged_s: float = -LOG_EVERY_S

    def protocol(self) -> type[LimitedProtocol]:
        """The class for `uvicorn.Config(http=…)`."""
        return type("_LimitedProtocol", (LimitedProtocol,), {"all": self})

    def make_room(self, num_open: int) -> None:
        """Close the connection that has waited longest if there are too many."""
        if num_open <= self.limits.max_connections:
            return
        oldest = next(iter(self.waiting), None)  # the newest one itself, if all others have a request
        if oldest is not None:
            oldest.evict()

    def refused(self, reason: str, *, quietly: bool = False) -> None:
        """Count a connection that was refused or closed; log the counts once a minute, except for those
        counted `quietly`.
        """
        self.on_refused(reason)
        if quietly:
            return
        self._refused[reason] += 1
        now_s = time.monotonic()
        if now_s - self._logged_s >= LOG_EVERY_S:
            told = ", ".join(f"{count} for {reason}" for reason, count in self._refused.items())
            log.warning(
                "connections were refused or closed before their requests were complete: %s "
                "(at most one such line a minute)",
                told,
            )
            self._refused.clear()
            self._logged_s = now_s


class _Refused(Exception):
    """Ends the parsing of a request that is refused."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        self.status, self.reason, self.message = status, reason, message


class _Transport:
    """A transport whose `close` lets a client that is still sending read its answer, which a reset would
    throw away.
    """

    def __init__(self, raw: asyncio.Transport, protocol: LimitedProtocol) -> None:
        self._raw = raw
        self._protocol = protocol
        self.write = raw.write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def is_closing(self) -> bool:
        return self._protocol.closing or self._raw.is_closing()

    def close(self) -> None:
        self._protocol.close_gently()


class LimitedProtocol(HttpToolsProtocol):
    """One connection. Owner of its phase, its time limit and the sizes of its newest request."""

    all: Connections  # set by `Connections.protocol`

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        self.closing = False
        self._raw = transport
        self._phase = Phase.IDLE
        self._deaf = False  # whether input is thrown away
        self._cycles: list[Any] = []  # unanswered requests, the newest last
        self._why: _Refused | None = None  # why the parsing ended
        self._head_bytes = self._num_headers = self._body_bytes = self._discarded_bytes = 0
        self._patient = True  # whether a client that still sends a refused body may go on reading
        self._loose_bytes = 0  # received since the parser last completed a head or a part of a body
        self._deadline_s: float | None = None  # loop time by which the newest request must make progress
        self._window_bytes = 0  # `_body_bytes` when the current time limit began
        self._unread_since_s: float | None = None  # loop time since which the client has not read
        self.access_log = False  # uvicorn's own contains the query, which may hold keys
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
        limits = self.all.limits
        self._look_s = min(limits.header_timeout_s, limits.stall_timeout_s)
        self._deadline_s = self.loop.time() + limits.header_timeout_s
        self._timer = self.loop.call_later(self._look_s, self._look)
        self.all.waiting[self] = None
        self.all.make_room(len(self.connections))

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self.closing = True
        self._timer.cancel()
        self.all.waiting.pop(self, None)
        self._unset_keepalive_if_required()
        for cycle in self._cycles:  # uvicorn tells only the newest
            if not cycle.response_complete:
                self._leave(cycle)
        self.pipeline.clear()
        super().connection_lost(exc)

    # -- input

    def data_received(self, data: bytes) -> None:
        """Bytes have arrived."""
        if self._deaf or self.closing:
            self._discard(len(data))
            return
        self._unset_keepalive_if_required()
        if self._deadline_s is None:
            self._deadline_s = self.loop.time() + self.all.limits.header_timeout_s
        for start in range(0, len(data), SLICE_BYTES):
            self._feed(data[start : start + SLICE_BYTES] if len(data) > SLICE_BYTES else data)
            if self._deaf or self.closing:
                return
        if self._phase is Phase.WHOLE and not self._loose_bytes:
            self._deadline_s = None

    def _feed(self, data: bytes) -> None:
        self._loose_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except (
            httptools.HttpParserUpgrade
        ):  # Upgrade is ignored, as a server may (RFC 9110, 7.8); the parser stops there
            self._stop_after(self.cycle)
        except httptools.HttpParserError:
            self._refuse(self._why or _Refused(400, "not HTTP", "this is not a valid HTTP request"))
        else:
            if self._loose_bytes > MAX_HEAD_BYTES:
                self._refuse(_too_large_head() if self._phase is not Phase.BODY else _too_large_framing())

    def on_message_begin(self) -> None:
        """A request begins, perhaps directly after another."""
        self._phase = Phase.HEAD
        self._deadline_s = self.loop.time() + self.all.limits.header_timeout_s
        self._head_bytes = self._num_headers = self._body_bytes = self._window_bytes = self._loose_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A part of the request's target."""
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; or a trailer, which is counted and ignored."""
        self._num_headers += 1
        self._count_head(len(name) + len(value) + 4)
        if self._num_headers > MAX_HEADERS:
            self._fail(_Refused(431, "too many headers", f"a request may have at most {MAX_HEADERS} headers"))
        if self._phase is Phase.HEAD:
            super().on_header(name, value)

    def _count_head(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            self._fail(_too_large_head())

    def _fail(self, why: _Refused) -> NoReturn:
        """End the parsing from within a callback; the parser hides the exception."""
        self._why = why
        raise why

    def on_headers_complete(self) -> None:
        """A request's head is complete: the application gets the request."""
        if len(self.pipeline) >= MAX_PIPELINED:
            self._fail(
                _Refused(
                    429,
                    "too many pipelined requests",
                    f"at most {MAX_PIPELINED} requests may wait for the one before them",
                )
            )
        if self.parser.should_upgrade() and any(
            name == b"upgrade" and value.strip().lower() == b"websocket" for name, value in self.headers
        ):
            self._fail(
                _Refused(
                    400,
                    "a WebSocket",
                    "there are no WebSockets here: answers are streamed as server-sent events",
                )
            )
        self._take_host_of_target()
        super().on_headers_complete()
        self._cycles = [cycle for cycle in self._cycles if not cycle.response_complete]
        self._cycles.append(self.cycle)
        self._phase = Phase.BODY
        self._loose_bytes = 0
        self._deadline_s = self.loop.time() + self.all.limits.header_timeout_s
        self.all.waiting.pop(self, None)

    def _take_host_of_target(self) -> None:
        """Of `GET http://host/path` the host counts, not the Host header (RFC 9112, 3.2.2)."""
        if self.url.startswith(b"/"):
            return
        target = httptools.parse_url(self.url)
        if target.host is None or target.path is None:
            self._fail(
                _Refused(400, "not HTTP", "a request's target must be a path, as /v1/models, or a whole URL")
            )
        host = target.host if b":" not in target.host else b"[" + target.host + b"]"
        host += b":%d" % target.port if target.port else b""
        self.headers[:] = [(name, value) for name, value in self.headers if name != b"host"] + [
            (b"host", host)
        ]

    def on_body(self, body: bytes) -> None:
        """A part of a request's body."""
        self._body_bytes += len(body)
        self._loose_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is complete."""
        self._phase = Phase.WHOLE
        self._loose_bytes = 0
        self._deadline_s = None
        super().on_message_complete()
        if self.cycle.response_complete:  # it was answered before its body arrived
            self._rest()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        """A request has been answered."""
        super().on_response_complete()
        if self._phase in (Phase.WHOLE, Phase.HEAD) and self.cycle.response_complete and not self.closing:
            self._rest()

    def _rest(self) -> None:
        self._cycles.clear()
        if self._phase is Phase.WHOLE:
            self._phase = Phase.IDLE
        self.all.waiting[self] = None

    # -- time limits

    def _look(self) -> None:
        """Check the time limits, and look again later."""
        now_s = self.loop.time()
        if (
            self._unread_since_s is not None
            and now_s - self._unread_since_s >= self.all.limits.stall_timeout_s
        ):
            self.all.refused("an answer that was not read")
            self._raw.abort()
            return
        if self._deadline_s is not None and now_s >= self._deadline_s and not self.closing:
            self._time_out(now_s)
        if self._raw.is_closing() and self._unread_since_s is None:
            self._unread_since_s = now_s  # output is still on its way, or the connection would be gone
        next_s = now_s + self._look_s if self._deadline_s is None else max(self._deadline_s, now_s + 0.01)
        self._timer = self.loop.call_at(min(next_s, now_s + self._look_s), self._look)

    def _time_out(self, now_s: float) -> None:
        limit_s = self.all.limits.header_timeout_s
        if self._phase is Phase.BODY:
            if self.flow.read_paused or self._body_bytes - self._window_bytes >= BODY_BYTES_PER_S * limit_s:
                self._deadline_s, self._window_bytes = now_s + limit_s, self._body_bytes
                return
            self._refuse(
                _Refused(
                    408,
                    "a body that did not come",
                    f"less than {BODY_BYTES_PER_S} bytes a second came of the request's body",
                )
            )
        elif self._phase is not Phase.HEAD and not self._answering():
            self.all.refused("silence", quietly=True)
            self._raw.close()
        else:
            message = f"the request's headers were not complete within {limit_s:g} s (--header-timeout)"
            self._refuse(_Refused(408, "headers that did not come", message))
        self._deadline_s = None

    def pause_writing(self) -> None:
        """The client reads more slowly than output is written."""
        super().pause_writing()
        self._unread_since_s = self.loop.time()

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        self._unread_since_s = None

    # -- ending

    def evict(self) -> None:
        """Make room for another connection: this one has waited longest for its request."""
        self.all.refused(f"more than {self.all.limits.max_connections} connections (open files, `ulimit -n`)")
        self.all.waiting.pop(self, None)
        if not self._answering():
            self._write_error(503, "there are too many connections: try again")
        self.closing = True
        self._raw.close()

    def shutdown(self) -> None:
        """The server shuts down: do not wait for incomplete requests."""
        if self.closing:
            self._raw.abort()
        elif self._phase is Phase.BODY and not self._behind_another():
            if not self.cycle.response_started:
                self._write_error(503, "the server is shutting down: try again in a moment")
            self._leave(self.cycle)
            self._raw.close()
        elif self._answering():
            self.cycle.keep_alive = False
        else:
            self._raw.close()

    def close_gently(self) -> None:
        """Close, but let a client that is still sending read its answer: a reset would throw that away."""
        if self.closing:
            return
        self.closing = True
        self.all.waiting.pop(self, None)
        unread = self._phase in (Phase.HEAD, Phase.BODY) or self._deaf or bool(self._loose_bytes)
        if not unread or not self._raw.can_write_eof() or self._raw.is_closing():
            self._raw.close()
            return
        self._raw.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_S, self._raw.abort)

    def _refuse(self, refused: _Refused) -> None:
        """Answer the newest request with an error, after those before it."""
        self.all.refused(refused.reason)
        self._deadline_s = None
        self._patient = False
        if self._phase is Phase.BODY:
            if self._behind_another():
                self.pipeline.popleft()
                self._cycles.pop()
                self._stop_after(self._cycles[-1])
                return
            self._leave(self.cycle)
            if self.cycle.response_started:
                self._raw.close()
                return
        elif self._answering():
            self._stop_after(self.cycle)
            return
        self._deaf = True
        self._write_error(refused.status, refused.message)
        self.close_gently()

    def _stop_after(self, cycle: Any) -> None:
        """Ignore further input; close after the answer to this request."""
        self._deaf = True
        self.cycle = cycle
        cycle.keep_alive = False
        if cycle.response_complete:
            self.close_gently()

    def _answering(self) -> bool:
        """Whether a complete request is being answered, so that no other output may be written."""
        return self.cycle is not None and not self.cycle.response_complete

    def _behind_another(self) -> bool:
        """Whether the newest request waits for the answer to the one before it."""
        return bool(self.pipeline) and self.pipeline[0][0] is self.cycle

    def _leave(self, cycle: Any) -> None:
        """Tell a request's application that its client has gone."""
        cycle.disconnected = True
        cycle.message_event.set()

    def _discard(self, num_bytes: int) -> None:
        self._discarded_bytes += num_bytes
        if self._discarded_bytes <= DISCARDED_BYTES:
            return
        if self._patient and self.closing:
            self.flow.pause_reading()  # until `LINGER_S` are over
        else:
            self._raw.abort()

    def _write_error(self, status: int, message: str) -> None:
        kind = (
            "server_error"
            if status >= 500
            else "rate_limit_error"
            if status == 429
            else "invalid_request_error"
        )
        code = HTTPStatus(status).phrase.lower().replace(" ", "_")
        body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()
        retry = b"retry-after: 1\r\n" if status in (429, 503) else b""
        self._raw.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
            b"%sconnection: close\r\n\r\n%s"
            % (status, HTTPStatus(status).phrase.encode(), len(body), retry, body)
        )


def _too_large_head() -> _Refused:
    return _Refused(
        431,
        "headers that are too large",
        f"a request's target and headers may have {MAX_HEAD_BYTES} bytes together",
    )


def _too_large_framing() -> _Refused:
    return _Refused(
        431,
        "headers that are too large",
        f"extensions and trailers of a chunked body may have {MAX_HEAD_BYTES} bytes together",
    )
