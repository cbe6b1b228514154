"""Tiny random models of the architectures that differ where attention is concerned."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 199
WINDOW = 11  # of the sliding-window layers: shorter than the tests' contexts, no multiple of a chunk

_MODERN: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": 0, "eos_token_id": 1},
    "opt": {
        "vocab_size": VOCAB, "hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 512, "dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    },
    "llama": _MODERN,
    "mistral": {**_MODERN, "sliding_window": WINDOW},
    "qwen3": {**_MODERN, "head_dim": 16},
    "gemma2": {
        **_MODERN, "num_hidden_layers": 3, "head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0, "pad_token_id": 0,
    },
    "gpt_oss": {
        **_MODERN, "head_dim": 16, "sliding_window": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}  # fmt: skip

ARCHITECTURES = tuple(CONFIGS)


def tiny(
    architecture: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A model of 2 or 3 layers, the same for the same seed.

    Weights are drawn wider than a training start would: attention that barely looks at its keys would forgive every bug.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **{**CONFIGS[architecture], **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.3 if "embed" not in name and "wte" not in name else 1.0)
            elif "sinks" in name or "bias" in name:
                parameter.normal_(0.0, 0.5)
    return model.to(dtype).eval()
