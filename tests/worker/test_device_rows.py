"""The kernels between a layer's products on a GPU, and the forward made of them, against the same in torch
and the modules.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pensieve.worker.attention import AttentionArgs
from pensieve.worker.device_rows import DeviceRows
from pensieve.worker.gate import admit
from pensieve.worker.llama import LlamaForward
from tiny_models import _MODERN, CONFIGS, WINDOW, tiny

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Triton's interpreter cuts bfloat16 off where a GPU rounds: a unit more, for each time a number is stored.
UNIT = {
    torch.float32: 1e-5,
    torch.bfloat16: 2.0**-7 if DEVICE.type == "cuda" else 2.0**-5,
    torch.float16: 2.0**-10,
}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    unit = UNIT[ours.dtype]
    torch.testing.assert_close(ours.double(), exact.double(), rtol=unit, atol=unit)


def normed(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.double()


@every_dtype
@pytest.mark.parametrize("width", [1, 48, 67, 576])
@pytest.mark.parametrize("adds", [True, False])
def test_norm(dtype: torch.dtype, width: int, adds: bool) -> None:
    residual, weight = random(5, width, dtype=dtype), random(width, seed=1)
    delta = random(5, width, dtype=dtype, seed=2) if adds else None
    expected = residual + delta if delta is not None else residual.clone()
    ours = DeviceRows().norm(residual, delta, weight, 1e-5)
    if DEVICE.type == "cuda" or dtype != torch.bfloat16:
        assert torch.equal(residual, expected), "rounded as torch rounds"
    close(residual, expected)
    close(ours, normed(residual, weight, 1e-5))


@every_dtype
@pytest.mark.parametrize("head_dim", [2, 16, 80])
@pytest.mark.parametrize(("normalises", "turns"), [(False, True), (True, True), (True, False)])
def test_rotate(dtype: torch.dtype, head_dim: int, normalises: bool, turns: bool) -> None:
    count, heads, kv_heads, spare = 9, 4, 2, 3
    packed = random(count, (heads + 2 * kv_heads) * head_dim + spare, dtype=dtype)
    before = packed.clone()
    positions = torch.randint(0, 50, (count,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    planes = torch.arange(50.0, device=DEVICE)[:, None] * (
        10_000.0 ** (-torch.arange(0, head_dim, 2, device=DEVICE) / head_dim)
    )
    angles = torch.cat((planes.cos(), planes.sin()), 1) if turns else None
    norms = (random(head_dim, seed=4), random(head_dim, seed=5)) if normalises else None
    DeviceRows().rotate(packed, heads, kv_heads, head_dim, angles, positions, norms, 1e-6)
    turned = (heads + kv_heads) * head_dim
    assert torch.equal(packed[:, turned:], before[:, turned:]), "values stay as they are"
    expected = before[:, :turned].reshape(count, heads + kv_heads, head_dim).double()
    if norms is not None:
        expected = (
            normed(expected, torch.stack([norms[0]] * heads + [norms[1]] * kv_heads), 1e-6).to(dtype).double()
        )
    if turns:
        cosines, sines = planes.cos()[positions][:, None].double(), planes.sin()[positions][:, None].double()
        x, y = expected.chunk(2, dim=-1)
        expected = torch.cat((x * cosines - y * sines, y * cosines + x * sines), -1)
    close(packed[:, :turned], expected.reshape(count, turned))


@every_dtype
@pytest.mark.parametrize("width", [1, 70, 1500])
def test_gate(dtype: torch.dtype, width: int) -> None:
    gate_up = random(3, 2 * width, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    close(DeviceRows().gate(gate_up), torch.nn.functional.silu(gate) * up)


def test_no_rows_at_all() -> None:
    rows = DeviceRows()
    assert rows.norm(random(0, 8), None, random(8), 1e-5).shape == (0, 8)
    assert rows.gate(random(0, 8)).shape == (0, 4)


FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases, tied": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama, odd sizes": (
        "llama",
        {"hidden_size": 52, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 70},
    ),
    "mistral, windows": ("mistral", {}),
    "qwen2, windows in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3, normalised heads": ("qwen3", {}),
    "smollm3, a layer without positions": ("smollm3", {"no_rope_layers": [1, 0]}),
}


def dense(
    layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, args: AttentionArgs
) -> torch.Tensor:
    """Causal attention of one sequence, written out."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query.double(), key.double()) * args.scaling
    distance = torch.arange(len(query), device=DEVICE)[:, None] - torch.arange(len(key), device=DEVICE)[None]
    visible = (distance >= 0) & (distance < (args.sliding_window or 1 << 30))
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value.double()).to(query.dtype)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("member", FAMILY)
def test_the_forward_made_of_them(monkeypatch: pytest.MonkeyPatch, member: str, keep: bool) -> None:
    for name in ("qwen2", "smollm3"):
        monkeypatch.setitem(CONFIGS, name, _MODERN)
    name, changes = FAMILY[member]
    raw = tiny(name, 0, torch.float32, **changes)
    with torch.no_grad():
        for parameter_name, parameter in raw.named_parameters():
            if "norm" in parameter_name:  # all ones would forgive a weight that is left out
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    model = admit(raw.to(DEVICE), forward="modules")
    ids = torch.randint(199, (1, 40), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    positions, rows = torch.arange(40, device=DEVICE)[None], torch.tensor([39, 3, 17], device=DEVICE)
    expected = model.logits(ids, positions, rows, dense)
    fused = LlamaForward(model.model, model.attention_args, keep_modules=keep, on_device=True)
    ours = fused.logits(ids, positions, rows, dense)
    assert float((ours - expected).abs().max() / expected.abs().max()) < 1e-5
