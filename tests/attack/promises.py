"""What is promised of a server under attack, as limits, and what a check found. Knows figures; never sockets, processes or inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from world import World

MAX_HEALTH_S = 0.25  # the longest GET /health, whatever is sent meanwhile
MAX_GROWTH_MB = 300.0  # of the front end's resident memory, at its peak under an input
MAX_FAMILY_MB = 1500.0  # of the resident memory of the front end and all its children together
MAX_CHAT_S = 10.0  # a bystander's chat of 16 tokens, under an input that asks the engine for nothing
MAX_REPLY_BYTES = 64 * 1024  # a refusal does not send the input back
NOISE_S = 1.0  # a /health slower than the limit and faster than this is measured a second time: other work on the machine does so


@dataclass
class Notes:
    """What one check measured, and what did not hold."""

    name: str
    told: list[str] = field(default_factory=list)  # in words, in order
    broken: list[str] = field(default_factory=list)  # promises that did not hold, in words
    only_slow: bool = True  # every broken promise is the latency of /health, by less than noise can do
    figures: dict[str, Any] = field(default_factory=dict)
    wall_s: float = 0.0

    def say(self, words: str, **figures: Any) -> None:
        """Keep something measured."""
        self.told.append(words)
        self.figures |= figures

    def hold(self, holds: bool, otherwise: str, *, noise: bool = False) -> bool:
        """A promise, and what to say where it does not hold. `noise`: a busy machine may be the reason."""
        if not holds:
            self.broken.append(otherwise)
            self.only_slow = self.only_slow and noise
        return holds

    @property
    def passed(self) -> bool:
        """Whether every promise held."""
        return not self.broken


@dataclass(frozen=True, slots=True)
class Check:
    """An attack, and the promise that it tries."""

    name: str  # KIND/INPUT
    promise: str
    run: Callable[[World, Notes], None]
    quick: bool = True  # part of --quick


CHECKS: dict[str, Check] = {}


def attack(
    name: str, *, quick: bool = True
) -> Callable[[Callable[[World, Notes], None]], Callable[[World, Notes], None]]:
    """Register a check; its docstring names the promise."""

    def register(function: Callable[[World, Notes], None]) -> Callable[[World, Notes], None]:
        add(Check(name, (function.__doc__ or "").strip().splitlines()[0], function, quick))
        return function

    return register


def add(check: Check) -> None:
    """Register a check."""
    if check.name in CHECKS:
        raise ValueError(f"two checks are called {check.name}")
    CHECKS[check.name] = check
