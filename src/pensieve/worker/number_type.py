"""Decides what `--dtype auto` means on this machine: measured in milliseconds, as torch will compute.

Knows matrices and a clock; never models.

The CPU's list of features is not enough: libraries can be capped (ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY,
PENSIEVE_ISA), and some CPUs have instructions that are slower than doing without. Time is that of one thread
on the processor, so that other load does not count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from pensieve.worker.products import OneDnnProduct, PanelProduct

if TYPE_CHECKING:
    from pensieve.worker.group import Group

AUTO = "auto"
_INPUTS, _OUTPUTS = 576, 1536  # of the matrix: an MLP's of a small model, small enough for a cache
_ROWS = (1, 8, 32)  # decodes of one and of several users, and (part of) a prompt
_ROUNDS = 5  # the fastest counts
_PATIENCE_S = 0.05  # for each number of rows, no further round after this time
_WORTH = 1.25  # bfloat16 halves the memory of weights and cache, so it may be a little slower

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class NumberType:
    """The number type to compute in, and why."""

    name: str  # of a torch dtype
    reason: str = ""  # for people; empty if the user chose it


def choose(
    asked: str,
    device: str,
    *,
    int8: bool = False,
    group: Group | None = None,
    clock: Clock = time.thread_time,
) -> NumberType:
    """The number type that was asked for, or with "auto" the one to compute in. A group takes rank 0's.

    Args:
        asked: a torch dtype's name, or "auto".
        device: where the model computes. A GPU computes in bfloat16.
        int8: weights of 8 bits, which are multiplied with bfloat16 only.
        group: processes that share the model.
        clock: seconds that this thread has computed.
    """
    if asked != AUTO:
        return NumberType(asked)
    if int8 or torch.device(device).type != "cpu":
        return NumberType("bfloat16")
    if group is None:
        return _fastest(clock)
    chosen: NumberType = group.exchange(_fastest(clock) if group.rank == 0 else None)[0]
    return chosen


def _fastest(clock: Clock) -> NumberType:
    ratio = slowdown(clock)
    if ratio > _WORTH:
        return NumberType(
            "float32", f"computing in float32: bfloat16 takes {ratio:.1f} times as long on this CPU"
        )
    if ratio * _WORTH < 1.0:
        return NumberType(
            "bfloat16", f"computing in bfloat16: float32 takes {1 / ratio:.1f} times as long on this CPU"
        )
    return NumberType("bfloat16", "computing in bfloat16: on this CPU as fast as float32, in half the memory")


def slowdown(clock: Clock = time.thread_time) -> float:
    """How many times as long as in float32 products take in bfloat16: the mean over few rows and many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other would measure the other load here
    try:
        narrow, wide = _product(torch.bfloat16), _product(torch.float32)
        ratios = [_time_ratio(narrow, wide, rows, clock) for rows in _ROWS]
    finally:
        torch.set_num_threads(threads)
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


Product = Callable[[int], object]  # rows to their product


def _product(dtype: torch.dtype) -> Product:
    """A product as in a model's layer (`worker.products`)."""
    module: nn.Linear = nn.utils.skip_init(
        nn.Linear, _INPUTS, _OUTPUTS, bias=False, device="cpu", dtype=dtype
    )  # type: ignore[no-untyped-call]
    nn.init.constant_(module.requires_grad_(False).weight, 0.5)
    multiply = (
        PanelProduct([module]) if PanelProduct.why_not(dtype, _INPUTS) is None else OneDnnProduct([module])
    )
    inputs = {rows: torch.full((rows, _INPUTS), 0.5, dtype=dtype) for rows in _ROWS}

    def product(rows: int) -> object:
        with torch.inference_mode():
            return multiply(inputs[rows])

    return product


def _time_ratio(narrow: Product, wide: Product, rows: int, clock: Clock) -> float:
    """The ratio of the fastest rounds, measured in turns.

    The first round of each, which prepares, does not count.
    """
    fastest = [math.inf, math.inf]
    begun_s = clock()
    for index in range(_ROUNDS + 1):
        for which, product in enumerate((narrow, wide)):
            start_s = clock()
            product(rows)
            if index:
                fastest[which] = min(fastest[which], clock() - start_s)
        if index and clock() - begun_s > _PATIENCE_S:
            break
    return max(fastest[0], 1e-9) / max(fastest[1], 1e-9)
