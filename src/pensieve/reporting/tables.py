"""Tables that fit 80 columns, and numbers in them. Knows rich; never what was measured. A missing number is a
dash.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import fmean, median

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

_NONE = "–"


def table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )


def line_printer(console: Console) -> Callable[[str], None]:
    """Prints a line as it is: brackets are no markup, and long lines are not cut."""
    return lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)


def shown_ms(ms: float | None) -> str:
    if ms is None or math.isnan(ms):
        return _NONE
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}"


def shown_s_as_ms(seconds: float | None) -> str:
    return shown_ms(None if seconds is None else 1e3 * seconds)


def shown_count(value: float | None) -> str:
    return _NONE if value is None else f"{value:,.0f}"


def shown_number(value: float | None) -> str:
    return _NONE if value is None else f"{value:,.2f}"


def shown_share(share: float | None) -> str:
    return _NONE if share is None else f"{share:.1%}"


def shown_ratio(ratio: float | None) -> str:
    return _NONE if ratio is None else f"{ratio:.2f}×"


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b; None if a number is missing or b is 0."""
    return None if a is None or not b else a / b


def mean_or_none(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def median_or_none(values: Iterable[float | None]) -> float | None:
    """The median of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return median(known) if known else None
