"""Pictures of load runs: latencies by turn, or throughput against normalized latency. Knows figures; nothing
of how they came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pensieve.bench.load import LoadRun
from pensieve.bench.load_report import RunFigures, figures
from pensieve.bench.probe import Target
from pensieve.errors import ConfigError
from pensieve.reporting.canvas import COLOURS, MARKERS, canvas, whole_numbers

_QUANTILES = ("p50", "p90")


def plot_load(path: str | Path, runs: Sequence[LoadRun], target: Target, words: str) -> Path:
    """Draw one run by turn, or a sweep of rates as the paper does (normalized latency over throughput), as
    PNG.

    Args:
        path: the file; folders on the way are made.
        runs: one or more.
        target: the server, for the title.
        words: what was asked of it, for the title.

    Returns:
        The file.

    Raises:
        ConfigError: matplotlib is not installed, or no run has an answer.
    """
    answered = [found for found in map(figures, runs) if found.requests > found.failed]
    if not answered:
        raise ConfigError("there is nothing to plot: no request was answered")
    subtitle = f"{target.model} at {target.url}\n{words}"
    if runs[0].rate is not None:
        return _sweep(Path(path), answered, subtitle)
    return _by_turn(Path(path), answered[0], subtitle)


def _by_turn(path: Path, found: RunFigures, subtitle: str) -> Path:
    turns = [turn.turn + 1 for turn in found.by_turn]
    with canvas(path, "Time to first token and normalized latency by turn", subtitle, panels=2) as panels:
        for axes, key, label in zip(
            panels,
            ("ttft_ms", "normalized_ms"),
            ("time to first token, ms", "normalized latency, ms a token"),
            strict=True,
        ):
            for index, quantile in enumerate(_QUANTILES):
                values = [getattr(getattr(turn, key), quantile) for turn in found.by_turn]
                axes.plot(
                    turns, values, color=COLOURS[index], marker=MARKERS[index], linewidth=2, label=quantile
                )
            axes.set_ylim(bottom=0)
            whole_numbers(axes.xaxis)
            axes.set_xlabel("turn of the conversation")
            axes.set_ylabel(label)
            axes.legend(frameon=False)
    return path


def _sweep(path: Path, found: Sequence[RunFigures], subtitle: str) -> Path:
    steady = all(run.steady_requests_per_s is not None for run in found)
    throughputs = [run.steady_requests_per_s if steady else run.requests_per_s for run in found]
    with canvas(path, "Normalized latency over throughput", subtitle) as (axes,):
        for index, quantile in enumerate(_QUANTILES):
            values = [getattr(run.normalized_ms, quantile) for run in found]
            axes.plot(
                throughputs, values, color=COLOURS[index], marker=MARKERS[index], linewidth=2, label=quantile
            )
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(
            "answered requests a second"
            + (", while conversations arrive" if steady else ", to the last answer")
        )
        axes.set_ylabel("normalized latency, ms a token")
        axes.legend(frameon=False)
    return path
