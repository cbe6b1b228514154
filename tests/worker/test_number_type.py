"""`--dtype auto`: what it comes to, and that it is measured rather than looked up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pensieve.errors import ConfigError
from pensieve.runtime.loading import load_model, settled
from pensieve.runtime.local import size_tiers
from pensieve.runtime.options import Options, as_json
from pensieve.worker import number_type
from pensieve.worker.number_type import NumberType, choose, slowdown
from tiny_models import tiny


class Clock:
    """Time passes only while something is multiplied."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> dict[torch.dtype, float]:
    """Seconds that a row takes in each type; the first product of each takes a second more."""
    taken: dict[torch.dtype, float] = {}

    def product(dtype: torch.dtype) -> number_type.Product:
        first = [1.0]

        def multiply(rows: int) -> None:
            clock.now_s += rows * taken[dtype] + (first.pop() if first else 0.0)

        return multiply

    clock = Clock()
    monkeypatch.setattr(number_type, "_product", product)
    monkeypatch.setattr(number_type, "_fastest", lambda _, real=number_type._fastest: real(clock))
    return taken


@pytest.mark.parametrize(
    ("narrow_s", "wide_s", "expected"),
    [
        (
            4.2e-4,
            1e-4,
            NumberType("float32", "computing in float32: bfloat16 takes 4.2 times as long on this CPU"),
        ),
        (
            1e-4,
            2.1e-4,
            NumberType("bfloat16", "computing in bfloat16: float32 takes 2.1 times as long on this CPU"),
        ),
        (
            1.1e-4,
            1e-4,
            NumberType(
                "bfloat16", "computing in bfloat16: on this CPU as fast as float32, in half the memory"
            ),
        ),
        (
            0.9e-4,
            1e-4,
            NumberType(
                "bfloat16", "computing in bfloat16: on this CPU as fast as float32, in half the memory"
            ),
        ),
        (
            1.3e-4,
            1e-4,
            NumberType("float32", "computing in float32: bfloat16 takes 1.3 times as long on this CPU"),
        ),
    ],
)
def test_the_faster_type_is_chosen(
    speeds: dict[torch.dtype, float], narrow_s: float, wide_s: float, expected: NumberType
) -> None:
    speeds.update({torch.bfloat16: narrow_s, torch.float32: wide_s})
    assert choose("auto", "cpu") == expected


def test_a_slow_machine_is_asked_once_for_each_number_of_rows(speeds: dict[torch.dtype, float]) -> None:
    speeds.update({torch.bfloat16: 1.0, torch.float32: 0.5})
    assert choose("auto", "cpu").name == "float32"


@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16"])
def test_what_was_asked_for_stays_and_nothing_is_said(asked: str) -> None:
    assert choose(asked, "cpu") == choose(asked, "cuda") == NumberType(asked)


def test_where_nothing_is_measured() -> None:
    assert choose("auto", "cuda") == choose("auto", "cuda:1") == NumberType("bfloat16")
    assert choose("auto", "cpu", int8=True) == NumberType(
        "bfloat16"
    )  # (weights of 8 bits are multiplied with nothing else)


@pytest.mark.parametrize("rank", [0, 1])
def test_of_a_group_rank_0_chooses(speeds: dict[torch.dtype, float], rank: int) -> None:
    speeds.update(
        {torch.bfloat16: 2.0, torch.float32: 1.0} if rank == 0 else {}
    )  # (the others do not even measure)

    class Group:
        def __init__(self) -> None:
            self.rank = rank

        def exchange(self, message: NumberType | None) -> list[NumberType | None]:
            return [message, None] if rank == 0 else [NumberType("float32"), message]

    assert choose("auto", "cpu", group=Group()).name == "float32"  # type: ignore[arg-type]


def test_measuring_leaves_the_threads_as_they_were() -> None:
    threads = torch.get_num_threads()
    assert slowdown() > 0.0
    assert torch.get_num_threads() == threads


def test_a_cap_from_outside_is_seen() -> None:
    """Whatever this CPU could: under AVX2 alone, bfloat16 is emulated."""
    capped = {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "PENSIEVE_ISA": "avx2",
    }
    run = subprocess.run(
        [sys.executable, "-c", "from pensieve.worker.number_type import choose; print(choose('auto', 'cpu').reason)"],
        capture_output=True, text=True, timeout=120, check=True, env={**os.environ, **capped},
    )  # fmt: skip
    assert run.stdout.startswith("computing in float32: bfloat16 takes "), run.stdout


@pytest.mark.parametrize(("ratio", "expected"), [(4.0, "float32"), (0.5, "bfloat16")])
def test_everything_behind_the_options_sees_what_was_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ratio: float, expected: str
) -> None:
    monkeypatch.setattr(number_type, "slowdown", lambda clock: ratio)
    tiny("llama").save_pretrained(tmp_path / "m")
    told: list[str] = []
    options = Options(model=str(tmp_path / "m"), gpu_cache_gb=0.001)
    assert options.dtype == "auto"
    loaded = load_model(options, must_talk=False, say=told.append, with_text=False)
    assert loaded.dtype == expected and loaded.model.dtype == getattr(torch, expected)
    assert (
        [line for line in told if line.startswith("computing in")]
        == [line for line in loaded.remarks if "computing" in line]
        != []
    )
    assert as_json(settled(options, loaded))["dtype"] == expected
    sizes = size_tiers(settled(options, loaded), loaded.shape, loaded.gpu_cache_gb)
    assert sizes.chunk_bytes == 32 * loaded.shape.kv_bytes_per_token(loaded.model.dtype.itemsize)


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="--dtype must be auto or one of float32, bfloat16, float16, got 'int4'"
    ):
        Options(dtype="int4")
