"""The forward of the Llama family in fewer and larger operations.

Knows transformers' modules and weights; never plans, slots or sampling.

Llama, Mistral, Qwen2, Qwen3 and SmolLM3 are one model with small differences: RMS norms, rotary positions (in
SmolLM3 not in every layer), grouped queries (normalised in Qwen3), a gated MLP. Run by its modules, a decode
step takes two to three times as long as it must (docs/log/performance.md). Here q, k and v are one product,
gate and up another; weights are laid out for fast reading; the operations between the products are one kernel
each. On a CPU where all of them, attention included, are our own kernels, a layer is one call. Results are
rounded less often than by the modules and differ from theirs within the tolerance of `worker.self_test`,
which protects users from a mistake here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pensieve.worker import rows as kernels
from pensieve.worker.attention import AttentionArgs, PagedAttention
from pensieve.worker.attention.native import NativeAttention
from pensieve.worker.device_rows import DeviceRows
from pensieve.worker.kernel import library_for, num_threads
from pensieve.worker.products import (
    DeviceLayer,
    DeviceProduct,
    LayerCall,
    LayerProducts,
    OneDnnLayer,
    PanelKind,
    PanelLayer,
    PanelProduct,
    head_product,
)
from pensieve.worker.rows import Rows, float_weight

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3"})  # of configs; their classes:
_FAMILY = {
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
}
_FIRST_POSITIONS = 4096  # rows of angles made at once; more once a longer context comes

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, AttentionArgs], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's weights. Norms are float32."""

    attention_norm: torch.Tensor  # (h,)
    head_norms: tuple[torch.Tensor, torch.Tensor] | None  # (D,) of queries and of keys
    rotates: bool
    args: AttentionArgs
    mlp_norm: torch.Tensor  # (h,)
    products: LayerProducts


class LlamaForward:
    """A model of the family, ready to compute. Takes its weights from the modules, layer by layer."""

    def __init__(
        self,
        model: PreTrainedModel,
        args: Sequence[AttentionArgs],
        *,
        keep_modules: bool,
        int8: bool = False,
        on_device: bool | None = None,
    ) -> None:
        """Lay the weights out.

        Args:
            model: one that `why_not` accepts.
            args: how each layer attends.
            keep_modules: leave the modules as they are, with all weights in memory twice; otherwise they are
                emptied and cannot compute any more.
            int8: weights of 8 bits, if `why_not_int8` accepts the model. The embedding stays as it is.
            on_device: compute by the operations for a GPU; None if the model is on one.
        """
        config, decoder = model.config.get_text_config(), model.model
        assert len(args) == len(decoder.layers)
        self._num_heads, self._num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim: int = decoder.layers[0].self_attn.head_dim
        self._intermediate_size: int = config.intermediate_size
        self._epsilon: float = config.rms_norm_eps
        self._on_device = model.device.type != "cpu" if on_device is None else on_device
        self._rows: Rows | DeviceRows = DeviceRows() if self._on_device else Rows(model.dtype)
        self._embedding: torch.Tensor = decoder.embed_tokens.weight.detach()
        self.int8 = int8
        panels = not self._on_device and (int8 or _why_no_panels(model) is None)
        self.by_onednn = not (self._on_device or panels)  # its products
        kind = PanelKind(int8)
        plain_layer = DeviceLayer if self._on_device else OneDnnLayer
        self._head = DeviceProduct([model.lm_head]) if self._on_device else head_product(model.lm_head, kind)
        if not keep_modules and model.lm_head.weight is not decoder.embed_tokens.weight:
            _empty(model.lm_head)
        self._layers: list[_Layer] = []
        for index, module in enumerate(decoder.layers):
            products = (
                PanelLayer(module.self_attn, module.mlp, kind)
                if panels
                else plain_layer(module.self_attn, module.mlp)
            )
            self._layers.append(_take_layer(module, args[index], products))
            if not keep_modules:
                _empty(module)
        if not keep_modules:
            _empty(model.lm_head)  # a tied embedding stays: its rows are looked up
        self._last_norm = float_weight(decoder.norm.weight)
        rotary = decoder.rotary_emb
        self._frequencies: torch.Tensor = rotary.inv_freq.detach().float()
        self._angle_scale = float(rotary.attention_scaling)
        # On a device all at once: reading how far a step's positions go would wait for it.
        self._angles = self._angles_to(
            config.max_position_embeddings
            if self._on_device
            else min(_FIRST_POSITIONS, config.max_position_embeddings)
        )
        self._calls = [self._call_of(layer) for layer in self._layers] if panels else None
        self._room = torch.empty(0, dtype=model.dtype)

    @staticmethod
    def why_not(model: PreTrainedModel) -> str | None:
        """Why this model must be computed by its modules; None if it need not be."""
        config = model.config.get_text_config()
        if (num_ranks := model.tp_size or 1) > 1:
            return f"its weights are split over {num_ranks} processes"
        if type(model).__name__ not in _FAMILY:
            return f"{type(model).__name__} is not of the Llama family"
        if config.hidden_act != "silu":
            return f"its MLP has {config.hidden_act!r} for a gate, not 'silu'"
        if strange := {
            type(module).__name__ for module in model.modules() if hasattr(module, "in_features")
        } - {"Linear"}:
            return f"its products are of type {', '.join(sorted(strange))}"
        if 2 * len(model.model.rotary_emb.inv_freq) != model.model.layers[0].self_attn.head_dim:
            return "only a part of each head is rotated"
        if model.device.type != "cpu":
            return DeviceRows.why_not(model.dtype, model.device)
        if isinstance(reason := library_for("layer", ctypes.sizeof(LayerCall)), str):
            return reason
        return kernels.why_not(model.dtype, model.device)

    @classmethod
    def why_not_int8(cls, model: PreTrainedModel) -> str | None:
        """Why this model's weights cannot have 8 bits; None if they can."""
        return cls.why_not(model) or _why_no_panels(model, int8=True)

    def logits(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, rows: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Logits of some tokens of a row; see `CausalModel.logits`."""
        ids, positions = input_ids[0], position_ids[0]
        if not self._on_device and (length := int(positions.max()) + 1) > len(self._angles):
            self._angles = self._angles_to(max(length, 2 * len(self._angles)))
        with torch.inference_mode():
            residual = nn.functional.embedding(ids, self._embedding)  # (T, h)
            if (
                self._calls is not None
                and isinstance(attend, PagedAttention)
                and isinstance(attend.backend, NativeAttention)
            ):
                self._run_calls(self._calls, residual, positions, rows, attend, attend.backend)
                last = self._rows.norm(residual[: len(rows)], None, self._last_norm, self._epsilon)
            else:
                last = self._run_layers(residual, positions, rows, attend)
            return self._head(last)  # (E, V)

    def _run_layers(
        self, residual: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Run all layers over (T, h), operation by operation; returns (E, h), normalised."""
        kernel, heads, kv_heads, head_dim, epsilon = (
            self._rows,
            self._num_heads,
            self._num_kv_heads,
            self._head_dim,
            self._epsilon,
        )
        delta: torch.Tensor | None = None
        for index, layer in enumerate(self._layers):
            qkv = layer.products.qkv(
                kernel.norm(residual, delta, layer.attention_norm, epsilon)
            )  # (T, (H + 2 Hkv) D)
            angles = self._angles if layer.rotates else None
            if angles is not None or layer.head_norms is not None:
                kernel.rotate(qkv, heads, kv_heads, head_dim, angles, positions, layer.head_norms, epsilon)
            by_head = qkv.view(len(qkv), heads + 2 * kv_heads, head_dim)
            query, key, value = (
                by_head[:, :heads],
                by_head[:, heads : heads + kv_heads],
                by_head[:, heads + kv_heads :],
            )
            attended = attend(index, query, key, value, layer.args)  # (T, H, D)
            if index == len(self._layers) - 1:  # the last layer's further tokens need only K and V
                attended, residual = attended[rows], residual[rows]
            delta = layer.products.out(attended.reshape(len(attended), heads * head_dim), residual)
            gated = layer.products.gated(kernel.norm(residual, delta, layer.mlp_norm, epsilon))  # (T, I)
            delta = layer.products.down(gated, residual)
        return kernel.norm(residual, delta, self._last_norm, epsilon)

    def _run_calls(
        self, calls: list[LayerCall], residual: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor,
        attend: PagedAttention, backend: NativeAttention,
    ) -> None:  # fmt: skip
        """Run all layers over (T, h) in place, one call each. The rows asked for end up first."""
        count, hidden_size = residual.shape
        heads_width = self._num_heads * self._head_dim
        widths = (
            hidden_size,
            heads_width + 2 * self._num_kv_heads * self._head_dim,
            heads_width,
            self._intermediate_size,
        )
        if count * sum(widths) > len(self._room):
            self._room = self._room.new_empty(
                count * sum(widths)
            )  # kept: fresh memory would cost page faults in every step
        normed, heads, attended, gated = (
            self._room.data_ptr() + count * sum(widths[:index]) * self._room.itemsize
            for index in range(len(widths))
        )
        threads, residual_at, positions_at, angles_at = (
            num_threads(),
            residual.data_ptr(),
            positions.data_ptr(),
            self._angles.data_ptr(),
        )
        for index, (call, layer) in enumerate(zip(calls, self._layers, strict=True)):
            call.num_threads, call.num_tokens, call.residual, call.positions = (
                threads,
                count,
                residual_at,
                positions_at,
            )
            call.angles = angles_at if layer.rotates else None
            call.normed, call.heads, call.attended, call.gated = normed, heads, attended, gated
            if index == len(calls) - 1:
                call.rows, call.num_rows = rows.data_ptr(), len(rows)
            attend.wait_layer(index)
            backend.run_layer(attend.prepared, index, self._num_heads, layer.args, call)

    def _call_of(self, layer: _Layer) -> LayerCall:
        """The constant part of a layer's call."""
        products = layer.products
        assert isinstance(products, PanelLayer)
        query_norm, key_norm = (
            (None, None) if layer.head_norms is None else (norm.data_ptr() for norm in layer.head_norms)
        )
        return LayerCall(
            attention_norm=layer.attention_norm.data_ptr(), mlp_norm=layer.mlp_norm.data_ptr(),
            query_norm=query_norm, key_norm=key_norm, epsilon=self._epsilon, qkv=products.qkv.weights,
            out=products.out_product.weights, gate_up=products.gated.weights,
            down=products.down_product.weights,
        )  # fmt: skip

    def _angles_to(self, num_positions: int) -> torch.Tensor:
        """(positions, D): cosines of all planes, then sines, as transformers scales them."""
        angles = (
            torch.arange(num_positions, dtype=torch.float32, device=self._frequencies.device)[:, None]
            * self._frequencies
        )
        return torch.cat((angles.cos(), angles.sin()), dim=1) * self._angle_scale


def _why_no_panels(model: PreTrainedModel, *, int8: bool = False) -> str | None:
    if model.device.type != "cpu":
        return f"panels are for a CPU, not for {model.device}"
    config = model.config.get_text_config()
    heads_width = config.num_attention_heads * model.model.layers[0].self_attn.head_dim
    return PanelProduct.why_not(
        model.dtype, config.hidden_size, heads_width, config.intermediate_size, int8=int8
    )


def _take_layer(module: Any, args: AttentionArgs, products: LayerProducts) -> _Layer:
    attention = module.self_attn
    norms = (
        (float_weight(attention.q_norm.weight), float_weight(attention.k_norm.weight))
        if hasattr(attention, "q_norm")
        else None
    )
    return _Layer(
        attention_norm=float_weight(module.input_layernorm.weight),
        head_norms=norms,
        rotates=bool(getattr(attention, "use_rope", True)),
        args=args,
        mlp_norm=float_weight(module.post_attention_layernorm.weight),
        products=products,
    )


def _empty(module: nn.Module) -> None:
    """Free a module's weights."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(parameter.new_empty(0), requires_grad=False))
