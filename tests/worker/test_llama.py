"""Fused operations against the modules they stand in for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pensieve.core.plan import BlockTableUpdate, Span
from pensieve.errors import ConfigError
from pensieve.worker import kernel
from pensieve.worker.attention import AttentionArgs, PagedAttention, make_backend
from pensieve.worker.attention.native import NativeAttention
from pensieve.worker.batch import BatchBuilder
from pensieve.worker.gate import admit
from pensieve.worker.kv_store import KVStore
from pensieve.worker.llama import LlamaForward
from pensieve.worker.model import CausalModel
from pensieve.worker.products import PanelProduct
from pensieve.worker.refusal import FusedDiffers
from tiny_models import _MODERN, CONFIGS, WINDOW, tiny

pytestmark = pytest.mark.skipif(not kernel.levels(), reason="the kernels are not built")
_ROPE = {"rope_theta": 10_000.0, "original_max_position_embeddings": 64, "factor": 8.0}
FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, heads of 64, one KV head": ("llama", {"head_dim": 64, "num_key_value_heads": 1}),
    "llama, odd sizes": (
        "llama",
        {"hidden_size": 52, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 70},
    ),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama 3's positions": (
        "llama",
        {
            "rope_parameters": {
                **_ROPE,
                "rope_type": "llama3",
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        },
    ),
    "yarn's positions": ("llama", {"rope_parameters": {**_ROPE, "rope_type": "yarn"}}),
    "mistral, windows": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3, normalised heads": ("qwen3", {}),
    "smollm3, a layer without positions": ("smollm3", {"no_rope_layers": [1, 0]}),
}
every_member = pytest.mark.parametrize("member", list(FAMILY))


@pytest.fixture(autouse=True)
def more_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("qwen2", "smollm3"):
        monkeypatch.setitem(CONFIGS, name, _MODERN)


def make(member: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    name, changes = FAMILY[member]
    model = tiny(name, 0, dtype, **changes)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:  # all ones would forgive a weight that is left out
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    return model


def dense(
    layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, args: AttentionArgs
) -> torch.Tensor:
    """Causal attention of one sequence, written out."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query.double(), key.double()) * args.scaling
    distance = torch.arange(len(query))[:, None] - torch.arange(len(key))[None]
    visible = (distance >= 0) & (distance < (args.sliding_window or 1 << 30))
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value.double()).to(query.dtype)


def logits_of(model: CausalModel, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return model.logits(ids, torch.arange(ids.shape[1])[None], rows, dense)


@every_member
def test_same_logits_as_the_modules(member: str) -> None:
    model = make(member)
    fused = admit(model, forward="fused", test=False)
    assert fused.forward_name == "fused"
    ids, rows = torch.arange(3, 60)[None], torch.tensor([0, 13, 56])
    with fused.eager() as eager, torch.inference_mode():
        expected = eager(input_ids=ids, use_cache=False).logits[0, rows]
    torch.testing.assert_close(
        logits_of(fused, ids, rows), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )


@every_member
def test_in_bfloat16_it_is_no_further_from_the_truth_than_the_modules(member: str) -> None:
    """Both round; ours less often."""
    exact, rounded = make(member), make(member, torch.bfloat16)
    for target, source in zip(exact.parameters(), rounded.parameters(), strict=True):
        target.data.copy_(source.data.float())
    ids, rows = torch.arange(3, 60)[None], torch.arange(57)
    truth = logits_of(admit(exact, forward="modules", test=False), ids, rows).double()
    ours = logits_of(admit(rounded, forward="fused", test=False), ids, rows).double()
    theirs = logits_of(admit(rounded, forward="modules", test=False), ids, rows).double()
    assert (ours - truth).square().mean() < 1.2 * (theirs - truth).square().mean()


@every_member
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gate_lets_it_pass(member: str, dtype: torch.dtype) -> None:
    assert admit(make(member, dtype), member).forward_name == "fused"


def test_contexts_longer_than_the_angles_made_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pensieve.worker.llama._FIRST_POSITIONS", 4)
    test_same_logits_as_the_modules("llama")


def test_no_token_asked_for() -> None:
    model = admit(make("llama"), test=False)
    assert logits_of(model, torch.arange(5)[None], torch.empty(0, dtype=torch.int64)).shape == (
        0,
        model.shape.vocab_size,
    )


def test_emptied_modules_leave_the_fused_ones_whole() -> None:
    ids, rows = torch.arange(3, 30)[None], torch.tensor([26])
    expected = logits_of(admit(make("llama, tied"), test=False), ids, rows)
    model = admit(make("llama, tied"), keep_modules=False)
    assert torch.equal(logits_of(model, ids, rows), expected)
    left = sum(parameter.numel() for parameter in model.model.parameters())
    assert left == sum(
        p.numel()
        for n, p in make("llama, tied").named_parameters()
        if "embed" in n or n == "model.norm.weight"
    )


PANELS = (
    bool(kernel.levels()) and kernel.levels()[-1] >= kernel.Level.AVX512_BF16
)  # where whole layers can be one call


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute over panels whatever else this CPU has."""
    if not PANELS:
        pytest.skip("this CPU has no AVX512-BF16")
    monkeypatch.setattr("pensieve.worker.products.has_amx", lambda: False)


class Cached:
    """A sequence over paged KV, computed in pieces of any lengths."""

    def __init__(self, model: CausalModel, attention: str = "native") -> None:
        self.model, self.backend = model, make_backend(attention, model.geometry, 32, torch.device("cpu"))
        self.backend.bind(
            KVStore(4, model.geometry.num_layers, self.backend.layer_bytes, torch.device("cpu"))
        )
        self.builder = BatchBuilder(32, torch.device("cpu"))
        self.builder.update([BlockTableUpdate("a", 0, (2, 0, 3)), BlockTableUpdate("b", 0, (1,))])

    def run(self, *spans: tuple[str, int, int, bool], one_call: bool = True) -> torch.Tensor:
        made = tuple(
            Span(name, start, stop, tuple(range(3 + start, 3 + stop)), emits)
            for name, start, stop, emits in spans
        )
        batch = self.builder.build(made, lambda span: 0)
        attend = PagedAttention(self.backend, batch)
        return self.model.forward(batch, attend if one_call else lambda *operands: attend(*operands))


@pytest.mark.usefixtures("panels")
@pytest.mark.parametrize("member", [name for name in FAMILY if "odd" not in name])
def test_a_layer_as_one_call_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, member: str) -> None:
    """As operation by operation, over several spans, decodes, and steps that emit nothing."""
    name, changes = FAMILY[member]
    monkeypatch.setitem(FAMILY, member, (name, {"head_dim": 16, **changes}))
    model = admit(make(member, torch.bfloat16), member)
    calls = []
    seen = NativeAttention.run_layer
    monkeypatch.setattr(
        NativeAttention, "run_layer", lambda self, *operands: calls.append(1) or seen(self, *operands)
    )  # type: ignore[func-returns-value]
    for spans in (
        [("a", 0, 40, True), ("b", 0, 7, True)],
        [("a", 40, 41, True), ("b", 7, 8, True)],
        [("a", 41, 90, False)],
        [("b", 8, 9, False), ("a", 90, 91, True)],
    ):
        outputs = []
        for one_call in (True, False):
            cached = Cached(model) if spans[0][1] == 0 else cached  # noqa: F821  (what came before stays in its slots)
            before = len(calls)
            outputs.append(cached.run(*spans, one_call=one_call))
            assert (len(calls) - before == model.shape.num_layers) == one_call
        assert torch.equal(*outputs)


@pytest.mark.usefixtures("panels")
def test_another_backend_attends_for_the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILY, "llama", ("llama", {"head_dim": 16}))
    model = admit(make("llama", torch.bfloat16))
    outputs = [
        Cached(model, attention).run(("a", 0, 60, True)).float()
        for attention in ("native", "cpu", "reference")
    ]
    for other in outputs[1:]:
        assert (outputs[0] - other).square().mean().sqrt() < 0.05 * other.square().mean().sqrt()


@pytest.mark.parametrize("plant", ["norm", "rotate", "gate", "layers swapped"])
def test_a_planted_bug_is_stopped_at_the_gate(monkeypatch: pytest.MonkeyPatch, plant: str) -> None:
    from pensieve.worker.rows import Rows

    if plant == "norm":
        monkeypatch.setattr(Rows, "norm", lambda self, residual, delta, weight, epsilon: residual * weight)
    elif plant == "rotate":
        monkeypatch.setattr(Rows, "rotate", lambda *_: None)
    elif plant == "gate":
        monkeypatch.setattr(Rows, "gate", lambda self, both: both.chunk(2, dim=-1)[1].contiguous())
    else:
        made = LlamaForward.__init__

        def swapped(self: LlamaForward, *args: Any, **options: Any) -> None:
            made(self, *args, **options)
            self._layers.reverse()

        monkeypatch.setattr(LlamaForward, "__init__", swapped)
    with pytest.raises(FusedDiffers, match=r"over a paged cache its logits differ .* --forward modules"):
        admit(make("llama"), "llama")
    assert admit(make("llama"), "llama", forward="modules").forward_name == "modules"


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gemma2", {}, "Gemma2ForCausalLM is not of the Llama family"),
        ("llama", {"hidden_act": "gelu"}, "its MLP has 'gelu' for a gate, not 'silu'"),
    ],
)
def test_what_is_left_to_the_modules(name: str, changes: dict[str, Any], reason: str) -> None:
    model = tiny(name, **changes)
    assert LlamaForward.why_not(model) == reason
    assert admit(model, test=False).forward_name == "modules"
    with pytest.raises(ConfigError, match="cannot be computed by fused operations") as refused:
        admit(tiny(name, **changes), "it", forward="fused", test=False)
    assert reason in refused.value.message


def test_half_precision_is_left_to_the_modules() -> None:
    assert admit(tiny("llama", dtype=torch.float16), test=False).forward_name == "modules"


def test_products_of_another_kind_are_left_to_the_modules() -> None:
    class Quantised(torch.nn.Linear):
        pass

    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.__class__ = Quantised
    assert LlamaForward.why_not(model) == "its products are of type Quantised"


@pytest.mark.usefixtures("panels")
@pytest.mark.parametrize(
    "planted", [{"angles": None}, {"epsilon": 100.0}, {"num_rows": 1}, {"query_norm": None}]
)
def test_a_planted_bug_in_a_layer_s_call_is_stopped_at_the_gate(
    monkeypatch: pytest.MonkeyPatch, planted: dict[str, Any]
) -> None:
    run = NativeAttention.run_layer

    def wrong(
        self: NativeAttention, prepared: Any, layer: int, num_heads: int, args: AttentionArgs, work: Any
    ) -> None:
        for field, value in planted.items():
            setattr(work, field, value)
        run(self, prepared, layer, num_heads, args, work)

    monkeypatch.setattr(NativeAttention, "run_layer", wrong)
    with pytest.raises(FusedDiffers):
        admit(make("qwen3, normalised heads", torch.bfloat16), "qwen3")


@pytest.mark.skipif(
    not PANELS or PanelProduct.why_not(torch.bfloat16, 2, int8=True) is not None, reason="not on this CPU"
)
@pytest.mark.parametrize("member", [name for name in FAMILY if "odd" not in name])
def test_weights_of_8_bits_pass_the_gate(member: str) -> None:
    model = admit(make(member, torch.bfloat16), member, int8=True)
    assert model.forward_name == "fused int8"


@pytest.mark.parametrize(
    ("name", "dtype", "forward", "reason"),
    [
        ("gemma2", torch.bfloat16, "auto", "Gemma2ForCausalLM is not of the Llama family"),
        ("llama", torch.float32, "auto", "panels are of bfloat16, not of torch.float32"),
        ("llama", torch.bfloat16, "modules", "--forward modules"),
    ],
)
def test_where_weights_cannot_be_of_8_bits(name: str, dtype: torch.dtype, forward: Any, reason: str) -> None:
    with pytest.raises(
        ConfigError, match=r"cannot have weights of 8 bits .* choose --quantize none"
    ) as refused:
        admit(tiny(name, dtype=dtype), "it", forward=forward, int8=True, test=False)
    assert reason in refused.value.message
