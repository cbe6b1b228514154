"""What clients may send before there is a request, and how slowly: heads, bodies, connections that say
nothing.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from itertools import repeat
from typing import Any

import httpx
import pytest
from raw import Reply, connect, exchange, flood, read, until
from serving import Serving, serving

from pensieve.cli.loops import loop_factory
from pensieve.server.connections import LINGER_S, MAX_HEAD_BYTES, MAX_HEADERS, MAX_PIPELINED, ConnectionLimits
from pensieve.server.keys import key_line, new_key

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n"
CLOSE = b"Connection: close\r\n\r\n"
BODY = json.dumps(
    {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
).encode()
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def keyed(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[tuple[Serving, bytes]]:
    """A server with keys, and the header that names one; on each event loop, since closing and half-closing
    are the loop's.
    """
    factory = loop_factory() if request.param == "uvloop" else None
    path, key = tmp_path_factory.mktemp("keys") / "keys", new_key()
    path.write_text(key_line("alice", key) + "\n")
    with serving(keys=path, key=key, loop_factory=factory) as server:
        yield server, b"Authorization: Bearer " + key.encode() + b"\r\n"
        server.until_idle()


@pytest.fixture(scope="module")
def hasty() -> Iterator[Serving]:
    """A server that waits half a second for heads and bodies."""
    with serving(
        rules={"hosts": None},
        limits=ConnectionLimits(header_timeout_s=0.5, stall_timeout_s=1.0),
        loop_factory=loop_factory(),
    ) as server:
        yield server
        server.until_idle()


def is_refused(reply: Reply, status: int) -> str:
    assert reply.status == status and len(reply.statuses) == 1, reply.data[:300]
    assert b"connection: close" in reply.head
    return reply.message


# -- heads


@pytest.mark.parametrize(
    ("begin", "part"),
    [
        (HEALTH + b"X-A: ", b"a" * 4000),
        (HEALTH + b"X-", b"a" * 4000),
        (HEALTH + b"X-A:", b" " * 4000),
        (HEALTH, b"a: b\r\n" * 700),
        (HEALTH, b"Cookie: " + b"c" * 4000 + b"\r\n"),
        (b"GET /", b"a" * 4000),
        (b"GET /?", b"a=b&" * 1000),
        (b"GET /health", b" " * 4000),
        (HEALTH + b"X-A: a\r\n", b" folded" * 600 + b"\r\n"),
        (b"", b"\r\n" * 2000),
        (b"", b"G" * 4000),
        (b"", b"\0" * 4000),
        (b"", b"\x16\x03\x01\x02" + b"\xff" * 4000),  # TLS
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0" * 4000),
    ],
    ids=[
        "value",
        "name",
        "blanks",
        "many",
        "cookies",
        "target",
        "query",
        "line",
        "folds",
        "newlines",
        "method",
        "zeros",
        "tls",
        "http2",
    ],
)
def test_a_head_without_end_is_refused_at_once(
    keyed: tuple[Serving, bytes], begin: bytes, part: bytes
) -> None:
    server, _ = keyed
    reply, sent = flood(server, begin, repeat(part, 5000))
    assert reply.status in (400, 431), reply.data[:200]
    assert sent < 12 << 20  # what the sockets' buffers took, or was read while the client was told
    assert exchange(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + CLOSE).status == 200


def test_heads_may_have_so_many_bytes_and_no_more(keyed: tuple[Serving, bytes]) -> None:
    server, _ = keyed
    empty = len("/health") + len("Host") + 1 + 4 + len("Connection") + len("close") + 4 + len("X-A") + 4
    for value, status in ((MAX_HEAD_BYTES - empty, 200), (MAX_HEAD_BYTES - empty + 1, 431)):
        for step in (1 << 20, 1000):
            sent = HEALTH + b"X-A: " + b"a" * value + b"\r\n" + CLOSE
            reply = exchange(server, *(sent[at : at + step] for at in range(0, len(sent), step)))
            assert reply.status == status, (value, step, reply.data[:200])
    for number, status in ((MAX_HEADERS - 2, 200), (MAX_HEADERS - 1, 431)):
        assert exchange(server, HEALTH + b"a: b\r\n" * number + CLOSE).status == status


def test_one_byte_at_a_time_is_counted_too(keyed: tuple[Serving, bytes]) -> None:
    server, _ = keyed
    with connect(server) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in HEALTH + CLOSE:
            connection.sendall(bytes([byte]))
        assert read(connection).status == 200


def test_a_client_that_sends_on_can_read_why_it_was_refused(keyed: tuple[Serving, bytes]) -> None:
    server, key = keyed
    with connect(server) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        for _ in range(30):  # far more than the limit, before anything is read
            connection.sendall(b"X: " + b"a" * 10_000 + b"\r\n")
        assert "65536" in is_refused(read(connection), 431)
    with connect(server) as connection:
        large = 17 << 20
        connection.sendall(POST + key + b"Content-Length: %d\r\n\r\n" % large)
        connection.sendall(b" " * (1 << 20))
        assert "--max-body" in is_refused(read(connection), 413)
    with (
        pytest.raises(httpx.HTTPStatusError) as told,
        httpx.Client(timeout=10) as client,
    ):  # which reads only when it has sent
        client.post(
            server.url + "/v1/chat/completions",
            content=b" " * (15 << 20),
            headers={"Authorization": "Bearer no"},
        ).raise_for_status()
    assert told.value.response.status_code == 401


def test_extensions_and_trailers_without_end_are_refused(keyed: tuple[Serving, bytes]) -> None:
    server, key = keyed
    chunked = POST + key + b"Transfer-Encoding: chunked\r\n\r\n"
    whole = chunked + b"%x\r\n%s\r\n" % (len(BODY), BODY)
    for begin, part in (
        (chunked + b"5;", b"a" * 4000),
        (chunked + b"5;a=", b"b" * 4000),
        (whole + b"0\r\nX-A: ", b"a" * 4000),
        (whole + b"0\r\n", b"a: b\r\n" * 700),
        (chunked, b"0" * 4000),
    ):
        reply, sent = flood(server, begin, repeat(part, 5000))
        assert reply.status in (400, 431), (begin[-20:], reply.data[:200])
        assert sent < 12 << 20
    trailed = exchange(
        server,
        whole.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
        + b"0\r\nAuthorization: Bearer other\r\n\r\n",
    )
    assert trailed.status == 200  # trailers are no headers
    server.until_idle()


def test_chunked_bodies_of_small_chunks_are_bodies(keyed: tuple[Serving, bytes]) -> None:
    server, key = keyed
    chunks = b"".join(b"1;ext=%d\r\n%c\r\n" % (number, byte) for number, byte in enumerate(BODY))
    reply = exchange(
        server,
        POST + key + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + chunks + b"0\r\n\r\n",
    )
    assert reply.status == 200
    server.until_idle()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /health HTTP/1.0\r\n\r\n", 200),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n" + CLOSE, 200),
        (b"GET /health HTTP/1.1\r\n" + CLOSE, 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nHost: x\r\n" + CLOSE, 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nhost: evil.example\r\n" + CLOSE, 400),
        (b"GET http://x/health HTTP/1.1\r\nHost: x\r\n" + CLOSE, 200),
        (b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n" + CLOSE, 400),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n" + CLOSE, 400),
        (b"GET health HTTP/1.1\r\nHost: x\r\n" + CLOSE, 400),
        (
            b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n"
            + CLOSE,
            400,
        ),
        (b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n" + CLOSE, 400),
        (
            b"GET /health HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AA\r\n\r\n",
            200,
        ),
        (
            b"GET /health HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\r\n",
            400,
        ),
        (b"nonsense\r\n\r\n", 400),
    ],
)
def test_forms_of_requests(keyed: tuple[Serving, bytes], sent: bytes, status: int) -> None:
    server, _ = keyed
    reply = exchange(server, sent)
    assert reply.statuses == [status] and reply.closed, reply.data[:300]


def test_the_body_of_a_get_is_not_read(keyed: tuple[Serving, bytes]) -> None:
    server, key = keyed
    reply = exchange(
        server,
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nConnection: close\r\n"
        + key
        + b"\r\nabc",
    )
    assert reply.statuses == [200]


def test_the_host_of_an_absolute_target_counts() -> None:
    with serving() as server:
        for target, header, status in (
            (b"http://localhost:8000/health", b"evil.example", 200),
            (b"http://evil.example/health", b"localhost", 403),
            (b"/health", b"LocalHost.", 200),
            (b"/health", b"LOCALHOST:8000", 200),
            (b"/health", b"127.0.0.1", 200),
            (b"/health", b"localhost.evil.example", 403),
            (b"/health", b"", 403),
        ):
            reply = exchange(server, b"GET " + target + b" HTTP/1.1\r\nHost: " + header + b"\r\n" + CLOSE)
            assert reply.status == status, (target, header, reply.data[:200])


def test_pipelined_requests_are_answered_in_order_and_bounded(keyed: tuple[Serving, bytes]) -> None:
    server, _ = keyed
    few = exchange(server, (HEALTH + b"\r\n") * 3 + b"GET /nothing HTTP/1.1\r\nHost: x\r\n" + CLOSE)
    assert few.statuses == [200, 200, 200, 401]
    reply, _ = flood(server, b"", repeat((HEALTH + b"\r\n") * 100, 20_000))
    assert set(reply.statuses) <= {200}
    many = exchange(server, (HEALTH + b"\r\n") * 1000)
    assert set(many.statuses) == {200} and len(many.statuses) <= 2 * MAX_PIPELINED and many.closed


def test_half_a_head_right_behind_a_request_has_its_time(hasty: Serving) -> None:
    reply = exchange(hasty, HEALTH + b"\r\nGET /he", within_s=5.0)
    assert reply.statuses == [200, 408] and reply.closed


def test_a_malformed_request_behind_another_does_not_disturb_its_answer(keyed: tuple[Serving, bytes]) -> None:
    server, key = keyed
    for behind in (b"nonsense\r\n\r\n", HEALTH + b"X: " + b"a" * 100_000, b"GET /health HTTP/1.1\r\nHo"):
        server.worker.pause_s = 0.02
        reply = exchange(
            server, POST + key + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY + behind, within_s=2.0
        )
        server.worker.pause_s = 0.0
        assert (
            reply.statuses == [200]
            and json.loads(reply.data.rpartition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 2
        )
    server.until_idle()


def test_every_request_of_a_client_that_left_is_told(keyed: tuple[Serving, bytes]) -> None:
    server, key = keyed
    server.worker.pause_s = 0.02
    long = json.dumps(
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 300,
            "ignore_eos": True,
        }
    ).encode()
    with connect(server) as connection:
        connection.sendall(POST + key + b"Content-Length: %d\r\n\r\n" % len(long) + long + HEALTH + b"\r\n")
        until(lambda: server.context.answers.open)
    until(lambda: not server.context.answers.open, 3.0)  # aborted, though another request waited behind it
    server.worker.pause_s = 0.0
    server.until_idle()


# -- time


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", None),
        (b"G", 408),
        (HEALTH, 408),
        (POST + b"Content-Length: 1000\r\n\r\n", 408),
        (POST + b"Content-Length: 1000\r\n\r\n" + b"{" * 500, 408),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", 408),
        (POST + b"Expect: 100-continue\r\nContent-Length: 1000\r\n\r\n", 408),
    ],
    ids=["nothing", "a letter", "half a head", "no body", "half a body", "half a chunked body", "expecting"],
)
def test_what_does_not_go_on_is_closed(hasty: Serving, sent: bytes, status: int | None) -> None:
    reply = exchange(hasty, sent, within_s=5.0)
    statuses = [one for one in reply.statuses if one != 100]
    assert reply.closed and statuses == ([] if status is None else [status]), reply.data[:300]
    assert 0.3 < reply.seconds < 4


def test_a_client_that_leaves_within_its_body_is_no_failure_of_the_server(
    hasty: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    """A traceback a client took 2 ms of the event loop each; two hundred at once held it for 0.4 s."""

    def counted() -> float:
        name = 'pensieve_requests_total{endpoint="/v1/chat/completions",status="499"} '
        text = hasty.client.get("/metrics").text
        return sum(float(line.removeprefix(name)) for line in text.splitlines() if line.startswith(name))

    before = counted()  # earlier tests leave within their bodies too
    with connect(hasty) as connection:
        connection.sendall(POST + b"Content-Length: 1000\r\n\r\n{")
    exchange(hasty, POST + b"Content-Length: 1000\r\n\r\n{", within_s=5.0)
    until(lambda: counted() == before + 2)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_bytes_that_trickle_are_no_progress(hasty: Serving) -> None:
    for begin, drop in (
        (HEALTH + b"X-A: ", b"a"),
        (POST + b"Content-Length: 100000\r\n\r\n", b" "),
        (b"", b"\r\n"),
    ):
        with connect(hasty) as connection:
            connection.sendall(begin)
            begun_s = time.monotonic()
            try:
                while time.monotonic() - begun_s < 5:
                    connection.sendall(drop)
                    time.sleep(0.02)
                pytest.fail("it was never closed")
            except ConnectionError:
                pass


def test_a_body_that_comes_steadily_may_take_longer(hasty: Serving) -> None:
    padding = b" " * 30_000
    with connect(hasty) as connection:
        connection.sendall(
            POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % (len(BODY) + len(padding))
        )
        for at in range(0, len(padding), 2000):  # 20 kB a second, for a second and a half
            connection.sendall(padding[at : at + 2000])
            time.sleep(0.1)
        connection.sendall(BODY)
        assert read(connection).status == 200
    hasty.until_idle()


def test_idle_connections_live_on_after_an_answer(hasty: Serving) -> None:
    with connect(hasty) as connection:
        for _ in range(2):
            connection.sendall(HEALTH + b"\r\n")
            time.sleep(0.1)
            assert b" 200 " in connection.recv(1 << 16)
            time.sleep(0.8)  # longer than a head may take: it is kept alive


def test_an_answer_that_is_slow_is_not_the_client_s_fault(hasty: Serving) -> None:
    hasty.worker.pause_s = 0.6
    reply = exchange(hasty, POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY)
    hasty.worker.pause_s = 0.0
    assert reply.status == 200 and reply.seconds > 1
    hasty.until_idle()


def test_an_answer_that_is_not_read_is_cut_off(hasty: Serving) -> None:
    """The page's files need no key, and a client that asks for them and reads nothing would keep its
    connection.
    """
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        raw.connect(("127.0.0.1", int(hasty.url.rpartition(":")[2])))
        raw.settimeout(10)
        before = refused(hasty)
        try:
            for _ in range(400):
                raw.sendall((b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n") * 4)
                time.sleep(0.01)
        except (ConnectionError, TimeoutError):
            pass
        until(lambda: refused(hasty) > before)


def refused(server: Serving) -> float:
    """Connections refused so far, as the metrics tell."""
    lines = server.client.get("/metrics").text.splitlines()
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith("pensieve_connections_refused_total{")
    )


# -- many connections


def test_the_connection_that_waited_longest_goes_first(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), serving(limits=ConnectionLimits(max_connections=8)) as server:
        idle = [connect(server) for _ in range(30)]
        half = [connect(server) for _ in range(10)]
        for connection in half:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        for _ in range(5):
            assert exchange(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + CLOSE).status == 200
        assert read(idle[0], 2.0).status == 503 and read(idle[0], 2.0).closed
        half[-1].sendall(CLOSE)
        assert read(half[-1]).status in (200, 503)
        for connection in idle + half:
            connection.close()
        assert server.ask("still here")["usage"]["completion_tokens"] == 8
        server.until_idle()
        told = [record for record in caplog.records if "connections were refused" in record.message]
    assert len(told) == 1, "one line a minute, however many"
    assert "more than 8 connections" in told[0].message


def test_answers_under_way_are_not_cut_off_for_new_connections() -> None:
    with serving(limits=ConnectionLimits(max_connections=4)) as server:
        server.worker.pause_s = 0.02
        answers: list[dict[str, Any]] = []
        threads = [threading.Thread(target=lambda: answers.append(fresh(server))) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: len(server.context.answers.open) == 3)
        others = [connect(server) for _ in range(40)]
        for thread in threads:
            thread.join()
        assert [answer["usage"]["completion_tokens"] for answer in answers] == [20, 20, 20]
        for other in others:
            other.close()
        server.worker.pause_s = 0.0
        server.until_idle()


def fresh(server: Serving) -> dict[str, Any]:
    """A chat on a connection of its own."""
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 20,
        "ignore_eos": True,
    }
    answer: dict[str, Any] = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=30).json()
    return answer


def test_a_server_that_ends_waits_for_no_half_request() -> None:
    connections: list[socket.socket] = []
    try:
        with serving(rules={"hosts": None}) as server:
            for sent in (
                b"",
                b"GET",
                HEALTH,
                POST + b"Content-Length: 100\r\n\r\n{",
                POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
            ):
                for _ in range(20):
                    connections.append(connect(server))
                    connections[-1].sendall(sent)
            time.sleep(0.3)
            begun_s = time.monotonic()
        assert time.monotonic() - begun_s < 5  # (10 s are the server's patience for requests)
    finally:
        for connection in connections:
            connection.close()


def test_nothing_is_left_of_connections_that_are_gone(keyed: tuple[Serving, bytes]) -> None:
    server, key = keyed
    for sent in (
        b"",
        b"GET",
        POST + key + b"Content-Length: 100\r\n\r\n{",
        HEALTH + b"\r\n",
        b"nonsense\r\n\r\n",
    ):
        with connect(server) as connection:
            connection.sendall(sent)
            time.sleep(0.05)
    time.sleep(LINGER_S + 0.2)
    server.client.get("/health")
    until(lambda: len(server.connections.waiting) <= 1)  # (the test's own client)
