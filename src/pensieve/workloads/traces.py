"""Recorded traffic as scripts. Knows file formats, token counts and seconds; never servers.

Three forms, told apart by their first entry: turns of conversations with times (ours), sessions of coding agents (token
counts and think times, no words), and chats with words (every form that `conversations.load_dataset` reads).
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pensieve.errors import ConfigError
from pensieve.workloads.arrivals import ThinkTime
from pensieve.workloads.conversations import load_dataset
from pensieve.workloads.generators import LIKENESSES, Generator, generator
from pensieve.workloads.scripts import Script, ScriptTurn

FORMS = (
    'one JSON object a line, either {"conversation", "turn", "arrival_s" or "gap_s", "new_tokens", "output_tokens"}, '
    'or {"id", "turns": [[input, output, shared with the turn before, think s, server s], ...]}, or a conversation with its texts (ShareGPT)'
)
NUM_MADE = 1000  # conversations of a trace that has no end
_BLOCK = 128  # a prefix shared up to this many tokens less than all of it is shared: recorders count whole blocks


@dataclass(frozen=True, slots=True)
class Trace:
    """What a file holds."""

    form: str  # "turns", "sessions" or "texts"; or the name of what it is like
    scripts: tuple[Script, ...]
    timed: bool  # it says when conversations begin; otherwise somebody else must
    generator: Generator | None = None  # makes more of its conversations, without end


def load_trace(path: str | Path, output_tokens: int, think: ThinkTime | None = None, seed: int | str = 0) -> Trace:
    """Read a trace; `.gz` files are unpacked.

    Args:
        path: the file, or a name of `LIKENESSES`, whatever files there are: its first `NUM_MADE` conversations and what makes more.
        output_tokens: of answers whose length the trace does not tell.
        think: the time before turns whose gap it does not tell; None: no time at all.
        seed: of the think times.

    Raises:
        ConfigError: the file cannot be read, or an entry is wrong; the message names file and line, and what is allowed.
    """
    name = str(path)
    if name in LIKENESSES:
        made = generator(name, think or ThinkTime(), seed)
        return Trace(name, tuple(map(made.script, range(NUM_MADE))), False, made)
    first = next(_lines(_read(path), name), None)
    if first is None:
        raise ConfigError(f"{name} holds no entry; it must be {FORMS}")
    number, text = first
    entry = _try_json(text)
    if isinstance(entry, dict) and "conversation" in entry:
        return Trace("turns", _turns(_read(path), name), True)
    if isinstance(entry, dict) and isinstance(entry.get("turns"), list) and entry["turns"] and isinstance(entry["turns"][0], list):
        return Trace("sessions", tuple(_session(*row) for row in _objects(_read(path), name)), False)
    if text.lstrip()[:1] not in ("[", "{"):
        raise ConfigError(f"{name}, line {number}: not JSON; the file must be {FORMS}")
    return Trace("texts", _texts(path, output_tokens, think or ThinkTime(), seed), False)


# -- texts


def _texts(path: str | Path, output_tokens: int, think: ThinkTime, seed: int | str) -> tuple[Script, ...]:
    return tuple(
        Script(
            conversation.id,
            tuple(
                ScriptTurn(None, output_tokens, think.draw_s(seed, index, turn), text=text) for turn, text in enumerate(conversation.turns)
            ),
            conversation.system,
        )
        for index, conversation in enumerate(load_dataset(path))
    )


# -- sessions of agents


def _session(record: Mapping[str, object], where: str) -> Script:
    """A session: each turn is (input tokens, output tokens, tokens shared with the turn before, think s, server s); the last is not used.

    What a turn adds is what its input has beyond the history. A turn that shares less than the whole history had it rewritten: the history
    is cut back to the last turn that is shared whole.
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
            raise ConfigError(f"{here} must be a list of at least 4 numbers: input, output and shared tokens, think time in seconds")
        prompt = _count(row[0], f"{here}: input tokens")
        output = max(1, _count(row[1], f"{here}: output tokens", least=0))  # (recorders count 0 where an answer was cut off)
        shared = _count(row[2], f"{here}: shared tokens", least=0)
        think_s = _seconds(row[3], f"{here}: think time")
        keep: int | None = None
        if shared + _BLOCK < min(prompt_before, prompt):
            keep = next((turn for turn in range(len(lengths), 0, -1) if lengths[turn - 1] <= shared + _BLOCK), 0)
            del lengths[keep:]
        history = lengths[-1] if lengths else 0
        new = max(1, prompt - history)
        turns.append(ScriptTurn(new, output, think_s if index else 0.0, keep_turns=keep))
        lengths.append(history + new + output)
        prompt_before = prompt
    return Script(str(record.get("id", where)), tuple(turns))


# -- turns with times


def _turns(data: bytes, name: str) -> tuple[Script, ...]:
    """Turns of conversations, in any order of conversations and in the order of turns within one."""
    found: dict[str, list[ScriptTurn]] = {}
    for record, where in _objects(data, name):
        unknown = set(record) - {"conversation", "turn", "arrival_s", "gap_s", "new_tokens", "output_tokens"}
        if unknown:
            raise ConfigError(f"{where}: unknown field {sorted(unknown)[0]!r}; the file must be {FORMS}")
        key = record.get("conversation")
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise ConfigError(f'{where}: "conversation" must be a text or a whole number, got {key!r:.40}')
        turns = found.setdefault(str(key), [])
        if (turn := _count(record.get("turn"), f'{where}: "turn"', least=0)) != len(turns):
            raise ConfigError(
                f"{where}: turn {turn} of conversation {key!r} follows {len(turns)} turn(s): they must be numbered 0, 1, 2, ..."
            )
        if ("arrival_s" in record) == ("gap_s" in record):
            raise ConfigError(f'{where}: exactly one of "arrival_s" and "gap_s" must be there')
        due_s = _seconds(record["arrival_s"], f'{where}: "arrival_s"') if "arrival_s" in record else None
        if due_s is not None and (last := max((t.due_s for t in turns if t.due_s is not None), default=0.0)) > due_s:
            raise ConfigError(f"{where}: turn {turn} of conversation {key!r} arrives at {due_s:g} s, before an earlier turn's {last:g} s")
        gap_s = _seconds(record["gap_s"], f'{where}: "gap_s"') if "gap_s" in record else 0.0
        new, output = (_count(record.get(field), f'{where}: "{field}"') for field in ("new_tokens", "output_tokens"))
        turns.append(ScriptTurn(new, output, gap_s, due_s))
    return tuple(Script(key, tuple(turns)) for key, turns in found.items())


# -- reading


def _read(path: str | Path) -> bytes:
    try:
        data = Path(path).read_bytes()
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"cannot read the trace {path}: {getattr(error, 'strerror', None) or error}") from error


def _lines(data: bytes, name: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, numbered from 1."""
    for number, row in enumerate(data.split(b"\n"), start=1):
        if not row.strip():
            continue
        try:
            yield number, row.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise ConfigError(f"{name}, line {number}: not UTF-8: save it as UTF-8") from None


def _objects(data: bytes, name: str) -> Iterator[tuple[Mapping[str, object], str]]:
    for number, text in _lines(data, name):
        where = f"{name}, line {number}"
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: not JSON ({error}); the file must be {FORMS}") from error
        if not isinstance(record, dict):
            raise ConfigError(f"{where}: must be a JSON object, got {record!r:.40}; the file must be {FORMS}")
        yield record, where


def _try_json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _count(value: object, what: str, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{what} must be a whole number of at least {least}, got {value!r:.40}")
    return value


def _seconds(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{what} must be a number of seconds of at least 0, got {value!r:.40}")
    return float(value)
