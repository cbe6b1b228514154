"""The kernels: plain C, built with the package and loaded through ctypes.

Knows pointers and threads; never models or plans.

One shared object serves every x86-64 CPU: each level of instructions is compiled in and chosen at run time.
It is not linked to torch, but runs on torch's own threads, since a second pool would spin against the first.
The kernels are optional: without a compiler at installation, or on another processor, torch computes
everything.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from collections.abc import Iterable
from enum import IntEnum
from functools import cache
from pathlib import Path

import torch

from pensieve.errors import ConfigError

# environment variable: the highest level that the kernels may use, so that any CPU tests all of them
CAP = "PENSIEVE_ISA"
POINTER, INT, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
KINDS = {torch.float32: 0, torch.bfloat16: 1}  # KIND_... of call.h: the dtypes that the kernels compute in

_FUNCTIONS = {  # and the type of their results
    "level": INT, "has_amx": INT, "has_bytes": INT, "use_threads": None, "call_bytes": INT, "attend": INT,
    "count_parts": INT, "write": None, "rows_bytes": INT, "norm": None, "rotate": None, "gate": None,
    "products_bytes": INT, "multiply": None, "layer_bytes": INT, "layer": INT,
}  # fmt: skip


class Level(IntEnum):
    """Instructions that the kernels are compiled for; each level includes those before it."""

    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3
    AMX = 4


@cache
def levels() -> tuple[Level, ...]:
    """The levels that the kernels may use, ascending; none if the kernels are missing.

    These are this CPU's levels, up to the one that PENSIEVE_ISA names.

    Raises:
        ConfigError: PENSIEVE_ISA names no level, or one that this CPU lacks.
    """
    found = library()
    here = (
        () if isinstance(found, str) else tuple(level for level in Level if level <= found.pensieve_level())
    )
    if (most := _cap()) is None or not here:
        return here
    if most > here[-1]:
        raise ConfigError(
            f"{CAP}={most.name.lower()}: this CPU has {_listed(here)} only; name one of them, or leave the "
            "variable out"
        )
    return tuple(level for level in here if level <= most)


def name() -> str:
    """The name of the instructions that the kernels use; "no" if the kernels are missing."""
    return levels()[-1].name.replace("_", "-") if levels() else "no"


def has_amx() -> bool:
    """Whether this CPU multiplies tiles of matrices in hardware (AMX).

    False if PENSIEVE_ISA names a lower level.
    """
    found = library()
    return not isinstance(found, str) and _cap() in (None, Level.AMX) and bool(found.pensieve_has_amx())


def _cap() -> Level | None:
    """The level that PENSIEVE_ISA names; None if it is not set."""
    if not (asked := os.environ.get(CAP, "")):
        return None
    for level in Level:
        if level.name.lower() == asked.lower():
            return level
    raise ConfigError(f"{CAP} must be one of {_listed(Level)}, got {asked!r}; or leave it out")


def _listed(some: Iterable[Level]) -> str:
    return ", ".join(level.name.lower() for level in some)


@cache
def library() -> ctypes.CDLL | str:
    """The kernel library, or the reason why there is none."""
    # the shortest name first: a build of an earlier version may lie beside it under a longer one
    suffixes = sorted(importlib.machinery.EXTENSION_SUFFIXES, key=len)
    places = [Path(__file__).with_name("_native" + suffix) for suffix in suffixes]
    path = next((place for place in places if place.exists()), None)
    if path is None:
        return "built without a C compiler: install one (gcc or clang), then this package again"
    try:
        found = ctypes.CDLL(str(path))
        for name, result in _FUNCTIONS.items():
            getattr(found, f"pensieve_{name}").restype = result
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be loaded ({error}): install this package again"
    if not found.pensieve_level():
        return "this CPU has no AVX2 (or the compiler was neither gcc nor clang for x86-64)"
    found.pensieve_use_threads(ctypes.c_void_p(threads()))
    return found


def library_for(call: str, num_bytes: int) -> ctypes.CDLL | str:
    """The kernel library, or the reason why it is unusable.

    It is unusable if it is missing, or if its struct for a call of this name is not `num_bytes` long.
    """
    found = library()
    if not isinstance(found, str) and getattr(found, f"pensieve_{call}_bytes")() != num_bytes:
        return "the kernels were built from other sources: install this package again"
    return found


def num_threads() -> int:
    """The number of threads that a kernel may use."""
    return torch.get_num_threads() if threads() else 1


@cache
def threads() -> int | None:
    """Address of `GOMP_parallel` in torch's OpenMP runtime; None if torch uses another kind of threads."""
    if not torch._C.has_openmp:
        return None
    for path in (None, *sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))):
        try:
            function = ctypes.CDLL(None if path is None else str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None
