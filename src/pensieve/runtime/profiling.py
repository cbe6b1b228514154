"""What computing and copying cost on this machine: measured once, kept as JSON. Knows workers and clocks; never eviction policies.

Recomputing a chunk costs its attention, which grows with the context before it, and the rest, which does not (paper §4.3.1, there
called Cost(l) and c). Measured is a forward of one chunk at contexts of a power of two; whoever needs one between interpolates.
Steps, answers, attention and planning are measured too, each apart from the others: a simulator puts any step together from them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import torch

from pensieve.config import CacheConfig, SchedulerConfig, TierConfig
from pensieve.core.cache import TieredCache
from pensieve.core.cost import CostProfile
from pensieve.core.eviction import POLICIES
from pensieve.core.plan import BlockTableUpdate, Copy, RequestStart, Span, StepPlan, StepResult
from pensieve.core.request import SamplingParams
from pensieve.core.scheduler import Scheduler, StepEvents
from pensieve.engine.engine import Engine
from pensieve.errors import ConfigError
from pensieve.worker.attention import make_backend
from pensieve.worker.measurements import FORMAT, Profile, attention_costs, attention_s, parse
from pensieve.worker.model import CausalModel
from pensieve.worker.worker import ModelWorker

logger = logging.getLogger(__name__)

_STORE_BYTES = 512 << 20  # of KV while measuring; longer contexts read the same slots again
_PREFILL_TOKENS = 512
_DECODE_CONTEXT = 1024
_COPIED_CHUNKS = 8
_WARM_UPS = 2  # steps before those whose planning is timed
_LEAST_S = 1e-9
_STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_BATCHES = (1, 2, 4, 8, 16, 32)  # answers in a step
_FAR_BATCH, _FAR_CONTEXT = 8, 2048  # where attention shows
_PLANNED = (1, 16)  # requests of the steps whose planning is timed
_PLANNED_STEPS = 24
_ENDED_CONTEXT, _ENDED_NEW, _ENDED_ANSWER, _ENDED_TURNS = (
    512,
    100,
    4,
    5,
)  # tokens, and turns, of the conversation whose ends are timed


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
        folder: where profiles are kept; None: `profiles` in $PENSIEVE_CACHE or the user's cache directory.
        fresh: measure even if there is one.
        clock: seconds, in which it is measured.
        progress: called with (what is measured, share done).

    Raises:
        ConfigError: max_context is no context of this model.
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
    repeats: int = 7,
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
    chunk_bytes = (
        model.shape.num_layers
        * 2
        * chunk_tokens
        * model.geometry.num_kv_heads
        * model.geometry.head_dim
        * model.dtype.itemsize
    )
    far = min(_FAR_CONTEXT, max_context)
    wanted = max(-(-max_context // chunk_tokens), _FAR_BATCH * -(-far // chunk_tokens))
    num_slots = min(wanted, max(_COPIED_CHUNKS, _STORE_BYTES // chunk_bytes))
    tiers = (TierConfig("gpu", num_slots), TierConfig("cpu", min(num_slots, _COPIED_CHUNKS)))
    worker = ModelWorker(model, tiers, chunk_tokens, attention=attention)
    places = contexts(max_context, chunk_tokens)
    tell = progress or (lambda what, share: None)
    try:
        bench = _Bench(worker, model, num_slots, max_context, chunk_tokens, clock)
        for context in places:
            bench.add(f"chunk {context}", bench.spans((context - chunk_tokens, context)))
        prompt, context = min(_PREFILL_TOKENS, max_context), min(_DECODE_CONTEXT, max_context)
        bench.add("prompt", bench.spans((0, prompt)))
        bench.add("decode", bench.spans((context - 1, context), emits_token=True))
        bench.works["gpu->cpu"] = lambda: bench.copy(0, 1)
        bench.works["cpu->gpu"] = lambda: bench.copy(1, 0)
        steps = [tokens for tokens in _STEP_TOKENS if tokens <= max_context]
        for tokens in steps:
            bench.add(f"step {tokens}", bench.spans((0, tokens)))
        for place in (chunk_tokens, far):
            bench.add(f"queries at {place}", bench.spans((place - 1, place), rows=_FAR_BATCH))
            bench.add(f"chunk at {place}", bench.spans((place - chunk_tokens, place)))
        for rows in _BATCHES:
            bench.add(f"silent {rows}", bench.spans((0, 1), rows=rows))
            bench.add(f"answered {rows}", bench.spans((0, 1), rows=rows, emits_token=True))
        bench.run_rounds(repeats, tell)
        tell("planning", repeats / (repeats + 1))
        planning, committing, commit_end_s = bench.planning(max_context)
        tell("done", 1.0)
    finally:
        worker.close()
    points = [(context, bench.seconds(f"chunk {context}")) for context in places]
    span = max(1, far - chunk_tokens)
    decode_token_s = bench.more(f"queries at {chunk_tokens}", f"queries at {far}") / _FAR_BATCH / span
    chunk_token_s = bench.more(f"chunk at {chunk_tokens}", f"chunk at {far}") / span
    read_s, pair_s = attention_costs(decode_token_s, chunk_token_s, chunk_tokens)
    bytes_copied = bench.num_copied * chunk_bytes
    return Profile(
        chunk_tokens=chunk_tokens,
        points=tuple(points),
        rest_s=constant_of(points),
        prefill_tokens_per_s=prompt / bench.seconds("prompt"),
        decode_step_s=bench.seconds("decode"),
        copy_bytes_per_s={
            direction: bytes_copied / bench.seconds(direction) for direction in ("gpu->cpu", "cpu->gpu")
        },
        step_points=tuple(
            (
                tokens,
                max(_LEAST_S, bench.seconds(f"step {tokens}") - attention_s(read_s, pair_s, tokens, tokens)),
            )
            for tokens in steps
        ),
        answer_points=tuple((rows, bench.more(f"silent {rows}", f"answered {rows}")) for rows in _BATCHES),
        decode_token_s=decode_token_s,
        chunk_token_s=chunk_token_s,
        plan_step_s=planning[0],
        plan_request_s=planning[1],
        commit_step_s=committing[0],
        commit_request_s=committing[1],
        commit_end_s=commit_end_s,
    )


def constant_of(points: list[tuple[int, float]]) -> float:
    """Where the line of least squares through the points meets a context of 0; between 0 and the least of them."""
    least = min(seconds for _, seconds in points)
    if len(points) == 1:
        return least
    slope, constant = statistics.linear_regression(*zip(*points, strict=True))
    return max(0.0, min(least, constant)) if slope > 0.0 else least


class _TimedScheduler(Scheduler):
    """Notes what it takes to plan, and how long it is from a result to the next plan."""

    def watch(self, clock: Callable[[], float]) -> None:
        """From now on."""
        self._timer = clock
        self._committed: tuple[float, int, int] | None = None
        self.plans: list[tuple[float, int]] = []  # (seconds, spans)
        self.gaps: list[tuple[float, int, int]] = []  # (seconds, spans of the result, answers that ended)

    def schedule(self, now_s: float) -> StepPlan:
        """See `Scheduler`."""
        begin = self._timer()
        if self._committed is not None:
            committed_s, num_spans, num_ended = self._committed
            self.gaps.append((begin - committed_s, num_spans, num_ended))
            self._committed = None
        plan = super().schedule(now_s)
        self.plans.append((self._timer() - begin, len(plan.spans)))
        return plan

    def commit(self, plan: StepPlan, result: StepResult, now_s: float) -> StepEvents:
        """See `Scheduler`."""
        events = super().commit(plan, result, now_s)
        if plan.spans:
            self._committed = (now_s, len(plan.spans), len(events.finished))
        return events


class _Bench:
    """Times single steps of a worker: `works` by name, each once a round, so that a machine that is slow for a while is slow for all of them."""

    def __init__(
        self,
        worker: ModelWorker,
        model: CausalModel,
        num_slots: int,
        max_context: int,
        chunk_tokens: int,
        clock: Callable[[], float],
    ) -> None:
        self._worker, self._model, self._clock = worker, model, clock
        self._num_slots, self._chunk_tokens = num_slots, chunk_tokens
        self.works: dict[str, Callable[[], Any]] = {}
        self._seconds: dict[str, list[float]] = {}  # of each round
        self.num_copied = min(num_slots, _COPIED_CHUNKS)
        self._num_steps = self._num_copies = 0
        apart = num_slots // _FAR_BATCH + 1  # so that no two of a small batch read the same slots
        chunks = -(-max_context // chunk_tokens)
        tables = [
            tuple((row * apart + index) % num_slots for index in range(chunks))
            for row in range(max(_BATCHES))
        ]
        self._run(
            (),
            started=tuple(RequestStart(_name(row), SamplingParams(), ()) for row in range(len(tables))),
            tables=tuple(BlockTableUpdate(_name(row), 0, table) for row, table in enumerate(tables)),
        )

    def spans(self, tokens: tuple[int, int], *, rows: int = 1, emits_token: bool = False) -> tuple[Span, ...]:
        """The same tokens of so many sequences."""
        vocabulary, (start, stop) = self._model.shape.vocab_size, tokens
        ids = tuple(position * 7919 % vocabulary for position in range(start, stop))
        return tuple(Span(_name(row), start, stop, ids, emits_token) for row in range(rows))

    def add(self, name: str, spans: tuple[Span, ...]) -> None:
        """One more work: a forward over these spans."""
        self.works[name] = lambda: self._run(spans)

    def run_rounds(self, repeats: int, tell: Callable[[str, float], None]) -> None:
        """Everything once to warm up, and then so many times, in turn."""
        self._seconds = {name: [] for name in self.works}
        for round_ in range(-1, repeats):
            tell(
                "warm-up" if round_ < 0 else f"round {round_ + 1} of {repeats}",
                max(0, round_) / (repeats + 1),
            )
            for name, work in self.works.items():
                before = self._clock()
                work()
                if round_ >= 0:
                    self._seconds[name].append(self._clock() - before)

    def seconds(self, name: str) -> float:
        """What a work takes."""
        return max(_LEAST_S, statistics.median(self._seconds[name]))

    def more(self, less: str, more: str) -> float:
        """Seconds that one work takes beyond another, at least 0: the median over the rounds."""
        return max(
            0.0,
            statistics.median(b - a for a, b in zip(self._seconds[less], self._seconds[more], strict=True)),
        )

    def planning(self, max_context: int) -> tuple[tuple[float, float], tuple[float, float], float]:
        """Of the engine: planning, and from a result to the next plan, each a step and more for each request in it; and more for an answer's end.

        A real worker computes between: what Python needs is cold then.
        """
        few, many = (
            self._planning(count, min(max_context, self._num_slots * self._chunk_tokens // count))
            for count in _PLANNED
        )
        return (
            _line(few[0], many[0]),
            _line(few[1], many[1]),
            self._ending(min(max_context, self._num_slots * self._chunk_tokens)),
        )

    def _planning(self, count: int, max_context: int) -> tuple[float, float]:
        """Seconds to plan a step of so many decodes, and to commit it."""
        if max_context < 4:
            return 0.0, 0.0
        scheduler = self._scheduler(count, max_context)
        answer = min(_PLANNED_STEPS + _WARM_UPS, max_context - 2)
        for row in range(count):
            # (ids of its own for each: nothing is shared)
            scheduler.submit(
                f"planned {count} {row}",
                "profile",
                str(row),
                (row, row),
                0,
                SamplingParams(max_new_tokens=answer),
                self._clock(),
            )
        self._play(scheduler)
        plans = [seconds for seconds, num_spans in scheduler.plans if num_spans == count][_WARM_UPS:]
        gaps = [
            seconds
            for seconds, num_spans, num_ended in scheduler.gaps
            if num_spans == count and not num_ended
        ][_WARM_UPS:]
        return statistics.median(plans or [0.0]), statistics.median(gaps or [0.0])

    def _ending(self, max_context: int) -> float:
        """Seconds that a commit takes more in which an answer ends: of a conversation as long as they usually are, turn by turn."""
        first = min(_ENDED_CONTEXT, max_context // 2)
        new = min(_ENDED_NEW, first // _ENDED_TURNS)
        if new < _ENDED_ANSWER + 1:
            return 0.0
        scheduler = self._scheduler(1, max_context)
        vocabulary = self._model.shape.vocab_size
        for turn in range(_ENDED_TURNS):
            length = first + turn * new
            tokens = tuple(position * 7919 % vocabulary for position in range(length))
            sampling = SamplingParams(max_new_tokens=_ENDED_ANSWER)
            scheduler.submit(
                f"ended {turn}", "profile", "ended", tokens, max(0, length - new), sampling, self._clock()
            )
            self._play(scheduler)
        ends, others = (
            [seconds for seconds, _, ended in scheduler.gaps if bool(ended) == asked]
            for asked in (True, False)
        )
        return max(0.0, statistics.median(ends) - statistics.median(others))

    def _scheduler(self, count: int, max_context: int) -> _TimedScheduler:
        """A real one over the slots that are there."""
        cost = CostProfile([(self._chunk_tokens, 1.0)], self._chunk_tokens)
        tiers = (TierConfig("gpu", self._num_slots),)
        cache = TieredCache(CacheConfig(tiers, self._chunk_tokens), POLICIES["retention"](cost.of_chunk))
        config = SchedulerConfig(
            max_batch_tokens=self._chunk_tokens + 2 * count, max_running=count, reserve_share=0.0
        )
        scheduler = _TimedScheduler(config, cache, max_context)
        scheduler.watch(self._clock)
        return scheduler

    def _play(self, scheduler: Scheduler) -> None:
        """Steps until every request has ended and the worker has forgotten it."""
        chunk_bytes = self._worker.chunk_bytes
        engine = Engine(
            scheduler, self._worker, chunk_bytes=chunk_bytes, emit=lambda events: None, clock=self._clock
        )
        while scheduler.requests:
            engine.step()
        engine.step()

    def copy(self, source: int, target: int) -> None:
        """A few chunks from one tier to the other."""
        copies = tuple(
            Copy(self._num_copies + slot, source, slot, target, slot) for slot in range(self.num_copied)
        )
        self._num_copies += self.num_copied
        waiting = {copy.copy_id for copy in copies}
        result = self._run((), swap_in=copies) if target == 0 else self._run((), swap_out=copies)
        while waiting := waiting - set(result.copies_done):
            if result.copies_failed:
                raise RuntimeError(f"a copy failed while measuring: {result.copies_failed[0].message}")
            time.sleep(20e-6)  # let the copying thread have the interpreter
            result = self._run(())

    def _run(
        self,
        spans: tuple[Span, ...],
        swap_in: tuple[Copy, ...] = (),
        swap_out: tuple[Copy, ...] = (),
        started: tuple[RequestStart, ...] = (),
        tables: tuple[BlockTableUpdate, ...] = (),
    ) -> StepResult:
        result = self._worker.run(
            StepPlan(self._num_steps, spans, swap_in, swap_out, started, tables, (), ())
        )
        self._num_steps += 1
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        if result.forward_error is not None:
            raise RuntimeError(f"a forward failed while measuring: {result.forward_error}")
        return result


def _line(few_s: float, many_s: float) -> tuple[float, float]:
    """A constant and a slope, at least 0 each, through what the fewest and the most requests took."""
    few, many = _PLANNED
    slope = max(0.0, many_s - few_s) / (many - few)
    return max(0.0, few_s - few * slope), slope


def _name(row: int) -> str:
    return f"profile {row}"


def document(profile: Profile, model: CausalModel) -> dict[str, Any]:
    """A profile with what it is of, as JSON has it: all that a simulation of this machine needs."""
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
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=path.stem, suffix=".tmp", delete=False
    ) as file:
        try:
            json.dump(document(profile, model), file, indent=1)
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
        if content["format"] != FORMAT:
            return None
        return parse(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning(
            "the profile %s is damaged (%s: %s); measuring again", path, type(error).__name__, error
        )
        return None


def _default_folder() -> Path:
    override = os.environ.get("PENSIEVE_CACHE")
    return (
        Path(override).expanduser() if override else Path(platformdirs.user_cache_dir("pensieve"))
    ) / "profiles"


def _key(model: CausalModel, chunk_tokens: int, attention: str) -> str:
    """A file name for everything that changes the numbers."""
    backend = make_backend(attention, model.geometry, chunk_tokens, model.device).name
    parts = (
        FORMAT, model.label, repr(model.shape), str(model.dtype), _device_name(model.device), chunk_tokens, backend,
        model.forward_name, torch.get_num_threads(), torch.__version__,
    )  # fmt: skip
    readable = "".join(
        letter if letter.isalnum() or letter in "-." else "-" for letter in Path(model.label).name
    )[:40]
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
