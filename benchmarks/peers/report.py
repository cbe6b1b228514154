"""Tables, pictures and the summary. Knows cells and figures; never servers or clients."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peers.goals import Rounds, Verdict
from peers.run import AT_LIMIT, Cell
from peers.servers import LABELS
from peers.workloads import SYSTEMS, Workload

# The table's columns: title, how the figure's name ends, digits.
_COLUMNS = (
    ("req/s", "requests_per_s", 2),
    ("out tok/s", "output_tokens_per_s", 0),
    ("TTFT p50", "ttft_p50_ms", 0),
    ("p90", "ttft_p90_ms", 0),
    ("norm. mean", "normalized_mean_ms", 1),
    ("p90", "normalized_p90_ms", 1),
    ("cached", "cached_share", 2),
)
_ALONE = (
    ("prefill 1035", "long/prefill_tokens_per_s", 0),
    ("decode short", "short/decode_tokens_per_s", 1),
    ("decode 1k", "long/decode_tokens_per_s", 1),
    ("TTFT of turn 0", "history/ttft_turn0_ms", 0),
    ("1", "history/ttft_turn1_ms", 0),
    ("2", "history/ttft_turn2_ms", 0),
)
_COLOURS = dict(
    zip(SYSTEMS, ("#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#009e73", "#cc79a7"), strict=True)
)  # (Okabe and Ito)


def rounds_of(cells: Sequence[Cell]) -> Rounds:
    """Figures by workload and system, in the order of the rounds."""
    keys = dict.fromkeys((cell.workload, cell.system) for cell in cells)
    return {
        key: [cell.figures for cell in sorted(_of(cells, *key), key=lambda cell: cell.round)] for key in keys
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and greatest of the rounds, and each of them."""
    told = [float(f"{value:.6g}") for value in (statistics.median(values), min(values), max(values), *values)]
    return {"median": told[0], "min": told[1], "max": told[2], "rounds": told[3:]}


def summary(cells: Sequence[Cell], verdicts: Sequence[Verdict], about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the raw reports, as plain data."""
    by_workload: dict[str, dict[str, Any]] = {}
    for cell in cells:
        mine = by_workload.setdefault(cell.workload, {})
        if cell.system not in mine:
            mine[cell.system] = _of_system(_of(cells, cell.workload, cell.system))
    return {
        "benchmark": "peers",
        **about,
        "workloads": by_workload,
        "goals": [
            {
                "text": verdict.goal.text,
                "workload": verdict.goal.workload,
                "figure": verdict.goal.figure,
                "against": verdict.goal.against,
                "sense": verdict.goal.sense,
                "limit": verdict.goal.limit,
                "value": verdict.value,
                "rounds": list(verdict.values),
                "met": verdict.met,
            }
            for verdict in verdicts
        ],
        "failures": [
            {"workload": c.workload, "system": c.system, "round": c.round, "error": c.error}
            for c in cells
            if c.error
        ],
    }


def tables(
    cells: Sequence[Cell], workloads: Sequence[Workload], verdicts: Sequence[Verdict], *, quick: bool = False
) -> RenderableType:
    """For people: every workload, then the goals."""
    parts: list[RenderableType] = []
    for workload in workloads:
        own = [cell for cell in cells if cell.workload == workload.name]
        if own:
            parts += [_of_workload(own, workload), Text()]
    if any(verdict.values for verdict in verdicts):
        parts.append(_of_goals(verdicts, "goals (what --quick measures means nothing)" if quick else "goals"))
    for cell in cells:
        if cell.error:
            first, *more = cell.error.splitlines()
            said = [first, *([f"    {more[-1]}"] if more else [])]
            parts.append(
                Text(
                    f"FAILED: {cell.workload}, round {cell.round + 1}, {LABELS[cell.system]}: "
                    + "\n".join(said),
                    style="red",
                )
            )
    return Group(*parts)


def plot(cells: Sequence[Cell], path: Path) -> Path | None:
    """A picture of what was measured, as PNG; None where there is nothing to show."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        panel
        for panel in (_bars_panel, _turns_panel, _pressure_panel, _alone_panel, _history_panel, _open_panel)
        if panel(None, cells)
    ]
    if not panels:
        return None
    rows = -(-len(panels) // 2)
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(12.0, 4.2 * rows), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        for axes, panel in zip(
            figure.subplots(rows, 2, squeeze=False).flat,
            [*panels, None] if len(panels) % 2 else panels,
            strict=True,
        ):
            if panel is None:
                axes.axis("off")
                continue
            panel(axes, cells)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3, axis="y")
            axes.set_axisbelow(True)
            axes.set_ylim(bottom=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    return path


def _of(cells: Sequence[Cell], workload: str, system: str) -> list[Cell]:
    return [cell for cell in cells if (cell.workload, cell.system) == (workload, system)]


def _of_system(cells: Sequence[Cell]) -> dict[str, Any]:
    names = dict.fromkeys(name for cell in cells for name in cell.figures or ())
    last = cells[-1].as_json()
    return {
        "label": LABELS[cells[-1].system],
        **{name: last.get(name) for name in ("version", "command", "variables", "kv_bytes", "weight_bytes")},
        "start_s": [cell.start_s for cell in cells],
        "load_average": [cell.load_average for cell in cells],
        "processes": None if cells[-1].memory is None else cells[-1].memory.processes,
        "figures": {
            name: spread([cell.figures[name] for cell in cells if cell.figures and name in cell.figures])
            for name in names
        },
        "open_loop": [
            {"points": cell.as_json()["points"], "crossing": cell.as_json()["crossing"]}
            for cell in cells
            if cell.points
        ],
    }


def _median(cells: Sequence[Cell], figure: str) -> float | None:
    found = [cell.figures[figure] for cell in cells if cell.figures is not None and figure in cell.figures]
    return statistics.median(found) if found else None


def _shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _of_workload(cells: Sequence[Cell], workload: Workload) -> Table:
    names = [measurement.name for measurement in workload.measurements]
    if workload.name == "alone":
        columns = list(_ALONE)
    elif workload.name == "open":
        columns = [
            ("unloaded ms/tok", "unloaded/normalized_mean_ms", 1),
            ("limit", "open/limit_ms", 1),
            ("req/s at it", AT_LIMIT, 2),
        ]
    else:
        columns = [(title, f"{names[0]}/{end}", digits) for title, end, digits in _COLUMNS]
    table = Table(title=f"{workload.name}: {workload.title}", title_justify="left", title_style="bold")
    table.add_column("", min_width=24)
    for title, _, _ in (*columns, ("PSS GB", "", 0), ("start s", "", 0)):
        table.add_column(title, justify="right")
    for system in dict.fromkeys(cell.system for cell in cells):
        own = _of(cells, workload.name, system)
        row = [_shown(_median(own, figure), digits) for _, figure, digits in columns]
        if workload.name == "open":
            crossings = [cell.crossing for cell in own if cell.crossing is not None]
            row[-1] = ", ".join(f"{c.bound or ''} {c.requests_per_s:.2f}".strip() for c in crossings)
        starts = [cell.start_s for cell in own if cell.start_s is not None]
        row += [
            _shown(_median(own, "memory_pss_gb"), 2),
            _shown(statistics.median(starts) if starts else None, 0),
        ]
        failed = sum(cell.error is not None for cell in own)
        name = LABELS[system] + (f" (FAILED {failed} of {len(own)})" if failed else "")
        table.add_row(name, *row, style="red" if failed else None)
    return table


def _of_goals(verdicts: Sequence[Verdict], title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("", "goal", "measured", "rounds", ""):
        table.add_column(column, justify="left" if column == "" else "right")
    for verdict in verdicts:
        goal = verdict.goal
        unit = "" if goal.against is None else " x"
        met = {
            True: Text("met", style="green"),
            False: Text("missed", style="red"),
            None: Text("not measured", style="dim"),
        }[verdict.met]
        rounds = " ".join(f"{value:.2f}" for value in verdict.values)
        value = "" if verdict.value is None else f"{verdict.value:.2f}{unit}"
        table.add_row(goal.text, f"{goal.sense} {goal.limit:g}{unit}", value, rounds, met)
    return table


# -- panels: each says whether it has anything to show, and shows it on axes that it is given


def _systems(cells: Sequence[Cell], workload: str, figure: str) -> list[tuple[str, float]]:
    found = [(system, _median(_of(cells, workload, system), figure)) for system in SYSTEMS]
    return [(system, value) for system, value in found if value is not None]


def _bars(axes: Any, found: Sequence[tuple[str, float]], title: str, unit: str) -> None:
    axes.bar(
        [LABELS[s].replace(", ", "\n") for s, _ in found],
        [v for _, v in found],
        color=[_COLOURS[s] for s, _ in found],
    )
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_ylabel(unit)
    axes.tick_params(axis="x", labelsize=8)


def _lines(axes: Any, cells: Sequence[Cell], workload: str, measurement: str, title: str) -> bool:
    turns = range(64)
    curves = [
        (
            system,
            [_median(_of(cells, workload, system), f"{measurement}/ttft_turn{turn}_ms") for turn in turns],
        )
        for system in SYSTEMS
    ]
    curves = [(system, values) for system, values in curves if values[0] is not None]
    if curves and axes is not None:
        for system, values in curves:
            known = [(turn + 1, value) for turn, value in enumerate(values) if value is not None]
            axes.plot(*zip(*known, strict=True), marker="o", color=_COLOURS[system], label=LABELS[system])
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel("turn")
        axes.set_ylabel("time to first token, p50, ms")
        axes.set_xticks(
            sorted(
                {turn + 1 for _, values in curves for turn, value in enumerate(values) if value is not None}
            )
        )
        axes.legend(frameon=False, fontsize=8)
    return bool(curves)


def _bars_panel(axes: Any, cells: Sequence[Cell]) -> bool:
    found = _systems(cells, "users", "users/output_tokens_per_s")
    if found and axes is not None:
        _bars(axes, found, "8 users at once, 6 turns", "output tokens/s")
    return bool(found)


def _turns_panel(axes: Any, cells: Sequence[Cell]) -> bool:
    return _lines(axes, cells, "users", "users", "8 users at once: first token by turn")


def _pressure_panel(axes: Any, cells: Sequence[Cell]) -> bool:
    groups = [(name, _systems(cells, name, "pressure/ttft_p90_ms")) for name in ("fits", "tight", "third")]
    groups = [(name, found) for name, found in groups if found]
    if groups and axes is not None:
        place, ticks, told = 0.0, [], set()
        for _, found in groups:
            ticks.append(place + (len(found) - 1) / 2)
            for system, value in found:
                axes.bar(
                    place, value, color=_COLOURS[system], label=None if system in told else LABELS[system]
                )
                told.add(system)
                place += 1
            place += 1
        axes.set_xticks(
            ticks,
            [
                {"fits": "KV for all", "tight": "for 60 %", "third": "first tier for a third"}[name]
                for name, _ in groups
            ],
        )
        axes.set_title("24 users who think: first token, p90", loc="left", fontweight="bold")
        axes.set_ylabel("ms")
        axes.legend(frameon=False, fontsize=8)
    return bool(groups)


def _alone_panel(axes: Any, cells: Sequence[Cell]) -> bool:
    found = _systems(cells, "alone", "long/decode_tokens_per_s")
    if found and axes is not None:
        _bars(axes, found, "one user: decoding behind 1,035 tokens", "tokens/s")
    return bool(found)


def _history_panel(axes: Any, cells: Sequence[Cell]) -> bool:
    return _lines(
        axes, cells, "alone", "history", "one user, first message of 4,032 tokens: first token by turn"
    )


def _open_panel(axes: Any, cells: Sequence[Cell]) -> bool:
    found = [cell for cell in cells if cell.points]
    if found and axes is not None:
        told = set()
        for cell in found:
            label = None if cell.system in told else LABELS[cell.system]
            told.add(cell.system)
            places, heights = (
                [point.requests_per_s for point in cell.points],
                [point.latency_ms for point in cell.points],
            )
            axes.plot(places, heights, marker="o", color=_COLOURS[cell.system], label=label)
        if (limit := _median(found, "open/limit_ms")) is not None:
            axes.axhline(limit, color="#444444", linestyle=":", label="twice the latency without load")
            axes.set_ylim(top=4 * limit)
        axes.set_title("open loop", loc="left", fontweight="bold")
        axes.set_xlabel("requests/s answered")
        axes.set_ylabel("normalized latency, mean, ms/token")
        axes.legend(frameon=False, fontsize=8)
    return bool(found)
