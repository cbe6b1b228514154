"""Tiny random models of many architectures, written as GGUF files the way llama.cpp's converter writes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFWriter, TokenType
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MERGES = ("Ċ Ċ", "Ġ Ġ", "ĊĊ ĠĠ", "h e", "l l", "he ll", "hell o", "Ġ 1")
_VOCAB = [*SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in _MERGES)]
VOCAB_SIZE = len(_VOCAB)

_ARCHITECTURES = {
    "cohere": "command-r", "gemma3_text": "gemma3", "gpt_neox": "gptneox", "gpt_oss": "gpt-oss", "granitemoeshared": "granitemoe",
    "minimax_m2": "minimax-m2", "ministral3": "mistral3", "mixtral": "llama", "olmo3": "olmo2", "phi": "phi2", "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}  # fmt: skip
_PAIRED = {
    "arcee",
    "granite",
    "granitemoe",
    "llama",
    "mistral3",
    "olmo",
    "smollm3",
}  # rotary pairs side by side in each head
_SHIFTED_NORMS = {"gemma", "gemma2", "gemma3"}

Tensors = dict[str, npt.NDArray[Any]]


def tiny(model_type: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model in float32 in which every weight, norms and biases included, is random and matters."""
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 2, **overrides,
        },
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            wide = 0.4 if parameter.ndim > 1 and "norm" not in name else 0.2
            parameter.add_(torch.randn(parameter.shape) * wide)
    return model


def tiny_llama(*, seed: int = 0, rope: dict[str, Any] | None = None) -> LlamaForCausalLM:
    """Two layers in bfloat16; `rope` overrides the plain rotary parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(_VOCAB), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0, **(rope or {})}, rms_norm_eps=1e-5,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16
    )  # .to() would round the rotary buffers too
    assert isinstance(model, LlamaForCausalLM)
    return model.eval()


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    pre: str = "smollm",
    eot: int | None = 0,
    rope_factors: torch.Tensor | None = None,
    architecture: str | None = None,
    keys: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    tensors: Tensors | None = None,
    tokenizer: str | None = "gpt2",
    number_type: str = "F32",
    parts: int = 1,
) -> Path:
    """Write `model` and a tokenizer to `path`, and return it.

    Args:
        pre, eot, tokenizer: of the tokenizer; None leaves it out.
        rope_factors: (head_dim / 2,) for `rope_freqs.weight`.
        architecture: in place of the model's own.
        keys: of the architecture, in place of those that `keys_of` gives; None leaves one out.
        metadata: further keys, with their prefixes.
        tensors: in place of those that `tensors_of` gives.
        number_type: of matrices; vectors are F32.
        parts: files to split it into, `path` must then end in -00001-of-0000N.gguf.
    """
    architecture = architecture or architecture_of(model.config)
    said = {
        f"{architecture}.{name}": value for name, value in {**keys_of(model.config), **(keys or {})}.items()
    } | (metadata or {})
    held = dict(tensors_of(model) if tensors is None else tensors)
    if rope_factors is not None:
        held["rope_freqs.weight"] = rope_factors.float().numpy()
    names, counts = list(held), [len(held) * (i + 1) // parts for i in range(parts)]
    for number, (start, stop) in enumerate(zip([0, *counts], counts, strict=False)):
        file = path.with_name(path.name.replace("-00001-of", f"-{number + 1:05}-of"))
        writer = GGUFWriter(file, architecture)
        if number == 0:
            _add_keys(writer, said)
            if tokenizer is not None:
                _add_tokenizer(writer, tokenizer, pre, eot)
        if parts > 1:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", parts)
            writer.add_int32("split.tensors.count", len(held))
        for name in names[start:stop]:
            _add_tensor(writer, name, held[name], number_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def architecture_of(config: PretrainedConfig) -> str:
    kind: str = config.model_type
    return _ARCHITECTURES.get(kind, kind)


def keys_of(config: PretrainedConfig) -> dict[str, Any]:
    """The keys of an architecture, without its prefix, that the converter writes for this config."""

    def get(*names: str) -> Any:
        return next((v for n in names if (v := getattr(config, n, None)) is not None), None)

    kind = config.model_type
    heads = get("num_attention_heads", "n_head")
    head_dim = get("head_dim") or get("hidden_size", "n_embd") // heads
    keys = {
        "block_count": get("num_hidden_layers", "n_layer"),
        "context_length": get("max_position_embeddings", "n_positions"),
        "embedding_length": get("hidden_size", "n_embd"),
        "feed_forward_length": get("intermediate_size", "n_inner"),
        "attention.head_count": heads,
        "attention.head_count_kv": get("num_key_value_heads"),
        "attention.layer_norm_rms_epsilon": get("rms_norm_eps"),
        "attention.layer_norm_epsilon": get("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
        "attention.key_length": get("head_dim"),
        "attention.value_length": get("head_dim"),
        "expert_count": get("num_local_experts", "num_experts"),
        "expert_used_count": get("num_experts_per_tok") if get("num_local_experts", "num_experts") else None,
        **_rope_keys(config),
    }
    if kind in (
        "llama",
        "mixtral",
        "smollm3",
        "arcee",
        "granite",
        "granitemoe",
        "granitemoeshared",
        "ministral3",
    ):
        keys |= {"vocab_size": config.vocab_size, "rope.dimension_count": head_dim}
    if kind in ("qwen2_moe", "qwen3_moe"):
        keys["expert_feed_forward_length"] = config.moe_intermediate_size
    match kind:
        case "gpt2":
            keys["attention.head_count_kv"] = None
        case "qwen2_moe":
            keys["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
        case "granitemoeshared":
            keys["expert_shared_feed_forward_length"] = config.shared_intermediate_size
        case "gpt_oss" | "minimax_m2":
            keys["expert_feed_forward_length"] = config.intermediate_size
        case "olmo":
            keys |= {"attention.layer_norm_epsilon": 1e-5, "attention.clamp_kqv": config.clip_qkv}
    if kind == "minimax_m2":
        keys["expert_gating_func"] = 2
    if kind in ("gemma2", "gemma3_text"):
        keys |= {
            "attn_logit_softcapping": get("attn_logit_softcapping"),
            "final_logit_softcapping": get("final_logit_softcapping"),
        }
    if kind in ("gemma2", "gemma3_text", "gpt_oss", "cohere2", "olmo3"):
        keys["attention.sliding_window"] = config.sliding_window
    if kind == "olmo3":
        keys["attention.sliding_window_pattern"] = [
            layer == "sliding_attention" for layer in config.layer_types
        ]
    if kind == "phi3":
        keys |= {
            "attention.sliding_window": config.sliding_window or 0,
            "rope.dimension_count": _rotated(config, head_dim),
        }
        keys |= {"attention.key_length": None, "attention.value_length": None}
        keys["rope.scaling.original_context_length"] = config.original_max_position_embeddings
    if kind in ("phi", "gpt_neox", "minimax_m2"):
        keys["rope.dimension_count"] = _rotated(config, head_dim)
    if kind == "gpt_neox":
        keys["use_parallel_residual"] = config.use_parallel_residual
    if kind.startswith("granite"):
        keys |= {
            "attention.scale": config.attention_multiplier,
            "embedding_scale": config.embedding_multiplier,
        }
        keys |= {"residual_scale": config.residual_multiplier, "logit_scale": config.logits_scaling}
    if kind in ("cohere", "cohere2"):
        keys |= {"logit_scale": config.logit_scale, "rope.scaling.type": "none"}
    if kind == "ministral3":
        keys["attention.temperature_scale"] = config.rope_parameters["llama_4_scaling_beta"]
        keys["rope.scaling.yarn_log_multiplier"] = config.rope_parameters["mscale_all_dim"]
    return keys


def _rotated(config: PretrainedConfig, head_dim: int) -> int:
    return int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))


def _rope_keys(config: PretrainedConfig) -> dict[str, Any]:
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    local = rope.get("sliding_attention", {})
    rope = rope.get("full_attention", rope)
    keys: dict[str, Any] = {"rope.freq_base": rope.get("rope_theta")}
    if config.model_type == "gemma3_text" and local["rope_theta"] != 10_000.0:
        keys["rope.freq_base_swa"] = local["rope_theta"]
    match rope.get("rope_type"):
        case "linear":
            keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
        case "yarn":
            keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": rope["factor"]}
            keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
            keys["rope.scaling.yarn_attn_factor"] = rope.get("attention_factor")
            keys["rope.scaling.yarn_beta_fast"] = rope.get("beta_fast")
            keys["rope.scaling.yarn_beta_slow"] = rope.get("beta_slow")
        case "longrope":
            ratio = config.max_position_embeddings / rope["original_max_position_embeddings"]
            keys["rope.scaling.type"] = "longrope"
            keys["rope.scaling.attn_factor"] = math.sqrt(
                1 + math.log(ratio) / math.log(rope["original_max_position_embeddings"])
            )
    return keys


def tensors_of(model: PreTrainedModel) -> Tensors:
    """The tensors of a model under llama.cpp's names and in its arrangement."""
    config, architecture = model.config, architecture_of(model.config)
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    found: Tensors = {}
    seen: set[int] = set()
    for name, parameter in model.state_dict(keep_vars=True).items():
        if id(parameter) in seen:  # tied
            continue
        seen.add(id(parameter))
        tensor = parameter.detach().float()
        for source, part in _split(name, tensor, config):
            target = names.get_name(source, try_suffixes=(".weight", ".bias")) or source
            target += "" if target.endswith((".weight", ".bias")) else ".weight"
            found[target] = _arranged(target, part, config, architecture).contiguous().numpy()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        found |= {
            f"rope_factors_{length}.weight": np.array(rope[f"{length}_factor"], np.float32)
            for length in ("long", "short")
        }
    return found


def _split(name: str, tensor: torch.Tensor, config: PretrainedConfig) -> list[tuple[str, torch.Tensor]]:
    """A parameter as the tensors that are written for it; those with llama.cpp's names are not looked up any more."""
    layer = next((piece for piece in name.split(".") if piece.isdigit()), "")
    rest = name.partition(f".{layer}.")[2]
    block = f"blk.{layer}."
    if config.model_type == "gpt_oss" and "experts" in rest:
        suffix = "bias" if rest.endswith("_bias") else "weight"
        if "gate_up" in rest:
            halves = [
                (f"{block}ffn_gate_exps.{suffix}", tensor[..., ::2]),
                (f"{block}ffn_up_exps.{suffix}", tensor[..., 1::2]),
            ]
            return [(n, t.transpose(-1, -2) if suffix == "weight" else t) for n, t in halves]
        return [
            (f"{block}ffn_down_exps.{suffix}", tensor.transpose(-1, -2) if suffix == "weight" else tensor)
        ]
    if rest.endswith("experts.gate_up_proj"):
        gate, up = tensor.chunk(2, dim=1)
        return [(f"{block}ffn_gate_exps.weight", gate), (f"{block}ffn_up_exps.weight", up)]
    if rest.endswith("experts.down_proj"):
        return [(f"{block}ffn_down_exps.weight", tensor)]
    if rest.endswith("block_sparse_moe.router.weight"):
        return [(f"{block}ffn_gate_inp.weight", tensor)]
    if rest == "shared_mlp.input_linear.weight":
        gate, up = tensor.chunk(2)
        return [(f"{block}ffn_gate_shexp.weight", gate), (f"{block}ffn_up_shexp.weight", up)]
    if rest == "shared_mlp.output_linear.weight":
        return [(f"{block}ffn_down_shexp.weight", tensor)]
    if rest.endswith("e_score_correction_bias"):
        return [(f"{block}exp_probs_b.bias", tensor)]
    return [(name, tensor)]


def _arranged(name: str, tensor: torch.Tensor, config: PretrainedConfig, architecture: str) -> torch.Tensor:
    stem = name.rsplit(".", 1)[0].rsplit(".", 1)[-1]
    if architecture in _PAIRED and stem in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if stem == "attn_q" else config.num_key_value_heads
        return (
            tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
        )
    if architecture in _SHIFTED_NORMS and stem.endswith("norm"):
        return tensor + 1
    if (
        architecture == "gpt2"
        and stem in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
        and tensor.ndim == 2
    ):
        return tensor.T
    if architecture == "gptneox" and stem == "attn_qkv":
        heads = config.num_attention_heads
        return (
            tensor.reshape(heads, 3, tensor.shape[0] // heads // 3, -1).swapaxes(0, 1).reshape(tensor.shape)
        )
    if stem == "ffn_gate_inp_shexp":
        return tensor.reshape(-1)
    return tensor


def _add_keys(writer: GGUFWriter, keys: dict[str, Any]) -> None:
    for name, value in keys.items():
        match value:
            case None:
                continue
            case bool():
                writer.add_bool(name, value)
            case int():
                writer.add_uint32(name, value)
            case float():
                writer.add_float32(name, value)
            case str():
                writer.add_string(name, value)
            case list():
                writer.add_array(name, value)


def _add_tokenizer(writer: GGUFWriter, kind: str, pre: str, eot: int | None) -> None:
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(_VOCAB)
    writer.add_token_types([TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in _VOCAB])
    writer.add_token_merges(list(_MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if eot is not None:
        writer.add_eot_token_id(eot)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def _add_tensor(writer: GGUFWriter, name: str, tensor: npt.NDArray[Any], number_type: str) -> None:
    kind = gguf.GGMLQuantizationType[number_type if tensor.ndim > 1 else "F32"]
    if kind is gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, tensor.astype(np.float32))
    elif kind is gguf.GGMLQuantizationType.F16:
        writer.add_tensor(name, tensor.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(tensor.astype(np.float32), kind), raw_dtype=kind)
