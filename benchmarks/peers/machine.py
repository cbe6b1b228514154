"""What a result was measured on. Knows /proc; never servers."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "bmi2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
)  # that servers choose by


def cpu_flags(cpuinfo: str | None = None) -> frozenset[str]:
    """Which of `FLAGS` the processor has."""
    text = _read("/proc/cpuinfo") if cpuinfo is None else cpuinfo
    has = next((line.partition(":")[2].split() for line in text.splitlines() if line.startswith("flags")), [])
    return frozenset(FLAGS) & frozenset(has)


def describe() -> dict[str, Any]:
    """Processor, memory and system, as plain data."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in _read("/proc/cpuinfo").splitlines()
            if line.startswith("model name")
        ),
        None,
    )
    total_kb = next(
        (int(line.split()[1]) for line in _read("/proc/meminfo").splitlines() if line.startswith("MemTotal")),
        None,
    )
    return {
        "cpu": model or platform.processor(),
        "flags": sorted(cpu_flags()),
        "cores": cores(),
        "memory_gb": None if total_kb is None else round(total_kb * 1024 / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0))


def load_average() -> float:
    """Of the last minute."""
    return os.getloadavg()[0]


def commit() -> str | None:
    """This checkout's, with a mark where files differ from it; None outside a checkout."""
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    return told.stdout.strip() or None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
