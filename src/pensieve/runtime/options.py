"""The options of an engine, and their defaults. Knows names, units and limits; never models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pensieve.config import CPU_STEP_MS, CUDA_STEP_MS
from pensieve.errors import ConfigError

GB = 1_000_000_000
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# first tier on a CPU whose free memory is unknown, and of a simulated one
CPU_CACHE_GB = 1.0
# second tier beside a GPU; a CPU has none by default, since both would be the same memory
HOST_CACHE_GB = 2.0
MOST_GRAPH_ROWS = 256  # larger batches compute for so long that their launches do not show
# tokens of one step: a CPU computes some thousand a second, a GPU some ten thousand
CPU_BATCH_TOKENS, CUDA_BATCH_TOKENS = 512, 4096

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """How an engine is started: one field an option of the command line."""

    model: str = "smollm2"
    weights: Literal["auto", "random"] = "auto"
    # a key of `DTYPE_BYTES`, or auto: the type that this CPU multiplies fast, as measured; bfloat16 on a GPU
    dtype: str = "auto"
    device: str = "cpu"
    # None for a share of the free memory on a CPU; on a GPU what weights and the largest step leave
    gpu_cache_gb: float | None = None
    cpu_cache_gb: float | None = None  # None for 0 on a CPU and `HOST_CACHE_GB` beside a GPU
    max_context: int | None = None
    overflow: Literal["refuse", "truncate"] = "refuse"
    policy: str = "retention"
    chunk_tokens: int = 32
    max_batch_tokens: int | None = None
    step_ms: float | None = None  # None for `CPU_STEP_MS`, or `CUDA_STEP_MS` on a GPU
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
        """Seconds that a step may take while a request decodes."""
        default = CUDA_STEP_MS if self.is_on_gpu else CPU_STEP_MS
        return (default if self.step_ms is None else self.step_ms) / 1e3

    @property
    def graph_rows(self) -> int:
        """The largest batch of decodes that is captured as a CUDA graph."""
        return min(self.max_running, MOST_GRAPH_ROWS) if self.is_on_gpu and self.graphs else 0

    def __post_init__(self) -> None:
        if self.dtype != "auto" and self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"--dtype must be auto or one of {', '.join(DTYPE_BYTES)}, got {self.dtype!r}")
        for name in ("gpu_cache_gb", "cpu_cache_gb"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                option = name.removesuffix("_gb").replace("_", "-")
                raise ConfigError(f"--{option} must be at least 0 GB, got {getattr(self, name)}")
        if self.step_ms is not None and not self.step_ms > 0:
            raise ConfigError(f"--step-ms must be positive, got {self.step_ms:g}")
        if self.device != "cpu" and not self.is_on_gpu:
            raise ConfigError(
                f"--device must be cpu or cuda (or one of several: cuda:0, cuda:1, ...), got {self.device!r}"
            )
        if self.max_context is not None and self.max_context < 2:
            raise ConfigError(f"--max-context must be at least 2 tokens, got {self.max_context}")


def as_json(options: Options) -> dict[str, Any]:
    """The options as plain data, for a report."""
    return dict(json.loads(json.dumps({name: getattr(options, name) for name in Options.__slots__})))
