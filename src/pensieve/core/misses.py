"""Why a prompt's tokens were not in the first tier. Knows ranges, hashes and lost chunks; changes nothing."""

from __future__ import annotations

from collections.abc import Sequence as Tokens

from pensieve.core.cache import Admission, TieredCache
from pensieve.core.history import Loss
from pensieve.core.receipt import Miss, Why
from pensieve.core.sequence import Key, chain_digest, root_digest, tenant_of

MAX_NAMESPACES = 64  # of the same tenant, searched for one request
MAX_HASHES = 2048  # computed in that search

ANOTHER_TENANT = "another key's conversation"


def explain(
    cache: TieredCache,
    key: Key,
    tokens: Tokens[int],
    history_tokens: int,
    digests: Tokens[bytes],
    admission: Admission,
) -> tuple[Miss, ...]:
    """The misses of an admission, ascending; they cover exactly what was not found in the first tier.

    Args:
        cache: as the admission left it.
        key: the request's sequence.
        tokens: the prompt.
        history_tokens: prompt tokens that an earlier turn had put before the model.
        digests: chain hashes of the prompt's full chunks.
        admission: what it found.
    """
    return _Explanation(cache, key, tokens, history_tokens, digests).of(admission)


class _Explanation:
    def __init__(
        self, cache: TieredCache, key: Key, tokens: Tokens[int], history_tokens: int, digests: Tokens[bytes]
    ) -> None:
        self._cache, self._key, self._tokens, self._history, self._digests = (
            cache,
            key,
            tokens,
            history_tokens,
            digests,
        )
        self._misses: list[Miss] = []
        self._elsewhere: int | None = (
            None  # leading chunks found in another namespace; None before the search
        )
        self._untraced = -1  # position of the last chunk without a trace

    def of(self, admission: Admission) -> tuple[Miss, ...]:
        size = self._cache.chunk_tokens
        ranges = [(start, stop, True) for start, stop in admission.lower] + [
            (start, stop, False) for start, stop in admission.missing
        ]
        for start, stop, is_lower in sorted(ranges):
            if is_lower:
                self._add(start, stop, "on_cpu")
                continue
            while start < stop:
                end = min(stop, (start // size + 1) * size)
                if start % size:
                    self._split(start, end, "unfinished")
                else:
                    self._absent_chunk(start, end)
                start = end
        return tuple(self._misses)

    def _absent_chunk(self, start: int, stop: int) -> None:
        cache, digests = self._cache, self._digests
        position = start // cache.chunk_tokens
        if position < len(digests) and (loss := cache.history.of_full(digests[position])) is not None:
            self._add_loss(start, stop, loss)
            return
        parent = digests[position - 1] if position else root_digest(self._key[0])
        loss = cache.history.of_partial(self._key, position, parent, self._tokens[start:stop])
        if loss is not None:
            self._add_loss(start, start + loss.num_tokens, loss)
            self._split(start + loss.num_tokens, stop, "unfinished")
            return
        if position < len(digests):
            if self._elsewhere is None:
                self._elsewhere = self._find_elsewhere(position)
            if position < self._elsewhere:
                self._untraced = position
                self._add(start, stop, "other_namespace")
                return
        history = self._history
        was_sampled_last = start + 1 == history  # the first token of its chunk, which does not exist yet
        # Of a prompt that ends with a full chunk, that chunk is computed.
        is_left_to_compute = stop == history == len(self._tokens) and position < len(digests)
        if position and self._untraced != position - 1 and (was_sampled_last or is_left_to_compute):
            self._split(start, stop, "unfinished")
            return
        if start < history:
            self._untraced = position
        self._split(start, stop, "never_seen")

    def _split(self, start: int, stop: int, why_of_history: Why) -> None:
        border = min(max(start, self._history), stop)
        self._add(start, border, why_of_history)
        self._add(border, stop, "new")

    def _add_loss(self, start: int, stop: int, loss: Loss) -> None:
        by = None
        if loss.by is not None:
            same = tenant_of(loss.by[0]) == tenant_of(self._key[0])
            by = loss.by[1] if same else ANOTHER_TENANT
        self._add(start, stop, loss.why, loss.at_s, by)

    def _add(self, start: int, stop: int, why: Why, at_s: float | None = None, by: str | None = None) -> None:
        if start == stop:
            return
        last = self._misses[-1] if self._misses else None
        if last is not None and (last.stop, last.why, last.by) == (start, why, by):
            start, at_s = last.start, max((t for t in (last.at_s, at_s) if t is not None), default=None)
            self._misses.pop()
        self._misses.append(Miss(start, stop, why, at_s, by))

    def _find_elsewhere(self, position: int) -> int:
        """Leading chunks of the prompt that another namespace of the tenant holds.

        The search ends at the first namespace that holds more than `position` of them.
        """
        size, tokens, index = self._cache.chunk_tokens, self._tokens, self._cache.index
        most, hashes = 0, 0
        for namespace in self._cache.namespaces.siblings(self._key[0], MAX_NAMESPACES):
            parent = root_digest(namespace)
            for found in range(len(self._digests)):
                hashes += 1
                parent = chain_digest(parent, tokens[found * size : (found + 1) * size])
                if parent not in index:
                    break
                most = max(most, found + 1)
                if hashes >= MAX_HASHES:
                    return most
            if most > position:
                return most
        return most
