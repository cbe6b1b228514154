"""What a long run leaves in memory: turns of random lengths against a real server, and the memory of its two processes as they go on.

    python benchmarks/soak.py [--dtypes float32,bfloat16,int8] [--turns 10000] [--warm-up 3000] [--logprobs] [--threads 1]

A model of two small layers with the default model's tokenizer, so that a turn takes milliseconds. Everything bounded is full after the warm-up:
both tiers, the paths that are remembered, the answers that are kept. Then the resident memory is noted every 250 turns, and the slope is the
line of least squares through it, in MB (10^6 bytes) per 1,000 turns. The last line is JSON; the exit code is 1 if a slope is above --most.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from server import WORDS

CLIENTS = 4
MARK_TURNS = 250
MOST_WORDS, MOST_TOKENS, MOST_MESSAGES = 300, 8, 9
CONTEXT = 2048


def make_model(folder: Path) -> None:
    """A Llama of two layers whose weights are random, and the default model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from pensieve.worker.weights import resolve

    found = resolve(
        "smollm2",
        "auto",
        dtype="float32",
        device="cpu",
        allow_random=False,
        progress=lambda what, share: None,
    )
    tokenizer = AutoTokenizer.from_pretrained(found.tokenizer_dir)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=found.config.vocab_size, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Server:
    """`pensieve serve` and the memory of its processes."""

    def __init__(self, model: Path, store: Path, options: list[str]) -> None:
        self.last_lines: list[str] = []
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "pensieve", "serve", "--port", "0", "--model", str(model), "--store", f"sqlite:///{store}",
                "--gpu-cache", "0.02", "--cpu-cache", "0.02", "--max-context", str(CONTEXT), *options,
            ],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        self.url = ""
        for line in self._process.stdout:
            self.last_lines = [*self.last_lines[-20:], line.rstrip()]
            if found := re.search(r"listening at (http://\S+)", line):
                self.url = found[1]
                break
        if not self.url:
            raise SystemExit("the server did not start:\n" + "\n".join(self.last_lines))
        threading.Thread(target=self._listen, daemon=True).start()
        self.front = psutil.Process(self._process.pid)
        self.engine = max(self.front.children(recursive=True), key=lambda child: child.memory_info().rss)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.last_lines = [*self.last_lines[-20:], line.rstrip()]

    def rss_mb(self) -> tuple[float, float]:
        """Of the front end and of the engine."""
        return self.front.memory_info().rss / 1e6, self.engine.memory_info().rss / 1e6

    def end(self) -> None:
        self._process.terminate()
        self._process.wait(120)


@dataclass
class Load:
    """Clients that ask until so many turns are answered."""

    url: str
    logprobs: bool
    seed: int
    num_done: int = 0
    num_failed: int = 0
    stop_at: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, num_turns: int) -> None:
        """Answer so many more turns."""
        self.stop_at = self.num_done + num_turns
        threads = [
            threading.Thread(target=self._client, args=(self.seed + self.num_done * CLIENTS + index,))
            for index in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self, seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=self.url, timeout=300.0) as client:
            messages: list[dict[str, str]] = []
            while self._another():
                if len(messages) >= MOST_MESSAGES or rng.random() < 0.3:
                    messages = []
                num_words = rng.randint(1, MOST_WORDS) if rng.random() < 0.5 else rng.randint(1, 20)
                messages.append({"role": "user", "content": " ".join(rng.choices(WORDS, k=num_words))})
                answer = self._ask(client, rng, messages)
                if answer is None:
                    messages = []
                    continue
                messages.append({"role": "assistant", "content": answer})

    def _another(self) -> bool:
        with self.lock:
            self.num_done += 1
            return self.num_done <= self.stop_at

    def _ask(self, client: httpx.Client, rng: random.Random, messages: list[dict[str, str]]) -> str | None:
        body: dict[str, Any] = {
            "model": "tiny",
            "messages": messages,
            "max_tokens": rng.randint(1, MOST_TOKENS),
            "ignore_eos": True,
        }
        body |= rng.choice(
            [
                {"temperature": 0},
                {"temperature": 1.0, "top_p": 0.9},
                {"temperature": 0.8, "top_k": rng.randint(1, 200)},
            ]
        )
        if self.logprobs:
            body |= {"logprobs": True, "top_logprobs": 20}
        if stream := rng.random() < 0.25:
            body["stream"] = True
        response = client.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            with self.lock:
                self.num_failed += 1
            if self.num_failed > 20:
                raise SystemExit(f"turns fail: {response.status_code} {response.text[:300]}")
            return None
        if stream:
            deltas = [
                json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")
            ]
            return "".join(
                choice["delta"].get("content") or ""
                for delta in deltas
                for choice in delta.get("choices", [])
            )
        content: str | None = response.json()["choices"][0]["message"]["content"]
        return content


def slope(marks: list[tuple[int, float]]) -> float:
    """Of the line of least squares, MB per 1,000 turns."""
    mean_x = sum(x for x, _ in marks) / len(marks)
    mean_y = sum(y for _, y in marks) / len(marks)
    spread = sum((x - mean_x) ** 2 for x, _ in marks)
    return 1000 * sum((x - mean_x) * (y - mean_y) for x, y in marks) / spread


def soak(dtype: str, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One server: warmed up, then watched."""
    options = ["--threads", str(arguments.threads), "--name", "tiny"]
    options += ["--quantize", "int8"] if dtype == "int8" else ["--dtype", dtype]
    with tempfile.TemporaryDirectory() as folder:
        server = Server(model, Path(folder) / "store.db", options)
        try:
            load = Load(server.url, arguments.logprobs, arguments.seed)
            started = server.rss_mb()
            load.run(arguments.warm_up)
            marks = [(0, *server.rss_mb())]
            begun_s = time.monotonic()
            for done in range(MARK_TURNS, arguments.turns + 1, MARK_TURNS):
                load.run(MARK_TURNS)
                marks.append((done, *server.rss_mb()))
                if done % 1000 == 0:
                    print(
                        f"{dtype}: {done} turns, front {marks[-1][1]:.0f} MB, engine {marks[-1][2]:.0f} MB",
                        flush=True,
                    )
            return {
                "dtype": dtype,
                "logprobs": arguments.logprobs,
                "turns": arguments.turns,
                "turns_per_s": round(arguments.turns / (time.monotonic() - begun_s), 1),
                "failed": load.num_failed,
                "front_mb": {
                    "start": round(started[0]),
                    "warm": round(marks[0][1]),
                    "end": round(marks[-1][1]),
                },
                "engine_mb": {
                    "start": round(started[1]),
                    "warm": round(marks[0][2]),
                    "end": round(marks[-1][2]),
                },
                "front_slope": round(slope([(x, front) for x, front, _ in marks]), 3),
                "engine_slope": round(slope([(x, engine) for x, _, engine in marks]), 3),
            }
        finally:
            server.end()


def main() -> None:
    """Soak each number type in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dtypes", default="float32,bfloat16,int8", help="float32, bfloat16, int8; several with commas"
    )
    parser.add_argument("--turns", type=int, default=10_000)
    parser.add_argument("--warm-up", type=int, default=3_000, help="turns before the first mark")
    parser.add_argument("--logprobs", action="store_true", help="ask for 20 log-probabilities a token")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--most", type=float, default=1.0, help="MB per 1,000 turns that a process may grow by"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        runs = [soak(dtype, Path(folder), arguments) for dtype in arguments.dtypes.split(",")]
    bad = [
        f"{run['dtype']} {name}"
        for run in runs
        for name in ("front_slope", "engine_slope")
        if run[name] > arguments.most
    ]
    print(
        json.dumps(
            {
                "benchmark": "soak",
                "machine": platform.processor() or platform.machine(),
                "runs": runs,
                "above": bad,
            }
        )
    )
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
