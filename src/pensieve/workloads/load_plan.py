"""What a load test asks for, checked, and the players of each of its runs. Knows options and scripts; never
servers or clocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from pensieve.errors import ConfigError
from pensieve.workloads.arrivals import ThinkTime
from pensieve.workloads.generators import LIKENESSES, MAX_CONTEXT, SAMPLED, Generator, generator
from pensieve.workloads.scripts import (
    NO_THINKING,
    Player,
    Script,
    Shape,
    SystemPrompts,
    as_recorded,
    closed_loop,
    faster,
    fitting,
    open_loop,
)
from pensieve.workloads.traces import DEFAULT_OUTPUT_TOKENS, Trace, load_trace

DEFAULT_USERS, DEFAULT_TURNS, DEFAULT_DURATION_S = 8, 6, 60.0


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run, ready to be played."""

    label: str  # unique within the plan
    players: tuple[Player, ...]
    rate: float | None = None  # requests a second; None: users who wait for answers, or a trace's own times
    arrivals_s: float | None = None  # for how long conversations arrive; None: not an open loop


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What is asked for. Closed loop: `users`. Open loop: `rates`. A trace that tells its times: neither."""

    users: int | None = None  # None: 8, where neither rates nor a trace say who comes
    conversations_per_user: int | None = None  # None: 1, or all of a trace
    starts_s: float = 0.0
    rates: tuple[float, ...] = ()  # requests a second
    duration_s: float | None = None  # of arrivals; None: 60, or all of a trace
    turns: int | None = None  # None: 6, or as many as a trace has
    new_tokens: int = 100
    first_tokens: int | None = None
    output_tokens: int | None = None  # None: 64, or as the trace's answers are
    think: ThinkTime = NO_THINKING
    trace: Path | None = None  # or a name of `LIKENESSES`, whatever files there are
    speed: float = 1.0
    max_context: int | None = None  # tokens; turns that would not fit are left out
    system_prompts: SystemPrompts | None = None  # of conversations that are made, not recorded
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "users",
            "conversations_per_user",
            "turns",
            "new_tokens",
            "first_tokens",
            "output_tokens",
            "max_context",
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.rates:
            self._refuse(
                "--rate",
                "conversations arrive by themselves",
                users=None,
                conversations_per_user=None,
                starts_s=0.0,
            )
        elif self.duration_s is not None and self.trace is None:
            raise ConfigError(
                "--duration needs --rate or a --trace with times: users (--users) play a number of "
                "conversations, not a time"
            )
        if self.trace is None:
            self._refuse("no --trace", "there is nothing to do it with", speed=1.0)
        elif self.made_like is None:
            self._refuse("a recorded trace", "its conversations begin as they did", system_prompts=None)

    @property
    def made_like(self) -> str | None:
        """The dataset that conversations are made like; None: they are all alike, or recorded."""
        return str(self.trace) if self.trace is not None and str(self.trace) in LIKENESSES else None

    def _refuse(self, because: str, why: str, **unset: object) -> None:
        for name, value in unset.items():
            if getattr(self, name) != value:
                option = "--" + name.removesuffix("_s").replace("_", "-")
                raise ConfigError(f"{option} does not go with {because}: {why}")

    def plan(self, template_tokens: float = 0.0) -> tuple[PlannedRun, ...]:
        """The runs: one, or one for each rate.

        Args:
            template_tokens: what a chat template adds to a message, for `max_context`.

        Raises:
            ConfigError: the trace is wrong, or options contradict it or each other.
        """
        recorded = self.trace is not None and self.made_like is None
        trace = (
            load_trace(self.trace, self.output_tokens, self.think, self.seed)
            if self.trace is not None and recorded
            else None
        )
        if self.rates:
            return tuple(
                self._open(trace, rate, index, template_tokens) for index, rate in enumerate(self.rates)
            )
        if trace is not None and trace.timed:
            self._refuse(
                "this trace",
                "it says itself when conversations begin",
                users=None,
                conversations_per_user=None,
                starts_s=0.0,
            )
            players = as_recorded(self._fitted(trace.scripts, template_tokens), self.duration_s)
            return (
                PlannedRun(
                    f"trace {self.trace}",
                    tuple(players),
                    arrivals_s=max(player.start_s for player in players) or None,
                ),
            )
        return (self._closed(trace, template_tokens),)

    def _closed(self, trace: Trace | None, template_tokens: float) -> PlannedRun:
        if self.duration_s is not None:
            raise ConfigError(
                "--duration needs --rate or a trace with times: users (--users) play a number of "
                "conversations, not a time"
            )
        users = self.users or DEFAULT_USERS
        scripts: Sequence[Script]
        if trace is None:
            made = self._made(self.seed)
            scripts = self._fitted(
                map(made.script, range(users * (self.conversations_per_user or 1))), template_tokens
            )
        else:
            scripts = self._fitted(trace.scripts, template_tokens)
            if self.conversations_per_user is not None:
                scripts = scripts[: users * self.conversations_per_user]
        return PlannedRun(f"{users} users", tuple(closed_loop(scripts, users, self.starts_s)))

    def _open(self, trace: Trace | None, rate: float, index: int, template_tokens: float) -> PlannedRun:
        if trace is not None and trace.timed:
            self._refuse("this trace", "it says itself when conversations begin", rates=())
        duration_s = self.duration_s or DEFAULT_DURATION_S
        scripts: Iterable[Script]
        mean_turns: float
        if trace is None:
            made = self._made(f"{self.seed}/{index}")
            scripts = (
                cut
                for number in itertools.count()
                if (cut := self._cut(made.script(number), template_tokens)) is not None
            )
            mean_turns = self._mean_turns(made, template_tokens)
        else:
            scripts = fitted = self._fitted(trace.scripts, template_tokens)
            mean_turns = fmean(len(script.turns) for script in fitted)
        players = open_loop(scripts, mean_turns, rate, duration_s, f"{self.seed}/{index}")
        which = f", {index + 1} of {len(self.rates)}" if len(self.rates) > 1 else ""
        return PlannedRun(f"{rate:g} requests/s{which}", tuple(players), rate, duration_s)

    def _made(self, seed: int | str) -> Shape | Generator:
        """Where conversations come from that are not recorded."""
        if self.made_like is not None:
            return generator(self.made_like, self.think, seed, self.system_prompts)
        return Shape(
            self.turns or DEFAULT_TURNS,
            self.new_tokens,
            self.output_tokens or DEFAULT_OUTPUT_TOKENS,
            self.first_tokens,
            self.think,
            seed,
            self.system_prompts,
        )

    def _mean_turns(self, made: Shape | Generator, template_tokens: float) -> float:
        """Turns of a conversation as it will be played."""
        if isinstance(made, Shape) and made.system is None:
            return float(len(self._fitted([made.script(0)], template_tokens)[0].turns))
        if (
            isinstance(made, Generator)
            and self.turns is None
            and (self.max_context is None or (self.max_context >= MAX_CONTEXT and not template_tokens))
        ):
            return made.mean_turns
        return fmean(
            len(script.turns) for script in self._fitted(map(made.script, range(SAMPLED)), template_tokens)
        )

    def _fitted(self, scripts: Iterable[Script], template_tokens: float) -> list[Script]:
        """The scripts as they will be played: cut and sped up, those left out of which nothing fits."""
        kept = [cut for script in scripts if (cut := self._cut(script, template_tokens)) is not None]
        if not kept:
            raise ConfigError(
                f"no conversation's first turn fits in --max-context {self.max_context}: raise it, or take "
                "shorter messages"
            )
        return kept

    def _cut(self, script: Script, template_tokens: float) -> Script | None:
        if self.turns is not None:
            script = replace(script, turns=script.turns[: self.turns])
        if self.speed != 1.0:
            script = faster(script, self.speed)
        return script if self.max_context is None else fitting(script, self.max_context, template_tokens)
