"""A disk that remembers what was written and what was flushed, so that power can be cut at any moment of a
run, many times over.

SQLite writes through `RecordingVfs` (apsw's, a second SQLite in the process that lets Python be its file
system). Afterwards `Disk.after_power_loss` gives the files as a real disk might have them: what was flushed,
and of the rest any part.
"""

from __future__ import annotations

import itertools
import random
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw

SECTOR = 512  # a disk writes this much or nothing of it


@dataclass(frozen=True)
class Write:
    file: str
    offset: int
    data: bytes


@dataclass(frozen=True)
class Truncate:
    file: str
    size: int


@dataclass(frozen=True)
class Sync:
    file: str


@dataclass(frozen=True)
class Delete:
    file: str


@dataclass(frozen=True)
class Said:
    """Not the disk's: something was acknowledged."""

    what: Any


Operation = Write | Truncate | Sync | Delete | Said


@dataclass
class Disk:
    operations: list[Operation] = field(default_factory=list)

    def after_power_loss(self, at: int, chance: random.Random) -> dict[str, bytes]:
        """The files when power fails before operation `at`, name -> content."""
        flushed: dict[str, bytearray] = {}
        pending: dict[str, list[Write | Truncate]] = {}
        for operation in self.operations[:at]:
            match operation:
                case Write(file) | Truncate(file):
                    pending.setdefault(file, []).append(operation)
                case Sync(file):
                    content = flushed.setdefault(file, bytearray())
                    for change in pending.pop(file, []):
                        _apply(content, change)
                case Delete(file):
                    flushed.pop(file, None)
                    pending.pop(file, None)
        for file, changes in pending.items():
            if file not in flushed and chance.random() < 0.5:
                continue  # nor was its name flushed
            content = flushed.setdefault(file, bytearray())
            for change in changes:
                for part in _sectors(change):
                    if chance.random() < 0.5:
                        _apply(content, part)
        return {file: bytes(content) for file, content in flushed.items()}


def _sectors(change: Write | Truncate) -> Sequence[Write | Truncate]:
    if isinstance(change, Truncate):
        return [change]
    first = SECTOR - change.offset % SECTOR  # up to the next boundary
    bounds = [0, *range(first, len(change.data), SECTOR), len(change.data)]
    return [
        Write(change.file, change.offset + start, change.data[start:stop])
        for start, stop in itertools.pairwise(bounds)
        if start < stop
    ]


def _apply(content: bytearray, change: Write | Truncate) -> None:
    if isinstance(change, Truncate):
        del content[change.size :]
        return
    content.extend(bytes(max(0, change.offset + len(change.data) - len(content))))
    content[change.offset : change.offset + len(change.data)] = change.data


class RecordingVfs(apsw.VFS):
    """The system's file system, writing down what happens to files."""

    def __init__(self, name: str, disk: Disk) -> None:
        super().__init__(name, "")
        self._disk = disk

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        return _File(self._disk, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        self._disk.operations.append(Delete(Path(filename).name))
        super().xDelete(filename, syncdir)


class _File(apsw.VFSFile):
    def __init__(self, disk: Disk, name: Any, flags: list[int]) -> None:
        super().__init__("", name, flags)
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        self._disk = disk if path else Disk()  # a temporary file has no name and no future
        self._file = Path(path).name if path else ""

    def xWrite(self, data: bytes, offset: int) -> None:
        self._disk.operations.append(Write(self._file, offset, bytes(data)))
        super().xWrite(data, offset)

    def xTruncate(self, newsize: int) -> None:
        self._disk.operations.append(Truncate(self._file, newsize))
        super().xTruncate(newsize)

    def xSync(self, flags: int) -> None:
        super().xSync(flags)
        self._disk.operations.append(Sync(self._file))  # from now on it can be relied upon


class RecordedConnection:
    """As much of a `sqlite3.Connection` as the store uses, over a recording file system."""

    def __init__(self, path: Path, vfs: str, changed: Mapping[str, str]) -> None:
        self._connection = apsw.Connection(str(path), vfs=vfs)
        self._changed = changed  # parts of statements to run differently

    @property
    def in_transaction(self) -> bool:
        return self._connection.in_transaction

    def execute(self, sql: str, values: Sequence[Any] = ()) -> apsw.Cursor:
        for old, new in self._changed.items():
            sql = sql.replace(old, new)
        try:
            return self._connection.execute(sql, values)
        except apsw.Error as error:
            raise sqlite3.OperationalError(str(error)) from error

    def close(self) -> None:
        self._connection.close()
