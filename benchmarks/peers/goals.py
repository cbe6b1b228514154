"""What Pensieve is to reach beside its peers. Knows figures by name; never how they were measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from peers.workloads import LLAMA, PENSIEVE, STATELESS, VLLM

Rounds = Mapping[
    tuple[str, str], Sequence[Mapping[str, float] | None]
]  # (workload, system): figures of each round, None where there are none


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure of Pensieve's, as a multiple of a peer's (or as it is), and where it should lie."""

    text: str
    workload: str
    figure: str
    against: str | None  # a system in the same workload; None: the figure itself
    sense: Literal[">=", "<="]
    limit: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a goal came out."""

    goal: Goal
    values: tuple[float, ...]  # of each round that has both figures

    @property
    def value(self) -> float | None:
        """The median of the rounds; None: not measured."""
        return statistics.median(self.values) if self.values else None

    @property
    def met(self) -> bool | None:
        """None: not measured."""
        if (value := self.value) is None:
            return None
        return value >= self.goal.limit if self.goal.sense == ">=" else value <= self.goal.limit


GOALS = (
    Goal(
        "8 users: output tokens/s, of vLLM's with caching",
        "users",
        "users/output_tokens_per_s",
        VLLM,
        ">=",
        1.4,
    ),
    Goal("8 users: normalized latency, mean", "users", "users/normalized_mean_ms", VLLM, "<=", 0.75),
    Goal("8 users: normalized latency, p90", "users", "users/normalized_p90_ms", VLLM, "<=", 0.75),
    Goal("24 users, KV for all: first token, p90", "fits", "pressure/ttft_p90_ms", VLLM, "<=", 1.0),
    Goal(
        "24 users, KV for all: normalized latency, p90", "fits", "pressure/normalized_p90_ms", VLLM, "<=", 0.8
    ),
    Goal("24 users, KV for 60 %: first token, p90", "tight", "pressure/ttft_p90_ms", VLLM, "<=", 0.4),
    Goal("24 users, KV for 60 %: requests/s", "tight", "pressure/requests_per_s", VLLM, ">=", 1.2),
    Goal(
        "history of 4,032 tokens: first token of the third turn",
        "alone",
        "history/ttft_turn2_ms",
        VLLM,
        "<=",
        0.7,
    ),
    Goal(
        "8 users, first message of 3,000 tokens: requests/s, of its own stateless mode",
        "stateless",
        "stateless/requests_per_s",
        STATELESS,
        ">=",
        4.0,
    ),
    Goal(
        "one user: decoding at a short context, of llama.cpp's",
        "alone",
        "short/decode_tokens_per_s",
        LLAMA,
        ">=",
        0.9,
    ),
    Goal(
        "one user: decoding behind 1,035 tokens, of llama.cpp's",
        "alone",
        "long/decode_tokens_per_s",
        LLAMA,
        ">=",
        1.0,
    ),
    Goal(
        "one user: prefill of 1,035 tokens, of vLLM's", "alone", "long/prefill_tokens_per_s", VLLM, ">=", 1.0
    ),
    Goal(
        "open loop: requests/s at twice the unloaded latency",
        "open",
        "open/requests_per_s_at_limit",
        VLLM,
        ">=",
        1.3,
    ),
    Goal(
        "memory beyond weights and the KV in the tiers, GB (PSS)", "fits", "memory_beyond_gb", None, "<=", 1.0
    ),
)


def judge(rounds: Rounds, goals: Sequence[Goal] = GOALS) -> list[Verdict]:
    """How each goal came out. Rounds are compared with themselves: system beside system, minutes apart."""
    return [Verdict(goal, tuple(_values(rounds, goal))) for goal in goals]


def _values(rounds: Rounds, goal: Goal) -> list[float]:
    ours = rounds.get((goal.workload, PENSIEVE), ())
    if goal.against is None:
        return [each[goal.figure] for each in ours if each is not None and goal.figure in each]
    theirs = rounds.get((goal.workload, goal.against), ())
    return [
        mine[goal.figure] / their[goal.figure]
        for mine, their in zip(ours, theirs, strict=False)
        if mine is not None and their is not None and goal.figure in mine and their.get(goal.figure)
    ]
