"""A measurement on disk: configuration, commit, machine and every request, as JSON. Knows files; draws no conclusions."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

import pensieve
from pensieve.bench.equality import Equality
from pensieve.bench.report import speedups, summarize
from pensieve.bench.runs import Run, Subject, TurnRecord
from pensieve.machine import cpu_name, write_whole

SCHEMA = 1  # of the file; goes up when a field changes its meaning
_PACKAGES = ("torch", "transformers", "numpy", "safetensors", "triton")


def build_record(
    runs: Sequence[Run],
    subject: Subject,
    config: Mapping[str, object],
    *,
    equality: Equality | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything about one measurement as JSON-ready values; numbers that are none become null.

    Args:
        runs: one run, or two of which the second is the baseline.
        subject: what was measured.
        config: the options it was started with (dataclasses, enums and paths are understood).
        equality: the verdict on two runs.
        notes: what a reader must know.
    """
    summaries = [summarize(run) for run in runs]
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": subject.model,
        "weights": subject.weights,
        "dtype": subject.dtype,
        "device": subject.device,
        "config": config,
        "code": source_version(),
        "platform": machine(),
        "versions": versions(),
        "notes": list(notes),
        "runs": [
            {
                "system": run.system,
                "started_at": run.started_at,
                "settings": run.settings,
                "summary": summary,
                "requests": [_request(turn) for turn in run.records],
            }
            for run, summary in zip(runs, summaries, strict=True)
        ],
    }
    if len(runs) == 2:
        record["speedups"] = speedups(summaries[0].totals, summaries[1].totals)
    if equality is not None:
        record["equality"] = {
            "equal": equality.equal,
            "verdict": equality.verdict_line(),
            "tolerance": equality.tolerance,
            "max_logprob_difference": equality.max_delta,
            "mean_logprob_difference": equality.mean_delta,
            "counts": {verdict.value: count for verdict, count in equality.counts.items()},
            "turns": equality.turns,
        }
    plain = _plain(record)
    assert isinstance(plain, dict)
    return plain


def write_record(path: str | Path, record: Mapping[str, Any]) -> Path:
    """Write it whole or not at all; folders on the way are made."""
    target = Path(path)
    write_whole(target, json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return target


def source_version() -> dict[str, Any]:
    """The version, and the commit if this package runs from its own git checkout (`dirty`: with changes on top)."""
    found: dict[str, Any] = {"version": pensieve.__version__, "commit": None, "dirty": None}
    here = Path(pensieve.__file__).resolve().parent
    if _git(here, "ls-files", "--error-unmatch", "__init__.py") is None:
        return found  # installed, or in somebody else's checkout
    found["commit"] = (_git(here, "rev-parse", "HEAD") or "").strip() or None
    status = _git(here, "status", "--porcelain", "--untracked-files=no")
    found["dirty"] = None if status is None else bool(status.strip())
    return found


def machine() -> dict[str, Any]:
    """What it ran on."""
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that decide speed and results, where installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _request(turn: TurnRecord) -> dict[str, Any]:
    request, result = turn.request, turn.result
    return {
        "conversation": request.conversation_id,
        "turn": request.turn_index,
        "user": turn.user,
        "think": turn.think,
        "due_s": turn.due_s,
        "sent_s": turn.sent_s,
        "done_s": turn.done_s,
        "prompt_tokens": len(result.prompt_path)
        or (result.receipt.prompt_tokens if result.receipt else None),
        "output_tokens": result.num_output,
        "output": list(result.output),
        "text": result.text,
        "queue_s": result.queue_s,
        "first_token_s": result.first_token_s,
        "total_s": result.total_s,
        "finish_reason": result.finish_reason,
        "error_code": result.error_code,
        "error": result.error,
        "receipt": result.receipt,
    }


def _plain(value: object) -> object:
    """JSON's own types; what JSON has no word for becomes null (numbers) or its text."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command; None if it failed or there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
