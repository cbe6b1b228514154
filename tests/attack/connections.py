"""Connections that are held: idle, half a head, half a body, a byte a second, answers that are not read. Knows sockets and time; no texts."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bodies import CHAT, RESPONSES
from promises import Notes, attack
from served import Served
from wire import get, head, post
from world import World

HEADER_TIMEOUT_S = 4
CLOSE_S = 10.0  # after the header's time is up
BODY = 15_900_000
STALL_S = 3


def held(server: Served, count: int, data: bytes = b"", connect_s: float = 3.0) -> list[socket.socket]:
    """Connections on which so much was sent and nothing more is."""
    connections: list[socket.socket] = []
    for _ in range(count):
        try:
            connection = server.address.connect(connect_s)
        except OSError:
            break
        connections.append(connection)
        if data:
            connection.setblocking(False)
            with contextlib.suppress(OSError):
                connection.send(data)
    return connections


@contextlib.contextmanager
def closing(connections: list[socket.socket]) -> Iterator[list[socket.socket]]:
    try:
        yield connections
    finally:
        for connection in connections:
            connection.close()


def closed(connections: list[socket.socket]) -> int:
    """How many the server has ended."""
    ended = 0
    poll = select.poll()
    by_number = {connection.fileno(): connection for connection in connections}
    for number in by_number:
        poll.register(number, select.POLLIN | select.POLLHUP | select.POLLERR)
    for number, _ in poll.poll(0):
        try:
            by_number[number].setblocking(False)
            while piece := by_number[number].recv(65536):  # an answer, 408 perhaps, and then the end
                del piece
            ended += 1
        except BlockingIOError:
            pass
        except OSError:
            ended += 1
    return ended


def until_closed(connections: list[socket.socket], timeout_s: float) -> tuple[int, float]:
    """How many were ended within so long, and after how long all of them."""
    begun_s = time.monotonic()
    gone = 0
    left = list(connections)
    while left and time.monotonic() - begun_s < timeout_s:
        time.sleep(0.2)
        still = [connection for connection in left if not closed([connection])]
        gone += len(left) - len(still)
        left = still
    return gone, time.monotonic() - begun_s


def timed(notes: Notes) -> list[str]:
    """`--header-timeout` of a few seconds."""
    return World.options(notes, ("--header-timeout", str(HEADER_TIMEOUT_S)))


@attack("connection/idle-1000")
def idle(world: World, notes: Notes) -> None:
    """1,000 idle connections under `ulimit -n 1024` neither keep others out nor stay for ever."""
    with (
        world.server(*timed(notes), tenants=("bystander", "bob")) as server,
        world.watched(server, notes),
        closing(held(server, 1000)) as connections,
    ):
        answered = [world.chat(server.address, server.keys["bob"], f"{i}", timeout_s=8.0) for i in range(5)]
        good = sum(reply.status == 200 for reply in answered)
        gone, after_s = until_closed(connections, HEADER_TIMEOUT_S + CLOSE_S)
        notes.say(
            f"{len(connections)} held; {good} of 5 chats answered; {gone} closed after {after_s:.1f} s",
            chats=good,
            closed=gone,
        )
        notes.hold(good == 5, f"{good} of 5 chats were answered beside idle connections: {answered[-1]}")
        notes.hold(
            gone == len(connections),
            f"{gone} of {len(connections)} idle connections were closed within {HEADER_TIMEOUT_S + CLOSE_S:g} s",
        )


@attack("connection/idle-2000", quick=False)
def idle_more(world: World, notes: Notes) -> None:
    """2,000 idle connections, more than the soft limit of files that was set, keep no chat out."""
    with (
        world.server(*timed(notes), tenants=("bystander", "bob")) as server,
        world.watched(server, notes),
        closing(held(server, 2000)) as connections,
    ):
        answered = [world.chat(server.address, server.keys["bob"], f"{i}", timeout_s=8.0) for i in range(5)]
        good = sum(reply.status == 200 for reply in answered)
        notes.say(f"{len(connections)} held; {good} of 5 chats answered", chats=good)
        notes.hold(good == 5, f"{good} of 5 chats were answered: {answered[-1]}")


@attack("connection/slow")
def slow(world: World, notes: Notes) -> None:
    """Half heads, half bodies and bytes that come one a second end with the header's time, and SIGTERM does not wait for them."""
    with world.server(*timed(notes), "--drain-timeout", "2", tenants=("bystander", "bob")) as server:
        key = server.keys["bob"]
        body_head = head(
            "POST", CHAT, key, [("Content-Type", "application/json"), ("Content-Length", "1000")]
        )
        kinds = {
            "half heads": held(
                server, 300, b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-A: b"
            ),
            "half bodies": held(server, 200, body_head + b'{"model":"tiny",'),
            "half bodies without a key": held(server, 100, body_head.replace(key.encode(), b"none") + b"{"),
            "kept after an answer": held(server, 50, head("GET", "/health") + b"GET /he"),
        }
        with (
            world.watched(server, notes),
            closing([one for some in kinds.values() for one in some]),
            closing(held(server, 20, b"GET /")) as dripping,
        ):
            stop = threading.Event()
            drip = threading.Thread(target=_drip, args=(dripping, stop))
            drip.start()
            try:
                time.sleep(HEADER_TIMEOUT_S + CLOSE_S)
            finally:
                stop.set()
                drip.join()
            for kind, connections in {**kinds, "a byte a second": dripping}.items():
                gone = sum(closed([connection]) for connection in connections)
                notes.say(f"{kind}: {gone} of {len(connections)} closed")
                notes.hold(
                    gone == len(connections),
                    f"{kind}: {gone} of {len(connections)} closed within {HEADER_TIMEOUT_S + CLOSE_S:g} s",
                )
        with closing(held(server, 100, body_head + b"{") + held(server, 100, b"GET /") + held(server, 100)):
            took_s = server.terminate(50.0)
            notes.say(f"SIGTERM took {took_s if took_s is None else round(took_s, 1)} s", sigterm_s=took_s)
            notes.hold(
                took_s is not None and took_s < 10,
                f"SIGTERM took {took_s} s beside held connections, with --drain-timeout 2",
            )


def _drip(connections: list[socket.socket], stop: threading.Event) -> None:
    while not stop.wait(1.0):
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.send(b"a")


@attack("connection/bodies-under-way")
def bodies_under_way(world: World, notes: Notes) -> None:
    """60 bodies of 15.9 MB under way at once take bounded memory, and keep no small request out."""
    server = world.shared()
    key = server.keys["mallory"]
    first = head("POST", CHAT, key, [("Content-Type", "application/json"), ("Content-Length", str(BODY))])
    data = b" " * (BODY - 100_000)

    def begin(_: int) -> socket.socket | None:
        try:
            connection = server.address.connect()
            connection.settimeout(4.0)
            connection.sendall(first)
            connection.sendall(data)
        except OSError:
            pass
        return connection

    with (
        world.watched(server, notes),
        ThreadPoolExecutor(60) as pool,
        closing([one for one in pool.map(begin, range(60)) if one is not None]) as connections,
    ):
        answered = [
            world.chat(server.address, server.keys["bob"], f"{i} " + "word " * 200, timeout_s=10.0)
            for i in range(5)
        ]
        large = post(
            server.address, "/tokenize", {"prompt": "word " * 1000, "model": "tiny"}, server.keys["bob"], 10.0
        )
        good = sum(reply.status == 200 for reply in answered)
        notes.say(
            f"{len(connections)} under way, {sum(closed([one]) for one in connections)} refused; {good} of 5 chats answered",
            chats=good,
        )
        notes.hold(good == 5, f"{good} of 5 chats were answered beside bodies under way: {answered[-1]}")
        notes.hold(large.status == 200, f"a body of 5 kB beside bodies under way: {large}")


@attack("connection/bodies-chunked", quick=False)
def bodies_chunked(world: World, notes: Notes) -> None:
    """The same without a length, in chunks, over every endpoint that takes a body."""
    server = world.shared()
    key = server.keys["mallory"]
    paths = (
        CHAT,
        RESPONSES,
        "/v1/completions",
        "/tokenize",
        "/v1/conversations",
        "/v1/pensieve/conversations/none/ttl",
    )
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"

    def begin(i: int) -> socket.socket | None:
        try:
            connection = server.address.connect()
            connection.settimeout(4.0)
            connection.sendall(
                head(
                    "POST",
                    paths[i % len(paths)],
                    key,
                    [("Content-Type", "application/json"), ("Transfer-Encoding", "chunked")],
                )
            )
            for _ in range(15):
                connection.sendall(chunk)
        except OSError:
            pass
        return connection

    with (
        world.watched(server, notes),
        ThreadPoolExecutor(60) as pool,
        closing([one for one in pool.map(begin, range(60)) if one is not None]),
    ):
        reply = world.chat(server.address, server.keys["bob"], timeout_s=10.0)
        notes.say(f"a chat: {reply}")
        notes.hold(reply.status == 200, f"a chat beside bodies under way: {reply}")


def stream_body(num_tokens: int, **more: Any) -> bytes:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Go on."}],
        "max_tokens": num_tokens,
        "stream": True,
        "ignore_eos": True,
    }
    return json.dumps(body | more).encode()


def unread(server: Served, key: str, count: int, body: bytes, path: str = CHAT) -> list[socket.socket]:
    """Streams that are asked for and never read, on sockets that take little."""
    connections = []
    for _ in range(count):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(5.0)
        connection.connect((server.address.host, server.address.port))
        lines = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        connection.sendall(head("POST", path, key, lines) + body)
        connections.append(connection)
    return connections


@attack("connection/unread-streams")
def unread_streams(world: World, notes: Notes) -> None:
    """60 clients that read nothing of their streams take bounded memory, and are left after `--stall-timeout`."""
    with world.server("--stall-timeout", str(STALL_S), tenants=("bystander", "bob", "mallory")) as server:
        body = stream_body(1500, logprobs=True, top_logprobs=20)
        with (
            world.watched(server, notes, max_chat_s=None),
            closing(unread(server, server.keys["mallory"], 60, body)) as connections,
        ):
            time.sleep(12.0)
            reply = world.chat(server.address, server.keys["bob"], timeout_s=20.0)
            notes.hold(reply.status == 200, f"a chat beside unread streams: {reply}")
            notes.say(f"{len(connections)} streams unread, a chat: {reply}")
        time.sleep(1.0)
        notes.hold(server.alive, "the server ended")


@attack("connection/many-streams", quick=False)
def many_streams(world: World, notes: Notes) -> None:
    """150 streams at once, and clients that leave in the middle of them, delay no /health."""
    server = world.shared()
    with world.watched(server, notes, max_chat_s=None):
        for _ in range(3):
            with closing(unread(server, server.keys["mallory"], 50, stream_body(400))):
                time.sleep(1.0)
    notes.hold(server.alive, "the server ended")


@attack("connection/ended-answers")
def ended_answers(world: World, notes: Notes) -> None:
    """What is kept of ended answers is bounded: 40 with log-probabilities of 20 tokens each, and 60 in the background."""
    server = world.shared("--max-open-per-key", "200")
    key = server.keys["mallory"]
    listed = {"model": "tiny", "max_tokens": 500, "logprobs": True, "top_logprobs": 20, "ignore_eos": True}
    asked: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {**listed, "messages": [{"role": "user", "content": f"{i}"}]}) for i in range(40)
    ]
    background = {"background": True, "max_output_tokens": 500, "top_logprobs": 20, "ignore_eos": True}
    asked += [(RESPONSES, {**background, "input": f"{i}"}) for i in range(60)]

    def one(numbered: tuple[int, tuple[str, dict[str, Any]]]) -> int:
        i, (path, body) = numbered
        return post(server.address, path, body, key, 60.0, Idempotency_Key=f"ended-{i}").status

    with world.watched(server, notes, max_chat_s=None):
        with ThreadPoolExecutor(16) as pool:
            statuses = list(pool.map(one, enumerate(asked)))
        deadline = time.monotonic() + 60
        while _running(server) and time.monotonic() < deadline:
            time.sleep(0.5)
        notes.say(f"{statuses.count(200)} of {len(statuses)} answered")
        notes.hold(
            statuses.count(200) == len(statuses),
            f"{len(statuses) - statuses.count(200)} of {len(statuses)} were not answered",
        )


def _running(server: Served) -> bool:
    found = get(server.address, "/v1/pensieve/map", server.keys["mallory"]).json
    return bool(found and (found["stats"]["running"] > 1 or found["stats"]["waiting"]))


@attack("connection/noise-without-a-key", quick=False)
def strangers(world: World, notes: Notes) -> None:
    """3,000 requests a stranger sends as fast as it can, with bodies of 15.9 MB and no key, are refused and delay no other request."""
    server = world.shared()
    data = b" " * BODY
    with world.watched(server, notes), ThreadPoolExecutor(8) as pool:
        large = list(pool.map(lambda _: post(server.address, CHAT, data, "pk-none", 10.0), range(40)))
        small = list(pool.map(lambda i: get(server.address, f"/v1/none/{i}", "pk-none", 10.0), range(1000)))
        notes.say(
            f"large: {sorted({reply.status for reply in large})}, small: {sorted({reply.status for reply in small})}"
        )
        notes.hold(
            {reply.status for reply in large} <= {401, 0},
            f"large: {sorted({reply.status for reply in large})}",
        )
        notes.hold(
            {reply.status for reply in small} <= {401, 404},
            f"small: {sorted({reply.status for reply in small})}",
        )
