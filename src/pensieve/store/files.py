"""Checks that a database's files are still those that were opened.

Knows names and inodes; never what is in the files. A file that was deleted or replaced still takes writes,
without a name; all of them are lost when it is closed.
"""

from __future__ import annotations

import os
from pathlib import Path

SUFFIXES = ("", "-wal", "-shm")  # the database, its write-ahead log, the index that its processes share


class FileGone(Exception):
    """A file is no longer where it was opened."""


class StoreFiles:
    """The files of one open SQLite database.

    Args:
        path: the database; its log and index are beside it.
    """

    def __init__(self, path: Path) -> None:
        names = [path.with_name(path.name + suffix) for suffix in SUFFIXES]
        self._opened = [(name, identity) for name in names if (identity := _identity(name)) is not None]

    def check(self) -> None:
        """Check that the same files are still there.

        Raises:
            FileGone: one is not. This ends if the files were moved away and are moved back.
        """
        for name, identity in self._opened:
            found = _identity(name)
            if found != identity:
                what = "was deleted or moved away" if found is None else "was replaced by another file"
                kind = (
                    "file"
                    if name == self._opened[0][0]
                    else f"file beside it ({name.name.rpartition('-')[2]})"
                )
                raise FileGone(
                    f"its {kind} {what} while it was open: move it back, or start the server again"
                )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
