"""A trace's bytes, lines and numbers. Knows files, and how a wrong value is told; never what a trace means."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from pensieve.errors import ConfigError

FORMS = (
    'one JSON object a line, either {"conversation", "turn", "arrival_s" or "gap_s", "new_tokens", '
    '"output_tokens"}, '
    'or {"id", "turns": [[input, output, shared with the turn before, think s, server s], ...]}, '
    'or {"timestamp", "input_length", "output_length", "hash_ids"} (Mooncake), or a conversation with its '
    "texts (ShareGPT); "
    "or CSV with TIMESTAMP,ContextTokens,GeneratedTokens (Azure)"
)


class TraceFile:
    """A file, read and unpacked."""

    def __init__(self, path: str | Path) -> None:
        """Read it.

        Raises:
            ConfigError: it cannot be read.
        """
        self.name = str(path)
        try:
            data = Path(path).read_bytes()
            self._data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(
                f"cannot read the trace {path}: {getattr(error, 'strerror', None) or error}"
            ) from error

    def where(self, number: int) -> str:
        """Words for a line."""
        return f"{self.name}, line {number}"

    def first(self) -> tuple[int, str]:
        """The first line that is not blank, with its number.

        Raises:
            ConfigError: there is none.
        """
        first = next(self.lines(), None)
        if first is None:
            raise ConfigError(f"{self.name} holds no entry; it must be {FORMS}")
        return first

    def lines(self) -> Iterator[tuple[int, str]]:
        """The lines that are not blank, numbered from 1."""
        for number, row in enumerate(self._data.split(b"\n"), start=1):
            if not row.strip():
                continue
            try:
                yield number, row.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise ConfigError(f"{self.where(number)}: not UTF-8: save it as UTF-8") from None

    def objects(self) -> Iterator[tuple[int, Mapping[str, object]]]:
        """The lines as JSON objects."""
        for number, text in self.lines():
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ConfigError(
                    f"{self.where(number)}: not JSON ({error}); the file must be {FORMS}"
                ) from error
            if not isinstance(record, dict):
                raise ConfigError(
                    f"{self.where(number)}: must be a JSON object, got {record!r:.40}; the file must be "
                    f"{FORMS}"
                )
            yield number, record


def try_json(text: str) -> object:
    """What a line is as JSON; None: it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def check_fields(record: Mapping[str, object], allowed: frozenset[str], where: str) -> None:
    """Refuse unknown fields: one may be a misspelt field.

    Raises:
        ConfigError: a field is not `allowed`.
    """
    if unknown := record.keys() - allowed:
        raise ConfigError(
            f"{where}: unknown field {min(unknown)!r}; allowed are {', '.join(sorted(allowed))}"
        )


def count(value: object, what: str, least: int = 1) -> int:
    """A whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{what} must be a whole number of at least {least}, got {value!r:.40}")
    return value


def seconds(value: object, what: str) -> float:
    """A number of seconds of at least 0."""
    return number(value, what, "seconds")


def number(value: object, what: str, unit: str) -> float:
    """A finite number of at least 0."""
    try:
        found = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:
        found = math.inf
    if not (math.isfinite(found) and found >= 0):
        raise ConfigError(f"{what} must be a number of {unit} of at least 0, got {value!r:.40}")
    return found
