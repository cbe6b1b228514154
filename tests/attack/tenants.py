"""One tenant who takes all there is to be had, while another asks. Knows keys and quotas; never prompts' meaning."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from bodies import CHAT, RESPONSES, TOKENIZE
from connections import closing, held, stream_body, unread
from promises import Notes, attack
from served import Served
from wire import Reply, get, head, post
from world import World

ASK_S = 0.4
WORST_S = 10.0  # to bob's answer of 8 tokens, on a tiny model
TENANTS = ("alice", "bob")


def ask_on(server: Served, for_s: float) -> list[Reply]:
    """What bob gets who asks again and again."""
    replies: list[Reply] = []
    end = time.monotonic() + for_s
    while time.monotonic() < end:
        replies.append(
            World.chat(server.address, server.keys["bob"], f"question {len(replies)}", timeout_s=30.0)
        )
        time.sleep(ASK_S)
    return replies


def judge(notes: Notes, replies: list[Reply]) -> None:
    good = sum(reply.status == 200 for reply in replies)
    worst = max(reply.seconds for reply in replies)
    statuses = sorted({reply.status for reply in replies})
    notes.say(
        f"bob: {good} of {len(replies)} answered, worst after {worst:.2f} s, statuses {statuses}",
        bob=good,
        bob_worst_s=round(worst, 2),
    )
    notes.hold(
        good == len(replies),
        f"bob was not answered {len(replies) - good} times of {len(replies)}: {statuses}",
    )
    notes.hold(worst <= WORST_S, f"bob waited {worst:.1f} s, at most {WORST_S:g} s may be")


@contextlib.contextmanager
def busy(count: int, work: Callable[[int, threading.Event], Any]) -> Iterator[None]:
    """So many threads that go on with something."""
    stop = threading.Event()
    threads = [threading.Thread(target=_repeat, args=(work, i, stop)) for i in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _repeat(work: Callable[[int, threading.Event], Any], i: int, stop: threading.Event) -> None:
    while not stop.is_set():
        with contextlib.suppress(OSError):
            work(i, stop)


@attack("tenant/background-flood")
def background(world: World, notes: Notes) -> None:
    """70 long background responses of one tenant leave room for another at once."""
    with world.server("--max-open", "64", tenants=TENANTS) as server:
        for i in range(70):
            body = {"input": f"{i}", "background": True, "max_output_tokens": 6000, "ignore_eos": True}
            post(server.address, RESPONSES, body, server.keys["alice"])
        judge(notes, ask_on(server, 10.0))


@attack("tenant/stream-flood", quick=False)
def streams(world: World, notes: Notes) -> None:
    """Streams that are not read, 70 of one tenant, leave room for another."""
    with (
        world.server("--max-open", "64", tenants=TENANTS) as server,
        closing(unread(server, server.keys["alice"], 70, stream_body(4000))),
    ):
        judge(notes, ask_on(server, 8.0))


@attack("tenant/queue-of-a-conversation", quick=False)
def queue(world: World, notes: Notes) -> None:
    """Turns of one tenant that queue on one conversation leave room for another."""
    with world.server("--max-open", "32", tenants=TENANTS) as server:
        conversation = post(server.address, "/v1/conversations", {}, server.keys["alice"]).json["id"]
        for i in range(60):
            body = {
                "input": f"{i}",
                "conversation": conversation,
                "background": True,
                "max_output_tokens": 2000,
                "ignore_eos": True,
            }
            post(server.address, RESPONSES, body, server.keys["alice"])
        judge(notes, ask_on(server, 8.0))


@attack("tenant/long-prompts", quick=False)
def long_prompts(world: World, notes: Notes) -> None:
    """Prompts that fill the context, one after the other from eight clients, leave another's turn its time."""
    with world.server("--max-open", "16", tenants=TENANTS) as server:

        def work(i: int, stop: threading.Event) -> None:
            body = {
                "model": "tiny",
                "messages": [{"role": "user", "content": f"{time.monotonic()} " + "word " * 7000}],
                "max_tokens": 50,
            }
            post(server.address, CHAT, body, server.keys["alice"], 30.0)

        with busy(8, work):
            judge(notes, ask_on(server, 8.0))


@attack("tenant/tokenize-flood", quick=False)
def tokenize(world: World, notes: Notes) -> None:
    """Twelve clients of one tenant who tokenize as fast as they can leave another's turn its time."""
    with world.server(tenants=TENANTS) as server:

        def work(i: int, stop: threading.Event) -> None:
            post(
                server.address, TOKENIZE, {"prompt": "a b\n" * (5_000 * (1 + i))}, server.keys["alice"], 30.0
            )

        with busy(12, work):
            judge(notes, ask_on(server, 8.0))


@attack("tenant/operations-flood", quick=False)
def operations(world: World, notes: Notes) -> None:
    """One tenant's conversations by the hundred, listed, forked, pinned and deleted all the time, leave another's turn its time."""
    with world.server(tenants=TENANTS) as server:

        def work(i: int, stop: threading.Event) -> None:
            key = server.keys["alice"]
            made = post(server.address, "/v1/conversations", {"metadata": {"a": "b"}}, key).json
            if made is None or "id" not in made:
                return
            path = f"/v1/pensieve/conversations/{made['id']}"
            for verb in ("pin", "unpin", "fork", "idle", "warm"):
                post(server.address, f"{path}/{verb}", None, key)
            get(server.address, "/v1/pensieve/conversations?limit=500", key)
            get(server.address, "/v1/pensieve/map?limit=500", key)
            post(server.address, path, None, key, method="DELETE")

        with busy(6, work):
            judge(notes, ask_on(server, 8.0))


@attack("tenant/recorders")
def recorders(world: World, notes: Notes) -> None:
    """Recordings of one tenant leave another's to be taken."""
    with (
        world.server(tenants=("alice", "bob", "carol")) as server,
        closing(held(server, 20, head("GET", "/v1/pensieve/record", server.keys["alice"]))),
    ):
        time.sleep(1.0)
        for tenant in ("bob", "carol"):
            with server.address.connect() as connection:
                connection.settimeout(5.0)
                connection.sendall(head("GET", "/v1/pensieve/record", server.keys[tenant]))
                status = connection.recv(64).split(b"\r\n")[0].decode()
            notes.say(f"{tenant}: {status}")
            notes.hold(" 200 " in f"{status} ", f"{tenant}'s recording: {status}")


@attack("tenant/isolation")
def isolation(world: World, notes: Notes) -> None:
    """Another key's conversations, responses, idempotency keys and cache are not there."""
    with world.server(tenants=TENANTS) as server:
        alice, bob = server.keys["alice"], server.keys["bob"]
        secret = "the lighthouse is number 4711 " * 20
        first = post(
            server.address,
            RESPONSES,
            {"input": secret, "max_output_tokens": 4, "ignore_eos": True},
            alice,
            Idempotency_Key="same",
        )
        response = first.json["id"]
        listed = get(server.address, "/v1/pensieve/conversations", alice).json["data"][0]["id"]
        paths = [
            f"/v1/responses/{response}",
            f"/v1/responses/{response}/input_items",
            f"/v1/conversations/{listed}/items",
        ]
        paths += [f"/v1/pensieve/conversations/{listed}", f"/v1/conversations/{listed}"]
        tries = [get(server.address, path, bob) for path in paths]
        tries += [
            post(server.address, f"/v1/pensieve/conversations/{listed}/{verb}", None, bob)
            for verb in ("fork", "pin", "warm", "idle", "unpin")
        ]
        tries.append(post(server.address, f"/v1/pensieve/conversations/{listed}", None, bob, method="DELETE"))
        tries.append(post(server.address, f"/v1/responses/{response}/cancel", None, bob))
        tries.append(post(server.address, RESPONSES, {"input": "a", "previous_response_id": response}, bob))
        tries.append(post(server.address, RESPONSES, {"input": "a", "conversation": listed}, bob))
        refused = sum(reply.status == 404 for reply in tries)
        notes.say(f"{refused} of {len(tries)} tries 404")
        notes.hold(refused == len(tries), f"{[reply.status for reply in tries]}")
        same = post(
            server.address,
            RESPONSES,
            {"input": secret, "max_output_tokens": 4, "ignore_eos": True},
            bob,
            Idempotency_Key="same",
        )
        cached = same.json["usage"]["input_tokens_details"]["cached_tokens"]
        notes.hold(
            same.status == 200 and same.json["id"] != response and cached == 0,
            f"bob's own: {same}, {cached} cached tokens",
        )
        shown = json.dumps(
            [
                get(server.address, path, bob).json
                for path in ("/v1/pensieve/conversations", "/v1/pensieve/map")
            ]
        )
        notes.hold(listed not in shown, "bob's list names alice's conversation")
