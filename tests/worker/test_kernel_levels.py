"""PENSIEVE_ISA: every level of instructions that this CPU has, chosen from outside, computes what torch
computes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from pensieve.errors import ConfigError
from pensieve.worker import kernel
from pensieve.worker.attention import KVGeometry, make_backend
from pensieve.worker.attention.native import NativeAttention
from pensieve.worker.gate import admit
from pensieve.worker.kernel import Level
from pensieve.worker.products import OneDnnLayer, PanelKind, PanelLayer, PanelProduct
from pensieve.worker.rows import Rows
from tiny_models import CONFIGS, tiny

CPU = torch.device("cpu")
BF16 = torch.bfloat16
HERE = kernel.levels()
pytestmark = pytest.mark.skipif(not HERE, reason="the kernels are not built")
each_level = pytest.mark.parametrize("level", HERE, ids=lambda level: level.name)
Cap = Callable[[str], None]


@pytest.fixture
def cap(monkeypatch: pytest.MonkeyPatch) -> Cap:
    def set_cap(name: str) -> None:
        monkeypatch.setenv(kernel.CAP, name)
        kernel.levels.cache_clear()

    yield set_cap  # type: ignore[misc]
    kernel.levels.cache_clear()


@each_level
def test_everything_that_computes_takes_the_level_that_is_named(cap: Cap, level: Level) -> None:
    cap(level.name.lower())
    assert kernel.levels() == tuple(each for each in Level if each <= level)
    assert kernel.name() == level.name.replace("_", "-")
    backend = make_backend("auto", KVGeometry(1, 1, 16, BF16), 32, CPU)
    assert isinstance(backend, NativeAttention) and backend._level == level
    assert Rows(BF16)._call["level"] == level
    if level < Level.AVX512_BF16:
        assert (
            PanelProduct.why_not(BF16, 16)
            == PanelProduct.why_not(BF16, 16, int8=True)
            == "this CPU has no AVX512-BF16"
        )
    else:
        assert PanelProduct.why_not(BF16, 16) is None  # (under a cap, whatever else this CPU has)


@each_level
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_models_over_a_paged_cache_at_each_level(
    cap: Cap, level: Level, dtype: torch.dtype, name: str
) -> None:
    """The gate compares with transformers' own eager attention: pieces, holes and decodes."""
    cap(level.name)
    changes = {"n_embd": 64} if name == "gpt2" else {"head_dim": 16}
    model = admit(tiny(name, 0, dtype, **changes), forward="auto" if name == "gpt2" else "fused")
    if model._fused is not None:
        panels = dtype == BF16 and level >= Level.AVX512_BF16
        assert isinstance(model._fused._layers[0].products, PanelLayer if panels else OneDnnLayer)
        assert (model._fused._calls is not None) == panels
    assert "head_dim" not in CONFIGS["llama"]  # (so that all kernels are used: heads are of 16)


@each_level
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_rows_at_each_level(cap: Cap, level: Level, dtype: torch.dtype) -> None:
    cap(level.name.lower())
    rows, tolerance = Rows(dtype), 1e-6 if dtype == torch.float32 else 2.0**-8
    x = torch.randn((5, 70), generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.rand(70) + 0.5
    expected = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    torch.testing.assert_close(
        rows.norm(x.clone(), None, weight, 1e-5).double(), expected, rtol=tolerance, atol=1e-5
    )
    gate, up = x.double().chunk(2, dim=-1)
    torch.testing.assert_close(rows.gate(x).double(), gate * gate.sigmoid() * up, rtol=tolerance, atol=1e-5)


@each_level
def test_weights_of_8_bits_at_each_level(cap: Cap, level: Level) -> None:
    cap(level.name.lower())
    if (reason := PanelProduct.why_not(BF16, 64, int8=True)) is not None:
        assert "this CPU has no AVX512-" in reason
        with pytest.raises(
            ConfigError,
            match=r"cannot have weights of 8 bits \(this CPU has no AVX512-.*: choose --quantize none",
        ):
            admit(tiny("llama", 0, BF16), int8=True)
        return
    module = nn.Linear(64, 40, bias=False).to(BF16).requires_grad_(False)
    x = torch.randn((3, 64), generator=torch.Generator().manual_seed(0)).to(BF16)
    ours, expected = (
        PanelProduct([module], kind=PanelKind(int8=True))(x).double(),
        x.double() @ module.weight.double().T,
    )
    assert (ours - expected).square().mean().sqrt() < 0.02 * expected.square().mean().sqrt()


@pytest.mark.parametrize("name", ["avx1024", "AVX-512", "2", "none", " "])
def test_a_level_that_there_is_not(cap: Cap, name: str) -> None:
    cap(name)
    with pytest.raises(
        ConfigError,
        match=f"PENSIEVE_ISA must be one of avx2, avx512, avx512_bf16, amx, got '{name}'; or leave it out",
    ):
        kernel.levels()


def test_a_level_that_this_cpu_lacks(cap: Cap, monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        pensieve_level = staticmethod(lambda: Level.AVX2)

    monkeypatch.setattr(kernel, "library", Library)
    cap("avx512")
    with pytest.raises(
        ConfigError,
        match="PENSIEVE_ISA=avx512: this CPU has avx2 only; name one of them, or leave the variable out",
    ):
        kernel.levels()


def test_without_kernels_there_is_nothing_to_cap(cap: Cap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "library", lambda: "built without a C compiler")
    cap("avx2")
    assert kernel.levels() == () and kernel.name() == "no" and not kernel.has_amx()


def test_an_empty_variable_caps_nothing(cap: Cap) -> None:
    cap("")
    assert kernel.levels()[: len(HERE)] == HERE  # (the tests themselves may run under a cap)


def test_a_wrong_level_is_said_before_a_model_is_looked_for() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pensieve", "compare", "--model", "there/is-none"], capture_output=True,
        text=True, timeout=120, env={**os.environ, kernel.CAP: "sse9"}, check=False,
    )  # fmt: skip
    assert (
        run.returncode != 0
        and "PENSIEVE_ISA must be one of avx2, avx512, avx512_bf16, amx, got 'sse9'" in run.stderr
    )
    assert "Traceback" not in run.stderr
