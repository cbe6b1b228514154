"""Compares a folder's weight files with its config: every tensor is accounted for, or the model is refused.

Knows tensor names and shapes; never what a model computes. transformers fills what no file holds with random
numbers, ignores what it has no place for, and logs both. Here either refuses the model.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from pensieve.errors import ModelRefused
from pensieve.worker.tensor_names import OTHER_SENSES, TensorNames, layers_held, num_layers, why_harmless
from pensieve.worker.weight_files import SHOWN, Stored, listed, refused

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(.+)$")


@dataclass(slots=True)
class Differences:
    """Differences between files and config. Names are the model's, if it has one."""

    missing: set[str] = field(default_factory=set)
    left_over: set[str] = field(default_factory=set)
    # shapes (in the files, by the config)
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    broken: dict[str, str] = field(
        default_factory=dict
    )  # why a tensor could not be made of those in the files

    def __bool__(self) -> bool:
        return bool(self.missing or self.left_over or self.misshapen or self.broken)


def require_experts(stored: Mapping[str, Stored], label: str) -> None:
    """Refuse files in which experts between others are missing: stacked, they would get wrong numbers.

    Raises:
        ModelRefused: with the first that is missing.
    """
    numbers: dict[tuple[str, str], set[int]] = {}
    for name in stored:
        if match := _EXPERT.match(name):
            numbers.setdefault((match[1], match[3]), set()).add(int(match[2]))
    counts: dict[str, int] = {}
    for (prefix, _), found in numbers.items():
        counts[prefix] = max(counts.get(prefix, 0), max(found) + 1)
    gone = [
        f"{prefix}.{n}.{rest}"
        for (prefix, rest), found in numbers.items()
        for n in range(counts[prefix])
        if n not in found
    ]
    if gone:
        raise refused(label, f"{len(gone)} tensors of experts are in no file ({listed(gone)})")


@contextlib.contextmanager
def watching() -> Iterator[list[Any]]:
    """Collect the reports of transformers' loads in this block, before its own ignore lists are applied."""
    from transformers import PreTrainedModel

    reports: list[Any] = []
    original = PreTrainedModel._adjust_missing_and_unexpected_keys

    def keep(self: PreTrainedModel, report: Any) -> None:
        reports.append(report)

    PreTrainedModel._adjust_missing_and_unexpected_keys = keep
    try:
        yield reports
    finally:
        PreTrainedModel._adjust_missing_and_unexpected_keys = original


def differences_of(report: Any) -> Differences:
    """The differences in transformers' report of a load."""
    shapes = {name: (tuple(stored), tuple(expected)) for name, stored, expected in report.mismatched_keys}
    return Differences(
        set(report.missing_keys),
        set(report.unexpected_keys),
        shapes,
        dict(getattr(report, "conversion_errors", None) or {}),
    )


def expected_differences(
    stored: Mapping[str, Stored], mapping: Mapping[str, str], model: PreTrainedModel
) -> Differences | None:
    """The differences before anything is loaded, from names and shapes alone.

    None if tensors are made of several, or quantised: only loading can tell.
    """
    names = TensorNames.of(model)
    if names is None or getattr(model.config, "quantization_config", None) is not None:
        return None
    state = model.state_dict()
    differences = Differences(missing=set(state))
    for name, entry in stored.items():
        for pattern, replacement in mapping.items():
            name = re.sub(pattern, replacement, name)
        becomes = names.target(name)
        if becomes is None:
            differences.left_over.add(name)
            continue
        if names.is_converted(name):
            return None
        differences.missing.discard(becomes)
        if entry.shape != tuple(state[becomes].shape):
            differences.misshapen[becomes] = (entry.shape, tuple(state[becomes].shape))
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    groups = {
        source: {source, *(target for target, other in tied.items() if other == source)}
        for source in tied.values()
    }
    for group in groups.values():
        if not group <= differences.missing:  # one of them is there, and stands for all
            differences.missing -= group
    return differences


def judge(differences: Differences, stored: Mapping[str, Stored], model: PreTrainedModel, label: str) -> None:
    """Refuse a model whose files and config differ in more than names known to be harmless.

    Raises:
        ModelRefused: with the number of tensors and their names.
    """
    shapes = {name: entry.shape for name, entry in stored.items()}
    left = {
        name
        for name in differences.left_over
        if why_harmless(name, _shape_of(name, shapes), model.config) is None
    }
    buffers = {name for name, _ in model.named_buffers()}
    missing = {
        name
        for name in differences.missing
        if not (name in buffers and why_harmless(name, None, model.config))
    }
    if not (left or missing or differences.misshapen or differences.broken):
        return
    reasons = []
    held, says = layers_held(shapes), num_layers(model.config)
    if held and says and held != says and (left or missing):
        reasons.append(f"its files hold {held} layers, its config says {says}")
    if missing:
        heads = (
            " although the config does not tie it to the embedding (tie_word_embeddings)"
            if missing == {"lm_head.weight"}
            else ""
        )
        reasons.append(f"{_count(missing)} in no file ({listed(missing)}){heads}")
    if left:
        reasons.append(f"{_count(left, 'has', 'have')} no place in the model ({listed(left)})")
    if differences.misshapen:
        parts = [
            f"{n} is {in_files} in the files, {by_config} by the config"
            for n, (in_files, by_config) in sorted(differences.misshapen.items())
        ]
        reasons.append(
            f"{_count(parts)} of another shape: "
            f"{'; '.join(parts[:SHOWN])}{', ...' if len(parts) > SHOWN else ''}"
        )
    if differences.broken:
        reasons.append(
            f"{_count(differences.broken)} made of several, and those in the files do not go together "
            f"({listed(differences.broken)})"
        )
    raise refused(label, "; ".join(reasons))


def require_ties(model: PreTrainedModel, label: str) -> None:
    """Refuse files with two different tensors that the config says are one.

    Raises:
        ModelRefused: with their names.
    """
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter_or_buffer(target) is not model.get_parameter_or_buffer(source):
            raise refused(
                label,
                f"its files hold a {target} that differs from {source}, and its config ties them into one: "
                "set tie_word_embeddings to false in "
                "config.json if the model was trained so",
            )


def left_out(differences: Differences) -> str | None:
    """A note on the part of a model that is not served; None if there is none."""
    senses = [name for name in differences.left_over if OTHER_SENSES.search(name)]
    return (
        f"served for text: {len(senses)} tensors of the part that sees or hears are left out"
        if senses
        else None
    )


def require_finite(model: PreTrainedModel, label: str) -> None:
    """Refuse weights that are not finite.

    Raises:
        ModelRefused: with the first of them.
    """
    bad = [
        name
        for name, tensor in model.named_parameters()
        if tensor.is_floating_point() and not _is_finite(tensor)
    ]
    if bad:
        kind = str(model.dtype).removeprefix("torch.")
        way = "; float16 overflows above 65504: try --dtype bfloat16" if model.dtype is torch.float16 else ""
        raise ModelRefused(
            f"{label} cannot be served: {_count(bad)} not finite in {kind} ({listed(bad)}){way}. Fetch its "
            "files again, or name another model"
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.numel() == 0 or tensor.dtype.itemsize == 1:
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def _shape_of(name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of a tensor whose name may have lost or gained a prefix; None if it is in no file."""
    if name in shapes:
        return shapes[name]
    return next(
        (
            shape
            for other, shape in shapes.items()
            if other.endswith("." + name) or name.endswith("." + other)
        ),
        None,
    )


def _count(what: Collection[str], one: str = "is", more: str = "are") -> str:
    return f"1 tensor {one}" if len(what) == 1 else f"{len(what)} tensors {more}"
