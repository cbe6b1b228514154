"""Frozen settings, checked when built, units in their names. Knows no hardware and reads no files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pensieve.errors import ConfigError

GIB = 1 << 30
CPU_STEP_MS, CUDA_STEP_MS = 100.0, 30.0  # of a step while a request decodes, unless told otherwise


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of a decoder-only transformer that sizes and costs depend on."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int  # width of one MLP (of one expert, for a mixture)
    vocab_size: int
    max_positions: int  # longest context the model was built for, tokens

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of K and V of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_bytes


@dataclass(frozen=True, slots=True)
class TierConfig:
    """One tier of the cache: its name and its room."""

    name: str  # "gpu", "cpu", "disk"
    num_slots: int  # chunks it holds

    def __post_init__(self) -> None:
        if self.num_slots < 0:
            raise ConfigError(f"tier {self.name!r} must have at least 0 slots, got {self.num_slots}")


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Sizes of the tiered cache."""

    tiers: tuple[TierConfig, ...]  # fastest first; the first is where the model reads
    chunk_tokens: int = 32  # tokens of one chunk (paper §4.3.1)
    # share of the slots that user keeps may hold (of the lower tiers; of the first if alone)
    keep_share: float = 0.5

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens must be at least 1, got {self.chunk_tokens}")
        if not self.tiers:
            raise ConfigError("a cache needs at least one tier, got none")
        if self.tiers[0].num_slots < 1:
            raise ConfigError(
                f"tier {self.tiers[0].name!r} holds no chunk: "
                f"give it the bytes of at least one chunk of {self.chunk_tokens} tokens"
            )
        if not 0.0 <= self.keep_share <= 0.9:
            raise ConfigError(f"keep_share must lie in [0, 0.9], got {self.keep_share}")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How steps are filled."""

    max_batch_tokens: int = 512  # token budget of one step
    max_running: int = 64  # requests in one step
    max_waiting: int = 4096  # beyond it a submission is refused (Overloaded)
    reserve_share: float = 0.10  # first-tier share that new requests leave to running ones (paper §4.3.5)
    # below this free-or-reclaimable share, copy down ahead of time (paper §4.3.2)
    copy_ahead_share: float = 0.25
    max_copies_in_flight: int = 256  # swap-outs under way at once, chunks
    # all tiers are in RAM: copies that a request waits for run as their own short step
    copies_first: bool = False
    retain: bool = True  # False: the stateless baseline, nothing kept between turns
    # which request is admitted next: by remaining work and tenant, or first come, first served
    admission: Literal["work", "fcfs"] = "work"
    # seconds of a step while a request decodes; None if steps are bounded by tokens alone
    step_s: float | None = None

    def __post_init__(self) -> None:
        if self.max_running < 1:
            raise ConfigError(f"max_running must be at least 1, got {self.max_running}")
        if self.max_batch_tokens < self.max_running:
            raise ConfigError(
                f"max_batch_tokens must be at least max_running ({self.max_running}), "
                f"one token a running request, got {self.max_batch_tokens}"
            )
        if self.admission not in ("work", "fcfs"):
            raise ConfigError(f"admission must be 'work' or 'fcfs', got {self.admission!r}")
        if self.step_s is not None and not self.step_s > 0.0:
            raise ConfigError(f"step_s must be positive, got {self.step_s}")
        for name in ("reserve_share", "copy_ahead_share"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name} must lie in [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class ContextLimit:
    """What limits the longest sequence, and which option would allow a longer one."""

    tokens: int  # of the longest sequence, prompt and answer together
    model_tokens: int  # the model was built for
    num_slots: int  # of the first tier
    chunk_tokens: int
    chunk_bytes: int  # of one process, where several share the model
    is_told: bool  # by --max-context; else it is what model and first tier hold

    def way_out(self, num_tokens: int | None = None, *, others: int = 0) -> str:
        """For an error message: which option makes room for `num_tokens` (None if their number is unknown).

        Args:
            num_tokens: of prompt and answer.
            others: slots of the first tier that others hold for good.
        """
        if num_tokens is None:
            grown = [
                name
                for name, is_it in (
                    ("--gpu-cache", self._tier_is_short),
                    ("--max-context", self.is_told and self.tokens < self.model_tokens),
                )
                if is_it
            ]
            return (
                f"start with a larger {' and '.join(grown)}"
                if grown
                else f"take another model: this one was built for {self.model_tokens} tokens"
            )
        if num_tokens > self.model_tokens:
            return f"take another model: this one was built for {self.model_tokens} tokens"
        need = -(-num_tokens // self.chunk_tokens) + others
        options = []
        if need > self.num_slots:
            options.append(f"--gpu-cache {gigabytes(need * self.chunk_bytes)} (GB) or more")
        if self.is_told and num_tokens > self.tokens:
            options.append(f"--max-context {num_tokens} or more")
        return f"start with {' and '.join(options)}" if options else "ask again later"

    @property
    def _tier_is_short(self) -> bool:
        return self.num_slots * self.chunk_tokens < self.model_tokens


def gigabytes(num_bytes: int) -> str:
    """Bytes as a number of GB for an option, in three digits, always up."""
    number = (num_bytes + 1) / 1e9
    decimals = 2 - math.floor(math.log10(number))
    return f"{math.ceil(number * 10.0**decimals) / 10.0**decimals:.{max(0, decimals)}f}"


def slots_for_bytes(budget_bytes: int, chunk_bytes: int) -> int:
    """How many whole chunks of `chunk_bytes` fit in `budget_bytes`."""
    return budget_bytes // chunk_bytes
