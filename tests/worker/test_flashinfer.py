"""What FlashInfer is told: a stand-in with its calls and their documented meaning answers from them alone, by
the reference.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from attention_bench import CPU, LONG_STORY, Bench, args_of, contexts_of
from pensieve.errors import ConfigError
from pensieve.worker.attention import AttentionArgs, KVGeometry, make_backend
from pensieve.worker.attention.flashinfer import FlashInferAttention
from pensieve.worker.attention.reference import attend_one

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the stand-in is for a CPU", allow_module_level=True)


class Wrapper:
    """`BatchPrefillWithPagedKVCacheWrapper`, by its documentation."""

    num_plans = 0

    def __init__(self, workspace: torch.Tensor, kv_layout: str) -> None:
        assert kv_layout == "HND" and workspace.dtype == torch.uint8

    def plan(self, **told: Any) -> None:
        Wrapper.num_plans += 1
        for name in ("qo_indptr", "paged_kv_indptr", "paged_kv_last_page_len"):
            assert told[name].dtype == torch.int32 and told[name].device.type == "cpu", name
        assert told["paged_kv_indices"].dtype == torch.int32
        self.told = told

    def run(self, query: torch.Tensor, pages: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        told = self.told
        key_pages, value_pages = pages
        assert key_pages.shape[1:] == (told["num_kv_heads"], told["page_size"], told["head_dim_qk"])
        outputs = []
        for index in range(len(told["qo_indptr"]) - 1):
            first, stop = told["qo_indptr"][index : index + 2].tolist()
            first_page, last_page = told["paged_kv_indptr"][index : index + 2].tolist()
            indices = told["paged_kv_indices"][first_page:last_page].long()
            length = (last_page - first_page - 1) * told["page_size"] + int(
                told["paged_kv_last_page_len"][index]
            )
            key, value = (
                each[indices].transpose(1, 2).reshape(-1, told["num_kv_heads"], told["head_dim_qk"])[:length]
                for each in (key_pages, value_pages)
            )
            positions = torch.arange(length - (stop - first), length)  # causal: aligned at the end
            window = None if told["window_left"] < 0 else told["window_left"] + 1
            args = AttentionArgs(told["sm_scale"], window, told["logits_soft_cap"])
            outputs.append(attend_one(query[first:stop], key, value, positions, args))
        return torch.cat(outputs)


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
    module.__spec__ = types.SimpleNamespace(name="flashinfer")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    Wrapper.num_plans = 0


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("kind", ["plain", "softcap"])
def test_every_span_is_told_as_what_it_is(kind: str, window: int | None) -> None:
    bench = Bench("flashinfer", contexts_of(LONG_STORY), 2, torch.bfloat16, dim=64, chunk=32)
    bench.check(LONG_STORY, args_of(kind, window))
    assert Wrapper.num_plans == 1, "two layers of one kind share a plan"


def test_layers_of_another_kind_have_a_plan_of_their_own() -> None:
    bench = Bench("flashinfer", contexts_of(LONG_STORY), 2, torch.bfloat16, dim=64, chunk=32)
    prepared = bench.fill(LONG_STORY)
    query = bench._random(sum(span.stop - span.start for span in LONG_STORY), 4)
    for layer, window in ((0, None), (1, 40), (0, None)):
        bench.backend.attend(prepared, layer, query, args_of("plain", window))
    assert Wrapper.num_plans == 2


@pytest.mark.parametrize(
    ("geometry", "reason"),
    [
        (KVGeometry(1, 1, 64, torch.float32), "torch.float32 is neither bfloat16 nor float16"),
        (KVGeometry(1, 1, 80, torch.bfloat16), "heads of 80 numbers are none of 64, 128, 256"),
    ],
)
def test_what_it_cannot_serve(geometry: KVGeometry, reason: str) -> None:
    assert FlashInferAttention.why_not(geometry, 32, CPU) == reason


def test_sinks_are_refused_before_anything_is_allocated() -> None:
    with pytest.raises(ConfigError, match="flashinfer: the model's attention has sinks"):
        make_backend("flashinfer", KVGeometry(1, 1, 64, torch.bfloat16), 32, CPU, [args_of("sinks")])


def test_without_it_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "flashinfer")
    with pytest.raises(ConfigError, match="pip install flashinfer-python"):
        make_backend("flashinfer", KVGeometry(1, 1, 64, torch.bfloat16), 32, CPU)
