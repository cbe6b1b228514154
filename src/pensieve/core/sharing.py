"""Which sequences run through which chunks. Knows paths and hashes; never slots, requests or time.

A new sequence takes the longest match among the full chunks of its namespace, found by chain hash.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens

from pensieve.core.chunk import Chunk
from pensieve.core.keeps import Keeps
from pensieve.core.places import Places
from pensieve.core.sequence import Sequence, Sharers, root_digest, sequences_of


class Sharing:
    """Sole writer of `Chunk.owner` and of the prefix index. Part of `TieredCache`."""

    def __init__(self, chunk_tokens: int, places: Places, keeps: Keeps) -> None:
        self.index: dict[bytes, Chunk] = {}  # chain hash -> the one chunk found by it
        self._chunk_tokens, self._places, self._keeps = chunk_tokens, places, keeps

    def attach(self, sequence: Sequence, tokens: Tokens[int], digests: Tokens[bytes]) -> None:
        """Give a sequence every chunk that its `tokens` can reuse, its own or a shared one, and no other.

        At most len(tokens) - 1 tokens are matched: one must be left to compute. `digests` are the chain
        hashes of the full chunks of `tokens`. Chunks that a changed or shortened history no longer agrees
        with are let go. Attaching again changes nothing.
        """
        assert not sequence.leased, f"{sequence!r} re-attached while leased"
        size = self._chunk_tokens
        limit = (len(tokens) - 1) // size
        old = sequence.chunks
        new: list[Chunk | None] = []
        for position in range(limit):
            own = old[position] if position < len(old) else None
            if own is not None and own.digest != digests[position]:
                own = None
            if own is None or (own.place is None and not own.computing):
                own = self.index.get(digests[position], own)
            new.append(own)
        partial = self._matching_tail(sequence, tokens, digests)
        if partial is not None and (partial.index == limit or new[partial.index] is None):
            del new[partial.index :]
            new.append(partial)
        while new and new[-1] is None:
            new.pop()
        for position, chunk in enumerate(old):
            if chunk is not None and (position >= len(new) or new[position] is not chunk):
                self.detach(sequence, chunk)
        for position, chunk in enumerate(new):
            if chunk is not None and (position >= len(old) or old[position] is not chunk):
                self._share(sequence, chunk)
        sequence.chunks = new
        sequence.tail = sequence.tail[: partial.num_tokens] if partial is not None else ()

    def shorten(self, sequence: Sequence, num_tokens: int) -> None:
        """Cut a sequence to `num_tokens`, and holes off its end.

        A chunk cut in its middle stays only if private.
        """
        chunks = sequence.chunks
        while chunks:
            last, start = chunks[-1], (len(chunks) - 1) * self._chunk_tokens
            if last is not None:
                if start + last.num_tokens <= num_tokens:
                    return
                if start < num_tokens and last.owner is sequence:
                    self._unindex(last)
                    last.digest, last.num_tokens = None, num_tokens - start
                    return
            chunks.pop()
            if last is not None:
                self.detach(sequence, last)

    def detach(self, sequence: Sequence, chunk: Chunk) -> None:
        """One sequence fewer runs through a chunk; after the last one its slots are freed."""
        self._keeps.left(sequence, chunk)
        owner = chunk.owner
        if isinstance(owner, Sharers):
            self._places.leave_queues(chunk)
            owner.discard(sequence)
            if len(owner.members) == 1:
                (chunk.owner,) = owner.members
            self._places.reindex(chunk)
            return
        self._unindex(chunk)
        self._places.discard(chunk)

    def lose(self, chunk: Chunk) -> tuple[Sequence, ...]:
        """A chunk was dropped or failed: its record goes. Returns its sequences, which have a hole now."""
        self._unindex(chunk)
        sequences = sequences_of(chunk)
        for sequence in sequences:
            self._keeps.left(sequence, chunk)
            sequence.chunks[chunk.index] = None
            while sequence.chunks and sequence.chunks[-1] is None and not sequence.leased:
                sequence.chunks.pop()
            if chunk.digest is None:
                sequence.tail = ()
        return sequences

    def _share(self, sequence: Sequence, chunk: Chunk) -> None:
        """One more sequence runs through a chunk."""
        self._places.leave_queues(chunk)
        if isinstance(chunk.owner, Sharers):
            chunk.owner.add(sequence)
        else:
            chunk.owner = Sharers({*sequences_of(chunk), sequence})
        self._places.reindex(chunk)

    def _unindex(self, chunk: Chunk) -> None:
        if chunk.digest is not None and self.index.get(chunk.digest) is chunk:
            del self.index[chunk.digest]

    def _matching_tail(self, sequence: Sequence, tokens: Tokens[int], digests: Tokens[bytes]) -> Chunk | None:
        """A sequence's partial last chunk, shortened to the tokens that agree; None if none does."""
        chunk = sequence.chunks[-1] if sequence.chunks else None
        if chunk is None or not sequence.tail or chunk.digest is not None or chunk.computing:
            return None
        start = chunk.index * self._chunk_tokens
        limit = min(len(sequence.tail), len(tokens) - 1 - start)
        if limit <= 0:
            return None
        parent = digests[chunk.index - 1] if chunk.index else root_digest(sequence.key[0])
        if sequence.tail_parent != parent:
            return None  # the same tokens after another prefix have other KV
        agree = 0
        while agree < limit and sequence.tail[agree] == tokens[start + agree]:
            agree += 1
        if agree == 0:
            return None
        chunk.num_tokens = agree  # bytes beyond stay where they are: the length says what is valid
        return chunk
