"""Decides which models may be served: refuses at load those that would run and answer wrong.

Knows models and our attention; never plans.

Three steps. `config_checks` reads the config, and a forward on `meta` follows, which allocates nothing.
`probe` watches one forward: does every layer attend once, all with the same KV heads, with the window that
its config promises? `self_test` compares with the model's own eager attention. A model that keeps state
beside KV, or chooses positions from the whole batch, would answer wrong without an error: only this gate
protects a user from it.
"""

from __future__ import annotations

import copy
import logging

import torch
from transformers import PretrainedConfig, PreTrainedModel

from pensieve.errors import ConfigError, ModelRefused
from pensieve.worker import self_test
from pensieve.worker.allocator import return_freed_memory
from pensieve.worker.attention import AttentionArgs, KVGeometry
from pensieve.worker.config_checks import check_class, check_words
from pensieve.worker.llama import LlamaForward
from pensieve.worker.model import CausalModel, Forward, shape_of
from pensieve.worker.products import fill_up_modules, lay_out_modules
from pensieve.worker.random_weights import outline
from pensieve.worker.refusal import ForwardFails, FusedDiffers, attempt, refused

log = logging.getLogger(__name__)


def admit(
    modules: PreTrainedModel,
    label: str = "",
    *,
    test: bool = True,
    forward: Forward = "auto",
    int8: bool = False,
    keep_modules: bool = True,
) -> CausalModel:
    """Check a loaded model and make it one that computes attention through us.

    Args:
        modules: the model, in evaluation mode, on its device. A refused model is left as it was.
        label: its name in messages; if empty, the config's.
        test: compare with the model's own eager attention on random ids.
        forward: what computes it.
        int8: weights of 8 bits, with fused operations only. Answers change:
            docs/log/performance.md says by how much.
        keep_modules: False empties the modules if fused operations compute: the weights are in memory once,
            but `eager` is lost.

    Raises:
        ModelRefused: it would run and answer wrong; the message says why.
        FusedDiffers: its fused operations would answer wrong; its modules may not.
        ConfigError: fused operations, or weights of 8 bits, were asked for and cannot serve it.
    """
    label = label or modules.config.name_or_path or modules.config.model_type
    check_words(modules.config, label)
    check_class(modules, label)
    model = CausalModel(modules, label, shape_of(modules.config))
    try:
        lay_out_modules(modules)
        model.geometry, model.attention_args = probe(model)
        expected = self_test.expect(model) if test else None
        if _should_fuse(model, forward, int8):
            model.fuse(keep_modules=keep_modules, int8=int8)
        if expected is not None:
            try:
                self_test.check(model, expected)
            except ModelRefused as error:
                if not model.is_fused:
                    raise
                advice = "(fused operations; --forward modules computes it by its own)"
                raise FusedDiffers(f"{error.message} {advice}") from error
        if not model.is_fused and (modules.tp_size or 1) == 1:
            fill_up_modules(modules)
        return_freed_memory()
    except (ModelRefused, ConfigError):
        model.release()
        raise
    return model


def _should_fuse(model: CausalModel, forward: Forward, int8: bool) -> bool:
    """Whether fused operations are to compute the model.

    Raises:
        ConfigError: fused operations, or weights of 8 bits, were asked for and cannot serve it.
    """
    if int8:
        why_not = "--forward modules" if forward == "modules" else LlamaForward.why_not_int8(model.model)
        if why_not is not None:
            raise ConfigError(
                f"{model.label} cannot have weights of 8 bits ({why_not}): choose --quantize none"
            )
    if forward == "modules":
        return False
    reason = LlamaForward.why_not(model.model)
    if reason is not None and forward == "fused":
        raise ConfigError(
            f"{model.label} cannot be computed by fused operations ({reason}): choose --forward auto or "
            "modules"
        )
    return reason is None


def check_config(config: PretrainedConfig, label: str) -> None:
    """Refuse by a config alone, before anything is fetched, converted or loaded.

    Checks what the config says, then runs a forward on `meta`.

    Raises:
        ModelRefused: with the reason in words.
    """
    check_words(config, label)
    try:
        admit(outline(copy.deepcopy(config)), label, test=False, forward="modules")
    except (
        ForwardFails
    ) as error:  # what depends on data cannot be computed on meta: the probe after loading decides
        log.debug("%s on meta: %s", label, error)


def probe(model: CausalModel) -> tuple[KVGeometry, tuple[AttentionArgs, ...]]:
    """Watch one forward: what must be cached, and how each layer attends.

    Raises:
        ModelRefused: a layer does not attend, or unlike the others, or with another window than its config
            says.
    """
    seen: dict[int, KVGeometry] = {}
    seen_args: dict[int, AttentionArgs] = {}
    num_layers, label = model.shape.num_layers, model.label

    def watch(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, args: AttentionArgs
    ) -> torch.Tensor:
        if layer in seen:
            raise refused(label, f"layer {layer} attends twice in one forward")
        if (reason := _why_not_shapes(query, key, value)) is not None:
            raise refused(label, f"layer {layer} has {reason}")
        expected = _window_of(model.config, layer)
        if args.sliding_window != expected:
            raise refused(
                label, f"layer {layer} attends with window {args.sliding_window}, its config says {expected}"
            )
        seen[layer] = KVGeometry(num_layers, key.shape[1], key.shape[2], key.dtype)
        seen_args[layer] = args
        return torch.zeros_like(query)

    ids = torch.zeros((1, 2), dtype=torch.int64, device=model.device)
    positions = torch.arange(2, device=model.device)[None]
    attempt(label, lambda: model.logits(ids, positions, positions[0], watch))
    if set(seen) != set(range(num_layers)):
        raise refused(
            label,
            f"only {len(seen)} of its {num_layers} layers attend; the others keep state that cannot be "
            "cached",
        )
    if len(set(seen.values())) != 1:
        kinds = sorted({f"{kind.num_kv_heads} x {kind.head_dim}" for kind in seen.values()})
        raise refused(label, f"its layers differ in KV heads or head size ({', '.join(kinds)})")
    return seen[0], tuple(seen_args[layer] for layer in range(num_layers))


def _why_not_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why a layer's q, k, v, each (T, heads, D), cannot be cached; None if they can."""
    if key.shape[2] != value.shape[2]:
        sizes = f"keys of {key.shape[2]} numbers a head and values of {value.shape[2]}"
        return f"{sizes}; Pensieve caches both at one size"
    if key.shape[1] != value.shape[1]:
        return f"{key.shape[1]} heads of keys and {value.shape[1]} of values; Pensieve caches as many of both"
    if query.shape[2] != key.shape[2]:
        return f"queries of {query.shape[2]} numbers a head and keys of {key.shape[2]}"
    if query.shape[1] % key.shape[1]:
        return f"{query.shape[1]} query heads, which {key.shape[1]} KV heads do not divide"
    if not len(query) == len(key) == len(value):
        return f"{len(query)} queries and {len(key)} keys for as many tokens; keys must be the tokens' own"
    return None


def _window_of(config: PretrainedConfig, layer: int) -> int | None:
    """The window that a config promises for a layer; None for full attention."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[layer] == "full_attention":
        return None
    return getattr(config, "sliding_window", None)
