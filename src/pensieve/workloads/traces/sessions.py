"""Sessions of coding agents: token counts, shared prefixes and think times, no words. Knows that form; never
when sessions begin.
"""

from __future__ import annotations

from collections.abc import Mapping

from pensieve.errors import ConfigError
from pensieve.workloads.scripts import Script, ScriptTurn
from pensieve.workloads.traces.reading import TraceFile, count, seconds

# a prefix shared up to this many tokens less than all of it is shared: recorders count whole blocks
_BLOCK = 128


def is_sessions(entry: object) -> bool:
    """Whether a first entry is of this form."""
    turns = entry.get("turns") if isinstance(entry, dict) else None
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], list)


def read_sessions(file: TraceFile) -> tuple[Script, ...]:
    """Every session of a file."""
    return tuple(_session(record, file.where(number)) for number, record in file.objects())


def _session(record: Mapping[str, object], where: str) -> Script:
    """A session: each turn is (input tokens, output tokens, tokens shared with the turn before, think s,
    server s); the last is not used.

    What a turn adds is what its input has beyond the history. A turn that shares less than the whole history
    had it rewritten: the history is cut back to the last turn that is shared whole.
    """
    rows = record.get("turns")
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f'{where}: "turns" must be a list of at least 1 turn')
    turns: list[ScriptTurn] = []
    lengths: list[int] = []  # of the history after each turn of the path
    prompt_before = 0
    for index, row in enumerate(rows):
        here = f"{where}: turns[{index}]"
        if not isinstance(row, list) or len(row) < 4:
            raise ConfigError(
                f"{here} must be a list of at least 4 numbers: input, output and shared tokens, think time "
                "in seconds"
            )
        prompt = count(row[0], f"{here}: input tokens")
        output = max(
            1, count(row[1], f"{here}: output tokens", least=0)
        )  # (recorders count 0 where an answer was cut off)
        shared = count(row[2], f"{here}: shared tokens", least=0)
        think_s = seconds(row[3], f"{here}: think time")
        keep: int | None = None
        if shared + _BLOCK < min(prompt_before, prompt):
            keep = next(
                (turn for turn in range(len(lengths), 0, -1) if lengths[turn - 1] <= shared + _BLOCK), 0
            )
            del lengths[keep:]
        history = lengths[-1] if lengths else 0
        new = max(1, prompt - history)
        turns.append(ScriptTurn(new, output, think_s if index else 0.0, keep_turns=keep))
        lengths.append(history + new + output)
        prompt_before = prompt
    return Script(str(record.get("id", where)), tuple(turns), where=where)
