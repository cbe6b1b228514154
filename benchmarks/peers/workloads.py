"""What is asked of every system, and how much KV each may keep for it. Knows tokens and options of `pensieve bench`; never servers or processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil

KV_BYTES_PER_TOKEN = 23_040  # SmolLM2-135M: 2 (K, V) x 30 layers x 3 heads x 64 x 2 bytes
FIRST_TURN_TOKENS = 30  # that the model's template adds to a first message: its system prompt, and what stands around the message
LATER_TURN_TOKENS = 11  # that it adds to every message behind an answer
BLOCK_TOKENS = 128  # vLLM's on a CPU, the coarsest of all: KV is counted in whole ones, so that what is said to fit does fit
CONTEXT_TOKENS = 8192  # the model's

PENSIEVE, STATELESS, VLLM, VLLM_NONE, LLAMA, TRANSFORMERS = (
    "pensieve",
    "pensieve-stateless",
    "vllm",
    "vllm-none",
    "llama.cpp",
    "transformers",
)
SYSTEMS = (PENSIEVE, STATELESS, VLLM, VLLM_NONE, LLAMA, TRANSFORMERS)


def conversation_tokens(
    turns: int, new_tokens: int, output_tokens: int, first_tokens: int | None = None
) -> int:
    """Of a whole conversation, answers and template included."""
    first = new_tokens if first_tokens is None else first_tokens
    return FIRST_TURN_TOKENS + first + (turns - 1) * (LATER_TURN_TOKENS + new_tokens) + turns * output_tokens


def in_blocks(tokens: float) -> int:
    """Rounded up to whole blocks."""
    return ceil(tokens / BLOCK_TOKENS) * BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Kv:
    """What one system may keep, in tokens."""

    first: int  # where the model reads it
    second: int = 0  # below that, for systems with a second tier
    slots: int = 8  # conversations at once, for systems that divide the first tier between them

    @property
    def tokens(self) -> int:
        """Of both tiers."""
        return self.first + self.second

    @property
    def bytes(self) -> int:
        """Of both tiers."""
        return self.tokens * KV_BYTES_PER_TOKEN


@dataclass(frozen=True, slots=True)
class Measurement:
    """One call of `pensieve bench`, or a sweep of rates."""

    name: str
    users: int
    turns: int
    new_tokens: int  # of each message
    output_tokens: int  # of each answer
    first_tokens: int | None = None  # of the first message, where it is another
    think: str | None = None
    starts_s: float | None = None  # conversations begin within these seconds
    rates: tuple[float, ...] = ()  # requests a second: an open loop, a call for each
    duration_s: float | None = None  # of each rate
    conversations: int = 1  # of each user, one after the other

    def calls(self) -> tuple[Measurement, ...]:
        """Of the client: one, or one for each rate, the lowest first."""
        return tuple(
            replace(self, name=f"{self.name}-{rate:g}", rates=(rate,)) for rate in sorted(self.rates)
        ) or (self,)

    def arguments(self) -> list[str]:
        """For `pensieve bench`."""
        told: dict[str, object | None] = {
            "--users": None if self.rates else self.users,
            "--conversations-per-user": None if self.rates else self.conversations,
            "--turns": self.turns,
            "--new-tokens": self.new_tokens,
            "--output-tokens": self.output_tokens,
            "--first-tokens": self.first_tokens,
            "--think": self.think,
            "--starts": None if self.starts_s is None else f"{self.starts_s:g}",
            "--rate": ",".join(f"{rate:g}" for rate in self.rates) or None,
            "--duration": None if self.duration_s is None else f"{self.duration_s:g}",
        }
        return [word for option, value in told.items() if value is not None for word in (option, str(value))]


@dataclass(frozen=True, slots=True)
class Workload:
    """Measurements that each system makes on one fresh server."""

    name: str
    title: str
    measurements: tuple[Measurement, ...]
    kv: Mapping[str, Kv]  # by system: which ones take part, and what they may keep
    quick: tuple[Measurement, ...] = field(default=())  # the same in little

    @property
    def systems(self) -> tuple[str, ...]:
        """Who takes part, in order."""
        return tuple(system for system in SYSTEMS if system in self.kv)

    def in_little(self) -> Workload:
        """To see that everything works; figures mean nothing."""
        return replace(self, measurements=self.quick)


def workloads() -> tuple[Workload, ...]:
    """All of them."""
    return (_users(), *_pressure(), _alone(), _stateless(), _open())


_ROOM = Kv(8 * CONTEXT_TOKENS)  # for everybody's whole context


def _users() -> Workload:
    shape = Measurement("users", users=8, turns=6, new_tokens=100, output_tokens=64)
    kv = dict.fromkeys((PENSIEVE, VLLM, VLLM_NONE, LLAMA, TRANSFORMERS), _ROOM)
    return Workload(
        "users",
        "8 users at once, 6 turns each",
        (shape,),
        kv,
        (replace(shape, users=2, turns=2, output_tokens=16),),
    )


def _pressure() -> tuple[Workload, ...]:
    """24 users who think, while the KV of all their conversations fits, or most of it, or a third."""
    shape = Measurement(
        "pressure", users=24, turns=6, new_tokens=100, output_tokens=64, think="exp:3", starts_s=5
    )
    everything = 24 * in_blocks(conversation_tokens(6, 100, 64))
    third, half, tenth = in_blocks(everything / 3), in_blocks(everything / 2), in_blocks(everything / 10)
    tiers = Kv(third, everything - third)
    # llama.cpp's slots hold a conversation each; what does not lie in one goes to its cache in RAM.
    slots = third // in_blocks(conversation_tokens(6, 100, 64))
    quick = (replace(shape, users=3, turns=2, output_tokens=16, think="exp:0.5", starts_s=1),)
    return (
        Workload(
            "fits", "24 users who think, KV for all", (shape,), {PENSIEVE: tiers, VLLM: Kv(everything)}, quick
        ),
        Workload(
            "tight",
            "24 users who think, KV for 60 %",
            (shape,),
            {PENSIEVE: Kv(half, tenth), VLLM: Kv(half + tenth)},
            quick,
        ),
        Workload(
            "third",
            "24 users who think, a first tier for a third; the rest below it where there is a second",
            (shape,),
            {PENSIEVE: tiers, VLLM: Kv(third), LLAMA: replace(tiers, slots=slots)},
            quick,
        ),
    )


def _alone() -> Workload:
    """Nobody else is there."""
    history = Measurement(
        "history",
        users=1,
        turns=3,
        new_tokens=60 - LATER_TURN_TOKENS,
        output_tokens=32,
        first_tokens=4032 - FIRST_TURN_TOKENS,
    )
    long = Measurement("long", users=1, turns=1, new_tokens=1035 - FIRST_TURN_TOKENS, output_tokens=128)
    short = Measurement("short", users=1, turns=1, new_tokens=60 - FIRST_TURN_TOKENS, output_tokens=128)
    kv = dict.fromkeys((PENSIEVE, VLLM, VLLM_NONE, LLAMA, TRANSFORMERS), _ROOM)
    quick = (
        replace(history, first_tokens=600, turns=2, output_tokens=16),
        replace(long, output_tokens=16),
        replace(short, output_tokens=16),
    )
    several = (
        replace(short, conversations=5),
        replace(long, conversations=5),
        replace(history, conversations=3),
    )
    return Workload("alone", "one user alone", several, kv, quick)


def _stateless() -> Workload:
    shape = Measurement("stateless", users=8, turns=6, new_tokens=60, output_tokens=32, first_tokens=3000)
    quick = (replace(shape, users=2, turns=2, first_tokens=300, output_tokens=8),)
    return Workload(
        "stateless",
        "8 users whose first message has 3,000 tokens",
        (shape,),
        {PENSIEVE: _ROOM, STATELESS: _ROOM},
        quick,
    )


def _open() -> Workload:
    """Requests come whether or not the ones before them are answered. First of all one user, who says what latency is without load."""
    everything = 24 * in_blocks(conversation_tokens(6, 100, 64))
    third = in_blocks(everything / 3)
    unloaded = Measurement("unloaded", users=1, turns=6, new_tokens=100, output_tokens=64)
    sweep = Measurement(
        "open",
        0,
        turns=6,
        new_tokens=100,
        output_tokens=64,
        think="exp:3",
        rates=(1, 2, 3, 4, 5, 6, 7, 8),
        duration_s=45,
    )
    quick = (
        replace(unloaded, turns=2, output_tokens=16),
        replace(sweep, turns=2, output_tokens=16, rates=(1, 2), duration_s=8, think="exp:0.5"),
    )
    kv = {PENSIEVE: Kv(third, everything - third), VLLM: Kv(everything)}
    return Workload("open", "an open loop, more and more requests a second", (unloaded, sweep), kv, quick)
