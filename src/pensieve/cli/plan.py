"""`pensieve plan`: the cheapest tiers that hold a load. Wires a search over simulated machines; the simulator
says how each does.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import click

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
    run_options,
    step_options,
    take,
    trace_option,
)
from pensieve.errors import ConfigError
from pensieve.reporting.json_file import write_json
from pensieve.simulator.answer import make_plan
from pensieve.simulator.case import Case, Machine, Outcome
from pensieve.simulator.demand import Demand, alone, demand_of, on_devices, room_gb
from pensieve.simulator.extent import extent_of
from pensieve.simulator.goal import Goal, Metric, Quantile
from pensieve.simulator.hardware import GB
from pensieve.simulator.plan_output import plot, print_margins, print_trials, sentences, to_json
from pensieve.simulator.planner import Prices, Space, Trials, rounded
from pensieve.simulator.progress import progress
from pensieve.simulator.sweep import run_cases

JSON_NAME, PLOT_NAME = "plan.json", "plan.png"
# A month of 730 hours at on-demand prices of clouds, late 2025, in US dollars. They differ by a factor of two
# between vendors: give your own.
#   device: an H200 at 3.59 an hour.
#   GB of device memory: an H200 is an H100 with 61 GB more, for 0.90 an hour more.
#   GB of host memory: 0.0042 an hour, as general-purpose machines are charged by the GB.
#   GB of disk: local or network NVMe, 0.08 a month.
PRICE_DEVICE, PRICE_GPU_GB, PRICE_CPU_GB, PRICE_DISK_GB = 2_600.0, 11.0, 3.0, 0.08
MEMORY_SHARE = 0.9  # what vLLM takes by default, too: the rest is for activations and the driver
_LESS_THAN_ALONE = 0.97  # (a window's quantile may lie a little below that of all requests)
# times everything that is said: with the scheduler's reserve and what it copies ahead, more cannot be used
_USEFUL = 1.5


@dataclass(frozen=True, slots=True)
class Target:
    """The latency that the load must be held within."""

    p90_latency_ms: float | None
    latency_ms: float | None
    quantile: Quantile
    metric: Metric

    def goal(self) -> Goal:
        """Raises ConfigError if the options contradict each other."""
        if (self.p90_latency_ms is None) == (self.latency_ms is None):
            raise ConfigError(
                "a plan needs one target: --p90-latency-ms 120, or --latency-ms with --quantile"
            )
        if self.p90_latency_ms is not None and self.quantile != "p90":
            raise ConfigError(
                f"--p90-latency-ms is about p90, --quantile says {self.quantile}: "
                f"give --latency-ms {self.p90_latency_ms:g} instead"
            )
        return Goal((self.p90_latency_ms or self.latency_ms or 0.0) / 1e3, self.quantile, self.metric)


@dataclass(frozen=True, slots=True)
class PriceChoice:
    """Prices a month."""

    price_gpu_gb: float
    price_cpu_gb: float
    price_disk_gb: float
    price_device: float

    def prices(self) -> Prices:
        return Prices(self.price_gpu_gb, self.price_cpu_gb, self.price_disk_gb, self.price_device)


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest machine that may be bought."""

    max_devices: int
    max_cpu_gb: float | None  # None: as much as can be used
    max_disk_gb: float | None
    memory_share: float


@click.command()
@machine_options
@option(
    "--max-devices",
    type=click.IntRange(min=1),
    default=1,
    help="Consider 1, 2, 4, ... up to so many devices that share every layer.",
)
@option(
    "--max-cpu-gb",
    type=click.FloatRange(min=0),
    default=None,
    help="The largest CPU tier, GB a device.  [default: whatever can be used]",
)
@option(
    "--max-disk-gb",
    type=click.FloatRange(min=0),
    default=None,
    help="The largest disk tier, GB; 0: none.  [default: whatever can be used]",
)
@option(
    "--memory-share",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=MEMORY_SHARE,
    help="Of the device's memory, for weights and first tier together.",
)
@option(
    "--p90-latency-ms",
    type=click.FloatRange(min=0, min_open=True),
    default=None,
    help="The target; the same as --latency-ms with p90.",
)
@option(
    "--latency-ms",
    type=click.FloatRange(min=0, min_open=True),
    default=None,
    help="The target, for --quantile and --metric.",
)
@option(
    "--quantile",
    type=click.Choice(["p50", "p90", "p99"]),
    default="p90",
    help="Of the requests, who must be served within the target.",
)
@option(
    "--metric",
    type=click.Choice(["normalized", "ttft"]),
    default="normalized",
    help="normalized: end-to-end latency over output tokens; ttft: time to first token.",
)
@option(
    "--price-gpu-gb",
    type=click.FloatRange(min=0),
    default=PRICE_GPU_GB,
    help="A GB of first tier, a month. Only ratios matter.",
)
@option("--price-cpu-gb", type=click.FloatRange(min=0), default=PRICE_CPU_GB, help="A GB of CPU tier.")
@option("--price-disk-gb", type=click.FloatRange(min=0), default=PRICE_DISK_GB, help="A GB of disk tier.")
@option("--price-device", type=click.FloatRange(min=0), default=PRICE_DEVICE, help="A device.")
@option("--policy", type=click.Choice(POLICY_NAMES), default="retention", help="What is evicted first.")
@trace_option
@option(
    "--rate", type=click.FloatRange(min=0, min_open=True), default=None,
    help="Requests a second, as Poisson arrivals of conversations.  [default: as a trace's times say]",
)  # fmt: skip
@load_options
@step_options
@run_options
@output_options(JSON_NAME, PLOT_NAME)
def plan(**arguments: Any) -> None:
    """Find the cheapest tiers that hold a load within a latency, and what another GB of each would bring.

    A few dozen machines are simulated. Exit status 1: none holds it; then it says by how much it is missed,
    and why. docs/simulator.md says what is modelled and how far to trust it.
    """
    goal, prices = take(Target, arguments).goal(), take(PriceChoice, arguments).prices()
    asked, steps = take(LoadChoice, arguments), take(StepChoice, arguments)
    limits, output = take(Limits, arguments), take(OutputChoice, arguments)
    model, hardware, policy, rate = (arguments[name] for name in ("model", "hardware", "policy", "rate"))
    load = asked.options(() if rate is None else (rate,))
    machine = Machine(model, hardware)
    largest = replace(
        machine,
        devices=limits.max_devices,
        gpu_cache_gb=replace(machine, devices=limits.max_devices).largest_gpu_cache_gb(),
    )
    extent = extent_of(load, largest.first_tier_tokens(), asked.max_context, steps.chunk_tokens)
    for remark in extent.remarks:
        click.secho(remark, dim=True, err=True)
    case = Case(
        machine, extent.load, policy=policy, warm_up_s=default_warm_up_s(asked.warm_up_s, rate is not None, load.duration_s),
        max_context=extent.max_context, chunk_tokens=extent.chunk_tokens, **steps.of_case(),
    )  # fmt: skip
    paths = check_paths(output.out_dir, output.json_path, JSON_NAME)
    spaces = _spaces(case, goal, demand_of(case), limits)

    def run(cases: Sequence[Case]) -> list[Outcome]:
        with progress(cases) as tell:
            return run_cases(cases, jobs=output.jobs, tell=tell)

    begun_s = time.perf_counter()
    book = Trials(case, goal, prices, run)
    answer = make_plan(book, spaces)
    took_s = time.perf_counter() - begun_s
    console = table_console()
    console.print(
        f"[bold]{model}[/bold] on {hardware}, {asked.trace}: {len(book.trials)} simulations in {took_s:.0f} "
        "s\n",
        highlight=False,
    )
    print_trials(book, console, answer.best)
    if answer.margins:
        console.print()
        print_margins(book, answer, console)
    words = sentences(book, answer)
    console.print()
    console.print(f"[bold]{words[0]}[/bold] {' '.join(words[1:])}", highlight=False)
    record = to_json(book, answer)
    for path in paths:
        click.echo(f"json: {write_json(path, record)}", err=True)
    if output.out_dir is not None:
        subtitle = f"{asked.trace}" + (f" at {rate:g} requests/s" if rate is not None else "")
        click.echo(
            f"plot: {plot(output.out_dir / PLOT_NAME, book, answer, f'{model} on {hardware}, simulated', subtitle)}",
            err=True,
        )
    if not sys.stdout.isatty():
        click.echo(json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False))
    if answer.best is None:
        sys.exit(1)


def _spaces(case: Case, goal: Goal, demand: Demand, limits: Limits) -> list[Space]:
    """What may be bought, for each number of devices on which the model and its longest request fit and are
    fast enough when alone.

    Raises:
        ConfigError: there is none; the message says what the largest number lacks.
    """
    spaces: list[Space] = []
    why = ""
    counts = [1 << power for power in range(limits.max_devices.bit_length())]
    for devices in counts:
        one = on_devices(case, devices)
        machine = one.machine
        alone_s = goal.quantile_of(
            getattr(alone(one, demand), "normalized_s" if goal.metric == "normalized" else "ttft_s")
        )
        room, each_gb = room_gb(machine, limits.memory_share), demand.longest_gb / devices
        least_gb = each_gb * 1.02  # (and the last sampled tokens)
        if room < least_gb:
            weights_gb = limits.memory_share * machine.device().memory_bytes / GB - room
            why = (
                f"{machine.model} takes {weights_gb:.3g} GB of each of {devices} {machine.hardware} and its "
                f"longest request {each_gb:.2g} GB more; --memory-share {limits.memory_share:g} leaves "
                f"{limits.memory_share * machine.device().memory_bytes / GB:.3g}: raise --max-devices (it is "
                f"{limits.max_devices}) or --memory-share, lower --max-context, or take a smaller model"
            )
            continue
        if goal.latency_s < _LESS_THAN_ALONE * alone_s:
            why = (
                f"the target of {1e3 * goal.latency_s:g} ms is less than requests take that have {devices} "
                f"{machine.hardware} to themselves: their {goal.words} is {1e3 * alone_s:.3g} {goal.unit}; "
                "no memory and no lower rate help: take a target above it, more devices (--max-devices) or a "
                "faster machine (--hardware)"
            )
            continue
        useful_gb = demand.kept_gb / devices
        gpu_gb = rounded(min(room, max(_USEFUL * useful_gb, 2 * least_gb)))
        kept_gb = rounded(_USEFUL * useful_gb)
        cpu_gb = kept_gb if limits.max_cpu_gb is None else min(limits.max_cpu_gb, kept_gb)
        disk_gb = rounded(_USEFUL * demand.kept_gb)
        spaces.append(
            Space(
                devices,
                least_gb,
                gpu_gb,
                cpu_gb,
                disk_gb if limits.max_disk_gb is None else min(limits.max_disk_gb, disk_gb),
                kept_gb,
            )
        )
    if not spaces:
        raise ConfigError(why)
    return spaces
