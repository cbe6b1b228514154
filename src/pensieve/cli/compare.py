"""`pensieve compare`: stateful against stateless on the same conversations, one after the other in one run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from pensieve.bench.compare import run_users
from pensieve.bench.driver import ShownRun
from pensieve.bench.equality import Equality, compare_outputs
from pensieve.bench.local_system import LocalSystem
from pensieve.bench.openai_system import OpenAISystem
from pensieve.bench.plot import plot_first_token
from pensieve.bench.record import build_record
from pensieve.bench.report import print_report, summarize
from pensieve.bench.runs import Run, RunSettings, Subject
from pensieve.cli.options import cache_options, model_options, pick, template_options
from pensieve.core.request import SamplingParams
from pensieve.engine.messages import Stats
from pensieve.reporting.json_file import write_json
from pensieve.runtime.follower import follow_unless_first
from pensieve.runtime.loading import LoadedModel, load_model, notes_of, settled
from pensieve.runtime.local import Runtime, start
from pensieve.runtime.options import Options, as_json
from pensieve.store.sqlite import MEMORY, SqliteStore
from pensieve.workloads.conversations import Selection, load_dataset, random_tokens, select

STATEFUL = "Pensieve"
STATELESS = "stateless (Pensieve's engine, nothing kept between turns)"
WARM_UP_TOKENS, WARM_UP_USERS = 300, 4


@dataclass(frozen=True, slots=True)
class Workload:
    """What the users do."""

    dataset: str | None = None  # None: the shipped conversations
    num_users: int = 6
    num_conversations: int | None = None  # None: one a user
    min_turns: int = 1
    max_turns: int = 8
    max_new_tokens: int = 32
    request_interval_s: float = 0.5

    def conversations(self) -> Selection:
        """The conversations, cut to the turns asked for."""
        return select(
            load_dataset(self.dataset),
            self.num_conversations or self.num_users,
            self.min_turns,
            self.max_turns,
        )

    def settings(self, loaded: LoadedModel) -> RunSettings:
        """How the driver runs them: as text, or as drawn token ids of the texts' lengths for a model that
        does not talk.
        """
        return RunSettings(
            request_interval_s=self.request_interval_s,
            max_new_tokens=self.max_new_tokens,
            num_users=self.num_users,
            fixed_length=not loaded.talks,
            vocab_size=None if loaded.talks else loaded.shape.vocab_size,
        )


@click.command()
@click.option("--users", "num_users", type=click.IntRange(min=1), default=6, show_default=True)
@click.option(
    "--turns",
    "max_turns",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Turns of a conversation, at most.",
)
@click.option("--min-turns", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--num-conversations", type=click.IntRange(min=1), default=None, help="Default: one a user.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=32, show_default=True)
@click.option(
    "--request-interval",
    "request_interval_s",
    type=click.FloatRange(min=0),
    default=0.5,
    show_default=True,
    help="Seconds between an answer and its user's next turn (hot 0.3x, warm 1x, cold 2.5x).",
)
@click.option(
    "--dataset",
    default=None,
    help="ShareGPT-style JSON or JSONL of conversations (default: the shipped ones).",
)
@click.option(
    "--baseline-url",
    default=None,
    help="A real vLLM or other OpenAI-compatible server as the baseline instead.",
)
@click.option("--out", "out_dir", default=None, help="Folder for the plot and the JSON (default: out/).")
@template_options
@model_options
@cache_options
def compare(baseline_url: str | None, out_dir: str | None, **arguments: Any) -> None:
    """Stateful against stateless on the same conversations, side by side in one run."""
    options = pick(arguments)
    run_compare(options, Workload(**arguments), baseline_url=baseline_url, out_dir=out_dir)


def run_compare(
    options: Options, workload: Workload, *, baseline_url: str | None = None, out_dir: str | None = None
) -> Equality | None:
    """Both systems, the report, the plot and the JSON. Returns the verdict on their outputs (None against
    another server).
    """
    selection = workload.conversations()
    loaded = _load(options)
    settings = workload.settings(loaded)
    listener = ShownRun()
    with _system(options, loaded, retain=True) as (stateful, runtime):
        first = run_users(stateful, selection.conversations, settings, listener)
        stats, sizes = (
            runtime.service.engine.stats().result(),
            runtime.sizes.as_json() | {"cost": runtime.cost_source},
        )
    if baseline_url is not None:
        other = OpenAISystem(baseline_url, name=f"server at {baseline_url}")
        try:
            second = run_users(
                other,
                selection.conversations,
                replace(settings, vocab_size=None),
                listener,
                replay=first if loaded.talks else None,
            )
        finally:
            other.close()
        equality = None
    else:
        with _system(options, loaded, retain=False) as (stateless, _):
            second = run_users(stateless, selection.conversations, settings, listener, replay=first)
        equality = compare_outputs(first, second, loaded.dtype)
    _report(options, loaded, workload, [first, second], selection, sizes, stats, equality, out_dir)
    return equality


def run_one(options: Options, workload: Workload, *, retain: bool, out_dir: str | None = None) -> Run:
    """One system alone (`main.py --mode pensieve` or `vllm`)."""
    selection = workload.conversations()
    loaded = _load(options)
    with _system(options, loaded, retain=retain) as (system, runtime):
        run = run_users(system, selection.conversations, workload.settings(loaded), ShownRun())
        stats, sizes = (
            runtime.service.engine.stats().result(),
            runtime.sizes.as_json() | {"cost": runtime.cost_source},
        )
    _report(options, loaded, workload, [run], selection, sizes, stats, None, out_dir)
    return run


@contextmanager
def _system(options: Options, loaded: LoadedModel, *, retain: bool) -> Iterator[tuple[LocalSystem, Runtime]]:
    store = SqliteStore(MEMORY)
    runtime = start(options, loaded, store=store, retain=retain)
    try:
        _warm_up(runtime, loaded)
        yield LocalSystem(STATEFUL if retain else STATELESS, runtime.service), runtime
    finally:
        runtime.close()
        store.close()


def _warm_up(runtime: Runtime, loaded: LoadedModel) -> None:
    """First steps are slow everywhere (kernels are chosen, memory is touched); both systems get the same
    ones, untimed.
    """
    length = min(WARM_UP_TOKENS, runtime.sizes.max_context // 2)
    for part in (length, length, length // 4):
        names = [f"warm-up-{part}-{user}" for user in range(WARM_UP_USERS)]
        turns = [
            runtime.service.complete(
                name,
                random_tokens(part, loaded.shape.vocab_size, seed=name),
                0,
                SamplingParams(max_new_tokens=8, logprobs=2),
                namespace="warm-up",
            )
            for name in names
        ]
        for turn, name in zip(turns, names, strict=True):
            turn.future.result()
            runtime.service.engine.forget(name, namespace="warm-up")


def _load(options: Options) -> LoadedModel:
    follow_unless_first(options)
    loaded = load_model(
        options, must_talk=False, say=lambda message: click.secho(message, dim=True, err=True)
    )
    subject = _subject(options, loaded)
    computing = f" ({loaded.instructions})" if loaded.instructions else ""
    click.secho(
        f"{subject}{computing}" + (f": {loaded.resolved.note}" if loaded.resolved.note else ""), fg="cyan"
    )
    for note in notes_of(loaded.text.note if loaded.text is not None else None):
        click.secho(f"note: {note}", fg="yellow", err=True)
    if not loaded.talks:
        click.echo(
            "token ids are drawn at the texts' lengths and answers have a fixed length: this times, it does "
            "not talk"
        )
    return loaded


def _subject(options: Options, loaded: LoadedModel) -> Subject:
    return Subject(loaded.resolved.label, loaded.resolved.weights, loaded.dtype, options.device)


def _report(
    options: Options,
    loaded: LoadedModel,
    workload: Workload,
    runs: list[Run],
    selection: Selection,
    sizes: dict[str, Any],
    stats: object,
    equality: Equality | None,
    out_dir: str | None,
) -> None:
    from rich.console import Console

    subject = _subject(options, loaded)
    notes = [selection.note] if selection.note else []
    assert isinstance(stats, Stats)
    tiers = ", ".join(f"{tier.name} {tier.num_slots} chunks" for tier in stats.tiers)
    notes.append(
        f"tiers {tiers} ({sizes['chunk_bytes'] / 1e6:.2f} MB a chunk), Cost(l) from {sizes['cost']}; "
        f"{stats.chunks_dropped} chunks dropped, {stats.suspensions} suspensions, {stats.bytes_in / 1e6:.0f} "
        f"MB swapped in, {stats.bytes_out / 1e6:.0f} MB swapped out"
    )
    print_report([summarize(run) for run in runs], subject, Console(), equality=equality, notes=notes)
    folder = Path(out_dir or "out")
    stem = f"{'compare' if len(runs) == 2 else 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"
    config = {
        "options": as_json(settled(options, loaded)),
        "workload": asdict(workload),
        "sizes": sizes,
        "stats": asdict(stats),
    }
    record = build_record(runs, subject, config, equality=equality, notes=notes)
    json_path = write_json(folder / f"{stem}.json", record)
    if any(True for run in runs for _ in run.answered()):
        click.echo(f"plot: {plot_first_token(folder / f'{stem}.png', runs, subject)}")
    else:
        click.echo("plot: none, no turn was answered")
    click.echo(f"json: {json_path}")
