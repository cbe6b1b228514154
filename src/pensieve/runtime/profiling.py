"""Measures what computing and copying cost on this machine, once, and keeps it as JSON.

Knows workers and clocks; never eviction policies.

Recomputing a chunk costs its attention, which grows with the context before it, and the rest, which does not
(paper §4.3.1, there called Cost(l) and c). We measure a forward of one chunk at contexts of a power of two;
costs between are interpolated. Steps, answers, attention and planning are measured separately: a simulator
composes any step from them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from pensieve.config import TierConfig
from pensieve.errors import ConfigError
from pensieve.machine import cache_folder, cpu_name, write_whole
from pensieve.runtime.planning_costs import PlanningCosts, planning_costs
from pensieve.runtime.step_timings import COPIED_CHUNKS, LEAST_S, StepTimer, Timing
from pensieve.worker.attention import make_backend
from pensieve.worker.measurements import FORMAT, Profile, attention_costs, attention_s, parse
from pensieve.worker.model import CausalModel
from pensieve.worker.worker import ModelWorker

logger = logging.getLogger(__name__)

_STORE_BYTES = 512 << 20  # bytes of KV while measuring; longer contexts read the same slots again
_PREFILL_TOKENS = 512
_DECODE_CONTEXT = 1024
_STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_BATCHES = (1, 2, 4, 8, 16, 32)  # answers that get a token in a step
_FAR_BATCH, _FAR_CONTEXT = 8, 2048  # requests and tokens with which attention shows


def load_or_measure(
    model: CausalModel,
    max_context: int,
    chunk_tokens: int = 32,
    *,
    attention: str = "auto",
    folder: Path | None = None,
    fresh: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[str, float], None] | None = None,
) -> Profile:
    """The profile of this model on this machine, from the user's cache if it was measured before.

    Args:
        model: a model that passed the gate.
        max_context: longest context to be served, tokens.
        chunk_tokens: tokens of one chunk.
        attention: backend, as `ModelWorker` takes it.
        folder: where profiles are kept; None for `profiles` in `machine.cache_folder`.
        fresh: measure even if there is a profile.
        clock: seconds.
        progress: called with (what is measured, share done).

    Raises:
        ConfigError: the model has no context of `max_context`.
    """
    path = (folder or _default_folder()) / f"{_key(model, chunk_tokens, attention)}.json"
    if not fresh:
        kept = load(path)
        if kept is not None and kept.points[-1][0] >= contexts(max_context, chunk_tokens)[-1]:
            return kept
    profile = measure(model, max_context, chunk_tokens, attention=attention, clock=clock, progress=progress)
    try:
        save(profile, path, model)
    except OSError as error:
        logger.warning(
            "the profile could not be kept in %s: %s; it will be measured again next time", path, error
        )
    return profile


def find(
    model: CausalModel, chunk_tokens: int = 32, *, attention: str = "auto", folder: Path | None = None
) -> Profile | None:
    """The kept profile of this model on this machine, whatever its longest context; None if there is none."""
    return load((folder or _default_folder()) / f"{_key(model, chunk_tokens, attention)}.json")


def contexts(max_context: int, chunk_tokens: int) -> list[int]:
    """The contexts at which Cost(l) is measured: powers of two times the chunk, up to `max_context`."""
    found = [chunk_tokens]
    while found[-1] * 2 <= max_context:
        found.append(found[-1] * 2)
    return found


def measure(
    model: CausalModel,
    max_context: int,
    chunk_tokens: int = 32,
    *,
    attention: str = "auto",
    repeats: int = 7,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[str, float], None] | None = None,
) -> Profile:
    """Measure now; see `load_or_measure` for the arguments.

    Raises:
        ConfigError: the model has no context of `max_context`, or there is no memory to measure in.
    """
    if not chunk_tokens <= max_context <= model.shape.max_positions:
        raise ConfigError(
            f"max_context must lie between one chunk ({chunk_tokens}) and the model's "
            f"{model.shape.max_positions} tokens, got {max_context}"
        )
    worker, num_slots = _make_worker(model, max_context, chunk_tokens, attention)
    tell = progress or (lambda what, share: None)
    try:
        timer = StepTimer(
            worker, model.shape.vocab_size, model.device, clock, num_slots=num_slots,
            num_requests=max(_BATCHES), spread_requests=_FAR_BATCH,
            table_chunks=-(-max_context // chunk_tokens),
        )  # fmt: skip
        timings = _Timings.of(timer, max_context, chunk_tokens)
        timer.run_rounds(timings.all(), repeats, tell)
        tell("planning", repeats / (repeats + 1))
        costs = planning_costs(worker, model.shape.vocab_size, num_slots, max_context, chunk_tokens, clock)
        tell("done", 1.0)
    finally:
        worker.close()
    return timings.profile(costs, copied_bytes=timer.num_copied * worker.chunk_bytes)


def _make_worker(
    model: CausalModel, max_context: int, chunk_tokens: int, attention: str
) -> tuple[ModelWorker, int]:
    """A worker with two tiers, and the number of slots of the first: as many as are read, within a limit."""
    geometry = model.geometry
    values = geometry.num_layers * 2 * geometry.num_kv_heads * geometry.head_dim  # of a token
    chunk_bytes = chunk_tokens * values * model.dtype.itemsize
    far = min(_FAR_CONTEXT, max_context)
    wanted = max(-(-max_context // chunk_tokens), _FAR_BATCH * -(-far // chunk_tokens))
    num_slots = min(wanted, max(COPIED_CHUNKS, _STORE_BYTES // chunk_bytes))
    tiers = (TierConfig("gpu", num_slots), TierConfig("cpu", min(num_slots, COPIED_CHUNKS)))
    return ModelWorker(model, tiers, chunk_tokens, attention=attention), num_slots


@dataclass(frozen=True, slots=True)
class _Timings:
    """Everything that is timed.

    A "near" context is one chunk long, a "far" one long enough that attention shows.
    """

    chunk_tokens: int
    prompt_tokens: int
    far_context: int  # tokens
    chunks: dict[int, Timing]  # by context: one chunk at its end
    prompt: Timing
    decode: Timing
    to_cpu: Timing
    to_gpu: Timing
    steps: dict[int, Timing]  # by new tokens of one request that gets no answer token
    near_queries: Timing  # `_FAR_BATCH` requests, one token each
    far_queries: Timing
    near_chunk: Timing
    far_chunk: Timing
    silent: dict[int, Timing]  # by requests, one token each, none of which gets an answer token
    answered: dict[int, Timing]  # the same, all of which get one

    @classmethod
    def of(cls, timer: StepTimer, max_context: int, chunk_tokens: int) -> Self:
        """Prepare everything; nothing is timed yet."""
        forward, far = timer.forward, min(_FAR_CONTEXT, max_context)
        prompt_tokens, context = min(_PREFILL_TOKENS, max_context), min(_DECODE_CONTEXT, max_context)

        def chunk(stop: int) -> Timing:
            return forward(stop - chunk_tokens, stop)

        return cls(
            chunk_tokens=chunk_tokens,
            prompt_tokens=prompt_tokens,
            far_context=far,
            chunks={stop: chunk(stop) for stop in contexts(max_context, chunk_tokens)},
            prompt=forward(0, prompt_tokens),
            decode=forward(context - 1, context, emits_token=True),
            to_cpu=timer.copy(0, 1),
            to_gpu=timer.copy(1, 0),
            steps={tokens: forward(0, tokens) for tokens in _STEP_TOKENS if tokens <= max_context},
            near_queries=forward(chunk_tokens - 1, chunk_tokens, requests=_FAR_BATCH),
            far_queries=forward(far - 1, far, requests=_FAR_BATCH),
            near_chunk=chunk(chunk_tokens),
            far_chunk=chunk(far),
            silent={count: forward(0, 1, requests=count) for count in _BATCHES},
            answered={count: forward(0, 1, requests=count, emits_token=True) for count in _BATCHES},
        )

    def all(self) -> Iterator[Timing]:
        """In the order in which they run in each round."""
        yield from self.chunks.values()
        yield from (self.prompt, self.decode, self.to_cpu, self.to_gpu)
        yield from self.steps.values()
        yield from (self.near_queries, self.near_chunk, self.far_queries, self.far_chunk)
        for count in self.silent:
            yield from (self.silent[count], self.answered[count])

    def profile(self, costs: PlanningCosts, *, copied_bytes: int) -> Profile:
        """The profile, once everything is timed."""
        points = [(context, timing.median_s) for context, timing in self.chunks.items()]
        distance = self.far_context - self.chunk_tokens  # tokens
        decode_token_s = chunk_token_s = 0.0
        if distance > 0:
            decode_token_s = self.far_queries.beyond_s(self.near_queries) / _FAR_BATCH / distance
            chunk_token_s = self.far_chunk.beyond_s(self.near_chunk) / distance
        read_s, pair_s = attention_costs(decode_token_s, chunk_token_s, self.chunk_tokens)

        def step_s(tokens: int, timing: Timing) -> float:
            return max(LEAST_S, timing.median_s - attention_s(read_s, pair_s, tokens, tokens))

        return Profile(
            chunk_tokens=self.chunk_tokens,
            points=tuple(points),
            rest_s=constant_of(points),
            prefill_tokens_per_s=self.prompt_tokens / self.prompt.median_s,
            decode_step_s=self.decode.median_s,
            copy_bytes_per_s={
                "gpu->cpu": copied_bytes / self.to_cpu.median_s,
                "cpu->gpu": copied_bytes / self.to_gpu.median_s,
            },
            step_points=tuple((tokens, step_s(tokens, timing)) for tokens, timing in self.steps.items()),
            answer_points=tuple(
                (count, self.answered[count].beyond_s(self.silent[count])) for count in self.answered
            ),
            decode_token_s=decode_token_s,
            chunk_token_s=chunk_token_s,
            **dataclasses.asdict(costs),
        )


def constant_of(points: list[tuple[int, float]]) -> float:
    """The constant of the least-squares line through the points: its value at a context of 0.

    At least 0, and at most the smallest of the points.
    """
    least = min(seconds for _, seconds in points)
    if len(points) == 1:
        return least
    slope, constant = statistics.linear_regression(*zip(*points, strict=True))
    return max(0.0, min(least, constant)) if slope > 0.0 else least


def document(profile: Profile, model: CausalModel) -> dict[str, Any]:
    """A profile as JSON with its model and device: all that a simulation of this machine needs."""
    return {
        "format": FORMAT,
        "model": model.label,
        "shape": dataclasses.asdict(model.shape),
        "dtype": str(model.dtype).removeprefix("torch."),
        "bytes_per_value": model.dtype.itemsize,
        "device": _device_name(model.device),
        "device_type": model.device.type,
        "threads": torch.get_num_threads(),
        **dataclasses.asdict(profile),
    }


# -- kept


def save(profile: Profile, path: Path, model: CausalModel) -> None:
    """Write a profile whole or not at all."""
    write_whole(path, json.dumps(document(profile, model), indent=1))


def load(path: Path) -> Profile | None:
    """A kept profile; None if there is none, or, with a warning, if it cannot be read."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("the profile %s cannot be read (%s); measuring again", path, error)
        return None
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            return None
        return parse(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning(
            "the profile %s is damaged (%s: %s); measuring again", path, type(error).__name__, error
        )
        return None


def _default_folder() -> Path:
    return cache_folder() / "profiles"


def _key(model: CausalModel, chunk_tokens: int, attention: str) -> str:
    """A file name that depends on everything that changes the numbers."""
    backend = make_backend(attention, model.geometry, chunk_tokens, model.device).name
    parts = (
        FORMAT, model.label, repr(model.shape), str(model.dtype), _device_name(model.device), chunk_tokens,
        backend, model.forward_name, torch.get_num_threads(), torch.__version__,
    )  # fmt: skip
    readable = "".join(
        letter if letter.isalnum() or letter in "-." else "-" for letter in Path(model.label).name
    )[:40]
    return f"{readable}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()
