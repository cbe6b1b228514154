"""What each eviction policy makes a trace recompute. The real cache, one tier, a clock of its own; no scheduler, no model.

    python benchmarks/policies.py TRACE [--policies lru,retention,hazard,clairvoyant] [--capacity 0.05,0.10] [--hours 4,8] [--seeds 2]
        [--hardware h200 | flops]

TRACE holds sessions of coding agents ({"id", "turns": [[input, output, shared, think s, server s], ...]}) or requests of Mooncake
({"timestamp", "input_length", "output_length", "hash_ids"}), one JSON object a line, perhaps gzipped.

Sessions start at uniformly random times in `--hours`, which says how much they overlap; a turn comes `think s` after the previous answer
ended and its answer takes `server s`, whatever the cache holds, so every policy sees the same requests at the same times. Mooncake's
requests come when the trace says and take 20 ms an output token; they are chained to conversations by what they share. Capacity is a share
of all histories of the judged half at their longest. What counts is the recompute cost: the sum of Cost(l) over chunks that were computed
before, belong to a request and are not there. Cost(l) is the seconds that a Llama 3 8B takes on `--hardware`, by the simulator's roofline,
or its FLOPs, which make little of context: kernels of attention reach a fifth of what products do (paper, Fig. 3 and 4).

`hazard` is fitted on half of the sessions and goes on learning; all are judged on the other half. `hazard-cold` has learned nothing before.
Some sessions of agents are forks of others, with many turns alike to the last digit: those stay in the same half.

`closed` is the share of the gap between lru and the clairvoyant: (lru - policy) / (lru - clairvoyant). The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import heapq
import json
import platform
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from pensieve.config import CacheConfig, TierConfig
from pensieve.core.cache import TieredCache
from pensieve.core.cost import CostProfile
from pensieve.core.eviction import Hazard, PolicyFactory, ReturnTimes
from pensieve.core.sequence import Key, Sequence
from pensieve.simulator.case import Machine
from pensieve.simulator.policies import Setting, make_policy
from pensieve.worker.presets import PRESETS

CHUNK = 512  # tokens; Mooncake's blocks
MODEL = "llama3-8b"
OUTPUT_TOKEN_S = 0.02  # Mooncake's
NEVER = float("inf")


@dataclass(slots=True)
class Turn:
    """One request, and its answer."""

    length: int  # tokens, answer included
    digests: list[bytes]  # of its full chunks
    busy_s: float
    answered: int  # tokens of the answer
    think_s: float = 0.0  # after the answer before
    at_s: float = 0.0  # not before


@dataclass(slots=True)
class Session:
    """A conversation."""

    name: str
    turns: list[Turn] = field(default_factory=list)


def cost_on(hardware: str, chunk_tokens: int) -> CostProfile:
    """Cost(l) of one chunk; "flops" is no machine."""
    if hardware == "flops":
        return CostProfile.from_shape(PRESETS[MODEL].shape, chunk_tokens, 1 << 17)
    machine = Machine(MODEL, hardware)
    return machine.chunk_costs(machine.cost(), chunk_tokens, 1 << 17)


COST = cost_on("h200", CHUNK)


def use(chunk_tokens: int, hardware: str) -> None:
    global CHUNK, COST
    CHUNK, COST = chunk_tokens, cost_on(hardware, chunk_tokens)


def load(path: str) -> tuple[str, list[Session]]:
    with open(path, "rb") as file:
        data = file.read()
    rows = [
        json.loads(row)
        for row in (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).splitlines()
        if row.strip()
    ]
    return (
        ("mooncake", mooncake(rows))
        if "hash_ids" in rows[0]
        else ("agents", [agent(number, row) for number, row in enumerate(rows)])
    )


def agent(number: int, row: dict[str, list[list[float]]]) -> Session:
    """A turn that shares less than its history had that rewritten: chunks from there on are others."""
    session, digests, history, version = Session(str(number)), list[bytes](), 0, 0
    for index, (prompt, output, shared, think_s, busy_s) in enumerate(row["turns"]):
        if index and shared + 128 < min(history, prompt):
            version += 1
            del digests[int(shared) // CHUNK :]
        history = int(prompt) + max(1, int(output))
        del digests[history // CHUNK :]
        digests += [
            f"{number}/{version}/{position}".encode() for position in range(len(digests), history // CHUNK)
        ]
        session.turns.append(Turn(history, list(digests), busy_s, int(output), think_s if index else 0.0))
    return session


def mooncake(rows: list[dict[str, list[int]]]) -> list[Session]:
    """A request goes on with the conversation whose last prompt it holds whole (but for its last, partial block); else it begins one."""
    sessions: list[Session] = []
    ends: dict[tuple[int, ...], Session] = {}
    for row in rows:
        blocks = tuple(row["hash_ids"])
        found = next((ends.pop(blocks[:n]) for n in range(len(blocks), 1, -1) if blocks[:n] in ends), None)
        if found is None:
            sessions.append(found := Session(str(len(sessions))))
        output, prompt = int(row["output_length"]), int(row["input_length"])  # type: ignore[call-overload]
        full = [b"%d" % block for block in blocks[: prompt // CHUNK]]
        full += [
            f"{found.name}/{len(found.turns)}/{n}".encode()
            for n in range((prompt + output) // CHUNK - len(full))
        ]
        at_s = row["timestamp"] / 1e3  # type: ignore[operator]
        found.turns.append(Turn(prompt + output, full, output * OUTPUT_TOKEN_S, output, at_s=at_s))
        ends[blocks[:-1] if len(blocks) > 2 else blocks] = found
    return sessions


def play(sessions: list[Session], starts_s: list[float]) -> Iterator[tuple[float, str, Session, int]]:
    """(time, "begin" or "end", session, turn) in order of time."""
    queue = [
        (max(start, session.turns[0].at_s), number, 0, 0)
        for number, (session, start) in enumerate(zip(sessions, starts_s, strict=True))
    ]
    heapq.heapify(queue)
    while queue:
        now_s, number, ends, index = heapq.heappop(queue)
        session = sessions[number]
        if not ends:
            yield now_s, "begin", session, index
            heapq.heappush(queue, (now_s + session.turns[index].busy_s, number, 1, index))
            continue
        yield now_s, "end", session, index
        if index + 1 < len(session.turns):
            heapq.heappush(queue, (next_use_s(session, index, now_s), number, 0, index + 1))


def next_use_s(session: Session, index: int, now_s: float) -> float:
    if index + 1 == len(session.turns):
        return NEVER
    following = session.turns[index + 1]
    return max(now_s + following.think_s, following.at_s)


def halves(
    sessions: list[Session], rng: random.Random, *, forks_together: bool
) -> tuple[list[Session], list[Session]]:
    """In random order; if so asked, sessions that have a turn in common together."""
    forks: dict[tuple[int, int, float], list[Session]] = {}
    family: dict[str, list[Session]] = {}
    for session in sessions:
        together = family[session.name] = [session]
        for turn in session.turns if forks_together else ():
            other = family[forks.setdefault((turn.length, turn.answered, turn.busy_s), together)[0].name]
            if other is not together:
                other += together
                family.update({member.name: other for member in together})
                together = other
    families = list({id(members): members for members in family.values()}.values())
    rng.shuffle(families)
    first: list[Session] = []
    while 2 * len(first) < len(sessions):
        first += families.pop()
    second = [session for members in families for session in members]
    rng.shuffle(first)
    rng.shuffle(second)
    return first, second


def fit(sessions: list[Session], starts_s: list[float]) -> ReturnTimes:
    """What a server with those sessions would have learned."""
    family = Hazard(COST.of_chunk)
    known = {session.name: Sequence(("", session.name), 0.0) for session in sessions}
    for now_s, what, session, index in play(sessions, starts_s):
        sequence = known[session.name]
        if what == "begin":
            family.came_back(sequence, now_s)
        else:
            sequence.chunks = [None] * -(-session.turns[index].length // CHUNK)
            family.went_idle(sequence, now_s, session.turns[index].answered)
    return family.times


class Replay:
    """A cache under one policy, and what it has cost."""

    def __init__(self, policy: str, num_slots: int, times: ReturnTimes | None) -> None:
        self.current: dict[str, tuple[Session, int]] = {}
        self.cache = TieredCache(
            CacheConfig((TierConfig("gpu", num_slots),), CHUNK), self._make(policy, num_slots, times)
        )
        self.seen: set[bytes] = set()
        self.cost = self.most = 0.0  # recomputed; without any cache
        self.turned_away = 0

    def _make(self, policy: str, num_slots: int, times: ReturnTimes | None) -> PolicyFactory:
        if policy.startswith("hazard"):
            return Hazard(COST.of_chunk, copy.deepcopy(times) if policy == "hazard" else None)
        return make_policy(policy, Setting(COST.of_chunk, CHUNK, num_slots, self._next_use_s))

    def _next_use_s(self, key: Key, now_s: float) -> float:
        return next_use_s(*self.current[key[1]], now_s)

    def run(self, sessions: list[Session], starts_s: list[float]) -> None:
        admitted: set[str] = set()
        for now_s, what, session, index in play(sessions, starts_s):
            turn = session.turns[index]
            if what == "begin":
                self.current[session.name] = (session, index)
                sequence = self.cache.open("", session.name, now_s)
                if self._admit(sequence, turn, now_s):
                    admitted.add(session.name)
                else:
                    self.turned_away += 1
            else:
                ended = self.cache.find("", session.name)
                assert ended is not None
                if session.name in admitted:
                    admitted.remove(session.name)
                    self.cache.release(ended, range(turn.length), turn.digests)
                self.cache.close(ended, now_s, turn.answered)

    def _admit(self, sequence: Sequence, turn: Turn, now_s: float) -> bool:
        cache, tokens = self.cache, range(turn.length)
        cache.attach(sequence, tokens, turn.digests)
        need = cache.survey(sequence, turn.length)
        with cache.protected(sequence):
            cache.room.make(0, need.slots, now_s)
            fits = cache.room.available(0) >= need.slots and not need.blocked
        chunks = sequence.chunks
        for position, digest in enumerate(turn.digests):
            if digest in self.seen:
                self.most += COST.of_chunk(position)
                if not fits or position >= len(chunks) or chunks[position] is None:
                    self.cost += COST.of_chunk(position)
        self.seen.update(turn.digests)
        if fits:
            admission = cache.admit(sequence, turn.length, turn.digests, now_s)
            for start, stop in admission.missing:
                cache.commit(sequence, start, stop, turn.digests)
            cache.places.wipes.settle(cache.collect_moves().wiped, None)
        return fits


def longest(sessions: list[Session]) -> int:
    """Chunks of all histories at their longest, shared ones once."""
    partial = sum(1 for session in sessions if max(turn.length for turn in session.turns) % CHUNK)
    return partial + len(
        {
            digest
            for session in sessions
            for digest in max(session.turns, key=lambda turn: turn.length).digests
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace")
    parser.add_argument(
        "--policies",
        default="lru,tail-lru,conversation,t-lru,lfu,arc,retention,sharers,hazard-cold,hazard,belady,clairvoyant",
    )
    parser.add_argument("--capacity", default="0.05,0.10")
    parser.add_argument("--hours", default="4,8")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--chunk-tokens",
        type=int,
        default=CHUNK,
        help="of sessions of agents: larger ones are quicker to replay",
    )
    parser.add_argument(
        "--hardware", default="h200", help="whose seconds Cost(l) is; flops: arithmetic alone"
    )
    options = parser.parse_args()
    use(options.chunk_tokens, options.hardware)
    kind, sessions = load(options.trace)
    policies = [
        "lru",
        "clairvoyant",
        *(p for p in options.policies.split(",") if p not in ("lru", "clairvoyant")),
    ]
    results = []
    for hours in [float(h) for h in options.hours.split(",")] if kind == "agents" else [0.0]:
        for seed in range(options.seeds):
            rng = random.Random(f"{kind} {seed}")
            fitted, judged = halves(sessions, rng, forks_together=kind == "agents")
            times = fit(fitted, [rng.uniform(0.0, 3600.0 * hours) for _ in fitted])
            starts_s = [rng.uniform(0.0, 3600.0 * hours) for _ in judged]
            for capacity in [float(share) for share in options.capacity.split(",")]:
                num_slots = int(capacity * longest(judged))
                costs: dict[str, float] = {}
                for policy in policies:
                    begun = time.perf_counter()
                    replay = Replay(policy, num_slots, times)
                    replay.run(judged, starts_s)
                    costs[policy] = replay.cost
                    lru, best = costs["lru"], costs.get("clairvoyant", 0.0)
                    row = {
                        "hours": hours, "seed": seed, "capacity": capacity, "slots": num_slots, "policy": policy,
                        "of_stateless": round(replay.cost / replay.most, 4), "of_lru": round(replay.cost / lru, 4),
                        "closed": round((lru - replay.cost) / (lru - best), 3), "turned_away": replay.turned_away,
                        "seconds": round(time.perf_counter() - begun, 1),
                    }  # fmt: skip
                    print(json.dumps(row), file=sys.stderr, flush=True)
                    results.append(row)
    config = {**vars(options), "sessions": len(sessions)}
    print(
        json.dumps(
            {
                "benchmark": "policies",
                "config": config,
                "python": platform.python_version(),
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
