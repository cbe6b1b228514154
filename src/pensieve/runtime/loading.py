"""Loads a model, or its share of one among several processes, and its tokenizer.

Knows files, memory and the load-time gate; never engines.

torch is imported when weights are loaded: a server's front process takes the tokenizer alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pensieve.config import ModelShape, gigabytes
from pensieve.errors import ConfigError, ModelRefused
from pensieve.runtime.options import CPU_CACHE_GB, GB, Options, Say
from pensieve.worker.rank import Rank

if TYPE_CHECKING:
    from pensieve.text import ChatText
    from pensieve.worker.group import Group
    from pensieve.worker.model import CausalModel, Forward
    from pensieve.worker.weights import ResolvedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory, ready for any number of runtimes one after the other."""

    resolved: ResolvedModel
    model: CausalModel
    shape: ModelShape  # with the key/value heads that this process caches
    text: ChatText | None  # None if the model has no tokenizer, or it was not asked for
    gpu_cache_gb: float  # of the first tier, as told or as found
    group: Group | None = None  # the processes it is split over; None if this one has it all
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


def load_model(options: Options, *, must_talk: bool, say: Say, with_text: bool = True) -> LoadedModel:
    """Find and load a model, and prove that it can be served right (the load-time gate).

    One process of several (`Rank.from_environment`) loads its share, together with the others.

    Args:
        options: which model, and how.
        must_talk: random weights will not do.
        say: told what takes time.
        with_text: load its tokenizer, too.

    Raises:
        ModelUnavailable, ModelRefused, ConfigError: see `worker.weights` and `worker.model`.
    """
    import torch

    from pensieve.worker import kernel, number_type
    from pensieve.worker.model import shape_of
    from pensieve.worker.weights import resolve

    kernel.levels()  # what PENSIEVE_ISA says is checked before anything is fetched
    template = read_chat_template(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.is_on_gpu and not torch.cuda.is_available():
        raise ConfigError(
            f"--device {options.device}: this machine (or this PyTorch) has no CUDA device; use --device cpu"
        )

    def progress(what: str, share: float | None) -> None:
        say(what if share is None else f"{what} {share:4.0%}")

    group: Group | None = None
    if (rank := Rank.from_environment()) is not None:
        from pensieve.worker.group import Group

        say(f"waiting for the other {rank.size - 1} of {rank.size} processes")
        group = Group.join(rank, options.device)
    int8 = options.quantize == "int8"
    number = number_type.choose(options.dtype, options.device, int8=int8, group=group)
    if number.reason:
        say(number.reason)

    def find() -> ResolvedModel:
        with _refusing(options.model):
            return resolve(
                options.model,
                options.weights,
                dtype=number.name,
                device=options.device,
                allow_random=not must_talk,
                progress=progress,
            )

    def text_of(resolved: ResolvedModel) -> ChatText | None:
        """Called before weights are loaded, to refuse a model without the tokenizer it needs at once.

        Not called in an engine's own process: a chat template that loops would block the engine.
        """
        return load_text(resolved.tokenizer_dir, resolved.weights, template) if with_text else None

    if group is None:
        resolved = find()
        text = text_of(resolved)
        say(f"loading {resolved.label}")
        model = _causal_model(resolved, number.name, options, say)
    else:
        resolved, model = load_together(group, find, number.name, options.forward, int8=int8, say=say)
        text = text_of(resolved)
    shape = replace(shape_of(resolved.config), num_kv_heads=model.geometry.num_kv_heads)
    first_tier_gb, remark = _first_tier_gb(options, shape, model, group)
    if remark:
        say(remark)
    remarks = tuple(filter(None, (number.reason, remark)))
    return LoadedModel(resolved, model, shape, text if with_text else None, first_tier_gb, group, remarks)


def load_together(
    group: Group,
    find: Callable[[], ResolvedModel],
    dtype: str,
    forward: Forward,
    *,
    int8: bool,
    say: Callable[[str], None],
) -> tuple[ResolvedModel, CausalModel]:
    """Find, load and gate a model on all ranks at once; what fails on one fails on all.

    Args:
        group: the ranks.
        find: finds the model; called on rank 0 first, which may download or convert it, then on the others.
        dtype: number type it is loaded in.
        forward: see `gate.admit`; fused operations cannot compute a share.
        int8: see `gate.admit`; neither can weights of 8 bits.
        say: told what takes time.

    Raises:
        ModelUnavailable, ModelRefused, ConfigError: as in one process, or the model cannot be split. The
            message names the rank.
    """
    from pensieve.worker.gate import admit
    from pensieve.worker.weights import load

    found: list[ResolvedModel] = []
    for turn in (group.rank == 0, group.rank > 0):
        with group.agreeing():
            if turn:
                found.append(find())
    resolved = found[0]
    names = group.exchange(
        f"{resolved.label} ({resolved.weights} weights, {resolved.num_parameters} parameters)"
    )
    if len(set(names)) > 1:
        listed = "; ".join(f"rank {rank}: {name}" for rank, name in enumerate(names))
        raise ConfigError(
            f"the processes found different models under one name ({listed}): "
            "give every machine the same files"
        )
    say(f"loading {resolved.label} over {group.size} processes")
    with group.agreeing():
        model = load(resolved, dtype, group=group)
    with group.agreeing():
        causal = admit(model, resolved.label, forward=forward, int8=int8)
    return resolved, causal


def _first_tier_gb(
    options: Options, shape: ModelShape, model: CausalModel, group: Group | None
) -> tuple[float, str]:
    """The first tier's size in GB and a remark for the user.

    The user's size; else a share of the free memory on a CPU, or what is left on a GPU.
    """
    if options.gpu_cache_gb is not None:
        return options.gpu_cache_gb, ""
    from pensieve.worker.memory import device_share, host_share

    if not options.is_on_gpu:
        context = min(shape.max_positions, options.max_context or shape.max_positions)
        most = (
            options.max_running
            * (context + options.chunk_tokens)
            * shape.kv_bytes_per_token(model.dtype.itemsize)
        )
        share = host_share(
            most,
            int(options.second_tier_gb * GB),
            int(CPU_CACHE_GB * GB),
            sharers=1 if group is None else group.local_size,
        )
        if group is not None:  # every rank has the same slots
            share = min(group.exchange(share), key=lambda each: each.tier)
        if share.tier < (least := 2 * options.chunk_tokens * shape.kv_bytes_per_token(model.dtype.itemsize)):
            raise ConfigError(
                f"too little memory is left for the cache ({share}): end programs, take a smaller model, "
                f"or give it what there is, at least --gpu-cache {gigabytes(least)}"
            )
        return share.tier / GB, f"first tier: {share}"
    room = device_share(
        model,
        max_batch_tokens=options.batch_tokens,
        max_running=options.max_running,
        chunk_tokens=options.chunk_tokens,
        graph_rows=options.graph_rows,
        attention=options.attention,
    )
    return room.tier / GB, str(room)


def _causal_model(resolved: ResolvedModel, dtype: str, options: Options, say: Say) -> CausalModel:
    """Load weights and pass the gate; fall back to the model's own modules if fused operations differ."""
    from pensieve.worker.gate import admit
    from pensieve.worker.refusal import FusedDiffers
    from pensieve.worker.weights import load

    def make(forward: Forward) -> CausalModel:
        with _refusing(resolved.label):
            model = load(resolved, dtype, options.device)
            return admit(
                model, resolved.label, forward=forward, int8=options.quantize == "int8", keep_modules=False
            )

    try:
        return make(options.forward)
    except FusedDiffers as error:
        if options.forward == "fused" or options.quantize != "none":
            raise
        say(f"computing {resolved.label} by its own modules: {error.message}")
        return make("modules")


@contextmanager
def _refusing(label: str) -> Iterator[None]:
    """Turn what a library raises over an inconsistent config.json into a refusal: a retry would fail as well.

    Raises:
        ModelRefused: naming it.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        log.debug("%s cannot be loaded", label, exc_info=True)
        reason = " ".join(str(error).split())[:300]
        raise ModelRefused(
            f"{label} cannot be loaded ({type(error).__name__}: {reason}): "
            "its config.json does not describe a model that can be built"
        ) from error


def read_chat_template(options: Options) -> str | None:
    """The chat template that `--chat-template` names, tried out; None to use the model's own.

    Raises:
        ConfigError: it cannot be read, or does not write chats; the message names file and line.
    """
    if options.chat_template is None:
        return None
    from pensieve.text import read_template

    return read_template(Path(options.chat_template))


def load_text(
    tokenizer_dir: Path | None, weights: Literal["real", "random"], template: str | None = None
) -> ChatText | None:
    """A model's tokenizer with its chat template, or with `template`; None without tokenizer or real weights.

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
    return replace(
        options, dtype=loaded.dtype, gpu_cache_gb=loaded.gpu_cache_gb, cpu_cache_gb=options.second_tier_gb
    )
