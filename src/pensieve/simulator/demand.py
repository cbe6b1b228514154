"""What a load asks of a machine before anything is simulated: how much there is to keep, and how long its
requests take alone.

Knows scripts, costs and sizes; never schedulers or caches. Both are bounds: nothing serves a load sooner than
an idle machine that has forgotten nothing, and no tier need be larger than everything that is ever said.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pensieve.core.plan import Span
from pensieve.errors import ConfigError
from pensieve.reporting.spread import Spread
from pensieve.simulator.case import Case, Machine
from pensieve.simulator.hardware import GB
from pensieve.workloads.scripts import Script, contexts


@dataclass(frozen=True, slots=True)
class Alone:
    """Latencies of a load's requests, each alone on the machine with its history in the first tier."""

    normalized_s: Spread
    ttft_s: Spread


@dataclass(frozen=True, slots=True)
class Demand:
    """What a load asks for."""

    scripts: tuple[Script, ...]
    kept_gb: float  # KV of every conversation at its longest
    longest_gb: float  # KV of the longest request

    @property
    def num_requests(self) -> int:
        """Turns of all conversations."""
        return sum(len(script.turns) for script in self.scripts)


def demand_of(case: Case) -> Demand:
    """What a case's load asks for. The machine's tiers and devices do not matter.

    Raises:
        ConfigError: the load does not say when its requests come.
    """
    planned = case.load.plan()[case.run]
    if planned.arrivals_s is None:
        raise ConfigError(
            f"a plan needs to know how many requests come, and {case.load.trace} does not tell: give --rate, "
            "or a trace with times"
        )
    scripts = tuple(script for player in planned.players for script in player.scripts)
    chunk_gb = case.machine.numbers().chunk_bytes(case.chunk_tokens) / GB
    chunks = [max(contexts(script)) // case.chunk_tokens + 1 for script in scripts]
    return Demand(scripts, sum(chunks) * chunk_gb, max(chunks) * chunk_gb)


def room_gb(machine: Machine, share: float) -> float:
    """What a device has for the first tier beside the weights, GB; below 0: not even for them.

    Args:
        machine: its tiers do not matter.
        share: of the device's memory that weights and first tier may have; the rest is work space.
    """
    numbers = machine.numbers()
    return (
        machine.device().memory_bytes * share
        - numbers.matrix_parameters * numbers.bytes_per_value / machine.devices
    ) / GB


def alone(case: Case, demand: Demand) -> Alone:
    """How long a load's requests take on a machine that has nothing else to do and has forgotten nothing."""
    cost, overheads = case.machine.cost(), case.machine.overheads
    host_s = overheads.step_s + overheads.request_s
    between_s = overheads.commit_step_s + overheads.commit_request_s  # a result and the next plan

    def span_s(start: int, stop: int) -> float:
        return cost.step_s([Span("", start, stop, None, emits_token=True)])

    normalized: list[float] = []
    first: list[float] = []
    for script in demand.scripts:
        for index, (turn, context) in enumerate(zip(script.turns, contexts(script), strict=True)):
            prompt = max(1, int(context) - turn.output_tokens)
            at = (
                max(0, prompt - turn.message_tokens - 1) if index else 0
            )  # (the last sampled token has no KV yet)
            ttft_s = -between_s
            while at < prompt:
                stop = min(prompt, at + case.max_batch_tokens)
                ttft_s += span_s(at, stop) + host_s + between_s
                at = stop
            middle = (
                prompt + turn.output_tokens // 2 + 1
            )  # a decode costs more as its context grows, in a straight line
            decodes_s = (turn.output_tokens - 1) * (span_s(middle - 1, middle) + host_s + between_s)
            first.append(ttft_s)
            normalized.append((ttft_s + decodes_s) / turn.output_tokens)
    return Alone(Spread.of(normalized), Spread.of(first))


def on_devices(case: Case, devices: int) -> Case:
    """The same on another number of devices."""
    return replace(case, machine=replace(case.machine, devices=devices))
