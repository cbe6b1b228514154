"""The bytes of one tier, and how slots move between tiers. Knows slots, layers and sizes; never what lies inside a slot.

A slot holds one chunk: all its layers, one after the other, each `layer_bytes` long. What is in them is the attention
backend's business; here they are opaque. A store allocates once, exactly `num_slots * slot_bytes`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pensieve.worker.allocator import fresh_pages

PIECE_BYTES = 32 << 20  # most that one copy call stages: bounds memory beyond the stores, and how long a swap-in waits


class KVStore:
    """One tier's slots, zero at the start, so that a cell never written is a finite number in every dtype."""

    def __init__(self, num_slots: int, num_layers: int, layer_bytes: int, device: torch.device, *, pinned: bool = False) -> None:
        """Allocate the tier.

        Args:
            num_slots: chunks it holds, at least 0.
            num_layers: L.
            layer_bytes: bytes of one layer of one chunk, K and V.
            device: where the bytes lie.
            pinned: page-locked host memory, for fast copies to a CUDA device; needs one.
        """
        self.num_slots, self.num_layers, self.layer_bytes, self.device = num_slots, num_layers, layer_bytes, device
        shape = (num_slots, num_layers, layer_bytes)
        if device.type == "cpu" and not pinned and num_slots:
            self.data = fresh_pages(num_slots * num_layers * layer_bytes).view(shape)
        else:
            self.data = torch.zeros(shape, dtype=torch.uint8, device=device, pin_memory=pinned)
        self._host = self.data.numpy() if device.type == "cpu" else None

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return self.num_layers * self.layer_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tier."""
        return self.num_slots * self.slot_bytes

    def layer(self, layer: int) -> torch.Tensor:
        """A view of one layer of all slots, (num_slots, layer_bytes), strided."""
        return self.data[:, layer]

    def wipe(self, slots: Sequence[int]) -> None:
        """Make slots zero again. CUDA work is queued on the current stream."""
        for slot in slots:
            if self._host is None:
                self.data[slot].zero_()
            else:  # one thread writes at memory speed; waking torch's others can take far longer than the work
                self._host[slot].fill(0)


def copy_slots(
    source: KVStore, source_slots: Sequence[int], target: KVStore, target_slots: Sequence[int], layer: int | None = None
) -> None:
    """Copy slots between two tiers (or within one), in few large calls.

    Args:
        source: where the bytes are.
        source_slots: distinct or not, as many as `target_slots`.
        target: where they go; same `num_layers` and `layer_bytes`.
        target_slots: distinct.
        layer: only this layer; None: whole slots.
    """
    assert len(source_slots) == len(target_slots), f"{len(source_slots)} slots cannot go to {len(target_slots)}"
    assert source.layer_bytes == target.layer_bytes and source.num_layers == target.num_layers, "tiers of different chunks"
    row_bytes = source.slot_bytes if layer is None else source.layer_bytes
    piece = max(1, PIECE_BYTES // row_bytes)
    for first in range(0, len(source_slots), piece):
        _copy_rows(
            _rows(source, layer), _row_ids(source, source_slots[first : first + piece], layer),
            _rows(target, layer), _row_ids(target, target_slots[first : first + piece], layer),
        )  # fmt: skip


def _rows(store: KVStore, layer: int | None) -> torch.Tensor:
    """The store as a matrix of contiguous rows: slots, or layers of slots. Whole contiguous rows are what copies fastest."""
    shape = (store.num_slots, store.slot_bytes) if layer is None else (store.num_slots * store.num_layers, store.layer_bytes)
    return store.data.view(shape)


def _row_ids(store: KVStore, slots: Sequence[int], layer: int | None) -> torch.Tensor:
    ids = torch.tensor(slots, dtype=torch.int64)
    if layer is not None:
        ids = ids * store.num_layers + layer
    return ids.to(store.device)


def _copy_rows(source: torch.Tensor, source_ids: torch.Tensor, target: torch.Tensor, target_ids: torch.Tensor) -> None:
    """Gather, cross over in one call where the devices differ, scatter. CUDA work is queued on the current stream."""
    if source.device.type == "cpu" and target.device.type == "cuda":
        staged = torch.empty((len(source_ids), source.shape[1]), dtype=source.dtype, pin_memory=True)
        torch.index_select(source, 0, source_ids, out=staged)
        rows = staged.to(target.device, non_blocking=True)
    else:
        rows = source.index_select(0, source_ids).to(target.device)  # from CUDA to the host this waits for the rows
    target.index_copy_(0, target_ids, rows)
