"""Random weights of a given shape, made fast, and whether weights fit in memory at all.

Knows shapes and memory; never names, files or the network.

Random weights take the same time as real ones: the same matrices at the same sizes. A block of a few million
normals is drawn once and tiled over every matrix, at the speed of memory; drawing billions one by one takes
minutes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pensieve.errors import ModelRefused

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# A prime, so that no matrix width divides it: rows of a matrix start at different places of the block.
_BLOCK_NUMBERS = 4_194_301
_STD = 0.02  # of every matrix: with normalised inputs, logits have a deviation of about 1
_SLACK_BYTES = 256 << 20  # what a process needs besides its weights before it can do anything
_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


def outline(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config on `meta`: modules, names and shapes. Allocates nothing.

    Raises:
        ModelRefused: transformers has no causal language model for this config, or cannot build it.
    """
    from transformers import AutoModelForCausalLM

    if getattr(config, "is_encoder_decoder", False):
        raise ModelRefused(
            f"{config.model_type!r} models have an encoder and a decoder: Pensieve serves decoders only, "
            "such as Llama or Qwen"
        )
    if type(config) not in AutoModelForCausalLM._model_mapping:
        code = (
            " without code of its own (auto_map), which is never run"
            if getattr(config, "auto_map", None)
            else ""
        )
        raise ModelRefused(
            f"transformers has no causal language model for model_type {config.model_type!r}{code}: it sees, "
            "hears, embeds or translates, or is newer "
            "than this transformers. Name a text model"
        )
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a model's own code may raise anything for numbers that do not fit together
        reason = " ".join(str(error).split())
        raise ModelRefused(
            f"transformers cannot build the {config.model_type!r} model of this config "
            f"({type(error).__name__}: {reason[:300]})"
        ) from error
    return model


def count_parameters(config: PretrainedConfig) -> int:
    """Number of weights of this architecture, tied matrices once. Allocates nothing.

    Raises:
        ModelRefused: as `outline`.
    """
    return num_weights(outline(config))


def num_weights(model: PreTrainedModel) -> int:
    """Number of weights, tied matrices once."""
    return sum(parameter.numel() for parameter in model.parameters())


def build(config: PretrainedConfig, dtype: torch.dtype, device: str, *, seed: int = 0) -> PreTrainedModel:
    """A model of this architecture with seeded random weights: the same on each run on the same device.

    Norms and biases have their initial values for training, matrices are normal with deviation 0.02. The
    caller checks first that the model fits (`require_weights_fit`).
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        block = (torch.randn(_BLOCK_NUMBERS) * _STD).to(device=device, dtype=dtype)
        _fill(model, block)
    return model.requires_grad_(False).eval()


def _fill(model: PreTrainedModel, block: torch.Tensor) -> None:
    """Tile `block` (N,) over all matrices, each continuing where the last stopped.

    Vectors get the model's own initial values.
    """
    offset = 0
    seen: set[int] = set()
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(map(id, own))
        if not any(p.ndim >= 2 for p in own):
            model._init_weights(
                module
            )  # norms, attention sinks, buffers: small, and only the model knows their initial values
            continue
        for parameter in own:
            if parameter.ndim < 2:
                parameter.zero_()
                continue
            flat = parameter.view(-1)
            for target, source in _pieces(flat, block, offset):
                target.copy_(source)
            offset = (offset + flat.numel()) % block.numel()


def _pieces(
    flat: torch.Tensor, block: torch.Tensor, offset: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (part of `flat`, part of `block`) that cover `flat`, reading `block` cyclically from `offset`."""
    start = 0
    while start < flat.numel():
        length = min(flat.numel() - start, block.numel() - offset)
        yield flat[start : start + length], block[offset : offset + length]
        start += length
        offset = 0


def bytes_beside(config: PretrainedConfig, num_parameters: int, dtype: torch.dtype, device: str) -> int:
    """Bytes that loading takes beside a model's weights, briefly or for good.

    The output layer laid out anew while its first form is still there (both stay if it is tied to the
    embedding), and in 16 bits one layer in float32.
    """
    from pensieve.worker.llama import MODEL_TYPES

    text = config.get_text_config()
    head = (getattr(text, "vocab_size", None) or 0) * (getattr(text, "hidden_size", None) or 0)
    layers = getattr(text, "num_hidden_layers", None) or 1
    copied = (
        head * dtype.itemsize if text.model_type in MODEL_TYPES and torch.device(device).type == "cpu" else 0
    )
    widened = max(0, num_parameters - head) // layers * 4 if dtype.itemsize == 2 else 0
    return copied + widened


def require_weights_fit(
    label: str, num_parameters: int, dtype: torch.dtype, device: str, *, beside: int = 0
) -> None:
    """Refuse a model whose weights do not fit, before anything is allocated.

    Args:
        label: its name in messages.
        num_parameters: of the whole model.
        dtype: number type it is loaded in.
        device: where.
        beside: bytes that loading takes beside the weights, see `bytes_beside`.

    Raises:
        ModelRefused: with the size needed, the size there is, and the ways out.
    """
    need = num_parameters * dtype.itemsize
    room = available_bytes(device)
    if room is None or need + beside + _SLACK_BYTES <= room:
        return
    name = str(dtype).removeprefix("torch.")
    raise ModelRefused(
        f"{label} does not fit: its {num_parameters / 1e9:.2f} billion weights take {need / 1e9:.1f} GB in "
        f"{name}"
        + (f" and {beside / 1e9:.1f} GB more while they are laid out" if beside >= 5e7 else "")
        + f", {room / 1e9:.1f} GB of memory are available on {device!r}. "
        "Ways out: a smaller model (`pensieve models` lists their sizes)"
        + (", --dtype bfloat16" if dtype.itemsize > 2 else "")
        + ", or a machine with more memory"
    )


def available_bytes(device: str = "cpu") -> int | None:
    """Memory this process may still take on a device; None if the system does not say.

    In main memory: what the kernel calls available, or what is left under the tightest control group,
    whichever is less.
    """
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(torch.device(device))
        return free
    rooms = [room for room in (_system_room(), *_cgroup_rooms()) if room is not None]
    return min(rooms, default=None)


def _system_room() -> int | None:
    try:
        for line in (_PROC / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _cgroup_rooms() -> Iterator[int]:
    """What is left under each limit from this process's control group up to the root, version 2, then 1."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used, cache = _CGROUP, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used, cache = (
                _CGROUP / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        here = root / path.lstrip("/")
        # In a container the path may be the host's while only the group's own files are mounted, at the root.
        for group in [here, *here.parents]:
            if (room := _group_room(group, limit, used, cache)) is not None:
                yield room
            if group == root:
                break


def _group_room(group: Path, limit: str, used: str, cache: str) -> int | None:
    try:
        most = (group / limit).read_text().strip()
        if most == "max":
            return None
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(
            0, int(most) - int((group / used).read_text()) + int(stat.get(cache, 0))
        )  # the system drops cached files when memory is needed
    except (OSError, ValueError):
        return None
