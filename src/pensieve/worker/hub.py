"""Gets a model's folder from the Hugging Face hub or its local cache.

Knows repositories and files; never presets. The local cache answers first, without the network. A hub that
cannot be reached is given up within seconds.
"""

from __future__ import annotations

import json
import queue
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pensieve.errors import ConfigError, ModelUnavailable
from pensieve.worker import naming
from pensieve.worker.gguf_convert import Progress
from pensieve.worker.random_weights import require_weights_fit

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

_PROBE_S = 3.0  # seconds that the hub may take to answer at all
_SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
)
_SIDE_PREFIXES = ("tokenizer", "special_tokens_map", "chat_template", "spiece", "sentencepiece")


class HubOutOfReach(Exception):
    """The repository may exist, but its weights cannot be fetched now; the message says why."""


class HubUnknown(Exception):
    """The hub has no such repository, or hides it."""


class OnlyGguf(Exception):
    """A repository whose weights are GGUF files."""

    def __init__(self, repo: str) -> None:
        super().__init__(repo)
        self.repo = repo


def cached_folder(repo: str) -> Path | None:
    """The folder of a repository in the local cache; None if it holds no config. Uses no network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        # Not snapshot_download(local_files_only=True): that requires the repository's every file, also those
        # never fetched.
        config = try_to_load_from_cache(repo, "config.json")
    except HFValidationError as error:
        raise ConfigError(f"{repo!r} is not a hub id (ORG/NAME): {error}") from error
    return Path(config).parent if isinstance(config, str) else None


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
                raise ModelUnavailable(
                    f"{folder / index} is damaged ({error}): fetch the model again"
                ) from error
            return all((folder / shard).exists() for shard in shards)
    return False


def fetch(
    repo: str,
    dtype: torch.dtype,
    device: str,
    progress: Progress | None = None,
    *,
    with_weights: bool = True,
    check: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Download a repository's config, tokenizer and weights into the local cache; returns the folder.

    Args:
        repo: hub id.
        dtype: number type in which it will be loaded: a model too large for `device` is refused before it is
            fetched.
        device: where it will be loaded.
        progress: called when the download starts.
        with_weights: False fetches only the small files.
        check: called with the folder of the small files, before any weights are fetched; may raise.

    Raises:
        HubOutOfReach: no answer, an answer that denies access, or a download that broke.
        HubUnknown: no such repository.
        OnlyGguf: its weights are GGUF files.
        ModelRefused: its weights would not fit in memory.
        ModelUnavailable: its files would not fit on the disk.
    """
    info = _ask(repo)
    sizes = {s.rfilename: s.size or 0 for s in info.siblings or ()}
    names = wanted_files(sizes, with_weights=with_weights)
    small = wanted_files(sizes, with_weights=False)
    if (
        names == small
        and with_weights
        and naming.first_parts(name for name in sizes if name.lower().endswith(".gguf"))
    ):
        raise OnlyGguf(repo)
    size = sum(sizes[name] for name in names)
    if with_weights:
        require_weights_fit(
            repo, info.safetensors.total if info.safetensors is not None else size // 2, dtype, device
        )
    _require_disk(repo, size)
    if progress:
        progress(f"fetching {repo} from the hub ({size / 1e9:.2f} GB)", None)
    if "config.json" in small:
        check(_download(repo, small))
    return _download(repo, names)


def fetch_gguf(wanted: naming.HubName, progress: Progress | None = None) -> Path:
    """Download a GGUF file of a repository, with all its parts; returns the first part.

    The local cache answers first, if it holds the file.

    Raises:
        ConfigError: the repository holds no such file, or several.
        HubOutOfReach, HubUnknown, ModelUnavailable: as `fetch`.
    """
    if (here := cached_gguf(wanted)) is not None:
        return here
    info = _ask(wanted.repo)
    sizes = {s.rfilename: s.size or 0 for s in info.siblings or ()}
    first = naming.choose_gguf(wanted.repo, list(sizes), wanted)
    names = naming.parts_of(first, sizes)
    size = sum(sizes[name] for name in names)
    _require_disk(wanted.repo, size)
    if progress:
        progress(f"fetching {first} of {wanted.repo} from the hub ({size / 1e9:.2f} GB)", None)
    return _download(wanted.repo, names) / first


def cached_gguf(wanted: naming.HubName) -> Path | None:
    """The first part of a GGUF model in the local cache. Uses no network.

    None if a part is missing, or if it is not clear which file is meant.
    """
    cached = _cached_ggufs(wanted.repo)
    try:
        first = naming.choose_gguf(wanted.repo, list(cached), wanted)
    except ConfigError:
        return None
    return None if _lacks_parts(first, naming.parts_of(first, cached)) else cached[first]


def _lacks_parts(first: str, parts: list[str]) -> bool:
    total = first.lower().rpartition("-of-")[2].removesuffix(".gguf") if "-of-" in first else ""
    return total.isdigit() and len(parts) < int(total)


def _cached_ggufs(repo: str) -> dict[str, Path]:
    """GGUF files of a repository in the local cache, by their names there."""
    from huggingface_hub import constants

    snapshots = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots"
    return {
        str(path.relative_to(snapshot)): path
        for snapshot in snapshots.glob("*")
        for path in snapshot.rglob("*.gguf")
    }


def _require_disk(repo: str, size: int) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(cache).free) < size:
        raise ModelUnavailable(
            f"{repo} is {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in {cache}: make room, or set "
            "HF_HOME"
        )


def _download(repo: str, names: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=names))
    except Exception as error:
        raise HubOutOfReach(f"fetching {repo} broke off ({type(error).__name__}: {error})") from error


def _ask(repo: str) -> ModelInfo:
    """The hub's information on a repository, within seconds, or the reason why there is none."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    answers: queue.SimpleQueue[ModelInfo | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(HfApi().model_info(repo, timeout=_PROBE_S, files_metadata=True))
        except Exception as error:  # the hub client's HTTP libraries raise errors of their own
            answers.put(error)

    # A thread, because looking a name up without a name server ignores timeouts.
    threading.Thread(target=ask, name="hub-probe", daemon=True).start()
    try:
        answer = answers.get(timeout=3 * _PROBE_S)
    except queue.Empty:
        raise HubOutOfReach(f"the hub did not answer within {3 * _PROBE_S:.0f} s") from None
    match answer:
        case GatedRepoError():
            raise HubOutOfReach(
                f"{repo} is gated: accept its licence on its hub page, then `hf auth login`"
            ) from answer
        case RepositoryNotFoundError():
            raise HubUnknown(
                f"the hub has no model {repo!r}, or none that you may see (`hf auth login`)"
            ) from answer
        case OfflineModeIsEnabled():
            raise HubOutOfReach("HF_HUB_OFFLINE is set") from answer
        case Exception():
            raise HubOutOfReach(f"the hub does not answer ({type(answer).__name__}: {answer})") from answer
    return answer


def wanted_files(names: Iterable[str], *, with_weights: bool = True) -> list[str]:
    """The files of a repository to load a model from: one kind of weights, safetensors first."""
    top = [name for name in names if "/" not in name]
    side = [name for name in top if name in _SIDE_FILES or name.startswith(_SIDE_PREFIXES)]
    if not with_weights:
        return side
    safetensors = [
        name
        for name in top
        if name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))
    ]
    pickled = [
        name
        for name in top
        if name.startswith("pytorch_model") and name.endswith((".bin", ".bin.index.json"))
    ]
    return side + (safetensors or pickled)
