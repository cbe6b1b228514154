"""Any Hugging Face causal language model over paged KV. Knows transformers; never plans, slots or sampling.

The one hook is transformers' attention interface: we register an attention function, and the model's own code does the rest. No mask
function is registered, so that transformers builds no mask. The model sees all tokens of a step as one row; what belongs together
is known to the attention only, which reaches it as a keyword argument of the forward.

Some models can do without their own code: see `worker.llama`. They go through the same gate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from pensieve.config import ModelShape
from pensieve.errors import ConfigError, ModelRefused
from pensieve.worker import gate
from pensieve.worker.allocator import return_freed_memory
from pensieve.worker.attention import AttentionArgs, KVGeometry
from pensieve.worker.batch import Batch
from pensieve.worker.llama import LlamaForward
from pensieve.worker.products import ONEDNN_BYTES, fill_up_modules, lay_out_modules

_INTERFACE = "pensieve"

Forward = Literal[
    "auto", "fused", "modules"
]  # fused operations where they can serve a model; only them; the model's own modules


class Attending(Protocol):
    """What stands behind the attention function during one forward."""

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, args: AttentionArgs
    ) -> torch.Tensor:
        """(T, H, D), (T, Hkv, D), (T, Hkv, D) -> (T, H, D)."""
        ...


class FusedDiffers(ModelRefused):
    """A model that fused operations do not compute as its modules do."""


class CausalModel:
    """A model that passed the gate."""

    def __init__(
        self, model: PreTrainedModel, label: str = "", *, self_test: bool = True, forward: Forward = "auto", int8: bool = False,
        keep_modules: bool = True,
    ) -> None:  # fmt: skip
        """Take over a loaded model: from now on it computes attention through us.

        Args:
            model: in evaluation mode, on its device.
            label: its name for people; the config's if empty.
            self_test: compare with the model's own eager attention on random ids.
            forward: what computes it.
            int8: weights of 8 bits, fused operations only. Answers change: see docs/performance.md for how much.
            keep_modules: False empties the modules where they are not what computes: the weights are in memory once, and `eager` is no more.

        Raises:
            ModelRefused: it would run and answer wrong; the message says why.
            FusedDiffers: fused, it would answer wrong; its modules may do better.
            ConfigError: fused operations, or weights of 8 bits, were asked for and cannot serve it.
        """
        self.label = label or model.config.name_or_path or model.config.model_type
        gate.check_words(model.config, self.label)
        gate.check_class(model, self.label)
        self.model = model.eval()
        self.config: PretrainedConfig = model.config.get_text_config()
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.shape = shape_of(model.config)
        self._fused: LlamaForward | None = None
        # Asked whether padding was forgotten, transformers would compare all ids with this, a wait for the GPU in every step.
        with contextlib.suppress(
            Exception
        ):  # (a config of its own kind may insist on a number: then it is the wait)
            model.config.pad_token_id = None
        AttentionInterface.register(_INTERFACE, _attention)
        before = model.config._attn_implementation
        model.set_attn_implementation(_INTERFACE)
        try:
            self._take_over(forward, self_test, int8, keep_modules)
            return_freed_memory()
        except (ModelRefused, ConfigError):
            model.set_attn_implementation(before)  # whoever holds it may still use it without us
            raise

    def _take_over(self, forward: Forward, self_test: bool, int8: bool, keep_modules: bool) -> None:
        """Through the gate; then as fused operations, if they are to be, through the rest of it."""
        lay_out_modules(self.model)
        geometry, args = gate.probe(self)
        self.geometry: KVGeometry = geometry
        self.attention_args: tuple[AttentionArgs, ...] = args  # how each layer attends
        expected = gate.expect(self) if self_test else None
        if int8:
            why_not = "--forward modules" if forward == "modules" else LlamaForward.why_not_int8(self.model)
            if why_not is not None:
                raise ConfigError(
                    f"{self.label} cannot have weights of 8 bits ({why_not}): choose --quantize none"
                )
        if forward != "modules":
            reason = LlamaForward.why_not(self.model)
            if reason is None:
                self._fused = LlamaForward(self.model, args, keep_modules=keep_modules, int8=int8)
            elif forward == "fused":
                raise ConfigError(
                    f"{self.label} cannot be computed by fused operations ({reason}): choose --forward auto or modules"
                )
        try:
            if expected is not None:
                gate.self_test(self, expected)
        except ModelRefused as error:
            if self._fused is None:
                raise
            raise FusedDiffers(
                f"{error.message} (fused operations; --forward modules computes it by its own)"
            ) from error
        if self._fused is None and (self.model.tp_size or 1) == 1:
            fill_up_modules(self.model)

    @property
    def library_bytes(self) -> int:
        """Main memory that libraries come to take for what they compile by the shapes they meet, beside the weights."""
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
    """The function transformers calls in each layer: q (1, H, T, D), k and v (1, Hkv, T, D) -> (1, T, H, D)."""
    if pensieve_attending is None:
        raise gate.PastUs("this model is served by Pensieve: call it through CausalModel")
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
)  # of MLPs: nothing is cached of them, they may differ between layers
# What transformers' modules pass to attention besides, and what attention over a cache need not know.
_HARMLESS = frozenset(
    {"dropout", "position_ids", "use_cache", "logits_to_keep", "output_attentions", "output_router_logits"}
)


def _refuse_arguments(module: torch.nn.Module, mask: torch.Tensor | None, more: dict[str, Any]) -> None:
    """Refuse what attention was told and would not do.

    Raises:
        NotHonoured: a mask, both directions, or an argument that is not known.
    """
    name = type(module).__name__
    if not getattr(module, "is_causal", True) or more.get("is_causal") is False:
        raise gate.NotHonoured(
            f"its {name} attends in both directions, as an encoder does: it is no causal decoder"
        )
    if mask is not None:
        raise gate.NotHonoured(
            f"its {name} passes a mask of its own to attention, which a paged cache does not apply"
        )
    if unknown := sorted(
        key
        for key, value in more.items()
        if key not in _HARMLESS and value is not None and not (key == "is_causal" and value is True)
    ):
        raise gate.NotHonoured(
            f"its {name} passes {', '.join(unknown)} to attention, which Pensieve does not know"
        )


def shape_of(config: PretrainedConfig) -> ModelShape:
    """The numbers of a model from its Hugging Face config, whatever its family calls them.

    Raises:
        ModelRefused: the config does not say them, or says one for each layer.
    """
    text = config.get_text_config()

    def first(*names: str) -> int | None:
        for name in names:
            try:
                value = getattr(text, name, None)
            except Exception as error:  # transformers' own kind, for a number that differs between layers
                raise ModelRefused(
                    f"the layers of {text.model_type!r} differ in {name}; all layers of a cache have the same"
                ) from error
            if isinstance(value, (list, tuple)):  # one for each layer
                if len(set(value)) > 1 and name not in _WIDTHS:
                    listed = ", ".join(map(str, sorted(set(value))))
                    raise ModelRefused(
                        f"the layers of {text.model_type!r} differ in {name} ({listed}); all layers of a cache have the same"
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
