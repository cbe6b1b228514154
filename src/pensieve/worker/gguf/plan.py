"""Checks that a file holds a whole model and nothing else.

Knows tensors' names and shapes; never the disk. The parameters are those of transformers' own model, built
from the config without memory for weights. A parameter that no tensor fills, a tensor or a key that has no
use, or a difference in shape is refused, with names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map
from gguf.quants import dequantize

from pensieve.errors import ModelRefused
from pensieve.worker.gguf.architectures import meaning_of
from pensieve.worker.gguf.file import PLAIN_TYPES, GgufModel, GgufTensor, listed
from pensieve.worker.gguf.source import Meaning, Source
from pensieve.worker.gguf.transforms import Made, Transform, WrongShape, as_is

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_TENSOR_NAME = re.compile(r"(?:blk\.\d+\.)?(?P<stem>.+?)(?:\.weight|\.bias)?")
_INSTEAD = "Name a folder with safetensors of the same model, or its hub id, instead"
# Tensors that change no answer in any architecture.
_HARMLESS = {
    re.compile(r"(blk\.\d+\.)?attn_rot_embd(\.weight)?"): "the rotary frequencies that follow from the base",
    re.compile(r"blk\.\d+\.attn\.rotary_emb\.inv_freq"): "the same, under its first name",
}
_ARCHITECTURES = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}


@dataclass(frozen=True, slots=True)
class Described:
    """The contents of a file's header. Cheap: no tensor was read."""

    source: Source
    meaning: Meaning
    config: PretrainedConfig


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of the model, to be written."""

    name: str  # transformers' name for it
    made: Made


def describe(model: GgufModel) -> Described:
    """The config that a file's header gives.

    Raises:
        ModelRefused: not a model, an architecture that is not known, or keys that cannot be converted; the
            message says which.
    """
    from transformers import AutoConfig

    source = Source(model)
    try:
        meaning = meaning_of(source)
    except (
        ArithmeticError,
        TypeError,
        ValueError,
    ) as error:  # a value of another kind than its key's, where it is used
        raise source.keys.refused(
            f"its keys contradict each other or are damaged ({_first_line(error)})"
        ) from error
    source.keys.require_if_unused(
        "attention.scale", source.head_dim**-0.5, "transformers takes the root of the size of a head"
    )
    unused = source.keys.unused()
    if unused:
        raise source.keys.refused(
            f"{len(unused)} of its keys have no place in transformers' {meaning.config['model_type']} "
            f"({listed(unused)})"
        )
    try:
        config: PretrainedConfig = AutoConfig.for_model(**meaning.config, dtype="bfloat16")
    except Exception as error:  # each class of configs validates in its own way
        raise source.keys.refused(
            f"transformers takes no {meaning.config['model_type']} of this shape ({_first_line(error)})"
        ) from error
    return Described(source, meaning, config)


def account(described: Described) -> list[Parameter]:
    """Every parameter of the model with the tensors that fill it.

    Raises:
        ModelRefused: tensors are missing, left over, of another shape, or of a number type that cannot be
            read.
    """
    model = described.source.model
    if model.architecture not in _ARCHITECTURES:
        raise ModelRefused(
            f"{model.name} is of an architecture ({model.architecture}) that came after the installed "
            "package gguf: "
            "`pip install --upgrade gguf`"
        )
    expected = _parameters(described)
    names = get_tensor_name_map(_ARCHITECTURES[model.architecture], described.config.num_hidden_layers)
    wanted = {name: _sources(described, names, name) for name in expected}
    missing = [tensor for _, tensors in wanted.values() for tensor in tensors if tensor not in model.tensors]
    used = {tensor for _, tensors in wanted.values() for tensor in tensors}
    left = [name for name in model.tensors if name not in used and not _harmless(name, described.meaning)]
    if missing or left:
        raise _incomplete(described, missing, left, len(expected))
    _require_readable(model, used)
    found = [
        Parameter(name, _make(described, how, [model.tensors[t] for t in tensors]))
        for name, (how, tensors) in wanted.items()
    ]
    wrong = [
        f"{p.name} {p.made.shape} instead of {expected[p.name]}"
        for p in found
        if p.made.shape != expected[p.name]
    ]
    if wrong:
        raise ModelRefused(
            f"{model.name} does not hold what it says: {len(wrong)} tensors are of another shape "
            f"({listed(wrong)}). {_INSTEAD}"
        )
    return found


def _parameters(described: Described) -> dict[str, tuple[int, ...]]:
    """Names and shapes of transformers' own model, a tied matrix once."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(described.config)
    except Exception as error:  # a model's class may raise anything for a config that it cannot build
        raise described.source.keys.refused(f"transformers cannot build it ({_first_line(error)})") from error
    described.config.architectures = [type(model).__name__]
    shapes: dict[str, tuple[int, ...]] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            shapes[name] = tuple(tensor.shape)
    return shapes


def _sources(described: Described, names: TensorNameMap, parameter: str) -> tuple[Transform, tuple[str, ...]]:
    """How a parameter is made, and of which tensors."""
    for rule in described.meaning.rules:
        if match := rule.parameter.fullmatch(parameter):
            layer = match.groupdict().get("n")
            return rule.transform, tuple(source.format(n=layer) for source in rule.sources)
    if parameter == "lm_head.weight":
        return as_is, ("output.weight",)
    tensor = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
    if tensor is None:
        raise described.source.keys.refused(f"llama.cpp has no name for transformers' {parameter}")
    match = _TENSOR_NAME.fullmatch(tensor)
    assert match is not None
    return described.meaning.arrangements.get(match["stem"], as_is), (tensor,)


def _harmless(name: str, meaning: Meaning) -> bool:
    return name.startswith(meaning.ignored) or any(pattern.fullmatch(name) for pattern in _HARMLESS)


def _incomplete(
    described: Described, missing: list[str], left: list[str], num_parameters: int
) -> ModelRefused:
    source = described.source
    layers, said = (
        {name.split(".")[1] for name in source.tensors if name.startswith("blk.")},
        described.config.num_hidden_layers,
    )
    reasons = []
    if missing:
        reasons.append(f"{len(missing)} of the tensors it needs are missing ({listed(missing)})")
    if left:
        reasons.append(
            f"{len(left)} of its {len(source.tensors)} tensors have no place in the model ({listed(left)})"
        )
    if len(layers) != said:
        reasons.append(f"it says {said} layers and holds {len(layers)}")
    return ModelRefused(
        f"{source.model.name} is not a whole {described.config.model_type} model of {num_parameters} "
        f"parameters: {'; '.join(reasons)}. "
        f"Fetch it again, or: {_INSTEAD[0].lower()}{_INSTEAD[1:]}"
    )


def _require_readable(model: GgufModel, used: set[str]) -> None:
    """Check that the package gguf can widen every number type of the file, on one block of zeros each."""
    for kind in {model.tensors[name].type for name in used} - PLAIN_TYPES:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except (NotImplementedError, ValueError, KeyError) as error:
            some = listed([name for name in used if model.tensors[name].type is kind])
            raise ModelRefused(
                f"{model.name} holds tensors of the number type {kind.name} ({some}), which the installed "
                "package gguf cannot widen: "
                "take the same model in another quantization (Q4_K_M, Q8_0)"
            ) from error


def _make(described: Described, how: Transform, tensors: list[GgufTensor]) -> Made:
    try:
        return how(tensors)
    except WrongShape as error:
        raise described.source.keys.refused(str(error)) from error


def _first_line(error: Exception) -> str:
    text: Any = str(error).strip() or type(error).__name__
    return " ".join(str(text).split())[:300]
