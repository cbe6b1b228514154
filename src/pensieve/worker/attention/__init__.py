"""The registry of attention backends: multi-token attention over paged KV.

Knows their names and what they can serve; never how they work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pensieve.errors import ConfigError
from pensieve.worker.attention.base import (
    AttentionArgs,
    AttentionBackend,
    CapturableBackend,
    KVGeometry,
    PagedAttention,
)
from pensieve.worker.attention.cpu import CpuAttention
from pensieve.worker.attention.flashinfer import FlashInferAttention
from pensieve.worker.attention.native import NativeAttention
from pensieve.worker.attention.reference import ReferenceAttention
from pensieve.worker.attention.triton import TritonAttention

__all__ = [
    "BACKENDS",
    "AttentionArgs",
    "AttentionBackend",
    "CapturableBackend",
    "KVGeometry",
    "PagedAttention",
    "make_backend",
]

BACKENDS: dict[str, type[AttentionBackend[Any]]] = {
    backend.name: backend
    for backend in (NativeAttention, TritonAttention, FlashInferAttention, CpuAttention, ReferenceAttention)
}


def make_backend(
    name: str,
    geometry: KVGeometry,
    chunk_tokens: int,
    device: torch.device,
    args: Sequence[AttentionArgs] = (),
) -> AttentionBackend[Any]:
    """The backend of this name, or with "auto" the first that can serve this cache and these layers.

    Raises:
        ConfigError: there is no such backend, or it cannot serve them.
    """
    if name != "auto" and name not in BACKENDS:
        raise ConfigError(
            f"attention must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {name!r}"
        )
    reasons = []
    for candidate in _automatic(device) if name == "auto" else [BACKENDS[name]]:
        reason = candidate.why_not(geometry, chunk_tokens, device) or candidate.why_not_args(args)
        if reason is None:
            return candidate(geometry, chunk_tokens)
        reasons.append(f"{candidate.name}: {reason}")
    raise ConfigError(
        f"no attention backend can serve this cache ({'; '.join(reasons)}): choose another model, dtype or "
        "device"
    )


def _automatic(device: torch.device) -> tuple[type[AttentionBackend[Any]], ...]:
    """The backends that "auto" tries, the fastest first."""
    return (TritonAttention if device.type == "cuda" else NativeAttention, CpuAttention, ReferenceAttention)
