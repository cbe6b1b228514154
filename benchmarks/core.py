"""What deciding costs: scheduler and cache per decode step, per victim, and memory per chunk. No model, no worker.

    python benchmarks/core.py [--running 64] [--idle 10000] [--chunks 300000]

Prints JSON. Predicted before measuring: ~0.3 ms a step (64 spans of some 2 us each, twice), ~10 us a victim (one heap pop, nine
matches of the tournament), ~350 bytes a chunk.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import sys
import time
import tracemalloc

from pensieve.config import CacheConfig, SchedulerConfig, TierConfig
from pensieve.core.cache import TieredCache
from pensieve.core.cost import CostProfile
from pensieve.core.eviction import POLICIES
from pensieve.core.plan import SampledToken, StepPlan, StepResult
from pensieve.core.request import SamplingParams
from pensieve.core.scheduler import Scheduler
from pensieve.core.sequence import extend_digests

CHUNK = 32
COST = CostProfile([(2**p, 1.0 + 2**p / 10_000) for p in range(5, 15)])


def new_cache(gpu: int, cpu: int, policy: str) -> TieredCache:
    config = CacheConfig((TierConfig("gpu", gpu), TierConfig("cpu", cpu)), CHUNK)
    return TieredCache(config, POLICIES[policy](COST.of_chunk))


def fill(cache: TieredCache, num_sequences: int, num_chunks: int, rng: random.Random) -> None:
    """Idle conversations of random lengths (up to 16k tokens), each computed in the first tier at its own time."""
    mean = num_chunks / num_sequences
    now_s = 0.0
    for number in range(num_sequences):
        left, sequences_left = num_chunks - cache.places.num_chunks, num_sequences - number
        length = min(512, max(1, int(rng.expovariate(1 / mean)))) if sequences_left > 1 else min(512, left)
        length = max(1, min(length, left - sequences_left + 1))
        tokens = [rng.randrange(50_000) for _ in range(length * CHUNK)]
        digests: list[bytes] = []
        extend_digests(digests, "n", tokens, CHUNK)
        now_s += 0.1
        sequence = cache.open("n", f"idle-{number}", now_s)
        cache.attach(sequence, tokens, digests)
        cache.admit(sequence, len(tokens), digests, now_s)
        cache.commit(sequence, 0, len(tokens), digests)
        cache.release(sequence, tokens, digests)
        cache.close(sequence, now_s)
        cache.room.copy_ahead(0.25, 1 << 30, now_s)
        settle(cache)


def settle(cache: TieredCache) -> None:
    moves = cache.collect_moves()
    cache.places.wipes.settle(moves.wiped, None)
    for copy in moves.swap_out:
        cache.finish_copy(copy.copy_id)


def answer(plan: StepPlan) -> StepResult:
    return StepResult(
        plan.step_id,
        tuple(SampledToken(span.request_id, 7) for span in plan.spans if span.emits_token),
        tuple(copy.copy_id for copy in (*plan.swap_in, *plan.swap_out)),
    )


def measure_steps(
    cache: TieredCache, num_running: int, rng: random.Random, num_steps: int = 600
) -> dict[str, float]:
    scheduler = Scheduler(
        SchedulerConfig(max_batch_tokens=4096, max_running=num_running), cache, max_context=32_768
    )
    now_s = 1e6
    for number in range(num_running):
        tokens = tuple(rng.randrange(50_000) for _ in range(rng.randint(100, 2000)))
        scheduler.submit(
            f"r{number}", "n", f"run-{number}", tokens, 0, SamplingParams(max_new_tokens=20_000), now_s
        )
    while any(request.missing for request in scheduler.requests.values()) or scheduler.num_waiting:
        plan = scheduler.schedule(now_s)
        scheduler.commit(plan, answer(plan), now_s)
    times = []
    for _ in range(num_steps):
        now_s += 0.02
        begin = time.perf_counter()
        plan = scheduler.schedule(now_s)
        middle = time.perf_counter()
        result = answer(plan)
        again = time.perf_counter()
        scheduler.commit(plan, result, now_s)
        times.append((middle - begin) + (time.perf_counter() - again))
        assert len(plan.spans) == num_running
    ordered = sorted(times)
    return {
        "step_ms_median": 1e3 * statistics.median(times),
        "step_ms_p99": 1e3 * ordered[int(0.99 * len(ordered))],
        "step_ms_max": 1e3 * ordered[-1],
        "slots_reclaimed": cache.places.num_reclaimed,
    }


def measure_victims(policy: str, num_sequences: int, num_chunks: int, rng: random.Random) -> dict[str, float]:
    """Drop everything, worst first, with time moving on: one victim at a time, as a full cache with no lower tier does."""
    cache = TieredCache(CacheConfig((TierConfig("gpu", num_chunks),), CHUNK), POLICIES[policy](COST.of_chunk))
    fill(cache, num_sequences, num_chunks, rng)
    now_s = 1e5
    wanted = min(20_000, num_chunks // 2)
    begin = time.perf_counter()
    for count in range(1, wanted + 1):
        now_s += 0.01
        cache.room.make(0, cache.room.available(0) + 1, now_s)
        assert cache.places.num_dropped == count
    return {"victim_us": 1e6 * (time.perf_counter() - begin) / wanted, "victims": wanted}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--running", type=int, default=64)
    parser.add_argument("--idle", type=int, default=10_000)
    parser.add_argument("--chunks", type=int, default=300_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    print("filling the cache ...", file=sys.stderr)
    # a first tier too small for all, so that steps reclaim, and copy down, and drop
    gpu = options.chunks // 3
    cpu = options.chunks - gpu + gpu // 4 + 64  # a quarter of the first tier lies in both
    cache = new_cache(gpu, cpu, "retention")
    gc.collect()
    tracemalloc.start()
    fill(cache, options.idle, options.chunks, rng)
    gc.collect()
    num_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    report: dict[str, object] = {
        "benchmark": "core",
        "config": vars(options),
        "python": platform.python_version(),
        "chunks": cache.places.num_chunks,
        "sequences": len(cache.sequences),
        "bytes_per_chunk": num_bytes / cache.places.num_chunks,
    }
    report |= measure_steps(cache, options.running, rng)
    for policy in POLICIES:
        report[policy] = measure_victims(policy, options.idle // 5, options.chunks // 5, rng)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
