"""The cheapest tiers that hold a load, found by simulating few of them. Knows cases, prices and a target;
what runs cases is given to it.

Latency falls with every tier, up to noise: what held holds with more of everything, what missed misses with
less. So a run settles many others that are never run, and what is dearer than something that holds need not
be looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from pensieve.errors import ConfigError
from pensieve.simulator.case import Case, Machine, Outcome
from pensieve.simulator.goal import Goal

Run = Callable[[Sequence[Case]], list[Outcome]]

STEPS_PER_OCTAVE = 8  # CPU tiers are a factor of 2^(1/8), 9 %, apart
_CPU_OCTAVES = 10  # below the largest
_WORTH = 0.02  # of the tiers' price: less is not worth another simulation
_PROBES = 4  # of a batch, at least, as long as there is anything to ask
_GPU_HALVINGS = 3  # below the largest
_DISK_SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16)  # of the largest, once it is known that a disk is worth having


@dataclass(frozen=True, slots=True)
class Prices:
    """A month, in any currency: only ratios matter."""

    gpu_gb: float  # of first tier
    cpu_gb: float
    disk_gb: float
    device: float

    def __post_init__(self) -> None:
        for name in ("gpu_gb", "cpu_gb", "disk_gb", "device"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(
                    f"--price-{name.replace('_', '-')} must be at least 0, got {getattr(self, name)}"
                )

    def of(self, machine: Machine) -> float:
        """A machine's."""
        a_device = self.device + machine.gpu_cache_gb * self.gpu_gb + machine.cpu_cache_gb * self.cpu_gb
        return machine.devices * a_device + machine.disk_cache_gb * self.disk_gb


@dataclass(frozen=True, slots=True)
class Space:
    """What may be bought for one number of devices; GB of each device, but the disk's."""

    devices: int
    least_gpu_gb: float  # the longest request must fit
    gpu_gb: float
    cpu_gb: float
    disk_gb: float
    kept_gb: float  # a CPU tier that holds everything that is ever said; above `cpu_gb` where that is limited

    def gpu_sizes(self) -> list[float]:
        """First tiers to begin with: the largest and its halves."""
        sizes = [rounded(self.gpu_gb / 2**halvings) for halvings in range(_GPU_HALVINGS + 1)]
        return [size for size in sizes if size >= self.least_gpu_gb] or [self.gpu_gb]

    def cpu_sizes(self) -> list[float]:
        """CPU tiers, ascending, nothing first."""
        if not self.cpu_gb:
            return [0.0]
        below = range(_CPU_OCTAVES * STEPS_PER_OCTAVE, 0, -1)
        return sorted(
            {0.0, self.cpu_gb, *(rounded(self.cpu_gb / 2 ** (step / STEPS_PER_OCTAVE)) for step in below)}
        )


@dataclass(frozen=True, slots=True)
class Trial:
    """A case that was simulated."""

    case: Case
    outcome: Outcome
    load: float  # offered load as a fraction of the planned one
    latency_s: float  # infinite: a request failed, or the simulation was given up
    price: float

    @property
    def machine(self) -> Machine:
        """What it ran on."""
        return self.case.machine

    def has(self, machine: Machine) -> bool:
        """Whether it had at least what a machine has, of every tier, and as many devices."""
        ours = self.machine
        return ours.devices == machine.devices and all(
            getattr(ours, tier) >= getattr(machine, tier)
            for tier in ("gpu_cache_gb", "cpu_cache_gb", "disk_cache_gb")
        )

    def needs(self, machine: Machine) -> bool:
        """Whether it had at most what a machine has."""
        return replace(self, case=replace(self.case, machine=machine)).has(self.machine)


@dataclass(slots=True)
class Trials:
    """Every trial, each case once. Sole owner of what is known."""

    base: Case
    goal: Goal
    prices: Prices
    run: Run
    trials: dict[Case, Trial] = field(default_factory=dict)

    def try_all(self, wanted: Iterable[tuple[Machine, float]], *, to_the_end: bool = True) -> list[Trial]:
        """Simulate machines under shares of the load, those not known yet, in one batch; the trials come in
        the order asked for.

        Not `to_the_end`: only whether they hold is wanted, so a simulation is given up once that is certain.
        """
        cases = [(at_load(replace(self.base, machine=machine), load), load) for machine, load in wanted]
        new = {
            case: load
            for case, load in cases
            if case not in self.trials or (to_the_end and self.trials[case].outcome.gave_up)
        }
        if new:
            give_up = None if to_the_end else self.goal
            for (case, load), outcome in zip(
                new.items(), self.run([replace(case, give_up=give_up) for case in new]), strict=True
            ):
                latency_s = math.inf if outcome.gave_up else self.goal.of(outcome.summary)
                self.trials[case] = Trial(case, outcome, load, latency_s, self.prices.of(case.machine))
        return [self.trials[case] for case, _ in cases]

    def holds(self, trial: Trial) -> bool:
        """Whether a trial kept to the target."""
        return trial.latency_s <= self.goal.latency_s

    def machine(self, devices: int, gpu_gb: float, cpu_gb: float, disk_gb: float) -> Machine:
        """The base's machine with other tiers."""
        return replace(
            self.base.machine,
            devices=devices,
            gpu_cache_gb=gpu_gb,
            cpu_cache_gb=cpu_gb,
            disk_cache_gb=disk_gb,
        )


@dataclass(slots=True)
class _Column:
    """CPU tiers of all sizes beside one first tier and disk. Sizes up to `low` miss; those from `high` on
    hold, or are too dear.
    """

    machine: Machine
    sizes: list[float]
    low: int = -1
    high: int = -1

    def at(self, index: int) -> Machine:
        """One of its machines."""
        return replace(self.machine, cpu_cache_gb=self.sizes[index])

    def between(self, count: int) -> list[int]:
        """So many sizes, or all there are, that cut what lies between the bounds into equal parts."""
        inside = self.high - self.low - 1
        count = min(count, inside)
        return [self.low + (part + 1) * (inside + 1) // (count + 1) for part in range(count)]


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came to, for one number of devices."""

    space: Space
    best: Trial | None  # None: nothing holds
    everything: Trial  # with as much of every tier as there may be


def search(book: Trials, space: Space) -> Found:
    """The cheapest machine of a space that holds the load.

    All columns are searched at once, a probe in each, so that a batch keeps many cores busy; what is proposed
    depends on outcomes alone, and so the answer does not on the number of cores. The answer's upper neighbour
    holds too: one lucky run among those that miss is not taken.
    """
    largest = book.machine(space.devices, space.gpu_gb, space.cpu_gb, space.disk_gb if space.cpu_gb else 0.0)
    smallest = book.machine(space.devices, space.gpu_sizes()[-1], 0.0, 0.0)
    book.try_all([(smallest, 1.0), (largest, 1.0)], to_the_end=False)
    everything = book.try_all([(largest, 1.0)])[0]  # (by how much that misses is part of the answer)
    if not book.holds(everything):
        return Found(space, None, everything)
    disks = sorted({0.0, largest.disk_cache_gb})
    columns = [_column(book, space, gpu_gb, disk_gb) for gpu_gb in space.gpu_sizes() for disk_gb in disks]
    lucky: set[Case] = set()
    best = _narrow(book, columns, everything, lucky)
    at = best.machine
    finer = [
        _column(book, space, at.gpu_cache_gb, rounded(at.disk_cache_gb * share))
        for share in _DISK_SHARES
        if at.disk_cache_gb
    ]
    for factor in (2**-0.25, 2**-0.5, 2**-0.75):
        if (smaller := rounded(at.gpu_cache_gb * factor)) >= space.least_gpu_gb:
            finer.append(_column(book, space, smaller, at.disk_cache_gb))
    best = _narrow(book, [*columns, *finer], everything, lucky)
    alone = book.machine(space.devices, best.machine.gpu_cache_gb, 0.0, 0.0)
    if not any(trial.has(alone) and not book.holds(trial) for trial in _known(book, everything)):
        book.try_all([(alone, 1.0)], to_the_end=False)  # (tiers of next to nothing are better not there)
    return Found(space, _best(book, everything, lucky), everything)


def _column(book: Trials, space: Space, gpu_gb: float, disk_gb: float) -> _Column:
    sizes = space.cpu_sizes()
    # (a disk is below a CPU tier, or nowhere)
    return _Column(book.machine(space.devices, gpu_gb, 0.0, disk_gb), sizes[1:] if disk_gb else sizes)


def _narrow(book: Trials, columns: Sequence[_Column], everything: Trial, lucky: set[Case]) -> Trial:
    """The cheapest in some columns, or what is known to be cheaper. `lucky`: trials that held below one that
    missed; more are added.
    """
    while True:
        best = _best(book, everything, lucky)
        for column in columns:
            _bound(book, column, best, lucky)
        unsettled = [column for column in columns if column.high - column.low > 1]
        if unsettled:
            each = -(-_PROBES // len(unsettled))
            probes = [column.at(index) for column in unsettled for index in column.between(each)]
            book.try_all(((machine, 1.0) for machine in dict.fromkeys(probes)), to_the_end=False)
            continue
        above = _above(columns, best)
        if above is None or book.holds(book.try_all([(above, 1.0)], to_the_end=False)[0]):
            return best
        lucky.add(best.case)


def _best(book: Trials, everything: Trial, lucky: set[Case]) -> Trial:
    """The cheapest that holds; of equal ones that with the smallest tiers."""
    held = [trial for trial in _known(book, everything) if book.holds(trial) and trial.case not in lucky]
    return min(
        held,
        key=lambda trial: (
            trial.price,
            trial.machine.gpu_cache_gb,
            trial.machine.cpu_cache_gb,
            trial.machine.disk_cache_gb,
        ),
    )


def _known(book: Trials, everything: Trial) -> list[Trial]:
    return [
        trial
        for trial in book.trials.values()
        if trial.load == 1.0 and trial.machine.devices == everything.machine.devices
    ]


def _bound(book: Trials, column: _Column, best: Trial, lucky: set[Case]) -> None:
    """Set a column's bounds by all that is known; between them lies what is unknown and cheaper than the best
    by enough to matter.
    """
    known = _known(book, best)
    missed = [trial for trial in known if not book.holds(trial) or trial.case in lucky]
    held = [trial for trial in known if book.holds(trial) and trial.case not in lucky]
    tiers_price = best.price - best.machine.devices * book.prices.device
    dear = best.price - _WORTH * tiers_price
    indices = range(len(column.sizes))
    column.low = max((i for i in indices if any(trial.has(column.at(i)) for trial in missed)), default=-1)
    column.high = next(
        (
            i
            for i in indices
            if any(trial.needs(column.at(i)) for trial in held) or book.prices.of(column.at(i)) >= dear
        ),
        len(column.sizes),
    )


def _above(columns: Sequence[_Column], best: Trial) -> Machine | None:
    """The next larger CPU tier beside the same others; None: there is none."""
    for column in columns:
        if (
            replace(best.machine, cpu_cache_gb=0.0) == column.machine
            and best.machine.cpu_cache_gb in column.sizes
        ):
            index = column.sizes.index(best.machine.cpu_cache_gb) + 1
            return column.at(index) if index < len(column.sizes) else None
    return None


def at_load(case: Case, factor: float) -> Case:
    """The same people, so many times as many a second: arrivals closer together, or a trace played faster.

    A trace's pauses between turns shrink too; those of people who arrive at a rate do not.
    """
    if factor == 1.0:
        return case
    load = case.load
    if load.rates:
        return replace(case, load=replace(load, rates=tuple(rate * factor for rate in load.rates)))
    seconds = None if load.duration_s is None else load.duration_s / factor
    return replace(
        case,
        load=replace(load, speed=load.speed * factor, duration_s=seconds),
        warm_up_s=case.warm_up_s / factor,
    )


def rate_of(trial: Trial) -> float:
    """Requests a second that are sent."""
    rates = trial.case.load.rates
    return rates[trial.case.run] if rates else trial.outcome.summary.sent_per_s


def rounded(gigabytes: float) -> float:
    """The size rounded down to three digits."""
    if gigabytes <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(gigabytes)) - 2)
    return float(f"{math.floor(gigabytes / unit + 1e-9) * unit:.6g}")
