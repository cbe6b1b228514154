"""The products of a Llama-like layer with its weights, each with the layout that it is computed from.

Knows matrices and layouts; never models, attention or positions.

On a CPU there are two ways. Panels are read by our own kernel, on CPUs that multiply bfloat16 in vectors or
in whole tiles (AMX): it is faster than oneDNN at every size in vectors, and in tiles for up to about sixty
rows (docs/log/performance.md). Weights may have 8 bits there, which halves what few rows have to read.
oneDNN's own layout serves float32, and CPUs without such instructions. On a GPU products are the library's
own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pensieve.worker.allocator import HugeRegions
from pensieve.worker.device_rows import DeviceRows
from pensieve.worker.kernel import INT, POINTER, REAL, Level, has_amx, levels, library_for, num_threads
from pensieve.worker.rows import Rows

PANEL = 32  # outputs of a panel, see kernel/products.h
_PLAIN, _ADDED, _GATED, _FLOAT = range(4)
_INT8_MOST = 127  # symmetric: -128 is not used
_LEAST_SCALE = 1e-30  # of an output whose weights are all 0
_USUAL_ROWS = 64  # the number of rows that oneDNN is told to expect when it lays weights out
# Row counts between a power of two and the next, evenly spaced, and all below. oneDNN compiles and keeps a
# primitive for each row count that it meets, about 3 MB for a layer's four products; for 512 counts (with the
# holes that they left in the heap) that was 1.9 GB.
_SIZES_AN_OCTAVE = 8
ONEDNN_BYTES = (
    192 << 20
)  # main memory of those primitives beside the weights, whatever the model's size: 157 MB for up to 512 rows


class LayerProducts(Protocol):
    """A layer's four products. All operands are (T, numbers), contiguous, in the model's dtype."""

    def qkv(self, x: torch.Tensor) -> torch.Tensor:
        """(T, h) -> (T, (H + 2 Hkv) D): queries, keys, values."""
        ...

    def out(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor | None:
        """(T, H D) -> (T, h): what to add to `residual`; None if it was added already."""
        ...

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """(T, h) -> (T, I): silu(gate) * up."""
        ...

    def down(self, gated: torch.Tensor, residual: torch.Tensor) -> torch.Tensor | None:
        """(T, I) -> (T, h), as `out`."""
        ...


def _joined(parts: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """Tensors as one. A single one is not copied: an output layer would be in memory twice."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def grid_rows(num_rows: int) -> int:
    """The smallest row count of the grid that is at least `num_rows` (1 or more)."""
    step = max(1, (1 << (num_rows.bit_length() - 1)) // _SIZES_AN_OCTAVE)
    return -(-num_rows // step) * step


class OneDnnProduct:
    """x -> x W^T + b by oneDNN, for the weights of some linear modules, one below the other.

    Clients choose how many rows there are, and oneDNN keeps memory for each number: so rows of zeros are
    added up to a number of a short list.
    """

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        weight = _joined([module.weight.detach() for module in modules])  # (out, in)
        self._num_out = len(weight)
        self._bias = _bias_of(modules)
        self._packed = _can_pack(weight.dtype)
        self._weight: torch.Tensor = (
            _mkldnn._reorder_linear_weight(weight, _USUAL_ROWS) if self._packed else weight
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(T, in), contiguous -> (T, out)."""
        if not self._packed:
            return nn.functional.linear(x, self._weight, self._bias)
        if not len(x):  # oneDNN has no products of no rows
            return x.new_empty((0, self._num_out))
        if (num_padded := grid_rows(num_rows := len(x))) == num_rows:
            return self._multiply(x)
        padded = x.new_empty((num_padded, x.shape[1]))
        padded[:num_rows] = x
        padded[num_rows:] = 0
        return self._multiply(padded)[:num_rows]

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = _linear(x, self._weight, self._bias, "none", [], "")
        return result


class OneDnnLayer:
    """`LayerProducts` by oneDNN."""

    def __init__(self, attention: Any, mlp: Any) -> None:
        self.qkv = OneDnnProduct([attention.q_proj, attention.k_proj, attention.v_proj])
        self._out, self._down = OneDnnProduct([attention.o_proj]), OneDnnProduct([mlp.down_proj])
        self._gate_up = OneDnnProduct([mlp.gate_proj, mlp.up_proj])
        self._rows = Rows(mlp.down_proj.weight.dtype)

    def out(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self._out(attended)

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        return self._rows.gate(self._gate_up(x))

    def down(self, gated: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self._down(gated)


class DeviceProduct:
    """x -> x W^T + b for the weights of some linear modules, one below the other, on a GPU."""

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        weights = [module.weight.detach() for module in modules]
        self._weight = (
            weights[0] if len(weights) == 1 else torch.cat(weights)
        )  # (out, in); the weights of a single module stay where they are
        self._bias = _bias_of(modules)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(T, in) -> (T, out)."""
        return nn.functional.linear(x, self._weight, self._bias)


class DeviceLayer:
    """`LayerProducts` on a GPU."""

    def __init__(self, attention: Any, mlp: Any) -> None:
        self.qkv = DeviceProduct([attention.q_proj, attention.k_proj, attention.v_proj])
        self._out, self._down = DeviceProduct([attention.o_proj]), DeviceProduct([mlp.down_proj])
        self._gate_up = DeviceProduct([mlp.gate_proj, mlp.up_proj])
        self._rows = DeviceRows()

    def out(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self._out(attended)

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        return self._rows.gate(self._gate_up(x))

    def down(self, gated: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self._down(gated)


class Weights(ctypes.Structure):
    """`struct weights` of kernel/products.h, field by field."""

    _fields_ = [
        ("panels", POINTER), ("scales", POINTER), ("bias", POINTER), ("num_inputs", INT),
        ("num_outputs", INT), ("level", INT), ("store", INT),
    ]  # fmt: skip


class _Multiply(ctypes.Structure):
    _fields_ = [
        ("weights", POINTER),
        ("inputs", POINTER),
        ("results", POINTER),
        ("num_rows", INT),
        ("num_threads", INT),
    ]


_BYTES = ctypes.sizeof(Weights) + ctypes.sizeof(_Multiply)


@dataclass(frozen=True, slots=True)
class PanelKind:
    """How panels are made."""

    int8: bool = False  # weights of 8 bits with one scale for each output; else bfloat16
    memory: HugeRegions = field(default_factory=HugeRegions)


class PanelProduct:
    """x -> x W^T + b by our kernel, x in bfloat16.

    `weights` is the kernel's description of it, valid while this object lives.
    """

    def __init__(
        self, modules: Sequence[nn.Linear], store: int = _PLAIN, kind: PanelKind | None = None
    ) -> None:
        """Lay the weights out: one module's below the other's, or for `_GATED` two modules' interleaved."""
        library = library_for("products", _BYTES)
        assert not isinstance(library, str), library
        self._kernel = library
        kind = kind or PanelKind()
        parts = [module.weight.detach() for module in modules]
        if store != _GATED:
            parts = [_joined(parts)]
        width = PANEL // len(parts)  # outputs of one part in each panel
        num_inputs, num_outputs = parts[0].shape[1], len(parts[0])
        bias = _bias_of(modules)
        self._bias = None if bias is None else _by_panel(bias.float().chunk(len(parts)), width)
        self._scales = None
        if kind.int8:
            scales = [part.float().abs().amax(dim=1).clamp(min=_LEAST_SCALE) / _INT8_MOST for part in parts]
            parts = [
                (part.float() / scale[:, None]).round().to(torch.int8)
                for part, scale in zip(parts, scales, strict=True)
            ]
            self._scales = _by_panel(scales, width)
        pairs = _joined([_pairs(part, width) for part in parts], dim=2)  # (panels, in / 2, PANEL, 2)
        if kind.int8:
            pairs = _woven(pairs)
        self._panels = kind.memory.take(tuple(pairs.shape), pairs.dtype).copy_(pairs)
        self.weights = Weights(
            self._panels.data_ptr(), _address(self._scales), _address(self._bias), num_inputs, num_outputs,
            levels()[-1], store,
        )  # fmt: skip
        self._weights_address = ctypes.addressof(self.weights)

    @staticmethod
    def why_not(dtype: torch.dtype, *sizes: int, int8: bool = False) -> str | None:
        """Why panels (of 8 bits) cannot compute products of this dtype or these sizes; None if they can."""
        if dtype != torch.bfloat16:
            return f"panels are of bfloat16, not of {dtype}"
        if odd := [size for size in sizes if size % 2]:
            return f"panels are of pairs of numbers, rows of {odd[0]} are odd"
        library = library_for("products", _BYTES)
        if isinstance(library, str):
            return library
        if levels()[-1] < Level.AVX512_BF16:
            return "this CPU has no AVX512-BF16"
        if int8:
            return None if library.pensieve_has_bytes() else "this CPU has no AVX512-VBMI"
        return (
            "this CPU has AMX, which these kernels were built without"
            if has_amx() and levels()[-1] < Level.AMX
            else None
        )

    def __call__(self, x: torch.Tensor, results: torch.Tensor | None = None) -> torch.Tensor:
        """(T, in) -> (T, out), into `results` if they are given, or added to them if this product adds.

        In fp32 if it was made so.
        """
        if results is None:
            dtype = torch.float32 if self.weights.store == _FLOAT else x.dtype
            results = x.new_empty((len(x), self.weights.num_outputs), dtype=dtype)
        call = _Multiply(self._weights_address, x.data_ptr(), results.data_ptr(), len(x), num_threads())
        self._kernel.pensieve_multiply(ctypes.byref(call))
        return results


def head_product(module: nn.Linear, kind: PanelKind) -> PanelProduct | OneDnnProduct:
    """The output layer's product, in fp32 if our kernel can compute it.

    bfloat16 has steps of an eighth in the usual range of logits (16 to 32), and the two likeliest tokens are
    often closer than that.
    """
    if PanelProduct.why_not(module.weight.dtype, module.in_features, int8=kind.int8) is None:
        return PanelProduct([module], _FLOAT, kind)
    return OneDnnProduct([module])


class PanelLayer:
    """`LayerProducts` by our kernel."""

    def __init__(self, attention: Any, mlp: Any, kind: PanelKind) -> None:
        self.qkv = PanelProduct([attention.q_proj, attention.k_proj, attention.v_proj], _PLAIN, kind)
        self.out_product = PanelProduct([attention.o_proj], _ADDED, kind)
        self.gated = PanelProduct([mlp.gate_proj, mlp.up_proj], _GATED, kind)
        self.down_product = PanelProduct([mlp.down_proj], _ADDED, kind)

    def out(self, attended: torch.Tensor, residual: torch.Tensor) -> None:
        self.out_product(attended, residual)

    def down(self, gated: torch.Tensor, residual: torch.Tensor) -> None:
        self.down_product(gated, residual)


def lay_out_modules(model: nn.Module) -> None:
    """Lay the weights of GPT-2's kind of product, (in, out) in 16 bits, out like a linear module's.

    On a CPU that does not multiply bfloat16, torch takes ten times as long for them otherwise
    (docs/log/performance.md).
    """
    for module in model.modules():
        if (
            isinstance(module, Conv1D)
            and module.weight.device.type == "cpu"
            and module.weight.dtype.itemsize == 2
        ):
            module.weight.data = module.weight.data.t().contiguous().t()


def fill_up_modules(model: nn.Module) -> None:
    """Let a model's own 16-bit products on a CPU, which oneDNN computes, use only the grid's row counts.

    See `grid_rows`.
    """
    for module in model.modules():
        if (
            isinstance(module, (nn.Linear, Conv1D))
            and module.weight.device.type == "cpu"
            and module.weight.dtype.itemsize == 2
        ):
            module.forward = _on_grid(module.forward)  # type: ignore[method-assign]


def _on_grid(multiply: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        *before, width = x.shape
        num_rows = x.numel() // width
        if not num_rows or (num_padded := grid_rows(num_rows)) == num_rows:
            return multiply(x)
        padded = x.new_zeros((num_padded, width))
        padded[:num_rows] = x.reshape(num_rows, width)
        result = multiply(padded)[:num_rows]
        return result.view(*before, result.shape[-1])

    return forward


def _filled(rows: torch.Tensor, multiple: int) -> torch.Tensor:
    """Add rows of zeros until their number is a multiple."""
    return nn.functional.pad(rows, (0, 0, 0, -len(rows) % multiple))


def _pairs(weight: torch.Tensor, width: int) -> torch.Tensor:
    """(out, in) -> (panels, in / 2, width, 2)."""
    return _filled(weight, width).view(-1, width, weight.shape[1] // 2, 2).transpose(1, 2)


def _woven(pairs: torch.Tensor) -> torch.Tensor:
    """(panels, in / 2, PANEL, 2) of int8 as kernel/products.c reads them: 4 outputs of each half by turns."""
    halves = pairs.view(*pairs.shape[:2], 2, 4, 4, 2)
    return halves.transpose(2, 3).reshape(pairs.shape)


def _by_panel(parts: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """A number for each output, fp32, in the panels' order, padded."""
    return (
        torch.cat([_filled(part[:, None], width).view(-1, width) for part in parts], dim=1)
        .flatten()
        .contiguous()
    )


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _bias_of(modules: Sequence[nn.Linear]) -> torch.Tensor | None:
    biases = [module.bias for module in modules]
    return None if biases[0] is None else torch.cat([bias.detach() for bias in biases])


_mkldnn: Any = torch.ops.mkldnn
_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_linear: Any = _mkldnn._linear_pointwise.default if _HAS_ONEDNN else None


def _can_pack(dtype: torch.dtype) -> bool:
    if not _HAS_ONEDNN:
        return False
    return dtype == torch.float32 or bool(_mkldnn._is_mkldnn_bf16_supported())


class LayerCall(ctypes.Structure):
    """`struct layer` of kernel/layer.h, field by field: a whole layer of `PanelProduct`s as one call."""

    _fields_ = [
        ("num_threads", INT), ("num_tokens", INT), ("residual", POINTER), ("attention_norm", POINTER),
        ("mlp_norm", POINTER), ("query_norm", POINTER), ("key_norm", POINTER), ("angles", POINTER),
        ("positions", POINTER), ("epsilon", REAL), ("qkv", Weights), ("out", Weights), ("gate_up", Weights),
        ("down", Weights), ("rows", POINTER), ("num_rows", INT), ("normed", POINTER), ("heads", POINTER),
        ("attended", POINTER), ("gated", POINTER),
    ]  # fmt: skip
