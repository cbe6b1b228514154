from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from pensieve.worker.presets import BY_HUB_ID, PRESETS, Preset

PUBLISHED = {  # what the model cards say, in weights
    "gpt2": 124e6, "gpt2-medium": 355e6, "gpt2-large": 774e6, "gpt2-xl": 1.5576e9, "opt-125m": 125e6,
    "opt-1.3b": 1.3e9, "opt-6.7b": 6.7e9, "opt-13b": 13e9, "opt-30b": 30e9, "opt-66b": 66e9,
    "llama2-7b": 6.74e9, "llama2-13b": 13.02e9, "llama2-70b": 68.98e9, "llama3-8b": 8.03e9,
    "llama3-70b": 70.55e9, "llama3.2-1b": 1.236e9, "mistral-7b": 7.24e9, "qwen2.5-0.5b": 494e6,
    "qwen2.5-7b": 7.616e9, "qwen3-0.6b": 596e6, "qwen3-4b": 4.02e9, "qwen3-8b": 8.19e9, "gemma2-2b": 2.614e9,
    "gemma2-9b": 9.242e9, "smollm2-135m": 134.5e6, "smollm2-360m": 362e6, "smollm2-1.7b": 1.711e9,
    "gpt-oss-20b": 20.9e9,
}  # fmt: skip


def built(preset: Preset) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(preset.config())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds_with_its_published_size_and_its_stated_shape(name: str) -> None:
    preset = PRESETS[name]
    model = built(preset)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == preset.num_parameters
    assert count == pytest.approx(PUBLISHED.get(name, count), rel=0.02)

    config, shape = preset.config(), preset.shape
    assert config.num_hidden_layers == shape.num_layers
    assert config.hidden_size == shape.hidden_size
    assert config.num_attention_heads == shape.num_heads
    assert config.vocab_size == shape.vocab_size
    assert config.max_position_embeddings == shape.max_positions
    widths = {
        path.rsplit(".", 1)[-1]: module
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    if preset.family != "gpt2":  # one fused projection, no grouped heads
        assert widths["q_proj"].out_features == shape.num_heads * shape.head_dim
        assert widths["k_proj"].out_features == shape.num_kv_heads * shape.head_dim
    if preset.family == "opt":
        assert widths["fc1"].out_features == shape.intermediate_size
    elif "gate_proj" in widths:
        assert widths["gate_proj"].out_features == shape.intermediate_size


def test_every_published_architecture_asked_for_is_there() -> None:
    assert set(PRESETS) == set(PUBLISHED) | {"llama2-13b-gqa"}


def test_the_papers_grouped_variant_keeps_a_quarter_of_the_kv() -> None:
    full, grouped = PRESETS["llama2-13b"].shape, PRESETS["llama2-13b-gqa"].shape
    assert (
        grouped.num_layers,
        grouped.hidden_size,
        grouped.num_heads,
        grouped.num_kv_heads,
        grouped.head_dim,
    ) == (40, 5120, 40, 10, 128)
    assert full.kv_bytes_per_token(2) == 4 * grouped.kv_bytes_per_token(2) == 2 * 40 * 40 * 128 * 2
    assert PRESETS["llama2-13b-gqa"].hub_id is None


def test_windows_and_caps_are_those_of_the_published_models() -> None:
    assert PRESETS["mistral-7b"].config().sliding_window == 4096
    gemma = PRESETS["gemma2-2b"].config()
    assert (gemma.sliding_window, gemma.attn_logit_softcapping, gemma.final_logit_softcapping) == (
        4096,
        50.0,
        30.0,
    )
    assert gemma.layer_types[:2] == ["sliding_attention", "full_attention"]
    oss = PRESETS["gpt-oss-20b"].config()
    assert (oss.sliding_window, oss.num_local_experts, oss.num_experts_per_tok) == (128, 32, 4)
    assert oss.rope_parameters["rope_type"] == "yarn"
    assert PRESETS["llama3.2-1b"].config().rope_parameters["rope_type"] == "llama3"


def test_a_config_is_built_afresh_each_time() -> None:
    PRESETS["gpt2"].config().n_layer = 1
    assert PRESETS["gpt2"].config().n_layer == 12


def test_hub_ids_name_one_preset_each() -> None:
    assert len(BY_HUB_ID) == sum(preset.hub_id is not None for preset in PRESETS.values())
    assert BY_HUB_ID["qwen/qwen3-0.6b"].name == "qwen3-0.6b"
