"""One step, done: data moved, the model run, tokens sampled. Wires the room together; decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pensieve.config import TierConfig
from pensieve.core.plan import Copy, CopyFailure, RequestFailure, SampledToken, StepPlan, StepResult
from pensieve.errors import ConfigError
from pensieve.worker.allocator import keep_freed_memory
from pensieve.worker.attention import PagedAttention, make_backend
from pensieve.worker.batch import Batch, BatchBuilder
from pensieve.worker.kv_store import KVStore
from pensieve.worker.model import CausalModel
from pensieve.worker.random_weights import available_bytes
from pensieve.worker.sampler import Sampler
from pensieve.worker.transfer import SwapIn, Transfer

_SLACK_BYTES = 256 << 20  # activations and staging, which the tiers must leave room for


@dataclass(frozen=True, slots=True)
class Hooks:
    """Where a test may make things fail: each is called before the thing, and may raise."""

    before_copy: Callable[[Copy], None] = lambda copy: None
    before_forward: Callable[[StepPlan], None] = lambda plan: None
    before_sample: Callable[[str], None] = lambda request_id: None  # request id


class ModelWorker:
    """The worker that computes with a real model; see `core.plan.Worker`. One thread may call `run` at a time."""

    def __init__(
        self, model: CausalModel, tiers: tuple[TierConfig, ...], chunk_tokens: int = 32, *, attention: str = "auto", hooks: Hooks = Hooks()
    ) -> None:
        """Allocate all tiers, once.

        Args:
            model: a model that passed the gate.
            tiers: fastest first; the first lies on the model's device, the others in main memory.
            chunk_tokens: tokens of one slot.
            attention: a backend's name, or "auto".
            hooks: for tests of failures.

        Raises:
            ConfigError: the tiers do not fit in memory, or the backend cannot serve this model.
        """
        self._model = model
        self._backend: Any = make_backend(attention, model.geometry, chunk_tokens, model.device)
        self._hooks = hooks
        if model.device.type == "cpu":
            keep_freed_memory()
        require_room(tiers, self.chunk_bytes, model.device)
        self._stores = tuple(self._make_store(tier, first=index == 0) for index, tier in enumerate(tiers))
        self._backend.bind(self._stores[0])
        self._builder = BatchBuilder(chunk_tokens, model.device)
        self._sampler = Sampler(before_sample=hooks.before_sample)
        self._transfer = Transfer(self._stores, before_copy=hooks.before_copy)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one slot, in every tier."""
        num_bytes: int = self._backend.layer_bytes * self._model.geometry.num_layers
        return num_bytes

    @property
    def attention(self) -> str:
        """Name of the attention backend in use."""
        name: str = self._backend.name
        return name

    def run(self, plan: StepPlan) -> StepResult:
        """Wipe, start the plan's copies, run its spans, sample; see `core.plan.Worker.run`."""
        self._sampler.forget(plan.ended)
        self._builder.forget(plan.ended)
        self._sampler.start(plan.started)
        self._builder.update(plan.tables)
        try:
            self._wipe(plan.wiped)
        except Exception as error:  # what was to be zero is not: nothing may be computed or copied over it
            return self._without_wipes(plan, f"{type(error).__name__}: {error}")
        swap_in = self._transfer.start(plan.swap_in, plan.swap_out)
        tokens: list[SampledToken] = []
        broken: list[RequestFailure] = []
        forward_error = None
        try:
            if plan.spans:
                batch, logits = self._forward(plan, swap_in)
                swap_in.wait()
                tokens, broken = self._sample(batch, logits, swap_in)
        except Exception as error:  # a plan's failure is its result; the next plan may be fine
            forward_error = f"{type(error).__name__}: {error}"
        swap_in.wait()
        if plan.settles:
            self._transfer.wait()
        if plan.wiped and self._model.device.type == "cuda":
            torch.cuda.current_stream(self._model.device).synchronize()  # "wiped" is said when it is so
        done, failed = self._transfer.end_step()
        return StepResult(plan.step_id, tuple(tokens), done, failed, tuple(broken), forward_error)

    def set_waker(self, wake: Callable[[], None]) -> None:
        """`wake` is called from the copying thread when a swap-out settles while no `run` is under way."""
        self._transfer.set_waker(wake)

    def close(self) -> None:
        """Stop the copying thread and give the tiers' memory back. Safe to call twice."""
        self._transfer.close()
        self._stores = ()
        self._backend = None

    def _wipe(self, wiped: tuple[tuple[int, int], ...]) -> None:
        for tier, store in enumerate(self._stores) if wiped else ():
            store.wipe([slot for place, slot in wiped if place == tier])

    def _without_wipes(self, plan: StepPlan, message: str) -> StepResult:
        lost = tuple(CopyFailure(copy.copy_id, False, message) for copy in (*plan.swap_in, *plan.swap_out))
        done, failed = self._transfer.end_step()
        return StepResult(plan.step_id, (), done, (*failed, *lost), (), message, message)

    def _forward(self, plan: StepPlan, swap_in: SwapIn) -> tuple[Batch, torch.Tensor]:
        """The batch of a plan with spans, and its logits (E, V)."""
        batch = self._prepare(plan)
        return batch, self._model.forward(batch, PagedAttention(self._backend, batch, swap_in.wait_layer))

    def _prepare(self, plan: StepPlan) -> Batch:
        """What can be done, and go wrong, before the model is called."""
        self._hooks.before_forward(plan)
        return self._builder.build(plan.spans, self._sampler.last_token)

    def _sample(self, batch: Batch, logits: torch.Tensor, swap_in: SwapIn) -> tuple[list[SampledToken], list[RequestFailure]]:
        """Sample for the spans whose context came in whole; the others computed over nothing, and the scheduler plans them again."""
        lost = {slot for _, slot in swap_in.failed_slots}
        spans = batch.emitting
        with torch.inference_mode():
            if lost:
                good = [row for row, span in enumerate(spans) if lost.isdisjoint(self._builder.slots_of(span).tolist())]
                spans, logits = tuple(spans[row] for row in good), logits[good]
            return self._sampler.sample(spans, logits)

    def _make_store(self, tier: TierConfig, *, first: bool) -> KVStore:
        device = self._model.device if first else torch.device("cpu")
        pinned = not first and self._model.device.type == "cuda"  # without CUDA, torch cannot pin
        return KVStore(tier.num_slots, self._model.geometry.num_layers, self._backend.layer_bytes, device, pinned=pinned)


def memory_available_bytes(device: torch.device | str = "cpu") -> int | None:
    """Memory this process may still take on a device, limits of its control groups included; None where nobody says."""
    return available_bytes(str(device))


def require_room(tiers: tuple[TierConfig, ...], chunk_bytes: int, device: torch.device, *, sharers: int = 1) -> None:
    """Refuse tiers that do not fit, before anything is allocated. `sharers` processes want as much of the same main memory.

    Raises:
        ConfigError: with the size of each tier, the size there is, and the way out.
    """
    places = {"cpu": torch.device("cpu"), str(device): device}
    for name, place in places.items():
        here = [tier for index, tier in enumerate(tiers) if str(device if index == 0 else torch.device("cpu")) == name]
        times = sharers if place.type == "cpu" else 1
        need = times * sum(tier.num_slots for tier in here) * chunk_bytes
        room = memory_available_bytes(place)
        if here and room is not None and need + _SLACK_BYTES > room:
            sizes = ", ".join(f"{tier.name} {tier.num_slots} chunks = {tier.num_slots * chunk_bytes / 1e9:.2f} GB" for tier in here)
            each = f" for each of {times} processes" if times > 1 else ""
            raise ConfigError(
                f"the cache does not fit in the memory of {name}: {sizes}{each}; {room / 1e9:.2f} GB are available, "
                f"{_SLACK_BYTES / 1e9:.2f} GB of them needed for computing. Give the tiers fewer bytes"
            )
