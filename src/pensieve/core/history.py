"""Lost chunks and why they were lost, for receipts.

Knows hashes, causes and times as told; never slots or requests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Tokens
from typing import Literal, NamedTuple

from pensieve.core.chunk import Chunk
from pensieve.core.sequence import Key, Sequence, chain_digest

MAX_LOSSES = 16_384  # remembered; the oldest are forgotten first


class Loss(NamedTuple):
    """One lost chunk."""

    why: Literal["dropped", "failed"]
    at_s: float
    by: Key | None  # the sequence for which room was made; None if for none in particular
    num_tokens: int  # of a partial chunk; 0 for a full one
    digest: bytes  # of a partial chunk's tokens and all before; empty if unknown


class History:
    """Losses in the order they happened: full chunks by their hash, partial ones by sequence and position."""

    def __init__(self, limit: int = MAX_LOSSES) -> None:
        self._limit = limit
        # (a plain dict is slow at giving up its first entry)
        self._losses: OrderedDict[bytes | tuple[Key, int], Loss] = OrderedDict()
        self.num_failed = 0  # chunks lost to a failed copy or forward

    def __len__(self) -> int:
        return len(self._losses)

    def note(
        self, chunk: Chunk, why: Literal["dropped", "failed"], now_s: float, by: Key | None = None
    ) -> None:
        """A chunk is about to be lost. Its record is still unchanged."""
        self.num_failed += why == "failed"
        key: bytes | tuple[Key, int]
        if chunk.digest is not None:
            key, loss = chunk.digest, Loss(why, now_s, by, 0, b"")
        elif isinstance(chunk.owner, Sequence) and chunk.num_tokens:
            owner = chunk.owner
            known = len(owner.tail) >= chunk.num_tokens
            digest = chain_digest(owner.tail_parent, owner.tail[: chunk.num_tokens]) if known else b""
            key, loss = (owner.key, chunk.index), Loss(why, now_s, by, chunk.num_tokens, digest)
        else:
            return
        self._losses[key] = loss
        self._losses.move_to_end(key)  # the latest loss is reported, and forgotten last
        if len(self._losses) > self._limit:
            self._losses.popitem(last=False)

    def found_again(self, digest: bytes) -> None:
        """A full chunk was computed again."""
        self._losses.pop(digest, None)

    def of_full(self, digest: bytes) -> Loss | None:
        """The loss of a full chunk; None if none is known."""
        return self._losses.get(digest)

    def of_partial(self, key: Key, index: int, parent: bytes, tokens: Tokens[int]) -> Loss | None:
        """The loss of a sequence's partial chunk; None unless it began like `tokens`, after `parent`."""
        loss = self._losses.get((key, index))
        if loss is None or len(tokens) < loss.num_tokens:
            return None
        if loss.digest and loss.digest != chain_digest(parent, tokens[: loss.num_tokens]):
            return None
        return loss
