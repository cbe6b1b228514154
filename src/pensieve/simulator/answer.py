"""The answer to a plan: what to buy, what another GB of it would bring, or why nothing will do. Knows
searches and margins; never how they are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pensieve.simulator.case import Machine
from pensieve.simulator.margins import HEADROOM, Held, Margin, held_loads, margins
from pensieve.simulator.planner import Found, Space, Trial, Trials, rounded, search

Limit = Literal["memory", "link", "first tier", "computing"]
_CURVE = (
    0.0,
    1 / 64,
    1 / 16,
    1 / 4,
    1.0,
)  # of the largest CPU tier: how latency falls with it, for the picture
_LINK_SHARE = 0.25  # of the time: waiting for swap-ins is what is wrong
_SUSPENDED_SHARE = 0.05  # of the requests: those that run at once do not fit


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a plan."""

    found: tuple[Found, ...]  # for each number of devices that was looked at
    best: Trial | None
    held: Held  # by the best; or by the closest, where nothing holds
    margins: tuple[Margin, ...]  # of the best
    headroom: Trial | None  # the best under 20 % more load
    closest: Trial  # the best; or what missed by the least
    limit: Limit | None  # what the closest lacks; None: nothing
    unlimited: Trial | None  # where the limit is memory: with all that could be used


def make_plan(book: Trials, spaces: Sequence[Space]) -> Answer:
    """Search all spaces, fewest devices first, and weigh what was found."""
    found: list[Found] = []
    best: Trial | None = None
    for space in spaces:
        if (
            best is not None
            and book.prices.of(book.machine(space.devices, space.least_gpu_gb, 0.0, 0.0)) >= best.price
        ):
            continue  # its devices alone are dearer
        found.append(search(book, space))
        here = found[-1].best
        if here is not None and (best is None or here.price < best.price):
            best = here
    if best is None:
        return _nothing(book, found)
    space = next(one.space for one in found if one.space.devices == best.machine.devices)
    held, more = margins(book, space, best)
    headroom = book.try_all([(best.machine, HEADROOM), *_curve(space, best)])[0]
    return Answer(tuple(found), best, held, tuple(more), headroom, best, None, None)


def _curve(space: Space, trial: Trial) -> list[tuple[Machine, float]]:
    """A machine with CPU tiers of a few sizes."""
    sizes = [rounded(space.cpu_gb * share) for share in _CURVE]
    return [
        (replace(trial.machine, cpu_cache_gb=size), 1.0)
        for size in sizes
        if size or not trial.machine.disk_cache_gb
    ]


def _nothing(book: Trials, found: Sequence[Found]) -> Answer:
    nearest = min(found, key=lambda one: one.everything.latency_s)
    closest, space = nearest.everything, nearest.space
    unlimited = None
    if space.cpu_gb < space.kept_gb and space.disk_gb < space.kept_gb * space.devices:
        more = book.try_all([(replace(closest.machine, cpu_cache_gb=space.kept_gb), 1.0)])[0]
        unlimited = more if book.holds(more) else None
    book.try_all(_curve(space, closest))
    held = held_loads(book, [closest.machine])[0]
    limit: Limit = "memory" if unlimited is not None else _limit(closest)
    return Answer(tuple(found), None, held, (), None, closest, limit, unlimited)


def _limit(closest: Trial) -> Limit:
    """What a machine lacks that has all the memory it can use."""
    found = closest.outcome
    if found.swap_wait_share > _LINK_SHARE:
        return "link"
    if found.summary.suspensions > _SUSPENDED_SHARE * found.summary.sent:
        return "first tier"
    return "computing"
