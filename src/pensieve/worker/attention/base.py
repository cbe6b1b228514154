"""What an attention backend is: a layout of KV inside a slot, and multi-token attention over it.

Knows slots and spans; never models or plans. In each layer the new K and V of all spans are written first,
then every token attends `[0, its own position]` of its sequence, in whatever slots those chunks are (paper
§4.4). A backend chooses the layout that its kernel reads fastest; no other code reads a slot.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch

from pensieve.core.plan import Span
from pensieve.worker.batch import Batch
from pensieve.worker.kv_store import KVStore


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """The KV of one token in each layer."""

    num_layers: int  # L
    num_kv_heads: int  # Hkv
    head_dim: int  # D
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class AttentionArgs:
    """How one layer attends, beyond causality."""

    scaling: float
    sliding_window: int | None = None  # a key is visible iff 0 <= query position - key position < window
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    sinks: torch.Tensor | None = (
        # (H,), a logit for each head that takes part in the softmax and carries no value; None without sinks
        None
    )


Prepared = TypeVar("Prepared")  # what a backend computes once a step and shares between layers


class AttentionBackend(ABC, Generic[Prepared]):
    """Writes and attends paged KV in one way."""

    name: ClassVar[str]

    def __init__(self, geometry: KVGeometry, chunk_tokens: int) -> None:
        self.geometry = geometry
        self.chunk_tokens = chunk_tokens

    @classmethod
    @abstractmethod
    def why_not(cls, geometry: KVGeometry, chunk_tokens: int, device: torch.device) -> str | None:
        """Why this backend cannot serve such a cache on such a device; None if it can."""

    @classmethod
    def why_not_args(cls, args: Sequence[AttentionArgs]) -> str | None:
        """Why this backend cannot compute layers that attend so; None if it can."""
        return None

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer of one slot."""
        geometry = self.geometry
        return 2 * self.chunk_tokens * geometry.num_kv_heads * geometry.head_dim * geometry.dtype.itemsize

    @abstractmethod
    def bind(self, store: KVStore) -> None:
        """Take the first tier's store, to write and read KV from now on."""

    @abstractmethod
    def prepare(self, batch: Batch) -> Prepared:
        """Compute everything that all layers of this step share: indices, masks."""

    @abstractmethod
    def write(self, prepared: Prepared, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put the new K and V of all spans, each (T, Hkv, D), into their slots."""

    @abstractmethod
    def attend(
        self, prepared: Prepared, layer: int, query: torch.Tensor, args: AttentionArgs
    ) -> torch.Tensor:
        """Attention of all new tokens over their own contexts: (T, H, D) -> (T, H, D).

        Cells beyond a context are never used.
        """


class CapturableBackend(AttentionBackend[Prepared]):
    """A backend whose steps of one-token spans can be captured in a graph.

    Their tensors stay in place and get other numbers.
    """

    @abstractmethod
    def fixed(self, batch: Batch, like: Prepared) -> Prepared:
        """A step over a batch whose tensors stay in place.

        `like` is a prepared step that went through the same model's forward.
        """

    @abstractmethod
    def refill(self, step: Prepared, spans: tuple[Span, ...]) -> None:
        """Give a fixed step other spans of one token each, at most as many as it was made with.

        Further rows compute nothing.
        """


class PagedAttention:
    """A step's attention, called by a model's forward.

    Waits until a layer's KV has arrived, writes the new K and V, attends.
    """

    def __init__(
        self,
        backend: AttentionBackend[Any],
        batch: Batch,
        wait_layer: Callable[[int], None] = lambda layer: None,
        *,
        prepared: Any = None,
    ) -> None:
        """Prepare the step, if `prepared` is None.

        Args:
            backend: writes and attends.
            batch: the step's batch.
            wait_layer: returns when copies into a layer have arrived, or when later work will wait for them.
            prepared: the backend's, for this batch.
        """
        self.backend = backend
        self.wait_layer = wait_layer
        with torch.inference_mode():
            self.prepared = backend.prepare(batch) if prepared is None else prepared

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, args: AttentionArgs
    ) -> torch.Tensor:
        """(T, H, D), (T, Hkv, D), (T, Hkv, D) -> (T, H, D)."""
        self.wait_layer(layer)
        self.backend.write(self.prepared, layer, key, value)
        return self.backend.attend(self.prepared, layer, query, args)
