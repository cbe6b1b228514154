"""A map of the cache for people: one row a conversation, one character a chunk.

Reads the cache; never changes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pensieve.core.cache import TieredCache
from pensieve.core.chunk import Chunk
from pensieve.core.cost import ResumeQuote
from pensieve.core.sequence import Sequence, Sharers

MAX_ROWS = 64  # built between two steps, so that no step waits for a large map
MAX_CELLS = 8192  # likewise


@dataclass(frozen=True, slots=True)
class MapRow:
    """One conversation.

    `cells` has one character a chunk: `g` first tier only, `b` first tier and below, `c` below, `d` on disk,
    `.` dropped, `*` being computed, `>` being swapped in. Upper case: shared with another conversation.
    Dropped chunks at the end have no cell.
    """

    namespace: str
    sequence_id: str
    cells: str
    idle_s: float  # since its last activity; 0 while a request of it is queued or runs
    active: bool
    kept: bool
    tokens: int  # with KV, in any tier
    resume_s: float | None  # to have all of it in the first tier again; None if Cost(l) is not in seconds


def latest_first(
    cache: TieredCache, namespaces: Iterable[str] | None = None, tenant: str | None = None
) -> list[Sequence]:
    """The conversations of these namespaces and this tenant, latest active first. None stands for all."""
    chosen: Iterable[Sequence] = cache.sequences.values()
    if namespaces is not None or tenant is not None:
        wanted = cache.namespaces.of(tenant) if tenant is not None else set(namespaces or ())
        if namespaces is not None:
            wanted &= set(namespaces)
        chosen = [sequence for sequence in chosen if sequence.key[0] in wanted]
    return sorted(chosen, key=_recency, reverse=True)


def _recency(sequence: Sequence) -> tuple[bool, float]:
    return sequence.num_active > 0, sequence.seen_s


class Overview:
    """Rows of chosen conversations, built a few at a time. A conversation that is gone by then has no row."""

    def __init__(self, cache: TieredCache, sequences: list[Sequence], quote: ResumeQuote | None) -> None:
        self._cache, self._quote = cache, quote
        self._letters = ["d" if tier.name == "disk" else "c" for tier in cache.config.tiers]
        self._left = sequences[::-1]
        self.rows: list[MapRow] = []

    @property
    def done(self) -> bool:
        """All rows are built."""
        return not self._left

    def build_some(self, now_s: float) -> None:
        """Build the next rows."""
        num_rows = num_cells = 0
        while self._left and num_rows < MAX_ROWS and num_cells < MAX_CELLS:
            sequence = self._left.pop()
            if self._cache.sequences.get(sequence.key) is sequence:
                self.rows.append(self._row(sequence, now_s))
                num_rows, num_cells = num_rows + 1, num_cells + len(sequence.chunks)

    def _row(self, sequence: Sequence, now_s: float) -> MapRow:
        cells = "".join(map(self._cell, sequence.chunks))
        active = sequence.num_active > 0
        resume_s = None
        if self._quote is not None:
            dropped = [position for position, cell in enumerate(cells) if cell == "."]
            resume_s = self._quote.seconds(dropped, sum(map(cells.count, ">cdCD")))
        return MapRow(
            *sequence.key,
            cells,
            0.0 if active else max(0.0, now_s - sequence.seen_s),
            active,
            sequence.kept,
            sum(chunk.num_tokens for chunk in sequence.chunks if chunk is not None),
            resume_s,
        )

    def _cell(self, chunk: Chunk | None) -> str:
        if chunk is None:
            return "."
        if chunk.computing:
            return "*"
        slots = chunk.slots
        if slots[0] is not None:
            cell = "b" if any(slot is not None for slot in slots[1:]) else "g"
        elif chunk.copy is not None and chunk.copy.dst_tier == 0:
            return ">"
        else:
            assert chunk.place is not None
            cell = self._letters[chunk.place]
        return cell.upper() if isinstance(chunk.owner, Sharers) else cell
