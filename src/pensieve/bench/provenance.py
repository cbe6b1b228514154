"""What a measurement ran on: commit, processor, package versions. Knows git and packages; never what was
measured.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import pensieve
from pensieve.machine import cpu_name

_PACKAGES = ("torch", "transformers", "numpy", "safetensors", "triton")


def source_version() -> dict[str, Any]:
    """The package's version, and its commit if it runs from its own git checkout (`dirty`: with changes on
    top).
    """
    found: dict[str, Any] = {"version": pensieve.__version__, "commit": None, "dirty": None}
    here = Path(pensieve.__file__).resolve().parent
    if _git(here, "ls-files", "--error-unmatch", "__init__.py") is None:
        return found  # installed, or inside a checkout of another project
    found["commit"] = (_git(here, "rev-parse", "HEAD") or "").strip() or None
    status = _git(here, "status", "--porcelain", "--untracked-files=no")
    found["dirty"] = None if status is None else bool(status.strip())
    return found


def machine() -> dict[str, Any]:
    """Operating system, Python, processor and the number of cores that this process may use."""
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def versions() -> dict[str, str]:
    """Versions of the installed packages that affect speed and results."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of a git command; None if it failed or git is not installed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
