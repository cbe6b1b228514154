"""What `pensieve compare` measured, as a JSON record: configuration, commit, machine and every request. Draws
no conclusions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pensieve.bench.equality import Equality
from pensieve.bench.provenance import machine, source_version, versions
from pensieve.bench.report import speedups, summarize
from pensieve.bench.runs import Run, Subject, TurnRecord
from pensieve.reporting.json_file import plain

SCHEMA = 1  # of the file; rises when a field changes its meaning


def build_record(
    runs: Sequence[Run],
    subject: Subject,
    config: Mapping[str, object],
    *,
    equality: Equality | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything about one measurement, in JSON's own types.

    Args:
        runs: one run, or two of which the second is the baseline.
        subject: what was measured.
        config: the options it was started with; dataclasses, enums and paths are allowed.
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
    built: dict[str, Any] = plain(record)
    return built


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
