"""Outcomes as a table, JSON and a picture. Knows outcomes; never how they came about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pensieve import __version__
from pensieve.reporting.canvas import COLOURS, MARKERS, canvas
from pensieve.reporting.json_file import plain
from pensieve.simulator.case import Outcome


def to_json(outcomes: Sequence[Outcome], **more: Any) -> dict[str, Any]:
    """Everything of some outcomes, as plain values. Nothing in it depends on where or when they were
    simulated.
    """
    return {
        "benchmark": "simulate",
        "version": __version__,
        **more,
        "outcomes": [plain(asdict(outcome)) for outcome in outcomes],
    }


def print_table(outcomes: Sequence[Outcome], console: Console) -> None:
    """A line a case."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in (
        "system", "policy", "asked\n1/s", "done\n1/s", "norm.\nmean", "norm.\np90 "
            "ms", "TTFT\np50 ms", "TTFT\np90 ms", "history\ngpu", "\ncpu",
        "recom-\nputed", "device\nbusy", "failed",
    ):  # fmt: skip
        table.add_column(
            heading, justify="left" if heading in ("system", "policy") else "right", no_wrap=True
        )
    for outcome in outcomes:
        found = outcome.summary
        table.add_row(
            outcome.case.system,
            outcome.case.policy,
            "" if outcome.rate is None else f"{outcome.rate:g}",
            f"{found.finished_per_s:.2f}",
            *(f"{1e3 * value:.1f}" for value in (found.normalized_s.mean, found.normalized_s.p90)),
            *(f"{1e3 * value:.0f}" for value in (found.ttft_s.p50, found.ttft_s.p90)),
            *(
                f"{share:.1%}" if share < 0.995 else "100%"
                for share in (found.gpu_share, found.cpu_share, found.recomputed_share, outcome.busy_share)
            ),
            str(found.failed),
        )
    console.print(table)


def plot(path: Path, outcomes: Sequence[Outcome], title: str, subtitle: str) -> Path:
    """Normalized latency over throughput where there are several rates; else what each system and policy had
    to recompute.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    by_label: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_label.setdefault(outcome.case.label, []).append(outcome)
    with canvas(path, title, subtitle) as (axes,):
        if any(len(same) > 1 for same in by_label.values()):
            for index, (label, same) in enumerate(by_label.items()):
                ordered = sorted(same, key=lambda outcome: outcome.rate or 0.0)
                axes.plot(
                    [one.summary.finished_per_s for one in ordered],
                    [1e3 * one.summary.normalized_s.p90 for one in ordered],
                    color=COLOURS[index % len(COLOURS)],
                    marker=MARKERS[index // len(COLOURS) % len(MARKERS)],
                    label=label,
                )
            axes.set_xlabel("finished requests a second")
            axes.set_ylabel("normalized latency, p90, ms a token")
            axes.legend(frameon=False)
        else:
            labels = list(by_label)[::-1]
            lefts = [0.0] * len(labels)
            parts = ("first tier", "swapped in", "recomputed")
            for part, colour in zip(parts, COLOURS, strict=False):
                found = [by_label[label][0].summary for label in labels]
                widths = [
                    100
                    * {
                        "first tier": one.gpu_share,
                        "swapped in": one.cpu_share,
                        "recomputed": one.recomputed_share,
                    }[part]
                    for one in found
                ]
                axes.barh(labels, widths, left=lefts, color=colour, label=part)
                lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
            axes.set_xlabel("of the history's tokens, %")
            axes.figure.legend(loc="outside lower left", frameon=False, ncols=3)
    return path
