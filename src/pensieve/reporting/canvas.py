"""One look for all plots. Knows sizes and colours; never what is drawn. Imports matplotlib for the first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pensieve.errors import ConfigError

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#444444",
)  # told apart by colour-blind readers too (Okabe and Ito)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@contextmanager
def canvas(path: str | Path, title: str, subtitle: str, *, panels: int = 1) -> Iterator[Sequence[Any]]:
    """Axes side by side to draw on, written as PNG at the end; folders on the way are made.

    Args:
        path: the file.
        title: in bold, above everything.
        subtitle: of several lines perhaps, smaller.
        panels: how many axes.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("a plot needs matplotlib: pip install 'pensieve-serve[plot]'") from error
    with matplotlib.rc_context({"font.size": 11}):
        figure = Figure(figsize=(8.0 if panels == 1 else 6.0 * panels, 5.6), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, panels, squeeze=False)[0]
        yield axes
        for one in axes:
            one.grid(alpha=0.3)
            one.spines[["top", "right"]].set_visible(False)
        figure.suptitle(title, fontsize=14, fontweight="bold", x=0.01, ha="left")
        axes[0].set_title(subtitle, fontsize=10, color="#444444", loc="left")
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, format="png")


def whole_numbers(axis: Any) -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))
