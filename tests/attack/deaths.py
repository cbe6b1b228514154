"""Kills at random instants under load, and the same requests again with the same keys: nothing acknowledged lost, nothing twice, no fragment.

Knows processes, requests and how they are told to end; of the store only what `stores` counts in it.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import psutil
from bodies import CHAT, RESPONSES
from promises import Notes, attack
from served import Served, kill_tree
from stores import whole_turns
from wire import events, get, post
from world import World

LENGTHS = (2, 8, 40, 150, 600, 1500)  # of answers, in tokens
RETRY_S = 60.0


@dataclass
class Asked:
    """A request with a key, and its answer once its end was seen."""

    key: str
    path: str
    body: dict[str, Any]
    question: str
    num_tokens: int
    answer: tuple[str, str] | None = None  # its id and text
    settled: bool = False  # told to have failed, for good


def read(path: str, found: Any) -> tuple[str, str, int, str]:
    """Id, text, number of tokens and how it ended, of a whole answer."""
    if path == CHAT:
        choice = found["choices"][0]
        return (
            found["id"],
            choice["message"]["content"] or "",
            found["usage"]["completion_tokens"],
            choice["finish_reason"],
        )
    text = "".join(part["text"] for item in found["output"] for part in item.get("content", ()))
    reason = (found.get("incomplete_details") or {}).get("reason") or found["status"]
    return found["id"], text, found["usage"]["output_tokens"] if found.get("usage") else 0, reason


ENDS = {CHAT: ("length",), RESPONSES: ("max_output_tokens",)}


@dataclass
class Client:
    """One that asks one thing after the other, each with a key of its own."""

    server: Served
    name: str
    rng: random.Random
    conversation: str = ""
    asked: list[Asked] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Until stopped, or until the server does not answer."""
        while not self.stop.is_set():
            one = self.draw()
            self.asked.append(one)
            try:
                if self.rng.random() < 0.5:
                    self.stream(one)
                else:
                    reply = post(
                        self.server.address,
                        one.path,
                        one.body,
                        self.server.keys["bob"],
                        60.0,
                        Idempotency_Key=one.key,
                    )
                    if reply.status == 200:
                        identity, text, *_ = read(one.path, reply.json)
                        one.answer = identity, text
            except (OSError, ValueError, EOFError, KeyError):
                pass
            except Exception as error:  # (http.client's own: the answer was cut off)
                if "http" not in type(error).__module__:
                    raise
            if one.answer is None:
                self.stop.wait(0.1)
                if not self.server.alive:
                    return

    def draw(self) -> Asked:
        """The next request."""
        number, num_tokens = len(self.asked), self.rng.choice(LENGTHS)
        question = f"question-{self.name}-{number:04d}."
        sampling = {"temperature": 0, "ignore_eos": True}
        if self.conversation and self.rng.random() < 0.5:
            body = {
                "input": question,
                "conversation": self.conversation,
                "max_output_tokens": num_tokens,
                "truncation": "auto",
                **sampling,
            }
            return Asked(f"key-{self.name}-{number}", RESPONSES, body, question, num_tokens)
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": question}],
            "max_tokens": num_tokens,
            **sampling,
        }
        return Asked(f"key-{self.name}-{number}", CHAT, body, question, num_tokens)

    def stream(self, one: Asked) -> None:
        """Ask for a stream; acknowledged is what has a final event."""
        text, identity = "", ""
        for event in events(
            self.server.address,
            one.path,
            {**one.body, "stream": True},
            self.server.keys["bob"],
            60.0,
            Idempotency_Key=one.key,
        ):
            for choice in event.get("choices", ()):
                identity = event["id"]
                text += choice["delta"].get("content") or ""
                if choice["finish_reason"]:
                    one.answer = identity, text
            if event.get("type") in ("response.completed", "response.incomplete"):
                identity, text, *_ = read(RESPONSES, event["response"])
                one.answer = identity, text


@dataclass
class Count:
    """What was counted over all kills."""

    kills: int = 0
    acknowledged: int = 0
    retried: int = 0  # asked again because no end was seen
    lost: int = 0  # acknowledged, and answered otherwise or not there
    doubled: int = 0  # there more than once, or two answers for one key
    fragments: int = 0  # answers for a key that are not whole
    unanswered: int = 0
    orphans: int = 0
    examples: list[str] = field(default_factory=list)


def again(server: Served, one: Asked) -> Any:
    """The same request with the same key, until it is answered."""
    deadline = time.monotonic() + RETRY_S
    while True:
        reply = post(server.address, one.path, one.body, server.keys["bob"], 60.0, Idempotency_Key=one.key)
        if reply.status == 200 or time.monotonic() > deadline or reply.status in (400, 404, 422):
            return reply
        time.sleep(0.3)


def check(server: Served, clients: list[Client], count: Count) -> None:
    """Ask everything again, and compare."""
    for client in clients:
        for one in client.asked:
            reply = again(server, one)
            if reply.status != 200:
                count.unanswered += 1
                count.examples.append(f"{one.key}: {reply} {reply.body[:160]!r}")
                continue
            identity, text, num_tokens, how = read(one.path, reply.json)
            if fragment := num_tokens != one.num_tokens or how not in ENDS[one.path]:
                count.fragments += 1
                count.examples.append(f"{one.key}: {num_tokens} of {one.num_tokens} tokens, ended by {how}")
            if one.answer is None:
                count.retried += 1
                twice = again(server, one)
                if twice.status != 200 or read(one.path, twice.json)[:2] != (identity, text):
                    count.doubled += 1
                    count.examples.append(f"{one.key}: two retries, two answers")
            else:
                count.acknowledged += 1
                if (identity, text) != one.answer:
                    count.lost += 1
                    count.examples.append(f"{one.key}: acknowledged as {one.answer[0]}, now {identity}")
            stored = whole_turns(server.store, one.question)
            if stored > 1:
                count.doubled += 1
                count.examples.append(f"{one.key}: stored {stored} times")
            elif stored == 0 and not fragment:
                count.lost += 1
                count.examples.append(f"{one.key}: not stored")
        client.asked.clear()


def kill(server: Served, what: str) -> list[psutil.Process]:
    """SIGKILL for a part of the server; what was below it."""
    below: list[psutil.Process] = server.front.children(recursive=True)
    if what == "engine":
        server.engine().kill()
    elif what == "front":
        server.front.kill()
        assert server.process is not None
        server.process.wait()
    else:
        server.kill()
    return below


def rounds(world: World, notes: Notes, kinds: list[str], *options: str) -> None:
    """Load, a kill, a restart where it needs one, and everything asked again."""
    count = Count()
    with world.server(*options, tenants=("bob",)) as server:
        for number, what in enumerate(kinds):
            clients = [Client(server, f"{number}-{i}", random.Random(world.rng.random())) for i in range(5)]
            for client in clients:
                client.conversation = post(server.address, "/v1/conversations", {}, server.keys["bob"]).json[
                    "id"
                ]
            threads = [threading.Thread(target=client.run) for client in clients]
            for thread in threads:
                thread.start()
            time.sleep(world.rng.uniform(0.2, 1.8))
            below = kill(server, what)
            count.kills += 1
            for client in clients:
                client.stop.set()
            if what == "front":
                _, left = psutil.wait_procs(below, 15)
                count.orphans += len(left)
                for process in left:
                    kill_tree(process)
            for thread in threads:
                thread.join()
            if what != "engine":
                server.close()
                server.start()
            server.until_ready()
            check(server, clients, count)
    notes.say(
        f"{count.kills} kills; {count.acknowledged} acknowledged, {count.retried} retried: {count.lost} lost, {count.doubled} doubled, "
        f"{count.fragments} fragments, {count.unanswered} unanswered, {count.orphans} processes left over",
        kills=count.kills, acknowledged=count.acknowledged, retried=count.retried, lost=count.lost, doubled=count.doubled,
        fragments=count.fragments, unanswered=count.unanswered,
    )  # fmt: skip
    wrong = count.lost + count.doubled + count.fragments + count.unanswered + count.orphans
    notes.hold(wrong == 0, f"{wrong} are wrong: {'; '.join(count.examples[:3])}")
    notes.hold(count.retried > 0, "no request was cut short: nothing was tried")


@attack("death/everything")
def everything(world: World, notes: Notes) -> None:
    """After kills of all processes under load every key has exactly one answer, a whole one, and what was acknowledged is unchanged."""
    rounds(world, notes, ["group"] * (2 if world.quick else 5))


@attack("death/front")
def front(world: World, notes: Notes) -> None:
    """The same after kills of the front end, and no process outlives it."""
    rounds(world, notes, ["front"] * (1 if world.quick else 3))


@attack("death/engine")
def engine(world: World, notes: Notes) -> None:
    """The same after kills of the engine, which is replaced while the front end lives."""
    rounds(world, notes, ["engine"] * (1 if world.quick else 4))


@attack("death/term", quick=False)
def term(world: World, notes: Notes) -> None:
    """SIGTERM under load with no time to drain, and a second one, lose nothing and leave no fragment."""
    count = Count()
    with world.server("--drain-timeout", "0.2", tenants=("bob",)) as server:
        for number in range(2):
            clients = [
                Client(server, f"term-{number}-{i}", random.Random(world.rng.random())) for i in range(5)
            ]
            threads = [threading.Thread(target=client.run) for client in clients]
            for thread in threads:
                thread.start()
            time.sleep(1.0)
            for client in clients:
                client.stop.set()
            took_s = server.terminate(40)
            notes.hold(took_s is not None and took_s < 15, f"SIGTERM took {took_s} s")
            for thread in threads:
                thread.join()
            server.start()
            check(server, clients, count)
            count.kills += 1
    wrong = count.lost + count.doubled + count.fragments + count.unanswered
    notes.say(
        f"{count.kills} ends; {count.acknowledged} acknowledged, {count.retried} retried, {wrong} wrong",
        acknowledged=count.acknowledged,
        retried=count.retried,
    )
    notes.hold(
        wrong == 0,
        f"{count.lost} lost, {count.doubled} doubled, {count.fragments} fragments, {count.unanswered} unanswered: {'; '.join(count.examples[:3])}",
    )


@attack("death/key-reused")
def reused(world: World, notes: Notes) -> None:
    """A key whose first try failed or was refused is free for a good one; a key of another request is refused."""
    with world.server(tenants=("bob",)) as server:
        key = server.keys["bob"]
        refused = world.chat(server.address, key, "word " * 20_000, Idempotency_Key="one")
        good = world.chat(server.address, key, "short", Idempotency_Key="one")
        notes.say(f"refused {refused.status}, then {good.status}")
        notes.hold(refused.status == 400 and good.status == 200, f"after a refusal: {refused}, then {good}")
        other = world.chat(server.address, key, "something else", Idempotency_Key="one")
        notes.hold(other.status == 422, f"another request with that key: {other}")
        same = world.chat(server.address, key, "short", Idempotency_Key="one")
        notes.hold(same.json["id"] == good.json["id"], "a retry has another id")
        notes.hold(get(server.address, "/ready").status == 200, "/ready is not 200")
