"""Computes a 16-bit model in float32, one layer widened at a time.

Knows modules and parameters; never attention or caches.

Rounding to 16 bits hides small mistakes. In float32 a correct forward agrees with the model's own to several
digits, a wrong one does not. It takes no more memory than one layer in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_HALVES = (torch.bfloat16, torch.float16)
_HEAD_ROWS = 8192  # rows of an output layer that are widened at once


@contextlib.contextmanager
def widened(
    model: PreTrainedModel, layers: Sequence[nn.Module], skipped: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """Within the block, the model's forward computes in float32 from its 16-bit weights.

    Args:
        model: with parameters of 16 bits.
        layers: its decoder layers, each widened as a whole while it computes.
        skipped: those of them that only pass their input on.
    """
    inside = {id(module) for layer in layers for module in layer.modules()}
    with contextlib.ExitStack() as undo:
        for layer in layers:
            if any(layer is other for other in skipped):
                undo.enter_context(_replaced(layer, _hand_on))
            else:
                _widen(layer, list(layer.modules()), undo)
        for module in model.modules():
            if id(module) in inside:
                continue
            if isinstance(module, nn.Embedding):  # rows are looked up in 16 bits and then widened
                undo.callback(module.register_forward_hook(_float_output).remove)
            elif type(module) is nn.Linear:
                undo.enter_context(_replaced(module, _by_rows(module)))
            else:
                _widen(module, [module], undo)
        yield


def _widen(module: nn.Module, parts: Sequence[nn.Module], undo: contextlib.ExitStack) -> None:
    """Let the tensors of some modules be float32 while `module` computes."""
    tensors = [
        tensor
        for part in parts
        for tensor in (*part._parameters.values(), *part._buffers.values())
        if tensor is not None and tensor.dtype in _HALVES
    ]
    if not tensors:
        return
    kept: list[torch.Tensor] = []

    def before(*_: Any) -> None:
        kept.extend(tensor.data for tensor in tensors)
        for tensor in tensors:
            tensor.data = tensor.data.float()

    def after(*_: Any) -> None:
        for tensor, data in zip(tensors, kept, strict=False):
            tensor.data = data
        kept.clear()

    undo.callback(after)
    undo.callback(module.register_forward_pre_hook(before).remove)
    undo.callback(module.register_forward_hook(after, always_call=True).remove)


def _by_rows(module: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """A product with a large matrix that is never widened as a whole."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        parts = [x.float() @ rows.float().T for rows in torch.split(module.weight, _HEAD_ROWS)]
        product = torch.cat(parts, dim=-1)
        return product if module.bias is None else product + module.bias.float()

    return forward


def _float_output(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
    return output.float()


def _hand_on(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden_states


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def decoder_layers(model: PreTrainedModel, num_layers: int) -> list[nn.Module] | None:
    """The modules that are a model's layers, in order; None if they are not found."""
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    return list(found[0]) if found else None


def choose(layers: Sequence[nn.Module], kinds: Sequence[object], budget: int) -> list[int]:
    """The layers to compute if all are too many: the first of each kind, then more of each in turn.

    Args:
        layers: all of them.
        kinds: how each attends.
        budget: weights of the chosen layers together; the first of each kind may exceed it.
    """
    groups: dict[object, list[int]] = {}
    for index, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
        shapes = tuple(sorted(tuple(p.shape) for p in layer.parameters()))
        groups.setdefault((kind, shapes), []).append(index)
    chosen = [indices.pop(0) for indices in groups.values()]
    used = sum(_size(layers[index]) for index in chosen)
    while any(groups.values()):
        for indices in groups.values():
            if not indices:
                continue
            if used + _size(layers[indices[0]]) > budget:
                return sorted(chosen)
            chosen.append(indices.pop(0))
            used += _size(layers[chosen[-1]])
    return sorted(chosen)


def _size(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())
