"""Norms, rotations and gates of a Llama-like layer on a CPU, by the kernels of `worker/kernel`.

Knows tensors; never layers, weights or attention. Everything works in place or into fresh tensors, row by
row, in float32 or bfloat16. Sums are in float32 and each result is rounded once, where a model's modules
round after every operation.
"""

from __future__ import annotations

import ctypes

import torch

from pensieve.worker.kernel import INT, KINDS, POINTER, REAL, Level, levels, library_for, num_threads


class _RowsCall(ctypes.Structure):
    """`struct rows_call` of kernel/rows_call.h, field by field, like the others here."""

    _fields_ = [("kind", INT), ("level", INT), ("num_threads", INT), ("num_rows", INT)]


class _Norm(ctypes.Structure):
    _fields_ = [
        ("call", _RowsCall), ("residual", POINTER), ("delta", POINTER), ("weight", POINTER),
        ("output", POINTER), ("width", INT), ("epsilon", REAL),
    ]  # fmt: skip


class _Rotate(ctypes.Structure):
    _fields_ = [
        ("call", _RowsCall), ("heads", POINTER), ("row_stride", INT), ("num_heads", INT),
        ("num_kv_heads", INT), ("head_dim", INT), ("angles", POINTER), ("positions", POINTER),
        ("query_weight", POINTER), ("key_weight", POINTER), ("epsilon", REAL),
    ]  # fmt: skip


class _Gate(ctypes.Structure):
    _fields_ = [("call", _RowsCall), ("gate_up", POINTER), ("output", POINTER), ("width", INT)]


_BYTES = sum(map(ctypes.sizeof, (_Norm, _Rotate, _Gate)))


def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why these kernels cannot compute in this dtype on this device; None if they can."""
    if device.type != "cpu":
        return f"its kernels run on a CPU, not on {device}"
    if dtype not in KINDS:
        return f"{dtype} is neither bfloat16 nor float32"
    library = library_for("rows", _BYTES)
    return library if isinstance(library, str) else None


class Rows:
    """The kernels for one dtype. Weights and angles are float32; see `float_weight`."""

    def __init__(self, dtype: torch.dtype, level: Level | None = None) -> None:
        """`level` None takes the highest level of this CPU."""
        library = library_for("rows", _BYTES)
        assert not isinstance(library, str), library
        level = levels()[-1] if level is None else level
        self._kernel = library
        self._call = {"kind": KINDS[dtype], "level": level}

    def norm(
        self, residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        """Add `delta` to `residual` in place, if there is one, and normalise the sum. All (T, h).

        Returns:
            The sum over its root mean square, times `weight` (h,).
        """
        rows, width = residual.shape
        output = torch.empty_like(residual)
        work = _Norm(
            self._header(rows), residual.data_ptr(), None if delta is None else delta.data_ptr(),
            weight.data_ptr(), output.data_ptr(), width, epsilon,
        )  # fmt: skip
        self._kernel.pensieve_norm(ctypes.byref(work))
        return output

    def rotate(
        self, heads: torch.Tensor, num_heads: int, num_kv_heads: int, head_dim: int,
        angles: torch.Tensor | None, positions: torch.Tensor, norms: tuple[torch.Tensor, torch.Tensor] | None,
        epsilon: float,
    ) -> None:  # fmt: skip
        """Rotate queries and keys, in place, to the angles of their positions.

        Args:
            heads: (T, at least (H + Hkv) * D), each row contiguous: queries, then keys, then anything.
            num_heads: H.
            num_kv_heads: Hkv.
            head_dim: D, even.
            angles: (positions, D), D / 2 cosines and D / 2 sines; None rotates nothing.
            positions: (T,), rows of `angles`.
            norms: weights (D,) of queries and keys, if each head is normalised first; else None.
            epsilon: of these norms.
        """
        query_weight, key_weight = (
            (None, None) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
        )
        work = _Rotate(
            self._header(len(heads)), heads.data_ptr(), heads.stride(0), num_heads, num_kv_heads, head_dim,
            None if angles is None else angles.data_ptr(), positions.data_ptr(), query_weight, key_weight,
            epsilon,
        )  # fmt: skip
        self._kernel.pensieve_rotate(ctypes.byref(work))

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of rows that hold both, (T, 2 I) -> (T, I)."""
        rows, width = gate_up.shape
        output = gate_up.new_empty((rows, width // 2))
        work = _Gate(self._header(rows), gate_up.data_ptr(), output.data_ptr(), width // 2)
        self._kernel.pensieve_gate(ctypes.byref(work))
        return output

    def _header(self, num_rows: int) -> _RowsCall:
        return _RowsCall(num_threads=num_threads(), num_rows=num_rows, **self._call)


def float_weight(weight: torch.Tensor) -> torch.Tensor:
    """A weight as the kernels read it."""
    return weight.detach().float().contiguous()
