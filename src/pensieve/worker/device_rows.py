"""Norms, rotations and gates of a Llama-like layer on a GPU: `worker/rows.py` as Triton kernels.

Knows tensors; never layers or attention. A model's modules launch about fifteen small kernels for a layer's
norms, rotations and gate; in a decode step of a few requests that would take longer than reading all weights.
Here it is four.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch

_GATE_BLOCK = 1024


class DeviceRows:
    """As `rows.Rows`, for every dtype; see there for what is computed."""

    def __init__(self) -> None:
        self._kernels: Any = importlib.import_module("pensieve.worker.row_kernels")

    @staticmethod
    def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
        """Why these kernels cannot compute in this dtype on this device; None if they can."""
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{dtype} is none of float32, bfloat16, float16"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"its kernels run on CUDA, not on {device}"
        return None

    def norm(
        self, residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        rows, width = residual.shape
        output = torch.empty_like(residual)
        if rows:
            self._kernels.norm_kernel[(rows,)](
                residual,
                delta,
                weight,
                output,
                width,
                epsilon,
                HAS_DELTA=delta is not None,
                BLOCK=_power(width),
                num_warps=_warps(width),
            )
        return output

    def rotate(
        self, heads: torch.Tensor, num_heads: int, num_kv_heads: int, head_dim: int,
        angles: torch.Tensor | None, positions: torch.Tensor, norms: tuple[torch.Tensor, torch.Tensor] | None,
        epsilon: float,
    ) -> None:  # fmt: skip
        query_weight, key_weight = (None, None) if norms is None else norms
        half = head_dim // 2
        self._kernels.rotate_kernel[len(heads), num_heads + num_kv_heads](
            heads, angles, positions, query_weight, key_weight, heads.stride(0), num_heads, epsilon,
            HALF=half, BLOCK=_power(half), ROTATES=angles is not None, NORMALISES=norms is not None,
            num_warps=1,
        )  # fmt: skip

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        rows, width = gate_up.shape
        output = gate_up.new_empty((rows, width // 2))
        if rows:
            block = min(_GATE_BLOCK, _power(width // 2))
            self._kernels.gate_kernel[rows, -(-(width // 2) // block)](
                gate_up, output, width // 2, BLOCK=block
            )
        return output


def _power(number: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (number - 1).bit_length()


def _warps(width: int) -> int:
    return 4 if width <= 2048 else 8
