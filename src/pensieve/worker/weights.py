"""Finds and loads weights: the embedded default, a folder, the hub, a GGUF file, or random ones.

Knows model names and folders; never attention, batches or caches. Turns what a user typed after `--model`
into a `ResolvedModel`, and that into a Hugging Face model. `python -m pensieve.worker.weights fetch` gets the
default model ahead of time.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pensieve.errors import ConfigError, ModelRefused, ModelUnavailable, PensieveError
from pensieve.worker import embedded, naming
from pensieve.worker.gguf_convert import Progress, ensure_file_converted, is_sound, read_manifest
from pensieve.worker.model_folder import (
    TOKENIZER_FILES,
    config_of,
    holds_model,
    require_model_folder,
    stop_ids,
)
from pensieve.worker.presets import BY_HUB_ID, PRESETS, Preset

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from pensieve.worker.group import Group

# torch and transformers are imported where they are used: listing models and fetching the default need
# neither.

Source = Literal["embedded", "folder", "hub", "gguf", "random"]
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model that was found, but not loaded yet. Picklable."""

    spec: str  # as the user named it
    label: str  # its name in messages
    source: Source
    weights: Literal["real", "random"]
    folder: Path | None  # config.json, weights and tokenizer files; None for random weights
    config: PretrainedConfig
    tokenizer_dir: Path | None  # None without a tokenizer: token ids must be drawn
    eos_token_ids: tuple[int, ...]  # ids that end an answer when sampled; empty for random weights
    num_parameters: int
    # what the user should know, for example why the weights are random; None if nothing
    note: str | None = None
    gguf: Path | None = None  # the file it was converted from; None if it was not


def resolve(
    spec: str = embedded.NAME,
    weights: Literal["auto", "random"] = "auto",
    *,
    dtype: str = "bfloat16",
    device: str = "cpu",
    allow_random: bool = True,
    progress: Progress | None = None,
) -> ResolvedModel:
    """Find the model that a user named.

    Args:
        spec: `smollm2`, a GGUF file (by its first bytes), a preset's name, a folder (of a model, or with one
            GGUF file), a hub id (also as ORG/NAME:QUANT, hf.co/... or a URL), or Ollama's name for a model
            here; the first that fits, in this order (`./gpt2` names a folder that has a preset's name).
        weights: "auto" takes real weights, or random ones of the same shape if there are none (`note` says
            why); "random" takes random ones, for which a config is enough.
        dtype: number type it will be loaded in; with `device`, decides whether a download would fit.
        device: where it will be loaded.
        allow_random: False refuses random weights.
        progress: called with (slow work, share done or None).

    Raises:
        ConfigError: no such model; the message lists similar names.
        ModelUnavailable: real weights cannot be had and random ones are not allowed; the message says the
            ways out.
        ModelRefused: found, but too large or of a kind transformers cannot build.
    """
    if weights not in ("auto", "random"):
        raise ConfigError(f"weights must be 'auto' or 'random', got {weights!r}")
    if weights == "random" and not allow_random:
        raise ConfigError("random weights cannot talk: use --weights auto here")
    if not spec.strip():
        raise ConfigError(
            f"--model is empty. The default is {embedded.NAME!r}; `pensieve models` lists what can be loaded"
        )
    number_type = torch_dtype(dtype)
    if spec == embedded.NAME:
        if weights == "random":
            return _random(spec, PRESETS[embedded.PRESET].config(), "asked for")
        return _from_conversion(spec, "embedded", embedded.ensure_default(progress))
    path = Path(spec).expanduser()
    if path.is_file():
        return _from_gguf(spec, naming.require_gguf(spec, path), weights, number_type, device, progress)
    preset = PRESETS.get(spec.lower())
    if preset is None and path.is_dir():
        gguf = None if holds_model(path) else naming.gguf_in(spec, path)
        return (
            _from_folder(spec, path, "folder", weights, allow_random)
            if gguf is None
            else _from_gguf(spec, gguf, weights, number_type, device, progress)
        )
    preset = preset or BY_HUB_ID.get(spec.lower())
    name = naming.hub_name(spec)
    if preset is None and spec.lower().endswith(".gguf") and (name is None or name.file is None):
        raise ConfigError(f"there is no file {spec!r}")
    if preset is None and (name is None or ":" in spec) and (blob := naming.ollama_model(spec)) is not None:
        return _from_gguf(spec, blob, weights, number_type, device, progress, label=spec)
    if preset is None and name is None:
        raise ConfigError(_unknown(spec))
    if weights == "random" and preset is not None:
        return _random(spec, preset.config(), "asked for")
    if preset is None and name is not None and (name.file is not None or name.quant is not None):
        from pensieve.worker.hub import fetch_gguf

        return _from_gguf(
            spec, _reached(spec, lambda: fetch_gguf(name, progress)), weights, number_type, device, progress
        )
    repo = preset.hub_id if preset is not None else name.repo if name is not None else None
    return _from_hub(spec, repo, preset, weights, number_type, device, allow_random, progress)


def load(
    resolved: ResolvedModel,
    dtype: str | torch.dtype = "bfloat16",
    device: str = "cpu",
    group: Group | None = None,
) -> PreTrainedModel:
    """Load a model, in evaluation mode, without gradients, on `device`.

    With a group, load this rank's share of it, on the rank's device. A damaged conversion is found here at
    the latest, built again, and loaded.

    Raises:
        ModelRefused: the weights do not fit in memory (nothing was allocated), or the files cannot be loaded.
        ModelUnavailable: a damaged conversion could not be built again.
        ConfigError: the model cannot be split over the group.
    """
    from pensieve.worker.allocator import return_freed_memory
    from pensieve.worker.random_weights import build, bytes_beside, require_weights_fit

    number_type = torch_dtype(dtype) if isinstance(dtype, str) else dtype
    return_freed_memory()
    if group is not None:
        return _load_share(resolved, number_type, group)
    beside = bytes_beside(resolved.config, resolved.num_parameters, number_type, device)
    require_weights_fit(resolved.label, resolved.num_parameters, number_type, device, beside=beside)
    if resolved.weights == "random":
        return build(resolved.config, number_type, device)
    assert resolved.folder is not None
    try:
        return _load_folder(resolved.folder, resolved.label, number_type, device)
    except ModelRefused:
        if resolved.source in ("embedded", "gguf") and (folder := _rebuilt(resolved)) is not None:
            return _load_folder(folder, resolved.label, number_type, device)
        raise


def fetch_default(progress: Progress | None = None) -> Path:
    """Fetch and convert the embedded default ahead of its first use; returns the folder it loads from.

    Raises:
        ModelUnavailable: as `resolve`.
    """
    return embedded.ensure_default(progress)


def torch_dtype(name: str) -> torch.dtype:
    """A torch dtype by its name.

    Raises:
        ConfigError: not one of `DTYPES`.
    """
    import torch

    if name not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _random(
    spec: str, config: PretrainedConfig, reason: str, tokenizer_dir: Path | None = None
) -> ResolvedModel:
    from pensieve.worker.random_weights import count_parameters

    if hasattr(config, "quantization_config"):
        del config.quantization_config  # random weights are plain
    note = f"random weights of this shape ({reason}): they time, they do not talk"
    return ResolvedModel(
        spec, spec, "random", "random", None, config, tokenizer_dir, (), count_parameters(config), note
    )


def _from_conversion(spec: str, source: Source, folder: Path) -> ResolvedModel:
    manifest = read_manifest(folder)
    stop = tuple(manifest["eos_token_ids"])
    label = spec if source == "embedded" else Path(spec).name
    return ResolvedModel(
        spec,
        label,
        source,
        "real",
        folder,
        config_of(folder),
        folder,
        stop,
        manifest["num_parameters"],
        manifest["note"],
    )


def _from_gguf(
    spec: str,
    path: Path,
    weights: str,
    dtype: torch.dtype,
    device: str,
    progress: Progress | None,
    *,
    label: str | None = None,
) -> ResolvedModel:
    from pensieve.worker import gate
    from pensieve.worker.random_weights import require_weights_fit

    name = label or path.name
    folder = ensure_file_converted(
        path,
        progress,
        check=lambda config: gate.check_config(config, name),
        room=lambda count: require_weights_fit(name, count, dtype, device),
    )
    found = replace(_from_conversion(spec, "gguf", folder), label=name, gguf=path)
    return found if weights == "auto" else _random(spec, found.config, "asked for", found.tokenizer_dir)


def _unknown(spec: str) -> str:
    """Why a name is not a model, and which names are similar."""
    if naming.looks_like_ollama(spec):
        return (
            f"there is no model {spec!r}: it reads like an Ollama name, and none such is in "
            f"{naming.ollama_root()}. Get it there "
            f"(`ollama pull {spec}`), or name a .gguf file, a folder or a hub id (ORG/NAME, ORG/NAME:Q4_K_M)"
        )
    return (
        f"there is no model {spec!r}: it is no preset, folder, .gguf file or hub id (ORG/NAME).{_near(spec)}"
    )


def _reached(spec: str, fetch: Callable[[], Path]) -> Path:
    from pensieve.worker.hub import HubOutOfReach, HubUnknown

    try:
        return fetch()
    except HubUnknown as error:
        raise ConfigError(f"{error}.{_near(spec)}") from error
    except HubOutOfReach as error:
        raise ModelUnavailable(
            f"{spec!r} cannot be had ({error}). Ways out: --model FILE.gguf with a copy of it, or --model "
            f"{embedded.NAME}"
        ) from error


def _from_folder(spec: str, folder: Path, source: Source, weights: str, allow_random: bool) -> ResolvedModel:
    from pensieve.worker import gate, loading
    from pensieve.worker.hub import has_weights
    from pensieve.worker.random_weights import num_weights, outline
    from pensieve.worker.weight_files import missing_shards

    require_model_folder(spec, folder)
    config = config_of(folder)
    gate.check_config(config, spec)
    tokenizer_dir = folder if any((folder / name).exists() for name in TOKENIZER_FILES) else None
    if weights == "random":
        return _random(spec, config, "asked for", tokenizer_dir)
    if not has_weights(folder):
        gone = missing_shards(folder)
        lacking = (
            ", ".join(gone[:4]) + (", ..." if len(gone) > 4 else "")
            if gone
            else "model.safetensors, its shards, or pytorch_model.bin"
        )
        reason = f"{folder} lacks weight files ({lacking})"
        if not allow_random:
            raise ModelUnavailable(f"{reason}: complete it, or name another model")
        return _random(spec, config, reason, tokenizer_dir)
    if not allow_random and tokenizer_dir is None:
        raise ModelUnavailable(
            f"{spec} has no tokenizer ({', '.join(TOKENIZER_FILES)}), so it cannot talk: put its tokenizer "
            f"files into {folder}"
        )
    model = outline(config)
    _, note = loading.inspect(folder, model, spec)
    return ResolvedModel(
        spec,
        spec,
        source,
        "real",
        folder,
        config,
        tokenizer_dir,
        stop_ids(folder, config),
        num_weights(model),
        note,
    )


def _from_hub(
    spec: str,
    repo: str | None,
    preset: Preset | None,
    weights: str,
    dtype: torch.dtype,
    device: str,
    allow_random: bool,
    progress: Progress | None,
) -> ResolvedModel:
    """A model from the local cache, else from the hub.

    Else random weights of the shape that the preset or a cached config gives.
    """
    from pensieve.worker.hub import (
        HubOutOfReach,
        HubUnknown,
        OnlyGguf,
        cached_folder,
        cached_gguf,
        fetch,
        fetch_gguf,
        has_weights,
    )

    folder = cached_folder(repo) if repo is not None else None
    if folder is not None and (weights == "random" or has_weights(folder)):
        return _from_folder(spec, folder, "hub", weights, allow_random)
    if folder is None and repo is not None and (gguf := cached_gguf(naming.HubName(repo))) is not None:
        return _from_gguf(spec, gguf, weights, dtype, device, progress, label=repo)
    reason = "weights of this shape were never published"
    if repo is not None:
        try:
            folder = fetch(
                repo,
                dtype,
                device,
                progress,
                with_weights=weights == "auto",
                check=lambda folder: _check_folder(spec, folder),
            )
            return _from_folder(spec, folder, "hub", weights, allow_random)
        except OnlyGguf as error:
            path = _reached(spec, lambda: fetch_gguf(naming.HubName(repo), progress))
            return _from_gguf(spec, path, weights, dtype, device, progress, label=error.repo)
        except HubUnknown as error:
            if preset is None:
                raise ConfigError(f"{error}.{_near(spec)}") from error
            reason = str(error)
        except HubOutOfReach as error:
            reason = str(error)
    if not allow_random or (preset is None and folder is None):
        raise ModelUnavailable(
            f"no real weights for {spec!r} ({reason}). Ways out: --model FOLDER with a copy of it, --model "
            "FILE.gguf, "
            f"or the embedded default, --model {embedded.NAME}"
        )
    if preset is not None:
        return _random(spec, preset.config(), reason)
    assert folder is not None
    return _random(spec, config_of(folder), reason)


def _check_folder(spec: str, folder: Path) -> None:
    from pensieve.worker import gate

    gate.check_config(config_of(folder), spec)


def _load_folder(folder: Path, label: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    from pensieve.worker.loading import load_folder

    # With accelerate, weights go straight to the device; without it, through main memory.
    straight = device != "cpu" and importlib.util.find_spec("accelerate") is not None
    return load_folder(folder, label, dtype=dtype, device_map={"": device} if straight else None).to(device)


def _load_share(resolved: ResolvedModel, dtype: torch.dtype, group: Group) -> PreTrainedModel:
    """A rank's share of a model.

    Random weights are made whole first, in main memory, so that they are those of a single process.
    """
    from pensieve.worker import sharding
    from pensieve.worker.random_weights import build, require_weights_fit

    sharding.require_divisible(resolved.config, resolved.label, group.size)
    if resolved.weights == "random":
        require_weights_fit(resolved.label, resolved.num_parameters * group.local_size, dtype, "cpu")
        whole = build(resolved.config, dtype, "cpu")
        try:
            return sharding.split(whole, group.device, group.size)
        except ValueError as error:  # a matrix that this version of transformers cannot cut
            raise ModelRefused(
                f"{resolved.label} cannot be split over {group.size} processes: {error}"
            ) from error
    sharers = group.local_size if group.device.type == "cpu" else 1
    require_weights_fit(
        resolved.label, resolved.num_parameters * sharers // group.size, dtype, str(group.device)
    )
    assert resolved.folder is not None
    return sharding.load_split(resolved.folder, resolved.label, dtype, group.device, group.size)


def _rebuilt(resolved: ResolvedModel) -> Path | None:
    """A fresh conversion in place of a damaged one; None if it is whole: the failure had another cause."""
    assert resolved.folder is not None
    if is_sound(resolved.folder, full=True):
        return None
    if resolved.source == "embedded":
        return embedded.ensure_default(full_check=True)
    assert resolved.gguf is not None
    return ensure_file_converted(resolved.gguf, full_check=True)


def _near(spec: str) -> str:
    """A sentence with the known names similar to `spec`, or with where to find them."""
    names = [embedded.NAME, *PRESETS]
    near = difflib.get_close_matches(spec.lower().rsplit("/", 1)[-1], names, n=4, cutoff=0.5)
    return f" Near: {', '.join(near)}." if near else " `pensieve models` lists what can be loaded."


def main(arguments: list[str] | None = None) -> int:
    """`python -m pensieve.worker.weights fetch`: get the default model ready, with progress on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m pensieve.worker.weights", description="Get the default model ready."
    )
    parser.add_argument("action", choices=["fetch"], help="fetch and convert the embedded default model")
    parser.parse_args(arguments)
    shown: dict[str, int] = {}

    def show(what: str, share: float | None) -> None:
        percent = 0 if share is None else int(share * 10) * 10
        if shown.get(what, -1) < percent:
            shown[what] = percent
            print(what if share is None else f"{what}: {percent} %", file=sys.stderr, flush=True)

    try:
        print(fetch_default(show))
    except PensieveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
