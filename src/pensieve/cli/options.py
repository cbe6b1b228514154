"""Options that several commands share. Knows click; never models or engines."""

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
        help="auto: real weights if they are found, else random weights of that shape.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", *sorted(DTYPE_BYTES)]),
        default=_DEFAULTS.dtype,
        show_default=True,
        help="Number type. auto: bfloat16 on a GPU and where this CPU multiplies it fast (measured), else "
        "float32.",
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
        help="What computes the model: fused operations (the Llama family on a CPU) or transformers' "
        "modules. auto: fused where possible.",
    ),
    click.option(
        "--quantize",
        type=click.Choice(["none", "int8"]),
        default=_DEFAULTS.quantize,
        show_default=True,
        help="int8: weights of 8 bits, fused forward only. Faster for few users at once; answers differ "
        "slightly.",
    ),
)
_CACHE = (
    click.option(
        "--gpu-cache",
        "gpu_cache_gb",
        type=float,
        default=None,
        help="First tier, GB; under torchrun of each process (default on a CPU: half of the free memory, at "
        f"most what {_DEFAULTS.max_running} contexts take; on a GPU: what the weights and the largest step "
        "leave).",
    ),
    click.option(
        "--cpu-cache",
        "cpu_cache_gb",
        type=float,
        default=None,
        help=f"Second tier, GB; under torchrun of each process (default: {HOST_CACHE_GB:g} beside a GPU; "
        "none on a CPU, where both would be the same memory and a request has to fit in the first).",
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
        help="Eviction policy. retention: evicts the least recompute cost / idle time; lru: the longest "
        "idle; sharers: retention, weighed by how many conversations share a chunk; hazard: retention with a "
        "learned rate of return in place of 1 / idle time.",
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
        help="Milliseconds of a step while a request decodes; prefills beside it are cut to fit (default: "
        f"{CPU_STEP_MS:g} on a CPU, {CUDA_STEP_MS:g} on CUDA). Smaller: steadier answers; larger: long "
        "prompts finish sooner.",
    ),
    click.option(
        "--admission",
        type=click.Choice(["work", "fcfs"]),
        default=_DEFAULTS.admission,
        show_default=True,
        help="Which request is admitted next. work: short turns overtake long prompts a bounded number of "
        "times, and tenants take turns; fcfs: first come, first served, in steps bounded by tokens alone, as "
        "in the paper.",
    ),
    click.option(
        "--attention",
        default=_DEFAULTS.attention,
        show_default=True,
        help="Attention backend: native (CPU), triton (GPU), flashinfer (GPU, if installed), cpu, reference; "
        "auto: the fastest that runs here.",
    ),
    click.option(
        "--verify-transfers",
        is_flag=True,
        help="Compare checksums of chunks swapped in from a lower tier; recompute those that differ.",
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
    """--chat-template, for commands that answer text."""
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
