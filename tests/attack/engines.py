"""An engine that stands still, dies again and again, or cannot start for a while; a whole server that was stopped and goes on.

Knows signals, folders and times; no texts.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
from bodies import CHAT, RESPONSES
from promises import Notes, attack
from served import Served
from wire import Reply, events, get, post
from world import World

ENGINE_TIMEOUT_S = 4
QUEUE_S, REQUEST_S = 5, 8
ANSWER_S = 12.0  # a timeout and something for a busy machine
NOTICED_S = ENGINE_TIMEOUT_S + 4.0
REPLACED_S = 60.0
TENANTS = ("bob",)


def patient(notes: Notes) -> list[str]:
    return [
        *World.options(notes, ("--engine-timeout", str(ENGINE_TIMEOUT_S))),
        "--queue-timeout",
        str(QUEUE_S),
        "--request-timeout",
        str(REQUEST_S),
    ]


def streamed(
    server: Served, question: str, num_tokens: int, begun: threading.Event, timeout_s: float
) -> tuple[str, float]:
    """How a stream ended, and after how long."""
    begun_s = time.monotonic()
    told = "broken off"
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": num_tokens,
        "stream": True,
        "ignore_eos": True,
    }
    try:
        for event in events(server.address, CHAT, body, server.keys["bob"], timeout_s):
            if event.get("choices"):
                begun.set()
                told = event["choices"][0]["finish_reason"] or told
            if "error" in event:
                told = str(event["error"].get("code"))
    except TimeoutError:
        told = "timeout"
    except (OSError, ValueError):
        pass
    return told, time.monotonic() - begun_s


def first_status(server: Served, status: int, timeout_s: float) -> float | None:
    """Seconds until /ready has a status."""
    begun_s = time.monotonic()
    while time.monotonic() - begun_s < timeout_s:
        if get(server.address, "/ready", timeout_s=3.0).status == status:
            return round(time.monotonic() - begun_s, 1)
        time.sleep(0.1)
    return None


@attack("engine/frozen")
def frozen(world: World, notes: Notes) -> None:
    """A frozen engine is noticed and replaced within `--engine-timeout`, and every request's own time holds meanwhile."""
    options = patient(notes)
    with world.server(*options, tenants=TENANTS) as server, ThreadPoolExecutor(24) as pool:
        key = server.keys["bob"]
        conversation = world.chat(server.address, key, "before").json["pensieve"]["conversation"]
        begun = [threading.Event() for _ in range(4)]
        streams = [pool.submit(streamed, server, f"{i}", 7000, event, 40.0) for i, event in enumerate(begun)]
        for event in begun:
            event.wait(20)
        old = server.engine()
        old.suspend()
        stopped_s = time.monotonic()
        try:
            noticed = pool.submit(first_status, server, 503, 30.0)
            path = f"/v1/pensieve/conversations/{conversation}"
            body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 4}
            asked: dict[str, tuple[str, str, Any]] = {
                "chat": ("POST", CHAT, body), "response": ("POST", RESPONSES, {"input": "a", "max_output_tokens": 4}),
                "map": ("GET", "/v1/pensieve/map", None), "list": ("GET", "/v1/pensieve/conversations", None), "show": ("GET", path, None),
                "warm": ("POST", f"{path}/warm", None), "idle": ("POST", f"{path}/idle", None), "pin": ("POST", f"{path}/pin", None),
                "metrics": ("GET", "/metrics", None), "delete": ("DELETE", path, None),
            }  # fmt: skip
            jobs = {
                what: pool.submit(post, server.address, path, body, key, 40.0, method)
                for what, (method, path, body) in asked.items()
            }
            replies: dict[str, Reply] = {what: job.result() for what, job in jobs.items()}
            ended = [job.result() for job in streams]
            noticed_s = noticed.result()
            replaced_s = first_status(server, 200, REPLACED_S)
        finally:
            if old.is_running():
                old.resume()
        slow = {
            what: round(reply.seconds, 1)
            for what, reply in replies.items()
            if reply.how != "answered" or reply.seconds > ANSWER_S
        }
        notes.say(
            f"/ready 503 after {noticed_s} s; {', '.join(f'{what} {reply.status} {reply.seconds:.1f} s' for what, reply in replies.items())}; streams "
            f"{sorted({told for told, _ in ended})} by {max(seconds for _, seconds in ended):.1f} s; ready again {time.monotonic() - stopped_s:.1f} s after",
            noticed_s=noticed_s, replaced_s=replaced_s,
        )  # fmt: skip
        notes.hold(
            noticed_s is not None and noticed_s <= NOTICED_S,
            f"/ready 503 after {noticed_s} s, at most {NOTICED_S:g} s may be",
        )
        notes.hold(not slow, f"waited longer than {ANSWER_S:g} s: {slow}")
        notes.hold(
            max(seconds for _, seconds in ended) <= ANSWER_S + REQUEST_S,
            f"streams ended after {max(seconds for _, seconds in ended):.1f} s",
        )
        turns = [replies["chat"], replies["response"]]
        notes.hold(
            all(reply.status in (200, 503, 504) for reply in turns), f"{[str(reply) for reply in turns]}"
        )
        notes.hold(
            all("retry-after" in reply.headers for reply in turns if reply.status == 503),
            "a 503 without Retry-After",
        )
        notes.hold(replaced_s is not None, f"not ready {REPLACED_S:g} s after: the engine was not replaced")
        if replaced_s is not None:
            notes.hold(world.chat(server.address, key, "after").status == 200, "a chat after it fails")
            notes.hold(
                not old.is_running() or old.status() == psutil.STATUS_ZOMBIE, "the frozen engine still runs"
            )


@attack("engine/frozen-at-rest", quick=False)
def frozen_at_rest(world: World, notes: Notes) -> None:
    """An engine that freezes while nothing is asked is noticed too, and so is one that freezes in the middle of a start."""
    with world.server(*patient(notes), tenants=TENANTS) as server:
        server.engine().suspend()
        noticed = first_status(server, 503, 30.0)
        replaced = first_status(server, 200, REPLACED_S)
        notes.say(f"503 after {noticed} s, 200 after {replaced} s")
        notes.hold(noticed is not None and replaced is not None, "it is not noticed, or not replaced")


@attack("engine/paused")
def paused(world: World, notes: Notes) -> None:
    """A pause that is shorter than `--engine-timeout`, of the engine, the front end or all of it, costs no answer and no engine."""
    with world.server(*patient(notes)[:2], tenants=TENANTS) as server, ThreadPoolExecutor(8) as pool:
        engine = server.engine()
        for what in ("engine", "front", "all"):
            begun = [threading.Event() for _ in range(3)]
            streams = [
                pool.submit(streamed, server, f"{what} {i}", 4000, event, 60.0)
                for i, event in enumerate(begun)
            ]
            for event in begun:
                event.wait(20)
            paused = {
                "engine": [engine],
                "front": [server.front],
                "all": [server.front, *server.front.children(recursive=True)],
            }[what]
            for process in paused:
                process.suspend()
            time.sleep(
                ENGINE_TIMEOUT_S * (0.5 if what == "engine" else 2.0)
            )  # the front's own pause says nothing of the engine
            for process in reversed(paused):
                process.resume()
            ended = [job.result()[0] for job in streams]
            notes.say(f"{what}: {ended}")
            notes.hold(ended == ["length"] * 3, f"{what} paused: {ended}")
            notes.hold(engine.is_running(), f"{what} paused: the engine was replaced")


@attack("engine/model-moved")
def moved(world: World, notes: Notes) -> None:
    """An engine that cannot start for a while is tried again for as long as the server lives; clients get 503 with Retry-After."""
    folder = world.new_folder() / "model"
    os.makedirs(folder)
    for path in world.model.iterdir():
        os.link(path, folder / path.name) if path.stat().st_dev == folder.stat().st_dev else folder.joinpath(
            path.name
        ).write_bytes(path.read_bytes())
    away = folder.with_name("away")
    with world.server(tenants=TENANTS, model=folder) as server:
        key = server.keys["bob"]
        os.rename(folder, away)
        server.engine().kill()
        begun_s = time.monotonic()
        seen: list[Reply] = []
        while time.monotonic() - begun_s < 15:
            seen.append(world.chat(server.address, key, "a", timeout_s=10.0))
            time.sleep(0.5)
        os.rename(away, folder)
        replaced = first_status(server, 200, REPLACED_S)
        statuses = sorted({reply.status for reply in seen})
        notes.say(f"meanwhile {statuses}; 200 {replaced} s after the folder was back", replaced_s=replaced)
        notes.hold(statuses == [503], f"turns meanwhile: {statuses} {seen[-1].code}")
        notes.hold(
            all("retry-after" in reply.headers for reply in seen if reply.status == 503),
            "a 503 without Retry-After",
        )
        notes.hold(replaced is not None, f"not ready {REPLACED_S:g} s after the folder was back")
        if replaced is not None:
            notes.hold(world.chat(server.address, key, "after").status == 200, "a chat after it fails")


@attack("engine/killed-again-and-again", quick=False)
def killed(world: World, notes: Notes) -> None:
    """An engine that dies seven times in a row, also while it starts, is started an eighth time."""
    with world.server(tenants=TENANTS) as server:
        for i in range(7):
            server.engine().kill()
            time.sleep(0.3 if i % 2 else 1.5)
        first_status(server, 503, 3.0)
        replaced = first_status(server, 200, REPLACED_S)
        notes.say(f"200 after {replaced} s", replaced_s=replaced)
        notes.hold(
            replaced is not None,
            f"not ready {REPLACED_S:g} s after seven deaths: {json.dumps(get(server.address, '/ready').json)}",
        )


@attack("engine/signals", quick=False)
def signals(world: World, notes: Notes) -> None:
    """Signals that end a process otherwise (HUP, USR1, PIPE) to the engine leave the server answering."""
    with world.server(tenants=TENANTS) as server:
        for number in (signal.SIGUSR1, signal.SIGSEGV, signal.SIGTERM):
            server.engine().send_signal(number)
            time.sleep(0.5)
            back = first_status(server, 200, REPLACED_S)
            reply = world.chat(server.address, server.keys["bob"], number.name)
            notes.say(f"{number.name}: ready after {back} s, {reply}")
            notes.hold(reply.status == 200, f"{number.name}: {reply}")
