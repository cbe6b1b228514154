"""Requests of which nothing but arrival and lengths is known, as Azure published them. Knows that form; never
conversations: none are told.

CSV with TIMESTAMP,ContextTokens,GeneratedTokens (Patel et al., Splitwise, ISCA '24;
github.com/Azure/AzurePublicDataset, of 2023 and 2024). Each request is a conversation of one turn: nothing is
reused.
"""

from __future__ import annotations

from datetime import datetime

from pensieve.errors import ConfigError
from pensieve.workloads.scripts import Script, ScriptTurn
from pensieve.workloads.traces.reading import TraceFile, count

_COLUMNS = ("timestamp", "contexttokens", "generatedtokens")


def is_azure(header: str) -> bool:
    """Whether a first line is of this form."""
    return sorted(_cells(header.lower())) == sorted(_COLUMNS)


def read_azure(file: TraceFile) -> tuple[Script, ...]:
    """Every request of a file; the first arrives at 0."""
    lines = file.lines()
    _, header = next(lines)
    names = _cells(header.lower())
    when, context, generated = (names.index(name) for name in _COLUMNS)
    scripts: list[Script] = []
    first: datetime | None = None
    before_s = 0.0
    for number, text in lines:
        where = file.where(number)
        cells = _cells(text)
        if len(cells) != len(names):
            raise ConfigError(
                f"{where}: must have {len(names)} values, {header.strip()}, got {text.strip()!r:.60}"
            )
        time = _time(cells[when], where)
        first = first or time
        if (time.tzinfo is None) != (first.tzinfo is None):
            raise ConfigError(
                f"{where}: TIMESTAMP {cells[when]!r} must have a time zone exactly if the first line's has "
                "one"
            )
        arrival_s = (time - first).total_seconds()
        if arrival_s < before_s:
            raise ConfigError(f"{where}: TIMESTAMP must not go back, {cells[when]} does: sort the file by it")
        before_s = arrival_s
        tokens = count(_whole(cells[context]), f"{where}: ContextTokens")
        output = max(1, count(_whole(cells[generated]), f"{where}: GeneratedTokens", least=0))  # (0: cut off)
        scripts.append(Script(f"line-{number}", (ScriptTurn(tokens, output, due_s=arrival_s),), where=where))
    if not scripts:
        raise ConfigError(f"{file.name} holds no request below its header")
    return tuple(scripts)


def _cells(line: str) -> list[str]:
    return [cell.strip().strip('"') for cell in line.split(",")]


def _time(text: str, where: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"{where}: TIMESTAMP must be a date and time (2023-11-16 18:15:46.68), got {text!r:.40}"
        ) from None


def _whole(text: str) -> object:
    """A number if it is one; otherwise what it is, for the message."""
    return int(text) if text.isascii() and text.removeprefix("-").isdigit() and len(text) < 20 else text
