"""Request heads that never end, and what else HTTP's grammar lets a stranger send without a key. Knows RFC 9112's lines; no API."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator

from promises import Check, Notes, add, attack
from served import Served
from wire import Reply, get, head, send
from world import World

MOST_SENT = (
    1 << 20
)  # bytes that a head may have when it is refused: the limit is 64 KB, the rest is on its way
OFFERED = 96 << 20  # bytes that an attacker would send
ANSWER_S = 15.0
START = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
BLOCK = 64 * 1024


def endless(first: bytes, piece: bytes) -> Iterator[bytes]:
    """A beginning, and then the same for as long as the server takes it."""
    yield first
    block = piece * max(1, BLOCK // len(piece))
    yield from itertools.repeat(block, OFFERED // len(block))


POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
HEADS: dict[str, tuple[bytes, bytes]] = {
    "one-header": (START + b"X-A: ", b"a"),
    "header-of-blanks": (START + b"X-A:", b" "),
    "header-name": (START, b"a"),
    "many-headers": (START, b"X-A: b\r\n"),
    "many-empty-headers": (START, b"a:\r\n"),
    "folded-header": (START + b"X-A: b\r\n", b" c\r\n"),
    "cookie": (START + b"Cookie: ", b"a=b; "),
    "authorization": (START + b"Authorization: Bearer ", b"k"),
    "target": (b"GET /", b"a"),
    "query": (b"GET /health?", b"a=1&"),
    "percent-target": (b"GET /", b"%41"),
    "method": (b"", b"A"),
    "host": (b"GET /health HTTP/1.1\r\nHost: ", b"a"),
    "content-length": (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: ", b"0"),
    "version": (b"GET /health HTTP/1.", b"1"),
    "blank-lines": (b"", b"\r\n"),
    "chunk-extension": (POST + b"\r\n1;a=", b"b"),
    "chunk-size": (POST + b"\r\n", b"0"),
    "trailers": (POST + b"\r\n0\r\n", b"X-A: b\r\n"),
    "one-trailer": (POST + b"\r\n0\r\nX-A: ", b"b"),
    "nothing-but-zeros": (b"", b"\x00"),
    "tls-hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\x00"),
}
WITH_KEY = ("chunk-extension", "chunk-size", "trailers", "one-trailer")
PROMISE = (
    "A head is refused beyond 64 KB (431 or 400), before any key is asked for, and delays no other request."
)


def run(name: str) -> Callable[[World, Notes], None]:
    """The check of one endless head."""
    first, piece = HEADS[name]

    def check(world: World, notes: Notes) -> None:
        server = world.shared()
        keyed = [first]
        if name in WITH_KEY:  # a trailer is read where a body is
            keyed.append(
                first.replace(
                    b"Transfer-Encoding",
                    f"Authorization: Bearer {server.keys['mallory']}\r\nTransfer-Encoding".encode(),
                )
            )
        with world.watched(server, notes):
            for beginning in keyed:
                judge(notes, send(server.address, endless(beginning, piece), ANSWER_S, "GET"))

    return check


def judge(notes: Notes, reply: Reply) -> None:
    notes.say(f"{reply}, {reply.sent / 1e6:.2f} MB were taken", sent_mb=round(reply.sent / 1e6, 2))
    notes.hold(reply.how != "timeout", f"nothing was said within {ANSWER_S:g} s")
    notes.hold(
        reply.sent <= MOST_SENT + (4 << 20), f"{reply.sent / 1e6:.1f} MB of a head were taken"
    )  # (the kernel holds some MB in between)
    notes.hold(
        reply.how == "closed" or reply.status < 500 or reply.status in (501, 505), f"answered {reply.status}"
    )


for _name in HEADS:
    add(
        Check(
            f"head/{_name}",
            PROMISE,
            run(_name),
            quick=_name in ("one-header", "many-headers", "target", "trailers"),
        )
    )


@attack("head/ten-at-once")
def ten(world: World, notes: Notes) -> None:
    """Ten endless heads at once delay no other request."""
    server = world.shared()
    replies: list[Reply] = []

    def one(first: bytes, piece: bytes) -> None:
        replies.append(send(server.address, endless(first, piece), ANSWER_S, "GET"))

    with world.watched(server, notes):
        threads = [
            threading.Thread(target=one, args=HEADS[name])
            for name in ("one-header", "many-headers", "target", "header-name", "cookie") * 2
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        taken = sum(reply.sent for reply in replies) / 1e6
        notes.say(f"{taken:.1f} MB were taken of ten", sent_mb=round(taken, 1))
        notes.hold(taken <= 60, f"{taken:.0f} MB of ten heads were taken")


@attack("head/sizes")
def sizes(world: World, notes: Notes) -> None:
    """A head of 16 KB is an ordinary one; of 100 KB it is answered 431."""
    server = world.shared()
    small = get(server.address, "/health", X_A="a" * 16_000)
    notes.hold(small.status == 200, f"16 KB: {small}")
    for what, pieces in {
        "one header": [head("GET", "/health", headers=[("X-A", "a" * 100_000)])],
        "many headers": [head("GET", "/health", headers=[(f"X-{i}", "a" * 100) for i in range(1000)])],
    }.items():
        reply = send(server.address, pieces, ANSWER_S, "GET")
        notes.say(f"100 KB in {what}: {reply}")
        notes.hold(reply.status == 431, f"100 KB in {what}: {reply}, expected 431")


@attack("head/tiny-chunks")
def tiny_chunks(world: World, notes: Notes) -> None:
    """A body in chunks of one byte delays no other request."""
    server = world.shared()
    first = head(
        "POST",
        "/tokenize",
        server.keys["mallory"],
        [("Content-Type", "application/json"), ("Transfer-Encoding", "chunked")],
    )
    pieces = [first, b"1\r\n{\r\n", *[b"1\r\n \r\n" * 10_000] * 100, b"1\r\n}\r\n0\r\n\r\n"]
    with world.watched(server, notes):
        reply = send(server.address, pieces, 30.0)
        notes.say(str(reply))
        notes.hold(reply.how == "answered" and 400 <= reply.status < 500, f"1,000,000 chunks: {reply}")


MALFORMED: dict[str, bytes] = {
    "two lengths": b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}}",
    "negative length": b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    "length and chunks": b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    "unknown coding": b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: rot13\r\n\r\n{}",
    "bad chunk": POST + b"\r\nzz\r\n",
    "huge chunk": POST + b"\r\nffffffffffffffffff\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "blank in a name": b"GET /health HTTP/1.1\r\nHost : localhost\r\n\r\n",
    "null in a value": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: a\x00b\r\n\r\n",
    "bare line feed in a value": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: a\rb: c\r\n\r\n",
    "http 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no method": b" /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a socket, not http": b"\xff\xfe\x00hello\r\n\r\n",
}


@attack("head/malformed")
def malformed(world: World, notes: Notes) -> None:
    """Ambiguous and malformed heads are answered 400 or closed: never taken one way or the other."""
    server = world.shared()
    with world.watched(server, notes):
        for what, data in MALFORMED.items():
            reply = send(server.address, [data], 10.0, "GET")
            notes.hold(reply.how == "closed" or 400 <= reply.status <= 505, f"{what}: {reply}")


@attack("head/pipelined", quick=False)
def pipelined(world: World, notes: Notes) -> None:
    """A client that sends 200,000 requests on one connection and reads no answer fills no memory and delays no other request."""
    server = world.shared()
    request = START + b"\r\n"

    def pieces() -> Iterable[bytes]:
        return itertools.repeat(request * 1000, 200)

    with world.watched(server, notes):
        taken = push(server, pieces(), 8.0)
        notes.say(
            f"{taken / 1e6:.1f} MB of requests were taken while no answer was read",
            sent_mb=round(taken / 1e6, 1),
        )


def push(server: Served, pieces: Iterable[bytes], timeout_s: float) -> int:
    """Send and read nothing; bytes that were taken."""
    taken = 0
    with server.address.connect() as connection:
        connection.settimeout(timeout_s)
        try:
            for piece in pieces:
                connection.sendall(piece)
                taken += len(piece)
        except OSError:
            pass
    return taken
