"""Lists and removes conversions of GGUF files in the user's cache. Knows folders and locks; never models."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import filelock

from pensieve.errors import ConfigError
from pensieve.machine import cache_folder
from pensieve.worker import embedded
from pensieve.worker.gguf_convert import FORMAT, read_manifest

_FOLDER = re.compile(r"(?P<sha256>[0-9a-f]{64})-v(?P<format>\d+)")
_UNFINISHED = re.compile(r"\.(?P<sha256>[0-9a-f]{16})-.*")
_SHORT_HASH = 12  # digits that are shown; four or more of them identify a conversion
_MIN_HASH = 4

State = Literal["ready", "old format", "damaged", "unfinished"]


@dataclass(frozen=True, slots=True)
class Conversion:
    """One converted model, or what is left of one."""

    name: str  # of the file that was converted; the default model has its name for --model
    sha256: str  # of that file; of unfinished ones, the first digits
    state: State  # conversions of an old format are never loaded
    format: int | None  # None if unfinished
    num_bytes: int  # on disk
    changed: str  # when it was made, ISO 8601 in UTC
    path: str


def converted() -> list[Conversion]:
    """All conversions in the cache, by name, also unfinished ones and those of older formats."""
    return sorted(_found(), key=lambda one: (one.name, one.sha256, one.path))


def remove(which: str) -> list[Conversion]:
    """Remove conversions from the disk; those still in use are converted again on next use.

    Args:
        which: a name or the first digits of a hash, as `converted` gives them, or "all".

    Returns:
        The conversions removed, without those that another process is building.

    Raises:
        ConfigError: no conversion has this name or hash, the name stands for several files, or all that are
            meant are being built now.
    """
    there = converted()
    wanted = [one for one in there if which == "all" or _is_meant(which, one)]
    if not wanted:
        if which == "all":
            return []
        raise ConfigError(
            f"nothing converted is called {which!r}. `pensieve models --cached` lists what there is"
        )
    hashes = sorted({one.sha256[:16] for one in wanted})
    if which != "all" and len(hashes) > 1:
        short = ", ".join(sha256[:_SHORT_HASH] for sha256 in hashes)
        raise ConfigError(f"{which!r} stands for {len(hashes)} conversions: name one by its hash ({short})")
    removed = [one for one in wanted if _remove(one)]
    if not removed:
        raise ConfigError(
            f"{which!r} is being converted by another process: wait until it is done, or end it"
        )
    return removed


def _is_meant(which: str, one: Conversion) -> bool:
    return which == one.name or (len(which) >= _MIN_HASH and one.sha256.startswith(which.lower()))


def _remove(one: Conversion) -> bool:
    """Remove a conversion, unless a process that builds it holds its lock; returns whether it was removed."""
    path = Path(one.path)
    # of an unfinished conversion only the beginning of the hash is known
    locks = (
        [path.parent / f"{one.sha256}.lock"]
        if one.format is not None
        else sorted(path.parent.glob(f"{one.sha256}*.lock"))
    )
    with contextlib.ExitStack() as held:
        try:
            for lock in locks:
                held.enter_context(filelock.FileLock(lock, timeout=0))
        except filelock.Timeout:
            return False
        shutil.rmtree(path, ignore_errors=True)
    return not path.exists()


def _found() -> Iterator[Conversion]:
    folder = cache_folder() / "converted"
    names: dict[str, str] = {}
    unfinished = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := _FOLDER.fullmatch(path.name):
            found = _finished(path, match["sha256"], int(match["format"]))
            names[found.sha256[:16]] = found.name
            yield found
        elif (match := _UNFINISHED.fullmatch(path.name)) and path.is_dir():
            unfinished.append((path, match["sha256"]))
    for path, sha256 in unfinished:
        yield Conversion(
            names.get(sha256, "?"), sha256, "unfinished", None, _size(path), _time(path), str(path)
        )


def _finished(path: Path, sha256: str, number: int) -> Conversion:
    state: State = "ready"
    try:
        name = str(read_manifest(path)["source"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        name, state = "?", "damaged"
    if number != FORMAT:
        state = "old format"
    if sha256 == embedded.GGUF_SHA256:
        name = embedded.NAME
    return Conversion(name, sha256, state, number, _size(path), _time(path), str(path))


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except OSError:
            continue  # removed meanwhile
    return total


def _time(folder: Path) -> str:
    try:
        return datetime.fromtimestamp(folder.stat().st_mtime, UTC).isoformat(timespec="seconds")
    except OSError:
        return ""
