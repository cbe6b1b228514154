"""Moves small arrays between host and device without waiting.

Knows numpy and torch; never what the numbers mean.

A copy from ordinary memory to a CUDA device waits for all work on the device; from page-locked memory it is
queued like a kernel. torch reuses freed page-locked memory only once the copies that read it are over.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def staging(count: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, npt.NDArray[Any]]:
    """Host memory for `count` numbers that will go to `device`: a tensor and an array over the same bytes."""
    tensor = torch.empty(count, dtype=dtype, pin_memory=device.type == "cuda")
    return tensor, tensor.numpy()


def to_device(numbers: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy on the device, queued on its current stream; on a CPU the array itself."""
    plain = torch.from_numpy(np.ascontiguousarray(numbers))
    if device.type != "cuda":
        return plain
    pinned, array = staging(plain.numel(), plain.dtype, device)
    array[:] = numbers.reshape(-1)
    return pinned.to(device, non_blocking=True).view(plain.shape)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in page-locked memory, queued on the current stream; on a CPU the tensor itself.

    It is complete once an event recorded after it is reached.
    """
    if tensor.device.type != "cuda":
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
