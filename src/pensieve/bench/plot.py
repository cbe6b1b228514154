"""A picture of time to first token by turn. Knows runs; nothing of how they came about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pensieve.bench.runs import Run, Subject
from pensieve.errors import ConfigError
from pensieve.reporting.canvas import COLOURS, MARKERS, canvas, whole_numbers
from pensieve.reporting.spread import quantile


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
    curves = [(run, _quartiles_ms(run)) for run in runs]
    if not any(points for _, points in curves):
        raise ConfigError("there is nothing to plot: no run has an answer")
    users = len({record.user for record in runs[0].records})
    subtitle = f"{subject}\n{users} users at once, {runs[0].started_at[:10]}"
    with canvas(path, "Time to first token by turn", subtitle) as (axes,):
        for index, (run, points) in enumerate(curves):
            turns = [turn + 1 for turn in points]
            low, middle, high = (
                (list(column) for column in zip(*points.values(), strict=True)) if points else ([], [], [])
            )
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            axes.fill_between(turns, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(turns, middle, color=colour, marker=marker, linewidth=2, label=run.system)
        axes.set_ylim(bottom=0)
        whole_numbers(axes.xaxis)
        axes.set_xlabel("turn of the conversation")
        axes.set_ylabel("time to first token, ms")
        axes.figure.legend(
            loc="outside lower left",
            frameon=False,
            title="median; the middle half of the users is shaded",
            alignment="left",
        )
    return Path(path)


def _quartiles_ms(run: Run) -> dict[int, tuple[float, float, float]]:
    """Lower quartile, median and upper quartile of the time to first token, by turn index, milliseconds."""
    by_turn: dict[int, list[float]] = {}
    for record in run.answered():
        if record.result.first_token_s is not None:
            by_turn.setdefault(record.request.turn_index, []).append(record.result.first_token_s * 1000)
    return {
        turn: (quantile(times, 0.25), quantile(times, 0.5), quantile(times, 0.75))
        for turn, times in sorted(by_turn.items())
    }
