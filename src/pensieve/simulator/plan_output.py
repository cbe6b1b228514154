"""A plan as a sentence, tables, JSON and a picture. Knows answers; never how they came about."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pensieve import __version__
from pensieve.reporting.canvas import COLOURS, MARKERS, canvas
from pensieve.reporting.json_file import plain
from pensieve.simulator.answer import Answer
from pensieve.simulator.case import Machine
from pensieve.simulator.goal import Goal
from pensieve.simulator.margins import HEADROOM, TIERS, Held, Margin
from pensieve.simulator.planner import Trial, Trials, rate_of

_MOST_LINES = 6  # of a picture: the answer's, and those with most points
_STEADY = 0.85  # of the rate asked for, sent in the window


def sentences(book: Trials, answer: Answer) -> list[str]:
    """The answer in words: first what to buy, or why nothing will do."""
    words = _found(book, answer, answer.best) if answer.best is not None else _missed(book, answer)
    asked, sent = rate_of(answer.closest), answer.closest.outcome.summary.sent_per_s
    if sent < _STEADY * asked:
        words.append(
            f"In the measured window only {sent:.3g} of {asked:.3g} requests/s were sent, because people who "
            "came have not asked their later turns yet: take a longer --duration and --warm-up, or this is a "
            "plan for less."
        )
    return words


def _found(book: Trials, answer: Answer, best: Trial) -> list[str]:
    goal, prices = book.goal, book.prices
    words = [
        f"The cheapest that holds {goal.words} within {_ms(goal, goal.latency_s)} at {rate_of(best):.3g} "
        f"requests/s is {_machine_words(best.machine)}: {_ms(goal, best.latency_s)}, for {best.price:,.0f} a "
        f"month ({best.price - best.machine.devices * prices.device:,.0f} of it for tiers)."
    ]
    if answer.headroom is not None:
        late_s = answer.headroom.latency_s - goal.latency_s
        share = f"With {HEADROOM - 1:.0%} more load it takes "
        if math.isinf(late_s):
            words.append(
                f"With {HEADROOM - 1:.0%} more load requests fail; it holds {_held_words(answer.held)}."
            )
        else:
            where = "over" if late_s > 0 else "below"
            words.append(
                f"{share}{_ms(goal, answer.headroom.latency_s)}, {_ms(goal, abs(late_s))} {where} the "
                f"target; it holds {_held_words(answer.held)}."
            )
    gains = [(margin.held.per_s - answer.held.per_s, margin) for margin in answer.margins if margin.price]
    per_s, worth = max(gains, key=lambda gain: gain[0] / gain[1].price, default=(0.0, None))
    if worth is not None and per_s > 0:
        least = "" if worth.held.bounded else "at least "
        each = " a device" if best.machine.devices > 1 and worth.tier != "disk_cache_gb" else ""
        words.append(
            f"What is worth most for its price is more {TIERS[worth.tier]}: {worth.more_gb:.3g} GB{each} for "
            f"{worth.price:.3g} a month hold {least}{per_s:.2g} requests/s more."
        )
    return words


def _missed(book: Trials, answer: Answer) -> list[str]:
    goal, closest = book.goal, answer.closest
    found = closest.outcome
    everything = f"{_machine_words(closest.machine)},"
    if found.summary.failed:
        by = f"fails {found.summary.failed} of {found.summary.sent} requests"
    else:
        by = f"takes {_ms(goal, closest.latency_s)}, {closest.latency_s / goal.latency_s:.2g} times the target of {_ms(goal, goal.latency_s)}"
    words = [
        f"Nothing that was allowed holds {goal.words} at {rate_of(closest):.3g} requests/s: the best, {everything} {by}."
    ]
    devices = "add devices (--max-devices)"
    if answer.unlimited is not None:
        words.append(
            f"Memory is what is missing: with {answer.unlimited.machine.cpu_cache_gb:.3g} GB of CPU tier it would be {_ms(goal, answer.unlimited.latency_s)}. "
            "Raise --max-cpu-gb or --max-disk-gb."
        )
    elif answer.limit == "link":
        words.append(
            f"No more of these tiers helps: for {found.swap_wait_share:.0%} of the time the device waits for copies. Give it more first tier ({devices}), or lower the rate."
        )
    elif answer.limit == "first tier":
        words.append(
            f"The requests that run at once do not fit in the first tier ({found.summary.suspensions} suspensions of {found.summary.sent} requests): {devices}, or lower the rate."
        )
    else:
        words.append(
            f"No memory helps: {found.summary.recomputed_share:.1%} of the history is recomputed, and the device is busy {found.busy_share:.0%} of the time; {devices}, or lower the rate."
        )
    words.append(f"That machine holds {_held_words(answer.held)}.")
    return words


def _machine_words(machine: Machine) -> str:
    each = " each" if machine.devices > 1 else ""
    tiers = [f"{machine.gpu_cache_gb:.3g} GB of first tier{each}"]
    tiers.append(
        f"{machine.cpu_cache_gb:.3g} GB of CPU memory{each}" if machine.cpu_cache_gb else "no CPU tier"
    )
    tiers.append(f"{machine.disk_cache_gb:.3g} GB of disk" if machine.disk_cache_gb else "no disk")
    return f"{machine.devices} × {machine.hardware} with {tiers[0]}, {tiers[1]} and {tiers[2]}"


def _held_words(held: Held) -> str:
    if held.bounded:
        return f"up to {held.per_s:.3g} requests/s, {held.load:.0%} of the load"
    return (
        f"{held.per_s:.3g} requests/s and more"
        if held.load >= 1.0
        else f"not even {held.per_s:.3g} requests/s"
    )


def _latency_words(goal: Goal, trial: Trial) -> str:
    if trial.outcome.gave_up:
        return f"> {1e3 * goal.latency_s:.4g}"
    return f"{1e3 * trial.latency_s:.1f}" if math.isfinite(trial.latency_s) else "fails"


def _ms(goal: Goal, seconds: float) -> str:
    return f"{1e3 * seconds:.4g} {goal.unit}"


def print_trials(book: Trials, console: Console, best: Trial | None) -> None:
    """A line for each machine that was tried under the load itself."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in (
        "devices",
        "first tier GB",
        "CPU GB",
        "disk GB",
        "a month",
        f"{book.goal.quantile} ms",
        "recomputed",
        "swap wait",
        "",
    ):
        table.add_column(heading, justify="right")
    trials = [trial for trial in book.trials.values() if trial.load == 1.0]
    for trial in sorted(trials, key=lambda trial: _order(trial.machine)):
        chosen = best is not None and trial.case == best.case
        machine, found = trial.machine, trial.outcome
        table.add_row(
            str(machine.devices),
            *(f"{size:.3g}" for size in (machine.gpu_cache_gb, machine.cpu_cache_gb, machine.disk_cache_gb)),
            f"{trial.price:,.0f}",
            _latency_words(book.goal, trial),
            *(
                ("", "")
                if found.gave_up
                else (f"{found.summary.recomputed_share:.1%}", f"{found.swap_wait_share:.1%}")
            ),
            "taken" if chosen else "holds" if book.holds(trial) else "misses",
            style="bold" if chosen else None,
        )
    console.print(table)


def print_margins(book: Trials, answer: Answer, console: Console) -> None:
    """What another GB of each tier would bring."""
    if not answer.margins:
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in (
        "another GB of",
        "tried with",
        "a month",
        f"{book.goal.quantile} ms saved",
        "fewer tokens recomputed/s",
        "more requests/s held",
    ):
        table.add_column(heading, justify="left" if heading == "another GB of" else "right")
    for margin in answer.margins:
        table.add_row(
            TIERS[margin.tier],
            f"+{margin.more_gb:.3g} GB",
            f"+{margin.price:.3g}",
            f"{margin.saved_ms:+.3g}",
            f"{margin.saved_tokens_per_s:+.3g}",
            f"{margin.more_per_s:+.2g}",
        )
    console.print(table)


def to_json(book: Trials, answer: Answer) -> dict[str, Any]:
    """Everything, as plain values. Nothing in it depends on where or when it was simulated."""
    record: dict[str, Any] = {
        "benchmark": "plan",
        "version": __version__,
        "target": asdict(book.goal),
        "prices_per_month": asdict(book.prices),
        "load": asdict(book.base.load),
        "answer": " ".join(sentences(book, answer)),
        "found": None if answer.best is None else _trial(book, answer.best),
        "held": asdict(answer.held),
        "headroom": None if answer.headroom is None else _trial(book, answer.headroom),
        "margins": [_margin(book, margin) for margin in answer.margins],
        "closest": _trial(book, answer.closest),
        "limit": answer.limit,
        "spaces": [asdict(found.space) for found in answer.found],
        "trials": [
            _trial(book, trial)
            for trial in sorted(book.trials.values(), key=lambda trial: (trial.load, _order(trial.machine)))
        ],
    }
    return dict(plain(record))


def _order(machine: Machine) -> tuple[float, ...]:
    return machine.devices, machine.disk_cache_gb, machine.gpu_cache_gb, machine.cpu_cache_gb


def _trial(book: Trials, trial: Trial) -> dict[str, Any]:
    machine, outcome = trial.machine, trial.outcome
    return {
        "model": machine.model, "hardware": machine.hardware, "devices": machine.devices, "gpu_gb": machine.gpu_cache_gb,
        "cpu_gb": machine.cpu_cache_gb, "disk_gb": machine.disk_cache_gb, "price": trial.price, "load": trial.load,
        "requests_per_s": rate_of(trial), "latency_s": trial.latency_s, "holds": book.holds(trial), "gave_up": outcome.gave_up, "busy_share": outcome.busy_share,
        "swap_wait_share": outcome.swap_wait_share, "summary": asdict(outcome.summary),
    }  # fmt: skip


def _margin(book: Trials, margin: Margin) -> dict[str, Any]:
    return {**asdict(margin), "tier": TIERS[margin.tier], "trial": _trial(book, margin.trial)}


def plot(path: Path, book: Trials, answer: Answer, title: str, subtitle: str) -> Path:
    """The latency over the CPU tier, a line for each first tier and disk of the answer's devices, with the
    target.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    devices = answer.closest.machine.devices
    lines: dict[tuple[float, float], list[tuple[float, float]]] = {}
    for trial in book.trials.values():
        machine = trial.machine
        if trial.load == 1.0 and machine.devices == devices and math.isfinite(trial.latency_s):
            lines.setdefault((machine.disk_cache_gb, machine.gpu_cache_gb), []).append(
                (machine.cpu_cache_gb, 1e3 * trial.latency_s)
            )
    taken = answer.best.machine if answer.best is not None else None
    ordered = sorted(
        lines,
        key=lambda key: (
            taken is None or key != (taken.disk_cache_gb, taken.gpu_cache_gb),
            -len(lines[key]),
            key,
        ),
    )
    highest = 4.0 * book.goal.latency_s * 1e3
    with canvas(path, title, subtitle) as (axes,):
        for index, key in enumerate(ordered[:_MOST_LINES]):
            disk_gb, gpu_gb = key
            label = f"first tier {gpu_gb:.3g} GB" + (f", disk {disk_gb:.3g} GB" if disk_gb else "")
            points = sorted(lines[key])
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index // len(COLOURS) % len(MARKERS)],
                label=label,
            )
        axes.axhline(
            1e3 * book.goal.latency_s,
            color="#444444",
            linestyle="--",
            label=f"target: {_ms(book.goal, book.goal.latency_s)}",
        )
        if taken is not None and answer.best is not None:
            axes.plot(
                [taken.cpu_cache_gb],
                [1e3 * answer.best.latency_s],
                marker="*",
                markersize=18,
                color="black",
                linestyle="none",
                label="taken",
            )
            axes.set_ylim(0.0, min(axes.get_ylim()[1], highest))
        axes.set_xlabel("CPU tier, GB" + (" a device" if devices > 1 else ""))
        axes.set_ylabel(f"{book.goal.words}, {book.goal.unit}")
        if max(x for points in lines.values() for x, _ in points) > 0:
            axes.set_xscale("symlog", linthresh=_least_positive(lines))
            axes.set_xlim(0.0, 1.4 * max(x for points in lines.values() for x, _ in points))
        axes.legend(frameon=False, fontsize=9)
    return path


def _least_positive(lines: dict[tuple[float, float], list[tuple[float, float]]]) -> float:
    return min(x for points in lines.values() for x, _ in points if x > 0)
