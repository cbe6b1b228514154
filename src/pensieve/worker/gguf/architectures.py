"""What each architecture's keys and tensors mean to transformers.

Knows names and conventions; never tensors, except factors of rotation.

Each architecture has one function. It takes the keys that it knows (`plan` refuses all others) and gives a
config, and the tensors that llama.cpp's converter arranges differently from transformers. Tensors that only
have other names are found by llama.cpp's own table. If a file lacks a key, llama.cpp's default holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from pensieve.errors import ModelRefused
from pensieve.worker.gguf import transforms
from pensieve.worker.gguf.rope import longrope, rope_parameters
from pensieve.worker.gguf.source import Meaning, Rule, Source
from pensieve.worker.gguf.transforms import Transform
from pensieve.worker.gguf.unserved import UNSERVED, require_model

_ROTATED = (
    "attn_q",
    "attn_k",
)  # their rotary pairs are side by side in an architecture that is written as llama is
_NORMS = (
    "output_norm",
    "attn_norm",
    "ffn_norm",
    "post_attention_norm",
    "post_ffw_norm",
    "attn_q_norm",
    "attn_k_norm",
)
_NORMS_PLUS_ONE: Mapping[str, Transform] = dict.fromkeys(_NORMS, transforms.minus_one)


def meaning_of(source: Source) -> Meaning:
    """The meaning of a file.

    Raises:
        ModelRefused: not a model, or of an architecture or with numbers that cannot be converted; the message
            says which.
    """
    require_model(source.model)
    architecture = source.model.architecture
    known = _KNOWN.get(architecture)
    if known is None:
        why = UNSERVED.get(architecture, "it is not known here")
        raise ModelRefused(
            f"{source.model.name} is of the architecture {architecture!r}: {why}. Name another model, or a "
            "folder with safetensors of this "
            f"one; GGUF files of these architectures are read: {', '.join(sorted(_KNOWN))}"
        )
    if (layers := source.keys.whole("block_count")) > len(source.tensors):  # so many layers are not built
        raise source.keys.refused(f"it says {layers:,} layers and holds {len(source.tensors)} tensors")
    return known(source)


def _layer(pattern: str, sources: tuple[str, ...], transform: Transform) -> Rule:
    return Rule(
        re.compile(rf".*\.(?P<n>\d+)\.{pattern}"),
        tuple(f"blk.{{n}}.{source}" for source in sources),
        transform,
    )


def _expert_rules(source: Source, count: int, *, gating: int = 1) -> tuple[Rule, ...]:
    """Rules for experts: in stacks, as written now; gate and up in one; or one by one, as in 2023."""
    source.keys.require("expert_gating_func", gating, f"transformers chooses experts in the way {gating}")
    if source.has("ffn_gate.0.weight"):
        gate_up = tuple(f"ffn_{kind}.{e}.weight" for e in range(count) for kind in ("gate", "up"))
        down = tuple(f"ffn_down.{e}.weight" for e in range(count))
        gate_up_how, down_how = transforms.single_experts(2), transforms.single_experts(1)
    else:
        fused = source.has("ffn_gate_up_exps.weight")
        gate_up = ("ffn_gate_up_exps.weight",) if fused else ("ffn_gate_exps.weight", "ffn_up_exps.weight")
        down = ("ffn_down_exps.weight",)
        gate_up_how = down_how = transforms.experts
    return (
        _layer(r".*experts\.gate_up_proj", gate_up, gate_up_how),
        _layer(r".*experts\.down_proj", down, down_how),
    )


def _rotated(config: dict[str, Any]) -> dict[str, Transform]:
    counts = (config["num_attention_heads"], config["num_key_value_heads"])
    return {name: transforms.in_halves(count) for name, count in zip(_ROTATED, counts, strict=True)}


def _llama(source: Source) -> Meaning:
    keys = source.keys
    num_experts = keys.whole("expert_count", 0)
    config = {
        **source.common("mixtral" if num_experts else "llama"),
        "head_dim": source.head_dim,
        "rope_parameters": source.rope(),
    }
    ignored = ("rope_freqs.weight",)
    if num_experts:
        config |= {
            "num_local_experts": num_experts,
            "num_experts_per_tok": keys.whole("expert_used_count"),
            "sliding_window": None,
        }
        if (width := keys.whole("expert_feed_forward_length", 0)) > 0:
            config["intermediate_size"] = width
        return Meaning(config, _rotated(config), _expert_rules(source, num_experts), ignored)
    biased = source.has("attn_q.bias")
    if biased and not source.has("attn_output.bias"):
        config |= {
            "model_type": "qwen2",
            "use_sliding_window": False,
        }  # the same model, with biases only for queries, keys and values
    else:
        config |= {"attention_bias": biased, "mlp_bias": source.has("ffn_up.bias")}
    return Meaning(config, _rotated(config), ignored=ignored)


def _smollm3(source: Source) -> Meaning:
    config = {
        **source.common("smollm3"),
        "head_dim": source.head_dim,
        "rope_parameters": source.rope(),
        "use_sliding_window": False,
    }
    config |= {"attention_bias": source.has("attn_q.bias"), "mlp_bias": source.has("ffn_up.bias")}
    return Meaning(config, _rotated(config), ignored=("rope_freqs.weight",))


def _arcee(source: Source) -> Meaning:
    config = {**source.common("arcee"), "head_dim": source.head_dim, "rope_parameters": source.rope()}
    config |= {"attention_bias": source.has("attn_q.bias"), "mlp_bias": source.has("ffn_up.bias")}
    return Meaning(config, _rotated(config), ignored=("rope_freqs.weight",))


def _mistral3(source: Source) -> Meaning:
    scale = source.keys.number("attention.temperature_scale", 0.0)
    if not scale:
        return _llama(source)
    config = {**source.common("ministral3"), "head_dim": source.head_dim, "sliding_window": None}
    rope = source.rope()
    config["rope_parameters"] = {**rope, "llama_4_scaling_beta": scale}
    source.keys.require(
        "attention.temperature_length",
        rope.get("original_max_position_embeddings", 0),
        "transformers takes the original context",
    )
    return Meaning(config, _rotated(config), ignored=("rope_freqs.weight",))


def _granite(source: Source) -> Meaning:
    keys = source.keys
    num_experts = keys.whole("expert_count", 0)
    shared = keys.whole("expert_shared_feed_forward_length", 0)
    kind = "granite" if not num_experts else "granitemoeshared" if shared else "granitemoe"
    config = {
        **source.common(kind),
        "rope_parameters": source.rope(),
        "attention_bias": source.has("attn_q.bias"),
    }
    _require_square(source, config)
    config |= {
        "embedding_multiplier": keys.number("embedding_scale", 1.0) or 1.0,
        "residual_multiplier": keys.number("residual_scale", 1.0) or 1.0,
        "attention_multiplier": keys.number("attention.scale", 0.0) or source.head_dim**-0.5,
        "logits_scaling": keys.number("logit_scale", 1.0) or 1.0,
    }
    if not num_experts:
        return Meaning(
            {**config, "mlp_bias": source.has("ffn_up.bias")},
            _rotated(config),
            ignored=("rope_freqs.weight",),
        )
    config |= {"num_local_experts": num_experts, "num_experts_per_tok": keys.whole("expert_used_count")}
    rules = (
        *_expert_rules(source, num_experts),
        _layer(r"block_sparse_moe\.router\.weight", ("ffn_gate_inp.weight",), transforms.as_is),
    )
    if shared:
        config["shared_intermediate_size"] = shared
        gate_up = ("ffn_gate_shexp.weight", "ffn_up_shexp.weight")
        rules = (
            *rules,
            _layer(r"shared_mlp\.input_linear\.weight", gate_up, transforms.one_after_another),
            _layer(r"shared_mlp\.output_linear\.weight", ("ffn_down_shexp.weight",), transforms.as_is),
        )
    return Meaning(config, _rotated(config), rules, ("rope_freqs.weight",))


def _qwen2(source: Source) -> Meaning:
    config = {**source.common("qwen2"), "rope_parameters": source.rope(), "use_sliding_window": False}
    _require_square(source, config)
    return Meaning(config)


def _qwen3(source: Source) -> Meaning:
    config = {
        **source.common("qwen3"),
        "head_dim": source.head_dim,
        "rope_parameters": source.rope(),
        "use_sliding_window": False,
    }
    return Meaning({**config, "attention_bias": source.has("attn_q.bias")})


def _qwen2moe(source: Source) -> Meaning:
    keys = source.keys
    count = keys.whole("expert_count")
    config = {
        **source.common("qwen2_moe"),
        "rope_parameters": source.rope(),
        "use_sliding_window": False,
        "num_experts": count,
    }
    _require_square(source, config)
    config |= {
        "num_experts_per_tok": keys.whole("expert_used_count"),
        "moe_intermediate_size": keys.whole("expert_feed_forward_length"),
        "shared_expert_intermediate_size": keys.whole("expert_shared_feed_forward_length"),
        "norm_topk_prob": bool(keys.get("expert_weights_norm", False)),
        "qkv_bias": source.has("attn_q.bias"),
    }
    gate = _layer(r"mlp\.shared_expert_gate\.weight", ("ffn_gate_inp_shexp.weight",), transforms.one_row)
    return Meaning(config, {}, (*_expert_rules(source, count), gate))


def _qwen3moe(source: Source) -> Meaning:
    keys = source.keys
    count = keys.whole("expert_count")
    config = {
        **source.common(
            "qwen3_moe",
            feed_forward="feed_forward_length"
            if keys.has("feed_forward_length")
            else "expert_feed_forward_length",
        ),
        "head_dim": source.head_dim,
        "rope_parameters": source.rope(),
        "use_sliding_window": False,
        "attention_bias": source.has("attn_q.bias"),
        "num_experts": count,
        "num_experts_per_tok": keys.whole("expert_used_count"),
        "moe_intermediate_size": keys.whole("expert_feed_forward_length"),
        # llama.cpp normalises them whatever the file says
        "norm_topk_prob": bool(keys.get("expert_weights_norm", True)),
    }
    return Meaning(config, {}, _expert_rules(source, count))


def _minimax_m2(source: Source) -> Meaning:
    keys = source.keys
    count = keys.whole("expert_count")
    of_experts = "expert_feed_forward_length"
    width = of_experts if keys.has(of_experts) else "feed_forward_length"
    config = {
        **source.common("minimax_m2", feed_forward=width),
        "head_dim": source.head_dim, "rope_parameters": source.rope(partial=True), "num_local_experts": count,
        "num_experts_per_tok": keys.whole("expert_used_count"),
    }  # fmt: skip
    keys.whole("feed_forward_length", 0)  # experts only: the key is written, but has no use
    bias = _layer(r"mlp\.e_score_correction_bias", ("exp_probs_b.bias",), transforms.as_is)
    return Meaning(config, {}, (*_expert_rules(source, count, gating=2), bias))


def _gpt_oss(source: Source) -> Meaning:
    keys = source.keys
    width = "expert_feed_forward_length" if keys.has("expert_feed_forward_length") else "feed_forward_length"
    rope = source.rope()
    if rope["rope_type"] == "yarn":
        rope["truncate"] = False  # as in both published models; no key says it
    config = {
        **source.common("gpt_oss", feed_forward=width),
        "head_dim": source.head_dim,
        "rope_parameters": rope,
        "sliding_window": keys.whole("attention.sliding_window"),
        "layer_types": _windows(source, 2),
        "num_local_experts": keys.whole("expert_count"),
        "num_experts_per_tok": keys.whole("expert_used_count"),
        "attention_bias": source.has("attn_q.bias"),
    }
    keys.whole("feed_forward_length", 0)
    keys.require("expert_gating_func", 3, "transformers takes the softmax of the chosen experts (3)")
    gate_up = ("ffn_gate_exps", "ffn_up_exps")
    rules = (
        _layer(r"self_attn\.sinks", ("attn_sinks.weight",), transforms.flat),
        _layer(
            r"mlp\.experts\.gate_up_proj", tuple(f"{name}.weight" for name in gate_up), transforms.interleaved
        ),
        _layer(
            r"mlp\.experts\.gate_up_proj_bias",
            tuple(f"{name}.bias" for name in gate_up),
            transforms.interleaved,
        ),
        _layer(r"mlp\.experts\.down_proj", ("ffn_down_exps.weight",), transforms.transposed),
        _layer(r"mlp\.experts\.down_proj_bias", ("ffn_down_exps.bias",), transforms.as_is),
    )
    # The second norm of a layer is called post_attention_norm or, by other converters, ffn_norm.
    norm = "post_attention_norm.weight" if source.has("post_attention_norm.weight") else "ffn_norm.weight"
    return Meaning(
        config, {}, (*rules, _layer(r"post_attention_layernorm\.weight", (norm,), transforms.as_is))
    )


def _phi3(source: Source) -> Meaning:
    keys = source.keys
    long, short = source.vector("rope_factors_long.weight"), source.vector("rope_factors_short.weight")
    config = source.common("phi3")
    _require_square(source, config)
    original = keys.whole("rope.scaling.original_context_length", 0) or source.context
    if (long is None) != (short is None):
        raise keys.refused("it has one of rope_factors_long.weight and rope_factors_short.weight, not both")
    if long is not None and short is not None:
        if (kind := keys.get("rope.scaling.type", "longrope")) not in ("longrope", "none"):
            raise keys.refused(
                f"it has factors for long and short contexts, and its rope.scaling.type is {kind}"
            )
        keys.ignore("rope.scaling.factor")  # transformers takes the ratio of the two contexts
        plain = rope_parameters(keys, source.head_dim, source.context, partial=True, scaled=False)
        rope = longrope(
            keys, {**plain, "original_max_position_embeddings": original}, long, short, source.context
        )
        if len(long) != len(short) or 2 * len(long) != keys.whole("rope.dimension_count", source.head_dim):
            raise keys.refused(
                f"it has {len(long)} long and {len(short)} short rotary factors for half as many dimensions "
                "as it rotates"
            )
    else:
        rope = rope_parameters(keys, source.head_dim, source.context, partial=True)
    config |= {
        "rope_parameters": rope,
        "original_max_position_embeddings": original,
        "sliding_window": keys.whole("attention.sliding_window", 0) or None,
    }
    return Meaning(config, ignored=("rope_factors_long.weight", "rope_factors_short.weight"))


def _gemma(source: Source) -> Meaning:
    config = {**source.common("gemma"), "head_dim": source.head_dim, "rope_parameters": source.rope()}
    return Meaning(config, _NORMS_PLUS_ONE)


def _gemma2(source: Source) -> Meaning:
    keys = source.keys
    config = {
        **source.common("gemma2"),
        "head_dim": source.head_dim,
        "rope_parameters": source.rope(),
        "query_pre_attn_scalar": _query_scalar(source, layers_of_27b=46),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0) or None,
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0) or None,
        "sliding_window": keys.whole("attention.sliding_window", 4096),
        "layer_types": _windows(source, 2),
    }
    return Meaning(config, _NORMS_PLUS_ONE)


def _gemma3(source: Source) -> Meaning:
    keys = source.keys
    window = keys.whole("attention.sliding_window", 0)
    global_base = keys.number("rope.freq_base", keys.number("rope.global.freq_base", 1_000_000.0))
    local_base = keys.number("rope.freq_base_swa", keys.number("rope.local.freq_base", 10_000.0))
    full = {**rope_parameters(keys, source.head_dim, source.context), "rope_theta": global_base}
    layers = keys.whole("block_count")
    config = {
        **source.common("gemma3_text"),
        "head_dim": source.head_dim,
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": local_base},
        },
        "query_pre_attn_scalar": _query_scalar(source, layers_of_27b=62),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 0.0) or None,
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0.0) or None,
        "layer_types": _windows(source, 6) if window else ["full_attention"] * layers,
    }
    if window:
        config["sliding_window"] = window
    seeing = any(name.startswith(("v.", "mm.")) for name in source.tensors)
    if seeing:
        keys.ignore_under("vision.", "mm.")
    note = "the file's image encoder is left out: text only" if seeing else None
    return Meaning(config, _NORMS_PLUS_ONE, ignored=("v.", "mm.") if seeing else (), note=note)


def _starcoder2(source: Source) -> Meaning:
    config = {
        **source.common("starcoder2", norm="norm_epsilon"),
        "rope_parameters": source.rope(),
        "sliding_window": None,
    }
    _require_square(source, config)
    return Meaning({**config, "use_bias": source.has("attn_q.bias")})


def _gpt2(source: Source) -> Meaning:
    keys = source.keys
    config = {
        "model_type": "gpt2",
        "n_embd": keys.whole("embedding_length"),
        "n_inner": keys.whole("feed_forward_length"),
        "n_layer": keys.whole("block_count"),
        "n_head": keys.whole("attention.head_count"),
        "n_positions": source.context,
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        **source.vocabulary(),
    }
    keys.require(
        "attention.head_count_kv",
        config["n_head"],
        "transformers' GPT-2 has as many key heads as query heads",
    )
    return Meaning(
        config, dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), transforms.transposed)
    )


def _command_r(source: Source) -> Meaning:
    config = {**source.common("cohere", norm="layer_norm_eps"), "rope_parameters": source.rope()}
    _require_square(source, config)
    config |= {
        "logit_scale": source.keys.number("logit_scale", 1.0) or 1.0,
        "use_qk_norm": source.has("attn_q_norm.weight"),
    }
    return Meaning({**config, "attention_bias": source.has("attn_q.bias")})


def _cohere2(source: Source) -> Meaning:
    keys = source.keys
    config = {
        **source.common("cohere2", norm="layer_norm_eps"),
        "head_dim": source.head_dim,
        "rope_parameters": source.rope(),
        "logit_scale": keys.number("logit_scale", 1.0) or 1.0,
        "sliding_window": keys.whole("attention.sliding_window"),
        "layer_types": _windows(source, 4),
        "attention_bias": source.has("attn_q.bias"),
    }
    return Meaning(config)


def _olmo(source: Source) -> Meaning:
    keys = source.keys
    keys.require("attention.layer_norm_epsilon", 1e-5, "transformers' OLMo has 1e-05")
    config = {**source.common("olmo", norm="layer_norm_eps"), "rope_parameters": source.rope()}
    del config["layer_norm_eps"]
    _require_square(source, config)
    config["clip_qkv"] = keys.number("attention.clamp_kqv", 0.0) or None
    return Meaning(config, _rotated(config))


def _olmo2(source: Source) -> Meaning:
    window = source.keys.whole("attention.sliding_window", 0)
    rope = source.rope()
    config = {
        **source.common("olmo3" if window else "olmo2"),
        "rope_parameters": rope,
        "attention_bias": source.has("attn_q.bias"),
    }
    _require_square(source, config)
    if window:
        plain = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        config |= {"sliding_window": window, "layer_types": _windows(source, 4)}
        config["rope_parameters"] = {"full_attention": rope, "sliding_attention": plain}
    return Meaning(config)


def _phi2(source: Source) -> Meaning:
    config = {**source.common("phi", norm="layer_norm_eps"), "rope_parameters": source.rope(partial=True)}
    _require_square(source, config)
    return Meaning(config)


def _gptneox(source: Source) -> Meaning:
    config = {
        **source.common("gpt_neox", norm="layer_norm_eps"),
        "rope_parameters": source.rope(partial=True),
    }
    _require_square(source, config)
    config |= {"use_parallel_residual": bool(source.keys.get("use_parallel_residual", True))}
    config["attention_bias"] = source.has("attn_qkv.bias")
    return Meaning(config, {"attn_qkv": transforms.by_head(config["num_attention_heads"])})


def _seed_oss(source: Source) -> Meaning:
    config = {**source.common("seed_oss"), "head_dim": source.head_dim, "rope_parameters": source.rope()}
    config |= {
        "attention_bias": source.has("attn_q.bias"),
        "attention_out_bias": source.has("attn_output.bias"),
    }
    return Meaning({**config, "mlp_bias": source.has("ffn_up.bias")})


def _windows(source: Source, period: int) -> list[str]:
    """The kind of each layer: with a window except every `period`-th, or as the file says."""
    layers, said = (
        source.keys.whole("block_count"),
        source.keys.get("attention.sliding_window_pattern", period),
    )
    if not isinstance(said, list):
        said = [(layer + 1) % int(said) != 0 for layer in range(layers)] if int(said) > 0 else []
    if len(said) != layers:
        raise source.keys.refused(
            f"its attention.sliding_window_pattern is for {len(said)} layers, it has {layers}"
        )
    return ["sliding_attention" if windowed else "full_attention" for windowed in said]


def _query_scalar(source: Source, *, layers_of_27b: int) -> int:
    """The number by whose root Gemma divides queries.

    No key says it: llama.cpp recognises the one size that differs by its number of layers.
    """
    if (scale := source.keys.number("attention.scale", 0.0)) > 0:
        squared = round(scale**-2)
        source.keys.require("attention.scale", squared**-0.5, "transformers has the root of a whole number")
        return squared
    if source.keys.whole("block_count") == layers_of_27b:
        return source.keys.whole("embedding_length") // source.keys.whole("attention.head_count")
    return source.head_dim


def _require_square(source: Source, config: dict[str, Any]) -> None:
    """Require the usual head size: the config of these architectures has none."""
    usual = config["hidden_size"] // config["num_attention_heads"]
    if source.head_dim != usual:
        raise source.keys.refused(
            f"its heads are of size {source.head_dim}, and transformers has {usual} for this kind"
        )


_KNOWN: dict[str, Callable[[Source], Meaning]] = {
    "arcee": _arcee,
    "cohere2": _cohere2,
    "command-r": _command_r,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt-oss": _gpt_oss,
    "gpt2": _gpt2,
    "gptneox": _gptneox,
    "granite": _granite,
    "granitemoe": _granite,
    "llama": _llama,
    "minimax-m2": _minimax_m2,
    "mistral3": _mistral3,
    "olmo": _olmo,
    "olmo2": _olmo2,
    "phi2": _phi2,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen2moe": _qwen2moe,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "seed_oss": _seed_oss,
    "smollm3": _smollm3,
    "starcoder2": _starcoder2,
}
