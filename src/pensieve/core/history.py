"""What became of chunks that are gone, so that a receipt can say why they were missing. Knows hashes, causes and times as told."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Tokens
from typing import Literal, NamedTuple

from pensieve.core.chunk import Chunk
from pensieve.core.sequence import Key, Sequence, chain_digest

MAX_LOSSES = 16_384  # remembered; the oldest are forgotten first


class Loss(NamedTuple):
    """One chunk that is gone."""

    why: Literal["dropped", "failed"]
    at_s: float
    by: Key | None  # the sequence for which room was made; None: nobody in particular
    num_tokens: int  # of a partial chunk, 0 for a full one
    digest: bytes  # of a partial chunk's tokens and all before; empty: not known


class History:
    """Losses in the order they happened: full chunks by their hash, partial ones by sequence and position."""

    def __init__(self, limit: int = MAX_LOSSES) -> None:
        self._limit = limit
        self._losses: OrderedDict[bytes | tuple[Key, int], Loss] = (
            OrderedDict()
        )  # (a dict is slow at giving its first entry up)
        self.num_failed = 0  # chunks lost to a failed copy or forward

    def __len__(self) -> int:
        return len(self._losses)

    def note(
        self, chunk: Chunk, why: Literal["dropped", "failed"], now_s: float, by: Key | None = None
    ) -> None:
        """A chunk, still as it was, is about to be lost."""
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
        self._losses.move_to_end(key)  # the latest loss is the one to tell of, and the last to be forgotten
        if len(self._losses) > self._limit:
            self._losses.popitem(last=False)

    def found_again(self, digest: bytes) -> None:
        """A full chunk was computed: it is not lost any more."""
        self._losses.pop(digest, None)

    def of_full(self, digest: bytes) -> Loss | None:
        """What became of a full chunk."""
        return self._losses.get(digest)

    def of_partial(self, key: Key, index: int, parent: bytes, tokens: Tokens[int]) -> Loss | None:
        """What became of a sequence's partial chunk, if it held a beginning of `tokens` after a prefix of the hash `parent`."""
        loss = self._losses.get((key, index))
        if loss is None or len(tokens) < loss.num_tokens:
            return None
        if loss.digest and loss.digest != chain_digest(parent, tokens[: loss.num_tokens]):
            return None
        return loss
