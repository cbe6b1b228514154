"""Models that can be served pass, the others are refused with the reason, and the self-test sees planted
bugs.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from pensieve.config import ModelShape
from pensieve.errors import ModelRefused
from pensieve.runtime.loading import load_model
from pensieve.runtime.options import Options
from pensieve.worker import gate, llama, self_test
from pensieve.worker.attention import BACKENDS, AttentionArgs
from pensieve.worker.batch import BatchBuilder
from pensieve.worker.gate import admit
from pensieve.worker.model import shape_of
from pensieve.worker.refusal import FusedDiffers
from tiny_models import ARCHITECTURES, CONFIGS, VOCAB, WINDOW, tiny

LLAMA = CONFIGS["llama"]
GEMMA3N = {
    **LLAMA, "head_dim": 16, "sliding_window": 5, "num_hidden_layers": 4,
    "intermediate_size": [64, 64, 80, 80], "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 199, "laurel_rank": 8, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    "pad_token_id": 0,
}  # fmt: skip


def build(architecture: str, **config: Any) -> PreTrainedModel:
    CONFIGS.setdefault(architecture, {})
    return tiny(architecture, **config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_supported_architectures_pass(architecture: str, dtype: torch.dtype) -> None:
    model = admit(tiny(architecture, dtype=dtype), architecture)
    assert model.geometry.dtype == dtype and model.geometry.num_layers == model.shape.num_layers


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("qwen2", LLAMA),
        ("qwen2", {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("phi3", LLAMA),
        ("mixtral", {**LLAMA, "num_local_experts": 4}),
        (
            "gemma3_text",
            {
                **LLAMA,
                "head_dim": 16,
                "sliding_window": 5,
                "num_hidden_layers": 6,
                "query_pre_attn_scalar": 16,
            },
        ),
        ("olmo2", LLAMA),
        ("cohere2", {**LLAMA, "sliding_window": 5}),
        ("gpt_neox", {**LLAMA}),
        ("gemma3n_text", GEMMA3N),  # widths of MLPs differ, and layers share KV
    ],
)
def test_further_architectures_pass(architecture: str, config: dict[str, Any]) -> None:
    admit(build(architecture, **config), architecture)


@pytest.mark.parametrize(
    ("architecture", "config", "reason"),
    [
        ("bloom", {"vocab_size": 199, "hidden_size": 48, "n_layer": 2, "n_head": 4}, "attention interface"),
        (
            "qwen3_5_text",
            {**LLAMA, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
            "attention interface|linear",
        ),
        ("lfm2", {**LLAMA, "layer_types": ["conv", "full_attention"]}, "layers of type conv"),
        (
            "llama4_text",
            {
                **LLAMA,
                "head_dim": 12,
                "intermediate_size_mlp": 64,
                "num_local_experts": 2,
                "attention_chunk_size": 8,
            },
            "layers of type chunked_attention",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type dynamic",
        ),
    ],
)
def test_models_that_would_answer_wrong_are_refused(
    architecture: str, config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelRefused, match=reason) as refusal:
        admit(build(architecture, **config), "the-label")
    assert refusal.value.message.startswith("the-label cannot be served: ")


def test_longrope_is_refused_where_it_stands_for_one_kind_of_layer() -> None:
    model = tiny("llama")
    model.config.rope_parameters = {"full_attention": {"rope_type": "longrope"}}
    with pytest.raises(ModelRefused, match="rope_type longrope"):
        admit(model)


def test_a_layer_without_attention_is_refused() -> None:
    model = tiny("llama")
    del model.model.layers[1]
    model.config.num_hidden_layers = 2
    with pytest.raises(ModelRefused, match="only 1 of its 2 layers attend"):
        admit(model)


def test_a_window_other_than_the_config_promises_is_refused() -> None:
    model = tiny("gemma2")
    layer = next(
        layer.self_attn for layer in model.model.layers if layer.self_attn.sliding_window is not None
    )
    layer.sliding_window = WINDOW + 1
    with pytest.raises(ModelRefused, match=f"attends with window {WINDOW + 1}, its config says {WINDOW}"):
        admit(model)


def test_a_refused_model_is_handed_back_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    before = model.config._attn_implementation
    monkeypatch.setattr(self_test, "_compare", lambda *_: (float("nan"), 1e-4))
    with pytest.raises(ModelRefused, match="over a paged cache its logits are not finite"):
        admit(model)
    assert model.config._attn_implementation == before
    model(input_ids=torch.tensor([[1, 2]]))


def _scale(original: Any) -> Any:
    def attend(
        self: Any, prepared: Any, layer: int, query: torch.Tensor, args: AttentionArgs
    ) -> torch.Tensor:
        return original(
            self,
            prepared,
            layer,
            query,
            AttentionArgs(args.scaling * 1.5, args.sliding_window, args.softcap, args.sinks),
        )

    return attend


def _no_window(original: Any) -> Any:
    def attend(
        self: Any, prepared: Any, layer: int, query: torch.Tensor, args: AttentionArgs
    ) -> torch.Tensor:
        return original(
            self, prepared, layer, query, AttentionArgs(args.scaling, None, args.softcap, args.sinks)
        )

    return attend


def _no_extras(original: Any) -> Any:
    def attend(
        self: Any, prepared: Any, layer: int, query: torch.Tensor, args: AttentionArgs
    ) -> torch.Tensor:
        return original(self, prepared, layer, query, AttentionArgs(args.scaling, args.sliding_window))

    return attend


def _one_off(original: Any) -> Any:
    def write(self: Any, prepared: Any, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        original(self, prepared, layer, key, value.roll(1, 0))

    return write


def _no_hole(original: Any) -> Any:
    """Spans after the first of a request stand one position early."""

    def build(self: Any, spans: Any, last_token: Any) -> Any:
        batch = original(self, spans, last_token)
        batch.position_ids[0, -2:] -= 1
        return batch

    return build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("architecture", "owners", "method", "bug"),
    [
        ("llama", BACKENDS.values(), "attend", _scale),
        ("mistral", BACKENDS.values(), "attend", _no_window),
        ("gemma2", BACKENDS.values(), "attend", _no_extras),
        ("gpt_oss", BACKENDS.values(), "attend", _no_extras),
        ("opt", BACKENDS.values(), "write", _one_off),
        ("qwen3", [BatchBuilder], "build", _no_hole),
    ],
)
def test_the_self_test_sees_planted_bugs(
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    owners: Iterable[type],
    method: str,
    bug: Any,
    dtype: torch.dtype,
) -> None:
    for owner in owners:  # whichever of them serves such heads here
        monkeypatch.setattr(owner, method, bug(getattr(owner, method)))
    with pytest.raises(ModelRefused, match="its logits differ"):
        admit(tiny(architecture, dtype=dtype))


def _slightly(original: Any) -> Any:
    def attend(
        self: Any, prepared: Any, layer: int, query: torch.Tensor, args: AttentionArgs
    ) -> torch.Tensor:
        return original(
            self,
            prepared,
            layer,
            query,
            AttentionArgs(args.scaling * 1.03, args.sliding_window, args.softcap, args.sinks),
        )

    return attend


def _window_off_by_one(original: Any) -> Any:
    def attend(
        self: Any, prepared: Any, layer: int, query: torch.Tensor, args: AttentionArgs
    ) -> torch.Tensor:
        window = None if args.sliding_window is None else args.sliding_window + 1
        return original(
            self, prepared, layer, query, AttentionArgs(args.scaling, window, args.softcap, args.sinks)
        )

    return attend


def _no_sinks(original: Any) -> Any:
    def attend(
        self: Any, prepared: Any, layer: int, query: torch.Tensor, args: AttentionArgs
    ) -> torch.Tensor:
        return original(
            self, prepared, layer, query, AttentionArgs(args.scaling, args.sliding_window, args.softcap)
        )

    return attend


def _noise(original: Any) -> Any:
    """As an additive mask of small numbers would."""

    def attend(
        self: Any, prepared: Any, layer: int, query: torch.Tensor, args: AttentionArgs
    ) -> torch.Tensor:
        output = original(self, prepared, layer, query, args)
        return output + 0.01 * torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(
            output
        )

    return attend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("architecture", "bug"),
    [
        ("llama", _slightly), ("gpt2", _slightly), ("gemma2", _slightly), ("mistral", _window_off_by_one),
            ("gemma2", _window_off_by_one),
        ("gpt_oss", _no_sinks), ("qwen3", _noise), ("opt", _noise),
    ],
)  # fmt: skip
def test_small_bugs_are_seen_in_16_bits_as_in_32(
    monkeypatch: pytest.MonkeyPatch, architecture: str, bug: Any, dtype: torch.dtype
) -> None:
    for owner in BACKENDS.values():
        monkeypatch.setattr(owner, "attend", bug(owner.attend))
    with pytest.raises(ModelRefused, match="its logits differ"):
        admit(tiny(architecture, dtype=dtype))


@pytest.mark.parametrize("architecture", ["qwen3", "mistral"])
def test_small_bugs_of_the_fused_forward_alone_are_seen_in_16_bits(
    monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    take = llama._take_layer
    if architecture == "mistral":
        changed = {"sliding_window": WINDOW + 1}
    else:
        changed = {"scaling": 16**-0.5 * 1.05}
    monkeypatch.setattr(
        llama,
        "_take_layer",
        lambda module, args, products: take(module, dataclasses.replace(args, **changed), products),
    )
    model = tiny(architecture, dtype=torch.bfloat16)
    if llama.LlamaForward.why_not(model) is not None:
        pytest.skip("no fused forward here")
    with pytest.raises(FusedDiffers, match="its logits differ"):
        admit(model)


def test_a_large_model_is_computed_in_float32_over_some_layers_of_each_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(self_test, "_FLOAT_BUDGET", 1)
    admit(tiny("gemma2", dtype=torch.bfloat16))
    admit(tiny("gpt2", dtype=torch.bfloat16))
    for owner in BACKENDS.values():
        monkeypatch.setattr(owner, "attend", _window_off_by_one(owner.attend))
    with pytest.raises(ModelRefused, match=r"its logits differ .*0\.0001 would be rounding"):
        admit(tiny("gemma2", dtype=torch.bfloat16))


def test_widening_leaves_a_model_as_it_was() -> None:
    model = tiny("gemma2", dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    admit(model)
    assert all(
        tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
        for name, tensor in model.state_dict().items()
    )
    assert not any(module._forward_hooks for module in model.modules())
    own = [module.__dict__["forward"] for module in model.modules() if "forward" in module.__dict__]
    assert own and all(
        forward.__module__ == "pensieve.worker.products" for forward in own
    )  # not of the test: row counts are filled up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_that_a_module_passes_is_refused(dtype: torch.dtype) -> None:
    config = {**LLAMA, "num_key_value_heads": 4, "keep_window_size": 2048}
    model = build("doge", **config, dtype=dtype)
    with pytest.raises(ModelRefused, match="DogeAttention passes a mask of its own"):
        admit(model)


def test_an_argument_that_is_not_known_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    attention = model.model.layers[0].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: forward(*args, **kwargs, temperature=2.0)
    with pytest.raises(ModelRefused, match="LlamaAttention passes temperature to attention"):
        admit(model)


def test_an_encoder_is_said_to_be_one() -> None:
    config = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    with pytest.raises(ModelRefused, match="attends in both directions, as an encoder does"):
        admit(build("bert", **config))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_said_to_be_not_finite(value: float) -> None:
    model = tiny("llama")
    model.model.norm.weight.data[3] = value
    with pytest.raises(ModelRefused, match="its own logits are not finite in float32"):
        admit(model)


def test_overflow_of_float16_is_refused_with_the_way() -> None:
    model = tiny("llama", dtype=torch.float16)
    model.model.layers[1].mlp.down_proj.weight.data.fill_(60000)
    with pytest.raises(ModelRefused, match="not finite in float16: try --dtype bfloat16"):
        admit(model)


MLA = {
    **LLAMA, "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "config", "words"),
    [
        ("deepseek_v2", MLA, "keys and values compressed"),
        ("deepseek_v3", MLA, "keys and values compressed"),
        ("mimo_v2_flash", {**LLAMA, "head_dim": 16, "v_head_dim": 8},
            "keys have 16 numbers a head and its values 8"),
        ("gemma4_text", {}, "differ in head size"),
        ("bamba", {}, "layers of type"),
        ("mamba", {}, "layers of type|recurrent"),
        ("rwkv", {}, "recurrent or convolution state"),
        ("bloom", {}, "attention interface.*ALiBi"),
        ("llama4_text", {}, "chunked_attention"),
        ("bart", {}, "no causal decoder"),
        ("t5", {}, "no causal decoder"),
        ("vit", {}, "no causal language model"),
        ("musicgen", {}, "several models"),
        ("nemotron", {**LLAMA}, "attention interface"),
        ("phi3", {**LLAMA, "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4,
            "short_factor": [1.0] * 6, "long_factor": [2.0] * 6,
         "original_max_position_embeddings": 64, "factor": 2.0}}, "rope_type longrope"),
        ("bert", {}, "as an encoder does"),
        ("doge", {**LLAMA}, "a mask of its own"),
    ],
)  # fmt: skip
def test_a_config_alone_is_refused_in_words(architecture: str, config: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelRefused, match=words) as refused:
        gate.check_config(AutoConfig.for_model(architecture, **config), "the-label")
    assert not re.search(
        r"Error|size of tensor|shapes? \(", refused.value.message.partition("transformers cannot build")[0]
    )


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"num_key_value_heads": 0}, "num_key_value_heads is '0', where a positive whole number is needed"),
        ({"num_key_value_heads": 3}, "4 query heads, which 3 KV heads do not divide"),
        ({"hidden_size": 0}, "hidden_size is '0'"),
        ({"hidden_size": -48}, "hidden_size is '-48'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is '0'"),
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers is 1000000, more than the 2048 that are built"),
        ({"vocab_size": 10**15}, "vocab_size is 1000000000000000"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is '-1'"),
        ({"head_dim": 0}, "cannot build"),
        ({"hidden_act": "nope"}, "cannot build"),
    ],
)
def test_numbers_that_make_no_model_are_refused_before_it_is_built(
    numbers: dict[str, Any], words: str
) -> None:
    config = AutoConfig.for_model("llama", **LLAMA)
    for name, value in numbers.items():
        setattr(config, name, value)
    with pytest.raises(ModelRefused, match=re.escape(words)):
        gate.check_config(config, "the-label")


@pytest.mark.parametrize(
    "numbers",
    [{"num_attention_heads": 3}, {"num_key_value_heads": 0}, {"num_attention_heads": 0}, {"head_dim": "x"}],
)
def test_a_folder_whose_config_cannot_be_built_is_refused_at_once(
    tmp_path: Path, numbers: dict[str, Any]
) -> None:
    """As an engine's process loads it: what is refused is not tried again."""
    config = AutoConfig.for_model("llama", **LLAMA).to_dict() | {"model_type": "llama"} | numbers
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelRefused):
        load_model(
            Options(model=str(tmp_path), weights="random", dtype="float32"),
            must_talk=False,
            say=lambda what: None,
            with_text=False,
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_config_that_can_be_served_is_let_through_and_left_alone(architecture: str) -> None:
    config = tiny(architecture).config
    before = config.to_dict()
    gate.check_config(config, architecture)
    assert config.to_dict() == before


def test_a_served_model_cannot_be_called_past_us() -> None:
    model = admit(tiny("llama"), test=False)
    with pytest.raises(AssertionError, match="call it through CausalModel"):
        model.model(input_ids=torch.tensor([[1, 2]]))


def test_shapes_of_every_naming() -> None:
    shapes = {architecture: shape_of(tiny(architecture).config) for architecture in ARCHITECTURES}
    assert shapes["gpt2"] == ModelShape(2, 48, 4, 4, 12, 192, 199, 512)
    assert shapes["opt"] == ModelShape(2, 48, 4, 4, 12, 64, 199, 512)
    assert shapes["llama"] == ModelShape(2, 48, 4, 2, 12, 64, 199, 512)
    assert shapes["gemma2"] == ModelShape(3, 48, 4, 2, 16, 64, 199, 512)


def test_a_config_without_a_shape_is_refused() -> None:
    with pytest.raises(ModelRefused, match="none of hidden_size, n_embd"):
        shape_of(PretrainedConfig())
