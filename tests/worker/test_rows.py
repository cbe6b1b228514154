"""The kernels between a layer's products, against the same in torch."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pensieve.worker import kernel, rows
from pensieve.worker.rows import Rows, float_weight

CPU = torch.device("cpu")
LEVELS = kernel.levels()
DTYPES = [torch.float32, torch.bfloat16]

pytestmark = pytest.mark.skipif(not LEVELS, reason="the kernels are not built")
every_kind = pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """To one rounding of the dtype."""
    assert ours.dtype in DTYPES
    unit = 2.0**-8 if ours.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours.double(), exact.double(), rtol=unit, atol=unit / 8)


def normed(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.double()


@every_kind
@every_dtype
@pytest.mark.parametrize("width", [1, 7, 16, 48, 67, 576])
@pytest.mark.parametrize("count", [1, 3, 200])
@pytest.mark.parametrize("adds", [True, False])
def test_norm(level: kernel.Level, dtype: torch.dtype, width: int, count: int, adds: bool) -> None:
    residual, weight = random(count, width, dtype=dtype), random(width, dtype=torch.float32, seed=1)
    delta = random(count, width, dtype=dtype, seed=2) if adds else None
    expected = residual + delta if delta is not None else residual.clone()
    ours = Rows(dtype, level).norm(residual, delta, weight, 1e-5)
    assert torch.equal(residual, expected)  # rounded as torch rounds
    close(ours, normed(expected, weight, 1e-5))


@every_kind
@every_dtype
@pytest.mark.parametrize("head_dim", [2, 12, 16, 64, 80, 128])
@pytest.mark.parametrize(("normalises", "turns"), [(False, True), (True, True), (True, False)])
def test_rotate(
    level: kernel.Level, dtype: torch.dtype, head_dim: int, normalises: bool, turns: bool
) -> None:
    count, heads, kv_heads, spare = 37, 4, 2, 3
    packed = random(count, (heads + 2 * kv_heads) * head_dim + spare, dtype=dtype)
    before = packed.clone()
    positions = torch.randint(0, 50, (count,), generator=torch.Generator().manual_seed(3))
    planes = torch.arange(50.0)[:, None] * (10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim))
    angles = torch.cat((planes.cos(), planes.sin()), 1) if turns else None
    norms = (
        (random(head_dim, dtype=torch.float32, seed=4), random(head_dim, dtype=torch.float32, seed=5))
        if normalises
        else None
    )
    Rows(dtype, level).rotate(packed, heads, kv_heads, head_dim, angles, positions, norms, 1e-6)

    turned = (heads + kv_heads) * head_dim
    expected = before[:, :turned].reshape(count, heads + kv_heads, head_dim).double()
    if norms is not None:
        weight = torch.stack([norms[0]] * heads + [norms[1]] * kv_heads)
        expected = normed(expected, weight, 1e-6).to(dtype).double()
    if turns:
        cosines, sines = planes.cos()[positions][:, None].double(), planes.sin()[positions][:, None].double()
        x, y = expected.chunk(2, dim=-1)
        expected = torch.cat((x * cosines - y * sines, y * cosines + x * sines), -1)
    unit = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        packed[:, :turned].double(), expected.reshape(count, turned), rtol=unit, atol=unit
    )
    assert torch.equal(packed[:, turned:], before[:, turned:])  # values, and what follows, stay


@every_kind
@every_dtype
@pytest.mark.parametrize("width", [1, 5, 16, 33, 1536])
def test_gate(level: kernel.Level, dtype: torch.dtype, width: int) -> None:
    both = random(9, 2 * width, dtype=dtype) * 4
    gate, up = both.double().chunk(2, dim=-1)
    close(Rows(dtype, level).gate(both), gate * torch.sigmoid(gate) * up)


@every_kind
@every_dtype
def test_gate_of_very_large_numbers(level: kernel.Level, dtype: torch.dtype) -> None:
    both = torch.tensor([[-1e4, -100.0, -80.0, 0.0, 80.0, 1e4] * 8 + [1.0] * 48], dtype=dtype)
    close(Rows(dtype, level).gate(both), torch.nn.functional.silu(both[:, :48].double()))


@every_kind
@every_dtype
def test_what_is_no_number_stays_so(level: kernel.Level, dtype: torch.dtype) -> None:
    """A request with broken numbers is found by its logits.

    Nothing on the way may make them look sound, or spoil a neighbour.
    """
    kernels = Rows(dtype, level)
    bad = random(3, 96, dtype=dtype)
    bad[1, 5] = float("nan")
    weight = torch.ones(96)
    out = kernels.norm(bad.clone(), None, weight, 1e-5)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()
    gated = kernels.gate(bad)
    assert gated[1, 5].isnan() and gated[[0, 2]].isfinite().all()
    kernels.rotate(bad, 2, 1, 32, torch.ones(4, 32), torch.zeros(3, dtype=torch.int64), None, 1e-5)
    assert bad[1].isnan().any() and bad[[0, 2]].isfinite().all()


@every_kind
@every_dtype
@given(count=st.integers(1, 70), width=st.integers(1, 300), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_rows_do_not_depend_on_their_neighbours(
    level: kernel.Level, dtype: torch.dtype, count: int, width: int, seed: int
) -> None:
    """However the work is cut between threads: bit by bit what each row gives alone."""
    kernels, x, weight = (
        Rows(dtype, level),
        random(count, width, dtype=dtype, seed=seed),
        random(width, dtype=torch.float32),
    )
    together = kernels.norm(x.clone(), x, weight, 1e-5)
    alone = [kernels.norm(row[None].clone(), row[None], weight, 1e-5) for row in x]
    assert torch.equal(together, torch.cat(alone))


def test_no_rows_at_all() -> None:
    kernels = Rows(torch.float32)
    assert kernels.norm(torch.empty(0, 8), None, torch.ones(8), 1e-5).shape == (0, 8)
    assert kernels.gate(torch.empty(0, 8)).shape == (0, 4)


def test_what_they_cannot_serve() -> None:
    assert rows.why_not(torch.float32, CPU) is None
    assert rows.why_not(torch.float16, CPU) == "torch.float16 is neither bfloat16 nor float32"
    assert rows.why_not(torch.float32, torch.device("cuda")) == "its kernels run on a CPU, not on cuda"


def test_kernels_of_other_sources_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_BYTES", rows._BYTES + ctypes.sizeof(ctypes.c_void_p))
    assert "were built from other sources" in str(rows.why_not(torch.float32, CPU))


def test_weights_become_floats() -> None:
    assert float_weight(torch.ones(4, dtype=torch.bfloat16)[::2]).is_contiguous()
