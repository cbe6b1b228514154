"""Which token ranges must be computed, and in which pieces.

Knows ranges; never chunks' places, token ids or requests.

A prompt, a dropped prefix and a hole anywhere are the same thing here: a range without KV (paper §4.3.4's two
sub-requests fall out).
"""

from __future__ import annotations

from collections.abc import Iterable

Range = tuple[int, int]  # half-open, in tokens


def missing_ranges(valid_tokens: Iterable[int], num_tokens: int, chunk_tokens: int) -> list[Range]:
    """The ranges of `[0, num_tokens)` without KV, ascending and not touching each other.

    `valid_tokens` gives for each chunk, from the first on, how many of its leading tokens have KV; chunks
    beyond have none.
    """
    missing: list[Range] = []
    counts = iter(valid_tokens)
    for start in range(0, num_tokens, chunk_tokens):
        first, stop = start + next(counts, 0), min(start + chunk_tokens, num_tokens)
        if first >= stop:
            continue
        if missing and missing[-1][1] == first:
            missing[-1] = (missing[-1][0], stop)
        else:
            missing.append((first, stop))
    return missing


def cut(ranges: list[Range], budget: int, chunk_tokens: int) -> tuple[list[Range], list[Range]]:
    """Split ascending ranges into those that fit in `budget` tokens now and the rest.

    A range is cut at a chunk boundary only, so that a chunk is computed whole in one step (or to the
    sequence's end). A range is taken only after all ranges before it.
    """
    taken: list[Range] = []
    for position, (start, stop) in enumerate(ranges):
        if stop - start <= budget:
            taken.append((start, stop))
            budget -= stop - start
            continue
        boundary = (start + budget) // chunk_tokens * chunk_tokens
        if boundary <= start:
            return taken, ranges[position:]
        taken.append((start, boundary))
        return taken, [(boundary, stop), *ranges[position + 1 :]]
    return taken, []
