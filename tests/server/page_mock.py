"""A server that only pretends: the HTTP interface the page uses, over made-up conversations that move between
tiers.

Standard library only, so that the page can be tested (and looked at: `python tests/server/page_mock.py`)
without an engine. Knows nothing of models: answers are words from a list, receipts follow from the made-up
cells.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mimetypes
import random
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

STATIC = Path(__file__).parents[2] / "src/pensieve/server/static"
CSP = "default-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self' data:"
CHUNK_TOKENS = 32
CHUNK_BYTES = 720_896
TOPICS = (
    "a trip to Lisbon",
    "sourdough",
    "tail latency",
    "a haiku",
    "tax forms",
    "bird songs",
    "old maps",
    "kernel panics",
    "chess openings",
    "the moon",
)
OPENINGS = (
    "Tell me about",
    "Plan",
    "Explain",
    "Compare two books on",
    "Write a poem about",
    "Debug my notes on",
    "What is known of",
)
ANSWER = "the answer to this is short but it takes a few words to say so plainly and in order that each one can be seen to arrive"
WORDS = ANSWER.split()


@dataclass
class Conversation:
    """One made-up conversation."""

    id: str
    title: str
    cells: str
    tokens: int
    last_active_s: float
    messages: list[dict[str, str]] = field(default_factory=list)
    pinned: bool = False
    active: bool = False
    created_s: int = 0


class Refused(Exception):
    """Answer with this status and message."""

    def __init__(self, status: int, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


class World:
    """All conversations and counters. Every method is called under the lock of `PageMock`."""

    def __init__(self, num_conversations: int, max_chunks: int, seed: int = 7) -> None:
        self.random = random.Random(seed)
        self.conversations: dict[str, Conversation] = {}
        self.counters = dict.fromkeys(
            ("steps", "gpu_tokens", "cpu_tokens", "recomputed_tokens", "new_tokens", "output_tokens"), 0
        )
        self.counters |= dict.fromkeys(
            ("bytes_in", "bytes_out", "chunks_reclaimed", "chunks_dropped", "suspensions"), 0
        )
        self.moving = False  # the cells of idle conversations too
        self.moved_s = time.time()
        for i in range(num_conversations):
            self.add_made_up(i, max_chunks)
        self.slots = {
            name: 256 + int(room * held)
            for (name, held), room in zip(self.held().items(), (1.2, 1.4, 2.5), strict=True)
        }
        if num_conversations:
            self.counters |= {
                "gpu_tokens": 61_000,
                "cpu_tokens": 21_000,
                "recomputed_tokens": 6_200,
                "new_tokens": 17_000,
            }

    def add_made_up(self, i: int, max_chunks: int) -> None:
        chunks = max_chunks if i == 3 else max(1, int(max_chunks * self.random.random() ** 2))
        fresh = 0.5 ** (i / 120)  # the longer ago, the lower it lies
        cuts = sorted(
            int(chunks * min(1, self.random.random() * (1.6 - fresh) ** 2 * share))
            for share in (0.4, 0.9, 1.6)
        )
        dropped, disk, cpu = cuts
        both = min(chunks, cpu + int(0.25 * chunks))
        cells = (
            "." * dropped
            + "d" * (disk - dropped)
            + "c" * (cpu - disk)
            + "b" * (both - cpu)
            + "g" * (chunks - both)
        )
        if i % 5 == 1 and chunks > 4:
            cells = cells[:4].upper() + cells[4:]
        conversation = Conversation(
            id=f"conv_{i:04d}",
            title=f"{self.random.choice(OPENINGS)} {self.random.choice(TOPICS)}",
            cells=cells,
            tokens=chunks * CHUNK_TOKENS - self.random.randrange(CHUNK_TOKENS),
            last_active_s=time.time() - 1.5 * i * (1 + i / 30),
            pinned=i in (2, 9),
            active=i < 2,
            created_s=int(time.time()) - 60 * i - 60,
        )
        conversation.messages = [
            {"role": "user", "content": conversation.title},
            {"role": "assistant", "content": f"Gladly. {ANSWER}"},
        ]
        self.conversations[conversation.id] = conversation

    def latest_first(self) -> list[Conversation]:
        return sorted(self.conversations.values(), key=lambda c: (-c.active, -c.last_active_s))

    def get(self, conversation_id: str) -> Conversation:
        if conversation_id not in self.conversations:
            raise Refused(404, f"no conversation {conversation_id!r}")
        return self.conversations[conversation_id]

    def move(self) -> None:
        """Let about a second's worth of copying and computing happen, however often it is called."""
        if not self.moving or time.time() - self.moved_s < 0.9:
            return
        self.moved_s = time.time()
        latest = self.latest_first()
        for conversation in latest[:2]:
            conversation.cells = conversation.cells.replace(">", "b").replace("*", "g")
            conversation.cells = (
                conversation.cells.replace("c", ">", 3).replace("d", ">", 1).replace(".", "*", 2)
            )
            conversation.last_active_s = time.time()
        for conversation in self.random.sample(latest[2:], min(12, max(0, len(latest) - 2))):
            if conversation.pinned:
                continue
            before = conversation.cells
            conversation.cells = before.replace("c", ".", 1).replace("b", "c", 1).replace("g", "b", 2)
            self.counters["chunks_dropped"] += before.count("c") > 0
            self.counters["chunks_reclaimed"] += 1
        self.counters["bytes_in"] += int(CHUNK_BYTES * 4 * self.random.random())
        self.counters["bytes_out"] += int(CHUNK_BYTES * 40 * self.random.random())
        self.counters["gpu_tokens"] += 300
        self.counters["steps"] += 20

    def held(self) -> dict[str, int]:
        """Slots taken, by tier."""
        cells = "".join(c.cells for c in self.conversations.values()).lower()
        both = cells.count("b")
        return {
            "gpu": cells.count("g") + both + cells.count("*") + cells.count(">"),
            "cpu": cells.count("c") + both,
            "disk": cells.count("d"),
        }

    # -- answers

    def row(self, conversation: Conversation) -> dict[str, Any]:
        missing = sum(conversation.cells.lower().count(code) for code in "cd.")
        return {
            **{
                "id": conversation.id,
                "title": conversation.title,
                "cells": conversation.cells,
                "tokens": conversation.tokens,
            },
            **{
                "idle_s": max(0.0, time.time() - conversation.last_active_s),
                "active": conversation.active,
                "pinned": conversation.pinned,
            },
            "resume_ms": 1.7 * missing,
        }

    def map(self, offset: int, limit: int) -> dict[str, Any]:
        self.move()
        latest = self.latest_first()
        held = self.held()
        both = sum(c.cells.lower().count("b") for c in latest)
        tiers = [
            {
                "name": name,
                "num_slots": slots,
                "used": held[name],
                "reclaimable": both if name == "gpu" else 0,
                "free": slots - held[name],
            }
            for name, slots in self.slots.items()
        ]
        sources = {name: self.counters[f"{name}_tokens"] for name in ("gpu", "cpu", "recomputed", "new")}
        prompt_tokens = sum(sources.values()) or 1
        stats = {
            **self.counters,
            **{
                "waiting": self.random.randrange(3),
                "running": sum(c.active for c in latest),
                "sequences": len(latest),
                "chunks": sum(held.values()) - both,
            },
            "hit_rates": {name: tokens / prompt_tokens for name, tokens in sources.items()},
        }
        rows = [self.row(c) for c in latest[offset : offset + limit]]
        return {
            "now": time.time(),
            "chunk_tokens": CHUNK_TOKENS,
            "total": len(latest),
            "tiers": tiers,
            "stats": stats,
            "rows": rows,
        }

    def listing(self, conversation: Conversation) -> dict[str, Any]:
        row = self.row(conversation)
        times = {
            "created_at": conversation.created_s,
            "updated_at": int(conversation.last_active_s),
            "expires_at": None,
        }
        return {**{key: row[key] for key in ("id", "title", "pinned", "cells", "resume_ms")}, **times}

    def create(self, title: str = "", cells: str = "", tokens: int = 0) -> Conversation:
        conversation = Conversation(
            f"conv_new_{len(self.conversations)}_{self.random.randrange(10**6)}",
            title,
            cells,
            tokens,
            time.time(),
        )
        conversation.created_s = int(time.time())
        self.conversations[conversation.id] = conversation
        return conversation

    def begin_turn(self, conversation: Conversation, words: str) -> dict[str, Any]:
        """The receipt's token counts and misses, as the cells have it; then all cells are on the gpu."""
        new_tokens = 20 + len(words)
        cells = conversation.cells.lower()
        at = {code: cells.count(code) * CHUNK_TOKENS for code in "cd."}
        misses: list[dict[str, Any]] = []
        if at["."]:
            other = next((c.id for c in self.latest_first() if c is not conversation), None)
            misses.append(
                {"start": 0, "stop": at["."], "why": "dropped", "at": time.time() - 12, "by": other}
            )
        if at["c"] + at["d"]:
            misses.append(
                {
                    "start": at["."],
                    "stop": at["."] + at["c"] + at["d"],
                    "why": "on_cpu",
                    "at": None,
                    "by": None,
                }
            )
        misses.append(
            {
                "start": conversation.tokens,
                "stop": conversation.tokens + new_tokens,
                "why": "new",
                "at": None,
                "by": None,
            }
        )
        counts = {
            "gpu_tokens": max(0, conversation.tokens - sum(at.values())),
            **{"cpu_tokens": at["c"] + at["d"], "recomputed_tokens": at["."], "new_tokens": new_tokens},
        }
        for name, count in counts.items():
            self.counters[name] += count
        conversation.title = conversation.title or words[:40]
        conversation.messages.append({"role": "user", "content": words})
        conversation.tokens += new_tokens
        conversation.active = True
        self.grow(conversation, "*")
        return {**counts, "bytes_in": at["c"] * 22_528, "bytes_out": 0, "misses": misses, "warning": None}

    def grow(self, conversation: Conversation, code: str) -> None:
        chunks = -(-conversation.tokens // CHUNK_TOKENS)
        resident = "".join({"c": "b", "d": "b", ".": "g"}.get(cell, cell) for cell in conversation.cells)
        conversation.cells = resident.ljust(chunks, code)
        conversation.last_active_s = time.time()

    def end_turn(self, conversation: Conversation, answer: str, output_tokens: int) -> None:
        conversation.messages.append({"role": "assistant", "content": answer})
        conversation.tokens += output_tokens
        conversation.active = False
        conversation.cells = conversation.cells.replace("*", "g")
        self.grow(conversation, "g")
        self.counters["output_tokens"] += output_tokens


class PageMock:
    """The server itself. Tests turn its knobs and read `requests`.

    Args:
        num_conversations, max_chunks: of the made-up world.
        keys: API keys; empty = none needed.
        token_delay_s: between two tokens of an answer.
        port: 0 = any free one.
    """

    def __init__(
        self,
        num_conversations: int = 12,
        max_chunks: int = 60,
        keys: tuple[str, ...] = (),
        token_delay_s: float = 0.01,
        port: int = 0,
    ) -> None:
        self.world = World(num_conversations, max_chunks)
        self.keys = keys
        self.token_delay_s = token_delay_s
        self.answer: Callable[[str], list[str]] = lambda words: [
            f"{word} " for word in (*WORDS, "you", "said", words)
        ]
        self.busy_answers = 0  # so many turns are refused with 429 first
        self.gone = False  # connections that are still open get no answer
        self.restarting = False  # /ready and the map say 503
        self.requests: list[tuple[str, str, Any]] = []  # (method, path, body)
        self.disconnected = threading.Event()  # a reader of an answer went away
        self.lock = threading.Lock()
        mock = self

        class BoundHandler(Handler):
            pass

        BoundHandler.mock = mock
        self.http = ThreadingHTTPServer(("127.0.0.1", port), BoundHandler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    def __enter__(self) -> PageMock:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.gone = True
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def count(self, method: str, ending: str) -> int:
        return sum(m == method and path.endswith(ending) for m, path, _ in self.requests)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    mock: PageMock
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request()

    do_POST = do_DELETE = do_GET

    def handle_request(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length)) if length else None
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        query = {name: int(values[0]) for name, values in urllib.parse.parse_qs(url.query).items()}
        if self.mock.gone:
            self.close_connection = True
            return
        with self.mock.lock:
            self.mock.requests.append((self.command, path, body))
        try:
            if path == "/" or path.startswith("/static/"):
                self.send_file(path)
                return
            if (
                self.mock.keys
                and path.startswith("/v1/")
                and self.headers.get("Authorization", "").removeprefix("Bearer ") not in self.mock.keys
            ):
                raise Refused(401, "an API key is needed: Authorization: Bearer KEY")
            if (self.command, path) == ("POST", "/v1/responses"):
                assert body is not None
                self.stream(body)
                return
            with self.mock.lock:
                answer = self.answer(path, query, body)
            self.send_json(200, answer)
        except Refused as refused:
            headers = {"Retry-After": str(refused.retry_after_s)} if refused.retry_after_s else {}
            error = {"message": str(refused), "type": "error", "param": None, "code": None}
            self.send_json(refused.status, {"error": error}, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.mock.disconnected.set()
            self.close_connection = True

    def answer(self, path: str, query: dict[str, int], body: Any) -> dict[str, Any]:
        world = self.mock.world
        parts = path.strip("/").split("/")
        match (self.command, parts):
            case ("GET", ["ready"]) | ("GET", ["v1", "pensieve", "map"]) if self.mock.restarting:
                raise Refused(503, "the engine is being restarted")
            case ("GET", ["ready"]):
                return {"status": "ready"}
            case ("GET", ["v1", "models"]):
                return {"object": "list", "data": [{"id": "made-up-135m", "object": "model"}]}
            case ("GET", ["v1", "pensieve", "map"]):
                return world.map(query["offset"], query["limit"])
            case ("GET", ["v1", "pensieve", "conversations"]):
                latest = sorted(world.conversations.values(), key=lambda c: -c.last_active_s)
                page = latest[query["offset"] : query["offset"] + query["limit"]]
                return {"object": "list", "data": [world.listing(c) for c in page], "total": len(latest)}
            case ("GET", ["v1", "pensieve", "conversations", conversation_id]):
                conversation = world.get(conversation_id)
                return {**world.listing(conversation), "messages": conversation.messages}
            case ("DELETE", ["v1", "pensieve", "conversations", conversation_id]):
                conversation = world.get(conversation_id)
                del world.conversations[conversation_id]
                kv_bytes = CHUNK_BYTES * len(conversation.cells.replace(".", ""))
                return {"id": conversation_id, "deleted": True, "kv_bytes": kv_bytes, "store_bytes": 4_321}
            case ("POST", ["v1", "conversations"]):
                return {
                    "id": world.create().id,
                    "object": "conversation",
                    "created_at": int(time.time()),
                    "metadata": {},
                }
            case ("POST", ["v1", "pensieve", "conversations", conversation_id, verb]):
                return self.hint(world.get(conversation_id), verb)
        raise Refused(404, f"nothing at {path}")

    def hint(self, conversation: Conversation, verb: str) -> dict[str, Any]:
        world = self.mock.world
        match verb:
            case "warm":
                chunks = sum(conversation.cells.lower().count(code) for code in "cd")
                conversation.cells = "".join(
                    {"c": ">", "d": ">", "C": ">"}.get(cell, cell) for cell in conversation.cells
                )
                return {"id": conversation.id, "chunks": chunks}
            case "idle":
                return {"id": conversation.id, "chunks": len(conversation.cells)}
            case "pin" if "cannot be pinned" in conversation.title:
                raise Refused(
                    409, "pins are bounded to half of the disk tier: unpin another conversation first"
                )
            case "pin" | "unpin":
                conversation.pinned = verb == "pin"
                return {
                    "id": conversation.id,
                    "pinned": conversation.pinned,
                    "chunks": len(conversation.cells),
                }
            case "fork":
                fork = world.create(
                    f"{conversation.title} (fork)", conversation.cells.upper(), conversation.tokens
                )
                fork.messages = list(conversation.messages)
                return world.listing(fork)
        raise Refused(404, f"no action {verb!r}")

    def stream(self, body: dict[str, Any]) -> None:
        world, started_s = self.mock.world, time.time()
        with self.mock.lock:
            if self.mock.busy_answers > 0:
                self.mock.busy_answers -= 1
                raise Refused(429, "the queue is full", retry_after_s=1)
            conversation = world.get(body["conversation"])
            receipt = world.begin_turn(conversation, body["input"])
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.send_event("response.created", {"response": {"status": "in_progress"}})
        words = self.mock.answer(body["input"])
        first_s = None
        sent = []
        try:
            for word in words:
                time.sleep(self.mock.token_delay_s)
                if word == "<fail>":
                    self.send_event(
                        "response.failed",
                        {
                            "response": {
                                "error": {"code": "forward_failed", "message": "the forward pass failed"}
                            }
                        },
                    )
                    return
                self.send_event("response.output_text.delta", {"delta": word})
                first_s = first_s or time.time()
                sent.append(word)
        finally:
            with self.mock.lock:
                world.end_turn(conversation, "".join(sent), len(sent))
        receipt |= {
            "queue_ms": 1.0,
            "first_token_ms": 1000 * ((first_s or started_s) - started_s),
            "total_ms": 1000 * (time.time() - started_s),
        }
        self.send_event(
            "response.completed",
            {"response": {"status": "completed", "usage": {"output_tokens": len(sent)}, "pensieve": receipt}},
        )
        self.close_connection = True

    # -- sending

    def send_event(self, name: str, data: dict[str, Any]) -> None:
        self.wfile.write(f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode())
        self.wfile.flush()

    def send_json(self, status: int, answer: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self.send_body(status, "application/json", json.dumps(answer).encode(), headers or {})

    def send_file(self, path: str) -> None:
        file = STATIC / ("index.html" if path == "/" else path.removeprefix("/static/"))
        if file.parent != STATIC or not file.is_file():
            raise Refused(404, f"no file {path}")
        kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        self.send_body(
            200,
            kind,
            file.read_bytes(),
            {"Content-Security-Policy": CSP, "X-Content-Type-Options": "nosniff"},
        )

    def send_body(self, status: int, kind: str, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8800)
    parser.add_argument("--conversations", type=int, default=1000)
    parser.add_argument("--chunks", type=int, default=250)
    options = parser.parse_args()
    with PageMock(options.conversations, options.chunks, token_delay_s=0.05, port=options.port) as mock:
        mock.world.moving = True
        print(f"the page is at {mock.url}, Ctrl-C ends it")
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
