"""How fast and how big the engine is: time to first token by where the history lies, stateful against stateless, memory, growth.

    python benchmarks/engine.py [--parts ttft,users,memory,growth] [--model smollm2] [--dtype auto] [--attention native]

Systems are measured side by side in one run: warmed up, in turns (A B A B ...), medians. The last line is JSON. Token ids are drawn (seeded),
answers have fixed lengths, decoding is greedy. The engine is stepped in this thread; nothing is served over a network.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from common import commit, cpu_name, spread

from pensieve.config import CacheConfig, SchedulerConfig, TierConfig
from pensieve.core.cache import TieredCache
from pensieve.core.checks import check
from pensieve.core.cost import CostProfile
from pensieve.core.eviction import POLICIES
from pensieve.core.pace import Pace
from pensieve.core.receipt import Receipt
from pensieve.core.request import SamplingParams
from pensieve.core.scheduler import Scheduler
from pensieve.engine.engine import Engine
from pensieve.engine.messages import Event, Failed, Finished, Submit
from pensieve.runtime.loading import load_model
from pensieve.runtime.options import DTYPE_BYTES, Options
from pensieve.worker.attention import BACKENDS, make_backend
from pensieve.worker.gate import admit
from pensieve.worker.model import CausalModel
from pensieve.worker.worker import ModelWorker

CHUNK = 32


@dataclass(slots=True)
class Turn:
    """What came of one request."""

    receipt: Receipt
    output: tuple[int, ...]


class Bench:
    """An engine stepped by hand."""

    def __init__(
        self,
        model: CausalModel,
        gpu: int,
        cpu: int,
        *,
        attention: str = "auto",
        retain: bool = True,
        budget: int = 512,
        policy: str = "retention",
    ) -> None:
        tiers = (TierConfig("gpu", gpu), *((TierConfig("cpu", cpu),) if cpu else ()))
        cost = CostProfile.from_shape(model.shape)
        self.cache = TieredCache(CacheConfig(tiers, CHUNK), POLICIES[policy](cost.of_chunk))
        self.scheduler = Scheduler(
            SchedulerConfig(max_batch_tokens=budget, retain=retain, step_s=Options().step_s), self.cache,
            min(model.shape.max_positions, gpu * CHUNK), pace=Pace(cost),
        )  # fmt: skip
        self.worker = ModelWorker(model, tiers, CHUNK, attention=attention)
        self.ended: dict[str, Event] = {}
        self.engine = Engine(
            self.scheduler, self.worker, chunk_bytes=self.worker.chunk_bytes, emit=self._emit
        )
        self.count = 0

    def _emit(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Finished | Failed):
                self.ended[event.request_id] = event

    def submit(self, conversation: str, tokens: list[int], history: int, answer: int) -> str:
        self.count += 1
        name = f"r{self.count}"
        self.engine.post(
            Submit(name, conversation, "bench", tuple(tokens), history, SamplingParams(max_new_tokens=answer))
        )
        return name

    def wait(self, name: str) -> Turn:
        while name not in self.ended:
            if not self.engine.step():
                time.sleep(1e-4)
        event = self.ended.pop(name)
        assert isinstance(event, Finished), event
        return Turn(event.receipt, event.output)

    def turn(self, conversation: str, tokens: list[int], history: int, answer: int) -> Turn:
        return self.wait(self.submit(conversation, tokens, history, answer))

    def forget(self, conversation: str) -> None:
        self.scheduler.forget("bench", conversation, time.monotonic())
        self.settle()

    def settle(self) -> None:
        while self.cache.places.copies:
            self.engine.step()

    def move_down(self, conversation: str) -> None:
        """Move what is cached of a conversation out of the first tier."""
        sequence = self.cache.find("bench", conversation)
        assert sequence is not None
        places, now_s = self.cache.places, time.monotonic()
        for chunk in sequence.chunks:
            if chunk is not None and chunk.slots[1] is None:
                places.begin_copy(chunk, 0, 1, self.cache.room.take(1, now_s))
        self.settle()
        for chunk in sequence.chunks:
            if chunk is not None and chunk.slots[0] is not None:
                places.pools[0].release(places.reclaim(chunk, 0))

    def close(self) -> None:
        self.engine.close()


def drawn(rng: random.Random, length: int, vocab: int) -> list[int]:
    return [rng.randrange(vocab) for _ in range(length)]


def ttft(
    model: CausalModel,
    rounds: int,
    attention: str = "auto",
    history: int = 1024,
    new: int = 60,
    answer: int = 4,
) -> dict[str, Any]:
    """Time to first token of `new` tokens: as a first turn; after `history` tokens resident, on the cpu tier, dropped, and without any cache."""
    rng, vocab = random.Random(1), model.shape.vocab_size
    slots = (history + 8 * new) // CHUNK + 16
    stateful = Bench(model, slots, slots, attention=attention)
    stateless = Bench(model, slots, 0, attention=attention, retain=False)
    times: dict[str, list[float]] = {
        name: [] for name in ("first_turn", "resident", "on_cpu_tier", "dropped", "stateless")
    }
    for round_ in range(-1, rounds):
        measured: dict[str, float | None] = {}
        measured["first_turn"] = stateful.turn(
            "first", drawn(rng, new, vocab), 0, answer
        ).receipt.first_token_s
        stateful.forget("first")
        past = drawn(rng, history, vocab)
        log = past + list(stateful.turn("c", past, 0, answer).output)
        for name in ("resident", "on_cpu_tier", "dropped"):
            if name == "on_cpu_tier":
                stateful.move_down("c")
            elif name == "dropped":
                stateful.forget("c")
            prompt = log + drawn(rng, new, vocab)
            turn = stateful.turn("c", prompt, len(log), answer)
            expected = {
                "resident": turn.receipt.gpu_tokens,
                "on_cpu_tier": turn.receipt.cpu_tokens,
                "dropped": turn.receipt.recomputed_tokens,
            }
            assert expected[name] >= history, f"{name}: {turn.receipt}"
            measured[name] = turn.receipt.first_token_s
            if name == "dropped":
                measured["stateless"] = stateless.turn("c", prompt, len(log), answer).receipt.first_token_s
            log = prompt + list(turn.output)
        stateful.forget("c")
        if round_ >= 0:  # the first round warms up
            for name, seconds in measured.items():
                assert seconds is not None
                times[name].append(1e3 * seconds)
    stateful.close()
    stateless.close()
    report: dict[str, Any] = {
        "history": history,
        "new": new,
        "ms": {name: spread(values) for name, values in times.items()},
    }
    base = times["first_turn"]
    for name in ("resident", "on_cpu_tier", "dropped", "stateless"):
        report[f"{name}_over_first_turn"] = statistics.median(
            a / b for a, b in zip(times[name], base, strict=True)
        )
    return report


def users(
    model: CausalModel,
    rounds: int,
    *,
    attention: str = "auto",
    num_users: int = 8,
    first: int = 3000,
    turns: int = 6,
    new: int = 60,
    answer: int = 32,
) -> dict[str, Any]:
    """Requests/s over `turns` turns of `num_users` users after a first message; no think time; stateful and stateless in turns."""
    vocab = model.shape.vocab_size
    slots = num_users * ((first + (turns + 1) * (new + answer)) // CHUNK + 2) + 16
    per_s: dict[str, list[float]] = {"stateful": [], "stateless": []}
    for round_ in range(rounds):
        for system in ("stateful", "stateless"):
            bench = Bench(model, slots, 0, attention=attention, retain=system == "stateful")
            rng = random.Random(round_)
            logs = {}
            for user in range(num_users):
                past = drawn(rng, first, vocab)
                logs[f"u{user}"] = past + list(bench.turn(f"u{user}", past, 0, 2).output)
            begin = time.perf_counter()
            waiting = {}
            left = dict.fromkeys(logs, turns)
            for name in logs:
                logs[name] = logs[name] + drawn(rng, new, vocab)
                waiting[bench.submit(name, logs[name], len(logs[name]) - new, answer)] = name
            while waiting:
                bench.engine.step()
                for request_id in [r for r in waiting if r in bench.ended]:
                    name, event = waiting.pop(request_id), bench.ended.pop(request_id)
                    assert isinstance(event, Finished)
                    logs[name] = logs[name] + list(event.output)
                    left[name] -= 1
                    if left[name]:
                        history = len(logs[name])
                        logs[name] = logs[name] + drawn(rng, new, vocab)
                        waiting[bench.submit(name, logs[name], history, answer)] = name
            per_s[system].append(num_users * turns / (time.perf_counter() - begin))
            bench.close()
            print(
                f"users first={first} round {round_} {system}: {per_s[system][-1]:.2f} requests/s",
                file=sys.stderr,
            )
    ratios = [a / b for a, b in zip(per_s["stateful"], per_s["stateless"], strict=True)]
    return {
        "users": num_users, "first": first, "turns": turns, "new": new, "answer": answer,
        "requests_per_s": {name: spread(values) for name, values in per_s.items()},
        "stateful_over_stateless": statistics.median(ratios), "ratios": ratios,
    }  # fmt: skip


def memory(model: CausalModel, dtype: str, attention: str = "auto") -> dict[str, Any]:
    """Resident memory after work under pressure, against weights + tiers."""
    rng, vocab = random.Random(3), model.shape.vocab_size
    chunk_bytes = model.shape.kv_bytes_per_token(DTYPE_BYTES[dtype]) * CHUNK
    gpu, cpu = (int(gb * 1e9 / chunk_bytes) for gb in (0.5, 1.0))
    bench = Bench(model, gpu, cpu, attention=attention)
    peak = 0
    for number in range(24):
        bench.turn(f"c{number % 16}", drawn(rng, 3000, vocab), 0, 4)
        peak = max(peak, psutil.Process().memory_info().rss)
    weights = sum(p.numel() * p.element_size() for p in model.model.parameters())
    tiers = (gpu + cpu) * chunk_bytes
    bench.close()
    return {
        "rss_peak_gb": peak / 1e9, "weights_gb": weights / 1e9, "tiers_gb": tiers / 1e9,
        "beyond_weights_and_tiers_gb": (peak - weights - tiers) / 1e9,
    }  # fmt: skip


def growth(model: CausalModel, num_turns: int = 10_000, attention: str = "auto") -> dict[str, Any]:
    """Turns of 40 conversations through tiers for a tenth of them: is anything left behind?"""
    rng, vocab = random.Random(4), model.shape.vocab_size
    bench = Bench(model, 24, 32, attention=attention)
    logs: dict[str, list[int]] = {}
    samples = []
    for number in range(num_turns):
        name = f"c{rng.randrange(40)}"
        log = logs.get(name, [])
        if len(log) > 500:
            log = []
        prompt = log + drawn(rng, 30, vocab)
        logs[name] = prompt + list(bench.turn(name, prompt, len(log), 2).output)
        if (number + 1) % (num_turns // 10) == 0:
            check(bench.cache)
            places = bench.cache.places
            samples.append({"turns": number + 1, "rss_mb": psutil.Process().memory_info().rss / 1e6, "chunks": places.num_chunks,
                            "sequences": len(bench.cache.sequences), "index": len(bench.cache.index)})  # fmt: skip
            print(f"growth: {samples[-1]}", file=sys.stderr)
    for name in logs:
        bench.forget(name)
    leaked = [pool.num_used for pool in bench.cache.places.pools]
    bench.close()
    return {"turns": num_turns, "samples": samples, "slots_used_after_all_ended": leaked,
            "rss_growth_second_half_mb": samples[-1]["rss_mb"] - samples[len(samples) // 2 - 1]["rss_mb"]}  # fmt: skip


def tiny_model() -> CausalModel:
    """For growth: what counts is turns, not arithmetic."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=2048)  # fmt: skip
    return admit(LlamaForCausalLM(config).eval(), label="tiny llama")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="ttft,users,memory,growth")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto", choices=["auto", *sorted(DTYPE_BYTES)])
    parser.add_argument(
        "--attention",
        default="auto",
        choices=["auto", *BACKENDS],
        help="backend; auto takes the first that can serve",
    )
    parser.add_argument("--rounds", type=int, default=7, help="of ttft; users runs a third of it")
    parser.add_argument("--turns", type=int, default=10_000, help="of growth")
    options = parser.parse_args()
    loaded = load_model(
        Options(model=options.model, dtype=options.dtype),
        must_talk=False,
        say=lambda message: print(message, file=sys.stderr),
    )
    model = loaded.model
    attention = make_backend(options.attention, model.geometry, CHUNK, model.device).name
    few = max(1, options.rounds // 3)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "memory": lambda: memory(model, loaded.dtype, attention),
        "ttft": lambda: ttft(model, options.rounds, attention),
        "users": lambda: {
            "first_3000": users(model, few, attention=attention),
            "first_600": users(model, few, attention=attention, first=600),
        },
        "growth": lambda: growth(tiny_model(), options.turns, attention),
    }
    report: dict[str, Any] = {
        "benchmark": "engine", "commit": commit(), "model": loaded.resolved.label, "weights": loaded.resolved.weights, "dtype": loaded.dtype,
        "attention": attention,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(), "cpu": cpu_name(),
    }  # fmt: skip
    for name, part in parts.items():  # memory first: what later parts allocate must not count
        if name in options.parts.split(","):
            report[name] = part()
            print(f"{name}: {json.dumps(report[name])}", file=sys.stderr)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
