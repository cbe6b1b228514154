"""A picture of time to first token by turn. Knows runs and pixels; matplotlib is imported only when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pensieve.bench.runs import Run, Subject
from pensieve.errors import ConfigError

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart by colour-blind readers too (Okabe and Ito)
_MARKERS = ("o", "s", "^", "D")


def plot_first_token(path: str | Path, runs: Sequence[Run], subject: Subject) -> Path:
    """Draw the median time to first token of each turn with the middle half of the users around it, as PNG.

    Args:
        path: the file; folders on the way are made.
        runs: one or more runs of the same conversations.
        subject: what was measured, for the title.

    Returns:
        The file.

    Raises:
        ConfigError: matplotlib is not installed, or no run has an answer.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ConfigError("a plot needs matplotlib: pip install 'pensieve-serve[plot]'") from error
    curves = [(run, _quartiles_ms(run)) for run in runs]
    if not any(points for _, points in curves):
        raise ConfigError("there is nothing to plot: no run has an answer")
    with matplotlib.rc_context({"font.size": 11}):
        figure = Figure(figsize=(8.0, 5.6), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for index, (run, points) in enumerate(curves):
            turns = [turn + 1 for turn in points]
            low, middle, high = (list(column) for column in zip(*points.values(), strict=True)) if points else ([], [], [])
            colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
            axes.fill_between(turns, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(turns, middle, color=colour, marker=marker, linewidth=2, label=run.system)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("turn of the conversation")
        axes.set_ylabel("time to first token, ms")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower left", frameon=False, title="median; the middle half of the users is shaded", alignment="left")
        users = len({record.user for record in runs[0].records})
        figure.suptitle("Time to first token by turn", fontsize=14, fontweight="bold", x=0.01, ha="left")
        axes.set_title(f"{subject}\n{users} users at once, {runs[0].started_at[:10]}", fontsize=10, color="#444444", loc="left")
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, format="png")
    return target


def _quartiles_ms(run: Run) -> dict[int, tuple[float, float, float]]:
    """Lower quartile, median and upper quartile of the time to first token, by turn index, milliseconds."""
    by_turn: dict[int, list[float]] = {}
    for record in run.answered():
        if record.result.first_token_s is not None:
            by_turn.setdefault(record.request.turn_index, []).append(record.result.first_token_s * 1000)
    return {turn: (_at(times, 0.25), _at(times, 0.5), _at(times, 0.75)) for turn, times in sorted(by_turn.items())}


def _at(values: list[float], share: float) -> float:
    """The quantile at `share`, interpolated between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
