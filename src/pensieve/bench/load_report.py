"""A load run in numbers, tables and JSON. Knows requests; nothing of how they were made."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from pensieve.bench.load import LoadRecord, LoadRun
from pensieve.bench.probe import Target
from pensieve.bench.provenance import source_version
from pensieve.reporting.json_file import plain
from pensieve.reporting.spread import Spread
from pensieve.reporting.tables import line_printer, mean_or_none, shown_count, shown_ms, table

KIND, VERSION = "pensieve-bench", 1
MAX_FAILURES_SHOWN = 5
_LEAST_STEADY_SHARE = 0.25  # of the time in which conversations arrived


@dataclass(frozen=True, slots=True)
class TurnFigures:
    """The answered requests of one turn index."""

    turn: int
    requests: int
    ttft_ms: Spread
    normalized_ms: Spread
    cached_tokens: float | None  # mean; None = not told
    prompt_tokens: float | None  # mean; None = not told
    new_tokens: (
        float | None
    )  # mean of what the prompt has beyond the prompt and answer before it, the template's tokens included


@dataclass(frozen=True, slots=True)
class RunFigures:
    """One run; times of answered requests only."""

    rate: float | None
    wall_s: float
    requests: int  # sent
    failed: int
    turns_not_sent: int
    requests_per_s: float  # answered
    steady_requests_per_s: (
        float | None
        # answered, between the end of the first conversation and the last arrival; None: a closed loop, or
        # too short
    )
    output_tokens: int
    output_tokens_per_s: float
    prompt_tokens: int | None  # None = no request told
    cached_tokens: int | None
    ttft_ms: Spread
    normalized_ms: Spread  # latency over output tokens
    inter_token_ms: Spread  # of each request's mean time between tokens
    piece_gap_ms: Spread  # of all gaps between pieces of a stream; a piece may hold several tokens
    latency_ms: Spread
    late_ms: Spread  # how much later than due requests were sent: the client's own lag
    by_turn: tuple[TurnFigures, ...]
    client_cpu_s: float
    client_cpu_share: float  # of one core


def figures(run: LoadRun) -> RunFigures:
    """The numbers of one run."""
    answered = [record for record in run.records if record.ok]
    output_tokens = sum(record.output_tokens or 0 for record in answered)
    return RunFigures(
        rate=run.rate,
        wall_s=run.wall_s,
        requests=len(run.records),
        failed=len(run.records) - len(answered),
        turns_not_sent=run.turns_not_sent,
        requests_per_s=_per(len(answered), run.wall_s),
        steady_requests_per_s=_steady(run),
        output_tokens=output_tokens,
        output_tokens_per_s=_per(output_tokens, run.wall_s),
        prompt_tokens=_sum(record.prompt_tokens for record in answered),
        cached_tokens=_sum(record.cached_tokens for record in answered),
        ttft_ms=_ms(record.ttft_s for record in answered),
        normalized_ms=_ms(record.normalized_s for record in answered),
        inter_token_ms=_ms(record.inter_token_s for record in answered),
        piece_gap_ms=_ms(gap_s for record in answered for gap_s in record.gaps_s),
        latency_ms=_ms(record.latency_s for record in answered),
        late_ms=_ms(max(0.0, record.submitted_s - record.due_s) for record in run.records),
        by_turn=_by_turn(answered),
        client_cpu_s=run.client_cpu_s,
        client_cpu_share=_per(run.client_cpu_s, run.wall_s),
    )


def build_json(
    runs: Sequence[LoadRun],
    target: Target,
    config: Mapping[str, Any],
    command: Sequence[str],
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything about a measurement, as JSON's own types.

    Args:
        runs: one, or one for each rate of a sweep.
        target: the server.
        config: what was asked for.
        command: the command line, without secrets.
        notes: what a reader must know.
    """
    source = source_version()
    built: dict[str, Any] = plain(
        {
            "kind": KIND,
            "version": VERSION,
            "commit": source["commit"],
            "dirty": source["dirty"],
            "command": list(command),
            "python": platform.python_version(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "target": asdict(target),
            "config": dict(config),
            "notes": list(notes),
            "runs": [asdict(figures(run)) for run in runs],
            "requests": [_request(index, record) for index, run in enumerate(runs) for record in run.records],
        }
    )
    return built


def failure_lines(runs: Sequence[LoadRun]) -> list[str]:
    """The first few failures, and how many more there are."""
    failed = [(run, record) for run in runs for record in run.records if not record.ok]
    lines = [
        f"failed: conversation {record.conversation}, turn {record.turn}"
        + (f" at {run.rate:g} requests/s" if run.rate is not None else "")
        + f": {record.error}"
        for run, record in failed[:MAX_FAILURES_SHOWN]
    ]
    if len(failed) > MAX_FAILURES_SHOWN:
        lines.append(f"failed: {len(failed) - MAX_FAILURES_SHOWN} more requests, see the JSON")
    return lines


def print_load_report(
    runs: Sequence[LoadRun], target: Target, console: Console, notes: Sequence[str] = ()
) -> None:
    """Tables by turn and of totals, or one with a row for each rate, and what the reader must know."""
    line = line_printer(console)
    all_figures = [figures(run) for run in runs]
    line("")
    line(f"{target.model} at {target.url}" + (f" ({target.server})" if target.server else ""))
    line("")
    if len(all_figures) > 1:
        console.print(_sweep_table(all_figures))
    else:
        console.print(_turn_table(all_figures[0]))
        line("")
        console.print(_totals_table(all_figures[0]))
    line("")
    for note in (*target.notes, *notes):
        line(f"note: {note}")


# -- numbers


def _by_turn(answered: Sequence[LoadRecord]) -> tuple[TurnFigures, ...]:
    added = _added_tokens(answered)
    result = []
    for turn in sorted({record.turn for record in answered}):
        records = [record for record in answered if record.turn == turn]
        result.append(
            TurnFigures(
                turn,
                len(records),
                _ms(record.ttft_s for record in records),
                _ms(record.normalized_s for record in records),
                mean_or_none(record.cached_tokens for record in records),
                mean_or_none(record.prompt_tokens for record in records),
                mean_or_none(added.get((record.conversation, turn)) for record in records),
            )
        )
    return tuple(result)


def _added_tokens(answered: Sequence[LoadRecord]) -> dict[tuple[int, int], int]:
    """Tokens of each prompt beyond the prompt and the answer before it, by conversation and turn."""
    by_key = {(record.conversation, record.turn): record for record in answered}
    added = {}
    for (conversation, turn), record in by_key.items():
        if record.prompt_tokens is None:
            continue
        before = by_key.get((conversation, turn - 1))
        if turn == 0:
            added[conversation, turn] = record.prompt_tokens
        elif before is not None and before.prompt_tokens is not None:
            added[conversation, turn] = (
                record.prompt_tokens - before.prompt_tokens - (before.output_tokens or 0)
            )
    return added


def _steady(run: LoadRun) -> float | None:
    """Throughput without the time in which the first users are still at their first turns, and without the
    time after the last arrival.
    """
    if run.arrivals_s is None:
        return None
    last_turn: dict[int, float] = {}
    for record in run.records:
        last_turn[record.conversation] = record.submitted_s + record.latency_s
    begin_s = min(last_turn.values(), default=run.arrivals_s)
    if run.arrivals_s - begin_s < _LEAST_STEADY_SHARE * run.arrivals_s:
        return None
    ended = sum(
        record.ok and begin_s < record.submitted_s + record.latency_s <= run.arrivals_s
        for record in run.records
    )
    return ended / (run.arrivals_s - begin_s)


def _ms(values_s: Any) -> Spread:
    return Spread.of(1e3 * value_s for value_s in values_s if value_s is not None)


def _sum(values: Any) -> int | None:
    told = [value for value in values if value is not None]
    return sum(told) if told else None


def _per(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0


def _request(run: int, record: LoadRecord) -> dict[str, Any]:
    return {
        "run": run,
        "conversation": record.conversation,
        "turn": record.turn,
        "submitted_s": round(record.submitted_s, 6),
        "ttft_s": None if record.ttft_s is None else round(record.ttft_s, 6),
        "latency_s": round(record.latency_s, 6),
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "output_tokens": record.output_tokens,
        "error": record.error,
    }


# -- tables


def _turn_table(found: RunFigures) -> Table:
    rows = table("By turn")
    for name in (
        "turn",
        "n",
        "TTFT p50",
        "p90",
        "p99 ms",
        "ms/token p50",
        "p90",
        "prompt",
        "cached",
        "new tokens",
    ):
        rows.add_column(name, justify="right", no_wrap=True)
    for turn in found.by_turn:
        ttft, normalized = turn.ttft_ms, turn.normalized_ms
        row = [
            str(turn.turn),
            str(turn.requests),
            *map(shown_ms, (ttft.p50, ttft.p90, ttft.p99, normalized.p50, normalized.p90)),
        ]
        rows.add_row(*row, *map(shown_count, (turn.prompt_tokens, turn.cached_tokens, turn.new_tokens)))
    return rows


def _totals_table(found: RunFigures) -> Table:
    rows = table("Totals")
    rows.add_column("")
    rows.add_column("", justify="right", no_wrap=True)
    rows.add_row("requests (failed)", f"{found.requests} ({found.failed})")
    rows.add_row("seconds", f"{found.wall_s:.1f}")
    rows.add_row("requests/s", f"{found.requests_per_s:.2f}")
    if found.steady_requests_per_s is not None:
        rows.add_row("requests/s while conversations arrive", f"{found.steady_requests_per_s:.2f}")
    rows.add_row("output tokens/s", f"{found.output_tokens_per_s:.1f}")
    spreads = {
        "TTFT": found.ttft_ms,
        "normalized latency": found.normalized_ms,
        "between tokens": found.inter_token_ms,
        "latency": found.latency_ms,
    }
    for name, times in spreads.items():
        rows.add_row(
            f"{name}, p50 / p90 / p99 ms", " / ".join(map(shown_ms, (times.p50, times.p90, times.p99)))
        )
    cached = _share(found)
    rows.add_row(
        "prompt tokens found cached",
        cached if found.cached_tokens is None else f"{found.cached_tokens:,} ({cached})",
    )
    rows.add_row("this client's CPU", f"{found.client_cpu_s:.2f} s ({found.client_cpu_share:.1%} of a core)")
    return rows


def _sweep_table(all_figures: Sequence[RunFigures]) -> Table:
    rows = table("By rate (TTFT in ms, and ms a token: p50 and p90)")
    for name in ("rate", "n", "failed", "req/s", "steady", "tok/s", "TTFT", "p90", "ms/tok", "p90", "cached"):
        rows.add_column(name, justify="right", no_wrap=True)
    for found in all_figures:
        steady = "–" if found.steady_requests_per_s is None else f"{found.steady_requests_per_s:.2f}"
        counts = [f"{found.rate:g}", str(found.requests), str(found.failed)]
        rates = [f"{found.requests_per_s:.2f}", steady, f"{found.output_tokens_per_s:.1f}"]
        times = (found.ttft_ms.p50, found.ttft_ms.p90, found.normalized_ms.p50, found.normalized_ms.p90)
        rows.add_row(*counts, *rates, *map(shown_ms, times), _share(found))
    return rows


def _share(found: RunFigures) -> str:
    if found.cached_tokens is None or not found.prompt_tokens:
        return "not told"
    return f"{found.cached_tokens / found.prompt_tokens:.1%}"
