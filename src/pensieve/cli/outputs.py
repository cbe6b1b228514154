"""Where commands write what they measured. Knows paths; nothing of what goes there."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from rich.console import Console

from pensieve.errors import ConfigError

_WIDTH = 130  # of tables in a file or a pipe


def check_paths(out_dir: Path | None, json_path: Path | None, name: str) -> list[Path]:
    """Where the JSON goes. What would keep it from being written is said now, not after the run.

    Raises:
        ConfigError: a folder cannot be made, or the picture cannot be drawn.
    """
    paths = [json_path] if json_path is not None else []
    paths += [out_dir / name] if out_dir is not None else []
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the folder {path.parent}: {error.strerror or error}") from error
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ConfigError(f"cannot write {path}: it is a folder, or its folder may not be written to")
    if out_dir is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "--out draws a picture, which needs matplotlib: pip install 'pensieve-serve[plot]', or take "
            "--json"
        )
    return paths


def table_console() -> Console:
    """Where tables go: as wide as the terminal, or wide enough where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=_WIDTH)
