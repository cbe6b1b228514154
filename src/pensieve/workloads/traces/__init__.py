"""Recorded traffic as scripts. Knows file formats, token counts and seconds; never servers."""

from pensieve.workloads.traces.load import DEFAULT_OUTPUT_TOKENS, NUM_MADE, Trace, load_trace

__all__ = ["DEFAULT_OUTPUT_TOKENS", "NUM_MADE", "Trace", "load_trace"]
