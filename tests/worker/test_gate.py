"""Models that can be served pass, the others are refused with the reason, and the self-test sees planted bugs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel

from pensieve.config import ModelShape
from pensieve.errors import ModelRefused
from pensieve.worker import gate
from pensieve.worker.attention import BACKENDS, AttentionArgs
from pensieve.worker.batch import BatchBuilder
from pensieve.worker.model import CausalModel, shape_of
from tiny_models import ARCHITECTURES, CONFIGS, WINDOW, tiny

LLAMA = CONFIGS["llama"]


def build(architecture: str, **config: Any) -> PreTrainedModel:
    CONFIGS.setdefault(architecture, {})
    return tiny(architecture, **config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_supported_architectures_pass(architecture: str, dtype: torch.dtype) -> None:
    model = CausalModel(tiny(architecture, dtype=dtype), architecture)
    assert model.geometry.dtype == dtype and model.geometry.num_layers == model.shape.num_layers


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("qwen2", LLAMA),
        ("qwen2", {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("phi3", LLAMA),
        ("mixtral", {**LLAMA, "num_local_experts": 4}),
        ("gemma3_text", {**LLAMA, "head_dim": 16, "sliding_window": 5, "num_hidden_layers": 6, "query_pre_attn_scalar": 16}),
        ("olmo2", LLAMA),
        ("cohere2", {**LLAMA, "sliding_window": 5}),
        ("gpt_neox", {**LLAMA}),
    ],
)
def test_further_architectures_pass(architecture: str, config: dict[str, Any]) -> None:
    CausalModel(build(architecture, **config), architecture)


@pytest.mark.parametrize(
    ("architecture", "config", "reason"),
    [
        ("bloom", {"vocab_size": 199, "hidden_size": 48, "n_layer": 2, "n_head": 4}, "attention interface"),
        ("qwen3_5_text", {**LLAMA, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}, "attention interface|linear"),
        ("lfm2", {**LLAMA, "layer_types": ["conv", "full_attention"]}, "layers of type conv"),
        (
            "llama4_text",
            {**LLAMA, "head_dim": 12, "intermediate_size_mlp": 64, "num_local_experts": 2, "attention_chunk_size": 8},
            "layers of type chunked_attention",
        ),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type dynamic"),
    ],
)
def test_models_that_would_answer_wrong_are_refused(architecture: str, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelRefused, match=reason) as refusal:
        CausalModel(build(architecture, **config), "the-label")
    assert refusal.value.message.startswith("the-label cannot be served: ")


def test_longrope_is_refused_where_it_stands_for_one_kind_of_layer() -> None:
    model = tiny("llama")
    model.config.rope_parameters = {"full_attention": {"rope_type": "longrope"}}
    with pytest.raises(ModelRefused, match="rope_type longrope"):
        CausalModel(model)


def test_a_layer_without_attention_is_refused() -> None:
    model = tiny("llama")
    del model.model.layers[1]
    model.config.num_hidden_layers = 2
    with pytest.raises(ModelRefused, match="only 1 of its 2 layers attend"):
        CausalModel(model)


def test_a_window_other_than_the_config_promises_is_refused() -> None:
    model = tiny("gemma2")
    layer = next(layer.self_attn for layer in model.model.layers if layer.self_attn.sliding_window is not None)
    layer.sliding_window = WINDOW + 1
    with pytest.raises(ModelRefused, match=f"attends with window {WINDOW + 1}, its config says {WINDOW}"):
        CausalModel(model)


def test_a_refused_model_is_handed_back_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    before = model.config._attn_implementation
    monkeypatch.setattr(gate, "_compare", lambda *_: float("nan"))
    with pytest.raises(ModelRefused, match="differ from transformers' own by nan"):
        CausalModel(model)
    assert model.config._attn_implementation == before
    model(input_ids=torch.tensor([[1, 2]]))


def _scale(original: Any) -> Any:
    def attend(self: Any, prepared: Any, layer: int, query: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
        return original(self, prepared, layer, query, AttentionArgs(args.scaling * 1.5, args.sliding_window, args.softcap, args.sinks))

    return attend


def _no_window(original: Any) -> Any:
    def attend(self: Any, prepared: Any, layer: int, query: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
        return original(self, prepared, layer, query, AttentionArgs(args.scaling, None, args.softcap, args.sinks))

    return attend


def _no_extras(original: Any) -> Any:
    def attend(self: Any, prepared: Any, layer: int, query: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
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
    monkeypatch: pytest.MonkeyPatch, architecture: str, owners: Iterable[type], method: str, bug: Any, dtype: torch.dtype
) -> None:
    for owner in owners:  # whichever of them serves such heads here
        monkeypatch.setattr(owner, method, bug(getattr(owner, method)))
    with pytest.raises(ModelRefused, match="its logits differ"):
        CausalModel(tiny(architecture, dtype=dtype))


def test_a_served_model_cannot_be_called_past_us() -> None:
    model = CausalModel(tiny("llama"), self_test=False)
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
