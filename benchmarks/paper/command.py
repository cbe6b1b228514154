"""Simulates figures of the paper, prints their comparisons and writes the page. Knows names; never curves or costs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import click
from rich.table import Table

from paper.figures import FIGURES, compare, simulate_figures
from paper.page import JSON_NAME, PAGE_NAME, comparison_rows, small_comparisons, to_json, write_page
from paper.small_figures import SMALL_FIGURES
from pensieve.cli.outputs import check_paths, table_console
from pensieve.cli.simulation_options import parse_names
from pensieve.reporting.json_file import write_json
from pensieve.simulator.case import Case, Outcome
from pensieve.simulator.progress import progress
from pensieve.simulator.sweep import run_cases


def write_figures(names: str, folder: Path, jobs: int | None = None) -> None:
    """Simulate figures; print their comparisons; write the page, its pictures and the JSON.

    Args:
        names: `10a`, `3,4,10b-d` or `all`.
        folder: created if it does not exist.
        jobs: processes; None: one per core.

    Raises:
        ConfigError: a name is unknown, or the folder cannot be written to.
    """
    known = dict.fromkeys((*SMALL_FIGURES, *FIGURES))
    asked = dict.fromkeys(part for name in names.split(",") for part in expand(name.strip(), known))
    wanted = parse_names(",".join(asked), known, "figure")
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
        for heading in ("", "paper", "simulated", "difference", "agrees"):
            table.add_column(heading, justify="right" if heading else "left")
        for row in comparison_rows(comparisons):
            table.add_row(*row)
        console.print(table)
        console.print()
    click.echo(f"page: {write_page(folder, results, small)}", err=True)
    click.echo(f"json: {write_json(folder / JSON_NAME, to_json(results, small))}", err=True)


def expand(name: str, known: Iterable[str]) -> list[str]:
    """The figures that a name stands for: `10b-d` and `10` are several; any other name stands for itself."""
    if (span := re.fullmatch(r"(\d+)([a-z])-([a-z])", name)) is not None:
        number, first, last = span.groups()
        found = [figure for figure in known if figure[:-1] == number and first <= figure[-1] <= last]
    else:
        found = [figure for figure in known if name.isdigit() and figure.rstrip("abcd") == name]
    return found or [name]
