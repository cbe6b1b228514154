"""`pensieve simulate`: the scheduler and the cache in virtual time, on machines nobody has to own. Wires cases; the simulator plays them."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.table import Table

from pensieve.cli.outputs import check_paths, table_console
from pensieve.cli.simulation_options import (
    DEFAULT_DURATION_S,
    DEFAULT_THINK,
    POLICY_NAMES,
    default_warm_up_s,
    load_options,
    machine_options,
    option,
    output_options,
    run_options,
    step_options,
    trace_option,
)
from pensieve.errors import ConfigError
from pensieve.runtime.options import CPU_BATCH_TOKENS, CPU_CACHE_GB, Options
from pensieve.simulator.case import SYSTEMS, Case, Machine, Outcome
from pensieve.simulator.extent import extent_of
from pensieve.simulator.figures import FIGURES, compare, simulate_figures
from pensieve.simulator.measured import load_machine
from pensieve.simulator.output import plot, print_table, to_json, write_json
from pensieve.simulator.progress import progress
from pensieve.simulator.report import JSON_NAME as FIGURES_JSON_NAME
from pensieve.simulator.report import PAGE_NAME, comparison_rows, small_comparisons, write_page
from pensieve.simulator.report import to_json as figures_to_json
from pensieve.simulator.small_figures import SMALL_FIGURES
from pensieve.simulator.sweep import run_cases
from pensieve.workloads.arrivals import ThinkTime, parse_rates
from pensieve.workloads.load_plan import LoadOptions

JSON_NAME, PLOT_NAME = "simulate.json", "simulate.png"


def _names(text: str, known: dict[str, Any], what: str) -> list[str]:
    """Several names with commas, or `all`."""
    if text == "all":
        return list(known)
    names = [name.strip() for name in text.split(",")]
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise ConfigError(
            f"no {what} is called {unknown!r}: take {', '.join(known)} (several with commas) or all"
        )
    return names


@click.command()
@option(
    "--figure",
    "figures",
    default=None,
    help="The paper's figures instead: 10a | 3,4,10b-d | all; a page with pictures and tables in --out.  [default: none]",
)
@machine_options
@option(
    "--profile",
    "profile_path",
    type=click.Path(path_type=Path),
    default=None,
    help="Instead of both: a model on a machine as `pensieve profile --json > FILE` measured it.",
)
@option(
    "--devices",
    type=click.IntRange(min=1),
    default=1,
    help="Devices that share every layer (tensor parallel).",
)
@option(
    "--gpu-cache", "gpu_cache_gb", type=click.FloatRange(min=0, min_open=True), default=None,
    help="First tier, GB a device.  [default: what the weights leave of its memory; 1 with --profile of a CPU]",
)  # fmt: skip
@option(
    "--cpu-cache",
    "cpu_cache_gb",
    type=click.FloatRange(min=0),
    default=None,
    help="Second tier, GB a device.  [default: 220; none with --profile of a CPU]",
)
@option("--disk-cache", "disk_cache_gb", type=click.FloatRange(min=0), default=0.0, help="Third tier, GB.")
@option(
    "--system", "systems", default="pensieve", help=f"{' | '.join(SYSTEMS)}, several with commas, or all."
)
@option(
    "--policy",
    "policies",
    default="retention",
    help=f"What is evicted first: {' | '.join(POLICY_NAMES)}, several with commas, or all.",
)
@trace_option
@option(
    "--rate",
    "rates",
    default=None,
    help="Requests a second, as Poisson arrivals of conversations: 2 | 1,2,4 | 1:10 | 0.5:4:0.5.",
)
@option(
    "--users",
    type=click.IntRange(min=1),
    default=None,
    help="Closed loop: conversations at once, instead of --rate.",
)
@load_options
@step_options
@run_options
@output_options(JSON_NAME, PLOT_NAME)
def simulate(
    figures: str | None,
    model: str,
    hardware: str,
    profile_path: Path | None,
    devices: int,
    gpu_cache_gb: float | None,
    cpu_cache_gb: float | None,
    disk_cache_gb: float,
    systems: str,
    policies: str,
    trace: Path,
    rates: str | None,
    users: int | None,
    duration_s: float | None,
    warm_up_s: float | None,
    think: str | None,
    speed: float,
    turns: int | None,
    max_context: int | None,
    seed: int,
    jobs: int | None,
    out_dir: Path | None,
    json_path: Path | None,
    **limits: Any,
) -> None:
    """Play people in conversation through the real scheduler and cache in virtual time, on hardware that is only numbers.

    Every system and policy meets the same people at every rate. The same seed gives the same result, to the last digit. docs/simulator.md
    says what is modelled and how far to trust it.
    """
    if figures is not None:
        _figures(figures, out_dir or Path("figures"), jobs)
        return
    machine = Machine(model, hardware, devices, gpu_cache_gb or 0.0, cpu_cache_gb or 0.0, disk_cache_gb)
    if profile_path is not None:
        machine = _measured(profile_path, machine, limits)
        model, hardware = machine.model, machine.hardware
    if cpu_cache_gb is None and not machine.copies_first:
        machine = replace(machine, cpu_cache_gb=Machine().cpu_cache_gb)
    if gpu_cache_gb is None:
        machine = replace(
            machine, gpu_cache_gb=CPU_CACHE_GB if machine.copies_first else machine.largest_gpu_cache_gb()
        )
    asked = parse_rates(rates) if rates is not None else ()
    load = LoadOptions(
        users=users, rates=asked[:1], duration_s=duration_s or (DEFAULT_DURATION_S if asked else None), turns=turns,
        think=ThinkTime.parse(think or DEFAULT_THINK), trace=trace, speed=speed, seed=seed,
    )  # fmt: skip
    extent = extent_of(load, machine.first_tier_tokens(), max_context, limits.pop("chunk_tokens"))
    for remark in extent.remarks:
        click.secho(remark, dim=True, err=True)
    # one load a rate, all of the same seed, so that the same people come, only sooner
    loads = [replace(extent.load, rates=(rate,)) for rate in asked] or [extent.load]
    named = _names(systems, SYSTEMS, "system")
    cases = [
        Case(
            machine, one, system, policy, warm_up_s=default_warm_up_s(warm_up_s, bool(one.rates), one.duration_s),
            max_context=extent.max_context, chunk_tokens=extent.chunk_tokens, **limits,
        )
        for system in named
        for policy in (_names(policies, dict.fromkeys(POLICY_NAMES), "policy") if SYSTEMS[system].retain else ["retention"])
        for one in loads
    ]  # fmt: skip
    paths = check_paths(out_dir, json_path, JSON_NAME)
    begun_s = time.perf_counter()
    with progress(cases) as tell:
        outcomes = run_cases(cases, jobs=jobs, tell=tell)
    took_s = time.perf_counter() - begun_s
    console = table_console()
    console.print(
        f"[bold]{model}[/bold] on {devices} × {hardware}, {trace}: {_simulated(outcomes, took_s)}\n",
        highlight=False,
    )
    print_table(outcomes, console)
    record = to_json(outcomes)
    for path in paths:
        click.echo(f"json: {write_json(path, record)}", err=True)
    if out_dir is not None:
        subtitle = f"{trace}, {machine.gpu_cache_gb:.3g} GB gpu + {machine.cpu_cache_gb:g} GB cpu a device"
        click.echo(
            f"plot: {plot(out_dir / PLOT_NAME, outcomes, f'{model} on {devices} × {hardware}, simulated', subtitle)}",
            err=True,
        )
    if not sys.stdout.isatty():
        click.echo(json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False))


def _measured(path: Path, asked: Machine, limits: dict[str, Any]) -> Machine:
    """The machine of a profile. On a CPU a step is as large as `pensieve serve` makes it there, unless told otherwise."""
    context = click.get_current_context()

    def is_told(name: str) -> bool:
        return context.get_parameter_source(name) is not ParameterSource.DEFAULT

    for name in ("model", "hardware", "devices"):
        if is_told(name):
            raise ConfigError(
                f"--{name} does not go with --profile: the profile is of one model on one machine"
            )
    measured = load_machine(path)
    if measured.tiers_in_ram:
        for name, usual in (("max_batch_tokens", CPU_BATCH_TOKENS), ("max_running", Options().max_running)):
            if not is_told(name):
                limits[name] = usual
    return replace(
        Machine.of_profile(measured, asked.gpu_cache_gb, asked.cpu_cache_gb),
        disk_cache_gb=asked.disk_cache_gb,
    )


def _simulated(outcomes: list[Outcome], took_s: float) -> str:
    requests = sum(outcome.summary.sent for outcome in outcomes)
    hours = sum(outcome.simulated_s for outcome in outcomes) / 3600
    return f"{requests:,} requests in {hours:.1f} simulated hours, in {took_s:.0f} s"


def figure_names(name: str, known: Iterable[str]) -> list[str]:
    """`10b-d` and `10` are all the parts they stand for; what is none of these stays as it is."""
    if (span := re.fullmatch(r"(\d+)([a-z])-([a-z])", name)) is not None:
        number, first, last = span.groups()
        found = [figure for figure in known if figure[:-1] == number and first <= figure[-1] <= last]
    else:
        found = [figure for figure in known if name.isdigit() and figure.rstrip("abcd") == name]
    return found or [name]


def _figures(names: str, folder: Path, jobs: int | None) -> None:
    """Simulate figures of the paper, and write what they show."""
    known = dict.fromkeys((*SMALL_FIGURES, *FIGURES))
    asked = dict.fromkeys(part for name in names.split(",") for part in figure_names(name.strip(), known))
    wanted = _names(",".join(asked), known, "figure")
    check_paths(folder, None, PAGE_NAME)

    def run(cases: Sequence[Case]) -> list[Outcome]:
        with progress(cases) as tell:
            return run_cases(cases, jobs=jobs, tell=tell)

    small = [SMALL_FIGURES[name]() for name in wanted if name in SMALL_FIGURES]
    results = simulate_figures([FIGURES[name] for name in wanted if name in FIGURES], run)
    console = table_console()
    for title, comparisons in [
        *((f"Figure {figure.name}: {figure.title}", small_comparisons(figure)) for figure in small),
        *((f"Figure {result.figure.name}: {result.figure.title}", compare(result)) for result in results),
    ]:
        console.print(f"[bold]{title}[/bold]", highlight=False)
        table = Table(box=None, header_style="bold", pad_edge=False)
        for heading in ("", "paper", "simulated", "difference", "as it should be"):
            table.add_column(heading, justify="right" if heading else "left")
        for row in comparison_rows(comparisons):
            table.add_row(*row)
        console.print(table)
        console.print()
    click.echo(f"page: {write_page(folder, results, small)}", err=True)
    click.echo(f"json: {write_json(folder / FIGURES_JSON_NAME, figures_to_json(results, small))}", err=True)
