"""Kill the real server, or its engine, under load: whatever a client saw end is there afterwards, and goes on
as if nothing had been.
"""

from __future__ import annotations

import json
import random
import re
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from real import MAX_CONTEXT, RealServer, real_server

from pensieve.service.turn_stores import DRAFT_TOKENS
from pensieve.store import INTERRUPTED, SqliteStore, path_tokens

pytestmark = pytest.mark.model

FLUSH_TOKENS = 8  # made and seen while the draft's last piece is on its way to the disk
NEAR_TIE = 1e-3  # log-probabilities closer than this may change places with the shape of a batch
QUESTIONS = (
    "Tell me about the sea.",
    "Name three fruits and describe each of them.",
    "What is a cache good for?",
    "Write a short story about a lighthouse keeper.",
    "How does one bake bread?",
)


@dataclass
class Client:
    """Somebody who talks in a closed loop, and remembers what they were told."""

    server: RealServer
    name: str
    rng: random.Random
    named: bool  # over /v1/responses in a conversation with a name; else the whole chat again and again
    lengths: Sequence[int] = (2, 5, 8, 12, 150)  # of answers, in tokens, one of them at random
    said: list[dict[str, str]] = field(default_factory=list)  # every message of every turn whose end was seen
    conversation: str = ""
    asked: str | None = None  # a question whose answer has not ended
    key: str = ""  # its Idempotency-Key
    request: tuple[str, dict[str, Any]] = ("", {})  # where it was sent, and what
    response: str = ""  # its id, if it was told
    pieces: list[str] = field(default_factory=list)  # of its answer
    refused: list[tuple[int, str]] = field(default_factory=list)  # status and code
    broken: list[str] = field(default_factory=list)  # codes of errors within streams
    ended: list[str] = field(default_factory=list)  # terminal events
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Talk until stopped, or until the server is not there any more."""
        try:
            if self.named and not self.conversation:
                self.conversation = self.server.post("/v1/conversations", {}).json()["id"]
            while not self.stop.is_set():
                self.turn()
        except (httpx.TransportError, RuntimeError):  # (a client that is closed meanwhile)
            return

    def turn(self) -> None:
        """One question, and its answer as a stream."""
        question = f"{self.rng.choice(QUESTIONS)} ({self.name}, {len(self.said) // 2})"
        num_tokens = self.rng.choice(self.lengths)
        self.asked, self.response, self.pieces = question, "", []
        if self.named:
            path = "/v1/responses"
            body: dict[str, Any] = {
                "input": question,
                "conversation": self.conversation,
                "max_output_tokens": num_tokens,
            }
        else:
            path = "/v1/chat/completions"
            body = {
                "model": "smollm2",
                "messages": [*self.said, {"role": "user", "content": question}],
                "max_tokens": num_tokens,
            }
        body |= {"temperature": 0}
        self.key, self.request = f"key-{self.rng.randrange(1 << 60)}", (path, body)
        with self.server.client.stream(
            "POST", path, json=body | {"stream": True}, headers={"Idempotency-Key": self.key}
        ) as response:
            if response.status_code != 200:
                response.read()
                self.refused.append((response.status_code, response.json()["error"]["code"]))
                self.asked = None
                self.stop.wait(0.05)
                return
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    self._hear(json.loads(line.removeprefix("data: ")))

    def _hear(self, event: dict[str, Any]) -> None:
        if self.named:
            kind = event.get("type", "error")
            if kind == "response.created":
                self.response = event["response"]["id"]
            elif kind == "response.output_text.delta":
                self.pieces.append(event["delta"])
            elif kind in ("response.completed", "response.incomplete"):
                text = event["response"]["output"][0]["content"][0]["text"]
                assert text == "".join(self.pieces)
                self._acknowledge(kind, text)
            elif kind in ("response.failed", "response.cancelled", "error"):
                failed = event.get("response", {}).get("error")
                self.broken.append(failed["type"] if failed else event["error"]["code"])
                self.asked = None
            return
        if "error" in event:
            self.broken.append(event["error"]["code"])
            self.asked = None
        for choice in event.get("choices", ()):
            self.pieces.append(choice["delta"].get("content") or "")
            if choice["finish_reason"] is not None:
                self.conversation = event["pensieve"]["conversation"]
                self._acknowledge(choice["finish_reason"], "".join(self.pieces))

    def _acknowledge(self, how: str, text: str) -> None:
        assert self.asked is not None
        self.said += [{"role": "user", "content": self.asked}, {"role": "assistant", "content": text}]
        self.ended.append(how)
        self.asked = None


class Load:
    """Some clients, half of each kind, talking."""

    def __init__(self, server: RealServer, rng: random.Random, num_clients: int = 4, **keywords: Any) -> None:
        self.clients = [
            Client(
                server,
                f"client {rng.randrange(1 << 30)}",
                random.Random(rng.random()),
                named=i % 2 == 0,
                **keywords,
            )
            for i in range(num_clients)
        ]
        self.threads = [threading.Thread(target=client.run) for client in self.clients]
        for thread in self.threads:
            thread.start()

    def end(self) -> None:
        """Wait for all clients; one that is in the middle of an answer reads it to its end, if there is one."""
        for client in self.clients:
            client.stop.set()
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive(), "a client still waits for an answer"


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


def check_whole(path: Path) -> None:
    """Nothing in a store is half there.

    For a store whose server has recovered it, and that has no writer now.
    """
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        for table in ("drafts", "draft_tokens"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
        wrong = "SELECT count(*) FROM turns LEFT JOIN turns AS parents ON parents.id = turns.parent WHERE turns.start > coalesce(parents.stop, 0)"
        assert connection.execute(wrong).fetchone() == (0,)
        for tokens, start, stop, messages, reason in connection.execute(
            "SELECT length(token_ids) / 4, start, stop, messages, reply_reason FROM turns"
        ):
            roles = [message[0] for message in json.loads(messages)]
            assert (
                start + tokens == stop
                and roles[-1:] == ["assistant"]
                and roles.count("assistant") == 1
                and reason is not None
            )
        leaves = "SELECT count(*) FROM conversations JOIN turns ON turns.id = leaf WHERE reply_reason = ?"
        assert connection.execute(leaves, (INTERRUPTED,)).fetchone() == (0,)  # what was cut short is a branch
    finally:
        connection.close()


def check_acknowledged(server: RealServer, client: Client) -> None:
    """Every turn whose end the client saw is there, word for word; the one after it may have been stored
    unseen.
    """
    if not client.conversation:
        return
    answer = server.client.get(f"/v1/pensieve/conversations/{client.conversation}")
    assert answer.status_code == 200, answer.text
    messages = [
        {"role": message["role"], "content": message["content"]} for message in answer.json()["messages"]
    ]
    assert messages[: len(client.said)] == client.said
    unseen = messages[len(client.said) :]
    if unseen:
        assert [message["role"] for message in unseen] == ["user", "assistant"] and unseen[0][
            "content"
        ] == client.asked
        assert unseen[1]["content"].startswith("".join(client.pieces))
        client.said = messages  # what a client sees when it looks


def check_interrupted(server: RealServer, client: Client) -> int | None:
    """An answer that was cut short is there but for its last tokens.

    How many are missing; None: nothing was cut short.
    """
    if client.asked is None or not client.response:
        return None
    answer = server.client.get(f"/v1/responses/{client.response}")
    seen = "".join(client.pieces)
    if answer.status_code == 404:
        assert len(client.pieces) <= FLUSH_TOKENS, (
            f"{len(client.pieces)} pieces were seen, and nothing is there"
        )
        return len(client.pieces)
    assert answer.status_code == 200, answer.text
    response = answer.json()
    text = text_of(response)
    if response["status"] == "incomplete" and response["incomplete_details"]["reason"] == "interrupted":
        assert text.startswith(seen) or seen.startswith(text)
        items = server.client.get(
            f"/v1/responses/{client.response}/input_items", params={"order": "asc", "limit": 100}
        ).json()["data"]
        assert items[-1]["content"][0]["text"] == client.asked
        lost, pieces = 0, list(client.pieces)
        while len("".join(pieces)) > len(text):
            pieces.pop()
            lost += 1
        assert lost <= DRAFT_TOKENS + FLUSH_TOKENS, f"{lost} tokens of {len(client.pieces)} were lost"
        return lost
    assert response["status"] in ("completed", "incomplete") and text.startswith(
        seen
    )  # its end was stored, and not seen
    return None


def check_retried(server: RealServer, client: Client) -> bool:
    """Who did not hear the end asks again with the same key: gets one whole answer, which is in the
    conversation. Whether it was made anew.
    """
    if client.asked is None or not client.key or (client.named and not client.conversation):
        return False
    path, body = client.request
    fragment = client.response
    answer = server.post(path, body, **{"Idempotency-Key": client.key})
    assert answer.status_code == 200, answer.text
    told = answer.json()
    if client.named:
        text, usage, conversation = text_of(told), told["usage"]["output_tokens"], told["conversation"]["id"]
        assert told["status"] == "completed" or told["incomplete_details"] == {"reason": "max_output_tokens"}
        anew = bool(told["id"] != fragment)
    else:
        choice = told["choices"][0]
        text, usage, conversation = (
            choice["message"]["content"],
            told["usage"]["completion_tokens"],
            told["pensieve"]["conversation"],
        )
        assert choice["finish_reason"] in ("stop", "length")
        anew = True
    limit = body.get("max_output_tokens", body.get("max_tokens"))
    assert 0 < usage <= limit and told["pensieve"]["turn"]
    whole = told["status"] == "completed" if client.named else told["choices"][0]["finish_reason"] == "stop"
    assert whole or usage == limit, (usage, limit)
    shown = server.client.get(f"/v1/pensieve/conversations/{conversation}").json()["messages"]
    asked = [{"role": "user", "content": client.asked}, {"role": "assistant", "content": text}]
    assert [{"role": message["role"], "content": message["content"]} for message in shown] == [
        *client.said,
        *asked,
    ]
    again = server.post(path, body, **{"Idempotency-Key": client.key}).json()
    assert {**again, "output": None, "choices": None} == {**told, "output": None, "choices": None}
    client.said, client.conversation, client.asked = [*client.said, *asked], conversation, None
    return anew


def has_room(server: RealServer, client: Client) -> bool:
    """Whether one more short turn fits in the context: a fast server fills it between two kills."""
    if not client.said:
        return True
    answer = server.post("/tokenize", {"messages": client.said})
    assert answer.status_code == 200, answer.text
    return len(answer.json()["tokens"]) + 80 < MAX_CONTEXT


def check_next_turn(server: RealServer, conversation: str, num_tokens: int = 8) -> None:
    """The next turn says what a run without any cache or history says of the same tokens."""
    body = {
        "input": "And what did I ask you first?",
        "conversation": conversation,
        "max_output_tokens": num_tokens,
        "temperature": 0,
    }
    answer = server.post("/v1/responses", body)
    assert answer.status_code == 200, answer.text
    response = answer.json()
    text, num_prompt = text_of(response), response["usage"]["input_tokens"]
    with SqliteStore(server.store) as store:
        log = path_tokens(store.path("default", response["id"].removeprefix("resp_")))
        told = [
            message
            for turn in store.path("default", response["id"].removeprefix("resp_"))
            for message in turn.messages
        ]
    rest = server.post("/detokenize", {"tokens": log}).json()["prompt"]
    for message in told:  # the token log is what was said, in that order
        words = message.content.strip().rstrip("\ufffd")
        assert words in rest, (words, rest)
        rest = rest.partition(words)[2]
    salt = f"undisturbed-{random.random()}"
    undisturbed = server.client.post(
        "/v1/completions",
        json={
            "model": "smollm2",
            "prompt": log[:num_prompt],
            "max_tokens": num_tokens,
            "temperature": 0,
            "logprobs": 2,
        },
        headers={"X-Cache-Salt": salt},
    ).json()
    choice = undisturbed["choices"][0]
    assert undisturbed["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    if choice["text"] != text:
        assert nearly_tied(choice["logprobs"], text), (conversation, text, choice["text"])


def nearly_tied(logprobs: dict[str, Any], text: str) -> bool:
    """Whether two answers part where the two likeliest tokens are as good as equal."""
    so_far = ""
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        if not text.startswith(so_far + token):
            best, second = sorted(top.values(), reverse=True)
            return bool(best - second < NEAR_TIE)
        so_far += token
    return False


def all_at_once(work: Any, clients: Sequence[Client]) -> list[Any]:
    with ThreadPoolExecutor(max(1, len(clients))) as pool:
        return list(pool.map(work, clients))


def kill_again_and_again(server: RealServer, num_kills: int, rng: random.Random) -> dict[str, int]:
    """Load, kill, start, look; what was seen over all rounds."""
    seen = {"acknowledged": 0, "interrupted": 0, "most_tokens_lost": 0, "unseen": 0, "retried": 0}
    for _ in range(num_kills):
        load = Load(server, rng)
        deadline = time.monotonic() + 60
        while seen["acknowledged"] == 0 and not any(
            client.said for client in load.clients
        ):  # a busy machine may be slow to say anything
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(rng.uniform(0.05, 2.0) if rng.random() < 0.8 else rng.uniform(2.0, 7.0))
        server.kill()
        load.end()
        server.start()
        lost = all_at_once(lambda client: check_interrupted(server, client), load.clients)
        before = sum(len(client.said) for client in load.clients)
        all_at_once(lambda client: check_acknowledged(server, client), load.clients)
        check_whole(server.store)
        seen["retried"] += sum(all_at_once(lambda client: check_retried(server, client), load.clients))
        going_on = [client for client in load.clients if client.conversation and has_room(server, client)]
        all_at_once(
            lambda client: check_next_turn(server, client.conversation),
            rng.sample(going_on, min(2, len(going_on))),
        )
        server.until_idle()
        seen["acknowledged"] += before // 2
        seen["unseen"] += (sum(len(client.said) for client in load.clients) - before) // 2
        seen["interrupted"] += sum(one is not None for one in lost)
        seen["most_tokens_lost"] = max([seen["most_tokens_lost"], *(one for one in lost if one is not None)])
    return seen


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RealServer]:
    with real_server(tmp_path / "conversations.db") as running:
        yield running


def test_a_server_that_is_killed_loses_nothing_it_acknowledged(server: RealServer) -> None:
    seen = kill_again_and_again(server, 2, random.Random(7))
    assert seen["acknowledged"] > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_kills(server: RealServer) -> None:
    begun_s = time.monotonic()
    seen = kill_again_and_again(server, 100, random.Random(100))
    print(f"100 kills in {time.monotonic() - begun_s:.0f} s: {seen}")
    assert seen["acknowledged"] > 100 and seen["interrupted"] > 20


def test_an_engine_that_is_killed_is_replaced_and_its_requests_are_told(server: RealServer) -> None:
    load = Load(server, random.Random(3), lengths=(150, 200))
    whole: list[httpx.Response] = []
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Count to a thousand."}],
        "max_tokens": 300,
        "ignore_eos": True,
    }
    waiting = threading.Thread(target=lambda: whole.append(server.post("/v1/chat/completions", body)))
    try:
        waiting.start()
        deadline = time.monotonic() + 60
        while not all(client.pieces for client in load.clients):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        server.engine().kill()
        for client in load.clients:  # what they ask the next one need not last
            client.lengths = (2, 5)
        waiting.join(60)
        assert (
            whole[0].status_code == 503
            and whole[0].json()["error"]["code"] == "engine_restarted"
            and "retry-after" in whole[0].headers
        )
        while not all(client.broken for client in load.clients):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        load.end()
    assert {code for client in load.clients for code in client.broken} == {"engine_restarted"}
    server.wait_ready()
    restarts = re.search(
        r"^pensieve_engine_restarts_total (\S+)", server.client.get("/metrics").text, re.MULTILINE
    )
    assert restarts is not None and float(restarts[1]) == 1
    assert server.client.get("/ready").json()["engine_restarts"] == 1
    for client in load.clients:
        check_acknowledged(server, client)
        if client.conversation:
            check_next_turn(server, client.conversation)
    server.until_idle()
    check_whole(server.store)


def test_a_server_that_is_told_to_end_lets_answers_end(tmp_path: Path) -> None:
    with real_server(tmp_path / "conversations.db") as server:
        load = Load(server, random.Random(5), lengths=(60, 80))
        deadline = time.monotonic() + 60
        while not all(client.pieces for client in load.clients):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        server.terminate()
        late = server.client.get("/ready")
        while late.status_code == 200:  # the signal is not heard yet
            late = server.client.get("/ready")
        assert late.status_code == 503 and late.json()["status"] == "draining"
        refused = server.post("/v1/responses", {"input": "too late", "max_output_tokens": 4})
        assert (
            refused.status_code == 503
            and refused.json()["error"]["code"] == "shutting_down"
            and "retry-after" in refused.headers
        )
        load.end()
        assert server.wait() == 0
        assert all(client.asked is None and not client.broken and client.ended for client in load.clients)
        assert all(refusal == (503, "shutting_down") for client in load.clients for refusal in client.refused)
        check_whole(server.store)
        server.start()
        for client in load.clients:
            check_acknowledged(server, client)
            assert client.said
            check_next_turn(server, client.conversation)
        server.until_idle()


def until_drafted(path: Path) -> None:
    """Wait until an answer under way is in the store."""
    deadline = time.monotonic() + 60
    with SqliteStore(path) as store:
        while not store._read(lambda connection: connection.execute("SELECT 1 FROM drafts").fetchall()):
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_servers_on_one_store_and_one_that_freezes(tmp_path: Path) -> None:
    """A second one ends no answer of the first; a frozen one's are recovered after its lease, and nothing
    acknowledged changes when it wakes up.
    """
    path = tmp_path / "conversations.db"
    with real_server(path) as first:
        load = Load(first, random.Random(11), lengths=(150, 200))
        deadline = time.monotonic() + 60
        while not all(client.pieces for client in load.clients):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with real_server(path) as second:
            load.end()
            for client in load.clients:
                assert not client.broken and client.said, client.broken
                check_acknowledged(second, client)
            body = {
                "model": "smollm2",
                "messages": [{"role": "user", "content": "Count."}],
                "max_tokens": 200,
                "ignore_eos": True,
            }
            lost: list[httpx.Response] = []
            asking = threading.Thread(
                target=lambda: lost.append(
                    first.post("/v1/chat/completions", body, **{"Idempotency-Key": "frozen"})
                )
            )
            for server in (first, second):
                server.client.timeout = httpx.Timeout(
                    300.0
                )  # (20 s for the key, and an answer on a machine that does much else)
            asking.start()
            until_drafted(path)
            time.sleep(
                0.5
            )  # not in the middle of that write: a process that is frozen there holds SQLite's lock
            frozen = [
                psutil.Process(first.process.pid),
                *psutil.Process(first.process.pid).children(recursive=True),
            ]
            for process in frozen:
                process.suspend()
            answer = second.post("/v1/chat/completions", body, **{"Idempotency-Key": "frozen"})
            while answer.status_code == 409:  # it is waited for, for as long as its owner may be alive
                assert "retry-after" in answer.headers
                answer = second.post("/v1/chat/completions", body, **{"Idempotency-Key": "frozen"})
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == 200
            for process in reversed(frozen):
                process.resume()
            asking.join(60)
            assert lost[0].status_code == 503 and lost[0].json()["error"]["code"] == "answer_lost", lost[
                0
            ].text
            for server in (first, second):
                again = server.post("/v1/chat/completions", body, **{"Idempotency-Key": "frozen"}).json()
                assert (again["id"], again["choices"][0]["message"]) == (
                    answer.json()["id"],
                    answer.json()["choices"][0]["message"],
                )
                for client in load.clients:
                    check_acknowledged(server, client)
            first.wait_ready()
            assert (
                first.post("/v1/chat/completions", body | {"max_tokens": 4}).status_code == 200
            )  # it goes on under a new lease
    check_whole(path)


def test_a_restart_on_another_port_recovers_at_once(tmp_path: Path) -> None:
    """`real_server` asks for any free port, so each start has another one."""
    with real_server(tmp_path / "conversations.db") as server:
        created = server.post(
            "/v1/responses",
            {"input": "Count.", "max_output_tokens": 400, "ignore_eos": True, "background": True},
        ).json()
        deadline = time.monotonic() + 60
        while server.client.get(f"/v1/responses/{created['id']}").json()["status"] != "in_progress":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)  # (its draft is written with its first token)
        url = server.url
        server.kill()
        server.start()
        assert server.url != url
        found = server.client.get(f"/v1/responses/{created['id']}").json()
        assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "interrupted"})
        check_whole(server.store)
