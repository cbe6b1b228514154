"""Refuses models by their config or class alone.

Knows transformers' configs; never weights, forwards or caches.
"""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel

from pensieve.worker.refusal import refused

_LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}
_LAYER_TYPE_FIELDS = ("layer_types", "layers_block_type", "block_types", "layer_block_types")
# The largest numbers that are built. Every known model has a tenth of them or less.
_COUNTS = {
    "num_hidden_layers": 2048, "num_attention_heads": 4096, "num_key_value_heads": 4096,
    "hidden_size": 1 << 20, "vocab_size": 1 << 24, "max_position_embeddings": 1 << 30,
}  # fmt: skip
_BATCH_WIDE_ROPES = {"dynamic", "longrope"}  # these choose frequencies by the longest position of a batch


def check_words(config: PretrainedConfig, label: str) -> None:
    """Refuse by what a config says.

    Raises:
        ModelRefused: with the reason in words.
    """
    reason = _why_not(config)
    if reason is not None:
        raise refused(label, reason)


def check_class(model: PreTrainedModel, label: str) -> None:
    """Refuse by what a model's class says of the model.

    Raises:
        ModelRefused: with the reason in words.
    """
    config = model.config.get_text_config()
    name = type(model).__name__
    if getattr(model, "_is_stateful", False) and not _attends_everywhere(config):
        raise refused(
            label,
            f"{name} keeps recurrent or convolution state beside keys and values, not through the attention "
            "interface; it cannot be cached yet",
        )
    if not model._supports_attention_backend:
        how = (
            " (it biases scores by distance, ALiBi)"
            if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt")
            else ""
        )
        raise refused(
            label, f"{name} does not compute its attention through transformers' attention interface{how}"
        )


def _why_not(config: PretrainedConfig) -> str | None:
    try:
        text = config.get_text_config()
    except ValueError:
        return "it is made of several models that read or write text, and is no causal decoder"
    if config.is_encoder_decoder or not getattr(text, "is_causal", True):
        return "it is no causal decoder"
    if (reason := _wrong_number(text)) is not None:
        return reason
    if _number(text, "kv_lora_rank"):
        return (
            "it keeps keys and values compressed (multi-head latent attention, kv_lora_rank "
            f"{text.kv_lora_rank}); Pensieve caches whole heads, "
            "with keys and values of one size"
        )
    strange = {kind for field in _LAYER_TYPE_FIELDS for kind in _listed(text, field)} - _LAYER_TYPES
    if strange:
        kinds = ", ".join(sorted(strange))
        return f"it has layers of type {kinds}; only full and sliding-window attention can be cached"
    for field, what in (
        ("head_dim", "head size"),
        ("num_key_value_heads", "number of KV heads"),
        ("num_attention_heads", "number of heads"),
    ):
        try:
            values = getattr(text, field, None)
        except Exception:  # transformers' own error, for a number that differs between layers
            return f"its layers differ in {what} ({field}); all layers of a cache have the same"
        if isinstance(values, (list, tuple)) and len(set(values)) > 1:
            listed = ", ".join(map(str, sorted(set(values))))
            return f"its layers differ in {what} ({field}: {listed}); all layers of a cache have the same"
    values = _number(text, "v_head_dim")
    keys = _number(text, "head_dim") or _number(text, "qk_head_dim")
    if values and keys and values != keys:
        return (
            f"its keys have {keys} numbers a head and its values {values} (v_head_dim); "
            "Pensieve caches both at one size"
        )
    ropes = _rope_types(text) & _BATCH_WIDE_ROPES
    if ropes:
        return f"its rope_type {', '.join(sorted(ropes))} depends on the other requests of a batch"
    return None


def _wrong_number(config: PretrainedConfig) -> str | None:
    """Why a number in the config is impossible; None if all are possible.

    Building a million layers takes hours, and 0 heads would be divided by.
    """
    for name in _COUNTS:
        try:
            value = getattr(config, name, None)
        except Exception:  # a number that differs between layers is refused below
            continue
        if value is None or isinstance(value, (list, tuple)):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            return f"its {name} is {str(value)[:40]!r}, where a positive whole number is needed"
        if value > _COUNTS[name]:
            return f"its {name} is {value}, more than the {_COUNTS[name]} that are built"
    heads, kv_heads = _number(config, "num_attention_heads"), _number(config, "num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        return f"it has {heads} query heads, which {kv_heads} KV heads do not divide"
    return None


def _number(config: PretrainedConfig, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None


def _listed(config: PretrainedConfig, name: str) -> list[str]:
    values = getattr(config, name, None)
    return [value for value in values if isinstance(value, str)] if isinstance(values, (list, tuple)) else []


def _attends_everywhere(config: PretrainedConfig) -> bool:
    """Whether the config lists its layers' types, and all of them are attention."""
    kinds = {kind for field in _LAYER_TYPE_FIELDS for kind in _listed(config, field)}
    return bool(kinds) and kinds <= _LAYER_TYPES


def _rope_types(config: PretrainedConfig) -> set[str]:
    found: set[str] = set()
    for name in ("rope_parameters", "rope_scaling"):
        parameters = getattr(config, name, None)
        if not isinstance(parameters, dict):
            continue
        for part in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
            found |= {part[key] for key in ("rope_type", "type") if isinstance(part.get(key), str)}
    return found
