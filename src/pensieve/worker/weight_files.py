"""Reads which tensors a folder's weight files hold. Knows file formats; never weights or models."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from pensieve.errors import ModelRefused

WEIGHT_FILES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
SHOWN = 4  # names of a list that a message shows
_LONGEST_HEADER = 100 << 20  # bytes; the format allows no longer header


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a weight file."""

    shape: tuple[int, ...]
    file: str


def refused(label: str, reason: str) -> ModelRefused:
    """The refusal of a folder's files, with the ways out."""
    return ModelRefused(
        f"{label} is not what its config says: {reason}. Nothing is invented: fetch its files again, or name "
        "a folder whose files are complete"
    )


def listed(names: Iterable[str]) -> str:
    """The first few of many names, for messages."""
    ordered = sorted(names)
    return ", ".join(ordered[:SHOWN]) + (", ..." if len(ordered) > SHOWN else "")


def missing_shards(folder: Path) -> list[str]:
    """Weight files that the folder's index names and that are missing."""
    for single, index in WEIGHT_FILES:
        if (folder / single).exists():
            return []
        if (folder / index).exists():
            return sorted(
                name for name in set(_index(folder, index).values()) if not (folder / name).exists()
            )
    return []


def stored_tensors(folder: Path, label: str) -> dict[str, Stored]:
    """Every tensor of the files that transformers loads a folder from, by name. Reads no weights.

    Raises:
        ModelRefused: a file is damaged, cut off or missing, files and index disagree, or there are two sets
            of weights.
    """
    for single, index in WEIGHT_FILES:
        pattern = single.replace(".", "*.", 1)  # model*.safetensors
        shards = {p.name for p in folder.glob(pattern) if re.search(r"-\d+-of-\d+\.", p.name)}
        if (folder / single).exists():
            if shards:
                raise refused(
                    label,
                    f"it holds two sets of weights, {single} and {listed(shards)}: move one of them away",
                )
            return _read(folder, {single}, label)
        if not (folder / index).exists():
            continue
        named = _index(folder, index)
        if gone := missing_shards(folder):
            raise refused(label, f"{index} names {len(gone)} files that are not there ({listed(gone)})")
        if strays := shards - set(named.values()):
            raise refused(label, f"{len(strays)} weight files are not in {index} ({listed(strays)})")
        found = _read(folder, set(named.values()), label)
        if lost := {name for name, file in named.items() if name not in found or found[name].file != file}:
            raise refused(
                label,
                f"{len(lost)} tensors are not in the files that {index} names for them ({listed(lost)})",
            )
        return found
    raise refused(label, f"there are no weight files in {folder}")


def _index(folder: Path, index: str) -> dict[str, str]:
    try:
        return dict(json.loads((folder / index).read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelRefused(
            f"{folder / index} is damaged ({type(error).__name__}: {error}): fetch the model again"
        ) from error


def _read(folder: Path, files: set[str], label: str) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for file in sorted(files):
        try:
            shapes = _header(folder / file) if file.endswith(".safetensors") else _pickled(folder / file)
        except Exception as error:  # JSON, struct, pickle and zip files each fail in their own ways
            raise ModelRefused(
                f"{label} could not be loaded from {folder}: {file} is damaged or cut off ({error}): fetch "
                "it again"
            ) from error
        if twice := found.keys() & shapes.keys():
            raise refused(label, f"{len(twice)} tensors are in more than one file ({listed(twice)})")
        found |= {name: Stored(shape, file) for name, shape in shapes.items()}
    return found


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if not 0 < length <= _LONGEST_HEADER:
            raise ValueError(f"no safetensors header, {length} bytes long")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    need = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if (size := path.stat().st_size) < need:
        raise ValueError(f"{size} bytes, {need} belong to it")
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def _pickled(path: Path) -> dict[str, tuple[int, ...]]:
    state = torch.load(path, map_location="meta", weights_only=True)
    return {name: tuple(tensor.shape) for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
