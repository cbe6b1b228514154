"""Named architectures with their published shapes.

Knows numbers; never weights, files, tensors or the network.

A preset says how to build a model of exactly that shape (family and Hugging Face config arguments), its sizes
and costs (`ModelShape`), and where to get real weights (hub id). Sources: each model's published
`config.json`; for `llama2-13b-gqa` the paper's own variant (§6.1: 10 KV heads, contexts up to 16,384 tokens).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pensieve.config import ModelShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True)
class Preset:
    """One named architecture."""

    name: str
    family: str  # the `model_type` of transformers
    hub_id: str | None  # where real weights are published; None if they never were
    num_parameters: int  # exact count, tied matrices once
    shape: ModelShape
    config_kwargs: Mapping[str, Any] = field(compare=False)  # arguments of the family's config class

    def config(self) -> PretrainedConfig:
        """The Hugging Face config of this architecture, built afresh (configs are mutable)."""
        from transformers import AutoConfig  # lazy: listing presets must not cost seconds of imports

        return AutoConfig.for_model(self.family, **dict(self.config_kwargs))


def _preset(
    name: str, family: str, hub_id: str | None, num_parameters: int, shape: ModelShape, kwargs: dict[str, Any]
) -> Preset:
    return Preset(name, family, hub_id, num_parameters, shape, MappingProxyType(kwargs))


def _gpt2(name: str, hub_id: str, num_parameters: int, *, layers: int, hidden: int, heads: int) -> Preset:
    shape = ModelShape(layers, hidden, heads, heads, hidden // heads, 4 * hidden, 50257, 1024)
    kwargs = {"n_layer": layers, "n_embd": hidden, "n_head": heads, "vocab_size": 50257, "n_positions": 1024}
    return _preset(name, "gpt2", hub_id, num_parameters, shape, kwargs)


def _opt(name: str, num_parameters: int, *, layers: int, hidden: int, heads: int) -> Preset:
    shape = ModelShape(layers, hidden, heads, heads, hidden // heads, 4 * hidden, 50272, 2048)
    kwargs = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
    }
    return _preset(name, "opt", f"facebook/{name}", num_parameters, shape, kwargs)


def _modern(
    name: str,
    family: str,
    hub_id: str | None,
    num_parameters: int,
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    mlp: int,
    vocab: int,
    context: int,
    rope_theta: float,
    head_dim: int | None = None,
    tied: bool = False,
    rope: dict[str, Any] | None = None,  # scaling on top of theta
    **extra: Any,
) -> Preset:
    """The Llama line: RMS norm, rotary positions, grouped KV heads, gated MLP."""
    head_dim = head_dim or hidden // heads
    shape = ModelShape(layers, hidden, heads, kv_heads, head_dim, mlp, vocab, context)
    kwargs = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta, **(rope or {})},
        **extra,
    }
    if family == "qwen2":
        del kwargs["head_dim"]  # not an argument of that family: always hidden / heads
    return _preset(name, family, hub_id, num_parameters, shape, kwargs)


def _llama2(
    name: str,
    hub_id: str | None,
    num_parameters: int,
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    mlp: int,
    context: int = 4096,
) -> Preset:
    return _modern(
        name, "llama", hub_id, num_parameters, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads,
        mlp=mlp, vocab=32000, context=context, rope_theta=10_000.0, rms_norm_eps=1e-5,
    )  # fmt: skip


def _smollm2(
    name: str,
    num_parameters: int,
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    mlp: int,
    rope_theta: float,
) -> Preset:
    size = name.rsplit("-", 1)[1].upper()
    return _modern(
        name, "llama", f"HuggingFaceTB/SmolLM2-{size}-Instruct", num_parameters, layers=layers, hidden=hidden,
        heads=heads, kv_heads=kv_heads, mlp=mlp, vocab=49152, context=8192, rope_theta=rope_theta, tied=True,
        rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip


def _gemma2(
    name: str,
    hub_id: str,
    num_parameters: int,
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    mlp: int,
) -> Preset:
    return _modern(
        name, "gemma2", hub_id, num_parameters, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads,
        mlp=mlp, head_dim=256, vocab=256_000, context=8192, rope_theta=10_000.0, tied=True, rms_norm_eps=1e-6,
        sliding_window=4096, query_pre_attn_scalar=256, attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0, hidden_activation="gelu_pytorch_tanh",
    )  # fmt: skip


_QWEN3: dict[str, Any] = {
    "vocab": 151_936,
    "context": 40_960,
    "rope_theta": 1_000_000.0,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
}
_LLAMA3: dict[str, Any] = {
    "vocab": 128_256,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128_000,
    "eos_token_id": 128_009,
}
_LLAMA32_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_GPT_OSS_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

_ALL: tuple[Preset, ...] = (
    _gpt2("gpt2", "openai-community/gpt2", 124_439_808, layers=12, hidden=768, heads=12),
    _gpt2("gpt2-medium", "openai-community/gpt2-medium", 354_823_168, layers=24, hidden=1024, heads=16),
    _gpt2("gpt2-large", "openai-community/gpt2-large", 774_030_080, layers=36, hidden=1280, heads=20),
    _gpt2("gpt2-xl", "openai-community/gpt2-xl", 1_557_611_200, layers=48, hidden=1600, heads=25),
    _opt("opt-125m", 125_239_296, layers=12, hidden=768, heads=12),
    _opt("opt-1.3b", 1_315_758_080, layers=24, hidden=2048, heads=32),
    _opt("opt-6.7b", 6_658_473_984, layers=32, hidden=4096, heads=32),
    _opt("opt-13b", 12_853_473_280, layers=40, hidden=5120, heads=40),
    _opt("opt-30b", 29_974_540_288, layers=48, hidden=7168, heads=56),
    _opt("opt-66b", 65_719_701_504, layers=64, hidden=9216, heads=72),
    _llama2("llama2-7b", "meta-llama/Llama-2-7b-chat-hf", 6_738_415_616, layers=32, hidden=4096, heads=32,
        kv_heads=32, mlp=11008),
    _llama2("llama2-13b", "meta-llama/Llama-2-13b-chat-hf", 13_015_864_320, layers=40, hidden=5120, heads=40,
        kv_heads=40, mlp=13824),
    _llama2("llama2-13b-gqa", None, 11_443_000_320, layers=40, hidden=5120, heads=40, kv_heads=10, mlp=13824,
        context=16_384),
    _llama2("llama2-70b", "meta-llama/Llama-2-70b-chat-hf", 68_976_648_192, layers=80, hidden=8192, heads=64,
        kv_heads=8, mlp=28672),
    _modern(
        "llama3-8b", "llama", "meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248,
        layers=32, hidden=4096, heads=32, kv_heads=8, mlp=14336, context=8192, **_LLAMA3,
    ),
    _modern(
        "llama3-70b", "llama", "meta-llama/Meta-Llama-3-70B-Instruct", 70_553_706_496,
        layers=80, hidden=8192, heads=64, kv_heads=8, mlp=28672, context=8192, **_LLAMA3,
    ),
    _modern(
        "llama3.2-1b", "llama", "meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400,
        layers=16, hidden=2048, heads=32, kv_heads=8, head_dim=64, mlp=8192, context=131_072, tied=True,
            rope=_LLAMA32_ROPE, **_LLAMA3,
    ),
    _modern(
        "mistral-7b", "mistral", "mistralai/Mistral-7B-Instruct-v0.1", 7_241_732_096,
        layers=32, hidden=4096, heads=32, kv_heads=8, mlp=14336, vocab=32000, context=32_768,
        rope_theta=10_000.0, rms_norm_eps=1e-5, sliding_window=4096,
    ),
    _modern(
        "qwen2.5-0.5b", "qwen2", "Qwen/Qwen2.5-0.5B-Instruct", 494_032_768,
        layers=24, hidden=896, heads=14, kv_heads=2, mlp=4864, vocab=151_936, context=32_768,
        rope_theta=1_000_000.0, rms_norm_eps=1e-6, tied=True,
    ),
    _modern(
        "qwen2.5-7b", "qwen2", "Qwen/Qwen2.5-7B-Instruct", 7_615_616_512,
        layers=28, hidden=3584, heads=28, kv_heads=4, mlp=18944, vocab=152_064, context=32_768,
        rope_theta=1_000_000.0, rms_norm_eps=1e-6,
    ),
    _modern(
        "qwen3-0.6b", "qwen3", "Qwen/Qwen3-0.6B", 596_049_920, layers=28, hidden=1024, heads=16, kv_heads=8,
            mlp=3072, tied=True, **_QWEN3,
    ),
    _modern(
        "qwen3-4b", "qwen3", "Qwen/Qwen3-4B", 4_022_468_096, layers=36, hidden=2560, heads=32, kv_heads=8,
            mlp=9728, tied=True, **_QWEN3,
    ),
    _modern("qwen3-8b", "qwen3", "Qwen/Qwen3-8B", 8_190_735_360, layers=36, hidden=4096, heads=32, kv_heads=8,
        mlp=12288, **_QWEN3),
    _gemma2("gemma2-2b", "google/gemma-2-2b-it", 2_614_341_888, layers=26, hidden=2304, heads=8, kv_heads=4,
        mlp=9216),
    _gemma2("gemma2-9b", "google/gemma-2-9b-it", 9_241_705_984, layers=42, hidden=3584, heads=16, kv_heads=8,
        mlp=14336),
    _smollm2("smollm2-135m", 134_515_008, layers=30, hidden=576, heads=9, kv_heads=3, mlp=1536,
        rope_theta=100_000.0),
    _smollm2("smollm2-360m", 361_821_120, layers=32, hidden=960, heads=15, kv_heads=5, mlp=2560,
        rope_theta=100_000.0),
    _smollm2("smollm2-1.7b", 1_711_376_384, layers=24, hidden=2048, heads=32, kv_heads=32, mlp=8192,
        rope_theta=130_000.0),
    _modern(
        "gpt-oss-20b", "gpt_oss", "openai/gpt-oss-20b", 20_914_757_184,
        layers=24, hidden=2880, heads=64, kv_heads=8, head_dim=64, mlp=2880, vocab=201_088, context=131_072,
        rope_theta=150_000.0, rope=_GPT_OSS_ROPE, rms_norm_eps=1e-5, sliding_window=128, num_local_experts=32,
            num_experts_per_tok=4,
    ),
)  # fmt: skip

PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _ALL})
BY_HUB_ID: Mapping[str, Preset] = MappingProxyType(
    {preset.hub_id.lower(): preset for preset in _ALL if preset.hub_id}
)
