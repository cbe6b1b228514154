"""Getting a model's folder from the Hugging Face hub or its local cache. Knows repositories and files, no presets.

The local cache answers first, without the network. A hub that cannot be reached is given up within seconds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from pensieve.errors import ConfigError, ModelUnavailable
from pensieve.worker.gguf_convert import Progress
from pensieve.worker.random_weights import require_room

_PROBE_S = 3.0  # how long the hub may take to answer at all
_SIDE_FILES = ("config.json", "generation_config.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
_SIDE_PREFIXES = ("tokenizer", "special_tokens_map", "chat_template", "spiece", "sentencepiece")


class HubOutOfReach(Exception):
    """The repository may exist, but its weights cannot be had now; the text says why, for people."""


class HubUnknown(Exception):
    """The hub says that there is no such repository (or hides it)."""


def cached_folder(repo: str) -> Path | None:
    """The folder of a repository in the local cache, if it holds a config; no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = Path(snapshot_download(repo, local_files_only=True))
    except HFValidationError as error:
        raise ConfigError(f"{repo!r} is not a hub id (ORG/NAME): {error}") from error
    except (OSError, ValueError):  # LocalEntryNotFoundError is both, by version
        return None
    return folder if (folder / "config.json").exists() else None


def has_weights(folder: Path) -> bool:
    """Whether all weight files of a model folder are there, shards included."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).exists():
            return True
        if (folder / index).exists():
            try:
                shards = set(json.loads((folder / index).read_text())["weight_map"].values())
            except (OSError, ValueError, KeyError, AttributeError) as error:
                raise ModelUnavailable(f"{folder / index} is damaged ({error}): fetch the model again") from error
            return all((folder / shard).exists() for shard in shards)
    return False


def fetch(repo: str, dtype: torch.dtype, device: str, progress: Progress | None = None) -> Path:
    """Download a repository's config, tokenizer and weights into the local cache.

    Args:
        repo: hub id.
        dtype: number type it will be loaded in: a model too large for `device` is refused before it is fetched.
        device: where it will be loaded.
        progress: told when the download starts.

    Raises:
        HubOutOfReach: no answer, an answer that denies access, or a download that broke.
        HubUnknown: no such repository.
        ModelRefused: its weights would not fit in memory.
        ModelUnavailable: its files would not fit on the disk.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        info = HfApi().model_info(repo, timeout=_PROBE_S, files_metadata=True)
    except GatedRepoError as error:
        raise HubOutOfReach(f"{repo} is gated: accept its licence on its hub page, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise HubUnknown(f"the hub has no model {repo!r}, or not for you (`hf auth login`)") from error
    except OfflineModeIsEnabled as error:
        raise HubOutOfReach("HF_HUB_OFFLINE is set") from error
    except Exception as error:  # whichever HTTP library the hub client is built on raises its own kinds
        raise HubOutOfReach(f"the hub does not answer ({type(error).__name__}: {error})") from error

    sizes = {s.rfilename: s.size or 0 for s in info.siblings or ()}
    names = wanted_files(sizes)
    size = sum(sizes[name] for name in names)
    num_parameters = info.safetensors.total if info.safetensors is not None else size // 2
    require_room(repo, num_parameters, dtype, device)
    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(cache).free) < size:
        raise ModelUnavailable(f"{repo} is {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in {cache}: make room, or set HF_HOME")
    if progress:
        progress(f"fetching {repo} from the hub ({size / 1e9:.2f} GB)", None)
    try:
        return Path(snapshot_download(repo, allow_patterns=names))
    except Exception as error:
        raise HubOutOfReach(f"fetching {repo} broke off ({type(error).__name__}: {error})") from error


def wanted_files(names: Iterable[str]) -> list[str]:
    """Of a repository's files, those a model is loaded from: one kind of weights, safetensors first, and no folders."""
    top = [name for name in names if "/" not in name]
    side = [name for name in top if name in _SIDE_FILES or name.startswith(_SIDE_PREFIXES)]
    safetensors = [name for name in top if name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))]
    pickled = [name for name in top if name.startswith("pytorch_model") and name.endswith((".bin", ".bin.index.json"))]
    return side + (safetensors or pickled)
