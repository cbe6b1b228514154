"""Products by panels and by oneDNN, against the same in float64."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pensieve.worker import kernel, products
from pensieve.worker.products import (
    _ADDED,
    _FLOAT,
    _GATED,
    PANEL,
    OneDnnProduct,
    PanelKind,
    PanelProduct,
    fill_up_modules,
    grid_rows,
)
from tiny_models import tiny

BF16 = torch.bfloat16
PANELS = bool(kernel.levels()) and kernel.levels()[-1] >= kernel.Level.AVX512_BF16
any_shape = given(
    count=st.integers(1, 70),
    num_in=st.one_of(st.integers(1, 40).map(lambda n: 2 * n), st.integers(1, 5).map(lambda n: 32 * n)),
    num_out=st.integers(1, 3 * PANEL), bias=st.booleans(), seed=st.integers(0, 5),
)  # fmt: skip
needs_panels = pytest.mark.skipif(
    not PANELS, reason="the kernels are not built, or this CPU has no AVX512-BF16"
)


def linear(
    num_in: int, num_out: int, bias: bool = False, dtype: torch.dtype = BF16, seed: int = 0
) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(num_in, num_out, bias=bias).to(dtype)


def exact(x: torch.Tensor, module: nn.Linear) -> torch.Tensor:
    result = x.double() @ module.weight.double().T
    return result if module.bias is None else result + module.bias.double()


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours.double(), expected, rtol=2.0**-8, atol=1e-4)


def rows(count: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn((count, width), generator=torch.Generator().manual_seed(seed)).to(BF16)


@needs_panels
@pytest.mark.parametrize("count", [*range(1, 26), 96, 97, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_any_number_of_rows(count: int, bias: bool) -> None:
    module, x = linear(48, 80, bias), rows(count, 48)
    close(PanelProduct([module])(x), exact(x, module))


@needs_panels
@any_shape
@settings(max_examples=60, deadline=None)
def test_any_shape_and_what_is_done_with_the_result(
    count: int, num_in: int, num_out: int, bias: bool, seed: int
) -> None:
    module, other, x = (
        linear(num_in, num_out, bias, seed=seed),
        linear(num_in, num_out, bias, seed=seed + 9),
        rows(count, num_in, seed),
    )
    close(PanelProduct([module])(x), exact(x, module))
    close(PanelProduct([module, other])(x), torch.cat((exact(x, module), exact(x, other)), 1))
    close(PanelProduct([module, other], _GATED)(x), nn.functional.silu(exact(x, module)) * exact(x, other))
    before = rows(count, num_out, seed + 1)
    after = before.clone()
    PanelProduct([module], _ADDED)(x, after)
    close(after, before.double() + exact(x, module))
    floats = PanelProduct([module], _FLOAT)(x)
    assert floats.dtype == torch.float32
    torch.testing.assert_close(floats.double(), exact(x, module), rtol=1e-4, atol=1e-4)


@needs_panels
@pytest.mark.parametrize(
    "level",
    [level for level in kernel.levels() if level >= kernel.Level.AVX512_BF16],
    ids=lambda level: level.name,
)
@pytest.mark.parametrize("num_in", [32, 64, 96, 800])
def test_a_row_has_the_same_bits_in_any_company(
    level: kernel.Level, num_in: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "levels", lambda: (level,))
    module, other, x = linear(num_in, 70, True), linear(num_in, 70, True, seed=1), rows(600, num_in)
    plain, gated = PanelProduct([module]), PanelProduct([module, other], _GATED)
    close(plain(x), exact(x, module))
    for count in (1, 2, 15, 16, 17, 31, 33, 95, 257, 599):
        assert torch.equal(plain(x[:count]), plain(x)[:count]) and torch.equal(
            gated(x[:count]), gated(x)[:count]
        )


INT8 = PANELS and PanelProduct.why_not(BF16, 8, int8=True) is None
needs_int8 = pytest.mark.skipif(not INT8, reason="this CPU has no AVX512-VBMI")


def rounded(module: nn.Linear) -> nn.Linear:
    """The same with weights of 8 bits, as exact as they are."""
    weight = module.weight.detach().float()  # (a tie is a tie in fp32)
    scale = weight.abs().amax(1, keepdim=True) / 127
    result = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None).double()
    result.weight.data = (weight / scale).round().double() * scale.double()
    if module.bias is not None:
        result.bias.data = module.bias.detach().double()
    return result


@needs_int8
@any_shape
@settings(max_examples=60, deadline=None)
def test_weights_of_8_bits(count: int, num_in: int, num_out: int, bias: bool, seed: int) -> None:
    module, other, x = (
        linear(num_in, num_out, bias, seed=seed),
        linear(num_in, num_out, bias, seed=seed + 9),
        rows(count, num_in, seed),
    )
    module_8, other_8, kind = rounded(module), rounded(other), PanelKind(int8=True)
    close(PanelProduct([module, other], kind=kind)(x), torch.cat((exact(x, module_8), exact(x, other_8)), 1))
    close(
        PanelProduct([module, other], _GATED, kind)(x),
        nn.functional.silu(exact(x, module_8)) * exact(x, other_8),
    )
    before = rows(count, num_out, seed + 1)
    after = before.clone()
    PanelProduct([module], _ADDED, kind)(x, after)
    close(after, before.double() + exact(x, module_8))


@needs_int8
def test_every_weight_of_8_bits_is_what_it_says() -> None:
    """All of -127 to 127, read back one by one."""
    module = linear(2, 255)
    with torch.no_grad():
        module.weight[:, 0] = torch.arange(-127, 128)
        module.weight[:, 1] = 127  # every output has the scale 1
    assert torch.equal(
        PanelProduct([module], kind=PanelKind(int8=True))(torch.tensor([[1.0, 0.0]], dtype=BF16))[0],
        torch.arange(-127, 128).to(BF16),
    )


@needs_int8
def test_an_output_without_weights_stays_zero() -> None:
    module = linear(6, 3)
    with torch.no_grad():
        module.weight[1] = 0
    result = PanelProduct([module], kind=PanelKind(int8=True))(rows(4, 6))
    assert (result[:, 1] == 0).all() and result.isfinite().all()


@needs_panels
def test_nothing_beyond_the_results_is_written() -> None:
    """Neither the panel's filling nor the rows after the last."""
    module, x = linear(16, PANEL + 5), rows(3, 16)
    room = torch.full((6, PANEL + 5), 7.0, dtype=BF16)
    PanelProduct([module])(x, room[:3])
    assert (room[3:] == 7).all()


@needs_panels
@pytest.mark.parametrize("count", [1, 7, 12, 13, 100, 400])
def test_a_row_gives_the_same_in_any_company(count: int) -> None:
    """Bit by bit: however rows are cut into tiles and tiles given to threads."""
    product, x = PanelProduct([linear(64, 96)]), rows(count, 64)
    together = product(x)
    assert all(torch.equal(together[i : i + 1], product(x[i : i + 1])) for i in range(0, count, 7))


@needs_panels
def test_what_is_no_number_spoils_its_own_row_only() -> None:
    x = rows(14, 32)
    x[5, 3] = float("nan")
    result = PanelProduct([linear(32, 40)])(x)
    assert result[5].isnan().all() and result[[i for i in range(14) if i != 5]].isfinite().all()


@needs_panels
def test_no_rows() -> None:
    assert PanelProduct([linear(8, 12)])(torch.empty((0, 8), dtype=BF16)).shape == (0, 12)


def test_what_panels_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PanelProduct.why_not(torch.float32, 8) == "panels are of bfloat16, not of torch.float32"
    assert PanelProduct.why_not(BF16, 8, 7) == "panels are of pairs of numbers, rows of 7 are odd"
    monkeypatch.setattr(products, "levels", lambda: (kernel.Level.AVX2,))
    if kernel.levels():
        assert PanelProduct.why_not(BF16, 8) == "this CPU has no AVX512-BF16"


@needs_panels
def test_tiles_in_hardware_that_these_kernels_do_not_use_are_left_to_onednn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "has_amx", lambda: True)
    monkeypatch.setattr(products, "levels", lambda: (kernel.Level.AVX512_BF16,))
    assert PanelProduct.why_not(BF16, 8) == "this CPU has AMX, which these kernels were built without"


@needs_panels
def test_kernels_of_other_sources_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_BYTES", products._BYTES + ctypes.sizeof(ctypes.c_void_p))
    assert "were built from other sources" in str(PanelProduct.why_not(BF16, 8))


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("packs", [True, False])
def test_onednn(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, packs: bool) -> None:
    if not packs:
        monkeypatch.setattr(products, "_HAS_ONEDNN", False)
    for count in (0, 1, 9, 130):
        for bias in (True, False):
            module, other, x = (
                linear(24, 40, bias, dtype),
                linear(24, 8, bias, dtype, 3),
                rows(count, 24).to(dtype),
            )
            ours = OneDnnProduct([module, other])(x)
            torch.testing.assert_close(
                ours.double(), torch.cat((exact(x, module), exact(x, other)), 1), rtol=2.0**-7, atol=1e-2
            )


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_products_of_gpt2s_kind_lie_as_linear_ones_do_in_16_bits(dtype: torch.dtype) -> None:
    model = tiny("gpt2", 0, dtype)
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        before = model(ids).logits
        products.lay_out_modules(model)
        after = model(ids).logits
    weight = model.transformer.h[0].mlp.c_fc.weight
    assert weight.shape == (48, 192) and weight.is_contiguous() == (dtype == torch.float32)
    torch.testing.assert_close(after, before, rtol=0.02, atol=0.02 * float(before.abs().max()))


def test_row_counts_are_a_short_list_that_wastes_little() -> None:
    sizes = [grid_rows(count) for count in range(1, 513)]
    assert sizes[:20] == [*range(1, 17), 18, 18, 20, 20] and sizes[-1] == 512
    assert len(set(sizes)) == 56
    assert all(count <= size for count, size in enumerate(sizes, 1)) and all(
        grid_rows(size) == size for size in sizes
    )
    assert max(size / count for count, size in enumerate(sizes, 1)) <= 1.125
    assert sum(sizes) / sum(range(1, 513)) < 1.05


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("bias", [True, False])
def test_rows_between_the_sizes_of_the_list_come_out_right(dtype: torch.dtype, bias: bool) -> None:
    module = linear(48, 80, bias, dtype)
    product = OneDnnProduct([module])
    for count in [*range(1, 40), 63, 65, 100, 127, 129, 300]:
        x = rows(count, 48, seed=count).to(dtype)
        result = product(x)
        assert result.shape == (count, 80) and result.is_contiguous()
        close(result, exact(x, module))


def test_row_counts_without_end_take_no_memory_without_end() -> None:
    """A gigabyte before: oneDNN keeps something for each row count that it meets."""
    psutil = pytest.importorskip("psutil")
    product, process = OneDnnProduct([linear(256, 256, False, torch.float32)]), psutil.Process()

    def after(counts: range) -> int:
        for count in counts:
            product(torch.zeros((count, 256)))
        return int(process.memory_info().rss)

    before = after(range(1, 500, 7))
    assert after(range(1, 500)) - before < 60 << 20


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_models_own_products_in_16_bits_meet_row_counts_of_the_list_only(architecture: str) -> None:
    plain, filled = tiny(architecture, dtype=BF16), tiny(architecture, dtype=BF16)
    met: set[int] = set()
    for module in filled.modules():
        if hasattr(module, "weight") and type(module).__name__ in ("Linear", "Conv1D"):
            inner = module.forward

            def counting(x: torch.Tensor, inner: object = inner) -> torch.Tensor:
                met.add(x.numel() // x.shape[-1])
                return inner(x)  # type: ignore[operator]

            module.forward = counting
    fill_up_modules(filled)
    for count in (1, 7, 17, 23, 50):
        ids = torch.arange(count)[None] % 190
        with torch.inference_mode():
            torch.testing.assert_close(filled(ids).logits, plain(ids).logits, rtol=2.0**-6, atol=2e-2)
    assert met == {1, 7, 18, 24, 52}
