"""A GGUF file gives the model it was made from.

Log-probabilities against transformers' own model, eager, float32.
"""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pensieve.worker.gguf import transforms
from pensieve.worker.gguf.file import open_model
from pensieve.worker.gguf.plan import account, describe
from pensieve.worker.gguf.write import file_bytes, working_bytes, write
from tiny_gguf import VOCAB_SIZE, tensors_of, tiny, write_gguf

LONG = 300  # tokens: past every window and every original context below
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 256,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 64,
    "long_factor": [1.0, 2.0, 3.0, 5.0], "short_factor": [1.0, 1.05, 1.1, 1.2],
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, wide heads": ("llama", {"head_dim": 20}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, another base": ("llama", {"rope_parameters": {**PLAIN, "rope_theta": 500_000.0}}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, yarn with all numbers": (
        "llama", {"rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0}},
    ),
    "mixtral": ("mixtral", EXPERTS),
    "mixtral, linear": ("mixtral", {**EXPERTS, "rope_parameters": LINEAR}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "arcee": ("arcee", {}),
    "ministral3": (
        "ministral3",
        {
            "head_dim": 8, "sliding_window": None,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3},
        },
    ),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2,
            "logits_scaling": 4.0, "attention_bias": True},
    ),
    "granitemoe": ("granitemoe", {**EXPERTS, "embedding_multiplier": 3.0, "attention_multiplier": 0.2,
        "logits_scaling": 4.0}),
    "granitemoeshared": ("granitemoeshared", {**EXPERTS, "shared_intermediate_size": 24,
        "residual_multiplier": 0.5}),
    "qwen2": ("qwen2", {}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen2_moe": (
        "qwen2_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, linear": ("qwen3", {"head_dim": 16, "rope_parameters": LINEAR}),
    "qwen3_moe": (
        "qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16,
            "norm_topk_prob": True},
    ),
    "minimax_m2": ("minimax_m2", {**EXPERTS, "head_dim": 16, "rope_parameters": {**PLAIN,
        "partial_rotary_factor": 0.5}}),
    "gpt_oss": ("gpt_oss", {**EXPERTS, "head_dim": 8, "sliding_window": 16, "rope_parameters": {**YARN,
        "truncate": False}}),
    "phi3": ("phi3", {}),
    "phi3, a window": ("phi3", {"sliding_window": 40}),
    "phi3, partial": ("phi3", {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.75}}),
    "phi3, odd share": ("phi3", {"hidden_size": 80, "rope_parameters": {**PLAIN,
        "partial_rotary_factor": 0.7}}),
    "phi3, longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "gemma": ("gemma", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24,
        "tie_word_embeddings": True}),
    "gemma2, low caps": (
        "gemma2",
        {
            "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24, "tie_word_embeddings": True,
                "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24, "num_hidden_layers": 7,
            "tie_word_embeddings": True},
    ),
    "gemma3, linear in full layers": (
        "gemma3_text",
        {
            "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24, "num_hidden_layers": 7,
                "final_logit_softcapping": 8.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
                "sliding_attention": {**PLAIN, "rope_theta": 5_000.0},
            },
        },
    ),
    "starcoder2": ("starcoder2", {"rope_parameters": {**PLAIN, "rope_theta": 999_999.0}}),
    "starcoder2, no biases": ("starcoder2", {"use_bias": False}),
    "gpt2": ("gpt2", {"n_inner": 48}),
    "gpt2, tied": ("gpt2", {"n_inner": 48, "tie_word_embeddings": True}),
    "cohere": ("cohere", {"logit_scale": 0.3, "tie_word_embeddings": True}),
    "cohere, norms of queries and keys": ("cohere", {"logit_scale": 0.3, "tie_word_embeddings": True,
        "use_qk_norm": True}),
    "cohere2": ("cohere2", {"logit_scale": 0.3, "head_dim": 8, "sliding_window": 24, "num_hidden_layers": 5,
        "tie_word_embeddings": True}),
    "olmo": ("olmo", {"clip_qkv": 0.5}),
    "olmo2": ("olmo2", {}),
    "olmo3": (
        "olmo3",
        {
            "sliding_window": 24, "num_hidden_layers": 5,
            "rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN},
        },
    ),
    "phi": ("phi", {"num_key_value_heads": 4, "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}),
    "gpt_neox": ("gpt_neox", {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.25},
        "hidden_size": 64}),
    "gpt_neox, serial": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "seed_oss": ("seed_oss", {"head_dim": 16, "attention_bias": True, "attention_out_bias": False}),
}  # fmt: skip


def converted(path: Path, into: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a file as transformers loads the conversion.

    Nothing missing, left over or of another shape.
    """
    described = describe(open_model(path))
    into.mkdir()
    write(into / "model.safetensors", account(described))
    described.config.save_pretrained(into)
    model, info = AutoModelForCausalLM.from_pretrained(
        into, dtype=dtype, output_loading_info=True, attn_implementation="eager"
    )
    assert {name: list(found) for name, found in info.items() if found} == {}
    return model.eval()


def worst(ours: PreTrainedModel, theirs: PreTrainedModel, length: int) -> float:
    """The largest difference of a log-probability over random ids."""
    ids = torch.randint(VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = [
            model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1) for model in (ours, theirs)
        ]
    return float((logits[0] - logits[1]).abs().max())


@pytest.mark.parametrize("name", CASES)
def test_the_model_of_a_file_is_the_one_it_was_made_from(name: str, tmp_path: Path) -> None:
    model_type, overrides = CASES[name]
    model = tiny(model_type, **overrides)
    ours = converted(write_gguf(tmp_path / "m.gguf", model), tmp_path / "out")
    assert worst(ours, model, 9) <= 1e-4
    assert worst(ours, model, LONG) <= 1e-4


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3"])
def test_the_judge_sees_what_a_config_leaves_out(model_type: str, tmp_path: Path) -> None:
    """Were rope scaling dropped from the file, the answers would differ past the original context, and the
    test above would see it.
    """
    model = tiny(model_type, rope_parameters=LINEAR, tie_word_embeddings=model_type == "gemma2", head_dim=8)
    path = write_gguf(tmp_path / "m.gguf", model, keys={"rope.scaling.type": "none"})
    assert worst(converted(path, tmp_path / "out"), model, LONG) > 0.1


def test_llama_3_factors_become_the_rule_they_came_from(tmp_path: Path) -> None:
    model = tiny("llama", head_dim=32, rope_parameters=LLAMA3)
    plain = tiny("llama", head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    factors = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    assert len(set(factors.tolist())) > 3  # a ramp, not two steps
    path = write_gguf(tmp_path / "m.gguf", model, rope_factors=factors)
    ours = converted(path, tmp_path / "out")
    assert ours.config.rope_parameters == LLAMA3
    assert worst(ours, model, LONG) <= 1e-4


def test_factors_of_one_change_nothing(tmp_path: Path) -> None:
    model = tiny("llama")
    ours = converted(write_gguf(tmp_path / "m.gguf", model, rope_factors=torch.ones(4)), tmp_path / "out")
    assert worst(ours, model, 40) <= 1e-4


def test_longrope_factors_of_older_files_need_no_type(tmp_path: Path) -> None:
    model = tiny("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=64)
    path = write_gguf(tmp_path / "m.gguf", model, keys={"rope.scaling.type": None})
    assert worst(converted(path, tmp_path / "out"), model, LONG) <= 1e-4
    other = write_gguf(tmp_path / "other.gguf", model, keys={"rope.scaling.attn_factor": 1.5})
    assert describe(open_model(other)).config.rope_parameters["attention_factor"] == 1.5


@pytest.mark.parametrize("said", [{"rope.scale_linear": 4.0}, {"rope.scaling.factor": 4.0}])
def test_a_factor_without_a_type_is_linear_scaling(said: dict[str, float], tmp_path: Path) -> None:
    model = tiny("llama", rope_parameters=LINEAR)
    path = write_gguf(
        tmp_path / "m.gguf", model, keys={"rope.scaling.type": None, "rope.scaling.factor": None, **said}
    )
    assert worst(converted(path, tmp_path / "out"), model, LONG) <= 1e-4


@pytest.mark.parametrize("said", [{"rope.scaling.attn_factor": 1.0}, {"rope.scaling.attn_factor": 1.1386294}])
def test_yarn_factors_that_repeat_the_usual_one_change_nothing(
    said: dict[str, float], tmp_path: Path
) -> None:
    model = tiny("llama", rope_parameters=YARN)
    path = write_gguf(
        tmp_path / "m.gguf",
        model,
        keys={"rope.scaling.finetuned": True, "rope.scaling.yarn_ext_factor": 1.0, **said},
    )
    assert worst(converted(path, tmp_path / "out"), model, LONG) <= 1e-4


def test_mixtral_of_2023_with_single_experts(tmp_path: Path) -> None:
    model = tiny("mixtral", **EXPERTS)
    held = tensors_of(model)
    for layer in range(2):
        for kind in ("gate", "up", "down"):
            for e, matrix in enumerate(held.pop(f"blk.{layer}.ffn_{kind}_exps.weight")):
                held[f"blk.{layer}.ffn_{kind}.{e}.weight"] = matrix
    ours = converted(write_gguf(tmp_path / "m.gguf", model, tensors=held), tmp_path / "out")
    assert worst(ours, model, 40) <= 1e-4


def test_gate_and_up_of_experts_in_one_tensor(tmp_path: Path) -> None:
    model = tiny("mixtral", **EXPERTS)
    held = tensors_of(model)
    for layer in range(2):
        both = [held.pop(f"blk.{layer}.ffn_{kind}_exps.weight") for kind in ("gate", "up")]
        held[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate(both, axis=1)
    ours = converted(write_gguf(tmp_path / "m.gguf", model, tensors=held), tmp_path / "out")
    assert worst(ours, model, 40) <= 1e-4


def test_llama_with_biases_of_queries_keys_and_values_only(tmp_path: Path) -> None:
    model = tiny("qwen2")
    held = tensors_of(model)
    for name in held:
        if ".attn_q." in name or ".attn_k." in name:
            heads = 4 if "attn_q" in name else 2
            held[name] = held[name].reshape(heads, 2, 4, -1).swapaxes(1, 2).reshape(held[name].shape)
    path = write_gguf(tmp_path / "m.gguf", model, tensors=held, architecture="llama")
    assert worst(converted(path, tmp_path / "out"), model, 40) <= 1e-4


def test_the_query_scale_of_gemma_27b_is_known_by_its_layers(tmp_path: Path) -> None:
    model = tiny(
        "gemma2", head_dim=16, query_pre_attn_scalar=8, num_hidden_layers=46, tie_word_embeddings=True
    )
    assert describe(open_model(write_gguf(tmp_path / "m.gguf", model))).config.query_pre_attn_scalar == 8
    said = tiny("gemma2", head_dim=16, query_pre_attn_scalar=64, sliding_window=24, tie_word_embeddings=True)
    path = write_gguf(tmp_path / "said.gguf", said, keys={"attention.scale": 64**-0.5})
    assert worst(converted(path, tmp_path / "out"), said, 40) <= 1e-4


def test_an_image_encoder_in_the_file_is_left_out_and_said(tmp_path: Path) -> None:
    model = tiny(
        "gemma3_text", head_dim=16, query_pre_attn_scalar=16, sliding_window=24, tie_word_embeddings=True
    )
    held = {
        **tensors_of(model),
        "v.blk.0.attn_q.weight": np.ones((4, 4)),
        "mm.mm_input_projection.weight": np.ones((4, 4)),
    }
    path = write_gguf(
        tmp_path / "m.gguf", model, tensors=held, keys={"vision.block_count": 1, "mm.tokens_per_image": 4}
    )
    assert "image encoder" in (describe(open_model(path)).meaning.note or "")
    assert worst(converted(path, tmp_path / "out"), model, 40) <= 1e-4


@pytest.mark.parametrize(
    ("number_type", "kept"),
    [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16")],
)
def test_numbers_keep_the_type_of_the_file(number_type: str, kept: str, tmp_path: Path) -> None:
    model = tiny("llama", intermediate_size=64)
    path = write_gguf(tmp_path / "m.gguf", model, number_type=number_type)
    ours = converted(path, tmp_path / "out")
    dtype = getattr(torch, kept)
    rounded = {
        n: t.to(dtype).float() if t.ndim > 1 and kept != "float32" else t
        for n, t in model.state_dict().items()
    }
    if number_type == "Q8_0":  # what llama.cpp's own quantization makes of each matrix, row by row
        whole = {n: quantize_and_back(t) if t.ndim > 1 else t for n, t in model.state_dict().items()}
        rounded = {n: t.to(dtype).float() if t.ndim > 1 else t for n, t in whole.items()}
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, rounded[name]), name
    as_before, _ = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True
    )
    assert {t.dtype for t in as_before.state_dict().values()} == {torch.bfloat16}
    assert torch.equal(as_before.lm_head.weight, ours.lm_head.weight.to(torch.bfloat16))


def quantize_and_back(tensor: torch.Tensor) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType.Q8_0
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind))


def test_a_model_is_written_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large a matrix or a stack of experts, no more than a piece of it is in memory."""
    monkeypatch.setattr(transforms, "_PIECE", 1 << 14)
    model = tiny(
        "mixtral", num_local_experts=64, num_experts_per_tok=2, intermediate_size=512, num_hidden_layers=1
    )
    path = write_gguf(tmp_path / "m.gguf", model, number_type="Q8_0")
    parameters = account(describe(open_model(path)))
    tracemalloc.start()
    try:
        write(tmp_path / "model.safetensors", parameters)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "model.safetensors").stat().st_size == file_bytes(parameters) > 6_000_000
    assert peak < working_bytes(parameters) + 200_000 < 1_000_000
