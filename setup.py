"""What pyproject.toml cannot say: the kernels, plain C that is loaded through ctypes, and the wheel's tag.

Without a compiler the package installs all the same (`optional`) and computes everything in torch, slower.
"""

import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNEL = Path("src/pensieve/worker/kernel")


class AnyPython(bdist_wheel):
    """A wheel for every Python 3: the kernels know nothing of Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class PlainName(build_ext):
    """Names the shared object `_native.so`, without the Python it was built by."""

    def get_ext_filename(self, fullname):
        if os.name != "posix":
            return super().get_ext_filename(fullname)
        return str(Path(*fullname.split("."))) + ".so"


setup(
    cmdclass={"bdist_wheel": AnyPython, "build_ext": PlainName},
    ext_modules=[
        Extension(
            "pensieve.worker.kernel._native",
            sources=[str(source) for source in sorted(KERNEL.glob("*.c"))],
            depends=[str(header) for header in sorted(KERNEL.glob("*.h"))],
            # No -march: each level of instructions is compiled in and chosen at run time.
            # No -ffast-math: NaN and infinity mean something here.
            extra_compile_args=["-O3", "-std=gnu11", "-fno-math-errno", "-g0"],
            libraries=["m"],
            optional=True,
        )
    ],
)
