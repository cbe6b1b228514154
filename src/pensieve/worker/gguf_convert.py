"""One GGUF file -> one folder a Hugging Face model loads from, kept in the user's cache. Knows no model names.

The folder (config, bfloat16 safetensors, tokenizer, chat template, manifest) is keyed by the file's SHA-256, built in
a temporary place under a lock and renamed into sight whole, so that no reader ever meets half a conversion. The
manifest lists every file's size, modification time and hash: a folder that disagrees with it is built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import platformdirs

from pensieve.errors import ModelRefused, ModelUnavailable

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Progress = Callable[[str, float | None], None]  # (what is being done, share done in [0, 1]; None = unknown)

FORMAT = 1  # of the converted folder: raised when a conversion of the same file would come out different
MANIFEST = "manifest.json"
_MIN_TRANSFORMERS = (5, 23)  # before it, tokenizers built from a GGUF take the wrong end-of-sequence token
# Pre-tokenizers that split digits one by one and then as GPT-2 does; transformers takes GPT-2's split alone for them,
# which merges the space before a number differently ("\n\n  1").
_SINGLE_DIGIT_SPLITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"})
_GPT2_SPLITS = frozenset({"default", "gpt-2", "gpt2"})


def cache_dir() -> Path:
    """Where fetched and converted models are kept: $PENSIEVE_CACHE, else the user's cache directory."""
    override = os.environ.get("PENSIEVE_CACHE")
    return Path(override).expanduser() if override else Path(platformdirs.user_cache_dir("pensieve"))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of transformers: progress is told once, by us."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def converted_path(sha256: str) -> Path:
    """Where the conversion of the GGUF with this hash lies, whether or not it is there."""
    return cache_dir() / "converted" / f"{sha256}-v{FORMAT}"


def is_sound(folder: Path, *, full: bool = False) -> bool:
    """Whether a converted folder is whole, as its manifest describes it.

    Sizes are always compared. A file is hashed when its modification time is not the recorded one, or when `full`.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return False
        for name, entry in manifest["files"].items():
            stat = (folder / name).stat()
            if stat.st_size != entry["bytes"]:
                return False
            if (full or stat.st_mtime_ns != entry["mtime_ns"]) and sha256_of(folder / name) != entry["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a converted folder: `eos_token_ids`, `num_parameters`, `note`, `source`, `files`."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return manifest


def ensure_converted(
    gguf: Callable[[], Path],
    sha256: str,
    progress: Progress | None = None,
    *,
    full_check: bool = False,
    check: Callable[[PretrainedConfig], None] | None = None,
) -> Path:
    """The folder converted from the GGUF with this hash, converting it first if needed.

    Args:
        gguf: gives the file; called only when it must be converted, with the lock held.
        sha256: hash of that file.
        progress: told what takes time.
        full_check: hash every file of a folder found (after loading from it failed).
        check: given the config, before a conversion is kept; may raise.

    Raises:
        ModelUnavailable: a package for converting is missing, the disk is full, or the file cannot be got.
        ModelRefused: the file is no GGUF transformers can read.
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
        for leftover in folder.parent.glob(f".{sha256[:16]}-*"):  # of a process that was killed: the lock is ours
            shutil.rmtree(leftover, ignore_errors=True)
        path = gguf()
        with tempfile.TemporaryDirectory(prefix=f".{sha256[:16]}-", dir=folder.parent) as scratch:
            fresh = Path(scratch) / "model"
            fresh.mkdir()
            with quiet():
                _convert(path, sha256, fresh, progress, *([check] if check else []))
            if folder.exists():
                folder.rename(Path(scratch) / "damaged")
            fresh.rename(folder)
            _sync(folder.parent)
    return folder


def file_hash(gguf: Path, progress: Progress | None = None) -> str:
    """SHA-256 of a GGUF file, remembered in the cache by path, size and modification time.

    A file of tens of GB takes a minute to hash; a start must not.
    """
    gguf = gguf.resolve()
    stat = gguf.stat()
    stamp = [str(gguf), stat.st_size, stat.st_mtime_ns]
    memo = cache_dir() / "hashes" / f"{hashlib.sha256(str(gguf).encode()).hexdigest()[:32]}.json"
    try:
        remembered = json.loads(memo.read_text())
        if remembered["stamp"] == stamp:
            return str(remembered["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no memo, or a damaged one: hash the file
    if progress:
        progress(f"hashing {gguf.name}", None)
    digest = sha256_of(gguf)
    memo.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=memo.parent, delete=False) as file:
        json.dump({"stamp": stamp, "sha256": digest}, file)
    os.replace(file.name, memo)
    return digest


def _convert(
    gguf: Path, sha256: str, into: Path, progress: Progress | None, check: Callable[[PretrainedConfig], None] | None = None
) -> None:
    import torch

    from pensieve.worker.random_weights import require_room

    if progress:
        progress(f"converting {gguf.name}", None)
    metadata, num_parameters, tensor_names = _read_header(gguf)
    require_room(gguf.name, num_parameters, torch.bfloat16, "cpu")
    _require_disk(gguf, into, 2 * num_parameters)
    eos = _stop_ids(metadata)
    model = _load(gguf, metadata, eos)
    if check is not None:
        check(model.config)
    notes = _mend_rope(gguf, model, tensor_names)
    model.save_pretrained(into)
    num_parameters = sum(p.numel() for p in model.parameters())
    del model
    tokenizer, tokenizer_note = _tokenizer(gguf, metadata)
    tokenizer.save_pretrained(into)
    note = "; ".join(n for n in (notes, tokenizer_note) if n) or None
    manifest = {
        "format": FORMAT,
        "source": {"name": gguf.name, "sha256": sha256},
        "eos_token_ids": list(eos),
        "num_parameters": num_parameters,
        "note": note,
        "transformers": importlib.metadata.version("transformers"),
        "files": {file.name: _entry(file) for file in sorted(into.iterdir())},
    }
    (into / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for file in into.iterdir():
        _sync(file)
    _sync(into)


def require_packages() -> None:
    """Raise ModelUnavailable, saying what to install, if a package for converting is missing."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelUnavailable(
            f"converting a GGUF file needs the package{'s' if len(missing) > 1 else ''} {' and '.join(missing)}: pip install 'pensieve-serve[gguf]'"
        )
    version = importlib.metadata.version("transformers")
    if tuple(int(part) for part in version.split(".")[:2]) < _MIN_TRANSFORMERS:
        need = ".".join(map(str, _MIN_TRANSFORMERS))
        raise ModelUnavailable(
            f"converting a GGUF file needs transformers {need} or later (earlier ones build wrong tokenizers), this is {version}: "
            f"pip install 'transformers>={need}'"
        )


def _read_header(gguf: Path) -> tuple[dict[str, Any], int, frozenset[str]]:
    """(scalar metadata, number of weights, tensor names); vocabulary-sized arrays are left out."""
    from gguf import GGUFReader, GGUFValueType

    try:
        reader = GGUFReader(gguf)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ModelRefused(f"{gguf} is not a readable GGUF file ({error}): fetch it again, or name a folder or a hub id") from error
    metadata = {name: f.contents() for name, f in reader.fields.items() if f.types and f.types[0] is not GGUFValueType.ARRAY}
    return metadata, sum(int(tensor.n_elements) for tensor in reader.tensors), frozenset(tensor.name for tensor in reader.tensors)


def _require_disk(gguf: Path, into: Path, need_bytes: int) -> None:
    free = shutil.disk_usage(into).free
    if free < need_bytes:
        raise ModelUnavailable(
            f"converting {gguf.name} needs {need_bytes / 1e9:.1f} GB in {into.parent.parent}, {free / 1e9:.1f} GB are free: "
            "make room, or set PENSIEVE_CACHE to a larger disk"
        )


def _stop_ids(metadata: dict[str, Any]) -> tuple[int, ...]:
    """Token ids that end an answer, as the file names them: end of sequence, of turn, of message."""
    ids = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))


def _load(gguf: Path, metadata: dict[str, Any], eos: tuple[int, ...]) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    try:
        # The reader of GGUF files has a progress bar of its own, which `quiet` does not reach.
        with contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
                local_files_only=True,
            )
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise ModelRefused(
            f"transformers cannot read {gguf} (architecture {metadata.get('general.architecture')!r}): {error}. "
            "Name a hub id or a folder with safetensors of the same model instead"
        ) from error
    # What is saved are plain weights; a config that still speaks of GGUF could not be loaded again.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    for holder in (model.config, model.generation_config):
        holder.eos_token_id = list(eos) if len(eos) > 1 else (eos[0] if eos else None)
        holder.bos_token_id = int(bos) if bos is not None else None
    return model


def _tokenizer(gguf: Path, metadata: dict[str, Any]) -> tuple[PreTrainedTokenizerBase, str | None]:
    """The tokenizer the file describes, and a note if its way to split text is not known."""
    from transformers import AutoTokenizer
    from transformers.integrations.gguf import gguf_tokenizer_mapping

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    architecture = metadata["general.architecture"]
    context = metadata.get(f"{architecture}.context_length")
    if context is not None:
        tokenizer.model_max_length = int(context)
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        return tokenizer, None
    split = metadata.get("tokenizer.ggml.pre", "default")
    if split in _SINGLE_DIGIT_SPLITS:
        from tokenizers import pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
        return tokenizer, None
    if split in _GPT2_SPLITS or split in getattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", {}):
        return tokenizer, None
    note = f"text is split as GPT-2 does, because the file's own way ({split!r}) is not known: some texts get other tokens than in training"
    log.warning("%s: %s", gguf.name, note)
    return tokenizer, note


def _mend_rope(gguf: Path, model: PreTrainedModel, tensor_names: frozenset[str]) -> str | None:
    """Put back the rotary scaling that the file stores as a tensor and transformers does not read.

    Llama 3.1 and later keep their frequency factors in `rope_freqs.weight`: 1 for short wavelengths, `factor` for
    long ones, a ramp between. The factors are compared with the published rule; other factors give a note.
    """
    if "rope_freqs.weight" not in tensor_names or model.config.rope_parameters.get("rope_type") != "default":
        return None
    import torch
    from gguf import GGUFReader
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stored = next(torch.tensor(t.data).float().flatten() for t in GGUFReader(gguf).tensors if t.name == "rope_freqs.weight")
    plain = dict(model.config.rope_parameters)
    head_dim = 2 * stored.numel()
    unscaled = 1.0 / plain["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
    model.config.rope_parameters = {
        **plain,
        "rope_type": "llama3",
        "factor": float(stored.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    if scaled.shape == unscaled.shape and torch.allclose(unscaled / scaled, stored, rtol=1e-3):
        return None
    model.config.rope_parameters = plain
    note = "the file's rotary frequency factors are of an unknown kind and were left out: answers over long contexts may suffer"
    log.warning("%s: %s", gguf.name, note)
    return note


def _entry(file: Path) -> dict[str, int | str]:
    stat = file.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_of(file)}


def _sync(path: Path) -> None:
    """Make a file's bytes, or a directory's names, outlive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
