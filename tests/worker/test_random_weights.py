from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pensieve.errors import ModelRefused
from pensieve.worker import random_weights
from pensieve.worker.random_weights import available_bytes, build, count_parameters, require_weights_fit

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 211,
    "max_position_embeddings": 64,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96}
FAMILIES = {
    "gpt2": SMALL,
    "opt": {**SMALL, "word_embed_proj_dim": 64, "ffn_dim": 96},
    "llama": GROUPED,
    "qwen3": {**GROUPED, "tie_word_embeddings": True},
    "gemma2": {**GROUPED, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gpt_oss": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_are_finite_varied_and_start_norms_as_the_model_does(family: str) -> None:
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model = build(config, torch.float32, "cpu")
    usual = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        if parameter.ndim >= 2:
            assert parameter.std() == pytest.approx(0.02, rel=0.15), name
        elif "sinks" not in name and "router" not in name:  # these the model starts at random too
            assert torch.equal(parameter, usual.get_parameter(name)), name
    for name, buffer in usual.named_buffers():  # rotary frequencies above all
        assert torch.equal(buffer, model.get_buffer(name)), name
    logits = model(torch.arange(12)[None]).logits
    assert torch.isfinite(logits).all()
    assert logits.abs().max() < 50
    assert logits.std() > 0.01
    rows = model.get_input_embeddings().weight
    assert torch.unique(rows, dim=0).shape == rows.shape


def test_the_same_seed_gives_the_same_weights_and_disturbs_no_generator() -> None:
    config = AutoConfig.for_model("llama", **GROUPED)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, two, other = (build(config, torch.bfloat16, "cpu", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    first, second = (one.model.layers[i].mlp.up_proj.weight for i in (0, 1))
    assert not torch.equal(first, second)
    assert {p.dtype for p in one.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in one.parameters())
    assert not one.training


def test_tied_matrices_stay_tied() -> None:
    model = build(AutoConfig.for_model("qwen3", **FAMILIES["qwen3"]), torch.float32, "cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert count_parameters(model.config) == sum(p.numel() for p in model.parameters())


def test_tiling_covers_a_matrix_larger_than_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_weights, "_BLOCK_NUMBERS", 1009)
    model = build(AutoConfig.for_model("llama", **GROUPED), torch.float32, "cpu")
    assert all(p.std() == pytest.approx(0.02, rel=0.15) for p in model.parameters() if p.ndim >= 2)
    rows = model.lm_head.weight
    assert torch.unique(rows, dim=0).shape == rows.shape


def test_a_model_that_does_not_fit_is_refused_with_both_sizes_and_ways_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(random_weights, "available_bytes", lambda device: 8 << 30)
    require_weights_fit("fits", 3_000_000_000, torch.bfloat16, "cpu")
    with pytest.raises(
        ModelRefused, match=r"12\.0 GB in float32, 8\.6 GB of memory are available.*--dtype bfloat16"
    ) as refused:
        require_weights_fit("big", 3_000_000_000, torch.float32, "cpu")
    assert refused.value.http_status == 400
    monkeypatch.setattr(random_weights, "available_bytes", lambda device: None)
    require_weights_fit("unknown", 10**15, torch.float32, "cpu")


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ModelRefused, match="'t5'"):
        count_parameters(AutoConfig.for_model("t5"))


def fake_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cgroup: str) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable:    8000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text(cgroup)
    (tmp_path / "cgroup").mkdir()
    monkeypatch.setattr(random_weights, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(random_weights, "_CGROUP", tmp_path / "cgroup")
    return tmp_path / "cgroup"


def group(folder: Path, limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(limit)
    (folder / "memory.current").write_text(str(used))
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")


def test_memory_is_what_the_tightest_control_group_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = fake_system(tmp_path, monkeypatch, "0::/user/app\n")
    assert available_bytes() == 8000 * 1024
    group(root / "user/app", "max", 10, 0)
    assert available_bytes() == 8000 * 1024
    group(root / "user", "1000000", 600_000, 100_000)
    assert available_bytes() == 500_000


def test_memory_in_a_container_that_sees_only_its_own_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = fake_system(tmp_path, monkeypatch, "0::/of/the/host\n")
    group(root, "2000", 1500, 0)
    assert available_bytes() == 500


def test_memory_under_a_group_of_version_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fake_system(tmp_path, monkeypatch, "5:cpu,memory:/app\n") / "memory/app"
    root.mkdir(parents=True)
    (root / "memory.limit_in_bytes").write_text("3000\n")
    (root / "memory.usage_in_bytes").write_text("1000\n")
    (root / "memory.stat").write_text("total_inactive_file 250\n")
    assert available_bytes() == 2250
