"""The composition root: finds a model, sizes the tiers, and wires worker, scheduler, engine, text and store into one runtime.

The engine runs on a thread of this process (`start`: a chat in a terminal) or in a process of its own (`start_apart`: a server).
What either needs is imported when it is needed: an engine's process has no text, the process in front of it no torch.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pensieve.config import (
    CPU_STEP_MS,
    CUDA_STEP_MS,
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
from pensieve.engine import Engine
from pensieve.errors import ConfigError, ModelRefused
from pensieve.messages import Event
from pensieve.worker.place import Place

if TYPE_CHECKING:
    from pensieve.engine_process import EngineInfo, EngineProcess, State
    from pensieve.engine_vitals import Patience
    from pensieve.service import ConversationService
    from pensieve.store.base import ConversationStore
    from pensieve.text import ChatText
    from pensieve.text.workers import TextWorkers
    from pensieve.worker.group import Group
    from pensieve.worker.model import CausalModel, Forward
    from pensieve.worker.parallel import ParallelWorker
    from pensieve.worker.weights import ResolvedModel
    from pensieve.worker.worker import ModelWorker

GB = 1_000_000_000
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CPU_CACHE_GB = 1.0  # of the first tier on a CPU that does not say how much memory is free, and of one that is simulated
HOST_CACHE_GB = 2.0  # of the second tier beside a GPU, unless told otherwise; on a CPU both would be the same memory
MOST_GRAPH_ROWS = 256  # larger batches compute for so long that their launches do not show
CPU_BATCH_TOKENS, CUDA_BATCH_TOKENS = 512, 4096  # one step's budget: a CPU computes some thousand tokens a second, a GPU some ten thousand

log = logging.getLogger(__name__)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may choose when an engine is started."""

    model: str = "smollm2"
    weights: Literal["auto", "random"] = "auto"
    dtype: str = "auto"  # of `DTYPE_BYTES`, or auto: what this CPU multiplies fast, as measured; bfloat16 on a GPU
    device: str = "cpu"
    gpu_cache_gb: float | None = (
        None  # None: on a CPU a share of the free memory, on a GPU what is left beside the weights and the largest step
    )
    cpu_cache_gb: float | None = None  # None: on a CPU none, on a GPU `HOST_CACHE_GB`
    max_context: int | None = None
    overflow: Literal["refuse", "truncate"] = "refuse"
    policy: str = "retention"
    chunk_tokens: int = 32
    max_batch_tokens: int | None = None
    step_ms: float | None = None  # None: `CPU_STEP_MS`, on a GPU `CUDA_STEP_MS`
    admission: Literal["work", "fcfs"] = "work"
    max_running: int = 64
    threads: int | None = None
    forward: Literal["auto", "fused", "modules"] = "auto"
    quantize: Literal["none", "int8"] = "none"
    attention: str = "auto"
    chat_template: str | None = None  # a file, in place of the model's own
    verify_transfers: bool = False
    graphs: bool = True
    debug: bool = False

    @property
    def is_on_gpu(self) -> bool:
        """The model computes on a CUDA device."""
        return self.device.startswith("cuda")

    @property
    def second_tier_gb(self) -> float:
        """The second tier's budget."""
        if self.cpu_cache_gb is not None:
            return self.cpu_cache_gb
        return HOST_CACHE_GB if self.is_on_gpu else 0.0

    @property
    def batch_tokens(self) -> int:
        """One step's token budget."""
        return self.max_batch_tokens or (CUDA_BATCH_TOKENS if self.is_on_gpu else CPU_BATCH_TOKENS)

    @property
    def step_s(self) -> float:
        """What a step may take while a request decodes."""
        default = CUDA_STEP_MS if self.is_on_gpu else CPU_STEP_MS
        return (default if self.step_ms is None else self.step_ms) / 1e3

    @property
    def graph_rows(self) -> int:
        """Batches of so many decodes are captured as graphs."""
        return min(self.max_running, MOST_GRAPH_ROWS) if self.is_on_gpu and self.graphs else 0

    def __post_init__(self) -> None:
        if self.dtype != "auto" and self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"--dtype must be auto or one of {', '.join(DTYPE_BYTES)}, got {self.dtype!r}")
        for name in ("gpu_cache_gb", "cpu_cache_gb"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ConfigError(f"--{name.replace('_gb', '').replace('_', '-')} must be at least 0 GB, got {getattr(self, name)}")
        if self.step_ms is not None and not self.step_ms > 0:
            raise ConfigError(f"--step-ms must be positive, got {self.step_ms:g}")
        if self.device != "cpu" and not self.is_on_gpu:
            raise ConfigError(f"--device must be cpu or cuda (or one of several: cuda:0, cuda:1, ...), got {self.device!r}")
        if self.max_context is not None and self.max_context < 2:
            raise ConfigError(f"--max-context must be at least 2 tokens, got {self.max_context}")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory, ready for any number of runtimes one after the other."""

    resolved: ResolvedModel
    model: CausalModel
    shape: ModelShape  # with the key/value heads that this process caches
    text: ChatText | None  # None: no tokenizer can be had (token ids are drawn then), or it was not asked for
    gpu_cache_gb: float  # of the first tier, as told or as found
    group: Group | None = None  # the processes it is split over; None: it is here as a whole
    remarks: tuple[str, ...] = ()  # what was found where nothing was told, for people

    @property
    def dtype(self) -> str:
        """What it computes in."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def instructions(self) -> str:
        """What our kernels compute with, for people; empty where they do not compute."""
        from pensieve.worker import kernel

        return f"{kernel.name()} kernels" if self.model.device.type == "cpu" else ""

    @property
    def talks(self) -> bool:
        """Its answers mean something."""
        return self.resolved.tokenizer_dir is not None and self.resolved.weights == "real"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the tiers came out."""

    chunk_bytes: int
    tiers: tuple[TierConfig, ...]
    limit: ContextLimit

    @property
    def max_context(self) -> int:
        """Tokens of the longest sequence."""
        return self.limit.tokens

    def as_json(self) -> dict[str, Any]:
        """For a report."""
        return {"chunk_bytes": self.chunk_bytes, "max_context": self.max_context, "slots": {t.name: t.num_slots for t in self.tiers}}


@dataclass(frozen=True, slots=True)
class StartedEngine:
    """An engine, and how it came out."""

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


@dataclass(slots=True)
class ApartRuntime:
    """An engine in a process of its own, and its service here."""

    process: EngineProcess
    service: ConversationService
    info: EngineInfo  # of the first start
    text: ChatText | None  # None: the model does not talk
    workers: TextWorkers | None  # that render and tokenize; None: the service does it itself

    def close(self, timeout_s: float = 30.0) -> None:
        """Stop the engine after the step under way, then the service and who makes its prompts."""
        self.process.close(timeout_s)
        if self.workers is not None:
            self.workers.close()
        self.service.close()


def load_model(options: Options, *, must_talk: bool, say: Say, with_text: bool = True) -> LoadedModel:
    """Find and load a model, and prove that it can be served right (the load-time gate).

    Args:
        options: which model, and how.
        must_talk: random weights will not do.
        say: told what takes time.
        with_text: load its tokenizer, too.

    Raises:
        ModelUnavailable, ModelRefused, ConfigError: see `worker.weights` and `worker.model`.
    """
    place = Place.from_environment()
    if place is not None and place.rank > 0:
        from pensieve.cli.follower import follow_rank_zero

        follow_rank_zero(options, place)  # does not return: the command is rank 0's alone
    return load_here(options, place, must_talk=must_talk, say=say, with_text=with_text)


def load_here(options: Options, place: Place | None, *, must_talk: bool, say: Say, with_text: bool) -> LoadedModel:
    """`load_model` on each rank: with a place among several processes, all do it together and each gets its share."""
    import torch

    from pensieve.worker import kernel, number_type
    from pensieve.worker.model import shape_of
    from pensieve.worker.weights import resolve

    kernel.levels()  # what PENSIEVE_ISA says is checked before anything is fetched
    template = read_chat_template(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.is_on_gpu and not torch.cuda.is_available():
        raise ConfigError(f"--device {options.device}: this machine (or this PyTorch) has no CUDA device; use --device cpu")

    def progress(what: str, share: float | None) -> None:
        say(what if share is None else f"{what} {share:4.0%}")

    group: Group | None = None
    if place is not None:
        from pensieve.worker.group import Group

        say(f"waiting for the other {place.size - 1} of {place.size} processes")
        group = Group.join(place, options.device)
    int8 = options.quantize == "int8"
    number = number_type.choose(options.dtype, options.device, int8=int8, group=group)
    if number.reason:
        say(number.reason)

    def find() -> ResolvedModel:
        with _refusing(options.model):
            return resolve(
                options.model, options.weights, dtype=number.name, device=options.device, allow_random=not must_talk, progress=progress
            )

    def text_of(resolved: ResolvedModel) -> ChatText | None:
        """Before any weights are loaded: a model that must talk and cannot is refused at once.

        Not where another process has the text: a template that never ends must not hold up an engine, which has no limit of time for it.
        """
        return load_text(resolved.tokenizer_dir, resolved.weights, template) if with_text else None

    if group is None:
        resolved = find()
        text = text_of(resolved)
        say(f"loading {resolved.label}")
        model = _causal_model(resolved, number.name, options, say)
    else:
        from pensieve.worker.sharding import load_together

        resolved, model = load_together(group, find, number.name, options.forward, int8=int8, say=say)
        text = text_of(resolved)
    shape = replace(shape_of(resolved.config), num_kv_heads=model.geometry.num_kv_heads)
    first_tier_gb, remark = _first_tier_gb(options, shape, model, group)
    if remark:
        say(remark)
    remarks = tuple(filter(None, (number.reason, remark)))
    return LoadedModel(resolved, model, shape, text if with_text else None, first_tier_gb, group, remarks)


def _first_tier_gb(options: Options, shape: ModelShape, model: CausalModel, group: Group | None) -> tuple[float, str]:
    """As told; else a share of the free memory, or on a GPU what is left there. And what to say of it."""
    if options.gpu_cache_gb is not None:
        return options.gpu_cache_gb, ""
    from pensieve.worker.memory import find_room, host_share

    if not options.is_on_gpu:
        context = min(shape.max_positions, options.max_context or shape.max_positions)
        most = options.max_running * (context + options.chunk_tokens) * shape.kv_bytes_per_token(model.dtype.itemsize)
        share = host_share(most, int(options.second_tier_gb * GB), int(CPU_CACHE_GB * GB), sharers=1 if group is None else group.local_size)
        if group is not None:  # every rank has the same slots
            share = min(group.exchange(share), key=lambda each: each.tier)
        if share.tier < (least := 2 * options.chunk_tokens * shape.kv_bytes_per_token(model.dtype.itemsize)):
            raise ConfigError(
                f"hardly any memory is left for the cache ({share}): end other programs, take a smaller model, "
                f"or give it what there is, at least --gpu-cache {gigabytes(least)}"
            )
        return share.tier / GB, f"first tier: {share}"
    room = find_room(
        model, max_batch_tokens=options.batch_tokens, max_running=options.max_running, chunk_tokens=options.chunk_tokens,
        graph_rows=options.graph_rows, attention=options.attention,
    )  # fmt: skip
    return room.tier / GB, str(room)


def _causal_model(resolved: ResolvedModel, dtype: str, options: Options, say: Say) -> CausalModel:
    """Weights in memory once, through the gate; by the model's own modules where fused operations turn out wrong."""
    from pensieve.worker.model import CausalModel, FusedDiffers
    from pensieve.worker.weights import load

    def make(forward: Forward) -> CausalModel:
        with _refusing(resolved.label):
            model = load(resolved, dtype, options.device)
            return CausalModel(model, resolved.label, forward=forward, int8=options.quantize == "int8", keep_modules=False)

    try:
        return make(options.forward)
    except FusedDiffers as error:
        if options.forward == "fused" or options.quantize != "none":
            raise
        say(f"computing {resolved.label} by its own modules: {error.message}")
        return make("modules")


@contextmanager
def _refusing(label: str) -> Iterator[None]:
    """What a library raises over numbers and names in a model's files that do not go together: another start would fail the same way.

    Raises:
        ModelRefused: naming it.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        log.debug("%s cannot be loaded", label, exc_info=True)
        reason = " ".join(str(error).split())[:300]
        raise ModelRefused(
            f"{label} cannot be loaded ({type(error).__name__}: {reason}): its config.json does not describe a model that can be built"
        ) from error


def read_chat_template(options: Options) -> str | None:
    """What `--chat-template` names, tried out; None: the model's own.

    Raises:
        ConfigError: it cannot be read, or does not write chats; the message names file and line.
    """
    if options.chat_template is None:
        return None
    from pensieve.text import read_template

    return read_template(Path(options.chat_template))


def load_text(tokenizer_dir: Path | None, weights: Literal["real", "random"], template: str | None = None) -> ChatText | None:
    """The tokenizer of a model that talks, with a chat template in place of its own if one is given; None for one that does not talk.

    Raises:
        ModelUnavailable: its tokenizer cannot be read.
    """
    if tokenizer_dir is None or weights == "random":
        return None
    from pensieve.text import ChatText

    return ChatText.load(tokenizer_dir, template=template)


def notes_of(*notes: str | None) -> list[str]:
    """What a user should know about a model at every start, each once."""
    return list(dict.fromkeys(note for note in notes if note))


def settled(options: Options, loaded: LoadedModel) -> Options:
    """The options with what loading found in place of what they left open."""
    return replace(options, dtype=loaded.dtype, gpu_cache_gb=loaded.gpu_cache_gb, cpu_cache_gb=options.second_tier_gb)


def size_tiers(options: Options, shape: ModelShape, gpu_cache_gb: float, *, total_as_one: bool = False) -> Sizes:
    """Slots of each tier, and the context that fits.

    Args:
        options: the second tier's budget, dtype (settled), context.
        shape: what a chunk's size follows from.
        gpu_cache_gb: the first tier's budget.
        total_as_one: the first tier gets the bytes of both, the second none (the stateless baseline, which has no use for a second).

    Raises:
        ConfigError: the first tier cannot hold two chunks, or --max-context is more than model or first tier can hold.
    """
    chunk_bytes = shape.kv_bytes_per_token(DTYPE_BYTES[options.dtype]) * options.chunk_tokens
    gpu_bytes, cpu_bytes = int(gpu_cache_gb * GB), int(options.second_tier_gb * GB)
    if total_as_one:
        gpu_bytes, cpu_bytes = gpu_bytes + cpu_bytes, 0
    gpu_slots, cpu_slots = slots_for_bytes(gpu_bytes, chunk_bytes), slots_for_bytes(cpu_bytes, chunk_bytes)
    if gpu_slots < 2:
        raise ConfigError(
            f"--gpu-cache {gpu_cache_gb:g} holds {gpu_slots} chunks of {chunk_bytes / 1e6:.2f} MB; at least 2 are needed: "
            f"give it {gigabytes(2 * chunk_bytes)} GB or more"
        )
    tiers = [TierConfig("gpu", gpu_slots)]
    if cpu_slots:
        tiers.append(TierConfig("cpu", cpu_slots))
    holds = slots_for_bytes(int(gpu_cache_gb * GB), chunk_bytes) * options.chunk_tokens
    longest = min(shape.max_positions, holds)
    limit = ContextLimit(
        options.max_context or longest, shape.max_positions, holds // options.chunk_tokens, options.chunk_tokens, chunk_bytes,
        is_told=options.max_context is not None,
    )  # fmt: skip
    if limit.tokens > longest:
        what = "the model was built for" if shape.max_positions <= holds else f"the first tier holds: {limit.way_out(limit.tokens)}"
        raise ConfigError(f"--max-context {options.max_context} is more than the {longest} tokens {what}")
    return Sizes(chunk_bytes, tuple(tiers), limit)


def _sizes_of(options: Options, loaded: LoadedModel, retain: bool) -> Sizes:
    """The stateless baseline gets both tiers' bytes as one where both are RAM: it has no use for a second."""
    return size_tiers(settled(options, loaded), loaded.shape, loaded.gpu_cache_gb, total_as_one=not retain and not options.is_on_gpu)


def start(
    options: Options,
    loaded: LoadedModel,
    *,
    store: ConversationStore | None,
    retain: bool = True,
    say: Say = lambda message: None,
) -> Runtime:
    """Wire everything up and start the engine's thread. `retain=False` is the stateless baseline."""
    from pensieve.service import ConversationService

    limit = _sizes_of(options, loaded, retain).limit
    service = ConversationService(loaded.text, store, max_context=limit.tokens, overflow=options.overflow, limit=limit)
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
    """The engine alone, its thread running; `emit` gets its events. It ends by itself after `max_failed_steps`, see `Engine`."""
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
    """The engine alone, for whoever steps it by hand or starts its thread; `emit` gets its events."""
    sizes = _sizes_of(options, loaded, retain)
    cost, cost_source, copy_bytes_per_s = cost_profile(options, loaded)
    worker = _make_worker(options, loaded, sizes)
    assert worker.chunk_bytes == sizes.chunk_bytes, f"a chunk has {worker.chunk_bytes} bytes, {sizes.chunk_bytes} were reckoned"
    cache = TieredCache(CacheConfig(sizes.tiers, options.chunk_tokens), POLICIES[options.policy](cost.of_chunk))
    config = SchedulerConfig(
        max_batch_tokens=options.batch_tokens, max_running=options.max_running, retain=retain, admission=options.admission,
        step_s=options.step_s if options.admission == "work" else None,
    )  # fmt: skip
    pace = Pace(cost, measured=copy_bytes_per_s is not None)
    if loaded.model.device.type == "cpu":  # all tiers in RAM: a chunk is copied in a fraction of a millisecond, nothing need be ready early
        config = replace(config, copies_first=True, copy_ahead_share=0.0)
    scheduler = Scheduler(config, cache, sizes.max_context, loaded.shape.vocab_size, pace=pace, limit=sizes.limit)
    quote = None if copy_bytes_per_s is None else ResumeQuote(cost, sizes.chunk_bytes, copy_bytes_per_s)
    engine = Engine(
        scheduler, worker, chunk_bytes=sizes.chunk_bytes, emit=emit, clock=clock, debug=options.debug, quote=quote,
        ahead=options.is_on_gpu and loaded.group is None, max_failed_steps=max_failed_steps,
    )  # fmt: skip
    return StartedEngine(engine, sizes, cost_source, worker.attention, loaded.model.forward_name)


def bare_engine(scheduler: Scheduler, worker: ModelWorker, clock: Callable[[], float]) -> Callable[[], bool]:
    """One step of an engine that nobody listens to, for `worker.profile`."""
    return Engine(scheduler, worker, chunk_bytes=worker.chunk_bytes, emit=lambda events: None, clock=clock).step


def _make_worker(options: Options, loaded: LoadedModel, sizes: Sizes) -> ModelWorker | ParallelWorker:
    if loaded.group is None:
        from pensieve.worker.worker import ModelWorker

        return ModelWorker(
            loaded.model, sizes.tiers, options.chunk_tokens, attention=options.attention, verify=options.verify_transfers,
            graph_rows=options.graph_rows,
        )  # fmt: skip
    from pensieve.worker.parallel import ParallelWorker

    return ParallelWorker(
        loaded.group, loaded.model, sizes.tiers, options.chunk_tokens, attention=options.attention, verify=options.verify_transfers,
        debug=options.debug,
    )  # fmt: skip


def start_apart(
    options: Options,
    *,
    store: ConversationStore | None,
    ephemeral: ConversationStore | None = None,
    drafts: str | None = None,
    must_talk: bool = True,
    retain: bool = True,
    on_state: Callable[[State], None] | None = None,
    patience: Patience | None = None,
    prompt_timeout_s: float | None = None,
) -> ApartRuntime:
    """Start an engine in a process of its own and wait until it is ready; tokenizer and service are here.

    With `prompt_timeout_s`, processor time a prompt, prompts are made in processes of their own (`text.workers`); None: by the service itself.
    `store`, `ephemeral` and `drafts` are the service's, see `ConversationService`; `on_state` and `patience` are of `EngineProcess`.

    Raises:
        ModelUnavailable, ModelRefused, ConfigError: as `load_model` and `size_tiers`, from the engine's process.
    """
    from pensieve.cli import engine_main, text_main
    from pensieve.engine_process import EngineProcess
    from pensieve.engine_vitals import Patience
    from pensieve.service import ConversationService
    from pensieve.text.nursery import LOAD_BYTES, new_nursery
    from pensieve.text.worker_process import memory_limited
    from pensieve.text.workers import TextWorkers, memory_for

    template = read_chat_template(options)  # before an engine is started
    nursery = None if prompt_timeout_s is None else new_nursery(text_main.prepare)  # (imports while the engine loads)
    workers: TextWorkers | None = None
    late: list[ConversationService] = []  # the engine speaks only when spoken to, and by then its service is there
    process = EngineProcess(
        engine_main.run,
        (options, must_talk, retain),
        emit=lambda events: late[0].handle(events),
        on_state=on_state,
        restart=Place.from_environment() is None,  # the other ranks of one that died cannot be joined again
        patience=patience or Patience(),
    )
    try:
        import_tokenizers()  # while the engine loads
        info = process.ready()
        process.restart_with(as_started(options, info, retain), must_talk, retain)
        folder = None if info.tokenizer_dir is None or info.weights == "random" else Path(info.tokenizer_dir)
        if nursery is not None and folder is not None:
            nursery.load(text_main.Loading(folder, template, info.max_context))  # first: what hangs or fails there is not tried here
        with memory_limited(LOAD_BYTES) if nursery is not None else nullcontext():
            text = load_text(folder, info.weights, template)
            if text is not None:
                text.settle()
        if nursery is not None and text is not None and folder is not None:
            assert prompt_timeout_s is not None
            loading = text_main.Loading(folder, template, info.max_context)
            memory_bytes = memory_for(text.most_chars(2 * info.max_context))  # (/tokenize counts two contexts)
            workers = TextWorkers(text_main.Nurseries(loading, nursery), job_s=prompt_timeout_s, memory_bytes=memory_bytes)
        elif nursery is not None:
            nursery.close()
    except BaseException:
        process.close(0.0)
        if nursery is not None:
            nursery.close()
        raise
    service = ConversationService(
        text, store, max_context=info.max_context, overflow=options.overflow, ephemeral=ephemeral, drafts=drafts, limit=info.limit,
        runner=workers,
    )  # fmt: skip
    late.append(service)
    service.connect(process.post)
    return ApartRuntime(process, service, info, text, workers)


def as_started(options: Options, info: EngineInfo, retain: bool) -> Options:
    """Options with which an engine comes out as the one of `info`: what it measured, of this CPU and of memory, might come out otherwise later."""
    options = replace(options, dtype=info.dtype)
    if options.gpu_cache_gb is None:
        most = (info.tiers[0].num_slots + 1) * info.chunk_bytes - 1  # the most bytes that are so many chunks
        if not retain and not options.is_on_gpu:  # the one tier has the second's bytes, too
            most -= int(options.second_tier_gb * GB)
            options = replace(options, max_context=info.max_context)
        options = replace(options, gpu_cache_gb=most / GB)
    return options


def do_without_torch() -> None:
    """Make this process one that never imports torch, once and for all: transformers then loads tokenizers without it.

    For the process in front of an engine that has its own: torch would take 2 s of its start and 260 MB. Does nothing where torch is already.
    """
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]  # Python's own way to say that there is no such module
        before = os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS")
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # it would advise that models are not available
        try:
            import transformers  # noqa: F401
        finally:
            del os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"]
            if before is not None:
                os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = before


def import_tokenizers() -> None:
    """Import what loading a tokenizer takes: about a second that can pass while an engine loads."""
    import transformers

    _ = transformers.AutoTokenizer


def cost_profile(options: Options, loaded: LoadedModel) -> tuple[CostProfile, str, float | None]:
    """Cost(l) as measured on this machine by `pensieve profile`, or else from arithmetic; which of the two; and, measured, bytes a second upwards."""
    from pensieve.worker import profile

    measured = None if loaded.group is not None else profile.find(loaded.model, options.chunk_tokens)  # (measured in one process)
    if measured is not None:
        cost = CostProfile(measured.points, options.chunk_tokens)
        return cost, "measurement (pensieve profile)", measured.copy_bytes_per_s.get("cpu->gpu")
    return CostProfile.from_shape(loaded.shape, options.chunk_tokens), "arithmetic (`pensieve profile` measures it)", None


def as_json(options: Options) -> dict[str, Any]:
    """The options as plain data, for a report."""
    return dict(json.loads(json.dumps({name: getattr(options, name) for name in Options.__slots__})))
