"""Decides how many bytes the first tier may have.

Knows models and a device's memory; never requests or policies.

On a device it is what the weights, the largest step and captured graphs leave; in main memory it is a share.
The largest step is run, not calculated: only a model's own modules know what they keep between two
operations, and only sampling knows what it takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from pensieve.config import TierConfig
from pensieve.core.plan import BlockTableUpdate, RequestStart, Span, StepPlan
from pensieve.core.request import SamplingParams
from pensieve.errors import ConfigError
from pensieve.worker.model import CausalModel
from pensieve.worker.random_weights import available_bytes
from pensieve.worker.worker import ModelWorker

# share of the device for what no run shows: fragmentation, libraries' workspaces, other processes
_LEFT_SHARE = 0.04
_GRAPH_BYTES_A_ROW = 2 << 20  # of captured graphs, which share one pool


# share of the free main memory for a first tier there; steps, other programs and a second engine take the
# rest
HOST_SHARE = 0.5
_STEP_BYTES = 512 << 20  # left for a step, text and a store beside the weights


@dataclass(frozen=True, slots=True)
class HostShare:
    """Main memory for a first tier, in bytes."""

    tier: int
    free: int | None  # None if the system does not say

    def __str__(self) -> str:
        return f"{self.tier / 1e9:.3g} GB" + (
            "" if self.free is None else f" of {self.free / 1e9:.3g} GB free"
        )


def host_share(most: int, second: int, unknown: int, *, sharers: int = 1) -> HostShare:
    """The default size of a first tier in main memory.

    Pages are taken when they are first written, so a large tier costs nothing at the start.

    Args:
        most: bytes that would ever be used.
        second: bytes of the second tier, which is in the same memory.
        unknown: bytes to take if the system does not say what is free.
        sharers: processes on this machine that want as much.
    """
    free = available_bytes("cpu")
    if free is None:
        return HostShare(min(most, unknown), None)
    share = min(int(HOST_SHARE * free), free - _STEP_BYTES) // sharers - second
    return HostShare(max(0, min(most, share)), free)


class Meter(Protocol):
    """Reads a device's memory use."""

    def free_bytes(self) -> tuple[int, int]:
        """Bytes (free, total)."""
        ...

    def start(self) -> None:
        """Begin to watch for a peak."""
        ...

    def peak_bytes(self) -> int:
        """The most bytes allocated at once since `start`, beyond those allocated then."""
        ...


class CudaMeter:
    """PyTorch's allocator on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def free_bytes(self) -> tuple[int, int]:
        """Bytes (free, total), after the allocator has given unused memory back."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return free, total

    def start(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def peak_bytes(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._before


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """The use of a device's memory, in bytes."""

    total: int
    free: int  # free beside the weights
    step: int  # peak of the largest step
    graphs: int
    left: int  # never used

    @property
    def tier(self) -> int:
        """Bytes for the first tier."""
        return self.free - self.step - self.graphs - self.left

    def __str__(self) -> str:
        return (
            f"{self.tier / 1e9:.2f} GB of {self.total / 1e9:.2f} for the first tier: {self.free / 1e9:.2f} "
            "GB are free beside the weights, the largest "
            f"step takes {self.step / 1e9:.2f}, graphs up to {self.graphs / 1e9:.2f}, {self.left / 1e9:.2f} "
            "stay free"
        )


def device_share(
    model: CausalModel,
    *,
    max_batch_tokens: int,
    max_running: int,
    chunk_tokens: int,
    graph_rows: int,
    attention: str = "auto",
    meter: Meter | None = None,
) -> DeviceShare:
    """Run the largest possible step, and find out what is left for the first tier.

    Args:
        model: on its device.
        max_batch_tokens: of a step.
        max_running: requests of a step, and so the most rows of logits to sample from.
        chunk_tokens: of a slot.
        graph_rows: decode batches of up to so many rows are captured.
        attention: a backend's name, or "auto".
        meter: of the device; None takes CUDA's.

    Raises:
        ConfigError: nothing is left, or not even the step fits; with the sizes and the way out.
    """
    meter = CudaMeter(model.device) if meter is None else meter
    try:
        step = _peak(model, max_batch_tokens, max_running, chunk_tokens, attention, meter)
    except torch.OutOfMemoryError as error:
        free, total = meter.free_bytes()
        raise ConfigError(
            f"a step of {max_batch_tokens} tokens does not fit beside the weights: {free / 1e9:.2f} of "
            f"{total / 1e9:.2f} GB are free. "
            "Give --max-batch-tokens less, or take a smaller model"
        ) from error
    free, total = meter.free_bytes()
    room = DeviceShare(total, free, step, _GRAPH_BYTES_A_ROW * graph_rows, int(_LEFT_SHARE * total))
    if room.tier <= 0:
        raise ConfigError(
            f"no memory is left for the cache ({room}). Give --max-batch-tokens less, or take a smaller model"
        )
    return room


def _peak(
    model: CausalModel,
    max_batch_tokens: int,
    max_running: int,
    chunk_tokens: int,
    attention: str,
    meter: Meter,
) -> int:
    """Bytes of a step of so many tokens, shared by requests that all sample in the most expensive way."""
    requests = min(max_running, max_batch_tokens)
    lengths = [
        max_batch_tokens // requests + (index < max_batch_tokens % requests) for index in range(requests)
    ]
    lengths = [min(length, model.shape.max_positions) for length in lengths]
    counts = [-(-length // chunk_tokens) for length in lengths]
    worker = ModelWorker(model, (TierConfig("gpu", sum(counts)),), chunk_tokens, attention=attention)
    sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=0, logprobs=1)
    names = [f"largest-{index}" for index in range(requests)]
    first = [sum(counts[:index]) for index in range(requests)]
    plan = StepPlan(
        0,
        tuple(
            Span(name, 0, length, (0,) * length, True) for name, length in zip(names, lengths, strict=True)
        ),
        (),
        (),
        tuple(RequestStart(name, sampling, ()) for name in names),
        tuple(
            BlockTableUpdate(name, 0, tuple(range(at, at + count)))
            for name, at, count in zip(names, first, counts, strict=True)
        ),
        (),
        (),
    )
    try:
        meter.start()
        result = worker.run(plan)
        peak = meter.peak_bytes()
    finally:
        worker.close()
    if result.forward_error is not None:
        if "OutOfMemoryError" in result.forward_error:
            raise torch.OutOfMemoryError(result.forward_error)
        raise ConfigError(
            f"the largest step fails on this device: {result.forward_error}. Give --max-batch-tokens less"
        )
    return peak
