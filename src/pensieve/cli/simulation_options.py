"""Options that commands about simulated machines share. Knows click; never simulations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from pensieve.config import CPU_STEP_MS, CUDA_STEP_MS
from pensieve.core.eviction import POLICIES
from pensieve.errors import ConfigError
from pensieve.simulator.extent import LONG_CHUNK, LONG_CONTEXT
from pensieve.simulator.hardware import HARDWARE
from pensieve.simulator.policies import COMPARED
from pensieve.workloads.arrivals import ThinkTime
from pensieve.workloads.load_plan import LoadOptions

POLICY_NAMES = sorted((*POLICIES, *COMPARED))
DEFAULT_DURATION_S, DEFAULT_WARM_UP = (
    1200.0,
    0.25,
)  # (a run of the paper's figures is shorter: docs/simulator.md)
DEFAULT_THINK = "exp:60"  # (paper, evaluation)

Decorator = Callable[[Any], Any]

option = partial(click.option, show_default=True)


def together(*decorators: Decorator) -> Decorator:
    """Several decorators as one, the first outermost, as if they stood below each other."""

    def decorate(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def parse_names(text: str, known: Iterable[str], what: str) -> list[str]:
    """Names separated by commas, or all that are known for `all`.

    Raises:
        ConfigError: a name is not known.
    """
    known = list(known)
    if text == "all":
        return known
    names = [name.strip() for name in text.split(",")]
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise ConfigError(
            f"no {what} is called {unknown!r}: take {', '.join(known)} (several with commas) or all"
        )
    return names


machine_options = together(
    option("--model", default="llama3-8b", help="A named architecture (pensieve models lists them)."),
    option("--hardware", default="h200", help=f"A machine of the table: {', '.join(HARDWARE)}."),
)

trace_option = option(
    "--trace",
    type=click.Path(path_type=Path),
    default=Path("sharegpt-like"),
    help="sharegpt-like, ultrachat-like, or a file (docs/bench.md has the forms).",
)

load_options = together(
    option(
        "--duration",
        "duration_s",
        type=click.FloatRange(min=0, min_open=True),
        default=None,
        help="Simulated seconds of arrivals.  [default: 1200 with --rate; all of a trace]",
    ),
    option(
        "--warm-up",
        "warm_up_s",
        type=click.FloatRange(min=0),
        default=None,
        help="Requests sent before do not count.  [default: a quarter of --duration]",
    ),
    option(
        "--think",
        default=None,
        help="Seconds between an answer and the next turn where a trace does not say: 2.5 | exp:60 | chats.  "
        "[default: exp:60]",
    ),
    option(
        "--speed",
        type=click.FloatRange(min=0, min_open=True),
        default=1.0,
        help="Play a trace's times so many times faster.",
    ),
    option(
        "--turns", type=click.IntRange(min=1), default=None, help="At most so many turns of a conversation."
    ),
    option(
        "--max-context",
        type=click.IntRange(min=32),
        default=None,
        help="Tokens of prompt and answer; longer conversations are cut.  [default: 16384; of a recorded "
        "trace what the first tier holds, uncut]",
    ),
)

step_options = together(
    option("--max-batch-tokens", type=click.IntRange(min=1), default=2048, help="Token budget of a step."),
    option(
        "--step-ms",
        type=click.FloatRange(min=0, min_open=True),
        default=None,
        help=f"A step while a request decodes, with --admission work.  [default: {CUDA_STEP_MS:g}; "
        f"{CPU_STEP_MS:g} of a CPU's profile]",
    ),
    option(
        "--admission",
        type=click.Choice(["work", "fcfs"]),
        default="work",
        help="Who is admitted next: as pensieve serve does, or first come, first served, as in the paper "
        "(and as --figure always does).",
    ),
    option("--max-running", type=click.IntRange(min=1), default=512, help="Requests in a step."),
    option(
        "--chunk-tokens",
        type=click.IntRange(min=1),
        default=None,
        help=f"Tokens of a chunk.  [default: 32; {LONG_CHUNK} where contexts are beyond {LONG_CONTEXT:,} "
        "tokens]",
    ),
)

run_options = together(
    option("--seed", type=click.IntRange(min=0), default=0, help="Of lengths, think times and arrivals."),
    option("--jobs", type=click.IntRange(min=1), default=None, help="Processes.  [default: one a core]"),
)


def output_options(json_name: str, plot_name: str) -> Decorator:
    """Where what is found goes."""
    return together(
        option(
            "--out",
            "out_dir",
            type=click.Path(path_type=Path),
            default=None,
            help=f"Folder for {json_name} and {plot_name}.  [default: none]",
        ),
        option(
            "--json",
            "json_path",
            type=click.Path(path_type=Path),
            default=None,
            help="Write the JSON to this file.",
        ),
        option(
            "--debug",
            is_flag=True,
            show_default=False,
            help="Verify every invariant of the cache after every step.",
        ),
    )


Choice = TypeVar("Choice")


def take(kind: type[Choice], arguments: dict[str, Any]) -> Choice:
    """A dataclass made from the command's arguments of its fields' names, which are removed from `arguments`."""
    names = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: arguments.pop(name) for name in names})


@dataclass(frozen=True, slots=True)
class LoadChoice:
    """What `trace_option`, `load_options` and --seed ask for."""

    trace: Path
    duration_s: float | None
    warm_up_s: float | None
    think: str | None
    speed: float
    turns: int | None
    max_context: int | None
    seed: int

    def options(self, rates: tuple[float, ...], users: int | None = None) -> LoadOptions:
        """The load; with rates, arrivals last `DEFAULT_DURATION_S` if no duration is given."""
        return LoadOptions(
            users=users,
            rates=rates,
            duration_s=self.duration_s or (DEFAULT_DURATION_S if rates else None),
            turns=self.turns,
            think=ThinkTime.parse(self.think or DEFAULT_THINK),
            trace=self.trace,
            speed=self.speed,
            seed=self.seed,
        )


@dataclass(frozen=True, slots=True)
class StepChoice:
    """What `step_options` and --debug ask for."""

    max_batch_tokens: int
    step_ms: float | None
    admission: Literal["work", "fcfs"]
    max_running: int
    chunk_tokens: int | None
    debug: bool

    def of_case(self) -> dict[str, Any]:
        """The fields that a `Case` has too; its chunk size also depends on the load."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "chunk_tokens"}


@dataclass(frozen=True, slots=True)
class OutputChoice:
    """Where results go, and how many processes make them."""

    jobs: int | None
    out_dir: Path | None
    json_path: Path | None


def default_warm_up_s(asked_s: float | None, rated: bool, duration_s: float | None) -> float:
    """How long requests do not count: as asked, or a quarter of arrivals that go on for a given time."""
    if asked_s is not None:
        return asked_s
    return DEFAULT_WARM_UP * duration_s if rated and duration_s else 0.0
