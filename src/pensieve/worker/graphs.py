"""Decode steps as captured graphs: one launch instead of hundreds.

Knows batches and models; never plans, copies or sampling.

A step of decodes is the same work every time, on other numbers. It is captured once for each of a few batch
sizes, over tensors that stay in place; a step's numbers are copied into those. Rows beyond the batch compute
a token that is not used, in a slot that no chunk has. Other steps are long enough to hide their launches.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pensieve.worker.attention import CapturableBackend, PagedAttention
from pensieve.worker.batch import Batch
from pensieve.worker.model import CausalModel

logger = logging.getLogger(__name__)

_WARM_UPS = 2  # before a capture: libraries choose their kernels and allocate their workspaces

Replay = Callable[[], torch.Tensor]


class Recorder(Protocol):
    """Captures work."""

    def record(self, work: Callable[[], torch.Tensor]) -> Replay:
        """Run `work` a few times and capture it.

        Returns:
            A function that does the same work again, over the same memory.
        """
        ...

    @property
    def num_bytes(self) -> int:
        """Device memory that captured graphs hold."""
        ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory: only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._num_bytes = 0

    def record(self, work: Callable[[], torch.Tensor]) -> Replay:
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream(self._device).wait_stream(side)
        torch.cuda.synchronize(self._device)
        before, _ = torch.cuda.mem_get_info(self._device)
        graph = torch.cuda.CUDAGraph()
        # other threads may go on copying chunks meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = work()
        self._pool = graph.pool() if self._pool is None else self._pool
        after, _ = torch.cuda.mem_get_info(self._device)
        self._num_bytes += max(0, before - after)

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay

    @property
    def num_bytes(self) -> int:
        return self._num_bytes


@dataclass(frozen=True, slots=True)
class _Captured:
    """A graph and the tensors it reads."""

    batch: Batch  # of a fixed number of rows
    step: Any  # the backend's prepared step
    replay: Replay


class DecodeGraphs:
    """The graphs of one worker, captured when they are first needed."""

    def __init__(
        self,
        model: CausalModel,
        backend: CapturableBackend[Any],
        recorder: Recorder,
        *,
        max_rows: int,
        max_chunks: int,
        spare_slot: int,
    ) -> None:
        """Capture nothing yet.

        Args:
            model: computes the decodes.
            backend: its attention.
            recorder: captures.
            max_rows: larger batches are computed without graphs.
            max_chunks: of the longest context.
            spare_slot: a slot of the first tier that no chunk has.
        """
        self._model, self._backend, self._recorder = model, backend, recorder
        self._max_chunks, self._spare_slot = max_chunks, spare_slot
        self._sizes = _sizes(max_rows)
        self._captured: dict[int, _Captured] = {}
        self._why_not: str | None = None  # why capturing failed: it would fail again; None while it works

    @property
    def num_bytes(self) -> int:
        """Device memory that graphs hold so far."""
        return self._recorder.num_bytes

    @property
    def num_captured(self) -> int:
        """The number of graphs."""
        return len(self._captured)

    def forward(self, batch: Batch) -> torch.Tensor | None:
        """Logits (E, V) of a batch of decodes, valid until the next call.

        None if the batch is something else, or if there is no graph for it.
        """
        num_rows = len(batch.spans)
        is_decode = batch.num_tokens == num_rows == len(batch.emitting)
        if (
            not is_decode
            or num_rows > self._sizes[-1]
            or batch.block_tables.shape[1] > self._max_chunks
            or self._why_not is not None
        ):
            return None
        size = self._sizes[bisect_left(self._sizes, num_rows)]
        captured = self._captured.get(size)
        if captured is None:
            return self._capture(batch, size)
        self._fill(captured.batch, batch)
        self._backend.refill(captured.step, batch.spans)
        return captured.replay()[:num_rows]

    def _capture(self, batch: Batch, size: int) -> torch.Tensor:
        """Compute this batch without a graph, and capture one for the next batch of this size."""
        attending = PagedAttention(self._backend, batch)
        logits = self._model.forward(batch, attending)
        with torch.inference_mode():
            fixed = self._empty(size, batch)
            self._fill(fixed, batch)
            step = self._backend.fixed(fixed, attending.prepared)
            self._backend.refill(step, batch.spans)
        again = PagedAttention(self._backend, fixed, prepared=step)
        try:
            replay = self._recorder.record(lambda: self._model.forward(fixed, again))
        except Exception as error:  # for example a model that reads its own numbers
            self._why_not = f"{type(error).__name__}: {error}"
            logger.warning(
                "decode steps of %s are not captured as graphs: %s", self._model.label, self._why_not
            )
        else:
            self._captured[size] = _Captured(fixed, step, replay)
        return logits

    def _empty(self, size: int, like: Batch) -> Batch:
        """A batch of `size` rows of unused tokens."""
        device = like.input_ids.device

        def numbers(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        rows = torch.arange(size + 1, device=device)
        return Batch(
            spans=(), input_ids=numbers(1, size), position_ids=numbers(1, size), slot_mapping=numbers(size),
            cu_seqlens_q=rows, context_lens=numbers(size), block_tables=numbers(size, self._max_chunks),
            logit_rows=rows[:size], emitting_rows=numbers(0), unknown=numbers(0), unknown_rows=numbers(0),
            emitting=(), chunk_tokens=like.chunk_tokens,
        )  # fmt: skip

    def _fill(self, fixed: Batch, batch: Batch) -> None:
        """Copy a batch's numbers into a fixed batch; further rows write into the spare slot."""
        num_rows = len(batch.spans)
        fixed.input_ids[:, :num_rows].copy_(batch.input_ids)
        fixed.position_ids[:, :num_rows].copy_(batch.position_ids)
        fixed.slot_mapping[:num_rows].copy_(batch.slot_mapping)
        fixed.slot_mapping[num_rows:].fill_(self._spare_slot * batch.chunk_tokens)
        fixed.position_ids[:, num_rows:].zero_()
        fixed.block_tables[:num_rows, : batch.block_tables.shape[1]].copy_(batch.block_tables)


def _sizes(most: int) -> list[int]:
    """Batch sizes to capture: from 3 rows on, a batch computes at most a third more rows than it has."""
    sizes = [
        size
        for size in (1, 2, 3, 4, 6, *range(8, 64, 8), *range(64, 256, 16), *range(256, 1025, 64))
        if size < most
    ]
    return [*sizes, most]
