"""How long the conversations of a load are, and what follows from it. Knows scripts and sizes; never costs or
schedulers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pensieve.workloads.generators import MAX_CONTEXT
from pensieve.workloads.load_plan import LoadOptions
from pensieve.workloads.scripts import check_contexts, contexts
from pensieve.workloads.traces import load_trace

CHUNK, LONG_CHUNK, LONG_CONTEXT = (
    32,
    1024,
    65_536,
)  # (of a long context a chunk is a small share, and what a turn costs to simulate)
USERS = 32  # at once, of a trace that does not say when its conversations begin


@dataclass(frozen=True, slots=True)
class Extent:
    """A load as it will be played."""

    load: LoadOptions
    max_context: int  # tokens of prompt and answer
    chunk_tokens: int
    remarks: tuple[str, ...] = ()  # what was chosen that the user may want to know


def extent_of(
    load: LoadOptions, first_tier_tokens: int, max_context: int | None, chunk_tokens: int | None
) -> Extent:
    """Choose what was not asked for.

    Args:
        load: what is played, not cut yet.
        first_tier_tokens: what the first tier holds: no context can be longer.
        max_context: longer conversations are cut; None: those that are made at 16,384 tokens (paper,
            evaluation), recorded ones not at all.
        chunk_tokens: None: 32, or more where contexts are long.

    Raises:
        ConfigError: the trace is wrong, or a recorded conversation outgrows the first tier; with its line.
    """
    remarks = []
    longest: float = max_context or MAX_CONTEXT
    if load.trace is not None and load.made_like is None:
        trace = load_trace(load.trace, load.output_tokens, load.think, load.seed)
        if max_context is None:
            check_contexts(trace.scripts, first_tier_tokens)
            longest = 1 + max(length for script in trace.scripts for length in contexts(script))
        if not (trace.timed or load.rates or load.users):
            load = replace(load, users=min(USERS, len(trace.scripts)))
            remarks.append(
                f"the trace does not say when its conversations begin: {load.users} at once (--users, --rate)"
            )
    limit = math.ceil(longest)
    if chunk_tokens is None:
        chunk_tokens = LONG_CHUNK if limit > LONG_CONTEXT else CHUNK
        if chunk_tokens != CHUNK:
            remarks.append(f"contexts of up to {limit:,} tokens: chunks of {chunk_tokens} (--chunk-tokens)")
    return Extent(replace(load, max_context=limit), limit, chunk_tokens, tuple(remarks))
