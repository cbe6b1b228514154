"""Measurements as JSON files. Knows JSON and files; never what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from pensieve.machine import write_whole


def plain(value: Any) -> Any:
    """A value in JSON's own types. NaN and infinities become null, and types that JSON lacks become their
    text.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def write_json(path: str | Path, record: Mapping[str, Any]) -> Path:
    """Write the file completely or not at all, and create missing folders. Returns its path.

    Raises:
        TypeError: the record holds a value that JSON lacks; see `plain`.
    """
    target = Path(path)
    write_whole(target, json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return target
