"""Writes parameters into a safetensors file, piece by piece.

Knows the format and number types; never names' meanings or where files are. The file is laid out before the
first number is computed, so that only one piece is in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pensieve.worker.gguf.plan import Parameter
from pensieve.worker.gguf.transforms import Array

_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_ALIGNMENT = 8  # bytes, of the data
# Bytes in memory for each value of a piece: as stored, in float32, twice while it is widened or reordered,
# and as written.
_WORK_BYTES = 20


def file_bytes(parameters: list[Parameter]) -> int:
    """Size of the file that `write` would write."""
    return len(_header(parameters)) + sum(_num_bytes(parameter) for parameter in parameters)


def working_bytes(parameters: list[Parameter]) -> int:
    """The most memory that `write` needs at a time, in bytes."""
    return _WORK_BYTES * max(parameter.made.largest for parameter in parameters)


def num_values(parameters: list[Parameter]) -> int:
    """The model's number of weights."""
    return sum(math.prod(parameter.made.shape) for parameter in parameters)


def write(path: Path, parameters: list[Parameter], done: Callable[[float], None] | None = None) -> None:
    """Write all parameters to one file; calls `done` with the share that is written.

    Raises:
        ModelRefused: the GGUF file changed meanwhile.
    """
    total, written = num_values(parameters), 0
    with path.open("wb") as file:
        file.write(_header(parameters))
        for parameter in parameters:
            before = file.tell()
            for piece in parameter.made.pieces():
                file.write(_encoded(piece, parameter.made.number_type).data)
                written += piece.size
                if done:
                    done(written / total)
            assert file.tell() - before == _num_bytes(parameter), f"{parameter.name} came out in another size"


def _num_bytes(parameter: Parameter) -> int:
    return math.prod(parameter.made.shape) * _ITEM_BYTES[parameter.made.number_type]


def _header(parameters: list[Parameter]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for parameter in parameters:
        end = begin + _num_bytes(parameter)
        entries[parameter.name] = {
            "dtype": parameter.made.number_type,
            "shape": parameter.made.shape,
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _encoded(piece: Array, number_type: str) -> npt.NDArray[Any]:
    piece = np.ascontiguousarray(piece, dtype="<f4")
    if number_type == "F32":
        return piece
    if number_type == "F16":
        return piece.astype("<f2")
    encoded: npt.NDArray[Any] = torch.from_numpy(piece).to(torch.bfloat16).view(torch.int16).numpy()
    return encoded
