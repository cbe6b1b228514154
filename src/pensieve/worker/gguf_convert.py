"""Converts GGUF files into folders that a Hugging Face model loads from, kept in the user's cache.

Knows folders and hashes; never model names or tensors.

A folder (config, safetensors, tokenizer, chat template, manifest) is keyed by the file's SHA-256. It is built
in a temporary place under a lock and then renamed, so that no reader sees half a conversion. The manifest
lists every file's size, modification time and hash: a folder that disagrees with it is built again.
`worker.gguf` knows what a file means and whether it is whole; all refusals come before a tensor is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from pensieve.errors import ModelRefused, ModelUnavailable
from pensieve.machine import cache_folder, write_whole

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from pensieve.worker.gguf.plan import Described, Parameter

# gguf, torch and transformers are imported where they are used: gguf is an extra, and listing models needs
# none.

log = logging.getLogger(__name__)

Progress = Callable[[str, float | None], None]  # (what is being done, share done in [0, 1]; None if unknown)
Check = Callable[["PretrainedConfig"], None]  # raises ModelRefused for a config that cannot be served
Room = Callable[[int], None]  # raises ModelRefused for a number of weights that cannot be loaded

FORMAT = 2  # of the converted folder: raised when a conversion of the same file would come out different
MANIFEST = "manifest.json"
# earlier versions build tokenizers from a GGUF with a wrong end-of-sequence token
_MIN_TRANSFORMERS = (5, 23)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars of transformers in this block: we report progress ourselves."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def converted_path(sha256: str) -> Path:
    """The folder for the conversion of the GGUF with this hash, whether or not it exists."""
    return cache_folder() / "converted" / f"{sha256}-v{FORMAT}"


def is_sound(folder: Path, *, full: bool = False) -> bool:
    """Whether a converted folder is as its manifest describes it.

    Sizes are always compared. A file is hashed if its modification time is not the recorded one, or if
    `full`.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return False
        for name, entry in manifest["files"].items():
            stat = (folder / name).stat()
            if stat.st_size != entry["bytes"]:
                return False
            if (full or stat.st_mtime_ns != entry["mtime_ns"]) and sha256_of(folder / name) != entry[
                "sha256"
            ]:
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a converted folder: `eos_token_ids`, `num_parameters`, `note`, `source`, `files`."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return manifest


def ensure_file_converted(
    path: Path,
    progress: Progress | None = None,
    *,
    full_check: bool = False,
    check: Check | None = None,
    room: Room | None = None,
) -> Path:
    """The folder converted from a user's GGUF file, or from all parts of a split one.

    Cheap checks come first: the header's refusals come before hashing, and hashing before any tensor is read.

    Args:
        path: the file, or any part of a split one.
        progress: told about slow work.
        full_check: hash every file of an existing folder (after loading from it failed).
        check: called with the config, to refuse models that cannot be served.
        room: called with the number of weights, to refuse models that do not fit.

    Raises:
        ModelUnavailable: a package for converting is missing, or the disk is full.
        ModelRefused: the file is not a whole model, of a kind that cannot be converted, or refused by `check`
            or `room`.
    """
    known = _remembered_hash(path)
    if known is not None and not full_check and is_sound(converted_path(known)):
        if check:
            from transformers import AutoConfig

            check(AutoConfig.from_pretrained(converted_path(known), local_files_only=True))
        return converted_path(known)
    require_packages()
    described, parameters = _plan(path, check)
    if room:
        from pensieve.worker.gguf.write import num_values

        room(num_values(parameters))
    sha256 = file_hash(path, progress, described.source.model.parts)
    return ensure_converted(lambda: path, sha256, progress, full_check=full_check)


def ensure_converted(
    gguf: Callable[[], Path],
    sha256: str,
    progress: Progress | None = None,
    *,
    full_check: bool = False,
    check: Check | None = None,
) -> Path:
    """The folder converted from the GGUF with this hash; converts it first if needed.

    Args:
        gguf: gives the file; called only if it must be converted, with the lock held.
        sha256: hash of that file.
        progress: told about slow work.
        full_check: hash every file of an existing folder (after loading from it failed).
        check: called with the config in the file's header, before anything is converted.

    Raises:
        ModelUnavailable: a package for converting is missing, the disk is full, or the file cannot be
            fetched.
        ModelRefused: the file is not a whole model, of a kind that cannot be converted, or refused by
            `check`.
    """
    folder = converted_path(sha256)
    if not full_check and is_sound(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.parent / f"{sha256}.lock"):
        if is_sound(folder, full=full_check):  # another process was faster
            return folder
        if folder.exists():
            log.warning("the converted model in %s is damaged; converting it again", folder)
        require_packages()  # before anything is fetched
        for leftover in folder.parent.glob(
            f".{sha256[:16]}-*"
        ):  # of a process that was killed: this process holds the lock
            shutil.rmtree(leftover, ignore_errors=True)
        path = gguf()
        with tempfile.TemporaryDirectory(prefix=f".{sha256[:16]}-", dir=folder.parent) as scratch:
            fresh = Path(scratch) / "model"
            fresh.mkdir()
            with quiet():
                _convert(path, sha256, fresh, progress, check)
            if folder.exists():
                folder.rename(Path(scratch) / "damaged")
            fresh.rename(folder)
            _sync(folder.parent)
    return folder


def file_hash(gguf: Path, progress: Progress | None = None, parts: Sequence[Path] | None = None) -> str:
    """SHA-256 of a GGUF file, or over those of all parts of a split one.

    Cached by paths, sizes and times: hashing a file of tens of GB takes a minute, which a start must not.
    """
    if (known := _remembered_hash(gguf)) is not None:
        return known
    files = [part.resolve() for part in parts or (gguf,)]
    stamps = [_stamp(file) for file in files]
    digests = []
    for file in files:
        if progress:
            progress(f"hashing {file.name}", None)
        digests.append(sha256_of(file))
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
    write_whole(_memo(gguf), json.dumps({"stamps": stamps, "sha256": digest}))
    return digest


def _remembered_hash(gguf: Path) -> str | None:
    """The cached hash; None if there is none, or if a part changed since."""
    try:
        remembered = json.loads(_memo(gguf).read_text())
        if all(_stamp(Path(stamp[0])) == stamp for stamp in remembered["stamps"]):
            return str(remembered["sha256"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        pass  # no cached hash, or a damaged one
    return None


def _memo(gguf: Path) -> Path:
    return cache_folder() / "hashes" / f"{hashlib.sha256(str(gguf.resolve()).encode()).hexdigest()[:32]}.json"


def _stamp(file: Path) -> list[str | int]:
    stat = file.stat()
    return [str(file), stat.st_size, stat.st_mtime_ns]


def _plan(gguf: Path, check: Check | None) -> tuple[Described, list[Parameter]]:
    """What the file means, with every tensor and key accounted for. Reads only its header."""
    from pensieve.worker.gguf.file import open_model
    from pensieve.worker.gguf.plan import account, describe
    from pensieve.worker.gguf.tokenizer import require_tokenizer

    described = describe(open_model(gguf))
    if check:
        check(described.config)
    require_tokenizer(described.source.model)
    return described, account(described)


def _convert(gguf: Path, sha256: str, into: Path, progress: Progress | None, check: Check | None) -> None:
    from transformers import GenerationConfig

    from pensieve.worker.gguf.tokenizer import stop_ids, tokenizer_of
    from pensieve.worker.gguf.write import file_bytes, num_values, working_bytes, write

    what = f"converting {gguf.name}"
    if progress:
        progress(what, None)
    described, parameters = _plan(gguf, check)
    model, config = described.source.model, described.config
    _require_memory(gguf, working_bytes(parameters))
    _require_disk(gguf, into, file_bytes(parameters))
    tokenizer, tokenizer_note = tokenizer_of(model)
    tokenizer.save_pretrained(into)
    eos, bos = stop_ids(model.metadata), model.metadata.get("tokenizer.ggml.bos_token_id")
    config.eos_token_id = list(eos) if len(eos) > 1 else (eos[0] if eos else None)
    config.bos_token_id = int(bos) if bos is not None else None
    config.save_pretrained(into)
    GenerationConfig.from_model_config(config).save_pretrained(into)
    write(into / "model.safetensors", parameters, (lambda share: progress(what, share)) if progress else None)
    note = "; ".join(n for n in (described.meaning.note, tokenizer_note) if n) or None
    if note:
        log.warning("%s: %s", gguf.name, note)
    manifest = {
        "format": FORMAT,
        "source": {"name": gguf.name, "sha256": sha256},
        "eos_token_ids": list(eos),
        "num_parameters": num_values(parameters),
        "note": note,
        "transformers": importlib.metadata.version("transformers"),
        "files": {file.name: _entry(file) for file in sorted(into.iterdir())},
    }
    (into / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for file in into.iterdir():
        _sync(file)
    _sync(into)


def require_packages() -> None:
    """Raise ModelUnavailable, naming what to install, if a package for converting is missing or too old."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelUnavailable(
            "converting a GGUF file needs the package gguf: pip install 'pensieve-serve[gguf]'"
        )
    version = importlib.metadata.version("transformers")
    if tuple(int(part) for part in version.split(".")[:2]) < _MIN_TRANSFORMERS:
        need = ".".join(map(str, _MIN_TRANSFORMERS))
        raise ModelUnavailable(
            f"converting a GGUF file needs transformers {need} or later (earlier ones build wrong "
            f"tokenizers), this is {version}: "
            f"pip install 'transformers>={need}'"
        )


def _require_memory(gguf: Path, need_bytes: int) -> None:
    from pensieve.worker.random_weights import available_bytes

    room = available_bytes()
    if room is not None and need_bytes > room:
        raise ModelRefused(
            f"{gguf.name} does not fit: converting it takes {need_bytes / 1e9:.2f} GB of memory at a time, "
            f"{room / 1e9:.2f} GB are available. "
            "Ways out: close other programs, a smaller model, or a machine with more memory"
        )


def _require_disk(gguf: Path, into: Path, need_bytes: int) -> None:
    free = shutil.disk_usage(into).free
    if free < need_bytes:
        raise ModelUnavailable(
            f"converting {gguf.name} needs {need_bytes / 1e9:.1f} GB in {into.parent.parent}, "
            f"{free / 1e9:.1f} GB are free: make room "
            "(`pensieve models --cached` lists what was converted, --remove removes it), or set "
            "PENSIEVE_CACHE to a larger disk"
        )


def _entry(file: Path) -> dict[str, int | str]:
    stat = file.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_of(file)}


def _sync(path: Path) -> None:
    """Make a file's bytes, or a directory's names, survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
