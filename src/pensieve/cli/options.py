"""Options that several commands share, once. Knows click; never models or engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from pensieve.config import CPU_STEP_MS, CUDA_STEP_MS
from pensieve.core.eviction import POLICIES
from pensieve.runtime.options import DTYPE_BYTES, HOST_CACHE_GB, Options

F = TypeVar("F", bound=Callable[..., Any])

_DEFAULTS = Options()

_MODEL = (
    click.option(
        "--model",
        default=_DEFAULTS.model,
        show_default=True,
        help="smollm2, a hub id, a folder, a .gguf file or a named architecture.",
    ),
    click.option(
        "--weights",
        type=click.Choice(["auto", "random"]),
        default="auto",
        show_default=True,
        help="auto: real weights where they can be had, else random ones of that shape; random: random ones.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", *sorted(DTYPE_BYTES)]),
        default=_DEFAULTS.dtype,
        show_default=True,
        help="Number type. auto: bfloat16 where this CPU multiplies it fast (measured at the start) and on a GPU, else float32.",
    ),
    click.option("--device", default=_DEFAULTS.device, show_default=True, help="cpu or cuda."),
    click.option(
        "--threads",
        type=click.IntRange(min=1),
        default=None,
        help="CPU threads of the model (default: PyTorch's choice).",
    ),
    click.option(
        "--forward",
        type=click.Choice(["auto", "fused", "modules"]),
        default=_DEFAULTS.forward,
        show_default=True,
        help="What computes the model: fused operations (the Llama family on a CPU) or transformers' modules; auto: the first that can.",
    ),
    click.option(
        "--quantize",
        type=click.Choice(["none", "int8"]),
        default=_DEFAULTS.quantize,
        show_default=True,
        help="int8: weights of 8 bits, fused forward only: faster for few users at once, slightly other answers.",
    ),
)
_CACHE = (
    click.option(
        "--gpu-cache",
        "gpu_cache_gb",
        type=float,
        default=None,
        help="First tier, GB; under torchrun of each process (default: on a CPU half of the free memory, never more than "
        f"{_DEFAULTS.max_running} contexts take; on a GPU what is left beside the weights and the largest step).",
    ),
    click.option(
        "--cpu-cache",
        "cpu_cache_gb",
        type=float,
        default=None,
        help=f"Second tier, GB; under torchrun of each process (default: {HOST_CACHE_GB:g} beside a GPU; on a CPU none, since both would "
        "be the same memory and a request has to fit in the first).",
    ),
    click.option(
        "--max-context",
        type=int,
        default=None,
        help="Tokens of prompt and answer (default: what model and first tier hold).",
    ),
    click.option(
        "--overflow",
        type=click.Choice(["refuse", "truncate"]),
        default=_DEFAULTS.overflow,
        show_default=True,
        help="A prompt past the context: refuse it, or leave out the oldest turns.",
    ),
    click.option(
        "--policy",
        type=click.Choice(sorted(POLICIES)),
        default=_DEFAULTS.policy,
        show_default=True,
        help="What is evicted first. retention: least recompute cost / idle time; lru: longest idle; sharers: retention weighed by how many "
        "share a chunk; hazard: retention with a learned rate of return in place of 1 / idle time.",
    ),
    click.option(
        "--max-batch-tokens",
        type=int,
        default=None,
        help="Token budget of a step (default: 512 on a CPU, 4096 on CUDA).",
    ),
    click.option(
        "--step-ms",
        type=float,
        default=None,
        help=f"What a step may take while an answer is being made: what others compute beside it is cut accordingly (default: {CPU_STEP_MS:g} on a "
        f"CPU, {CUDA_STEP_MS:g} on CUDA). Less: steadier answers; more: long prompts are done sooner.",
    ),
    click.option(
        "--admission",
        type=click.Choice(["work", "fcfs"]),
        default=_DEFAULTS.admission,
        show_default=True,
        help="Who is admitted next. work: short turns pass long prompts, a bounded number of times, and tenants take turns; fcfs: first come, "
        "first served, in steps bounded by tokens alone, as in the paper.",
    ),
    click.option(
        "--attention",
        default=_DEFAULTS.attention,
        show_default=True,
        help="What computes attention: native (CPU), triton (GPU), flashinfer (GPU, where installed), cpu, reference; auto: the fastest that can.",
    ),
    click.option(
        "--verify-transfers",
        is_flag=True,
        help="Compare checksums of chunks that come back from a lower tier; what differs is computed again.",
    ),
    click.option(
        "--graphs/--no-graphs",
        default=_DEFAULTS.graphs,
        show_default=True,
        help="On a GPU, decode by captured CUDA graphs.",
    ),
    click.option("--debug", is_flag=True, help="Verify every cache invariant after every step (slow)."),
)


_TEMPLATE = (
    click.option(
        "--chat-template",
        "chat_template",
        default=None,
        help="A file with a Jinja chat template in place of the model's own.  [default: the model's]",
    ),
)


def template_options(function: F) -> F:
    """--chat-template, for commands that talk."""
    return _apply(_TEMPLATE, function)


def model_options(function: F) -> F:
    """--model, --weights, --dtype, --device, --threads, --forward, --quantize."""
    return _apply(_MODEL, function)


def cache_options(function: F) -> F:
    """Tier budgets, context, overflow, policy, attention, transfers, graphs."""
    return _apply(_CACHE, function)


def pick(arguments: dict[str, Any]) -> Options:
    """Take the shared options out of a command's arguments."""
    return Options(**{name: arguments.pop(name) for name in list(arguments) if name in Options.__slots__})


def _apply(options: tuple[Callable[[F], F], ...], function: F) -> F:
    for option in reversed(options):
        function = option(function)
    return function
