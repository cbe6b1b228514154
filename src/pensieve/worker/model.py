"""Any Hugging Face causal language model over paged KV. Knows transformers; never plans, slots or sampling.

The only hook is transformers' attention interface: we register an attention function, and the model's own
code does the rest. We register no mask function, so transformers builds no mask. The model sees all tokens of
a step as one row. Only the attention knows which tokens belong together; it reaches our function as a keyword
argument of the forward.

Some models do not need their own code: see `worker.llama`. They pass the same gate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from pensieve.config import ModelShape
from pensieve.errors import ModelRefused
from pensieve.worker.attention import AttentionArgs, KVGeometry
from pensieve.worker.batch import Batch
from pensieve.worker.llama import LlamaForward
from pensieve.worker.products import ONEDNN_BYTES
from pensieve.worker.refusal import AttentionBypassed, UnsupportedAttention

_INTERFACE = "pensieve"

Forward = Literal[
    "auto", "fused", "modules"
]  # "auto": fused operations if they can serve the model; "modules": the model's own


class Attending(Protocol):
    """The attention of one forward, which the attention function calls."""

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, args: AttentionArgs
    ) -> torch.Tensor:
        """(T, H, D), (T, Hkv, D), (T, Hkv, D) -> (T, H, D)."""
        ...


class CausalModel:
    """A causal language model that computes its attention through us.

    `gate.admit` makes those that may be served.
    """

    geometry: KVGeometry  # as the gate's probe saw it
    attention_args: tuple[AttentionArgs, ...]  # how each layer attends, as the probe saw it

    def __init__(self, model: PreTrainedModel, label: str, shape: ModelShape) -> None:
        """Take over a loaded model's attention until `release`.

        Args:
            model: in evaluation mode, on its device.
            label: its name in messages.
            shape: see `shape_of`.
        """
        self.label, self.shape = label, shape
        self.model = model.eval()
        self.config: PretrainedConfig = model.config.get_text_config()
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self._fused: LlamaForward | None = None
        # To warn of forgotten padding, transformers compares all ids with this: a wait for the GPU in every
        # step.
        with contextlib.suppress(Exception):  # a config class that insists on a number keeps it, and waits
            model.config.pad_token_id = None
        AttentionInterface.register(_INTERFACE, _attention)
        self._attention_before: str = model.config._attn_implementation
        model.set_attn_implementation(_INTERFACE)

    def fuse(self, *, keep_modules: bool, int8: bool) -> None:
        """Compute by fused operations from now on; see `gate.admit` for the arguments."""
        self._fused = LlamaForward(self.model, self.attention_args, keep_modules=keep_modules, int8=int8)

    def release(self) -> None:
        """Give the modules back with the attention they came with."""
        self.model.set_attn_implementation(self._attention_before)

    @property
    def is_fused(self) -> bool:
        """Whether fused operations compute, not the model's modules."""
        return self._fused is not None

    @property
    def library_bytes(self) -> int:
        """Main memory that oneDNN comes to take beside the weights, for primitives compiled by shape."""
        by_onednn = self.dtype.itemsize == 2 if self._fused is None else self._fused.by_onednn
        return ONEDNN_BYTES if by_onednn and self.device.type == "cpu" else 0

    @property
    def forward_name(self) -> str:
        """What computes: "fused", "fused int8" or "modules"."""
        if self._fused is None:
            return "modules"
        return "fused int8" if self._fused.int8 else "fused"

    def forward(self, batch: Batch, attending: Attending) -> torch.Tensor:
        """Logits of the last token of each emitting span, (E, V), in the model's dtype."""
        return self.logits(batch.input_ids, batch.position_ids, batch.logit_rows, attending)

    def logits(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, rows: torch.Tensor, attending: Attending
    ) -> torch.Tensor:
        """Logits of some tokens of a row.

        Args:
            input_ids: (1, T).
            position_ids: (1, T).
            rows: (E,), which of the T.
            attending: called once in each layer.
        """
        if self._fused is not None:
            return self._fused.logits(input_ids, position_ids, rows, attending)
        with torch.inference_mode():
            output = self.model(
                input_ids=input_ids,
                position_ids=position_ids,
                use_cache=False,
                logits_to_keep=rows,
                pensieve_attending=attending,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    @contextlib.contextmanager
    def eager(self) -> Iterator[PreTrainedModel]:
        """The model as transformers computes it, for comparisons. Its modules must have been kept."""
        self.model.set_attn_implementation("eager")
        try:
            yield self.model
        finally:
            self.model.set_attn_implementation(_INTERFACE)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    pensieve_attending: Attending | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls in each layer.

    q (1, H, T, D), k and v (1, Hkv, T, D) -> (1, T, H, D).
    """
    if pensieve_attending is None:
        raise AttentionBypassed("this model is served by Pensieve: call it through CausalModel")
    if (
        attention_mask is not None
        or not _HARMLESS.issuperset(more)
        or not (module.is_causal if "is_causal" in module.__dict__ else True)
    ):
        _refuse_arguments(module, attention_mask, more)
    layer: int = module.layer_idx  # type: ignore[assignment]
    args = AttentionArgs(
        query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux
    )
    output = pensieve_attending(
        layer, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), args
    )
    return output[None], None


_WIDTHS = (
    "intermediate_size",
    "ffn_dim",
    "n_inner",
)  # of MLPs: they are not cached, and may differ between layers
# Arguments that transformers' modules pass to attention and that attention over a cache may ignore.
_HARMLESS = frozenset(
    {"dropout", "position_ids", "use_cache", "logits_to_keep", "output_attentions", "output_router_logits"}
)


def _refuse_arguments(module: torch.nn.Module, mask: torch.Tensor | None, more: dict[str, Any]) -> None:
    """Refuse arguments that our attention would not honour.

    Raises:
        UnsupportedAttention: a mask, attention in both directions, or an unknown argument.
    """
    name = type(module).__name__
    if not getattr(module, "is_causal", True) or more.get("is_causal") is False:
        raise UnsupportedAttention(
            f"its {name} attends in both directions, as an encoder does: it is no causal decoder"
        )
    if mask is not None:
        raise UnsupportedAttention(
            f"its {name} passes a mask of its own to attention, which a paged cache does not apply"
        )
    if unknown := sorted(
        key
        for key, value in more.items()
        if key not in _HARMLESS and value is not None and not (key == "is_causal" and value is True)
    ):
        raise UnsupportedAttention(
            f"its {name} passes {', '.join(unknown)} to attention, which Pensieve does not know"
        )


def shape_of(config: PretrainedConfig) -> ModelShape:
    """The numbers of a model from its Hugging Face config, by whatever names its family uses.

    Raises:
        ModelRefused: the config lacks one, or has different ones for different layers.
    """
    text = config.get_text_config()

    def first(*names: str) -> int | None:
        for name in names:
            try:
                value = getattr(text, name, None)
            except Exception as error:  # transformers' own error, for a number that differs between layers
                raise ModelRefused(
                    f"the layers of {text.model_type!r} differ in {name}; all layers of a cache have the same"
                ) from error
            if isinstance(value, (list, tuple)):  # one for each layer
                if len(set(value)) > 1 and name not in _WIDTHS:
                    listed = ", ".join(map(str, sorted(set(value))))
                    raise ModelRefused(
                        f"the layers of {text.model_type!r} differ in {name} ({listed}); all layers of a "
                        "cache have the same"
                    )
                value = max(value, default=None)
            if value is not None:
                return int(value)
        return None

    def need(*names: str) -> int:
        value = first(*names)
        if value is None:
            raise ModelRefused(
                f"the config of {text.model_type!r} has none of {', '.join(names)}: its shape is unknown"
            )
        return value

    hidden, heads = need("hidden_size", "n_embd"), need("num_attention_heads", "n_head")
    return ModelShape(
        num_layers=need("num_hidden_layers", "n_layer"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=first("num_key_value_heads") or heads,
        head_dim=first("head_dim") or hidden // heads,
        intermediate_size=first(*_WIDTHS) or 4 * hidden,
        vocab_size=need("vocab_size"),
        max_positions=need("max_position_embeddings", "n_positions"),
    )
