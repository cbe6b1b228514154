"""The bytes of one tier, and copies of slots between tiers.

Knows slots, layers and sizes; never what is inside a slot.

A slot holds one chunk: all its layers, one after the other, each `layer_bytes` long. Only the attention
backend knows their contents. A store allocates once, exactly `num_slots * slot_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from pensieve.worker import gather
from pensieve.worker.allocator import fresh_pages, lock_pages
from pensieve.worker.pinned import to_device

PIECE_BYTES = (
    32 << 20
)  # bytes that one copy call stages at most: bounds memory beyond the stores, and how long a swap-in waits
_GOLDEN = 0x9E3779B97F4A7C15 // 4  # well-mixed bits, from which the odd factors are made; they may overflow


class KVStore:
    """One tier's slots, zero at first, so that an unwritten cell is a finite number in every dtype."""

    def __init__(
        self, num_slots: int, num_layers: int, layer_bytes: int, device: torch.device, *, pinned: bool = False
    ) -> None:
        """Allocate the tier.

        Args:
            num_slots: chunks it holds, at least 0.
            num_layers: L.
            layer_bytes: bytes of one layer of one chunk, K and V.
            device: where the bytes are.
            pinned: page-locked host memory, for fast copies to a CUDA device; needs one.
        """
        self.num_slots, self.num_layers, self.layer_bytes, self.device = (
            num_slots,
            num_layers,
            layer_bytes,
            device,
        )
        shape = (num_slots, num_layers, layer_bytes)
        if device.type == "cpu" and num_slots:
            pages = fresh_pages(num_slots * num_layers * layer_bytes)
            if pinned:  # torch's own page-locked memory is rounded up to a power of two: 140 GB to 256
                lock_pages(pages)
            self.data = pages.view(shape)
        else:
            self.data = torch.zeros(shape, dtype=torch.uint8, device=device)
        self._host = self.data.numpy() if device.type == "cpu" else None
        self._factors: torch.Tensor | None = None  # of a slot's words, for checksums

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

    def checksums(self, slots: Sequence[int]) -> torch.Tensor:
        """A checksum of each slot's bytes, (n,) int64. CUDA work is queued on the current stream.

        The sum of the slot's words, each times an odd factor of its own, modulo 2**64: one wrong bit always
        changes it, and so do exchanged words.
        """
        words = self.data.view(self.num_slots, -1).view(torch.int64)
        if self._factors is None:
            self._factors = torch.arange(words.shape[1], device=self.device).mul_(2 * _GOLDEN).add_(1)
        return torch.stack([words[slot].mul(self._factors).sum() for slot in slots])

    def wipe(self, slots: Sequence[int]) -> None:
        """Make slots zero again. CUDA work is queued on the current stream."""
        for slot in slots:
            if self._host is None:
                self.data[slot].zero_()
            else:  # one thread writes at memory speed; waking torch's others can take longer
                self._host[slot].fill(0)


class SlotCopy:
    """Slots of one tier to copy to slots of another (or the same), whole or layer by layer.

    CUDA work is queued on the current stream.
    """

    def __init__(
        self, source: KVStore, source_slots: Sequence[int], target: KVStore, target_slots: Sequence[int]
    ) -> None:
        """Prepare the copy.

        Args:
            source: where the bytes are.
            source_slots: distinct or not, as many as `target_slots`.
            target: where they go; same `num_layers` and `layer_bytes`.
            target_slots: distinct.
        """
        assert len(source_slots) == len(target_slots), (
            f"{len(source_slots)} slots cannot go to {len(target_slots)}"
        )
        assert source.layer_bytes == target.layer_bytes and source.num_layers == target.num_layers, (
            "tiers of different chunks"
        )
        self._source, self._target = source, target
        self._source_slots, self._target_slots = tuple(source_slots), tuple(target_slots)
        self._is_on_host = source.device.type == target.device.type == "cpu"
        self._slots: torch.Tensor | None = None  # (2, n) on the device; None until a kernel needs them

    def whole(self) -> None:
        """Copy everything, in few large calls."""
        if self._is_on_host:
            self._copy_on_host(None)
        else:
            self._copy_runs(None)

    def layer(self, layer: int) -> None:
        """Copy one layer.

        To or from a device, a kernel gathers the pieces and reads page-locked memory in place.
        """
        if self._is_on_host:
            self._copy_on_host(layer)
        elif gather.why_not(self._source.layer_bytes) is None:
            if self._slots is None:
                self._slots = to_device(
                    np.array((self._source_slots, self._target_slots), np.int64), self._target.device
                )
            gather.copy_layer(self._source.layer(layer), self._target.layer(layer), self._slots)
        else:
            self._copy_runs(layer)

    def _copy_on_host(self, layer: int | None) -> None:
        row_bytes = self._source.slot_bytes if layer is None else self._source.layer_bytes
        piece = max(1, PIECE_BYTES // row_bytes)
        for first in range(0, len(self._source_slots), piece):
            rows = _rows(self._source, layer).index_select(
                0, _row_ids(self._source, self._source_slots[first : first + piece], layer)
            )
            _rows(self._target, layer).index_copy_(
                0, _row_ids(self._target, self._target_slots[first : first + piece], layer), rows
            )

    def _copy_runs(self, layer: int | None) -> None:
        """Copy with one call for all neighbouring slots whose targets are neighbours, too."""
        for source, target, count in runs(self._source_slots, self._target_slots):
            from_, to = self._source.data[source : source + count], self._target.data[target : target + count]
            if layer is None:
                to.copy_(from_, non_blocking=True)
            else:
                for index in range(count):  # torch would stage a strided copy across devices
                    to[index, layer].copy_(from_[index, layer], non_blocking=True)


def runs(sources: Sequence[int], targets: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of pairs that follow each other on both sides: (first source, first target, count)."""
    first = 0
    for index in range(1, len(sources) + 1):
        if (
            index == len(sources)
            or sources[index] != sources[index - 1] + 1
            or targets[index] != targets[index - 1] + 1
        ):
            yield sources[first], targets[first], index - first
            first = index


def _rows(store: KVStore, layer: int | None) -> torch.Tensor:
    """The store as a matrix of contiguous rows, which copy fastest: slots, or layers of slots."""
    shape = (
        (store.num_slots, store.slot_bytes)
        if layer is None
        else (store.num_slots * store.num_layers, store.layer_bytes)
    )
    return store.data.view(shape)


def _row_ids(store: KVStore, slots: Sequence[int], layer: int | None) -> torch.Tensor:
    ids = torch.tensor(slots, dtype=torch.int64)
    return ids if layer is None else ids * store.num_layers + layer
