"""`pensieve bench`: load on any OpenAI-compatible server. Chooses, wires, starts; `bench` and `workloads` do
the work.
"""

from __future__ import annotations

import asyncio
import gc
import json
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from pensieve.bench.chat_client import ChatClient
from pensieve.bench.driver import ShownRun
from pensieve.bench.http_client import HttpClient
from pensieve.bench.load import LoadDriver, LoadRun
from pensieve.bench.load_plot import plot_load
from pensieve.bench.load_report import build_json, failure_lines, print_load_report
from pensieve.bench.probe import Target, find_model, probe, server_version, warm_up
from pensieve.cli.loops import loop_factory
from pensieve.cli.outputs import check_paths
from pensieve.reporting.json_file import write_json
from pensieve.workloads.arrivals import ThinkTime, parse_rates
from pensieve.workloads.generators import LIKENESSES
from pensieve.workloads.load_plan import DEFAULT_TURNS, LoadOptions, PlannedRun
from pensieve.workloads.prompts import PromptWriter
from pensieve.workloads.scripts import SystemPrompts
from pensieve.workloads.traces import DEFAULT_OUTPUT_TOKENS

WARM_UP_TOKENS = 16  # of a warm-up's answer, at most
JSON_NAME, PLOT_NAME = "bench.json", "bench.png"


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Which server, and how it is asked."""

    url: str
    model: str | None
    api_key: str | None
    natural: bool
    warm_up_requests: int
    fresh_connections: bool
    timeout_s: float


def _option(name: str, *more: str, **keywords: Any) -> Callable[[Any], Any]:
    return click.option(name, *more, **({"show_default": True} | keywords))


@click.command()
@_option(
    "--url", envvar="PENSIEVE_URL", default="http://127.0.0.1:8000", help="The server, with or without /v1."
)
@_option("--model", default=None, help="What to ask for.  [default: the first that the server lists]")
@_option(
    "--api-key",
    envvar="PENSIEVE_API_KEY",
    default=None,
    help="A key, if the server wants one (or PENSIEVE_API_KEY).",
)
@_option(
    "--users",
    type=click.IntRange(min=1),
    default=None,
    help="Closed loop: conversations at once.  [default: 8]",
)
@_option(
    "--conversations-per-user",
    type=click.IntRange(min=1),
    default=None,
    help="One after the other.  [default: 1; all of a trace]",
)
@_option(
    "--starts",
    "starts_s",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Spread the users' first turns over so many seconds.",
)
@_option(
    "--rate",
    "rates",
    default=None,
    help="Open loop: requests a second, as Poisson arrivals of conversations: 2 | 0.5,1,2 | 0.5:4:0.5.",
)
@_option(
    "--duration",
    "duration_s",
    type=click.FloatRange(min=0, min_open=True),
    default=None,
    help="Seconds of arrivals.  [default: 60]",
)
@_option(
    "--turns",
    type=click.IntRange(min=1),
    default=None,
    help="Turns of a conversation.  [default: 6; all of a trace's]",
)
@_option("--new-tokens", type=click.IntRange(min=1), default=100, help="Tokens of a user's message, about.")
@_option(
    "--first-tokens",
    type=click.IntRange(min=1),
    default=None,
    help="Tokens of the first message.  [default: as the others]",
)
@_option(
    "--output-tokens",
    type=click.IntRange(min=1),
    default=None,
    help=f"Tokens of an answer, exactly so many where the server can.  [default: {DEFAULT_OUTPUT_TOKENS}; as "
    "a trace has them]",
)
@_option(
    "--natural",
    is_flag=True,
    show_default=False,
    help="Answers end where the model ends them; --output-tokens is the most.",
)
@_option(
    "--think",
    default="0",
    help="Seconds between an answer and the next turn: 2.5 | exp:3 (exponential with that mean) | chats | "
    "file:GAPS.",
)
@_option(
    "--trace",
    type=click.Path(path_type=Path),
    default=None,
    help="Play recorded conversations (docs/bench.md has the forms), or some like those of a dataset: "
    f"{' | '.join(LIKENESSES)}.",
)
@_option(
    "--system-prompts",
    default=None,
    help="Made conversations begin with one of COUNT prompts of TOKENS: COUNT:TOKENS[:SHARE].",
)
@_option(
    "--speed",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    help="Play a trace's times so many times faster.",
)
@_option(
    "--max-context",
    type=click.IntRange(min=1),
    default=None,
    help="Leave out turns that would not fit in so many tokens, about.",
)
@_option(
    "--warm-up",
    "warm_up_requests",
    type=click.IntRange(min=0),
    default=4,
    help="Requests before the run that do not count.",
)
@_option(
    "--fresh-connections",
    is_flag=True,
    show_default=False,
    help="A connection for each request (better with llama.cpp).",
)
@_option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    help="Seconds that a server may be silent.",
)
@_option(
    "--seed",
    type=click.IntRange(min=0),
    default=None,
    help="Of words, think times and arrivals.  [default: another one each time]",
)
@_option(
    "--out",
    "out_dir",
    type=click.Path(path_type=Path),
    default=None,
    help=f"Folder for {JSON_NAME} and {PLOT_NAME}.  [default: none]",
)
@_option(
    "--json", "json_path", type=click.Path(path_type=Path), default=None, help="Write the JSON to this file."
)
def bench(
    url: str,
    model: str | None,
    api_key: str | None,
    natural: bool,
    warm_up_requests: int,
    fresh_connections: bool,
    timeout_s: float,
    rates: str | None,
    think: str,
    system_prompts: str | None,
    seed: int | None,
    out_dir: Path | None,
    json_path: Path | None,
    **arguments: Any,
) -> None:
    """Measure a server under the load of people in conversation: Pensieve's own, vLLM, llama.cpp's, any that
    speaks OpenAI's API.

    Every turn resends the whole history. Without --rate, --users converse at once, each sending its next turn
    after the answer and its think time; with it, conversations arrive whatever the server does. The last line
    is JSON; the exit status is 1 if a request failed.
    """
    server = ServerOptions(url, model, api_key, natural, warm_up_requests, fresh_connections, timeout_s)
    options = LoadOptions(
        rates=parse_rates(rates) if rates is not None else (),
        think=ThinkTime.parse(think),
        system_prompts=SystemPrompts.parse(system_prompts) if system_prompts is not None else None,
        seed=secrets.randbelow(1 << 31) if seed is None else seed,
        **arguments,
    )
    paths = check_paths(out_dir, json_path, JSON_NAME)
    options.plan()  # what is wrong with it is said before the server is asked anything
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        target, planned, runs = runner.run(_measure(server, options))
    config = _config(server, options, planned)
    record = build_json(runs, target, config, _command(sys.argv))
    console = Console()
    print_load_report(runs, target, console)
    for path in paths:
        _say(f"json: {write_json(path, record)}")
    if out_dir is not None and any(one.ok for run in runs for one in run.records):
        _say(f"plot: {plot_load(out_dir / PLOT_NAME, runs, target, _words(options, planned))}")
    failures = failure_lines(runs)
    for line in failures:
        click.echo(line, err=True)
    if sys.stdout.isatty():
        record.pop("requests")  # a line for people to skip
    click.echo(json.dumps(record, ensure_ascii=False, separators=(",", ":")))
    if failures:
        sys.exit(1)


async def _measure(
    server: ServerOptions, options: LoadOptions
) -> tuple[Target, Sequence[PlannedRun], list[LoadRun]]:
    root = server.url.strip().rstrip("/").removesuffix("/v1")
    keep = not server.fresh_connections
    apart = HttpClient(root, server.api_key, keep_connections=False, read_timeout_s=server.timeout_s)
    http = HttpClient(f"{root}/v1", server.api_key, keep_connections=keep, read_timeout_s=server.timeout_s)
    try:
        model, header = await find_model(http, server.model)
        chat = ChatClient(http, model)
        writer = PromptWriter(options.seed)
        target = await probe(chat, await server_version(apart, header), writer, natural=server.natural)
        _say(
            f"{model} at {http.url}: answers "
            f"{'have a fixed length' if target.fixed_lengths else 'end where the model ends them'}"
        )
        planned = options.plan(target.template_tokens or 0.0)
        words = max(1, round(options.new_tokens / target.tokens_per_word))
        await warm_up(
            chat,
            writer,
            server.warm_up_requests,
            words,
            min(WARM_UP_TOKENS, options.output_tokens or DEFAULT_OUTPUT_TOKENS),
        )
        driver = LoadDriver(chat, target, writer, ShownRun())
        gc.collect()
        gc.freeze()  # what is there now is looked at no more: no long pauses in the middle of a run
        runs = [
            await driver.run(run.players, label=run.label, rate=run.rate, arrivals_s=run.arrivals_s)
            for run in planned
        ]
    finally:
        http.close()
    return target, planned, runs


def _config(server: ServerOptions, options: LoadOptions, planned: Sequence[PlannedRun]) -> dict[str, Any]:
    asked = {
        one.name: getattr(options, one.name) for one in fields(options)
    }  # (not asdict: a think time may be a file of gaps)
    asked |= {
        "think": str(options.think),
        "rates": list(options.rates) or None,
        "system_prompts": options.system_prompts and str(options.system_prompts),
    }
    asked["trace"] = None if options.trace is None else str(options.trace)
    if planned[0].arrivals_s is None:
        asked["users"] = len(planned[0].players)
    if options.trace is None:
        asked["turns"] = options.turns or DEFAULT_TURNS
        asked["output_tokens"] = options.output_tokens or DEFAULT_OUTPUT_TOKENS
    told = asdict(server)
    return asked | {
        name: told[name] for name in ("natural", "warm_up_requests", "fresh_connections", "timeout_s")
    }


def _command(arguments: Sequence[str]) -> list[str]:
    """The command line, without the key."""
    shown, hide = [], False
    for argument in arguments:
        if hide:
            shown.append("***")
        elif argument.startswith("--api-key="):
            shown.append("--api-key=***")
        else:
            shown.append(argument)
        hide = argument == "--api-key"
    return shown


def _words(options: LoadOptions, planned: Sequence[PlannedRun]) -> str:
    """What was asked for, for a picture's title."""
    who = (
        "conversations by their arrival times"
        if planned[0].arrivals_s is not None
        else f"{len(planned[0].players)} users at once"
    )
    if options.trace is not None:
        return f"{options.trace.name}, {who}"
    first = f" (the first {options.first_tokens})" if options.first_tokens else ""
    return f"{who}, {options.new_tokens} new tokens a turn{first}, {options.output_tokens or DEFAULT_OUTPUT_TOKENS} out, think time {options.think} s"


def _say(words: str) -> None:
    click.echo(words, err=True)
