"""How fast the simulator is, and how far the cache scales. No model, no GPU.

    python benchmarks/simulator.py [--parts speed,victims,scale,day] [--out DIR]

speed    requests simulated a second on one core, ShareGPT-like, each of some 200 steps, by system
victims  what choosing and dropping one victim costs over 10^3 ... 10^6 idle conversations (of --chunks each), by policy; a plot in --out
scale    memory of --conversations idle conversations with --chunks each
day      --day conversations in one simulated day

Prints JSON. Predicted before measuring: 6 us a span and 200 spans a request, hence 600 requests a second and core; a victim's cost grows with the
logarithm of the number of conversations (heaps) and of the longest length (the tournament), 10 to 20 us; 350 bytes a chunk, so 11 GB for 30 million.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pensieve.config import CacheConfig, TierConfig
from pensieve.core.cache import TieredCache
from pensieve.core.cost import CostProfile
from pensieve.core.eviction import POLICIES
from pensieve.core.sequence import extend_digests
from pensieve.reporting.canvas import COLOURS, MARKERS, canvas
from pensieve.simulator.case import Case, Machine, run_case
from pensieve.workloads.arrivals import ThinkTime
from pensieve.workloads.load_plan import LoadOptions

CHUNK = 32
COST = CostProfile([(2**p, 1.0 + 2**p / 10_000) for p in range(5, 15)])
VICTIMS = 20_000
STEP_S = 1e-3  # between conversations going idle


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def resident_bytes() -> int:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def load(rate: float, duration_s: float) -> LoadOptions:
    return LoadOptions(
        trace=Path("sharegpt-like"),
        rates=(rate,),
        duration_s=duration_s,
        think=ThinkTime(60.0, exponential=True),
        seed=0,
    )


def measure_speed(repeats: int) -> dict[str, Any]:
    """Requests a second of this process' own time, the median of some runs a system."""
    found: dict[str, Any] = {}
    for system in ("pensieve", "gpu-only", "stateless", "baseline"):
        case = Case(Machine("llama2-13b-gqa"), load(8.0, 600.0), system, warm_up_s=150.0)
        rates = []
        for _ in range(repeats):
            begun_s = time.process_time()
            outcome = run_case(case, keep_records=True)
            rates.append(len(outcome.records) / (time.process_time() - begun_s))
        tokens = sum(record.receipt.output_tokens for record in outcome.records) / len(outcome.records)
        found[system] = {
            "requests_per_s": sorted(rates)[len(rates) // 2], "requests": len(outcome.records), "steps": outcome.num_steps,
            "output_tokens_a_request": tokens,
        }  # fmt: skip
        say(f"{system}: {found[system]}")
    return found


def fill(policy: str, conversations: int, chunks: int) -> TieredCache:
    """Idle conversations in one full tier, each idle since another time; lengths are uniform around `chunks`."""
    rng = random.Random(0)
    lengths = [1 + rng.randrange(2 * chunks - 1) for _ in range(conversations)]
    cache = TieredCache(
        CacheConfig((TierConfig("gpu", sum(lengths)),), CHUNK), POLICIES[policy](COST.of_chunk)
    )
    for number, length in enumerate(lengths):
        now_s = number * STEP_S
        tokens = [number] * (length * CHUNK)
        digests: list[bytes] = []
        extend_digests(digests, "n", tokens, CHUNK)
        sequence = cache.open("n", f"idle-{number}", now_s)
        cache.attach(sequence, tokens, digests)
        cache.admit(sequence, len(tokens), digests, now_s)
        cache.commit(sequence, 0, len(tokens), digests)
        cache.release(sequence, tokens, digests)
        cache.close(sequence, now_s)
        if number % 100_000 == 99_999:
            say(
                f"{number + 1:,} conversations, {cache.places.num_chunks:,} chunks, {resident_bytes() / 1e9:.1f} GB"
            )
    return cache


def measure_victims(cache: TieredCache, conversations: int) -> float:
    """Microseconds a victim, time moving on between them."""
    now_s = conversations * STEP_S
    wanted = min(VICTIMS, cache.places.num_chunks // 4)
    begun_s = time.process_time()
    for _ in range(wanted):
        now_s += 0.01
        cache.room.make(0, cache.room.available(0) + 1, now_s)
    assert cache.places.num_dropped == wanted
    return 1e6 * (time.process_time() - begun_s) / wanted


def measure_growth(policies: list[str], most: int, chunks: int) -> dict[str, Any]:
    """Cost of a victim by policy and number of conversations."""
    found: dict[str, Any] = {policy: {} for policy in policies}
    for policy in policies:
        conversations = 1000
        while conversations <= most:
            cache = fill(policy, conversations, chunks)
            found[policy][conversations] = measure_victims(cache, conversations)
            say(f"{policy}, {conversations:,} conversations: {found[policy][conversations]:.1f} us a victim")
            del cache
            gc.collect()
            conversations *= 10
    return found


def plot_growth(folder: Path, found: dict[str, Any], chunks: int) -> None:
    with canvas(
        folder / "victims.png",
        "What one victim costs",
        f"idle conversations of {chunks} chunks on average, one tier",
    ) as (axes,):
        for index, (policy, points) in enumerate(found.items()):
            axes.plot(
                list(points), list(points.values()), color=COLOURS[index], marker=MARKERS[index], label=policy
            )
            first, *_ = points
            axes.plot(
                list(points), [points[first] * len(str(count)) / len(str(first)) for count in points],
                color=COLOURS[index], linestyle=":", label=f"{policy}: log n through its first point",
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("idle conversations")
        axes.set_ylabel("microseconds a victim")
        axes.legend(frameon=False)


def measure_scale(conversations: int, chunks: int) -> dict[str, Any]:
    """Memory of idle conversations, and what a victim costs among them."""
    gc.collect()
    before = resident_bytes()
    begun_s = time.process_time()
    cache = fill("retention", conversations, chunks)
    num_chunks = cache.places.num_chunks
    taken = resident_bytes() - before
    return {
        "conversations": len(cache.sequences), "chunks": num_chunks, "resident_gb": resident_bytes() / 1e9, "bytes_a_chunk": taken / num_chunks,
        "fill_s": time.process_time() - begun_s, "victim_us": measure_victims(cache, conversations),
    }  # fmt: skip


def measure_day(conversations: int) -> dict[str, Any]:
    """A simulated day in which so many conversations begin, on two devices: one cannot hold 100,000, and most of the day would be a queue."""
    day_s = 86_400.0
    rate = conversations * 5.56 / day_s
    case = Case(Machine("llama2-13b-gqa", devices=2), load(rate, day_s), warm_up_s=3600.0)
    begun_s, last_s = time.perf_counter(), [0.0]

    def tell(now_s: float, finished: int) -> None:
        if now_s > last_s[0] + 3600:
            last_s[0] = now_s
            say(f"{now_s / 3600:.1f} h, {finished:,} requests, {time.perf_counter() - begun_s:.0f} s")

    outcome = run_case(case, tell=tell)
    wall_s = time.perf_counter() - begun_s
    found = outcome.summary
    return {
        "conversations": conversations, "requests_in_window": found.sent, "wall_s": wall_s, "process_s": time.process_time(), "steps": outcome.num_steps,
        "finished_per_s": found.finished_per_s, "normalized_p90_s": found.normalized_s.p90,
        "gpu_share": found.gpu_share, "cpu_share": found.cpu_share, "recomputed_share": found.recomputed_share,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="speed,victims")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--policies", default="retention,lru")
    parser.add_argument("--conversations", type=int, default=1_000_000)
    parser.add_argument("--chunks", type=int, default=30, help="of a conversation, on average, for scale")
    parser.add_argument(
        "--victim-chunks", type=int, default=8, help="of a conversation, on average, for victims"
    )
    parser.add_argument("--day", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    parts: dict[str, Callable[[], Any]] = {
        "speed": lambda: measure_speed(options.repeats),
        "victims": lambda: measure_growth(
            options.policies.split(","), options.conversations, options.victim_chunks
        ),
        "scale": lambda: measure_scale(options.conversations, options.chunks),
        "day": lambda: measure_day(options.day),
    }
    report: dict[str, Any] = {
        "benchmark": "simulator",
        "config": {name: str(value) for name, value in vars(options).items()},
        "python": platform.python_version(),
    }
    for part in options.parts.split(","):
        report[part] = parts[part]()
        if part == "victims" and options.out is not None:
            plot_growth(options.out, report[part], options.victim_chunks)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
