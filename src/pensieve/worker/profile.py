"""What computing and copying cost on this machine: measured once, kept as JSON. Knows workers and clocks; never eviction policies.

Recomputing a chunk costs its attention, which grows with the context before it, and the rest, which does not (paper §4.3.1, there
called Cost(l) and c). Measured is a forward of one chunk at contexts of a power of two; whoever needs one between interpolates.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import torch

from pensieve.config import TierConfig
from pensieve.core.plan import BlockTableUpdate, Copy, RequestStart, Span, StepPlan, StepResult
from pensieve.core.request import SamplingParams
from pensieve.errors import ConfigError
from pensieve.worker.attention import make_backend
from pensieve.worker.model import CausalModel
from pensieve.worker.worker import ModelWorker

logger = logging.getLogger(__name__)

_FORMAT = 1  # of the file, and of what is measured: raised when either changes its meaning
_STORE_BYTES = 512 << 20  # of KV while measuring; longer contexts read the same slots again
_PREFILL_TOKENS = 512
_DECODE_CONTEXT = 1024
_COPIED_CHUNKS = 8
_WARM_UPS = 2
_REQUEST = "profile"


@dataclass(frozen=True, slots=True)
class Profile:
    """Plain numbers, each a median after warm-up."""

    chunk_tokens: int
    points: tuple[tuple[int, float], ...]  # (context tokens, seconds to compute one chunk whose last token sees so many), ascending
    rest_s: float  # of these seconds, what does not depend on the context: where their line meets a context of 0
    prefill_tokens_per_s: float  # one prompt of up to 512 tokens
    decode_step_s: float  # one token of one request at a context of up to 1,024 tokens
    copy_bytes_per_s: dict[str, float]  # by direction, "gpu->cpu" and "cpu->gpu", a few chunks at a time


def load_or_measure(
    model: CausalModel,
    max_context: int,
    chunk_tokens: int = 32,
    *,
    attention: str = "auto",
    folder: Path | None = None,
    fresh: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> Profile:
    """The profile of this model on this machine, from the user's cache if it was measured before.

    Args:
        model: a model that passed the gate.
        max_context: longest context to be served, tokens.
        chunk_tokens: tokens of one chunk.
        attention: backend, as `ModelWorker` takes it.
        folder: where profiles are kept; None: `profiles` in $PENSIEVE_CACHE or the user's cache directory.
        fresh: measure even if there is one.
        progress: called with (what is measured, share done).

    Raises:
        ConfigError: max_context is no context of this model.
    """
    path = (folder or _default_folder()) / f"{_key(model, chunk_tokens, attention)}.json"
    if not fresh:
        kept = load(path)
        if kept is not None and kept.points[-1][0] >= contexts(max_context, chunk_tokens)[-1]:
            return kept
    profile = measure(model, max_context, chunk_tokens, attention=attention, progress=progress)
    try:
        save(profile, path, model)
    except OSError as error:
        logger.warning("the profile could not be kept in %s: %s; it will be measured again next time", path, error)
    return profile


def find(model: CausalModel, chunk_tokens: int = 32, *, attention: str = "auto", folder: Path | None = None) -> Profile | None:
    """The profile of this model on this machine if one was kept, of whatever longest context; nothing is measured."""
    return load((folder or _default_folder()) / f"{_key(model, chunk_tokens, attention)}.json")


def contexts(max_context: int, chunk_tokens: int) -> list[int]:
    """Where Cost(l) is measured: powers of two times the chunk, up to `max_context`; at least one chunk."""
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
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[str, float], None] | None = None,
) -> Profile:
    """Measure now; see `load_or_measure` for the arguments.

    Raises:
        ConfigError: max_context is no context of this model, or there is no memory to measure in.
    """
    if not chunk_tokens <= max_context <= model.shape.max_positions:
        raise ConfigError(
            f"max_context must lie between one chunk ({chunk_tokens}) and the model's {model.shape.max_positions} tokens, got {max_context}"
        )
    chunk_bytes = model.shape.num_layers * 2 * chunk_tokens * model.geometry.num_kv_heads * model.geometry.head_dim * model.dtype.itemsize
    num_slots = min(-(-max_context // chunk_tokens), max(_COPIED_CHUNKS, _STORE_BYTES // chunk_bytes))
    tiers = (TierConfig("gpu", num_slots), TierConfig("cpu", min(num_slots, _COPIED_CHUNKS)))
    worker = ModelWorker(model, tiers, chunk_tokens, attention=attention)
    tell = progress or (lambda what, share: None)
    try:
        bench = _Bench(worker, model, num_slots, max_context, chunk_tokens, repeats, clock)
        points = []
        places = contexts(max_context, chunk_tokens)
        for index, context in enumerate(places):
            tell(f"context of {context} tokens", index / (len(places) + 3))
            points.append((context, bench.forward(context - chunk_tokens, context)))
        tell("prefill", len(places) / (len(places) + 3))
        prompt = min(_PREFILL_TOKENS, max_context)
        prefill_s = bench.forward(0, prompt)
        tell("decode", (len(places) + 1) / (len(places) + 3))
        context = min(_DECODE_CONTEXT, max_context)
        decode_s = bench.forward(context - 1, context, emits_token=True)
        tell("copies", (len(places) + 2) / (len(places) + 3))
        rates = {"gpu->cpu": bench.copy(0, 1), "cpu->gpu": bench.copy(1, 0)}
        tell("done", 1.0)
    finally:
        worker.close()
    return Profile(chunk_tokens, tuple(points), constant_of(points), prompt / prefill_s, decode_s, rates)


def constant_of(points: list[tuple[int, float]]) -> float:
    """Where the line of least squares through the points meets a context of 0; between 0 and the least of them."""
    least = min(seconds for _, seconds in points)
    if len(points) == 1:
        return least
    slope, constant = statistics.linear_regression(*zip(*points, strict=True))
    return max(0.0, min(least, constant)) if slope > 0.0 else least


class _Bench:
    """Times single steps of a worker."""

    def __init__(
        self,
        worker: ModelWorker,
        model: CausalModel,
        num_slots: int,
        max_context: int,
        chunk_tokens: int,
        repeats: int,
        clock: Callable[[], float],
    ) -> None:
        self._worker, self._model, self._repeats, self._clock = worker, model, repeats, clock
        self._num_copied = min(num_slots, _COPIED_CHUNKS)
        self._num_steps = self._num_copies = 0
        table = tuple(index % num_slots for index in range(-(-max_context // chunk_tokens)))
        start = RequestStart(_REQUEST, SamplingParams(), ())
        self._run((), started=(start,), tables=(BlockTableUpdate(_REQUEST, 0, table),))

    def forward(self, start: int, stop: int, *, emits_token: bool = False) -> float:
        """Seconds of a forward over `[start, stop)` of one sequence."""
        vocabulary = self._model.shape.vocab_size
        span = Span(_REQUEST, start, stop, tuple(position * 7919 % vocabulary for position in range(start, stop)), emits_token)
        return self._median(lambda: self._run((span,)))

    def copy(self, source: int, target: int) -> float:
        """Bytes per second from one tier to the other."""
        seconds = self._median(lambda: self._run_copies(source, target))
        return self._num_copied * self._worker.chunk_bytes / seconds

    def _run_copies(self, source: int, target: int) -> None:
        copies = tuple(Copy(self._num_copies + slot, source, slot, target, slot) for slot in range(self._num_copied))
        self._num_copies += self._num_copied
        waiting = {copy.copy_id for copy in copies}
        result = self._run((), swap_in=copies) if target == 0 else self._run((), swap_out=copies)
        while waiting := waiting - set(result.copies_done):
            if result.copies_failed:
                raise RuntimeError(f"a copy failed while measuring: {result.copies_failed[0].message}")
            time.sleep(20e-6)  # let the copying thread have the interpreter
            result = self._run(())

    def _median(self, work: Callable[[], Any]) -> float:
        for _ in range(_WARM_UPS):
            work()
        seconds = []
        for _ in range(self._repeats):
            before = self._clock()
            work()
            seconds.append(self._clock() - before)
        return max(statistics.median(seconds), 1e-9)

    def _run(
        self,
        spans: tuple[Span, ...],
        swap_in: tuple[Copy, ...] = (),
        swap_out: tuple[Copy, ...] = (),
        started: tuple[RequestStart, ...] = (),
        tables: tuple[BlockTableUpdate, ...] = (),
    ) -> StepResult:
        result = self._worker.run(StepPlan(self._num_steps, spans, swap_in, swap_out, started, tables, (), ()))
        self._num_steps += 1
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        if result.forward_error is not None:
            raise RuntimeError(f"a forward failed while measuring: {result.forward_error}")
        return result


# -- kept


def save(profile: Profile, path: Path, model: CausalModel) -> None:
    """Write a profile whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": _FORMAT, "model": model.label, "dtype": str(model.dtype), "device": _device_name(model.device)}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.stem, suffix=".tmp", delete=False) as file:
        try:
            json.dump(content | dataclasses.asdict(profile), file, indent=1)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            file.close()
            os.unlink(file.name)
            raise


def load(path: Path) -> Profile | None:
    """A profile kept earlier; None if there is none, or none that can be read (then with a warning)."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("the profile %s cannot be read (%s); measuring again", path, error)
        return None
    try:
        content = json.loads(text)
        if content["format"] != _FORMAT:
            return None
        profile = Profile(
            chunk_tokens=int(content["chunk_tokens"]),
            points=tuple((int(context), float(seconds)) for context, seconds in content["points"]),
            rest_s=float(content["rest_s"]),
            prefill_tokens_per_s=float(content["prefill_tokens_per_s"]),
            decode_step_s=float(content["decode_step_s"]),
            copy_bytes_per_s={str(name): float(rate) for name, rate in content["copy_bytes_per_s"].items()},
        )
        _check(profile)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("the profile %s is damaged (%s: %s); measuring again", path, type(error).__name__, error)
        return None
    return profile


def _check(profile: Profile) -> None:
    places = [context for context, _ in profile.points]
    numbers = [seconds for _, seconds in profile.points]
    numbers += [profile.prefill_tokens_per_s, profile.decode_step_s, *profile.copy_bytes_per_s.values()]
    if not places or places != sorted(set(places)) or places[0] < 1 or not all(math.isfinite(n) and n > 0 for n in numbers):
        raise ValueError("its numbers make no sense")
    if not 0.0 <= profile.rest_s <= min(numbers[: len(places)]):
        raise ValueError(f"its constant rest of {profile.rest_s} s is no part of its points")


def _default_folder() -> Path:
    override = os.environ.get("PENSIEVE_CACHE")
    return (Path(override).expanduser() if override else Path(platformdirs.user_cache_dir("pensieve"))) / "profiles"


def _key(model: CausalModel, chunk_tokens: int, attention: str) -> str:
    """A file name for everything that changes the numbers."""
    backend = make_backend(attention, model.geometry, chunk_tokens, model.device).name
    parts = (
        _FORMAT, model.label, repr(model.shape), str(model.dtype), _device_name(model.device), chunk_tokens, backend,
        model.forward_name, torch.get_num_threads(), torch.__version__,
    )  # fmt: skip
    readable = "".join(letter if letter.isalnum() or letter in "-." else "-" for letter in Path(model.label).name)[:40]
    return f"{readable}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
