"""Keeps: conversations whose chunks a user asked never to drop (the `pin` command).

Knows chunks and counts; never requests or time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Tokens

from pensieve.config import CacheConfig
from pensieve.core.chunk import Chunk
from pensieve.core.places import Places
from pensieve.core.sequence import Sequence
from pensieve.errors import KeepRefused


class Keeps:
    """Sole writer of `Chunk.keeps` and `Sequence.kept`. Part of `TieredCache`."""

    def __init__(self, config: CacheConfig, places: Places) -> None:
        self.limit = math.floor(config.keep_share * config.tiers[-1].num_slots)  # chunks that may be kept
        self.takes_first_tier = len(config.tiers) == 1  # kept chunks cannot move to another tier
        self.num_kept = 0  # chunks
        self.held: dict[Sequence, set[Chunk]] = {}  # the kept chunks of each kept sequence
        self._places = places

    def set(self, sequence: Sequence) -> None:
        """Keep every chunk of a sequence: it may change tier but is never dropped.

        Raises:
            KeepRefused: these chunks would exceed the share of slots that keeps may hold. Nothing changes.
        """
        if sequence in self.held:
            return
        chunks = {chunk for chunk in sequence.chunks if chunk is not None}
        new = sum(1 for chunk in chunks if not chunk.keeps)
        if self.num_kept + new > self.limit:
            raise KeepRefused(
                f"keeping {sequence.key[1]!r} takes {new} chunks; {self.num_kept} of at most {self.limit} "
                "are kept already: lift another keep, or start with larger tiers"
            )
        self.held[sequence] = chunks
        sequence.kept = True
        for chunk in chunks:
            self._change(chunk, +1)

    def lift(self, sequence: Sequence) -> None:
        """End a sequence's keep, if it has one."""
        held = self.held.pop(sequence, None)
        if held is not None:
            sequence.kept = False
            for chunk in held:
                self._change(chunk, -1)

    def extend(self, sequence: Sequence) -> None:
        """A kept sequence grew: keep its new chunks as far as the limit allows, leading ones first.

        With a single tier nothing is added: there a keep is weighed against the queued requests when it is
        set, and only then.
        """
        held = self.held.get(sequence)
        if held is None or self.takes_first_tier:
            return
        for chunk in sequence.chunks:
            if chunk is not None and chunk not in held and (chunk.keeps or self.num_kept < self.limit):
                held.add(chunk)
                self._change(chunk, +1)

    def left(self, sequence: Sequence, chunk: Chunk) -> None:
        """A sequence no longer runs through a chunk, so its keep no longer covers it."""
        held = self.held.get(sequence)
        if held is not None and chunk in held:
            held.remove(chunk)
            self._change(chunk, -1)

    def lift_all(self, chunk: Chunk) -> None:
        """End every keep on a chunk that cannot be read: keeps forbid eviction, they do not repair."""
        for held in self.held.values():
            if chunk in held:
                held.remove(chunk)
                self._change(chunk, -1)

    def num_against(self, sequence: Sequence | None, digests: Tokens[bytes]) -> int:
        """First-tier slots that keeps deny to a request of `sequence` whose path has these chain hashes.

        None are denied where kept chunks can move down. A chunk that the path runs through, or that only this
        sequence keeps, is not in the way.
        """
        if not self.takes_first_tier:
            return 0
        if sequence is None:
            return self.num_kept
        held = self.held.get(sequence, set())
        own = 0
        for chunk in sequence.chunks:
            if chunk is not None and chunk.keeps:
                only_here = chunk.keeps == 1 and chunk in held
                own += only_here or (chunk.index < len(digests) and chunk.digest == digests[chunk.index])
        return self.num_kept - own

    def _change(self, chunk: Chunk, change: int) -> None:
        before = bool(chunk.keeps)
        chunk.keeps += change
        self.num_kept += bool(chunk.keeps) - before
        self._places.version += before and not chunk.keeps
        self._places.reindex(chunk)
