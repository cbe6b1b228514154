"""An engine on a thread of this process: sizes the tiers, wires worker, cache, scheduler, engine and service.

Knows how each is made; never clients.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pensieve.config import (
    CacheConfig,
    ContextLimit,
    ModelShape,
    SchedulerConfig,
    TierConfig,
    gigabytes,
    slots_for_bytes,
)
from pensieve.core.cache import TieredCache
from pensieve.core.cost import CostProfile, ResumeQuote
from pensieve.core.eviction import POLICIES
from pensieve.core.pace import Pace
from pensieve.core.scheduler import Scheduler
from pensieve.engine.engine import Engine
from pensieve.engine.messages import Event
from pensieve.errors import ConfigError
from pensieve.runtime.loading import LoadedModel, settled
from pensieve.runtime.options import DTYPE_BYTES, GB, Options

if TYPE_CHECKING:
    from pensieve.service import ConversationService
    from pensieve.store import ConversationStore
    from pensieve.worker.parallel import ParallelWorker
    from pensieve.worker.worker import ModelWorker


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the tiers."""

    chunk_bytes: int
    tiers: tuple[TierConfig, ...]
    limit: ContextLimit

    @property
    def max_context(self) -> int:
        """Tokens of the longest sequence."""
        return self.limit.tokens

    def as_json(self) -> dict[str, Any]:
        """For a report."""
        return {
            "chunk_bytes": self.chunk_bytes,
            "max_context": self.max_context,
            "slots": {t.name: t.num_slots for t in self.tiers},
        }


@dataclass(frozen=True, slots=True)
class StartedEngine:
    """An engine, and what was chosen for it."""

    engine: Engine
    sizes: Sizes
    cost_source: str  # where Cost(l) came from
    attention: str  # the backend's name
    forward: str  # what computes the model


@dataclass(slots=True)
class Runtime:
    """A running engine and its service. Close it to free the tiers."""

    engine: Engine
    service: ConversationService
    sizes: Sizes
    cost_source: str  # where Cost(l) came from

    def close(self) -> None:
        """Stop the engine, then the service, and give the memory back."""
        self.engine.close()
        self.service.close()


def size_tiers(
    options: Options, shape: ModelShape, gpu_cache_gb: float, *, total_as_one: bool = False
) -> Sizes:
    """Slots of each tier, and the context that fits.

    Args:
        options: the second tier's budget, dtype (settled), context.
        shape: what a chunk's size follows from.
        gpu_cache_gb: the first tier's budget.
        total_as_one: the first tier gets the bytes of both (the stateless baseline needs no second tier).

    Raises:
        ConfigError: the first tier holds less than two chunks, or --max-context is more than the model or the
            first tier can hold.
    """
    chunk_bytes = shape.kv_bytes_per_token(DTYPE_BYTES[options.dtype]) * options.chunk_tokens
    gpu_bytes, cpu_bytes = int(gpu_cache_gb * GB), int(options.second_tier_gb * GB)
    if total_as_one:
        gpu_bytes, cpu_bytes = gpu_bytes + cpu_bytes, 0
    gpu_slots, cpu_slots = slots_for_bytes(gpu_bytes, chunk_bytes), slots_for_bytes(cpu_bytes, chunk_bytes)
    if gpu_slots < 2:
        raise ConfigError(
            f"--gpu-cache {gpu_cache_gb:g} holds {gpu_slots} chunks of {chunk_bytes / 1e6:.2f} MB; "
            f"at least 2 are needed: give it {gigabytes(2 * chunk_bytes)} GB or more"
        )
    tiers = [TierConfig("gpu", gpu_slots)]
    if cpu_slots:
        tiers.append(TierConfig("cpu", cpu_slots))
    holds = slots_for_bytes(int(gpu_cache_gb * GB), chunk_bytes) * options.chunk_tokens
    longest = min(shape.max_positions, holds)
    limit = ContextLimit(
        options.max_context or longest,
        shape.max_positions,
        holds // options.chunk_tokens,
        options.chunk_tokens,
        chunk_bytes,
        is_told=options.max_context is not None,
    )
    if limit.tokens > longest:
        what = (
            "the model was built for"
            if shape.max_positions <= holds
            else f"the first tier holds: {limit.way_out(limit.tokens)}"
        )
        raise ConfigError(f"--max-context {options.max_context} is more than the {longest} tokens {what}")
    return Sizes(chunk_bytes, tuple(tiers), limit)


def _sizes_of(options: Options, loaded: LoadedModel, retain: bool) -> Sizes:
    """Tier sizes; the stateless baseline gets both tiers' bytes as one if both are RAM."""
    return size_tiers(
        settled(options, loaded),
        loaded.shape,
        loaded.gpu_cache_gb,
        total_as_one=not retain and not options.is_on_gpu,
    )


def start(
    options: Options,
    loaded: LoadedModel,
    *,
    store: ConversationStore | None,
    retain: bool = True,
) -> Runtime:
    """Wire everything up and start the engine's thread. `retain=False` is the stateless baseline."""
    from pensieve.service import ConversationService

    limit = _sizes_of(options, loaded, retain).limit
    service = ConversationService(
        loaded.text, store, max_context=limit.tokens, overflow=options.overflow, limit=limit
    )
    try:
        started = start_engine(options, loaded, emit=service.handle, retain=retain)
    except BaseException:
        service.close()
        raise
    service.connect(started.engine.post)
    return Runtime(started.engine, service, started.sizes, started.cost_source)


def start_engine(
    options: Options,
    loaded: LoadedModel,
    *,
    emit: Callable[[list[Event]], None],
    retain: bool = True,
    max_failed_steps: int | None = None,
) -> StartedEngine:
    """Make an engine and start its thread. Arguments as for `make_engine`."""
    made = make_engine(options, loaded, emit=emit, retain=retain, max_failed_steps=max_failed_steps)
    made.engine.start()
    return made


def make_engine(
    options: Options,
    loaded: LoadedModel,
    *,
    emit: Callable[[list[Event]], None],
    retain: bool = True,
    clock: Callable[[], float] = time.monotonic,
    max_failed_steps: int | None = None,
) -> StartedEngine:
    """Make an engine whose thread is not started, so that the caller can step it by hand.

    Args:
        options, loaded: what to serve.
        emit: called with the engine's events.
        retain: False for the stateless baseline.
        clock: seconds.
        max_failed_steps: failed steps in a row after which the engine ends; None for no limit.
    """
    sizes = _sizes_of(options, loaded, retain)
    cost, cost_source, copy_bytes_per_s = cost_profile(options, loaded)
    worker = _make_worker(options, loaded, sizes)
    assert worker.chunk_bytes == sizes.chunk_bytes, (
        f"a chunk has {worker.chunk_bytes} bytes, {sizes.chunk_bytes} were reckoned"
    )
    cache = TieredCache(
        CacheConfig(sizes.tiers, options.chunk_tokens), POLICIES[options.policy](cost.of_chunk)
    )
    config = SchedulerConfig(
        max_batch_tokens=options.batch_tokens,
        max_running=options.max_running,
        retain=retain,
        admission=options.admission,
        step_s=options.step_s if options.admission == "work" else None,
    )
    pace = Pace(cost, measured=copy_bytes_per_s is not None)
    if (
        loaded.model.device.type == "cpu"
    ):  # all tiers in RAM: a chunk is copied in a fraction of a millisecond, nothing need be ready early
        config = replace(config, copies_first=True, copy_ahead_share=0.0)
    scheduler = Scheduler(
        config, cache, sizes.max_context, loaded.shape.vocab_size, pace=pace, limit=sizes.limit
    )
    quote = None if copy_bytes_per_s is None else ResumeQuote(cost, sizes.chunk_bytes, copy_bytes_per_s)
    engine = Engine(
        scheduler,
        worker,
        chunk_bytes=sizes.chunk_bytes,
        emit=emit,
        clock=clock,
        debug=options.debug,
        quote=quote,
        ahead=options.is_on_gpu and loaded.group is None,
        max_failed_steps=max_failed_steps,
    )
    return StartedEngine(engine, sizes, cost_source, worker.attention, loaded.model.forward_name)


def _make_worker(options: Options, loaded: LoadedModel, sizes: Sizes) -> ModelWorker | ParallelWorker:
    if loaded.group is None:
        from pensieve.worker.worker import ModelWorker

        return ModelWorker(
            loaded.model,
            sizes.tiers,
            options.chunk_tokens,
            attention=options.attention,
            verify=options.verify_transfers,
            graph_rows=options.graph_rows,
        )
    from pensieve.worker.parallel import ParallelWorker

    return ParallelWorker(
        loaded.group,
        loaded.model,
        sizes.tiers,
        options.chunk_tokens,
        attention=options.attention,
        verify=options.verify_transfers,
        debug=options.debug,
    )


def cost_profile(options: Options, loaded: LoadedModel) -> tuple[CostProfile, str, float | None]:
    """Cost(l), where it came from, and the measured copy speed into the first tier in bytes a second.

    Measured on this machine by `pensieve profile`, or else estimated from the model's shape (speed: None).
    """
    from pensieve.runtime import profiling

    measured = (
        None if loaded.group is not None else profiling.find(loaded.model, options.chunk_tokens)
    )  # (measured in one process)
    if measured is not None:
        cost = CostProfile(measured.points, options.chunk_tokens)
        return cost, "measurement (pensieve profile)", measured.copy_bytes_per_s.get("cpu->gpu")
    return (
        CostProfile.from_shape(loaded.shape, options.chunk_tokens),
        "arithmetic (`pensieve profile` measures it)",
        None,
    )
