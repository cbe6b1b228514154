"""Transforms tensors in llama.cpp's arrangement into one parameter in transformers'.

Knows shapes and orders; never names. Each transform gives the parameter's shape at once and its numbers in
pieces, so that only one piece is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from pensieve.worker.gguf.file import GgufTensor

Array = npt.NDArray[np.float32]
NumberType = Literal["F32", "F16", "BF16"]  # as safetensors call them

_PIECE = 1 << 22  # values of a piece: 16 MB in float32
_NUMBER_TYPES: dict[GGMLQuantizationType, NumberType] = {
    GGMLQuantizationType.F32: "F32",
    GGMLQuantizationType.F16: "F16",
    GGMLQuantizationType.BF16: "BF16",
    GGMLQuantizationType.F64: "F32",
}


@dataclass(frozen=True, slots=True)
class Made:
    """A parameter that is not computed yet."""

    shape: tuple[int, ...]
    # the number type that it is kept in: the file's, or bfloat16 for quantized tensors
    number_type: NumberType
    pieces: Callable[[], Iterator[Array]]  # one after another they are the parameter, row by row
    largest: int  # values of the largest piece


Transform = Callable[[list[GgufTensor]], Made]


class WrongShape(Exception):
    """Tensors that this transform cannot arrange; the text says why."""


def as_is(tensors: list[GgufTensor]) -> Made:
    """One tensor, unchanged."""
    return _rowwise(tensors[0], lambda rows: rows)


def minus_one(tensors: list[GgufTensor]) -> Made:
    """A norm that is stored with 1 added: (N,)."""
    made = _rowwise(tensors[0], lambda rows: rows - np.float32(1))
    return Made(made.shape, "F32", made.pieces, made.largest)


def in_halves(num_heads: int) -> Transform:
    """A query or key projection whose rotary pairs are side by side in each head: (heads * D, ...).

    Transformers has them in two halves.
    """

    def transform(tensors: list[GgufTensor]) -> Made:
        (tensor,) = tensors
        rows = tensor.shape[0]
        if rows % (2 * num_heads):
            raise WrongShape(f"{tensor.name} of {rows} rows is no projection to {num_heads} heads")

        def arrange(values: Array) -> Array:
            return (
                values.reshape(num_heads, rows // num_heads // 2, 2, -1).swapaxes(1, 2).reshape(tensor.shape)
            )

        return _whole(tensors, tensor.shape, lambda: arrange(tensor.values()))

    return transform


def by_head(num_heads: int) -> Transform:
    """Queries, keys and values one after the other (3 * heads * D, ...).

    Transformers has the three of each head together.
    """

    def transform(tensors: list[GgufTensor]) -> Made:
        (tensor,) = tensors
        if tensor.shape[0] % (3 * num_heads):
            raise WrongShape(f"{tensor.name} of {tensor.shape[0]} rows is no projection to {num_heads} heads")
        size = tensor.shape[0] // 3 // num_heads
        return _whole(
            tensors,
            tensor.shape,
            lambda: tensor.values().reshape(3, num_heads, size, -1).swapaxes(0, 1).reshape(tensor.shape),
        )

    return transform


def transposed(tensors: list[GgufTensor]) -> Made:
    """A matrix (M, N) as (N, M); a stack (E, M, N) as (E, N, M)."""
    (tensor,) = tensors
    if len(tensor.shape) < 2:
        return as_is(tensors)
    if len(tensor.shape) == 2:
        return _whole(tensors, tensor.shape[::-1], lambda: tensor.values().T)

    def pieces() -> Iterator[Array]:
        for e in range(tensor.shape[0]):
            yield tensor.values(e, e + 1).swapaxes(1, 2)

    experts, rows, columns = tensor.shape
    return Made((experts, columns, rows), _number_type(tensors), pieces, rows * columns)


def one_row(tensors: list[GgufTensor]) -> Made:
    """A vector (N,) as a matrix (1, N); a matrix of one row stays."""
    made = as_is(tensors)
    return (
        made if len(made.shape) == 2 else Made((1, *made.shape), made.number_type, made.pieces, made.largest)
    )


def flat(tensors: list[GgufTensor]) -> Made:
    """All numbers of a tensor in a vector."""
    made = as_is(tensors)
    return Made((math.prod(made.shape),), made.number_type, made.pieces, made.largest)


def experts(tensors: list[GgufTensor]) -> Made:
    """Matrices of experts.

    One stack (E, M, N) stays, two (E, M, N) become (E, 2 M, N): gate, then up.
    """
    if len(tensors) == 1 and len(tensors[0].shape) == 3:
        return as_is(tensors)
    shapes = {tensor.shape for tensor in tensors}
    if len(shapes) != 1:
        raise WrongShape(f"{tensors[0].name} and {tensors[1].name} are of different shapes")
    (shape,) = shapes
    if len(shape) != 3:
        raise WrongShape(f"{tensors[0].name} is no stack of experts: it is of shape {shape}")

    def pieces() -> Iterator[Array]:
        for e in range(shape[0]):
            for tensor in tensors:
                yield tensor.values(e, e + 1)

    return Made(
        (shape[0], len(tensors) * shape[1], shape[2]), _number_type(tensors), pieces, shape[1] * shape[2]
    )


def one_after_another(tensors: list[GgufTensor]) -> Made:
    """Matrices (M, N) one below the other: (2 M, N) of two."""
    if len({tensor.shape[1:] for tensor in tensors}) != 1:
        raise WrongShape(f"{tensors[0].name} and {tensors[1].name} are of different widths")
    parts = [as_is([tensor]) for tensor in tensors]
    rows = sum(part.shape[0] for part in parts)

    def pieces() -> Iterator[Array]:
        for part in parts:
            yield from part.pieces()

    return Made(
        (rows, *parts[0].shape[1:]), _number_type(tensors), pieces, max(part.largest for part in parts)
    )


def single_experts(per_expert: int) -> Transform:
    """Matrices (M, N) of experts one by one, `per_expert` of each (gate, up), as (E, per_expert * M, N)."""

    def transform(tensors: list[GgufTensor]) -> Made:
        shapes = {tensor.shape for tensor in tensors}
        if len(shapes) != 1 or len(tensors[0].shape) != 2:
            raise WrongShape(f"the experts' matrices beside {tensors[0].name} are of different shapes")
        rows, columns = tensors[0].shape

        def pieces() -> Iterator[Array]:
            for tensor in tensors:
                yield tensor.values()

        return Made(
            (len(tensors) // per_expert, per_expert * rows, columns),
            _number_type(tensors),
            pieces,
            rows * columns,
        )

    return transform


def interleaved(tensors: list[GgufTensor]) -> Made:
    """Gate and up of experts with columns taken in turn.

    Two (E, M, N) become (E, N, 2 M), two biases (E, M) become (E, 2 M).
    """
    gate, up = tensors
    if gate.shape != up.shape or len(gate.shape) not in (2, 3):
        raise WrongShape(f"{gate.name} and {up.name} are of shapes {gate.shape} and {up.shape}")
    count, rows = gate.shape[:2]
    shape = (count, *gate.shape[2:], 2 * rows)

    def pieces() -> Iterator[Array]:
        for e in range(count):
            both = np.stack([gate.values(e, e + 1)[0], up.values(e, e + 1)[0]], axis=1)  # (M, 2, N) or (M, 2)
            yield both.reshape(2 * rows, *gate.shape[2:]).T[None]

    return Made(shape, _number_type(tensors), pieces, 2 * math.prod(gate.shape[1:]))


def _rowwise(tensor: GgufTensor, change: Callable[[Array], Array]) -> Made:
    if len(tensor.shape) == 1:
        return _whole([tensor], tensor.shape, lambda: change(tensor.values()))
    row = tensor.num_values // tensor.shape[0]
    step = max(1, _PIECE // row)

    def pieces() -> Iterator[Array]:
        for start in range(0, tensor.shape[0], step):
            yield change(tensor.values(start, min(start + step, tensor.shape[0])))

    return Made(tensor.shape, _number_type([tensor]), pieces, min(step, tensor.shape[0]) * row)


def _whole(tensors: list[GgufTensor], shape: tuple[int, ...], compute: Callable[[], Array]) -> Made:
    def pieces() -> Iterator[Array]:
        yield compute()

    return Made(shape, _number_type(tensors), pieces, math.prod(shape))


def _number_type(tensors: list[GgufTensor]) -> NumberType:
    """The type that holds all of these exactly, or bfloat16 for quantized tensors."""
    kinds = {_NUMBER_TYPES.get(tensor.type, "BF16") for tensor in tensors}
    if len(kinds) == 1:
        return kinds.pop()
    return "BF16" if any(tensor.is_quantized for tensor in tensors) else "F32"
