"""`pensieve simulate`: the scheduler and the cache in virtual time, on machines given as numbers.

Knows options and tables; the simulator plays the cases.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pensieve.cli.outputs import check_paths, table_console
from pensieve.cli.simulation_options import (
    POLICY_NAMES,
    LoadChoice,
    OutputChoice,
    StepChoice,
    default_warm_up_s,
    load_options,
    machine_options,
    option,
    output_options,
    parse_names,
    run_options,
    step_options,
    take,
    trace_option,
)
from pensieve.errors import ConfigError
from pensieve.reporting.json_file import write_json
from pensieve.runtime.options import CPU_BATCH_TOKENS, CPU_CACHE_GB, Options
from pensieve.simulator.case import SYSTEMS, Case, Machine, Outcome
from pensieve.simulator.extent import extent_of
from pensieve.simulator.measured import load_machine
from pensieve.simulator.output import plot, print_table, to_json
from pensieve.simulator.progress import progress
from pensieve.simulator.sweep import run_cases
from pensieve.workloads.arrivals import parse_rates

JSON_NAME, PLOT_NAME = "simulate.json", "simulate.png"


@dataclass(frozen=True, slots=True)
class MachineChoice:
    """The machine and its tiers, as the options name them."""

    model: str
    hardware: str
    devices: int
    gpu_cache_gb: float | None
    cpu_cache_gb: float | None
    disk_cache_gb: float

    def machine(self) -> Machine:
        """The machine, with tiers of 0 GB where no size is given."""
        return Machine(
            self.model,
            self.hardware,
            self.devices,
            self.gpu_cache_gb or 0.0,
            self.cpu_cache_gb or 0.0,
            self.disk_cache_gb,
        )

    def with_default_tiers(self, machine: Machine) -> Machine:
        """`machine` with the default size of each tier that no option sizes."""
        if self.cpu_cache_gb is None and not machine.copies_first:
            machine = replace(machine, cpu_cache_gb=Machine().cpu_cache_gb)
        if self.gpu_cache_gb is None:
            size_gb = CPU_CACHE_GB if machine.copies_first else machine.largest_gpu_cache_gb()
            machine = replace(machine, gpu_cache_gb=size_gb)
        return machine


@click.command()
@option(
    "--figure",
    "figures",
    default=None,
    help="The paper's figures instead: 10a | 3,4,10b-d | all; a page with pictures and tables in --out.  "
    "[default: none]",
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
    help="First tier, GB a device.  [default: what the weights leave of its memory; 1 with --profile of a "
        "CPU]",
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
    profile_path: Path | None,
    systems: str,
    policies: str,
    rates: str | None,
    users: int | None,
    **arguments: Any,
) -> None:
    """Play people in conversation through the real scheduler and cache in virtual time, on hardware that is
    only numbers.

    Every system and policy meets the same people at every rate. The same seed gives the same result, to the
    last digit. docs/simulator.md says what is modelled and how far to trust it.
    """
    output = take(OutputChoice, arguments)
    if figures is not None:
        _paper_figures(figures, output.out_dir or Path("figures"), output.jobs)
        return
    steps, wanted = take(StepChoice, arguments), take(MachineChoice, arguments)
    machine = wanted.machine()
    if profile_path is not None:
        machine, steps = _measured(profile_path, machine, steps)
    machine = wanted.with_default_tiers(machine)
    load = take(LoadChoice, arguments)
    planned_rates = parse_rates(rates) if rates is not None else ()
    extent = extent_of(
        load.options(planned_rates[:1], users),
        machine.first_tier_tokens(),
        load.max_context,
        steps.chunk_tokens,
    )
    for remark in extent.remarks:
        click.secho(remark, dim=True, err=True)
    # one load a rate, all of the same seed, so that the same people come, only sooner
    loads = [replace(extent.load, rates=(rate,)) for rate in planned_rates] or [extent.load]
    named = parse_names(systems, SYSTEMS, "system")
    cases = [
        Case(
            machine, one, system, policy, warm_up_s=default_warm_up_s(load.warm_up_s, bool(one.rates), one.duration_s),
            max_context=extent.max_context, chunk_tokens=extent.chunk_tokens, **steps.of_case(),
        )
        for system in named
        for policy in (parse_names(policies, POLICY_NAMES, "policy") if SYSTEMS[system].retain else ["retention"])
        for one in loads
    ]  # fmt: skip
    paths = check_paths(output.out_dir, output.json_path, JSON_NAME)
    begun_s = time.perf_counter()
    with progress(cases) as tell:
        outcomes = run_cases(cases, jobs=output.jobs, tell=tell)
    took_s = time.perf_counter() - begun_s
    console = table_console()
    console.print(
        f"[bold]{machine.model}[/bold] on {machine.devices} × {machine.hardware}, {load.trace}: "
        f"{_simulated(outcomes, took_s)}\n",
        highlight=False,
    )
    print_table(outcomes, console)
    record = to_json(outcomes)
    for path in paths:
        click.echo(f"json: {write_json(path, record)}", err=True)
    if output.out_dir is not None:
        title = f"{machine.model} on {machine.devices} × {machine.hardware}, simulated"
        subtitle = (
            f"{load.trace}, {machine.gpu_cache_gb:.3g} GB gpu + {machine.cpu_cache_gb:g} GB cpu a device"
        )
        click.echo(
            f"plot: {plot(output.out_dir / PLOT_NAME, outcomes, title, subtitle)}",
            err=True,
        )
    if not sys.stdout.isatty():
        click.echo(json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False))


def _measured(path: Path, asked: Machine, steps: StepChoice) -> tuple[Machine, StepChoice]:
    """The machine of a profile. On a CPU a step is as large as `pensieve serve` makes it there, unless told
    otherwise.
    """
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
        if not is_told("max_batch_tokens"):
            steps = replace(steps, max_batch_tokens=CPU_BATCH_TOKENS)
        if not is_told("max_running"):
            steps = replace(steps, max_running=Options().max_running)
    machine = Machine.of_profile(measured, asked.gpu_cache_gb, asked.cpu_cache_gb)
    return replace(machine, disk_cache_gb=asked.disk_cache_gb), steps


def _simulated(outcomes: list[Outcome], took_s: float) -> str:
    requests = sum(outcome.summary.sent for outcome in outcomes)
    hours = sum(outcome.simulated_s for outcome in outcomes) / 3600
    return f"{requests:,} requests in {hours:.1f} simulated hours, in {took_s:.0f} s"


def _paper_figures(names: str, folder: Path, jobs: int | None) -> None:
    """Call `benchmarks/paper`, which is in the repository and not in the installed package."""
    benchmarks = Path(__file__).resolve().parents[3] / "benchmarks"
    if not (benchmarks / "paper" / "command.py").is_file():
        raise ConfigError(
            "--figure needs benchmarks/paper, which is not part of the installed package: clone the "
            "repository and run `make paper-figures` there"
        )
    sys.path.append(str(benchmarks))
    importlib.import_module("paper.command").write_figures(names, folder, jobs)
