"""No tenant is shut out: what one may take of places, bodies and recorders, and what is left for others."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw import connect, exchange, read, until
from serving import Serving, serving

from pensieve.server.connections import ConnectionLimits
from pensieve.server.guard import GuardRules, RequestGuard, _Body
from pensieve.server.keys import key_line, new_key
from pensieve.server.memory import Spacing
from pensieve.server.shares import Shares


def fill(shares: Shares, tenant: str) -> int:
    """Take as many units as there are for a tenant."""
    count = 0
    while shares.take(tenant):
        count += 1
    return count


# -- the rule


def test_one_tenant_gets_its_limit_and_all_where_there_are_no_tenants() -> None:
    assert fill(Shares(64, 48), "alice") == 48
    assert fill(Shares(64), "default") == 64
    for total in (1, 2, 3):
        assert fill(Shares(total, total), "alice") == total  # so little is not divided


def test_two_tenants_together_leave_room_for_a_third() -> None:
    shares = Shares(64, 48)
    assert fill(shares, "alice") == 48
    assert fill(shares, "bob") > 0
    taken = fill(shares, "carol")
    assert taken >= 1
    for name in ("dave", "erin", "frank"):
        assert shares.take(name), "a place is left for each that has none"
    assert not shares.take("alice")
    shares.give("alice", 20)
    assert shares.take("carol") and fill(shares, "carol") + taken + 1 <= 48


def test_what_is_freed_goes_to_those_below_an_even_share() -> None:
    shares = Shares(64, 48)
    fill(shares, "alice")
    fill(shares, "bob")
    shares.give("alice")
    assert not shares.take("alice") and shares.take("bob")  # alice is far above an even share


def test_amounts_are_taken_whole_or_not_at_all() -> None:
    shares = Shares(100, 75)
    assert not shares.take("alice", 76) and shares.num_held == 0
    assert shares.take("alice", 70) and not shares.take("bob", 31)
    assert shares.take("bob", 30) and shares.num_held == 100
    shares.give("alice", 70)
    shares.give("bob", 30)
    assert shares.num_held == 0 and shares.take("bob", 0) and not shares.held("bob")


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(-3, 5)), max_size=200), st.integers(4, 40))
def test_the_counts_hold_and_a_tenant_without_any_is_let_in(moves: list[tuple[str, int]], total: int) -> None:
    shares, held = Shares(total, max(1, total * 3 // 4)), Counter[str]()
    for tenant, amount in moves:
        if amount >= 0:
            if shares.take(tenant, amount):
                held[tenant] += amount
        elif held[tenant] >= -amount:
            shares.give(tenant, -amount)
            held[tenant] += amount
        assert shares.num_held == held.total() <= total and all(
            shares.held(name) == count for name, count in held.items()
        )
        assert max(held.values(), default=0) <= shares.per_tenant
        some = [name for name, count in held.items() if count]
        if len(some) == 1 and held[some[0]] > 1:  # whatever one tenant does, the next one finds a place
            assert shares.has_room("next")


# -- a server with three tenants


@pytest.fixture
def tenants(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    path, keys = tmp_path / "keys", {name: new_key() for name in ("alice", "bob", "carol")}
    path.write_text("".join(key_line(name, key) + "\n" for name, key in keys.items()))
    return path, keys


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def background(server: Serving, key: str) -> int:
    body = {"model": "tiny", "input": "x", "max_output_tokens": 40, "background": True, "ignore_eos": True}
    return server.client.post("/v1/responses", json=body, headers=bearer(key)).status_code


def test_a_third_tenant_is_answered_while_two_take_all_they_can(tenants: tuple[Path, dict[str, str]]) -> None:
    path, keys = tenants
    with serving(
        keys=path, key=keys["alice"], config={"max_open": 16, "max_open_per_key": 12}, slots=(400, 8)
    ) as server:
        server.worker.pause_s = 0.15
        took = {
            name: sum(background(server, keys[name]) == 200 for _ in range(20)) for name in ("alice", "bob")
        }
        assert took["alice"] == 12 and 1 <= took["bob"] <= 3
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "mine"}], "max_tokens": 2}
        for _ in range(3):
            answer = server.client.post("/v1/chat/completions", json=chat, headers=bearer(keys["carol"]))
            assert answer.status_code == 200, answer.text
        assert background(server, keys["alice"]) == 429
        server.worker.pause_s = 0.0
        server.until_idle(60)


def test_one_tenant_s_recorders_are_not_another_s(tenants: tuple[Path, dict[str, str]]) -> None:
    path, keys = tenants
    with serving(keys=path, key=keys["alice"]) as server, ExitStack() as stack:
        events: list[Any] = []

        def record(name: str) -> int:
            response = stack.enter_context(
                server.client.stream("GET", "/v1/pensieve/record", headers=bearer(keys[name]))
            )
            if response.status_code == 200:
                events.append(response.iter_lines())  # (kept: a stream whose reader is gone is closed)
                next(events[-1])
            return response.status_code

        assert [record("alice") for _ in range(5)] == [200] * 4 + [429]
        assert [record("bob") for _ in range(5)] == [200] * 4 + [429]
        assert record("carol") == 200
        stack.close()
        until(lambda: not server.context.recorders.num_held)


# -- bodies under way

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"


def half(server: Serving, key: str, declared: int, sent: int = 1000) -> Any:
    connection = connect(server)
    connection.sendall(
        HEAD
        + b"Authorization: Bearer "
        + key.encode()
        + b"\r\nContent-Length: %d\r\n\r\n" % declared
        + b" " * sent
    )
    return connection


def test_bodies_under_way_are_bounded_and_shared(tenants: tuple[Path, dict[str, str]]) -> None:
    path, keys = tenants
    small = json.dumps(
        {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    ).encode()
    rules = {"max_body_bytes": 100_000, "max_bodies_bytes": 400_000}
    with serving(
        keys=path, key=keys["alice"], rules=rules, limits=ConnectionLimits(header_timeout_s=2.0)
    ) as server:
        with ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(half(server, keys["alice"], 100_000))
            with half(server, keys["alice"], 100_000) as fourth:
                reply = read(fourth)
            assert reply.status == 429 and b"retry-after" in reply.head and "--max-bodies" in reply.message
            chunked = (
                b"Authorization: Bearer " + keys["alice"].encode() + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            assert exchange(server, HEAD + chunked + b"8000\r\n" + b" " * 0x8000 + b"\r\n").status == 429
            bobs = (
                b"Authorization: Bearer "
                + keys["bob"].encode()
                + b"\r\nContent-Length: %d\r\n\r\n" % len(small)
            )
            assert exchange(server, HEAD + bobs + small).status == 200
            anonymous = exchange(server, HEAD + b"Content-Length: 90000\r\n\r\n" + b" " * 1000)
            assert anonymous.status == 401 and b"connection: close" in anonymous.head
            assert server.client.get("/v1/models").status_code == 200
        until(
            lambda: (
                server.client.post(
                    "/v1/chat/completions", content=small, headers={"Content-Type": "application/json"}
                ).status_code
                == 200
            )
        )
        server.until_idle()


def test_large_bodies_are_read_one_after_another() -> None:
    async def passes() -> list[float]:
        spacing, loop = Spacing(1 << 20, 40e6), asyncio.get_running_loop()
        begun_s, passed = loop.time(), []

        async def one(num_bytes: int) -> None:
            await spacing.wait(num_bytes)
            passed.append(loop.time() - begun_s)

        await asyncio.gather(*(one(4_000_000) for _ in range(4)), one(1000))
        return passed

    small, *large = sorted(asyncio.run(passes()))
    assert small < 0.1 and len(large) == 4  # a small one waits for none
    assert large[-1] >= 0.29 and all(later - sooner > 0.05 for sooner, later in pairwise(large))


def test_parts_of_bodies_are_read_in_turn() -> None:
    """A part is not asked for before the parts of other bodies, asked for before it, have had their time."""

    async def asked_after() -> list[float]:
        guard = RequestGuard(None, None, GuardRules())  # type: ignore[arg-type]
        guard.parts = Spacing(1 << 16, 4e6)
        loop = asyncio.get_running_loop()
        begun_s, asked = loop.time(), []

        async def receive() -> dict[str, Any]:
            asked.append(loop.time() - begun_s)
            return {"type": "http.request", "body": b" " * 200_000, "more_body": True}

        async def upload() -> None:
            body = _Body(guard, receive, {"headers": [(b"transfer-encoding", b"chunked")]})
            for _ in range(3):
                await body.receive()

        await asyncio.gather(upload(), upload())
        return asked

    asked = asyncio.run(asked_after())
    assert len(asked) == 6 and asked[-1] >= 0.14  # behind three parts of 50 ms


def test_bodies_that_would_be_refused_anyway_are_not_read(tenants: tuple[Path, dict[str, str]]) -> None:
    path, keys = tenants
    with serving(keys=path, key=keys["alice"], config={"max_open": 2, "max_open_per_key": 1}) as server:
        authorized = (
            b"Host: x\r\nConnection: close\r\nAuthorization: Bearer "
            + keys["alice"].encode()
            + b"\r\nContent-Length: 9000000\r\n"
        )
        json_body = authorized + b"Content-Type: application/json\r\n\r\n"

        def status(line: bytes, rest: bytes) -> int | None:
            """Of a request whose body never comes."""
            return exchange(server, line + b" HTTP/1.1\r\n" + rest, within_s=3.0).status

        assert status(b"POST /nothing/here", json_body) == 404
        assert status(b"DELETE /v1/chat/completions", json_body) == 405
        for kind in (
            b"text/plain",
            b"multipart/form-data; boundary=x",
            b"application/x-www-form-urlencoded",
            b"",
        ):
            assert (
                status(b"POST /v1/chat/completions", authorized + b"Content-Type: " + kind + b"\r\n\r\n")
                == 400
            )
        assert status(b"POST /v1/chat/completions", authorized + b"\r\n") == 400
        server.worker.pause_s = 0.2
        assert background(server, keys["alice"]) == 200
        for turn in (
            b"POST /v1/chat/completions",
            b"POST /v1/completions",
            b"POST /v1/responses",
            b"POST /v1/responses/",
        ):
            assert status(turn, json_body) == 429
        assert (
            'pensieve_requests_total{endpoint="/v1/completions",status="429"} 1.0'
            in server.client.get("/metrics").text
        )
        server.context.answers.draining = True
        assert status(b"POST /v1/chat/completions", json_body) == 503
        server.context.answers.draining = False
        server.worker.pause_s = 0.0
        server.until_idle(60)


def test_requests_of_one_tenant_are_bounded(tenants: tuple[Path, dict[str, str]]) -> None:
    path, keys = tenants
    with serving(keys=path, key=keys["alice"], rules={"max_requests": 8}) as server:
        gate = threading.Event()
        titles = server.store.count
        server.store.count = lambda *names: (gate.wait(20), titles(*names))[1]  # type: ignore[method-assign]
        statuses: list[int] = []

        def ask(name: str) -> None:
            statuses.append(
                server.client.get("/v1/pensieve/conversations", headers=bearer(keys[name])).status_code
            )

        threads = [threading.Thread(target=ask, args=("alice",)) for _ in range(10)]
        for thread in threads:
            thread.start()
        until(lambda: len(statuses) == 4)  # refused: six of eight are one tenant's
        assert server.client.get("/v1/models", headers=bearer(keys["bob"])).status_code == 200
        gate.set()
        for thread in threads:
            thread.join()
        assert Counter(statuses) == {200: 6, 429: 4}
        server.store.count = titles  # type: ignore[method-assign]
