"""The one thing that pyproject.toml cannot say for good: the kernels, plain C that is loaded through ctypes.

Without a compiler the package installs all the same (`optional`) and computes everything in torch, slower.
"""

from pathlib import Path

from setuptools import Extension, setup

KERNEL = Path("src/pensieve/worker/kernel")

setup(
    ext_modules=[
        Extension(
            "pensieve.worker.kernel._native",
            sources=[str(source) for source in sorted(KERNEL.glob("*.c"))],
            depends=[str(header) for header in sorted(KERNEL.glob("*.h"))],
            # No -march: each level of instructions is compiled in, and chosen when it runs. No -ffast-math: NaN and infinity mean something here.
            extra_compile_args=["-O3", "-std=gnu11", "-fno-math-errno", "-g0"],
            libraries=["m"],
            optional=True,
        )
    ]
)
