"""HTTP as bytes: responses cut anywhere, broken ones, connections kept and not."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pensieve.bench.chat_stream import TurnFailed
from pensieve.bench.http_client import HttpAnswer, HttpBroken, HttpClient, ResponseReader
from pensieve.errors import ConfigError

T = TypeVar("T")
HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = (
    HEAD
    + b"Transfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n1\r\n \r\nA\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n"
)
LENGTH = b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"content-length: 16\r\n\r\nhello 0123456789"
TO_THE_END = HEAD + b"\r\nhello 0123456789"


def read(*pieces: bytes) -> tuple[ResponseReader, bytes]:
    reader = ResponseReader()
    return reader, b"".join(reader.feed(piece) for piece in pieces)


@pytest.mark.parametrize(("data", "reusable"), [(CHUNKED, True), (LENGTH, True), (TO_THE_END, False)])
@given(cuts=st.lists(st.integers(0, 150), max_size=8))
def test_a_body_does_not_depend_on_where_the_bytes_are_cut(
    data: bytes, reusable: bool, cuts: list[int]
) -> None:
    marks = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    reader, body = read(*(data[start:stop] for start, stop in itertools.pairwise(marks)))
    assert (reader.status, body, reader.complete) == (200, b"hello 0123456789", reusable)
    reader.finish()
    assert reader.complete and reader.reusable == reusable


@pytest.mark.parametrize("data", [CHUNKED, LENGTH])
@given(st.data())
def test_every_cut_short_answer_is_noticed(data: bytes, drawn: st.DataObject) -> None:
    reader, _ = read(data[: drawn.draw(st.integers(0, len(data) - 1))])
    with pytest.raises(HttpBroken):
        reader.finish()


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        HEAD + b"content-length: -4\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\nabc\r\n",
        b"x" * 70000,
    ],
)
def test_what_is_no_http(data: bytes) -> None:
    with pytest.raises(HttpBroken):
        read(data)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\ncontent-length: 0\r\n\r\n",
    ],
)
def test_a_connection_that_the_server_closes_is_not_used_again(head: bytes) -> None:
    reader, _ = read(head)
    assert reader.complete and not reader.reusable


class Peer:
    """A server whose every connection is answered by a function of the request's bytes."""

    def __init__(self, reply: Callable[[asyncio.StreamWriter], Awaitable[None]]) -> None:
        self.reply, self.connections, self.requests = reply, 0, list[bytes]()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (
                        int(line[15:])
                        for line in head.split(b"\r\n")
                        if line.lower().startswith(b"content-length:")
                    ),
                    0,
                )
                self.requests.append(head + await reader.readexactly(length))
                await self.reply(writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


def with_peer(peer: Peer, work: Callable[[str], Awaitable[T]]) -> T:
    async def all_of_it() -> T:
        server = await asyncio.start_server(peer.handle, "127.0.0.1", 0)
        try:
            return await work(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
        finally:
            server.close()

    return asyncio.run(asyncio.wait_for(all_of_it(), 30))


async def say(writer: asyncio.StreamWriter) -> None:
    writer.write(CHUNKED)


@pytest.mark.parametrize(("keep", "connections"), [(True, 1), (False, 3)])
def test_connections_are_used_again_or_not(keep: bool, connections: int) -> None:
    peer = Peer(say)

    async def work(url: str) -> list[bytes]:
        client = HttpClient(url, "secret", keep_connections=keep)
        bodies = []
        for _ in range(3):
            pieces: list[bytes] = []
            await client.post("/x", b'{"a": 1}', pieces.append)
            bodies.append(b"".join(pieces))
        client.close()
        return bodies

    assert with_peer(peer, work) == [b"hello 0123456789"] * 3
    assert peer.connections == connections
    assert peer.requests[0].startswith(b"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nAuthorization: Bearer secret\r\n" in peer.requests[0] and peer.requests[0].endswith(
        b'\r\n\r\n{"a": 1}'
    )


def test_a_refusal_comes_back_with_its_body_and_the_callback_sees_nothing() -> None:
    async def refuse(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 422 No\r\ncontent-length: 3\r\n\r\nbad")

    async def work(url: str) -> HttpAnswer:
        return await HttpClient(url).post("/x", b"{}", lambda data: pytest.fail("not a 200"))

    answer = with_peer(Peer(refuse), work)
    assert (answer.status, answer.body) == (422, b"bad")


async def cut(writer: asyncio.StreamWriter) -> None:
    writer.write(CHUNKED[:70])
    await writer.drain()
    writer.close()


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()


async def stay_silent(writer: asyncio.StreamWriter) -> None:
    pass


@pytest.mark.parametrize(
    ("reply", "code", "words"),
    [
        (cut, "stream_broken", "in the middle"),
        (hang_up, "stream_broken", "before the response"),
        (stay_silent, "timeout", "silent"),
    ],
)
def test_what_goes_wrong_has_a_code(
    reply: Callable[[asyncio.StreamWriter], Awaitable[None]], code: str, words: str
) -> None:
    async def work(url: str) -> TurnFailed:
        with pytest.raises(TurnFailed) as caught:
            await HttpClient(url, read_timeout_s=0.05).post("/x", b"{}", lambda data: None)
        return caught.value

    failure = with_peer(Peer(reply), work)
    assert failure.code == code and words in failure.message


def test_what_the_callback_raises_ends_the_exchange_and_its_connection() -> None:
    peer = Peer(say)

    def broken(data: bytes) -> None:
        raise TurnFailed("mine", "no more")

    async def work(url: str) -> None:
        client = HttpClient(url)
        with pytest.raises(TurnFailed, match="no more"):
            await client.post("/x", b"{}", broken)
        await client.post("/x", b"{}", lambda data: None)
        client.close()

    with_peer(peer, work)
    assert peer.connections == 2


def test_nobody_there() -> None:
    async def work(url: str) -> str:
        return url

    gone = with_peer(Peer(say), work)
    with pytest.raises(TurnFailed) as caught:
        asyncio.run(HttpClient(gone).get("/models"))
    assert caught.value.code == "unreachable"


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://host",
        "http://",
        "http://h/?q=1",
        "",
        "http://h:99999",
        "http://u:p@h",
        "http://h h",
        "http://h\r\nX: y",
    ],
)
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match="must look like"):
        HttpClient(url)


def test_a_key_that_is_no_header() -> None:
    with pytest.raises(ConfigError, match="header"):
        HttpClient("http://h", "a\r\nb")
