"""The products of a Llama-like layer with its weights, laid out for this CPU. Knows matrices and layouts; never models, attention or positions.

Two ways. Panels are read by our own kernel: on CPUs that multiply bfloat16 in vectors it is faster than oneDNN at every size, most of all for few rows.
oneDNN's own layout serves float32, CPUs without such instructions, and those that multiply whole tiles (AMX), which no kernel of ours does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from pensieve.worker.allocator import HugeRegions
from pensieve.worker.kernel import INT, POINTER, REAL, Level, levels, library_for, num_threads
from pensieve.worker.rows import Rows

PANEL = 32  # outputs of a panel, see kernel/products.h
_PLAIN, _ADDED, _GATED = range(3)
_USUAL_ROWS = 64  # oneDNN is told how many rows to expect when it lays weights out


class LayerProducts(Protocol):
    """A layer's four products. All operands are (T, numbers), contiguous, in the model's dtype."""

    def qkv(self, x: torch.Tensor) -> torch.Tensor:
        """(T, h) -> (T, (H + 2 Hkv) D): queries, keys, values."""
        ...

    def out(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor | None:
        """(T, H D) -> (T, h): what is to be added to `residual`; None if that was done."""
        ...

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """(T, h) -> (T, I): silu(gate) * up."""
        ...

    def down(self, gated: torch.Tensor, residual: torch.Tensor) -> torch.Tensor | None:
        """(T, I) -> (T, h), as `out`."""
        ...


class OneDnnProduct:
    """x -> x W^T + b for the weights of some linear modules, one below the other, as oneDNN likes them where this CPU has what it takes."""

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        weight = torch.cat([module.weight.detach() for module in modules])  # (out, in)
        self._num_out = len(weight)
        self._bias = _bias_of(modules)
        self._packed = _can_pack(weight.dtype)
        self._weight: torch.Tensor = _mkldnn._reorder_linear_weight(weight, _USUAL_ROWS) if self._packed else weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(T, in), contiguous -> (T, out)."""
        if not self._packed:
            return nn.functional.linear(x, self._weight, self._bias)
        if not len(x):  # oneDNN's way has no products of nothing
            return x.new_empty((0, self._num_out))
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
        """See `LayerProducts`."""
        return self._out(attended)

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """See `LayerProducts`."""
        return self._rows.gate(self._gate_up(x))

    def down(self, gated: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """See `LayerProducts`."""
        return self._down(gated)


class Weights(ctypes.Structure):
    """`struct weights` of kernel/products.h, field by field."""

    _fields_ = [("panels", POINTER), ("bias", POINTER), ("num_inputs", INT), ("num_outputs", INT), ("store", INT)]


class _Multiply(ctypes.Structure):
    _fields_ = [("weights", POINTER), ("inputs", POINTER), ("results", POINTER), ("num_rows", INT), ("num_threads", INT)]


_BYTES = ctypes.sizeof(Weights) + ctypes.sizeof(_Multiply)


class PanelProduct:
    """x -> x W^T + b by our kernel, in bfloat16. `weights` is what the kernel knows of it, for as long as this lives."""

    def __init__(self, modules: Sequence[nn.Linear], store: int = _PLAIN, memory: HugeRegions | None = None) -> None:
        """Lay the weights out, one module's below the other's; for `_GATED` two modules', interleaved. `memory` is where they go."""
        library = library_for("products", _BYTES)
        assert not isinstance(library, str), library
        self._kernel = library
        matrices, biases = [module.weight.detach() for module in modules], _bias_of(modules)
        if store == _GATED:
            halves, num_outputs = [_pairs(matrix, PANEL // 2) for matrix in matrices], len(matrices[0])
        else:
            together = torch.cat(matrices)
            halves, num_outputs = [_pairs(together, PANEL)], len(together)
        num_panels, num_pairs = halves[0].shape[:2]
        self._panels = (memory or HugeRegions()).take((num_panels, num_pairs, PANEL, 2), torch.bfloat16)
        torch.cat(halves, dim=2, out=self._panels)  # a gate's half panel, then that of what it gates
        self._bias = None if biases is None else self._lay_out_bias(biases.float(), store)
        self.weights = Weights(
            self._panels.data_ptr(), None if self._bias is None else self._bias.data_ptr(), matrices[0].shape[1], num_outputs, store
        )
        self._address = ctypes.addressof(self.weights)

    @staticmethod
    def why_not(dtype: torch.dtype, *sizes: int) -> str | None:
        """Why panels would not do for products of this dtype, or of rows of these sizes; None: they do."""
        if dtype != torch.bfloat16:
            return f"panels are of bfloat16, not of {dtype}"
        if odd := [size for size in sizes if size % 2]:
            return f"panels are of pairs of numbers, rows of {odd[0]} are odd"
        library = library_for("products", _BYTES)
        if isinstance(library, str):
            return library
        if levels()[-1] < Level.AVX512_BF16:
            return "this CPU has no AVX512-BF16"
        return "this CPU has AMX, which oneDNN uses better" if library.pensieve_has_amx() else None

    def __call__(self, x: torch.Tensor, results: torch.Tensor | None = None) -> torch.Tensor:
        """(T, in) -> (T, out), into `results` if they are given: added to them, where this product adds."""
        if results is None:
            results = x.new_empty((len(x), self.weights.num_outputs))
        call = _Multiply(self._address, x.data_ptr(), results.data_ptr(), len(x), num_threads())
        self._kernel.pensieve_multiply(ctypes.byref(call))
        return results

    @staticmethod
    def _lay_out_bias(bias: torch.Tensor, store: int) -> torch.Tensor:
        """(outputs,) in fp32 as the panels have them, filled up."""
        if store != _GATED:
            return _filled(bias[:, None], PANEL).flatten()
        gate, up = (_filled(half[:, None], PANEL // 2).view(-1, PANEL // 2) for half in bias.chunk(2))
        return torch.cat((gate, up), dim=1).flatten()


class PanelLayer:
    """`LayerProducts` by our kernel."""

    def __init__(self, attention: Any, mlp: Any, memory: HugeRegions) -> None:
        self.qkv = PanelProduct([attention.q_proj, attention.k_proj, attention.v_proj], _PLAIN, memory)
        self.out_product = PanelProduct([attention.o_proj], _ADDED, memory)
        self.gated = PanelProduct([mlp.gate_proj, mlp.up_proj], _GATED, memory)
        self.down_product = PanelProduct([mlp.down_proj], _ADDED, memory)

    def out(self, attended: torch.Tensor, residual: torch.Tensor) -> None:
        """See `LayerProducts`."""
        self.out_product(attended, residual)

    def down(self, gated: torch.Tensor, residual: torch.Tensor) -> None:
        """See `LayerProducts`."""
        self.down_product(gated, residual)


def _filled(rows: torch.Tensor, multiple: int) -> torch.Tensor:
    """Rows of zeros at the end, until their number is a multiple."""
    return nn.functional.pad(rows, (0, 0, 0, -len(rows) % multiple))


def _pairs(weight: torch.Tensor, width: int) -> torch.Tensor:
    """(out, in) -> (panels, in / 2, width, 2)."""
    return _filled(weight, width).view(-1, width, weight.shape[1] // 2, 2).transpose(1, 2)


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
    """`struct layer` of kernel/layer.h, field by field: a whole layer as one call, for layers of `PanelProduct`s."""

    _fields_ = [
        ("num_threads", INT), ("num_tokens", INT), ("residual", POINTER), ("attention_norm", POINTER), ("mlp_norm", POINTER),
        ("query_norm", POINTER), ("key_norm", POINTER), ("angles", POINTER), ("positions", POINTER), ("epsilon", REAL),
        ("qkv", Weights), ("out", Weights), ("gate_up", Weights), ("down", Weights), ("rows", POINTER), ("num_rows", INT),
        ("normed", POINTER), ("heads", POINTER), ("attended", POINTER), ("gated", POINTER),
    ]  # fmt: skip
