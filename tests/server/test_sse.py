"""Streams of events whose clients read, stop reading, or leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from pensieve.server import sse
from pensieve.server.sse import PING, EventStream

PATIENCE_S = 20.0  # far beyond anything here


class Client:
    """What is sent, until it stops reading (`send` never returns) or breaks (`send` raises)."""

    def __init__(
        self,
        stops: Callable[[bytes], bool] = lambda body: False,
        breaks: Callable[[bytes], bool] = lambda body: False,
    ) -> None:
        self.bodies: list[bytes] = []
        self.stops, self.breaks = stops, breaks
        self.left = asyncio.Event()

    async def send(self, message: Any) -> None:
        body = message.get("body", b"")
        if self.breaks(body):
            raise ConnectionResetError
        if self.stops(body):
            await asyncio.Event().wait()
        if message["type"] == "http.response.body":
            self.bodies.append(body)

    async def receive(self) -> dict[str, str]:
        await self.left.wait()
        return {"type": "http.disconnect"}


async def listen(
    client: Client, events: AsyncIterator[bytes], stall_timeout_s: float = PATIENCE_S
) -> list[str]:
    """Run a stream to its end. What its owner was told."""
    told: list[str] = []
    stream = EventStream(
        events,
        on_gone=lambda: told.append("gone"),
        stall_timeout_s=stall_timeout_s,
        on_open=lambda change: told.append(f"{change:+}"),
    )
    async with asyncio.timeout(PATIENCE_S):
        await stream({"type": "http"}, client.receive, client.send)
    return told


async def say(*pieces: bytes | Awaitable[object]) -> AsyncIterator[bytes]:
    for piece in pieces:
        if isinstance(piece, bytes):
            yield piece
        else:
            await piece


def test_events_go_out_one_by_one() -> None:
    async def story() -> None:
        client = Client()
        assert await listen(client, say(b"a", b"b")) == ["+1", "-1"]
        assert client.bodies == [b"a", b"b", b""]

    asyncio.run(story())


def test_a_quiet_stream_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_S", 0.02)

    async def story() -> None:
        client = Client()
        heard = asyncio.Event()

        async def until_pinged() -> None:
            while PING not in client.bodies:
                await asyncio.sleep(0.005)
            heard.set()

        assert await listen(client, say(b"a", until_pinged(), b"b")) == ["+1", "-1"]
        assert client.bodies[0] == b"a" and client.bodies[-2:] == [b"b", b""]
        assert heard.is_set()

    asyncio.run(story())


@pytest.mark.parametrize("what", [b"b", PING])
def test_a_client_that_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch, what: bytes) -> None:
    monkeypatch.setattr(sse, "PING_S", 0.02)

    async def story() -> None:
        client = Client(stops=lambda body: body == what)
        pieces = (b"a", b"b") if what == b"b" else (b"a", asyncio.Event().wait())
        assert await listen(client, say(*pieces), stall_timeout_s=0.05) == ["+1", "gone", "-1"]
        assert client.bodies == [b"a"]

    asyncio.run(story())


def test_a_client_that_breaks_off_is_noticed() -> None:
    async def story() -> None:
        client = Client(breaks=lambda body: body == b"b")
        assert await listen(client, say(b"a", b"b", b"c")) == ["+1", "gone", "-1"]

    asyncio.run(story())


def test_a_client_that_leaves_while_nothing_is_said_is_noticed() -> None:
    async def story() -> None:
        client = Client()
        asyncio.get_running_loop().call_later(0.02, client.left.set)
        assert await listen(client, say(b"a", asyncio.Event().wait())) == ["+1", "gone", "-1"]

    asyncio.run(story())


def test_an_error_of_the_events_own_is_told_even_if_it_is_one_of_input_and_output() -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"a"
        raise ConnectionResetError("the database went away")

    async def story() -> None:
        client = Client()
        assert await listen(client, broken()) == ["+1", "-1"]
        assert client.bodies[0] == b"a" and b'"error"' in client.bodies[1]

    asyncio.run(story())
