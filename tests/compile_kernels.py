"""Compiles the GPU kernels for a GPU that need not be there, and prints what each takes of it: `python tests/compile_kernels.py 90`.

What Triton's interpreter runs need not be what its compiler takes. The last line is JSON: for each variant registers a thread would spill, and bytes of shared memory.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pensieve.worker import gather_kernels, row_kernels
from pensieve.worker.attention import triton_kernels
from pensieve.worker.attention.base import KVGeometry
from pensieve.worker.attention.triton import TritonAttention, _resources

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
INTEGERS = {
    "slot_mapping": "*i64",
    "tables": "*i64",
    "positions": "*i64",
    "source_rows": "*i64",
    "target_rows": "*i64",
    "items": "*i32",
    "reductions": "*i32",
}
FLOATS = {
    "partials": "*fp32",
    "sums": "*fp32",
    "sinks": "*fp32",
    "weight": "*fp32",
    "angles": "*fp32",
    "query_weight": "*fp32",
    "key_weight": "*fp32",
}
SCALARS = {"scaling": "fp32", "softcap": "fp32", "epsilon": "fp32"}
WHOLE = ("_stride", "width", "num_words")  # numbers that are multiples of 16 in practice


def compile_one(
    kernel: Any,
    target: GPUTarget,
    dtype: str,
    absent: tuple[str, ...],
    resources: dict[str, int],
    **constants: Any,
) -> dict[str, int]:
    signature, constexprs, attributes = {}, {}, {}
    for index, (name, parameter) in enumerate(inspect.signature(kernel.fn).parameters.items()):
        if "constexpr" in str(parameter.annotation):
            signature[name], constexprs[(index,)] = "constexpr", constants.pop(name)
        elif name in absent:
            signature[name], constexprs[(index,)] = "constexpr", None
        elif name in SCALARS:
            signature[name] = SCALARS[name]
        elif name.startswith("num_") or name.endswith("stride") or name in ("table_width", "width", "window"):
            signature[name] = "i32"
            if name.endswith(WHOLE):
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = {**INTEGERS, **FLOATS}.get(name, f"*{dtype}")
            attributes[(index,)] = [["tt.divisibility", 16]]
    assert not constants, f"{kernel.fn.__name__} has no {list(constants)}"
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes), target=target, options=resources
    )
    return {
        "shared_bytes": compiled.metadata.shared,
        **resources_of(compiled.asm["cubin"]),
        "matrix_units": count(compiled.asm["ptx"]),
    }


def resources_of(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of stack, which is where registers are spilled to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        told = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    return {"registers": int(found[1]), "stack_bytes": int(found[2])}


def count(ptx: str) -> int:
    """Instructions for matrix units, of Hopper or of before."""
    return len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)", ptx))


def variants(
    full: bool, few: bool
) -> Iterator[tuple[str, Any, str, tuple[str, ...], dict[str, int], dict[str, Any]]]:
    """(name, kernel, dtype, arguments that are None, resources, constants)."""
    for dtype in NAMES if full else (torch.bfloat16,) if few else (torch.bfloat16, torch.float32):
        for dim in (
            (64, 80, 96, 128, 256) if full else (128,) if few or dtype != torch.bfloat16 else (64, 128, 256)
        ):
            backend = TritonAttention(KVGeometry(1, 8, dim, dtype), 32, num_programs=264)
            padded = backend._dim_padded
            for longest in (1, 4096) if few else (1, 8, 4096):
                tiling = backend._tiling(longest, 4)
                for extras in (False, True):
                    shapes = {
                        "GROUP": 4,
                        "NUM_KV_HEADS": 8,
                        "DIM": dim,
                        "DIM_PADDED": padded,
                        "BLOCK_M": tiling.rows,
                        "HAS_SINKS": extras,
                    }
                    absent = () if extras else ("sinks",)
                    name = f"{NAMES[dtype]} {dim} {tiling.rows}x{tiling.block}{' window softcap sinks' if extras else ''}"
                    constants = {
                        **shapes,
                        "CHUNK": 32,
                        "BLOCK_N": tiling.block,
                        "HAS_WINDOW": extras,
                        "HAS_SOFTCAP": extras,
                        "AS_FLOAT": False,
                    }
                    yield (
                        f"attend {name}",
                        triton_kernels.attend_kernel,
                        NAMES[dtype],
                        absent,
                        _resources(tiling, padded),
                        constants,
                    )
                    yield f"reduce {name}", triton_kernels.reduce_kernel, NAMES[dtype], absent, {}, shapes
            sizes = {"NUM_KV_HEADS": 8, "CHUNK": 32, "DIM": dim, "DIM_PADDED": padded, "BLOCK_T": 16}
            yield f"write {NAMES[dtype]} {dim}", triton_kernels.write_kernel, NAMES[dtype], (), {}, sizes
        for adds in (False, True):
            absent = () if adds else ("delta",)
            yield (
                f"norm {NAMES[dtype]} {adds}",
                row_kernels.norm_kernel,
                NAMES[dtype],
                absent,
                {"num_warps": 8},
                {"HAS_DELTA": adds, "BLOCK": 4096},
            )
            absent_weights = () if adds else ("query_weight", "key_weight")
            sizes = {"HALF": 64, "BLOCK": 64, "ROTATES": True, "NORMALISES": adds}
            yield (
                f"rotate {NAMES[dtype]} {adds}",
                row_kernels.rotate_kernel,
                NAMES[dtype],
                absent_weights,
                {"num_warps": 1},
                sizes,
            )
        yield f"gate {NAMES[dtype]}", row_kernels.gate_kernel, NAMES[dtype], (), {}, {"BLOCK": 1024}
    yield (
        "copy rows",
        gather_kernels.copy_rows_kernel,
        "i64",
        (),
        {"num_warps": 8},
        {"BLOCK": 2048, "PROGRAMS": 16},
    )


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1", "an interpreted kernel cannot be compiled"
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    found = {}
    for name, kernel, dtype, absent, resources, constants in variants(
        "--full" in sys.argv, "--few" in sys.argv
    ):
        found[name] = compile_one(kernel, target, dtype, absent, resources, **constants)
        print(f"{name:50} {found[name]}", file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
