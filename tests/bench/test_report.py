"""The numbers of a run, by hand; what the tables, the record and the picture say of them."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_fakes import FakeSystem, with_token
from rich.console import Console

from pensieve.bench.compare import run_users
from pensieve.bench.driver import RunProgress, ShownRun
from pensieve.bench.equality import compare_outputs
from pensieve.bench.plot import plot_first_token
from pensieve.bench.provenance import source_version
from pensieve.bench.record import build_record
from pensieve.bench.report import print_report, speedups, summarize
from pensieve.bench.runs import EarlyEnd, Run, RunSettings, Subject, TurnRecord
from pensieve.bench.systems import TurnRequest, TurnResult, failed_turn
from pensieve.core.receipt import Receipt
from pensieve.errors import ConfigError
from pensieve.reporting.json_file import write_json
from pensieve.workloads.arrivals import ThinkClass
from pensieve.workloads.conversations import Conversation

SUBJECT = Subject("tiny", "random", "float32", "cpu")
SETTINGS = RunSettings(request_interval_s=0.0, max_new_tokens=4)


def record(
    user: int,
    turn: int,
    first_s: float,
    total_s: float,
    tokens: tuple[int, int, int, int] | None,
    outputs: int = 10,
) -> TurnRecord:
    """One turn of conversation `user`; tokens = gpu, cpu, recomputed, new."""
    receipt = (
        None
        if tokens is None
        else Receipt(sum(tokens), *tokens, outputs, 0, 0, 1, 0, 0, 0.0, first_s, total_s)
    )
    result = TurnResult((1,), (2,) * outputs, "t", (), (), 0.0, 0.0, first_s, total_s, receipt, "stop")
    request = TurnRequest(f"c{user}", turn, "x", None, None, outputs, False)
    return TurnRecord(user, tuple(ThinkClass)[user % 3], request, result, 0.0, 0.0, total_s)


def failed(user: int, turn: int, code: str) -> TurnRecord:
    return replace(
        record(user, turn, 1.0, 1.0, None), result=failed_turn(code, "why", submitted_s=0.0, total_s=1.0)
    )


def a_run(system: str, *records: TurnRecord, ends: tuple[EarlyEnd, ...] = ()) -> Run:
    return Run(system, SETTINGS, records, ends, 10.0, "2026-01-02T03:04:05+00:00")


FAST = a_run(
    "fast",
    record(0, 0, 0.2, 1.2, (0, 0, 0, 100)),
    record(0, 1, 0.1, 1.1, (60, 30, 10, 20)),
    record(1, 0, 0.4, 1.4, (0, 0, 0, 300)),
    record(1, 1, 0.3, 1.3, (300, 0, 0, 40)),
    failed(1, 2, "context_length_exceeded"),
    failed(2, 0, "worker_failed"),
    ends=(EarlyEnd("c1", 2, 4, "context_length_exceeded", "x"), EarlyEnd("c2", 0, 0, "worker_failed", "why")),
)
SLOW = a_run(
    "slow", *(replace(r, result=replace(r.result, first_token_s=0.9, total_s=2.6)) for r in FAST.records[:4])
)


def test_the_numbers_of_a_run() -> None:
    found = summarize(FAST)
    first, second = found.by_turn
    assert (first.label, first.answers, first.gpu_tokens, first.new_tokens) == ("1", 2, 0, 200)
    assert first.first_token_median_s == pytest.approx(0.3)
    assert first.normalized_median_s == pytest.approx(0.13)
    assert (second.gpu_tokens, second.cpu_tokens, second.recomputed_tokens, second.new_tokens) == (
        180,
        15,
        5,
        30,
    )
    assert [(g.label, g.answers) for g in found.by_class] == [("hot", 2), ("warm", 2)]
    totals = found.totals
    assert (
        totals.answers,
        totals.failures,
        totals.context_full,
        totals.output_tokens,
        totals.suspensions,
    ) == (4, 1, 1, 40, 4)
    assert (totals.requests_per_s, totals.output_tokens_per_s) == pytest.approx((0.4, 4.0))
    assert (totals.gpu_share, totals.cpu_share, totals.recomputed_share) == pytest.approx((0.9, 0.075, 0.025))
    assert (totals.first_token_median_s, totals.later_first_token_median_s) == pytest.approx((0.25, 0.2))


def test_speedups_are_of_the_first_over_the_second() -> None:
    found = speedups(summarize(FAST).totals, summarize(SLOW).totals)
    assert found.first_token == pytest.approx(0.9 / 0.25)
    assert found.later_first_token == pytest.approx(0.9 / 0.2)
    assert found.normalized == pytest.approx(0.26 / 0.125)
    assert found.requests_per_s == pytest.approx(1.0)


def test_what_a_system_does_not_tell_is_not_made_up() -> None:
    found = summarize(a_run("mute", record(0, 0, 0.1, 1.0, None, outputs=0)))
    assert found.by_turn[0].gpu_tokens is None
    assert found.by_turn[0].normalized_median_s is None
    assert found.totals.gpu_share is None
    nothing = summarize(a_run("dead", failed(0, 0, "worker_failed")))
    assert nothing.by_turn == nothing.by_class == ()
    assert nothing.totals.first_token_median_s is None


def printed(*runs: Run, width: int = 80, **more: Any) -> str:
    out = io.StringIO()
    print_report([summarize(run) for run in runs], SUBJECT, Console(file=out, width=width), **more)
    return out.getvalue()


def test_the_report_says_everything_in_80_columns() -> None:
    text = printed(FAST, SLOW, notes=["2 are [repeats]"])
    assert "tiny, random weights, float32 on cpu" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["2", "fast", "2", "200", "120", "180", "15", "5", "30", "4.50×"] in rows
    assert ["slow", "2", "900", "260", "180", "15", "5", "30"] in rows
    assert ["hot", "fast", "2", "150", "115", "30", "15", "5", "60", "6.00×"] in rows
    assert "…" not in text
    assert "history found on gpu" in text
    assert (
        "fast against slow (above 1× is better): TTFT 3.60×, TTFT from turn 2 on 4.50×, normalized latency 2.08×"
        in text
    )
    assert "fast: ended: context full: c1 at turn 3" in text
    assert "fast: conversation c2 ended at turn 1: worker_failed: why" in text
    assert "note: 2 are [repeats]" in text


def test_a_long_name_is_told_once_and_short_in_the_tables() -> None:
    text = printed(FAST, replace(SLOW, system="stateless (nothing kept between turns)"))
    assert text.count("fast against stateless (nothing kept between turns)") == 1
    assert "fast against stateless (above 1×" in text
    assert ["stateless", "2", "900", "260", "180", "15", "5", "30"] in [
        line.split() for line in text.splitlines()
    ]


def test_a_report_of_one_run_has_no_speedup() -> None:
    text = printed(FAST)
    assert "×" not in text
    assert "against" not in text


def test_the_report_ends_with_the_verdict_and_an_example() -> None:
    class Tied(FakeSystem):
        def answer(self, turn: TurnRequest) -> TurnResult:
            return with_token(super().answer(turn), 1, 999, 0.0001)

    talks = [Conversation("c", None, ("one",))]
    first = run_users(FakeSystem("a"), talks, SETTINGS)
    second = run_users(Tied("b"), talks, SETTINGS, replay=first)
    text = printed(first, second, equality=compare_outputs(first, second, "float32"))
    assert "equal outputs under the contract (float32" in text
    assert "example: conversation c, turn 1, near tie: token 1 of the answer" in text


def test_the_record_holds_config_commit_machine_and_every_request(tmp_path: Path) -> None:
    equality = compare_outputs(FAST, SLOW, "float32")
    built = build_record(
        [FAST, SLOW],
        SUBJECT,
        {"model": "tiny", "cache": tmp_path, "nan": float("nan")},
        equality=equality,
        notes=["n"],
    )
    path = write_json(tmp_path / "deep" / "run.json", built)
    read = json.loads(path.read_text(encoding="utf-8"))
    assert read == built
    assert (read["weights"], read["model"], read["config"]) == (
        "random",
        "tiny",
        {"model": "tiny", "cache": str(tmp_path), "nan": None},
    )
    assert read["code"]["version"]
    assert read["platform"]["cores"] >= 1
    assert [len(run["requests"]) for run in read["runs"]] == [6, 4]
    request = read["runs"][0]["requests"][1]
    assert (request["think"], request["receipt"]["cpu_tokens"], request["first_token_s"]) == ("hot", 30, 0.1)
    assert read["runs"][0]["requests"][5]["error_code"] == "worker_failed"
    assert read["speedups"]["first_token"] == pytest.approx(3.6)
    assert read["equality"]["counts"]["failed in one"] == 2
    assert list(path.parent.iterdir()) == [path], "no temporary file stays"


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = write_json(tmp_path / "run.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_commit_is_ours_or_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    found = source_version()
    assert found["commit"] is None or len(found["commit"]) == 40
    monkeypatch.setenv("PATH", "")  # no git
    assert source_version()["commit"] is None


def test_the_plot_is_a_png_of_both_systems(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = plot_first_token(tmp_path / "plots" / "ttft.png", [FAST, SLOW], SUBJECT)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20], "big") == 1200
    with pytest.raises(ConfigError, match="nothing to plot"):
        plot_first_token(tmp_path / "none.png", [a_run("dead", failed(0, 0, "x"))], SUBJECT)


def test_without_matplotlib_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'pensieve-serve\[plot\]'"):
        plot_first_token(tmp_path / "x.png", [FAST], SUBJECT)


def test_progress_in_plain_lines() -> None:
    out = io.StringIO()
    talks = [Conversation(f"c{i}", None, ("one", "two")) for i in range(10)]
    run_users(FakeSystem(), talks, SETTINGS, ShownRun(Console(file=out, width=40)))
    lines = out.getvalue().splitlines()
    assert (lines[0], lines[-1]) == ("fake: 20 turns", "fake: 20/20 turns, 0 under way")
    assert len(lines) == 11, "a line a tenth"


def test_progress_in_plain_lines_says_who_ended_early() -> None:
    out = io.StringIO()
    run_users(
        FakeSystem(max_context=8),
        [Conversation("c", None, ("one", "two", "six"))],
        SETTINGS,
        ShownRun(Console(file=out)),
    )
    assert (
        out.getvalue().splitlines()[-1]
        == "fake: conversation c ended at turn 2, 1 more not sent: context full"
    )


def test_progress_on_a_terminal_is_one_bar() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, legacy_windows=False)
    listener = ShownRun(console)
    for name in ("a", "b"):
        run_users(
            FakeSystem(name, max_context=8),
            [Conversation("c[/x]", None, ("one", "two", "six"))],
            SETTINGS,
            listener,
        )
    text = out.getvalue()
    assert "2/2" in text
    assert "turns, 0 under way" in text
    assert "conversation c[/x] ended at turn 2" in text, "names are not markup"
    listener.end(RunProgress(0))
