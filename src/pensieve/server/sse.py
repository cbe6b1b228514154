"""Server-sent events, and detection of clients that disconnect. Knows ASGI; never what the events mean."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pensieve.errors import PensieveError
from pensieve.server.errors import error_body

log = logging.getLogger(__name__)

T = TypeVar("T")
STREAMED: dict[int | str, dict[str, Any]] = {  # for the API's description
    200: {"content": {"text/event-stream": {}}, "description": "The answer; as events with `stream`"}
}
PING_S = 15.0  # a comment is sent this often, so that no proxy takes the connection for dead
PING = b": still here\n\n"
TURN_EVENTS = 16  # after this many events, other requests get the event loop
DONE = b"data: [DONE]\n\n"


def data(value: Any) -> bytes:
    """An event without a name."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def event(name: str, value: Any) -> bytes:
    """An event with a name."""
    return b"event: " + name.encode() + b"\n" + data(value)


def event_of(name: str, written: bytes) -> bytes:
    """An event with a name, from encoded JSON."""
    return b"event: " + name.encode() + b"\ndata: " + written + b"\n\n"


class EventStream(Response):
    """A response that sends events as they come, no faster than its client reads.

    Args:
        events: whole events as bytes. An exception becomes the last event, an error.
        on_gone: called if the client disconnects, or reads nothing for `stall_timeout_s`, before the end.
        stall_timeout_s: how long sending one event may take.
        on_open: called with +1 at the start and -1 at the end.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        on_gone: Callable[[], None],
        stall_timeout_s: float,
        on_open: Callable[[int], None] = lambda change: None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        self._events = events
        self._on_gone = on_gone
        self._stall_timeout_s = stall_timeout_s
        self._on_open = on_open
        self._num_sent = 0
        self._sending_since_s: float | None = None  # loop clock; None if no event is being sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, or stop when the client has disconnected."""
        self._on_open(+1)
        sender = asyncio.ensure_future(self._send_all(send))
        watcher = asyncio.ensure_future(_wait_gone(receive))
        minder = asyncio.ensure_future(self._mind(send, sender))
        try:
            await asyncio.wait({sender, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not sender.done():
                self._on_gone()
        finally:
            for task in (watcher, minder, sender):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await sender
            self._on_open(-1)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for piece in self._all_events():
                await self._send(send, piece)
            await self._send(send, b"", more=False)
        except OSError:
            self._on_gone()

    async def _all_events(self) -> AsyncIterator[bytes]:
        try:
            async for piece in self._events:
                yield piece
        except Exception as error:
            if not isinstance(error, PensieveError):
                log.exception("a stream broke")
            yield data(error_body(error))

    async def _send(self, send: Send, piece: bytes, *, more: bool = True) -> None:
        self._sending_since_s = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": piece, "more_body": more})
        self._sending_since_s = None
        self._num_sent += 1
        if self._num_sent % TURN_EVENTS == 0:  # a stream that is read again has all its events at once
            await asyncio.sleep(0)

    async def _mind(self, send: Send, sender: asyncio.Future[None]) -> None:
        """Give up if sending an event takes too long; send a comment if no event was sent for `PING_S`.

        One task that looks now and then: a timer for each event took a sixth of an event's cost. Each event
        is sent in one piece, so a comment never lands within one.
        """
        loop = asyncio.get_running_loop()
        look_s = min(PING_S, self._stall_timeout_s / 4)
        num_sent, quiet_since_s = self._num_sent, loop.time()
        try:
            while True:
                await asyncio.sleep(look_s)
                now_s = loop.time()
                if self._sending_since_s is not None:
                    if now_s - self._sending_since_s > self._stall_timeout_s:
                        raise TimeoutError
                elif self._num_sent != num_sent:
                    num_sent, quiet_since_s = self._num_sent, now_s
                elif now_s - quiet_since_s >= PING_S:
                    quiet_since_s = now_s
                    async with asyncio.timeout(self._stall_timeout_s):
                        await send({"type": "http.response.body", "body": PING, "more_body": True})
        except (TimeoutError, OSError):
            self._on_gone()
            sender.cancel()


async def unless_gone(request: Request, work: Awaitable[T], on_gone: Callable[[], None]) -> T:
    """Wait for `work`.

    If the client disconnects first, call `on_gone` once and go on waiting for the work to end.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_wait_gone(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            on_gone()
        return await task
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()


async def _wait_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
