"""The GPU kernels pass Triton's compiler for the GPUs they are meant for, within their registers and shared
memory. No GPU is needed for that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).resolve().parent.parent / "compile_kernels.py"
SHARED_BYTES = {"80": 163 << 10, "90": 227 << 10}  # that a program can have: A100; H100, H200

SPILLED_BYTES = {
    "80": 128,
    "90": 0,
}  # of a thread: an A100 runs out of a few where heads are filled up, and products go one warp at a time


def compiled(arch: str, *options: str) -> dict[str, dict[str, int]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), arch, *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(arch: str, found: dict[str, dict[str, int]]) -> None:
    for name, needs in found.items():
        assert needs["shared_bytes"] <= SHARED_BYTES[arch], name
        if "attend bf16" in name or "attend fp16" in name:
            assert needs["matrix_units"] > 0, f"{name} multiplies without tensor cores"
            assert needs["stack_bytes"] <= SPILLED_BYTES[arch], f"{name} spills registers"


def test_for_hopper() -> None:
    check("90", compiled("90", "--few"))


@pytest.mark.kernels
@pytest.mark.parametrize("arch", ["80", "90"])
def test_every_variant(arch: str) -> None:
    check(arch, compiled(arch, "--full"))
