"""Runs in numbers and tables. Knows results; nothing of how they came about.

Normalized latency is a turn's end-to-end latency divided by its output tokens (paper, evaluation). Throughput
is that of a closed loop: users who think keep it down, so two systems that both keep up differ in latency and
not in requests a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from pensieve.bench.equality import Equality
from pensieve.bench.runs import EarlyEnd, Run, Subject, TurnRecord, short_name
from pensieve.reporting.tables import (
    line_printer,
    mean_or_none,
    median_or_none,
    ratio,
    shown_count,
    shown_number,
    shown_ratio,
    shown_s_as_ms,
    shown_share,
    table,
)
from pensieve.workloads.arrivals import ThinkClass

_NAME_CHARS = 12  # of a system's name in a table of many columns


@dataclass(frozen=True, slots=True)
class Group:
    """Some answered turns of one run: those with one index, or of one class of users. None = not told by the
    system.
    """

    label: str
    answers: int
    first_token_median_s: float | None
    normalized_median_s: float | None  # seconds of latency per output token
    gpu_tokens: float | None  # mean tokens a turn, from the receipts; see messages.Receipt
    cpu_tokens: float | None
    recomputed_tokens: float | None
    new_tokens: float | None


@dataclass(frozen=True, slots=True)
class Totals:
    """One run as a whole. None = not told by the system, or nothing to divide by."""

    answers: int
    failures: int  # full contexts not counted
    context_full: int  # conversations that ended because the context was full
    duration_s: float
    requests_per_s: float | None  # answered turns over the duration
    output_tokens: int
    output_tokens_per_s: float | None
    first_token_median_s: float | None
    later_first_token_median_s: float | None  # of turns with a history: all but the first ones
    normalized_median_s: float | None
    gpu_share: float | None  # of the tokens that could be found (gpu + cpu + recomputed): found on the gpu
    cpu_share: float | None
    recomputed_share: float | None
    suspensions: int
    truncated_tokens: int


@dataclass(frozen=True, slots=True)
class RunSummary:
    """Everything a report says of one run."""

    system: str
    by_turn: tuple[Group, ...]
    by_class: tuple[Group, ...]
    totals: Totals
    early_ends: tuple[EarlyEnd, ...]


@dataclass(frozen=True, slots=True)
class Speedups:
    """How many times better the first system did than the second; above 1 is better. None = cannot be told."""

    first_token: float | None  # ratio of medians
    later_first_token: float | None  # the same, turns with a history only
    normalized: float | None  # ratio of medians
    requests_per_s: float | None
    output_tokens_per_s: float | None


def summarize(run: Run) -> RunSummary:
    """The numbers of one run."""
    answered = list(run.answered())
    turns = sorted({record.request.turn_index for record in answered})
    by_turn = tuple(
        _group(str(turn + 1), [r for r in answered if r.request.turn_index == turn]) for turn in turns
    )
    by_class = tuple(_group(think.value, [r for r in answered if r.think is think]) for think in ThinkClass)
    return RunSummary(
        run.system,
        by_turn,
        tuple(group for group in by_class if group.answers),
        _totals(run, answered),
        run.early_ends,
    )


def speedups(first: Totals, second: Totals) -> Speedups:
    """The first system against the second."""
    return Speedups(
        first_token=ratio(second.first_token_median_s, first.first_token_median_s),
        later_first_token=ratio(second.later_first_token_median_s, first.later_first_token_median_s),
        normalized=ratio(second.normalized_median_s, first.normalized_median_s),
        requests_per_s=ratio(first.requests_per_s, second.requests_per_s),
        output_tokens_per_s=ratio(first.output_tokens_per_s, second.output_tokens_per_s),
    )


def print_report(
    summaries: Sequence[RunSummary],
    subject: Subject,
    console: Console,
    *,
    equality: Equality | None = None,
    notes: Iterable[str] = (),
) -> None:
    """Tables by turn, by class of user and of totals, then what the reader must know.

    Args:
        summaries: one run, or two of which the second is the baseline.
        subject: what was measured.
        console: where to.
        equality: the verdict on two runs.
        notes: more lines, of how the conversations were picked for instance.
    """
    line = line_printer(console)
    line("")
    line(str(subject))
    if any(_is_long(summary.system) for summary in summaries):
        line(" against ".join(summary.system for summary in summaries))
    line(
        "n answers; medians of time to first token and of normalized latency; mean tokens a turn by where "
        "they came from\n"
    )
    console.print(_group_table("By turn", "turn", [s.by_turn for s in summaries], summaries))
    line("")
    console.print(
        _group_table(
            "By user (hot ones come back soonest)", "user", [s.by_class for s in summaries], summaries
        )
    )
    line("")
    console.print(_totals_table(summaries))
    line("")
    if len(summaries) == 2:
        line(_speedup_line(summaries[0], summaries[1]))
    for text in _end_lines(summaries):
        line(text)
    for text in notes:
        line(f"note: {text}")
    if equality is not None:
        line(equality.verdict_line())
        if (example := equality.example) is not None:
            line(
                f"  example: conversation {example.conversation_id}, turn {example.turn_index + 1}, "
                f"{example.verdict.value}: {example.reason}"
            )


def _group(label: str, records: Sequence[TurnRecord]) -> Group:
    receipts = [record.result.receipt for record in records if record.result.receipt is not None]
    return Group(
        label,
        len(records),
        median_or_none(record.result.first_token_s for record in records),
        median_or_none(_normalized_s(record) for record in records),
        mean_or_none(r.gpu_tokens for r in receipts),
        mean_or_none(r.cpu_tokens for r in receipts),
        mean_or_none(r.recomputed_tokens for r in receipts),
        mean_or_none(r.new_tokens for r in receipts),
    )


def _totals(run: Run, answered: Sequence[TurnRecord]) -> Totals:
    receipts = [record.result.receipt for record in answered if record.result.receipt is not None]
    gpu, cpu = sum(r.gpu_tokens for r in receipts), sum(r.cpu_tokens for r in receipts)
    recomputed = sum(r.recomputed_tokens for r in receipts)
    findable = gpu + cpu + recomputed
    context_full = sum(end.context_full for end in run.early_ends)
    output_tokens = sum(record.result.num_output for record in answered)
    return Totals(
        answers=len(answered),
        failures=len(run.records) - len(answered) - context_full,
        context_full=context_full,
        duration_s=run.duration_s,
        requests_per_s=ratio(len(answered), run.duration_s),
        output_tokens=output_tokens,
        output_tokens_per_s=ratio(output_tokens, run.duration_s),
        first_token_median_s=median_or_none(record.result.first_token_s for record in answered),
        later_first_token_median_s=median_or_none(
            record.result.first_token_s for record in answered if record.request.turn_index
        ),
        normalized_median_s=median_or_none(_normalized_s(record) for record in answered),
        gpu_share=ratio(gpu, findable),
        cpu_share=ratio(cpu, findable),
        recomputed_share=ratio(recomputed, findable),
        suspensions=sum(r.suspensions for r in receipts),
        truncated_tokens=sum(r.truncated_tokens for r in receipts),
    )


def _normalized_s(record: TurnRecord) -> float | None:
    return ratio(record.result.total_s, record.result.num_output)


def _group_table(
    title: str, what: str, sides: Sequence[Sequence[Group]], summaries: Sequence[RunSummary]
) -> Table:
    rows = table(title)  # fits 80 columns
    rows.add_column(what, no_wrap=True)
    rows.add_column("system", max_width=_NAME_CHARS, overflow="ellipsis", no_wrap=True)
    for name in (
        "n",
        "TTFT ms",
        "ms/token",
        "gpu",
        "cpu",
        "recomp.",
        "new",
        *(["TTFT ×"] if len(sides) == 2 else []),
    ):
        rows.add_column(name, justify="right", no_wrap=True)
    labels = list(dict.fromkeys(group.label for side in sides for group in side))
    for label in labels:
        found = [next((group for group in side if group.label == label), None) for side in sides]
        for index, group in enumerate(found):
            if group is None:
                continue
            row = [
                label if index == 0 or found[0] is None else "",
                short_name(summaries[index].system),
                str(group.answers),
            ]
            row += [shown_s_as_ms(group.first_token_median_s), shown_s_as_ms(group.normalized_median_s)]
            row += [
                shown_count(n)
                for n in (group.gpu_tokens, group.cpu_tokens, group.recomputed_tokens, group.new_tokens)
            ]
            if len(sides) == 2:
                other = found[1] if index == 0 else None
                row.append(
                    shown_ratio(ratio(other.first_token_median_s, group.first_token_median_s))
                    if other
                    else ""
                )
            rows.add_row(*row)
        if len(sides) == 2:
            rows.add_section()
    return rows


_TOTAL_ROWS: tuple[tuple[str, Callable[[Totals], str]], ...] = (
    ("answers", lambda t: str(t.answers)),
    ("failed", lambda t: str(t.failures)),
    ("seconds", lambda t: f"{t.duration_s:.2f}"),
    ("requests/s", lambda t: shown_number(t.requests_per_s)),
    ("output tokens/s", lambda t: shown_number(t.output_tokens_per_s)),
    ("TTFT, median ms", lambda t: shown_s_as_ms(t.first_token_median_s)),
    ("TTFT from turn 2 on, median ms", lambda t: shown_s_as_ms(t.later_first_token_median_s)),
    ("normalized latency, median ms/token", lambda t: shown_s_as_ms(t.normalized_median_s)),
    ("history found on gpu", lambda t: shown_share(t.gpu_share)),
    ("history swapped in from cpu", lambda t: shown_share(t.cpu_share)),
    ("history recomputed", lambda t: shown_share(t.recomputed_share)),
    ("suspensions", lambda t: str(t.suspensions)),
)


def _totals_table(summaries: Sequence[RunSummary]) -> Table:
    rows = table("Totals")
    rows.add_column("")
    for summary in summaries:
        rows.add_column(short_name(summary.system), justify="right")
    for name, show in _TOTAL_ROWS:
        rows.add_row(name, *(show(summary.totals) for summary in summaries))
    return rows


def _speedup_line(first: RunSummary, second: RunSummary) -> str:
    ratios = speedups(first.totals, second.totals)
    told = (
        ("TTFT", ratios.first_token),
        ("TTFT from turn 2 on", ratios.later_first_token),
        ("normalized latency", ratios.normalized),
        ("requests/s", ratios.requests_per_s),
        ("output tokens/s", ratios.output_tokens_per_s),
    )
    words = ", ".join(f"{name} {shown_ratio(times)}" for name, times in told if times is not None)
    return f"{short_name(first.system)} against {short_name(second.system)} (above 1× is better): {words or 'nothing to compare'}"


def _end_lines(summaries: Sequence[RunSummary]) -> list[str]:
    """Conversations that ended early; full contexts in one line, since they are the workload's doing."""
    lines = []
    for summary in summaries:
        name = short_name(summary.system)
        full = [end for end in summary.early_ends if end.context_full]
        if full:
            names = ", ".join(f"{end.conversation_id} at turn {end.turn_index + 1}" for end in full)
            lines.append(f"{name}: ended: context full: {names}")
        lines += [f"{name}: {end}" for end in summary.early_ends if not end.context_full]
        if summary.totals.truncated_tokens:
            lines.append(
                f"{name}: {summary.totals.truncated_tokens} tokens of history were left out to fit the context"
            )
    return lines


def _is_long(name: str) -> bool:
    return name != short_name(name) or len(name) > _NAME_CHARS
