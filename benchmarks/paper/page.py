"""Figures as pictures and one HTML page, ours beside the paper's. Knows results and words; never how anything was simulated."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paper.figures import RUN_S, SEEDS, WARM_UP, Comparison, Result, compare
from paper.small_figures import SmallFigure
from pensieve import __version__
from pensieve.reporting.canvas import COLOURS, MARKERS, canvas
from pensieve.simulator.cost_model import FITTED

REMARKS = Path(__file__).with_name("remarks.md")
PAGE_NAME, JSON_NAME = "report.html", "report.json"
READING = 0.03  # the paper's points are read off its plots within so much of an axis
_DIFFERENT = 0.10  # from here on a difference is said


def draw(folder: Path, result: Result) -> Path:
    """A figure of curves, ours in full and the paper's dashed, as PNG."""
    figure = result.figure
    with canvas(folder / f"figure-{figure.name}.png", f"Figure {figure.name}, simulated", figure.title) as (
        axes,
    ):
        highest = 0.0
        for index, series in enumerate(figure.series):
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            points = result.curve(series.label)
            axes.plot(
                [per_s for per_s, _ in points],
                [1e3 * latency for _, latency in points],
                color=colour,
                marker=marker,
                label=series.label,
            )
            published = figure.published(series)
            if published is not None:
                highest = max(highest, *(latency for _, latency in published))
                axes.plot(
                    [per_s for per_s, _ in published], [1e3 * latency for _, latency in published],
                    color=colour, marker=marker, markersize=4, linestyle="--", alpha=0.55, label=f"{series.published} (paper)",
                )  # fmt: skip
        axes.set_ylim(0, 1e3 * max(1.25 * figure.read_at_s, min(highest, 2.5 * figure.read_at_s)))
        axes.set_xlim(left=0)
        axes.axhline(1e3 * figure.read_at_s, color="#999999", linewidth=0.8)
        axes.set_xlabel("finished requests a second")
        axes.set_ylabel("normalized latency, ms a token")
        axes.legend(frameon=False, fontsize=9)
    return folder / f"figure-{figure.name}.png"


def draw_small(folder: Path, figure: SmallFigure) -> Path:
    """A figure of lines, ours in full and the paper's dashed, as PNG."""
    path = folder / f"figure-{figure.name}.png"
    with canvas(path, f"Figure {figure.name}, from the cost model", figure.title) as (axes,):
        for index, line in enumerate(figure.lines):
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            axes.plot(line.at, line.ours, color=colour, marker=marker, label=line.label)
            axes.plot(
                line.at,
                line.paper,
                color=colour,
                marker=marker,
                markersize=4,
                linestyle="--",
                alpha=0.55,
                label=f"{line.label} (paper)",
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(figure.lines[0].at, [f"{at:,}" for at in figure.lines[0].at])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(figure.x_label)
        axes.set_ylabel(figure.y_label)
        axes.legend(frameon=False, fontsize=9)
    return path


def small_comparisons(figure: SmallFigure) -> list[Comparison]:
    """The first and the last point of each line."""
    return [
        Comparison(
            f"{line.label}, at {line.at[place]:,}",
            line.paper[place],
            line.ours[place],
            slack=READING * max(line.paper),
        )
        for line in figure.lines
        for place in (0, -1)
    ]


def comparison_rows(comparisons: Sequence[Comparison]) -> list[tuple[str, str, str, str, str]]:
    """What, the paper's, ours, the difference and a verdict, as words."""
    rows = []
    for one in comparisons:
        verdict = {None: "", True: "yes", False: "no"}[one.good]
        difference = "" if one.difference is None else f"{one.difference:+.0%}"
        rows.append(
            (
                one.what,
                _shown(one.paper, one.unit),
                _shown(one.ours, one.unit, "not reached"),
                difference,
                verdict,
            )
        )
    return rows


def _shown(value: float | None, unit: str, otherwise: str = "") -> str:
    return otherwise if value is None else f"{value:.3g}{unit}"


def to_json(results: Sequence[Result], small: Sequence[SmallFigure]) -> dict[str, Any]:
    """Every point and comparison, as plain values."""
    return {
        "benchmark": "simulate figures",
        "version": __version__,
        "config": {"run_s": RUN_S, "warm_up": WARM_UP, "seeds": SEEDS, "overheads": asdict(FITTED)},
        "figures": [
            {
                "figure": result.figure.name,
                "curves": {
                    series.label: {
                        "simulated": result.curve(series.label),
                        "paper": result.figure.published(series),
                    }
                    for series in result.figure.series
                },
                "comparisons": [_plain(one) for one in compare(result)],
            }
            for result in results
        ],
        "small": [
            {
                "figure": figure.name,
                "lines": {
                    line.label: {"at": line.at, "simulated": line.ours, "paper": line.paper}
                    for line in figure.lines
                },
                "comparisons": [_plain(one) for one in small_comparisons(figure)],
            }
            for figure in small
        ],
    }


def _plain(one: Comparison) -> dict[str, Any]:
    return {
        "what": one.what,
        "paper": one.paper,
        "simulated": one.ours,
        "unit": one.unit.strip(),
        "difference": one.difference,
        "good": one.good,
    }


def write_page(folder: Path, results: Sequence[Result], small: Sequence[SmallFigure]) -> Path:
    """Write one page with every figure and its table, and the pictures beside it.

    Where a figure differs from the paper's by more than 10 %, its remarks say why.
    """
    sections = [
        _section(figure.name, figure.title, draw_small(folder, figure), small_comparisons(figure))
        for figure in small
    ]
    sections += [
        _section(result.figure.name, result.figure.title, draw(folder, result), compare(result))
        for result in results
    ]
    sections.sort(key=lambda section: _order(section[0]))
    how = _paragraphs("how")
    toc = " · ".join(f'<a href="#figure-{name}">{name}</a>' for name, _ in sections)
    body = "".join(text for _, text in sections)
    page = _PAGE.format(how=how, toc=toc, body=body, version=__version__)
    path = folder / PAGE_NAME
    path.write_text(page)
    return path


def remarks() -> dict[str, list[str]]:
    """The paragraphs of `remarks.md` by section: `how`, and one section for each figure."""
    text = REMARKS.read_text(encoding="utf-8")
    sections = re.split(r"^## (\w+)$", text, flags=re.MULTILINE)[1:]
    return {
        name: [" ".join(paragraph.split()) for paragraph in body.split("\n\n") if paragraph.strip()]
        for name, body in zip(sections[::2], sections[1::2], strict=True)
    }


def _paragraphs(section: str) -> str:
    return "".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in remarks().get(section, ()))


def _order(name: str) -> tuple[int, str]:
    digits = name.rstrip("abcd")
    return int(digits), name[len(digits) :]


def _section(name: str, title: str, picture: Path, comparisons: Sequence[Comparison]) -> tuple[str, str]:
    rows = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[:-1])
        + f'<td class="{row[-1]}">{row[-1]}</td></tr>'
        for row in comparison_rows(comparisons)
    )
    differs = any(one.difference is not None and abs(one.difference) > _DIFFERENT for one in comparisons)
    remarks = _paragraphs(name) if differs else ""
    return name, (
        f'<section id="figure-{name}"><h2>Figure {name}: {html.escape(title)}</h2>'
        f'<img alt="Figure {name}" src="{picture.name}">'
        "<table><tr><th></th><th>paper</th><th>simulated</th><th>difference</th><th>agrees</th></tr>"
        f"{rows}</table>{remarks}</section>"
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>The paper's evaluation, simulated</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; background: #fff; }}
h1, h2 {{ line-height: 1.2; }} h2 {{ margin-top: 3rem; }}
img {{ max-width: 100%; height: auto; }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .25rem .75rem; border-bottom: 1px solid #ddd; }} th:first-child, td:first-child {{ text-align: left; }}
td.yes {{ color: #00744d; }} td.no {{ color: #b23a00; font-weight: 600; }}
</style></head><body>
<h1>The paper's evaluation, simulated</h1>
<p>Stateful Large Language Model Serving with Pensieve, EuroSys '25, by Pensieve {version}'s own scheduler and cache in virtual time. Figures: {toc}</p>
{how}
{body}
</body></html>
"""
