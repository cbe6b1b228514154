"""What HTTP costs: the server against its own engine without it, idle streams, and the time to start.

    python benchmarks/server.py [--parts start,throughput,first-token,idle] [--rounds 5] [--model smollm2]

The engine runs in a process of its own both ways. A: this process posts token ids to it and counts tokens. B: `pensieve serve` in front of an
engine of its own, and a client (a process of its own) that reads bytes from sockets and parses no more than it must. A and B take turns
(A B A B ...) after a warm-up; medians and ratios of neighbours. The last line is JSON. The client's own CPU time is told: on two cores it
runs at the engine's expense.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import queue
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from common import commit

from pensieve.core.request import SamplingParams
from pensieve.engine.messages import Event, Failed, Finished, Submit, Token
from pensieve.engine.process import EngineProcess
from pensieve.runtime.engine_main import run as engine_main
from pensieve.runtime.options import Options

WORDS = [
    "river",
    "stone",
    "cloud",
    "apple",
    "window",
    "yellow",
    "music",
    "paper",
    "garden",
    "winter",
    "light",
    "bridge",
    "silver",
    "engine",
    "story",
    "table",
]
STREAMS, PROMPT_WORDS, OUTPUT_TOKENS = 16, 60, 64
SETTLE_S = 0.2  # after each run: an engine's threads spin for a while before they sleep, at the expense of the other one's first step


def content_of(seed: int, index: int) -> str:
    """What one user asks: never the same twice in a run, so that nothing is cached."""
    rng = random.Random(f"{seed}-{index}")
    return f"{seed} {index} " + " ".join(rng.choice(WORDS) for _ in range(PROMPT_WORDS))


# -- A: the engine alone


@dataclass
class Alone:
    """An engine in its own process, and this one that posts to it. What was answered stays cached, as it does in the server."""

    options: Options
    events: queue.SimpleQueue[tuple[float, list[Event]]] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        self.process = EngineProcess(
            engine_main, (self.options,), emit=lambda events: self.events.put((time.perf_counter(), events))
        )
        self.info = self.process.ready(300)
        self._count = 0

    def answer(self, prompts: list[tuple[int, ...]], tokens: int) -> tuple[float, list[float]]:
        """Seconds until each prompt has an answer of `tokens` tokens, and each one's time to first token."""
        names = [f"alone-{self._count}-{index}" for index in range(len(prompts))]
        self._count += 1
        begun_s = time.perf_counter()
        for name, prompt in zip(names, prompts, strict=True):
            self.process.post(Submit(name, name, "bench", prompt, 0, SamplingParams(max_new_tokens=tokens)))
        first: dict[str, float] = {}
        waiting = set(names)
        now_s = begun_s
        while waiting:
            now_s, events = self.events.get(timeout=120)
            for event in events:
                if isinstance(event, Token):
                    first.setdefault(event.request_id, now_s - begun_s)
                elif isinstance(event, Finished):
                    waiting.discard(event.request_id)
                elif isinstance(event, Failed):
                    raise SystemExit(f"the engine failed: {event.message}")
        return now_s - begun_s, list(first.values())

    def close(self) -> None:
        self.process.close()


# -- B: through the server


class Served:
    """`pensieve serve`, and a client process."""

    def __init__(self, arguments: list[str]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        command = [
            sys.executable,
            "-m",
            "pensieve",
            "serve",
            "--port",
            "0",
            "--store",
            f"{self.folder.name}/bench.db",
            "--max-open",
            "700",
        ]
        begun_s = time.perf_counter()
        self.process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "listening at" in line:
                self.url = line.split("listening at ")[1].split()[0]
                break
        else:
            raise SystemExit("the server did not start")
        with urllib.request.urlopen(self.url + "/ready") as response:
            assert response.status == 200
        self.ready_s = time.perf_counter() - begun_s
        self.port = int(self.url.rpartition(":")[2])
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._client = context.Process(target=_client, args=(there, self.port), daemon=True)
        self._client.start()

    def prompts(self, streams: int, seed: int) -> list[tuple[int, ...]]:
        """The tokens of what the client asks: the engine alone is given the same."""
        return [tuple(self._tokenize(content_of(seed, index))) for index in range(streams)]

    def _tokenize(self, content: str) -> list[int]:
        body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
        request = urllib.request.Request(self.url + "/tokenize", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            tokens: list[int] = json.loads(response.read())["tokens"]
        return tokens

    def do(self, what: str, **arguments: Any) -> Any:
        """Have the client do something."""
        self._here.send((what, arguments))
        return self._here.recv()

    def close(self) -> None:
        self._client.terminate()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.folder.cleanup()


def _client(pipe: Any, port: int) -> None:
    client = Client(port)
    loop = asyncio.new_event_loop()
    while True:
        what, arguments = pipe.recv()
        cpu_s = time.process_time()
        result = loop.run_until_complete(getattr(client, what)(**arguments))
        pipe.send((result, time.process_time() - cpu_s))


class Client:
    """Reads streams as bytes."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._idle: list[asyncio.Task[Any]] = []

    async def answer(self, streams: int, tokens: int, seed: int) -> tuple[float, list[float]]:
        """As `Alone.answer`, over HTTP: `streams` answers at once."""
        begun_s = time.perf_counter()
        firsts = await asyncio.gather(*(self._chat(index, tokens, seed, begun_s) for index in range(streams)))
        return time.perf_counter() - begun_s, list(firsts)

    async def open_idle(self, streams: int) -> int:
        """Streams that wait behind a long answer of their conversation, and get nothing meanwhile."""
        made = await self._call("POST", "/v1/conversations", {})
        for index in range(streams):
            body = {
                "input": "wait",
                "conversation": made["id"],
                "max_output_tokens": 4000 if index == 0 else 1,
                "stream": True,
                "ignore_eos": True,
            }
            self._idle.append(asyncio.ensure_future(self._stream("/v1/responses", body, None)))
            if index == 0:
                await asyncio.sleep(0.5)
        await asyncio.sleep(8.0)  # every stream has begun
        return sum(not task.done() for task in self._idle)

    async def close_idle(self) -> None:
        """Leave them."""
        for task in self._idle:
            task.cancel()
        await asyncio.gather(*self._idle, return_exceptions=True)
        self._idle.clear()

    async def _chat(self, index: int, tokens: int, seed: int, begun_s: float) -> float:
        body = {
            "model": "smollm2",
            "messages": [{"role": "user", "content": content_of(seed, index)}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,  # (a token drawn at random may be half a character, which shows nothing yet)
            "stream": True,
        }
        first_s: list[float] = []

        def on_bytes(chunk: bytes) -> None:
            if not first_s and b'"content":"' in chunk and b'"content":""' not in chunk.split(b"\n\n")[-2]:
                first_s.append(time.perf_counter() - begun_s)

        await self._stream("/v1/chat/completions", body, on_bytes)
        return first_s[0]

    async def _stream(
        self, path: str, body: dict[str, Any], on_bytes: Callable[[bytes], None] | None
    ) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
        try:
            text = json.dumps(body).encode()
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\nConnection: close\r\n\r\n"
            writer.write(head.encode() + text)
            status = await reader.readline()
            if b" 200 " not in status:
                raise SystemExit(f"{path} answered {status!r}: {await reader.read(2000)!r}")
            while chunk := await reader.read(1 << 16):
                if on_bytes is not None:
                    on_bytes(chunk)
        finally:
            writer.close()

    async def _call(self, method: str, path: str, body: dict[str, Any]) -> Any:
        def call() -> Any:
            request = urllib.request.Request(
                f"http://127.0.0.1:{self.port}{path}",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
                method=method,
            )
            with urllib.request.urlopen(request) as response:
                return json.loads(response.read())

        return await asyncio.to_thread(call)


# -- the parts


def _turns(rounds: int, a: Callable[[int], Any], b: Callable[[int], Any]) -> tuple[list[Any], list[Any]]:
    results: tuple[list[Any], list[Any]] = ([], [])
    for round_ in range(rounds):
        for which, run in enumerate((a, b)):
            results[which].append(run(round_))
            time.sleep(SETTLE_S)
    return results


def throughput(alone: Alone, served: Served, rounds: int) -> dict[str, Any]:
    alone.answer(served.prompts(STREAMS, -1), 16)
    served.do("answer", streams=STREAMS, tokens=16, seed=-1)
    prompts = [served.prompts(STREAMS, round_) for round_ in range(rounds)]
    a, b = _turns(
        rounds,
        lambda round_: alone.answer(prompts[round_], OUTPUT_TOKENS)[0],
        lambda round_: served.do("answer", streams=STREAMS, tokens=OUTPUT_TOKENS, seed=round_),
    )
    b_s, cpu_s = [result[0][0] for result in b], [result[1] for result in b]
    tokens = STREAMS * OUTPUT_TOKENS
    return {
        "streams": STREAMS,
        "output_tokens": OUTPUT_TOKENS,
        "engine_tokens_per_s": tokens / statistics.median(a),
        "server_tokens_per_s": tokens / statistics.median(b_s),
        "added_share": statistics.median(y / x for x, y in zip(a, b_s, strict=True)) - 1,
        "client_cpu_s": statistics.median(cpu_s),
        "client_cpu_share": statistics.median(c / s for c, s in zip(cpu_s, b_s, strict=True)),
        "rounds": {"engine_s": a, "server_s": b_s},
    }


def first_token(alone: Alone, served: Served, rounds: int) -> dict[str, Any]:
    prompts = [served.prompts(1, 1000 + round_) for round_ in range(4 * rounds)]
    a, b = _turns(
        4 * rounds,
        lambda round_: alone.answer(prompts[round_], 2)[1][0],
        lambda round_: served.do("answer", streams=1, tokens=2, seed=1000 + round_)[0][1][0],
    )
    a, b = a[2:], b[2:]  # the first ones warm up
    return {
        "engine_ms": 1e3 * statistics.median(a),
        "server_ms": 1e3 * statistics.median(b),
        "added_ms": 1e3 * (statistics.median(b) - statistics.median(a)),
        "n": len(a),
    }


def idle(served: Served, rounds: int) -> dict[str, Any]:
    """Eight streams answer while 500 others wait, and while one does (the long answer itself runs in both cases)."""
    seconds: dict[int, list[float]] = {1: [], 500: []}
    for round_ in range(rounds):
        for streams in seconds:
            opened, _ = served.do("open_idle", streams=streams)
            assert opened == streams, f"{opened} of {streams} streams are open"
            seconds[streams].append(
                served.do("answer", streams=8, tokens=OUTPUT_TOKENS, seed=2000 + 10 * round_ + streams)[0][0]
            )
            served.do("close_idle")
            time.sleep(1.0)
    return {
        "busy_streams": 8,
        "seconds_beside_1": statistics.median(seconds[1]),
        "seconds_beside_500": statistics.median(seconds[500]),
        "added_share": statistics.median(y / x for x, y in zip(seconds[1], seconds[500], strict=True)) - 1,
        "rounds": {str(key): value for key, value in seconds.items()},
    }


def start(arguments: list[str], rounds: int) -> dict[str, Any]:
    seconds = []
    for _ in range(rounds + 1):
        served = Served(arguments)
        seconds.append(served.ready_s)
        served.close()
    return {"ready_s": statistics.median(seconds[1:]), "n": rounds, "all": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="start,throughput,first-token,idle")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="smollm2")
    options = parser.parse_args()
    parts = options.parts.split(",")
    arguments = ["--model", options.model]
    report: dict[str, Any] = {
        "benchmark": "server",
        "commit": commit(),
        "model": options.model,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    if "start" in parts:
        report["start"] = start(arguments, options.rounds)
        print(f"start: {json.dumps(report['start'])}", file=sys.stderr)
    if set(parts) & {"throughput", "first-token", "idle"}:
        served = Served(arguments)
        alone = Alone(Options(model=options.model)) if set(parts) & {"throughput", "first-token"} else None
        try:
            for name, run in (("throughput", throughput), ("first-token", first_token)):
                if name in parts:
                    assert alone is not None
                    report[name] = run(alone, served, options.rounds)
                    print(f"{name}: {json.dumps(report[name])}", file=sys.stderr)
            if "idle" in parts:
                report["idle"] = idle(served, options.rounds)
                print(f"idle: {json.dumps(report['idle'])}", file=sys.stderr)
        finally:
            served.close()
            if alone is not None:
                alone.close()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
