"""Loads a folder of weight files as a model whose every tensor came from them, in memory of its own.

Knows files; never what a user typed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pensieve.errors import ModelRefused
from pensieve.worker import checkpoint, weight_files
from pensieve.worker.gguf_convert import quiet
from pensieve.worker.tensor_names import key_mapping

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAPS = Path("/proc/self/maps")


def inspect(folder: Path, outline: PreTrainedModel, label: str) -> tuple[dict[str, str], str | None]:
    """Compare a folder's files with a model's outline, before any weights are read.

    Args:
        folder: with weight files.
        outline: the model on `meta`.
        label: for messages.

    Returns:
        How to rewrite the names in the files, and a note on tensors that are left out (None if all are used).

    Raises:
        ModelRefused: a tensor is missing, left over or of another shape, or the files are damaged.
    """
    stored = weight_files.stored_tensors(folder, label)
    checkpoint.require_experts(stored, label)
    mapping = key_mapping(stored, outline, label)
    differences = checkpoint.expected_differences(stored, mapping, outline)
    if differences is None:
        return mapping, None
    checkpoint.judge(differences, stored, outline, label)
    return mapping, checkpoint.left_out(differences)


def load_folder(folder: Path, label: str, **options: Any) -> PreTrainedModel:
    """Load the model of a folder, without gradients, in evaluation mode.

    Args:
        folder: with config.json and weight files.
        label: for messages.
        options: for `from_pretrained`: dtype, device, how it is split.

    Raises:
        ModelRefused: it is not what its config says, or cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from pensieve.worker.random_weights import outline

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        mapping, _ = inspect(folder, outline(config), label)
        stored = weight_files.stored_tensors(folder, label)
        with quiet(), _silent(), checkpoint.watching() as reports:
            try:
                model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                    folder,
                    local_files_only=True,
                    key_mapping=mapping or None,
                    ignore_mismatched_sizes=True,
                    **options,
                )
            except Exception:
                for report in reports:
                    checkpoint.judge(
                        checkpoint.differences_of(report), stored, outline(config), label
                    )  # differences explain the failure better, if there are any
                raise
        for report in reports:
            checkpoint.judge(checkpoint.differences_of(report), stored, model, label)
        checkpoint.require_ties(model, label)
        _in_one_type(model, options.get("dtype"), label)
        _unmap(model)
        checkpoint.require_finite(model, label)
    except ModelRefused:
        raise
    except Exception as error:  # safetensors, pickle and transformers each raise errors of their own
        raise ModelRefused(
            f"{label} could not be loaded from {folder}: {type(error).__name__}: {error}"
        ) from error
    return model.requires_grad_(False).eval()


def _in_one_type(model: PreTrainedModel, dtype: torch.dtype | None, label: str) -> None:
    """Cast the number types that transformers leaves after dequantising 8 bits to the one asked for.

    Raises:
        ModelRefused: a plain matrix still has 8 bits, because its scale is missing.
    """
    plain = [(name, module) for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    if narrow := [f"{name}.weight" for name, module in plain if module.weight.dtype.itemsize == 1]:
        raise weight_files.refused(
            label,
            f"the scales of {', '.join(narrow[:4])} are in no file ({len(narrow)} of its matrices stay in 8 "
            "bits)",
        )
    for parameter in model.parameters():
        if (
            dtype is not None
            and parameter.dtype in (torch.bfloat16, torch.float16)
            and parameter.dtype != dtype
        ):
            parameter.data = parameter.data.to(dtype)


def _unmap(model: PreTrainedModel) -> None:
    """Copy the tensors that are mapped from a file.

    Weights must not change, or vanish, because another process writes to the file.
    """
    ranges = _file_mappings()
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None or tensor.device.type != "cpu" or type(tensor.data) is not torch.Tensor:
                continue
            start = tensor.data_ptr()
            if ranges is not None and not any(low <= start < high for low, high in ranges):
                continue
            key = (start, tensor.shape)
            if key not in copies:
                copies[key] = tensor.detach().clone()
            tensor.data = copies[key]


def _file_mappings() -> list[tuple[int, int]] | None:
    """The address ranges of mapped files in this process; None if the system does not say."""
    try:
        lines = _MAPS.read_text().splitlines()
    except OSError:
        return None
    fields = [line.split(maxsplit=5) for line in lines]
    named = (entry[0].split("-") for entry in fields if len(entry) == 6 and entry[5].startswith("/"))
    return [(int(low, 16), int(high, 16)) for low, high in named]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silence transformers' table of tensors that did not fit: we raise an error instead."""
    logger = logging.getLogger("transformers.modeling_utils")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
