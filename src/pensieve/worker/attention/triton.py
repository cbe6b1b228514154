"""Attention in place on a GPU, by our own kernels in Triton.

Knows launches and how work is divided; never plans or models.

All spans of a step, whatever their mix, go in one launch a layer: a decode, a prompt, a dropped prefix and
the rest after a hole differ only in their numbers. A table, made once a step and shared by all layers, says
what each program does: `WorkItem`, a tile of queries and a range of its context. Few queries over long
contexts are divided into parts, so that every multiprocessor has some; a second kernel combines them.

In a slot's layer: all K, then all V, each [Hkv][C][D], so that what one program reads of a chunk is
contiguous.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from pensieve.core.plan import Span
from pensieve.worker.attention.base import AttentionArgs, CapturableBackend, KVGeometry
from pensieve.worker.batch import Batch
from pensieve.worker.kv_store import KVStore
from pensieve.worker.pinned import to_device

_MOST_DIM = 256
_MIN_ROWS = 16  # of a tile: the fewest rows that a tensor core multiplies
_PROGRAMS_EACH = 2  # the least number of programs for each multiprocessor, if there is enough work
_MIN_PART = 256  # tokens: a part's result is written and read once more, which does not pay for shorter parts
_WRITE_TOKENS = 16  # tokens that one program writes


class WorkItem(NamedTuple):
    """The work of one program, for each key head."""

    span: int  # row of the block tables
    first_row: int  # of T
    num_queries: int  # 0 for no work
    first_position: int  # of the first query
    first: int  # its part of the context, [first, stop)
    stop: int
    part: int  # the number of its part, if the context is divided
    num_parts: int  # 1 if the result goes straight to the output


class Reduction(NamedTuple):
    """A tile of queries whose context was divided."""

    first_row: int
    num_queries: int  # 0 for no work
    first_part: int
    num_parts: int


class Tiling(NamedTuple):
    """How a step is cut into programs."""

    rows: int  # M, (query, head) pairs of a tile
    block: int  # N, tokens of the context at a time


@dataclass(frozen=True, slots=True)
class Work:
    """A step cut into programs, for layers with a given number of query heads a key head.

    Tensors are on the device.
    """

    tiling: Tiling
    items: torch.Tensor  # (items, 8) int32
    reductions: torch.Tensor  # (reductions, 4) int32
    partials: torch.Tensor  # (parts, Hkv, M, D padded) float32
    sums: torch.Tensor  # (parts * Hkv * 2 * M,) float32


@dataclass(frozen=True, slots=True)
class TritonStep:
    """One step's batch and, by query heads a key head, its work."""

    batch: Batch
    work: dict[int, Work] = field(default_factory=dict)
    is_fixed: bool = False  # whether its tensors stay in place, see `fixed`


class TritonAttention(CapturableBackend[TritonStep]):
    """The default on CUDA."""

    name = "triton"

    def __init__(self, geometry: KVGeometry, chunk_tokens: int, *, num_programs: int | None = None) -> None:
        """`num_programs` is the least number of a step with enough work; None derives it from the device."""
        super().__init__(geometry, chunk_tokens)
        self._kernels: Any = importlib.import_module("pensieve.worker.attention.triton_kernels")
        self._num_programs = num_programs
        self._dim_padded = max(16, 1 << (geometry.head_dim - 1).bit_length())
        self._room = torch.empty(0)  # results of parts, kept from step to step

    @classmethod
    def why_not(cls, geometry: KVGeometry, chunk_tokens: int, device: torch.device) -> str | None:
        """It serves CUDA, and with Triton's interpreter a CPU."""
        if geometry.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{geometry.dtype} is none of float32, bfloat16, float16"
        if geometry.head_dim > _MOST_DIM:
            return f"heads of {geometry.head_dim} numbers are larger than {_MOST_DIM}"
        if device.type == "cuda" and importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if device.type != "cuda" and not (device.type == "cpu" and _interprets()):
            return f"it runs on CUDA (or with TRITON_INTERPRET=1 on a CPU), not on {device}"
        return None

    def bind(self, store: KVStore) -> None:
        """See the store as numbers, layer by layer."""
        numbers = store.data.view(-1).view(self.geometry.dtype)
        layer_numbers = store.layer_bytes // self.geometry.dtype.itemsize
        self._device = store.device
        self._slot_stride = store.num_layers * layer_numbers
        self._layers = [numbers[layer * layer_numbers :] for layer in range(store.num_layers)]
        if self._num_programs is None:
            self._num_programs = _PROGRAMS_EACH * _multiprocessors(store.device)

    # -- once a step

    def prepare(self, batch: Batch) -> TritonStep:
        """Only the batch; the work when the first layer of each kind needs it."""
        return TritonStep(batch)

    def fixed(self, batch: Batch, like: TritonStep) -> TritonStep:
        """A step over a batch whose tensors stay in place, with work for the same kinds of layers."""
        step = TritonStep(batch, is_fixed=True)
        num_rows = batch.num_tokens
        for group in like.work:
            tiling = self._tiling(1, group)
            num_items = num_rows + self._wanted
            items = torch.zeros((num_items, len(WorkItem._fields)), dtype=torch.int32, device=self._device)
            reductions = torch.zeros(
                (num_rows, len(Reduction._fields)), dtype=torch.int32, device=self._device
            )
            room = torch.empty(
                self._room_numbers(num_items, tiling), dtype=torch.float32, device=self._device
            )
            step.work[group] = Work(tiling, items, reductions, *self._parts_of(room, num_items, tiling))
        return step

    def refill(self, step: TritonStep, spans: tuple[Span, ...]) -> None:
        for group, work in step.work.items():
            items, reductions = self.divide(spans, work.tiling, group)
            numbers = np.zeros(work.items.numel() + work.reductions.numel(), np.int32)
            split = work.items.numel()
            assert len(items) * len(WorkItem._fields) <= split and len(reductions) <= len(work.reductions), (
                "more work than the graph has room for"
            )
            numbers[: len(items) * len(WorkItem._fields)] = np.array(items, np.int32).reshape(-1)
            numbers[split : split + len(reductions) * len(Reduction._fields)] = np.array(
                reductions, np.int32
            ).reshape(-1)
            tables = to_device(numbers, self._device)
            work.items.view(-1).copy_(tables[:split])
            work.reductions.view(-1).copy_(tables[split:])

    def _work(self, batch: Batch, group: int) -> Work:
        tiling = self._tiling(max(span.stop - span.start for span in batch.spans), group)
        items, reductions = self.divide(batch.spans, tiling, group)
        num_parts = sum(reduction.num_parts for reduction in reductions)
        if (need := self._room_numbers(num_parts, tiling)) > len(
            self._room
        ) or self._room.device != self._device:
            self._room = torch.empty(need, dtype=torch.float32, device=self._device)
        tables = to_device(
            np.concatenate([np.array(table, np.int32).reshape(-1) for table in (items, reductions)]),
            self._device,
        )
        split = len(items) * len(WorkItem._fields)
        return Work(
            tiling, tables[:split].view(-1, len(WorkItem._fields)),
            tables[split:].view(-1, len(Reduction._fields)), *self._parts_of(self._room, num_parts, tiling),
        )  # fmt: skip

    def _tiling(self, longest_span: int, group: int) -> Tiling:
        """The tiling of a step whose longest span has so many tokens."""
        if (
            self.geometry.dtype == torch.float32
        ):  # without matrix units, a larger tile's products do not fit in registers
            most, block = 16, 16
        else:
            most, block = (64, 32) if self._dim_padded > 128 else (128, 64)
        rows = max(_MIN_ROWS, group, min(most, longest_span * group))
        return Tiling(1 << (rows - 1).bit_length(), block)

    @property
    def _wanted(self) -> int:
        """Programs for each key head, such that every multiprocessor has some."""
        assert self._num_programs is not None
        return max(1, self._num_programs // self.geometry.num_kv_heads)

    def divide(
        self, spans: tuple[Span, ...], tiling: Tiling, group: int
    ) -> tuple[list[WorkItem], list[Reduction]]:
        """The work of a step's programs, at most `_wanted` more than there are tiles of queries.

        A part has as many tokens as give every multiprocessor some, rounded up to blocks. Long parts come
        first, so that none is left when the others are done.
        """
        queries = tiling.rows // group
        tiles: list[tuple[int, int, int, int]] = []  # span, first row, queries, first position
        row = 0
        for index, span in enumerate(spans):
            for position in range(span.start, span.stop, queries):
                count = min(queries, span.stop - position)
                tiles.append((index, row, count, position))
                row += count
        each = -(-sum(position + count for _, _, count, position in tiles) // self._wanted)
        part_tokens = -(-max(_MIN_PART, each) // tiling.block) * tiling.block
        items: list[WorkItem] = []
        reductions: list[Reduction] = []
        num_parts = 0
        for index, first_row, count, position in tiles:
            stop = position + count
            parts = -(-stop // part_tokens)
            if parts == 1:
                items.append(WorkItem(index, first_row, count, position, 0, stop, 0, 1))
                continue
            reductions.append(Reduction(first_row, count, num_parts, parts))
            for part in range(parts):
                first = part * part_tokens
                items.append(
                    WorkItem(
                        index,
                        first_row,
                        count,
                        position,
                        first,
                        min(stop, first + part_tokens),
                        num_parts + part,
                        parts,
                    )
                )
            num_parts += parts
        items.sort(key=lambda item: item.first - item.stop)
        return items, reductions

    def _room_numbers(self, num_parts: int, tiling: Tiling) -> int:
        return num_parts * self.geometry.num_kv_heads * tiling.rows * (self._dim_padded + 2)

    def _parts_of(
        self, room: torch.Tensor, num_parts: int, tiling: Tiling
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The kept memory, seen as partials and sums."""
        tiles = num_parts * self.geometry.num_kv_heads
        split = tiles * tiling.rows * self._dim_padded
        partials = room[:split].view(num_parts, -1, tiling.rows, self._dim_padded) if tiles else room[:0]
        return partials, room[split : split + tiles * 2 * tiling.rows]

    # -- in each layer

    def write(self, prepared: TritonStep, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put the new K and V, each (T, Hkv, D), into their slots, in one launch."""
        self.write_slots(prepared.batch.slot_mapping, layer, key, value)

    def write_slots(
        self, slot_mapping: torch.Tensor, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Write K and V, each (T, Hkv, D), to `slot_mapping` (T,)."""
        key, value = _plain(key), _plain(value)
        geometry, num_tokens = self.geometry, len(key)
        self._kernels.write_kernel[-(-num_tokens // _WRITE_TOKENS), geometry.num_kv_heads](
            key, value, self._layers[layer], slot_mapping, num_tokens, key.stride(0), key.stride(1),
            value.stride(0), value.stride(1), self._slot_stride, NUM_KV_HEADS=geometry.num_kv_heads,
            CHUNK=self.chunk_tokens, DIM=geometry.head_dim, DIM_PADDED=self._dim_padded,
            BLOCK_T=_WRITE_TOKENS,
        )  # fmt: skip

    def attend(
        self, prepared: TritonStep, layer: int, query: torch.Tensor, args: AttentionArgs
    ) -> torch.Tensor:
        """(T, H, D) -> (T, H, D), in one launch, or two if contexts were divided."""
        rows = _plain(query).to(self.geometry.dtype)
        # Unused rows of a captured graph have no program, but must hold numbers.
        output = (torch.zeros if prepared.is_fixed else torch.empty)(
            query.shape, dtype=rows.dtype, device=rows.device
        )
        geometry, group = self.geometry, query.shape[1] // self.geometry.num_kv_heads
        work = prepared.work.get(group)
        if work is None:
            work = prepared.work[group] = self._work(prepared.batch, group)
        tiling = work.tiling
        sinks = None if args.sinks is None else args.sinks.float().contiguous()
        shapes = {
            "GROUP": group, "NUM_KV_HEADS": geometry.num_kv_heads, "DIM": geometry.head_dim,
            "DIM_PADDED": self._dim_padded, "BLOCK_M": tiling.rows, "HAS_SINKS": sinks is not None,
        }  # fmt: skip
        self._kernels.attend_kernel[len(work.items), geometry.num_kv_heads](
            rows, output, self._layers[layer], work.items, prepared.batch.block_tables, work.partials,
            work.sums, sinks, rows.stride(0), rows.stride(1), output.stride(0), output.stride(1),
            self._slot_stride, prepared.batch.block_tables.stride(0), args.scaling, args.softcap or 0.0,
            args.sliding_window or 0, **shapes, CHUNK=self.chunk_tokens, BLOCK_N=tiling.block,
            HAS_WINDOW=args.sliding_window is not None, HAS_SOFTCAP=args.softcap is not None,
            AS_FLOAT=self._device.type == "cpu", **_resources(tiling, self._dim_padded),
        )  # fmt: skip
        if len(work.reductions):
            self._kernels.reduce_kernel[len(work.reductions), geometry.num_kv_heads](
                output,
                work.reductions,
                work.partials,
                work.sums,
                sinks,
                output.stride(0),
                output.stride(1),
                **shapes,
            )
        return output.to(query.dtype)


def _resources(tiling: Tiling, dim_padded: int) -> dict[str, int]:
    """Warps of a program, and blocks of K and V in flight at once.

    As many as fit in a multiprocessor's shared memory (228 KB on Hopper).
    """
    return {"num_warps": 8 if tiling.rows >= 128 else 4, "num_stages": 2 if dim_padded > 128 else 3}


def _plain(rows: torch.Tensor) -> torch.Tensor:
    """Rows with each head's numbers contiguous; not copied if they are so already."""
    return rows if rows.stride(2) == 1 else rows.contiguous()


@functools.cache
def _interprets() -> bool:
    """Whether Triton is installed and told to interpret its kernels, which takes no GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
