"""Runs in numbers and tables. Knows results; nothing of how they came about.

Normalized latency is a turn's end-to-end latency divided by its output tokens (paper, evaluation). Throughput is that of a
closed loop: users who think keep it down, so two systems that both keep up differ in latency and not in requests a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pensieve.bench.equality import Equality
from pensieve.bench.runs import EarlyEnd, Run, Subject, TurnRecord, short_name
from pensieve.workloads.arrivals import ThinkClass

_NAME_CHARS = 12  # of a system's name in a table of many columns


@dataclass(frozen=True, slots=True)
class Group:
    """Some answered turns of one run: those with one index, or of one class of users. None = not told by the system."""

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
        first_token=_ratio(second.first_token_median_s, first.first_token_median_s),
        later_first_token=_ratio(second.later_first_token_median_s, first.later_first_token_median_s),
        normalized=_ratio(second.normalized_median_s, first.normalized_median_s),
        requests_per_s=_ratio(first.requests_per_s, second.requests_per_s),
        output_tokens_per_s=_ratio(first.output_tokens_per_s, second.output_tokens_per_s),
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

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    line("")
    line(str(subject))
    if any(_is_long(summary.system) for summary in summaries):
        line(" against ".join(summary.system for summary in summaries))
    line(
        "n answers; medians of time to first token and of normalized latency; mean tokens a turn by where they came from\n"
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
                f"  example: conversation {example.conversation_id}, turn {example.turn_index + 1}, {example.verdict.value}: {example.reason}"
            )


def _group(label: str, records: Sequence[TurnRecord]) -> Group:
    receipts = [record.result.receipt for record in records if record.result.receipt is not None]
    return Group(
        label,
        len(records),
        _median(record.result.first_token_s for record in records),
        _median(_normalized_s(record) for record in records),
        _mean(r.gpu_tokens for r in receipts),
        _mean(r.cpu_tokens for r in receipts),
        _mean(r.recomputed_tokens for r in receipts),
        _mean(r.new_tokens for r in receipts),
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
        requests_per_s=_ratio(len(answered), run.duration_s),
        output_tokens=output_tokens,
        output_tokens_per_s=_ratio(output_tokens, run.duration_s),
        first_token_median_s=_median(record.result.first_token_s for record in answered),
        later_first_token_median_s=_median(
            record.result.first_token_s for record in answered if record.request.turn_index
        ),
        normalized_median_s=_median(_normalized_s(record) for record in answered),
        gpu_share=_ratio(gpu, findable),
        cpu_share=_ratio(cpu, findable),
        recomputed_share=_ratio(recomputed, findable),
        suspensions=sum(r.suspensions for r in receipts),
        truncated_tokens=sum(r.truncated_tokens for r in receipts),
    )


def _normalized_s(record: TurnRecord) -> float | None:
    return _ratio(record.result.total_s, record.result.num_output)


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _median(values: Iterable[float | None]) -> float | None:
    told = [value for value in values if value is not None]
    return median(told) if told else None


def _mean(values: Iterable[float]) -> float | None:
    told = list(values)
    return fmean(told) if told else None


def _group_table(
    title: str, what: str, sides: Sequence[Sequence[Group]], summaries: Sequence[RunSummary]
) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )  # fits 80 columns
    table.add_column(what, no_wrap=True)
    table.add_column("system", max_width=_NAME_CHARS, overflow="ellipsis", no_wrap=True)
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
        table.add_column(name, justify="right", no_wrap=True)
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
            row += [_ms(group.first_token_median_s), _ms(group.normalized_median_s)]
            row += [
                _tokens(n)
                for n in (group.gpu_tokens, group.cpu_tokens, group.recomputed_tokens, group.new_tokens)
            ]
            if len(sides) == 2:
                other = found[1] if index == 0 else None
                row.append(
                    _times(_ratio(other.first_token_median_s, group.first_token_median_s)) if other else ""
                )
            table.add_row(*row)
        if len(sides) == 2:
            table.add_section()
    return table


_TOTAL_ROWS: tuple[tuple[str, Callable[[Totals], str]], ...] = (
    ("answers", lambda t: str(t.answers)),
    ("failed", lambda t: str(t.failures)),
    ("seconds", lambda t: f"{t.duration_s:.2f}"),
    ("requests/s", lambda t: _number(t.requests_per_s)),
    ("output tokens/s", lambda t: _number(t.output_tokens_per_s)),
    ("TTFT, median ms", lambda t: _ms(t.first_token_median_s)),
    ("TTFT from turn 2 on, median ms", lambda t: _ms(t.later_first_token_median_s)),
    ("normalized latency, median ms/token", lambda t: _ms(t.normalized_median_s)),
    ("history found on gpu", lambda t: _percent(t.gpu_share)),
    ("history swapped in from cpu", lambda t: _percent(t.cpu_share)),
    ("history recomputed", lambda t: _percent(t.recomputed_share)),
    ("suspensions", lambda t: str(t.suspensions)),
)


def _totals_table(summaries: Sequence[RunSummary]) -> Table:
    table = Table(
        title="Totals",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("")
    for summary in summaries:
        table.add_column(short_name(summary.system), justify="right")
    for name, show in _TOTAL_ROWS:
        table.add_row(name, *(show(summary.totals) for summary in summaries))
    return table


def _speedup_line(first: RunSummary, second: RunSummary) -> str:
    ratios = speedups(first.totals, second.totals)
    told = (
        ("TTFT", ratios.first_token),
        ("TTFT from turn 2 on", ratios.later_first_token),
        ("normalized latency", ratios.normalized),
        ("requests/s", ratios.requests_per_s),
        ("output tokens/s", ratios.output_tokens_per_s),
    )
    words = ", ".join(f"{name} {_times(ratio)}" for name, ratio in told if ratio is not None)
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


def _ms(value_s: float | None) -> str:
    if value_s is None:
        return "–"
    ms = value_s * 1000
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}"


def _tokens(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.2f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}×"
