"""One simulation as a value: which machine, model, tiers, system, policy and people. Knows names and sizes;
never how any of them works.

A case is frozen and picklable; its result is a function of it to the last digit, so a sweep may run its cases
anywhere, in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from pensieve.config import CPU_STEP_MS, CUDA_STEP_MS, CacheConfig, SchedulerConfig, TierConfig
from pensieve.core.cache import TieredCache
from pensieve.core.cost import CostProfile
from pensieve.core.filling import Filling
from pensieve.core.pace import Pace
from pensieve.core.scheduler import Scheduler
from pensieve.errors import ConfigError
from pensieve.simulator.cost_model import FITTED, CostModel, ModelNumbers, Overheads, Roofline, chunk_costs
from pensieve.simulator.goal import Goal, Lateness
from pensieve.simulator.hardware import GB, Hardware, find_hardware
from pensieve.simulator.measured import MeasuredMachine
from pensieve.simulator.phases import PhasedFilling
from pensieve.simulator.policies import Setting, make_policy
from pensieve.simulator.records import RequestRecord, Summary, summarize
from pensieve.simulator.simulation import Simulation
from pensieve.simulator.worker import CostWorker, Links, VirtualClock
from pensieve.worker.presets import PRESETS
from pensieve.workloads.load_plan import LoadOptions

TIER_SHARE = 0.95  # of what weights leave of a device's memory: the rest is for activations


@dataclass(frozen=True, slots=True)
class System:
    """How a server schedules and what it keeps."""

    name: str
    words: str
    retain: bool = True
    lower_tiers: bool = True  # False: what leaves the first tier is dropped
    phases: bool = False  # prompts and decodes in separate steps
    reserve_share: float = 0.10


SYSTEMS = {
    system.name: system
    for system in (
        System("pensieve", "keeps each conversation's KV in tiers, one batch for everything"),
        System(
            "gpu-only",
            "as pensieve, but what leaves the GPU is dropped (the paper's variant 'GPU cache')",
            lower_tiers=False,
        ),
        System(
            "stateless",
            "keeps nothing between turns, one batch for prompts and decodes",
            retain=False,
            lower_tiers=False,
        ),
        System(
            "baseline",
            "keeps nothing, prompts and decodes in separate steps: the servers the paper compares with",
            retain=False,
            lower_tiers=False,
            phases=True,
            reserve_share=0.01,  # vLLM's watermark
        ),
        System(
            "pensieve-phased",
            "as pensieve, but prompts and decodes in separate steps (paper, Fig. 13)",
            phases=True,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Machine:
    """What a model runs on."""

    model: str = "opt-13b"  # a named architecture
    hardware: str = "a100-80gb"
    devices: int = 1  # that share every layer
    gpu_cache_gb: float = 40.0  # of each device (paper, evaluation)
    cpu_cache_gb: float = 220.0  # host memory of each device
    disk_cache_gb: float = 0.0
    overheads: Overheads = FITTED  # of a machine of the table; a measured one has its own
    # a profile: model, hardware and devices are its, whatever stands above
    measured: MeasuredMachine | None = None

    @classmethod
    def of_profile(cls, measured: MeasuredMachine, gpu_cache_gb: float, cpu_cache_gb: float) -> Machine:
        """A machine that was measured."""
        return cls(measured.model, measured.device, 1, gpu_cache_gb, cpu_cache_gb, measured=measured)

    def __post_init__(self) -> None:
        for name in ("gpu_cache_gb", "cpu_cache_gb", "disk_cache_gb"):
            if not getattr(self, name) >= 0:
                raise ConfigError(
                    f"--{name.removesuffix('_gb').replace('_', '-')} must be at least 0 GB, got "
                    f"{getattr(self, name)}"
                )
        if self.measured is not None and self.disk_cache_gb:
            raise ConfigError("a profile measures no disk: leave --disk-cache out with --profile")

    @property
    def copies_first(self) -> bool:
        """Whether all tiers are in RAM: copies that a request waits for then run as their own short step, and
        nothing is copied ahead (as in `pensieve serve`).
        """
        return self.measured is not None and self.measured.tiers_in_ram

    @property
    def step_ms(self) -> float:
        """What a step in which a request decodes takes by default (as `pensieve serve` has it)."""
        return CPU_STEP_MS if self.copies_first else CUDA_STEP_MS

    def chunk_bytes(self, chunk_tokens: int) -> int:
        """One chunk over all layers and devices."""
        return (
            self.numbers().chunk_bytes(chunk_tokens)
            if self.measured is None
            else self.measured.chunk_bytes(chunk_tokens)
        )

    def chunk_costs(self, cost: CostModel, chunk_tokens: int, max_context: int) -> CostProfile:
        """Cost(l), by which chunks are evicted: as it was measured, or as the cost model has it."""
        return (
            chunk_costs(cost, chunk_tokens, max_context)
            if self.measured is None
            else self.measured.chunk_costs(chunk_tokens)
        )

    def host_overheads(self) -> Overheads:
        """What a step costs beside the device's work."""
        return self.overheads if self.measured is None else self.measured.overheads()

    def numbers(self) -> ModelNumbers:
        """The model's.

        Raises:
            ConfigError: no architecture of that name, or a mixture of experts.
        """
        preset = PRESETS.get(self.model)
        if preset is None:
            raise ConfigError(f"no architecture is called {self.model!r}: take one of {', '.join(PRESETS)}")
        if "num_local_experts" in preset.config_kwargs:
            raise ConfigError(
                f"{self.model} is a mixture of experts, whose steps read weights by what is asked: it cannot "
                "be simulated"
            )
        shape = preset.shape
        tied = preset.config_kwargs.get("tie_word_embeddings", preset.family in ("gpt2", "opt"))
        return ModelNumbers(
            shape, preset.num_parameters - (0 if tied else shape.vocab_size * shape.hidden_size)
        )

    def device(self) -> Hardware:
        """One of its devices."""
        return find_hardware(self.hardware)

    def cost(self) -> CostModel:
        """What its steps cost."""
        if self.measured is not None:
            return self.measured.cost()
        return Roofline(self.numbers(), self.device(), self.devices)

    def links(self, chunk_tokens: int) -> Links:
        """What its copies take. Devices copy their shares side by side."""
        if self.measured is not None:
            return self.measured.links(chunk_tokens)
        device, count = self.device(), self.devices
        return Links(
            self.numbers().chunk_bytes(chunk_tokens),
            device.link_bytes_per_s * count,
            device.disk_read_bytes_per_s,
            device.disk_write_bytes_per_s,
            device.duplex_share,
        )

    def largest_gpu_cache_gb(self) -> float:
        """What the device's memory leaves beside the weights, but for a little: the largest first tier, GB a
        device.
        """
        numbers = self.numbers()
        return (
            max(
                0.0,
                TIER_SHARE
                * (
                    self.device().memory_bytes
                    - numbers.matrix_parameters * numbers.bytes_per_value / self.devices
                ),
            )
            / GB
        )

    def first_tier_tokens(self) -> int:
        """What the first tier holds."""
        return int(self.gpu_cache_gb * GB) * self.devices // self.chunk_bytes(1)

    def tiers(self, system: System, chunk_tokens: int) -> tuple[TierConfig, ...]:
        """Slots of each tier.

        Raises:
            ConfigError: model and cache do not fit in the device's memory.
        """
        if self.measured is None:
            self._check_room()
        chunk_bytes = self.chunk_bytes(chunk_tokens)
        devices = self.devices if self.measured is None else 1

        def tier(name: str, gigabytes: float) -> TierConfig:
            return TierConfig(name, int(gigabytes * GB * (devices if name != "disk" else 1)) // chunk_bytes)

        tiers = [tier("gpu", self.gpu_cache_gb)]
        if system.lower_tiers and self.cpu_cache_gb:
            tiers.append(tier("cpu", self.cpu_cache_gb))
            if self.disk_cache_gb:
                tiers.append(tier("disk", self.disk_cache_gb))
        return tuple(tiers)

    def _check_room(self) -> None:
        device, numbers = self.device(), self.numbers()
        weights = numbers.matrix_parameters * numbers.bytes_per_value / self.devices
        if weights + self.gpu_cache_gb * GB > device.memory_bytes:
            raise ConfigError(
                f"{self.model} takes {weights / GB:.0f} GB of each of {self.devices} {device.name}, which "
                f"leaves {max(0.0, device.memory_bytes - weights) / GB:.0f} GB: lower --gpu-cache (it is "
                f"{self.gpu_cache_gb:g}), or take more devices"
            )


@dataclass(frozen=True, slots=True)
class Case:
    """One simulation."""

    machine: Machine
    load: LoadOptions
    system: str = "pensieve"
    policy: str = "retention"
    run: int = 0  # which of the load's runs: one for each rate
    warm_up_s: float = 0.0  # requests sent before do not count
    chunk_tokens: int = 32
    max_context: int = 16_384  # tokens of prompt and answer (paper, evaluation)
    max_batch_tokens: int = 2048
    max_running: int = 512
    # as the paper has it; "work": as `pensieve serve` does by default
    admission: Literal["work", "fcfs"] = "fcfs"
    # of a step in which a request decodes, with admission by work. None: `Machine.step_ms`
    step_ms: float | None = None
    debug: bool = False
    give_up: Goal | None = None  # stop when it is certain that this is missed

    @property
    def label(self) -> str:
        """Its line in a picture."""
        return (
            self.system
            if self.policy == "retention" or not SYSTEMS[self.system].retain
            else f"{self.system}, {self.policy}"
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a case."""

    case: Case
    rate: float | None  # asked for, requests a second
    summary: Summary
    simulated_s: float
    num_steps: int
    busy_share: float  # of the simulated time, the device computes or waits for a swap-in
    swap_wait_share: float  # it waits for a swap-in
    mean_in_system: float  # requests sent and not finished, over time
    chunks: dict[str, int]  # copied up and down, reclaimed, dropped
    computed_tokens: int
    used_slots: tuple[int, ...]  # at the end, a tier
    gave_up: bool = False  # it was stopped: figures are of the part that was simulated
    records: tuple[RequestRecord, ...] = ()


def run_case(
    case: Case, *, tell: Callable[[float, int], None] | None = None, keep_records: bool = False
) -> Outcome:
    """Simulate one case; a function of the case alone.

    Raises:
        ConfigError: something in it contradicts something else, or is not known.
    """
    system = find_system(case.system)
    machine = case.machine
    cost = machine.cost()
    planned = case.load.plan()[case.run]
    num_tokens = max(case.max_context, case.chunk_tokens)
    profile = machine.chunk_costs(cost, case.chunk_tokens, num_tokens)
    tiers = machine.tiers(system, case.chunk_tokens)
    playing: list[
        Simulation
    ] = []  # (the one below, which needs the cache, whose policy may ask it for the future)
    setting = Setting(
        profile.of_chunk,
        case.chunk_tokens,
        tiers[0].num_slots,
        lambda key, now_s: playing[0].next_use_s(key[1], now_s),
    )
    cache = TieredCache(CacheConfig(tiers, case.chunk_tokens), make_policy(case.policy, setting))
    config = SchedulerConfig(
        max_batch_tokens=max(case.max_batch_tokens, case.chunk_tokens + case.max_running),
        max_running=case.max_running,
        max_waiting=1 << 30,  # the paper's load waits however long the queue is
        reserve_share=system.reserve_share,
        retain=system.retain,
        admission="fcfs" if system.phases else case.admission,
        step_s=(case.step_ms or machine.step_ms) / 1e3
        if case.admission == "work" and not system.phases
        else None,
    )
    if machine.copies_first:
        config = replace(config, copies_first=True, copy_ahead_share=0.0)
    filling = PhasedFilling if system.phases else Filling
    scheduler = Scheduler(config, cache, case.max_context, pace=Pace(profile), filling=filling)
    clock = VirtualClock()
    worker = CostWorker(cost, machine.links(case.chunk_tokens), len(tiers), clock, machine.host_overheads())
    simulation = Simulation(scheduler, worker, clock, debug=case.debug)
    playing.append(simulation)
    window_s = None
    if planned.rate is not None:  # (a trace with times of its own is played to its end)
        assert planned.arrivals_s is not None
        if case.warm_up_s >= planned.arrivals_s:
            raise ConfigError(
                f"--warm-up must be shorter than the arrivals of {planned.arrivals_s:g} s, got "
                f"{case.warm_up_s:g}"
            )
        window_s = (case.warm_up_s, planned.arrivals_s)
    lateness = Lateness(case.give_up, planned.players, window_s) if case.give_up is not None else None
    gave_up = not simulation.play(planned.players, window_s=window_s, tell=tell, lateness=lateness)
    begin_s, end_s = window_s or (
        case.warm_up_s,
        max((record.finished_s for record in simulation.records), default=0.0) + 1e-9,
    )
    elapsed_s = clock.now_s or 1.0
    places = cache.places
    return Outcome(
        case,
        planned.rate,
        summarize(simulation.records, begin_s, end_s),
        clock.now_s,
        worker.num_steps,
        worker.busy_s / elapsed_s,
        worker.waited_s / elapsed_s,
        simulation.num_in_system_s / elapsed_s,
        {
            "swapped_in": sum(worker.chunks_up.values()),
            "copied_down": sum(worker.chunks_down.values()),
            "reclaimed": places.num_reclaimed,
            "dropped": places.num_dropped,
        },
        worker.num_tokens,
        tuple(pool.num_used for pool in places.pools),
        gave_up,
        tuple(simulation.records) if keep_records else (),
    )


def find_system(name: str) -> System:
    """A system by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in SYSTEMS:
        raise ConfigError(f"no system is called {name!r}: take one of {', '.join(SYSTEMS)}")
    return SYSTEMS[name]
