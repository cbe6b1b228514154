"""Runs one step: copies data, runs the model, samples tokens. Connects the room's parts; decides nothing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from pensieve.config import TierConfig
from pensieve.core.plan import Copy, CopyFailure, RequestFailure, SampledToken, Span, StepPlan, StepResult
from pensieve.errors import ConfigError
from pensieve.worker.allocator import keep_freed_memory
from pensieve.worker.attention import AttentionBackend, CapturableBackend, PagedAttention, make_backend
from pensieve.worker.batch import Batch, BatchBuilder
from pensieve.worker.graphs import CudaRecorder, DecodeGraphs, Recorder
from pensieve.worker.kv_store import KVStore
from pensieve.worker.model import CausalModel
from pensieve.worker.random_weights import available_bytes
from pensieve.worker.sampler import Choice, Sampler, nothing
from pensieve.worker.streams import streams_for
from pensieve.worker.transfer import SwapIn, Transfer

_SLACK_BYTES = 256 << 20  # activations and staging, for which the tiers must leave memory


@dataclass(frozen=True, slots=True)
class Hooks:
    """Hooks by which a test makes things fail: each is called before the thing, and may raise."""

    before_copy: Callable[[Copy], None] = lambda copy: None
    before_forward: Callable[[StepPlan], None] = lambda plan: None
    before_sample: Callable[[str], None] = lambda request_id: None  # the argument is a request id


@dataclass(slots=True)
class Begun:
    """A plan that was begun and is not finished."""

    plan: StepPlan
    begun_s: float  # by `time.perf_counter`
    swap_in: SwapIn | None = None  # None if nothing was begun
    choice: Choice = field(default_factory=nothing)
    contexts: dict[str, frozenset[int]] = field(
        default_factory=dict
    )  # slots that each emitting request attends, if some are being swapped in
    error: str | None = None  # of the forward
    wipe_error: str | None = None
    computed: Any = None  # event of the compute stream, after all of its work
    outcome: tuple[list[SampledToken], list[RequestFailure]] | None = None  # None if not collected yet


class ModelWorker:
    """The worker that computes with a real model; see `core.plan.PipelinedWorker`.

    Only one thread at a time may call it.
    """

    def __init__(
        self,
        model: CausalModel,
        tiers: tuple[TierConfig, ...],
        chunk_tokens: int = 32,
        *,
        attention: str = "auto",
        hooks: Hooks = Hooks(),
        verify: bool = False,
        on_device: bool | None = None,
        graph_rows: int = 0,
        recorder: Recorder | None = None,
    ) -> None:
        """Allocate all tiers, once.

        Args:
            model: a model that passed the gate.
            tiers: fastest first; the first is on the model's device, the others in main memory.
            chunk_tokens: tokens of one slot.
            attention: a backend's name, or "auto".
            hooks: for tests of failures.
            verify: compare checksums of what comes back from lower tiers, see `Transfer`.
            on_device: sample without reading the logits on the host, so that steps can be begun ahead of
                results; None does so on CUDA.
            graph_rows: decode batches of up to so many rows are captured as graphs, if the attention backend
                can; 0 for none.
            recorder: captures them; None takes CUDA's.

        Raises:
            ConfigError: the tiers do not fit in memory, or the backend cannot serve this model.
        """
        self._model = model
        backend = make_backend(attention, model.geometry, chunk_tokens, model.device, model.attention_args)
        self._backend: AttentionBackend[Any] | None = backend  # None once closed
        self.attention = backend.name
        self.layer_bytes = backend.layer_bytes  # of one slot
        self._hooks = hooks
        if model.device.type == "cpu":
            keep_freed_memory()
        capturable = backend if graph_rows > 0 and isinstance(backend, CapturableBackend) else None
        spare = 0 if capturable is None else 1  # a slot for the rows of a graph that compute nothing
        stored = (TierConfig(tiers[0].name, tiers[0].num_slots + spare), *tiers[1:])
        require_tiers_fit(stored, self.chunk_bytes, model.device, beside=model.library_bytes)
        self._stores = tuple(self._make_store(tier, first=index == 0) for index, tier in enumerate(stored))
        backend.bind(self._stores[0])
        self._builder = BatchBuilder(chunk_tokens, model.device)
        self._on_device = model.device.type == "cuda" if on_device is None else on_device
        self._sampler = Sampler(before_sample=hooks.before_sample, on_device=self._on_device)
        self._streams = streams_for(model.device)
        self._transfer = Transfer(
            self._stores, before_copy=hooks.before_copy, streams=self._streams, verify=verify
        )
        self._begun: deque[Begun] = deque()
        self._finished_s = 0.0  # when the last step was finished
        self._latest = torch.zeros(
            0, dtype=torch.int64, device=model.device
        )  # the token sampled last, by the request's row
        self._graphs: DecodeGraphs | None = None
        if capturable is not None:
            self._graphs = DecodeGraphs(
                model, capturable, CudaRecorder(model.device) if recorder is None else recorder,
                max_rows=graph_rows, max_chunks=-(-model.shape.max_positions // chunk_tokens),
                spare_slot=tiers[0].num_slots,
            )  # fmt: skip

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one slot, in every tier."""
        return self.layer_bytes * self._model.geometry.num_layers

    @property
    def graphs(self) -> DecodeGraphs | None:
        """The captured decode steps; None if none are captured."""
        return self._graphs

    def run(self, plan: StepPlan) -> StepResult:
        """Wipe slots, start the plan's copies, run its spans, sample; see `core.plan.Worker.run`."""
        assert not self._begun, "steps that were begun must be finished first"
        self.begin(plan)
        return self.finish()

    def begin(self, plan: StepPlan) -> None:
        """Queue everything; see `core.plan.PipelinedWorker.begin`."""
        self._sampler.forget(plan.ended)
        self._builder.forget(plan.ended)
        self._sampler.start(plan.started)
        self._builder.update(plan.tables)
        begun = Begun(plan, time.perf_counter())
        self._begun.append(begun)
        try:
            self._wipe(plan.wiped)
        except Exception as error:  # slots are not zero: nothing may be computed or copied over them
            begun.wipe_error = f"{type(error).__name__}: {error}"
            self._transfer.start((), ())
            return
        swap_in = begun.swap_in = self._transfer.start(plan.swap_in, plan.swap_out)
        try:
            if plan.spans:
                if self._sampler.needs_history(plan.spans):
                    self._collect_all_but(begun)
                self._launch(begun, swap_in)
        except Exception as error:  # a plan's failure is its result; the next plan may be fine
            begun.error = f"{type(error).__name__}: {error}"
        swap_in.wait_layer(
            self._model.geometry.num_layers - 1
        )  # also if no span of this plan attends it: the next plan's may
        begun.computed = self._streams.compute.record()

    def finish(self) -> StepResult:
        """Finish the oldest plan that was begun; see `core.plan.PipelinedWorker.finish`."""
        begun = self._begun[0]
        plan = begun.plan
        if begun.swap_in is None:
            self._begun.popleft()
            lost = tuple(
                CopyFailure(copy.copy_id, False, begun.wipe_error or "")
                for copy in (*plan.swap_in, *plan.swap_out)
            )
            done, failed = self._transfer.end_step()
            return StepResult(
                plan.step_id, (), done, (*failed, *lost), (), begun.wipe_error, begun.wipe_error
            )
        self._collect(begun)
        self._begun.popleft()
        now_s = time.perf_counter()  # before waiting for swap-outs
        seconds = now_s - max(begun.begun_s, self._finished_s) if plan.spans and begun.error is None else None
        self._finished_s = now_s
        if plan.settles:
            self._transfer.wait()
        done, failed = self._transfer.end_step()
        tokens, broken = begun.outcome or ([], [])
        return StepResult(
            plan.step_id, tuple(tokens), done, failed, tuple(broken), begun.error, seconds=seconds
        )

    def set_waker(self, wake: Callable[[], None]) -> None:
        """Set what the copying thread calls when a swap-out settles while no `run` is under way."""
        self._transfer.set_waker(wake)

    def close(self) -> None:
        """Stop the copying thread and free the tiers' memory. Safe to call twice."""
        self._transfer.close()
        self._stores = ()
        self._backend = self._graphs = None
        if self._model.device.type == "cuda":
            # another worker may ask the device for this memory
            torch.cuda.empty_cache()

    def _wipe(self, wiped: tuple[tuple[int, int], ...]) -> None:
        for tier, store in enumerate(self._stores) if wiped else ():
            store.wipe([slot for place, slot in wiped if place == tier])

    def _launch(self, begun: Begun, swap_in: SwapIn) -> None:
        """Run the forward of a plan with spans, and sample."""
        plan = begun.plan
        with torch.inference_mode():
            batch, logits = self._forward(plan, swap_in)
            if plan.swap_in:
                begun.contexts = {
                    span.request_id: frozenset(self._builder.slots_of(span).tolist())
                    for span in batch.emitting
                }
            if not self._on_device:
                swap_in.wait()  # what was lost may not even be numbers: never sample from it
            begun.choice = self._choose(begun, batch, logits)
            if self._on_device:
                if len(self._latest) < self._builder.num_rows:
                    self._latest = torch.cat(
                        [self._latest, self._latest.new_zeros(self._builder.num_rows - len(self._latest))]
                    )
                self._latest.index_copy_(0, batch.emitting_rows, begun.choice.tokens)

    def _forward(self, plan: StepPlan, swap_in: SwapIn) -> tuple[Batch, torch.Tensor]:
        """The batch of a plan with spans, and its logits (E, V)."""
        batch = self._prepare(plan)
        if len(batch.unknown):
            batch.input_ids[0].index_copy_(0, batch.unknown, self._latest.index_select(0, batch.unknown_rows))
        return batch, self._logits(batch, swap_in)

    def _prepare(self, plan: StepPlan) -> Batch:
        """Do everything that may fail before the model is called."""
        self._hooks.before_forward(plan)
        return self._builder.build(
            plan.spans, self._sampler.last_token if self._on_device else self._known_token
        )

    def _logits(self, batch: Batch, swap_in: SwapIn) -> torch.Tensor:
        """(E, V)."""
        if self._graphs is not None and not swap_in.copies:
            logits = self._graphs.forward(batch)
            if logits is not None:
                return logits
        assert self._backend is not None, "the worker is closed"
        return self._model.forward(batch, PagedAttention(self._backend, batch, swap_in.wait_layer))

    def _choose(self, begun: Begun, batch: Batch, logits: torch.Tensor) -> Choice:
        """Sample for the spans whose whole context has arrived, as far as that is known now."""
        spans = batch.emitting
        if self._on_device or all(self._is_whole(begun, span) for span in spans):
            return self._sampler.launch(spans, logits)
        good = [row for row, span in enumerate(spans) if self._is_whole(begun, span)]
        return self._sampler.launch(tuple(spans[row] for row in good), logits[good])

    def _is_whole(self, begun: Begun, span: Span) -> bool:
        """Whether no swap-in failed to bring a chunk that a span attended. (The scheduler plans it again.)"""
        if not begun.contexts:
            return True
        assert begun.swap_in is not None
        return begun.contexts[span.request_id].isdisjoint(slot for _, slot in begun.swap_in.failed_slots)

    def _known_token(self, span: Span) -> int:
        """The token at a span's start.

        0 if none was sampled: that step was void, and so will this one be.
        """
        return self._sampler.last_token(span) or 0

    def _collect(self, begun: Begun) -> None:
        """Wait for a begun plan, and keep its tokens."""
        if begun.outcome is not None or begun.swap_in is None:
            return
        begun.swap_in.wait()
        try:
            self._streams.compute.reach(begun.computed)
            begun.outcome = (
                self._sampler.collect(begun.choice, lambda span: self._is_whole(begun, span))
                if begun.error is None
                else ([], [])
            )
        except Exception as error:  # a device reports errors late
            begun.error = f"{type(error).__name__}: {error}"
            begun.outcome = ([], [])

    def _collect_all_but(self, newest: Begun) -> None:
        for begun in self._begun:
            if begun is not newest:
                self._collect(begun)

    def _make_store(self, tier: TierConfig, *, first: bool) -> KVStore:
        device = self._model.device if first else torch.device("cpu")
        pinned = not first and self._model.device.type == "cuda"  # without CUDA, torch cannot pin
        return KVStore(
            tier.num_slots, self._model.geometry.num_layers, self.layer_bytes, device, pinned=pinned
        )


def memory_available_bytes(device: torch.device | str = "cpu") -> int | None:
    """Memory this process may still take on a device, under its control groups' limits; None if unknown."""
    return available_bytes(str(device))


def require_tiers_fit(
    tiers: tuple[TierConfig, ...],
    chunk_bytes: int,
    device: torch.device,
    *,
    sharers: int = 1,
    beside: int = 0,
) -> None:
    """Refuse tiers that do not fit, before anything is allocated.

    `sharers` processes want as much of the same main memory. In each, `beside` bytes of it go to libraries
    (`CausalModel.library_bytes`).

    Raises:
        ConfigError: with the size of each tier, the size there is, and the way out.
    """
    places = {"cpu": torch.device("cpu"), str(device): device}
    for name, place in places.items():
        here = [
            tier
            for index, tier in enumerate(tiers)
            if str(device if index == 0 else torch.device("cpu")) == name
        ]
        times = sharers if place.type == "cpu" else 1
        need = times * sum(tier.num_slots for tier in here) * chunk_bytes
        slack = _SLACK_BYTES + (times * beside if place.type == "cpu" else 0)
        room = memory_available_bytes(place)
        if here and room is not None and need + slack > room:
            sizes = ", ".join(
                f"{tier.name} {tier.num_slots} chunks = {tier.num_slots * chunk_bytes / 1e9:.2f} GB"
                for tier in here
            )
            each = f" for each of {times} processes" if times > 1 else ""
            raise ConfigError(
                f"the cache does not fit in the memory of {name}: {sizes}{each}; {room / 1e9:.2f} GB are "
                "available, "
                f"{slack / 1e9:.2f} GB of them needed for computing. Give the tiers fewer bytes "
                "(--gpu-cache, --cpu-cache)"
            )
