"""What the scripts of this folder share: options, the machine, clocks, goals, the report. Knows no attention and no engine.

A report is written anew after every case, so that a run cut short leaves what it had. A goal is judged on a CUDA device at full size only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

CHUNK = 32
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ROOT = Path(__file__).resolve().parents[2]
_SMI_FIELDS = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu", "power.draw", "power.limit",
    "clocks_throttle_reasons.active",
)  # fmt: skip
_SLEEP_CYCLES_PER_S = 2e9  # of `torch.cuda._sleep`: at least as long as asked for at every clock a GPU has
_LONGEST_SLEEP_S = 0.25


# -- options


def parser(text: str | None) -> argparse.ArgumentParser:
    """The options that all scripts have; `text` is the script's docstring."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu (to see that a script runs)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes: a proof that it runs, its figures mean nothing"
    )
    parser.add_argument(
        "--attention", default="auto", help="attention backend; auto takes the first that can serve"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each kind; medians count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--limit-s", type=float, default=570.0, help="no case is begun that would end after so many seconds"
    )
    parser.add_argument("--commit", default=None, help="the commit measured, where there is no git to ask")
    parser.add_argument("--out", type=Path, default=None, help="write the JSON here, too, after every case")
    return parser


# -- figures


def spread(values: Sequence[float], digits: int = 5) -> dict[str, float]:
    """Median, least, most and how many."""
    told = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in told.items()} | {"n": len(values)}


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, -math.inf
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure and what it should be."""

    what: str
    value: float
    bound: float
    at_least: bool  # False: at most
    known: str = (
        ""  # "at least", "at most", "unknown": how the true value lies to this one; "": it is this one
    )

    @property
    def verdict(self) -> str:
        """ "met", "missed", or "undecided" where the true value may lie on the other side of the bound. NaN meets nothing."""
        met = self.value >= self.bound if self.at_least else self.value <= self.bound
        decides = {"", "at least" if met == self.at_least else "at most"}
        return ("met" if met else "missed") if self.known in decides else "undecided"

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}"


# -- clocks


@dataclass(frozen=True, slots=True)
class Timing:
    """Several measurements of one kind of work."""

    seconds: tuple[float, ...]  # of one call, a measurement
    host_s: float  # how long one call kept the host

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    def as_json(self) -> dict[str, Any]:
        return {"ms": spread([1e3 * s for s in self.seconds]), "host_us": round(1e6 * self.host_s, 1)}


class Clock:
    """How long work takes on a device: CUDA events there, the host's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def sync(self) -> None:
        """Return when the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def in_turns(
        self,
        works: Mapping[str, Callable[[int], object]],
        repeats: int,
        *,
        block_s: float = 0.02,
        most: int = 64,
    ) -> dict[str, Timing]:
        """Several kinds of work, A B A B ...

        Args:
            works: by name; called with a number that goes up, by which they rotate their buffers.
            repeats: measurements of each.
            block_s: a measurement is about so long, many calls of short work.
            most: calls in one measurement.
        """
        counts, hosts = {}, {}
        for name, work in works.items():
            for number in range(3):  # compiles, allocates, tunes
                work(number)
            self.sync()
            begin = time.perf_counter()
            work(3)
            hosts[name] = time.perf_counter() - begin
            self.sync()
            counts[name] = max(1, min(most, int(block_s / max(1e-7, time.perf_counter() - begin))))
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(repeats):
            for name, work in works.items():
                seconds[name].append(self._block(work, counts[name], hosts[name]))
        return {name: Timing(tuple(values), hosts[name]) for name, values in seconds.items()}

    def wall(self, work: Callable[[], object]) -> float:
        """Seconds of the host until the device has done some work and everything before it."""
        self.sync()
        begin = time.perf_counter()
        work()
        self.sync()
        return time.perf_counter() - begin

    def _block(self, work: Callable[[int], object], count: int, host_s: float) -> float:
        """Seconds of one call of `count` in a row."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            for number in range(count):
                work(number)
            return (time.perf_counter() - begin) / count
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        # The device is kept waiting until the host has launched the block: what is measured is the device, not the launching.
        torch.cuda._sleep(int(min(1.3 * host_s * count, _LONGEST_SLEEP_S) * _SLEEP_CYCLES_PER_S))  # type: ignore[no-untyped-call]
        start.record()
        for number in range(count):
            work(number)
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3 / count


def copy_bytes_per_s(device: torch.device, repeats: int, num_bytes: int) -> float:
    """Bytes read and written a second while a tensor of `num_bytes` is copied on the device: what no kernel over memory outruns by much."""
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    timing = Clock(device).in_turns({"copy": lambda _: target.copy_(source)}, repeats)["copy"]
    return 2 * num_bytes / timing.median_s


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype, repeats: int, size: int) -> float:
    """Peak of square matrix products of this size."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    timing = Clock(device).in_turns({"product": lambda _: torch.mm(a, b, out=out)}, repeats)["product"]
    return 2 * size**3 / timing.median_s


def device_busy_s(device: torch.device, work: Callable[[], object]) -> tuple[float, float] | None:
    """Seconds in which a CUDA device was doing something while `work` ran, and from its first kernel to its last; None on a CPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize(device)
    spans = [
        (e.time_range.start, e.time_range.end) for e in found.events() or () if e.device_type.name == "CUDA"
    ]
    if not spans:
        raise RuntimeError("the profiler saw no kernel: CUPTI may not be allowed here")
    return covered(spans) / 1e6, (max(stop for _, stop in spans) - min(start for start, _ in spans)) / 1e6


# -- the machine


def machine(device: torch.device) -> dict[str, Any]:
    """What a result was measured on; clocks are read while the device is busy copying."""
    told: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        told |= {
            "device": properties.name, "capability": f"{properties.major}.{properties.minor}", "memory_gb": properties.total_memory / 1e9,
            "multiprocessors": properties.multi_processor_count, "l2_mb": getattr(properties, "L2_cache_size", 0) / 1e6, "under_load": _smi(device),
        }  # fmt: skip
    else:
        told["device"] = "cpu"
    return told


def versions() -> dict[str, str | None]:
    """Of everything that could move a figure."""
    told: dict[str, str | None] = {
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "linux": platform.release(),
    }
    for name in ("torch", "triton", "transformers", "numpy"):
        try:
            told[name] = version(name)
        except PackageNotFoundError:
            told[name] = None
    return told


def commit() -> str:
    """Of the working tree, with a mark where it is not what was committed."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head} and changes" if changed else head


def _smi(device: torch.device) -> dict[str, str] | str:
    buffer = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    for _ in range(4000):  # about a second of copies, queued
        buffer[: 1 << 27].copy_(buffer[1 << 27 :])
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(_SMI_FIELDS)}",
        "--format=csv,noheader",
        f"--id={device.index or 0}",
    ]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {error}"
    finally:
        torch.cuda.synchronize(device)
    return dict(zip(_SMI_FIELDS, map(str.strip, line.split(",")), strict=False))


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(
                (line.split(":", 1)[1].strip() for line in file if line.startswith("model name")),
                platform.processor(),
            )
    except OSError:
        return platform.processor()


# -- the report


class Report:
    """Everything one run found. Sole writer of stdout and of --out."""

    def __init__(self, benchmark: str, options: argparse.Namespace) -> None:
        """Look at the machine.

        Raises:
            SystemExit: there is no such device.
        """
        self.began_s = time.monotonic()
        self.options = options
        self.device = torch.device(options.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise SystemExit("there is no CUDA device here: --device cpu --quick shows that a script runs")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.clock = Clock(self.device)
        self.judges = self.device.type == "cuda" and not options.quick
        self._goals: list[Goal] = []
        self._content: dict[str, Any] = {
            "benchmark": f"gpu/{benchmark}", "commit": options.commit or commit(), "date": time.strftime("%Y-%m-%d %H:%M"),
            "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
            "config": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
            "quick": options.quick, "machine": machine(self.device), "versions": versions(), "limits": {}, "cases": {},
        }  # fmt: skip
        self.failed: list[str] = []
        self.left_out: list[str] = []

    @property
    def left_s(self) -> float:
        """Seconds until --limit-s."""
        return float(self.options.limit_s) - (time.monotonic() - self.began_s)

    def limit(self, name: str, value: float) -> float:
        """Note something measured that others are compared with."""
        self._content["limits"][name] = value
        self.say(f"{name}: {value:.4g}")
        return value

    def note(self, name: str, value: Any) -> None:
        """Note a fact about the run as a whole."""
        self._content[name] = value

    def case(self, name: str, figures: Mapping[str, Any], line: str) -> None:
        """Note what one case came to; `line` is for people."""
        self._content["cases"][name] = dict(figures)
        self.say(f"{name}: {line}")
        self._write()

    def goal(self, what: str, value: float, bound: float, *, at_least: bool, known: str = "") -> None:
        """Hold a figure against what it should be; see `Goal`."""
        self._goals.append(Goal(what, value, bound, at_least, known))

    def wrong(self, what: str) -> None:
        """Something is not right: the run will say so and fail."""
        self.failed.append(what)
        self.say(f"WRONG: {what}")
        self._write()

    def skip(self, name: str, why: str) -> None:
        """Name what was not measured."""
        self.left_out.append(f"{name}: {why}")
        self.say(f"{name}: not measured, {why}")

    def fits(self, name: str, seconds: float) -> bool:
        """Whether so long a case may still begin; if not, it is named."""
        if seconds <= self.left_s:
            return True
        self.skip(name, f"{self.left_s:.0f} s were left")
        return False

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """A case that may break without taking the others along."""
        try:
            yield
        except Exception as error:  # whatever it was, GPU time is short and the next case may be fine
            traceback.print_exc()
            self.wrong(f"{name}: {type(error).__name__}: {error}")
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def say(self, text: str) -> None:
        """A line for people."""
        print(f"[{time.monotonic() - self.began_s:5.0f} s] {text}", file=sys.stderr, flush=True)

    def finish(self) -> int:
        """Print the table and, as the last line of stdout, the JSON. Returns the exit status: 0 if nothing was wrong (goals may be missed)."""
        print(self._table(), file=sys.stderr)
        self._write()
        print(json.dumps(self._as_json()), flush=True)
        return 1 if self.failed else 0

    def _table(self) -> str:
        rows = [("goal", "value", "", "")]
        rows += [(goal.what, f"{goal.value:.3g}", str(goal), self._verdict(goal)) for goal in self._goals]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines += [f"wrong: {what}" for what in self.failed] + [
            f"not measured: {what}" for what in self.left_out
        ]
        return "\n".join(lines)

    def _verdict(self, goal: Goal) -> str:
        return goal.verdict if self.judges else "not judged here"

    def _as_json(self) -> dict[str, Any]:
        goals = [
            {
                "what": g.what,
                "value": g.value,
                "goal": str(g),
                "ratio": g.value / g.bound,
                "verdict": self._verdict(g),
            }
            for g in self._goals
        ]
        took_s = round(time.monotonic() - self.began_s, 1)
        return self._content | {
            "goals": goals,
            "wrong": self.failed,
            "not_measured": self.left_out,
            "took_s": took_s,
        }

    def _write(self) -> None:
        out: Path | None = self.options.out
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            part = out.with_name(out.name + ".part")
            part.write_text(json.dumps(self._as_json(), indent=1) + "\n")
            os.replace(part, out)
