"""A GGUF file on the disk: its keys, and its tensors one by one.

Knows the format; never what a model is.

Tensors are records; their bytes are read on demand, as they are stored or as float32. A model that was split
into several files is opened by any of them.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import re
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from pensieve.errors import ModelRefused

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # bytes, of tensor data, if the file does not say
_MAX_DIMENSIONS = 4
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_PART_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_FETCH_AGAIN = "fetch it again"
_AT_ONCE = 1 << 16  # values widened at a time: their buffers stay in the processor's cache
_SHOWN = 4  # names of a long list that are shown

PLAIN_TYPES = frozenset(
    {GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16, GGMLQuantizationType.F64}
)


@dataclass(frozen=True, slots=True)
class Strings:
    """An array of strings of which only the length is kept: a vocabulary, its merges."""

    count: int


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a file. Picklable; holds no data."""

    name: str
    shape: tuple[int, ...]  # outermost dimension first, as in torch
    type: GGMLQuantizationType  # how its numbers are stored
    path: Path  # the file, or the part of a split one, that holds it
    offset: int  # of its first byte in that file
    num_bytes: int

    @property
    def is_quantized(self) -> bool:
        """Whether its numbers are stored in blocks."""
        return self.type not in PLAIN_TYPES

    @property
    def num_values(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    def raw(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """The bytes of some slices of the first dimension, as stored: (slices, bytes of a slice).

        A vector is one slice: it cannot be cut.

        Raises:
            ModelRefused: the file became shorter since its header was read.
        """
        slices = self.shape[0] if len(self.shape) > 1 else 1
        stop = slices if stop is None else stop
        size = self.num_bytes // slices
        with self.path.open("rb") as file:
            data = np.fromfile(file, np.uint8, (stop - start) * size, offset=self.offset + start * size)
        if data.size != (stop - start) * size:
            raise ModelRefused(f"{self.path} became shorter while it was read: {_FETCH_AGAIN}")
        return data.reshape(stop - start, size)

    def values(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.float32]:
        """The numbers of the slices [start, stop) of the first dimension: float32, (slices, *shape[1:])."""
        data = self.raw(start, stop)
        shape = self.shape if len(self.shape) == 1 else (data.shape[0], *self.shape[1:])
        match self.type:
            case GGMLQuantizationType.F32:
                return data.view("<f4").reshape(shape)
            case GGMLQuantizationType.F16:
                return data.view("<f2").astype(np.float32).reshape(shape)
            case GGMLQuantizationType.F64:
                return data.view("<f8").astype(np.float32).reshape(shape)
            case GGMLQuantizationType.BF16:
                return (data.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
        return _widened(data, self.type).reshape(shape)


@dataclass(frozen=True, slots=True)
class GgufModel:
    """The header of one GGUF file, or of all parts of a split one together."""

    parts: tuple[Path, ...]  # in order; the first holds the keys
    metadata: dict[str, Any]  # numbers, texts, lists of numbers, `Strings`
    tensors: dict[str, GgufTensor]

    @property
    def name(self) -> str:
        """The name of its first file, for messages."""
        return self.parts[0].name

    @property
    def architecture(self) -> str:
        """llama.cpp's name for it, the prefix of its keys."""
        return str(self.metadata["general.architecture"])


@dataclass(frozen=True, slots=True)
class _Part:
    path: Path
    metadata: dict[str, Any]
    tensors: list[GgufTensor]


def _widened(data: npt.NDArray[np.uint8], kind: GGMLQuantizationType) -> npt.NDArray[np.float32]:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = data.reshape(-1, block_bytes)
    step = _AT_ONCE // block
    values = np.empty((len(blocks), block), np.float32)
    for start in range(0, len(blocks), step):
        part = blocks[start : start + step]
        values[start : start + step] = dequantize(part.reshape(1, -1), kind).reshape(len(part), block)
    return values


def open_model(path: Path) -> GgufModel:
    """Read the keys and the list of tensors of the model in this file, or in all parts of a split one.

    Raises:
        ModelRefused: not a GGUF file, cut short, damaged, or a part without the others; the message says
            which and what to do.
    """
    named = _read(path)
    parts = _all_parts(named) if _count(named, "split.count") > 1 else [named]
    tensors = [tensor for part in parts for tensor in part.tensors]
    twice = [name for name, count in Counter(tensor.name for tensor in tensors).items() if count > 1]
    if twice:
        raise ModelRefused(
            f"{path} holds {len(twice)} tensors twice ({listed(twice)}): it is damaged, {_FETCH_AGAIN}"
        )
    metadata = parts[0].metadata
    if not isinstance(metadata.get("general.architecture"), str):
        raise ModelRefused(
            f"{path} does not say what it is (no general.architecture): {_FETCH_AGAIN}, or name a folder or "
            "a hub id"
        )
    return GgufModel(
        tuple(part.path for part in parts), metadata, {tensor.name: tensor for tensor in tensors}
    )


def listed(names: list[str]) -> str:
    """The first few of many names, for messages."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _count(part: _Part, key: str) -> int:
    value = part.metadata.get(key, 0)
    if not isinstance(value, int):
        raise _unreadable(part.path, f"its {key} is {value!r}")
    return value


def _all_parts(named: _Part) -> list[_Part]:
    """The parts of a split model in order, found by the name of one of them."""
    path, count, number = named.path, _count(named, "split.count"), _count(named, "split.no")
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count or int(match["number"]) != number + 1:
        raise ModelRefused(
            f"{path} is part {number + 1} of {count} of a split model, and its name does not say so: give "
            "the parts their names back "
            f"(NAME-{number + 1:05}-of-{count:05}.gguf for this one) and put them into one folder"
        )
    paths = [path.with_name(f"{match['stem']}-{i + 1:05}-of-{count:05}{path.suffix}") for i in range(count)]
    missing = [other.name for other in paths if not other.is_file()]
    if missing:
        raise ModelRefused(
            f"{path} is part {number + 1} of {count}, and {len(missing)} parts are not beside it: "
            f"{listed(missing)}. "
            f"Put all parts into {path.parent}"
        )
    parts = [named if other == path else _read(other) for other in paths]
    for i, part in enumerate(parts):
        said = (_count(part, "split.count"), _count(part, "split.no"))
        if said != (count, i):
            raise ModelRefused(
                f"{part.path} calls itself part {said[1] + 1} of {said[0]}, its name says {i + 1} of "
                f"{count}: it belongs to another model, "
                f"or was renamed. {_FETCH_AGAIN.capitalize()}"
            )
        for key, value in part.metadata.items():
            if not key.startswith("split.") and parts[0].metadata.get(key) != value:
                raise ModelRefused(
                    f"{part.path} and {parts[0].path} differ in {key}: they are parts of different models"
                )
    expected, found = _count(parts[0], "split.tensors.count"), sum(len(part.tensors) for part in parts)
    if expected and expected != found:
        raise ModelRefused(
            f"the {count} parts of {path} hold {found} tensors, the model has {expected}: a part belongs to "
            "another model"
        )
    return parts


def _read(path: Path) -> _Part:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < len(_MAGIC) or file.read(len(_MAGIC)) != _MAGIC:
                raise _unreadable(path, "it does not begin as one")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data, size).part()
    except OSError as error:
        raise ModelRefused(f"{path} cannot be read: {error.strerror or error}") from error


def _unreadable(path: Path, reason: str) -> ModelRefused:
    return ModelRefused(
        f"{path} is not a readable GGUF file ({reason}): {_FETCH_AGAIN}, or name a folder or a hub id"
    )


class _Reader:
    """Reads a file's header from its beginning."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size = path, data, size
        self.at = len(_MAGIC)

    def part(self) -> _Part:
        version = self.scalar("<I")
        if version not in _VERSIONS:
            why = (
                "its bytes are in big-endian order"
                if version & 0xFFFF == 0
                else f"it is of GGUF version {version}, not 2 or 3"
            )
            raise _unreadable(self.path, why)
        num_tensors, num_keys = self.scalar("<Q"), self.scalar("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.text()
            if key in metadata:
                raise _unreadable(self.path, f"it says {key} twice")
            metadata[key] = self.value(self.scalar("<I"))
        entries = [self.entry() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise _unreadable(self.path, f"its alignment is {alignment!r}")
        start = -(-self.at // alignment) * alignment
        tensors = [self.tensor(start, *entry) for entry in entries]
        self.require_whole(tensors)
        return _Part(self.path, metadata, tensors)

    def take(self, count: int) -> int:
        """Skip the next `count` bytes; returns where they begin."""
        begin, self.at = self.at, self.at + count
        if self.at > self.size:
            raise _unreadable(self.path, f"it is cut short: its header goes on after its {self.size:,} bytes")
        return begin

    def scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))
        return value

    def text(self) -> str:
        count = self.scalar("<Q")
        begin = self.take(count)
        return self.data[begin : begin + count].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise _unreadable(self.path, f"it holds a value of the unknown type {kind}")
        value = self.scalar(_SCALARS[kind])
        # The shortest number that is this float32: 1e-05, where its double is 9.999999747378752e-06.
        return float(str(np.float32(value))) if kind == _FLOAT32 else value

    def array(self) -> Any:
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if kind == _STRING:
            self.pass_over(count)
            return Strings(count)
        if kind not in _SCALARS:
            raise _unreadable(self.path, f"it holds an array of the unknown type {kind}")
        begin = self.take(count * struct.calcsize(_SCALARS[kind]))
        return np.frombuffer(self.data[begin : self.at], dtype=np.dtype(_SCALARS[kind])).tolist()

    def pass_over(self, count: int) -> None:
        """Skip so many strings: a vocabulary has hundreds of thousands."""
        at, data, length_of = self.at, self.data, struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                at += 8 + length_of(data, at)[0]
        except struct.error:
            at = self.size + 1
        self.take(at - self.at)

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.text(), self.scalar("<I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise _unreadable(self.path, f"its tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.scalar("<Q") for _ in range(dimensions))[::-1]  # the file has the innermost first
        return name, shape, self.scalar("<I"), self.scalar("<Q")

    def tensor(self, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        try:
            type_ = GGMLQuantizationType(kind)
        except ValueError as error:
            raise ModelRefused(
                f"{self.path}: {name} is of a number type ({kind}) that the installed package gguf does not "
                "know: "
                "`pip install --upgrade gguf`, or take the same model in another quantization"
            ) from error
        block, block_bytes = GGML_QUANT_SIZES[type_]
        if 0 in shape or shape[-1] % block:
            raise _unreadable(
                self.path, f"its tensor {name!r} of shape {shape} cannot be of type {type_.name}"
            )
        return GgufTensor(
            name, shape, type_, self.path, start + offset, math.prod(shape) // block * block_bytes
        )

    def require_whole(self, tensors: list[GgufTensor]) -> None:
        """Check that every tensor is within the file, and none overlaps another."""
        beyond = [tensor.name for tensor in tensors if tensor.offset + tensor.num_bytes > self.size]
        if beyond:
            need = max(tensor.offset + tensor.num_bytes for tensor in tensors)
            raise ModelRefused(
                f"{self.path} is cut short: the data of {len(beyond)} of its {len(tensors)} tensors "
                f"({listed(beyond)}) lie beyond its end "
                f"({self.size:,} bytes, {need:,} are needed): {_FETCH_AGAIN}"
            )
        ordered = sorted(tensors, key=lambda tensor: tensor.offset)
        for one, next_ in itertools.pairwise(ordered):
            if one.offset + one.num_bytes > next_.offset:
                raise _unreadable(self.path, f"its tensors {one.name!r} and {next_.name!r} overlap")
