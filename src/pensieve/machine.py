"""The machine that this process runs on: its processor's name, the cache folder, files.

Knows the system; never models or caches.
"""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path

import platformdirs


def cpu_name() -> str:
    """The processor's name. Only /proc/cpuinfo has it on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.lower().startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def cache_folder() -> Path:
    """The folder of fetched and converted models and of profiles.

    $PENSIEVE_CACHE, or the user's cache directory.
    """
    override = os.environ.get("PENSIEVE_CACHE")
    return Path(override).expanduser() if override else Path(platformdirs.user_cache_dir("pensieve"))


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all. Makes the folders on the way; a reader never sees a part of it.

    Raises:
        OSError: it cannot be written; an older file of this name is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
