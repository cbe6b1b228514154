"""Splits a model's weights over several processes, each with its share of heads and columns.

Knows transformers' tensor parallel plans; never plans of steps. transformers decides which matrix is cut, and
how (`base_model_tp_plan`). Attention gets only this rank's heads, and the gate compares the result with eager
attention, all ranks together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pensieve.errors import ConfigError
from pensieve.worker.loading import load_folder
from pensieve.worker.model import shape_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def require_divisible(config: PretrainedConfig, label: str, num_ranks: int) -> None:
    """Refuse a model that cannot be split by its heads.

    Raises:
        ConfigError: transformers has no plan for it, or the number of ranks does not divide its heads; the
            message says the ways out.
    """
    text, shape = config.get_text_config(), shape_of(config)
    start_otherwise = "start Pensieve without torchrun, in one process"
    if not getattr(text, "base_model_tp_plan", None):
        raise ConfigError(
            f"{label} cannot be split over {num_ranks} processes: transformers has no tensor parallel plan "
            f"for {text.model_type!r} models. "
            f"Choose another model, or {start_otherwise}"
        )
    for what, count in (("key/value heads", shape.num_kv_heads), ("query heads", shape.num_heads)):
        if count % num_ranks:
            fitting = ", ".join(
                str(n)
                for n in range(2, shape.num_kv_heads + 1)
                if shape.num_kv_heads % n == 0 == shape.num_heads % n
            )
            raise ConfigError(
                f"{label} has {count} {what}, which cannot be dealt out evenly to {num_ranks} processes: "
                + (f"start a number that divides them ({fitting}), or " if fitting else "")
                + start_otherwise
            )


def load_split(
    folder: Path, label: str, dtype: torch.dtype, device: torch.device, num_ranks: int
) -> PreTrainedModel:
    """Load this rank's share of the weights in a folder; reads only the share.

    Raises:
        ModelRefused: the folder is not what its config says, or cannot be loaded.
    """
    from transformers.distributed import DistributedConfig

    with _meshes_on(device):
        return load_folder(
            folder, label, dtype=dtype, distributed_config=DistributedConfig(tp_size=num_ranks)
        )


def split(model: PreTrainedModel, device: torch.device, num_ranks: int) -> PreTrainedModel:
    """Cut a whole model, the same on every rank, in place.

    Each matrix goes to `device` and keeps this rank's share.
    """
    from transformers.distributed import DistributedConfig

    with _meshes_on(device):
        config, _, mesh = type(model).prepare_distribute_model(DistributedConfig(tp_size=num_ranks))
    head = model.get_output_embeddings()
    if is_tied := head is not None and head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(
            head.weight.detach(), requires_grad=False
        )  # plans name both, and each must be cut once
    divided: PreTrainedModel = model.maybe_distribute_model(model, config, mesh)
    if is_tied:
        divided.tie_weights()
    return divided.to(device).requires_grad_(False).eval()


@contextlib.contextmanager
def _meshes_on(device: torch.device) -> Iterator[None]:
    """Make transformers split the model over `device`, not over accelerators, its default."""
    if device.type != "cpu":
        yield
        return
    asked = torch._C._get_accelerator
    torch._C._get_accelerator = lambda *_: torch.device("cpu")
    try:
        yield
    finally:
        torch._C._get_accelerator = asked
