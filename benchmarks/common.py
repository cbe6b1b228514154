"""What the benchmark scripts share: the commit, the processor, spreads. Each script prints its report as JSON in its last line of stdout."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pensieve.machine import cpu_name

__all__ = ["commit", "cpu_name", "spread"]


def commit() -> str:
    """The checkout's short commit hash, or "unknown" outside a checkout."""
    folder = Path(__file__).parent
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    return done.stdout.strip() or "unknown"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum, maximum and number of at least one value."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }
