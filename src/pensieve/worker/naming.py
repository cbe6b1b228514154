"""Parses what a user typed after `--model`: a file, a repository of the hub, a model of Ollama's.

Knows names and places; never loads anything.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pensieve.errors import ConfigError

_HUB_HOST = re.compile(
    r"^(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(.+)$|^hf://(.+)$", re.IGNORECASE
)
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
_QUANT = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|BF16|F16|F32|FP16|FP32|MXFP4\w*|TQ\d\w*))\.gguf$", re.IGNORECASE
)
_PICTURES = "mmproj"  # begins the names of files that hold the vision part
_OTHER_FORMATS = {
    ".onnx": "an ONNX file, which holds a graph instead of a model's weights", ".pt": "a PyTorch file",
    ".pth": "a PyTorch file", ".ckpt": "a checkpoint of a training", ".pkl": "a pickle",
    ".h5": "a TensorFlow file", ".msgpack": "a Flax file", ".tflite": "a TensorFlow Lite file",
    ".mlmodel": "a Core ML file", ".zip": "an archive", ".gz": "an archive", ".tar": "an archive",
}  # fmt: skip
_WAYS = (
    "Name a folder with config.json, weights (model.safetensors) and a tokenizer, a .gguf file, "
    "or a hub id (ORG/NAME)"
)


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository of the hub, and which of its files is meant."""

    repo: str
    file: str | None = None  # from a URL; None if it names no file
    quant: str | None = None  # from after a colon, such as Q4_K_M; None if there is none


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do, whatever its name (Ollama's have no suffix)."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def require_gguf(spec: str, path: Path) -> Path:
    """Check that a named file is a GGUF file.

    Raises:
        ConfigError: it is a file of another kind; the message says the way out.
    """
    if is_gguf(path) or path.suffix.lower() == ".gguf":  # the reader refuses a damaged one
        return path
    beside = path.parent / "config.json"
    if path.suffix.lower() in (".safetensors", ".bin"):
        way = (
            f"name its folder: --model {path.parent}"
            if beside.exists()
            else f"put config.json and a tokenizer beside it and name its folder. {_WAYS}"
        )
        raise ConfigError(f"{spec!r} is one file of weights, and says nothing of the model's shape: {way}")
    if path.name in ("tokenizer.model", "tokenizer.json", "config.json") or path.name.endswith(".index.json"):
        raise ConfigError(f"{spec!r} is one file of a model: name its folder, --model {path.parent}")
    kind = _OTHER_FORMATS.get(path.suffix.lower(), "no GGUF file")
    raise ConfigError(f"{spec!r} is {kind}. {_WAYS}")


def gguf_in(spec: str, folder: Path) -> Path | None:
    """The one GGUF model of a folder without other models, by its first part; None if there is none.

    Raises:
        ConfigError: there are several; the message lists them.
    """
    sets = first_parts(
        path.name for path in folder.iterdir() if path.is_file() and path.name.lower().endswith(".gguf")
    )
    if len(sets) > 1:
        listed = ", ".join(str(Path(spec) / name) for name in sets)
        raise ConfigError(f"the folder {spec!r} holds {len(sets)} GGUF models: name one of them, {listed}")
    return folder / sets[0] if sets else None


def first_parts(names: Iterable[str]) -> list[str]:
    """The first parts of the GGUF models among file names, without vision parts."""
    found = sorted(name for name in names if not name.rpartition("/")[2].lower().startswith(_PICTURES))
    sets: dict[str, str] = {}
    for name in found:
        sets.setdefault(_SPLIT.sub("", name), name)
    return list(sets.values())


def parts_of(first: str, names: Iterable[str]) -> list[str]:
    """All parts of the model whose first part has this name."""
    stem = _SPLIT.sub("", first)
    return [name for name in names if name == first or _SPLIT.sub("", name) == stem != name]


def hub_name(spec: str) -> HubName | None:
    """The hub repository that a text names; None if it names none.

    It may be a hub id, with `:QUANT` or without, or in the form of hf.co/... or https://huggingface.co/...
    """
    match = _HUB_HOST.match(spec.strip())
    rest = (match[1] or match[2]).partition("?")[0].strip("/") if match else spec
    pieces = rest.split("/")
    if len(pieces) < 2 or not all(pieces[:2]) or spec.startswith((".", "~", "/")):
        return None
    name, _, quant = pieces[1].partition(":")
    repo = f"{pieces[0]}/{name}"
    if ":" in pieces[0] or "\\" in spec or not name:
        return None
    if len(pieces) == 2:
        return HubName(repo, quant=quant or None)
    if match and len(pieces) >= 4 and pieces[2] in ("blob", "resolve", "tree", "raw"):
        file = "/".join(pieces[4:])
        return HubName(repo, file=file if file.lower().endswith(".gguf") else None)
    return None


def choose_gguf(repo: str, names: Sequence[str], wanted: HubName) -> str:
    """The first part of the GGUF model that is meant, of those in a repository.

    Raises:
        ConfigError: there is no such file, or it is not clear which; the message lists what can be named.
    """
    sets = first_parts(name for name in names if name.lower().endswith(".gguf"))
    if wanted.file is not None:
        if wanted.file in names:
            return wanted.file
        raise ConfigError(f"{repo} holds no file {wanted.file!r}; it holds {_listed(sets) or 'no GGUF file'}")
    by_quant: dict[str, list[str]] = {}
    for name in sets:
        by_quant.setdefault(quant_of(name), []).append(name)
    ways = ", ".join(f"{repo}:{quant}" for quant in sorted(by_quant) if quant)
    if wanted.quant is None:
        if len(sets) == 1:
            return sets[0]
        raise ConfigError(f"{repo} holds {len(sets)} GGUF models: name one, {ways or _listed(sets)}")
    fitting = by_quant.get(wanted.quant.upper(), []) or [
        name for name in sets if wanted.quant.lower() in name.lower()
    ]
    if len(fitting) == 1:
        return fitting[0]
    if not sets:
        raise ConfigError(
            f"{repo} holds no GGUF files, so :{wanted.quant} means nothing: name it without, --model {repo}"
        )
    raise ConfigError(
        f"{repo} holds {len(fitting) or 'no'} GGUF models {wanted.quant!r}: name one, {ways or _listed(sets)}"
    )


def quant_of(name: str) -> str:
    """The number type in a GGUF file's name, in capitals; empty if the name has none."""
    match = _QUANT.search(_SPLIT.sub(".gguf", name))
    return match[1].upper() if match else ""


def ollama_model(spec: str) -> Path | None:
    """The GGUF blob of a model in Ollama's folder, by Ollama's name for it; None if there is no such model.

    Raises:
        ConfigError: Ollama's model of that name is not one GGUF file.
    """
    root = ollama_root()
    name, _, tag = spec.partition(":")
    pieces = name.split("/")
    if not all(re.fullmatch(r"[\w.-]+", piece) for piece in (*pieces, tag or "latest")) or ".." in pieces:
        return None
    host = [] if "." in pieces[0] and len(pieces) > 1 else ["registry.ollama.ai"]
    library = ["library"] if len(pieces) == 1 else []
    manifest = root.joinpath("manifests", *host, *library, *pieces, tag or "latest")
    try:
        layers = json.loads(manifest.read_text())["layers"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    kinds = {
        str(layer.get("mediaType", "")).rpartition(".")[2]: str(layer.get("digest", "")) for layer in layers
    }
    if "adapter" in kinds:
        raise ConfigError(
            f"Ollama's {spec!r} is a model with an adapter on it, which cannot be served: name its base model"
        )
    blob = root / "blobs" / kinds.get("model", "none").replace(":", "-")
    if not is_gguf(blob):
        raise ConfigError(
            f"Ollama's {spec!r} has no GGUF file in {root / 'blobs'}: `ollama pull {spec}` again"
        )
    return blob


def ollama_root() -> Path:
    """The folder in which Ollama keeps its models."""
    return Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models")


def looks_like_ollama(spec: str) -> bool:
    """Whether a text has the form NAME:TAG."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?:[\w.-]+", spec) is not None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
