"""The database that a store writes to and reads from.

Knows one writing thread and SQL; never which database, nor what rows mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

from pensieve.store.writer import Connection, GroupWriter, Job

T = TypeVar("T")

PROBE_BYTES = 64 << 10  # as much as a turn of some thousand tokens


class Storage(ABC):
    """Writes on one thread, with group commit. A database's own class reads, and overwrites deleted bytes."""

    _writer: GroupWriter
    _clock: Callable[[], float]  # seconds since the epoch

    @abstractmethod
    def _read(self, query: Job[T]) -> T:
        """Run a query that sees one state, beside the writer."""

    @abstractmethod
    def _scrub(self) -> tuple[bool, bool]:
        """Overwrite what deleted rows left in the store's files.

        Returns:
            Whether that was done, and whether it is certain that nothing is left.
        """

    def _now_s(self, connection: Connection) -> float:
        """The time that leases go by, in seconds since the epoch."""
        return self._clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Finish what is queued and close the storage. Afterwards every method raises `StoreError`."""
        self._writer.close()

    def trouble(self) -> str | None:
        """Why the next turn would not be stored, in a sentence: the last write failed, or does not end.

        None if no trouble is known.
        """
        return self._writer.trouble()

    def probe(self) -> None:
        """Write as much as a turn may have, to find out whether the store works again.

        Raises:
            StoreError: it does not.
        """

        def job(connection: Connection) -> None:
            connection.execute("DELETE FROM probe")
            connection.execute("INSERT INTO probe (filler) VALUES (?)", (bytes(PROBE_BYTES),))

        self._writer.probe(job)
