"""The forward of the Llama family on a CPU, in fewer and larger operations. Knows transformers' modules and weights; never plans, slots or sampling.

Llama, Mistral, Qwen2, Qwen3 and SmolLM3 are one model with small differences: RMS norms, rotary positions (in SmolLM3 not in every layer), grouped
queries (normalised in Qwen3), a gated MLP. Run by its modules, a decode step spends more time between its matrix products than in them. Here q, k and v
are one product, gate and up another; weights lie as oneDNN reads them fastest; what lies between the products is one kernel each. Rounded less often
than by the modules, results differ from theirs within the tolerance of `worker.gate`, whose self-test stands between a mistake here and a user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pensieve.worker import rows as kernels
from pensieve.worker.attention import AttentionArgs
from pensieve.worker.rows import Rows, float_weight

_FAMILY = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM"}
_USUAL_ROWS = 64  # oneDNN is told how many rows to expect when it lays weights out; on our machines the answer serves all sizes
_FIRST_POSITIONS = 4096  # rows of angles made at once; more when a longer context comes

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, AttentionArgs], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's weights. Norms are float32."""

    attention_norm: torch.Tensor  # (h,)
    qkv: _Product
    head_norms: tuple[torch.Tensor, torch.Tensor] | None  # (D,) of queries and of keys
    rotates: bool
    args: AttentionArgs
    out: _Product
    mlp_norm: torch.Tensor  # (h,)
    gate_up: _Product
    down: _Product


class LlamaForward:
    """A model of the family, ready to compute. Takes its weights from the modules, layer by layer."""

    def __init__(self, model: PreTrainedModel, args: Sequence[AttentionArgs], *, keep_modules: bool) -> None:
        """Lay the weights out.

        Args:
            model: one that `why_not` has nothing against.
            args: how each layer attends.
            keep_modules: leave the modules as they are, at the price of all weights twice; else they are emptied and compute no more.
        """
        config, decoder = model.config.get_text_config(), model.model
        assert len(args) == len(decoder.layers)
        self._num_heads, self._num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim: int = decoder.layers[0].self_attn.head_dim
        self._epsilon: float = config.rms_norm_eps
        self._rows = Rows(model.dtype)
        self._embedding: torch.Tensor = decoder.embed_tokens.weight.detach()
        self._head = _Product([model.lm_head])
        self._layers: list[_Layer] = []
        for index, module in enumerate(decoder.layers):
            self._layers.append(_take_layer(module, args[index]))
            if not keep_modules:
                _empty(module)
        if not keep_modules:
            _empty(model.lm_head)  # the embedding, where it is the same, stays: its rows are looked up
        self._last_norm = float_weight(decoder.norm.weight)
        rotary = decoder.rotary_emb
        self._frequencies: torch.Tensor = rotary.inv_freq.detach().float()
        self._angle_scale = float(rotary.attention_scaling)
        self._angles = self._angles_to(min(_FIRST_POSITIONS, config.max_position_embeddings))

    @staticmethod
    def why_not(model: PreTrainedModel) -> str | None:
        """Why this model must be computed by its modules; None: it need not."""
        config = model.config.get_text_config()
        if type(model).__name__ not in _FAMILY:
            return f"{type(model).__name__} is not of the Llama family"
        if config.hidden_act != "silu":
            return f"its MLP has {config.hidden_act!r} for a gate, not 'silu'"
        if strange := {type(module).__name__ for module in model.modules() if hasattr(module, "in_features")} - {"Linear"}:
            return f"its products are of type {', '.join(sorted(strange))}"
        if 2 * len(model.model.rotary_emb.inv_freq) != model.model.layers[0].self_attn.head_dim:
            return "only a part of each head is rotated"
        return kernels.why_not(model.dtype, model.device)

    def logits(self, input_ids: torch.Tensor, position_ids: torch.Tensor, rows: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Logits of some tokens of a row; see `CausalModel.logits`."""
        with torch.inference_mode():
            return self._logits(input_ids[0], position_ids[0], rows, attend)

    def _logits(self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, attend: Attend) -> torch.Tensor:
        kernel, heads, kv_heads, head_dim, epsilon = self._rows, self._num_heads, self._num_kv_heads, self._head_dim, self._epsilon
        if (length := int(positions.max()) + 1) > len(self._angles):
            self._angles = self._angles_to(max(length, 2 * len(self._angles)))
        residual = nn.functional.embedding(ids, self._embedding)  # (T, h)
        delta: torch.Tensor | None = None
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(kernel.norm(residual, delta, layer.attention_norm, epsilon))  # (T, (H + 2 Hkv) D)
            angles = self._angles if layer.rotates else None
            if angles is not None or layer.head_norms is not None:
                kernel.rotate(qkv, heads, kv_heads, head_dim, angles, positions, layer.head_norms, epsilon)
            by_head = qkv.view(len(qkv), heads + 2 * kv_heads, head_dim)
            query, key, value = by_head[:, :heads], by_head[:, heads : heads + kv_heads], by_head[:, heads + kv_heads :]
            attended = attend(index, query, key, value, layer.args)  # (T, H, D)
            if index == len(self._layers) - 1:  # what is not asked for needs only to be attended to
                attended, residual = attended[rows], residual[rows]
            delta = layer.out(attended.reshape(len(attended), heads * head_dim))
            gate_up = layer.gate_up(kernel.norm(residual, delta, layer.mlp_norm, epsilon))  # (T, 2 I)
            delta = layer.down(kernel.gate(gate_up))
        return self._head(kernel.norm(residual, delta, self._last_norm, epsilon))  # (E, V)

    def _angles_to(self, num_positions: int) -> torch.Tensor:
        """(positions, D): cosines of all planes, then sines, as transformers scales them."""
        angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * self._frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=1) * self._angle_scale


class _Product:
    """x -> x W^T + b for the weights of some linear modules, one below the other; laid out for oneDNN where this CPU has what it takes."""

    __slots__ = ("_bias", "_num_out", "_packed", "_weight")

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        weight = torch.cat([module.weight.detach() for module in modules])  # (out, in)
        biases = [module.bias for module in modules]
        self._bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        self._num_out = len(weight)
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


_mkldnn: Any = torch.ops.mkldnn
_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_linear: Any = _mkldnn._linear_pointwise.default if _HAS_ONEDNN else None


def _can_pack(dtype: torch.dtype) -> bool:
    if not _HAS_ONEDNN:
        return False
    return dtype == torch.float32 or bool(_mkldnn._is_mkldnn_bf16_supported())


def _take_layer(module: Any, args: AttentionArgs) -> _Layer:
    attention, mlp = module.self_attn, module.mlp
    norms = (float_weight(attention.q_norm.weight), float_weight(attention.k_norm.weight)) if hasattr(attention, "q_norm") else None
    return _Layer(
        attention_norm=float_weight(module.input_layernorm.weight),
        qkv=_Product([attention.q_proj, attention.k_proj, attention.v_proj]),
        head_norms=norms,
        rotates=bool(getattr(attention, "use_rope", True)),
        args=args,
        out=_Product([attention.o_proj]),
        mlp_norm=float_weight(module.post_attention_layernorm.weight),
        gate_up=_Product([mlp.gate_proj, mlp.up_proj]),
        down=_Product([mlp.down_proj]),
    )


def _empty(module: nn.Module) -> None:
    """Let go of a module's weights."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(parameter.new_empty(0), requires_grad=False))
