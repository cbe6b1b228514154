"""Where commands write what they measured. Knows paths; nothing of what goes there."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from pensieve.errors import ConfigError


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
        raise ConfigError("--out draws a picture, which needs matplotlib: pip install 'pensieve-serve[plot]', or take --json")
    return paths
