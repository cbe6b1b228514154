"""The plan of a whole run, made before it: what users send, how much and when.

Knows token counts and seconds; never words or servers.

A script is one conversation, a player is a user with the scripts it plays one after the other. What makes a
run closed (users who wait for answers and think) or open (conversations that arrive whatever the server does)
is in the players alone, so a server and a simulation are driven by the same loop.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Self

from pensieve.errors import ConfigError
from pensieve.workloads.arrivals import ThinkTime, even_starts, poisson_arrivals
from pensieve.workloads.conversations import text_length_tokens

NO_THINKING = ThinkTime()


@dataclass(frozen=True, slots=True)
class ScriptTurn:
    """One turn of a conversation."""

    new_tokens: int | None  # of the user's message; None: `text` is the message
    output_tokens: int  # of the answer
    # after the answer before this turn; before turn 0: after the user's start, or its conversation before
    # this one
    think_s: float = 0.0
    due_s: float | None = None  # not before this time of the run; None: at once after the think time
    text: str | None = None
    keep_turns: int | None = None  # how many turns of the history stay before this one; None: all of them

    def due_after(self, free_s: float) -> float:
        """When it is sent, in seconds of the run, if the answer before it ended at `free_s`."""
        return max(free_s + self.think_s, self.due_s or 0.0)

    @property
    def message_tokens(self) -> int:
        """Length of the user's message, about."""
        return self.new_tokens if self.new_tokens is not None else text_length_tokens(self.text or "")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text that several conversations begin with."""

    name: str  # what its words are drawn by: the same name after the same pieces is the same text
    tokens: int


@dataclass(frozen=True, slots=True)
class Script:
    """One conversation."""

    name: str  # what its words are drawn by; unique within a run
    turns: tuple[ScriptTurn, ...]
    system: str | None = None  # the system prompt, if there is one
    prefix: tuple[
        Piece, ...
        # or one whose length alone matters: what it begins with, shared with all that begin with the same pieces
    ] = ()
    where: str | None = field(
        default=None, compare=False
    )  # the entry of a file that it begins with, for messages

    @property
    def prefix_tokens(self) -> int:
        """Length of what stands before its first message, about."""
        return sum(piece.tokens for piece in self.prefix) + (
            text_length_tokens(self.system) if self.system else 0
        )


@dataclass(frozen=True, slots=True)
class SystemPrompts:
    """A share of all conversations begins with one of a few system prompts."""

    count: int  # different ones, each as likely
    tokens: int  # of each
    share: float = 1.0  # of the conversations that have one

    def __post_init__(self) -> None:
        for name in ("count", "tokens"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"system prompts: {name} must be at least 1, got {value}")
        if not 0 < self.share <= 1:
            raise ConfigError(
                f"system prompts: the share of conversations must be above 0 and at most 1, got {self.share}"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """`4:500`: each conversation begins with one of 4 system prompts of 500 tokens; `4:500:0.3`: 3 in 10
        do.

        Raises:
            ConfigError: it is neither, or a number is out of range.
        """
        parts = text.strip().split(":")
        try:
            count, tokens = (int(part) for part in parts[:2])
            share = float(parts[2]) if len(parts) > 2 else 1.0
        except ValueError:
            parts = []
        if not 2 <= len(parts) <= 3:
            raise ConfigError(
                f"system prompts are COUNT:TOKENS or COUNT:TOKENS:SHARE (4:500:0.3), got {text!r}"
            )
        return cls(count, tokens, share)

    def of(self, seed: int | str, index: int) -> tuple[Piece, ...]:
        """What conversation `index` begins with. The same for the same seed, in whatever order it is asked."""
        rng = random.Random(f"system/{seed}/{index}")
        return (
            (Piece(f"system-{rng.randrange(self.count)}", self.tokens),) if rng.random() < self.share else ()
        )

    def __str__(self) -> str:
        return f"{self.count}:{self.tokens}:{self.share:g}"


@dataclass(frozen=True, slots=True)
class Player:
    """One user."""

    start_s: float  # when it begins, from the beginning of the run
    scripts: tuple[Script, ...]  # one after the other

    @property
    def num_turns(self) -> int:
        """Turns of all its scripts."""
        return sum(len(script.turns) for script in self.scripts)


@dataclass(frozen=True, slots=True)
class Shape:
    """Conversations that are all alike but for their words and think times."""

    num_turns: int
    new_tokens: int
    output_tokens: int
    first_tokens: int | None = None  # of the first message; None: as the others
    think: ThinkTime = NO_THINKING
    seed: int | str = 0
    system: SystemPrompts | None = None

    def __post_init__(self) -> None:
        for name in ("num_turns", "new_tokens", "output_tokens", "first_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")

    def script(self, index: int) -> Script:
        """Conversation 0, 1, 2, ..."""
        turns = tuple(
            ScriptTurn(
                self.first_tokens or self.new_tokens if turn == 0 else self.new_tokens,
                self.output_tokens,
                self.think.draw_s(self.seed, index, turn),
            )
            for turn in range(self.num_turns)
        )
        return Script(str(index), turns, prefix=self.system.of(self.seed, index) if self.system else ())

    @property
    def mean_turns(self) -> float:
        """Turns of a conversation."""
        return self.num_turns


def closed_loop(scripts: Sequence[Script], num_users: int, starts_s: float = 0.0) -> list[Player]:
    """Users who share the scripts out: user u plays the scripts u, u + num_users, ...; their starts are
    spread evenly over `starts_s`.

    Raises:
        ConfigError: there are no users, no scripts, or fewer scripts than users.
    """
    if num_users < 1:
        raise ConfigError(f"the number of users must be at least 1, got {num_users}")
    if len(scripts) < num_users:
        raise ConfigError(
            f"there are {len(scripts)} conversations for {num_users} users: lower the number of users"
        )
    starts = even_starts(num_users, starts_s)
    return [_player(start_s, tuple(scripts[user::num_users])) for user, start_s in enumerate(starts)]


def open_loop(
    scripts: Iterable[Script], mean_turns: float, rate_per_s: float, duration_s: float, seed: int | str = 0
) -> list[Player]:
    """Conversations that arrive as a Poisson process for `duration_s` seconds, so that turns come at
    `rate_per_s` on average.

    Args:
        scripts: as many as there are; the arrivals end with them.
        mean_turns: of a script.
        rate_per_s: turns a second.
        duration_s: of arrivals; what has arrived is played to its end.
        seed: of the arrivals.

    Raises:
        ConfigError: the rate or the duration is not positive, or no conversation arrives in it.
    """
    if not duration_s > 0:
        raise ConfigError(f"the duration must be positive, got {duration_s}")
    times = takewhile(lambda time_s: time_s < duration_s, poisson_arrivals(rate_per_s / mean_turns, seed))
    players = [_player(time_s, (script,)) for time_s, script in zip(times, scripts, strict=False)]
    if not players:
        raise ConfigError(
            f"at {rate_per_s:g} requests a second (conversations of {mean_turns:g} turns) none begins in "
            f"{duration_s:g} s: take a longer duration"
        )
    return players


def as_recorded(scripts: Sequence[Script], until_s: float | None = None) -> list[Player]:
    """Every script by the arrival times in it, those that begin before `until_s`.

    Raises:
        ConfigError: none begins before then.
    """
    players = [Player(script.turns[0].due_s or 0.0, (script,)) for script in scripts]
    players = [player for player in players if until_s is None or player.start_s < until_s]
    if not players:
        raise ConfigError(
            f"no conversation of the trace begins in its first {until_s:g} s: take a longer duration"
        )
    return sorted(players, key=lambda player: player.start_s)


def _player(start_s: float, scripts: tuple[Script, ...]) -> Player:
    """A user who begins without thinking first."""
    first, *rest = scripts
    first = replace(first, turns=(replace(first.turns[0], think_s=0.0), *first.turns[1:]))
    return Player(start_s, (first, *rest))


def faster(script: Script, speed: float) -> Script:
    """All its times divided by `speed`."""
    if not speed > 0:
        raise ConfigError(f"the speed must be positive, got {speed}")
    turns = (
        replace(turn, think_s=turn.think_s / speed, due_s=None if turn.due_s is None else turn.due_s / speed)
        for turn in script.turns
    )
    return replace(script, turns=tuple(turns))


def fitting(script: Script, max_context: int, template_tokens: float = 0.0) -> Script | None:
    """The script up to its last turn whose prompt and answer fit in `max_context` tokens, about; None if not
    even the first does.

    Args:
        script: the conversation.
        max_context: tokens of prompt and answer.
        template_tokens: what a chat template adds to a message.
    """
    kept = sum(
        1 for _ in takewhile(lambda context: context <= max_context, contexts(script, template_tokens))
    )
    return replace(script, turns=script.turns[:kept]) if kept else None


def contexts(script: Script, template_tokens: float = 0.0) -> Iterator[float]:
    """Tokens of prompt and answer of each turn, about."""
    lengths: list[float] = []  # of the history after each turn of the path
    for turn in script.turns:
        if turn.keep_turns is not None:
            del lengths[turn.keep_turns :]
        before = lengths[-1] if lengths else script.prefix_tokens
        lengths.append(before + turn.message_tokens + turn.output_tokens + template_tokens)
        yield lengths[-1]


def check_contexts(scripts: Iterable[Script], max_context: int, template_tokens: float = 0.0) -> None:
    """Refuse what a model cannot hold.

    Args:
        scripts: the conversations.
        max_context: the model's, in tokens.
        template_tokens: what a chat template adds to a message.

    Raises:
        ConfigError: a turn does not fit; the message names the conversation and where it stands in its file.
    """
    for script in scripts:
        for turn, context in enumerate(contexts(script, template_tokens)):
            if context > max_context:
                where = f"{script.where}: " if script.where else ""
                raise ConfigError(
                    f"{where}turn {turn} of conversation {script.name!r} needs {math.ceil(context)} tokens "
                    f"with its answer, the model holds {max_context}: --max-context {max_context} leaves "
                    "such turns out"
                )
