"""The benchmarks for a GPU, in miniature and without one: they run, they tell the truth about it, and they notice what is wrong."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import kernel, paged, serving, transfers
from gpu.arrivals import (
    Answer,
    Lengths,
    Load,
    Run,
    Sent,
    crossing_of,
    figures,
    next_rate,
    percentile,
    play,
    ratio_of,
    sweep,
)
from gpu.common import Clock, Goal, Report, covered, parser
from gpu.paged import TOLERANCES, Heads, PagedCase, worst_error
from peers.curve import Crossing

from pensieve.worker.attention.reference import attend_one
from pensieve.workloads.arrivals import ThinkTime
from pensieve.workloads.scripts import Player, Script, ScriptTurn

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
CPU = torch.device("cpu")
FAKE_VLLM = {
    "vllm/__init__.py": "from vllm.sampling_params import SamplingParams\n",
    "vllm/engine/__init__.py": "",
    "vllm/v1/__init__.py": "",
    "vllm/v1/engine/__init__.py": "",
    "vllm/sampling_params.py": """
import enum
class RequestOutputKind(enum.Enum):
    DELTA = 1
class SamplingParams:
    def __init__(self, *, max_tokens, ignore_eos, temperature, detokenize, output_kind):
        assert ignore_eos and temperature == 0.0 and not detokenize and output_kind is RequestOutputKind.DELTA
        self.max_tokens = max_tokens
""",
    "vllm/engine/arg_utils.py": """
import json, pathlib
class AsyncEngineArgs:
    def __init__(self, *, model, skip_tokenizer_init, load_format, dtype, max_model_len, enable_prefix_caching, kv_cache_memory_bytes, kv_offloading_size):
        assert json.loads((pathlib.Path(model) / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
        assert load_format == "dummy" and enable_prefix_caching and kv_cache_memory_bytes > 0 and kv_offloading_size > 0
""",
    "vllm/v1/engine/async_llm.py": """
import asyncio
from types import SimpleNamespace
class AsyncLLM:
    @classmethod
    def from_engine_args(cls, args):
        asyncio.get_running_loop()
        return cls()
    async def generate(self, prompt, params, request_id):
        cached = len(prompt["prompt_token_ids"]) // 2
        for number in range(params.max_tokens):
            await asyncio.sleep(0.001)
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[number])], num_cached_tokens=cached)
    async def reset_prefix_cache(self):
        return True
    def shutdown(self):
        pass
""",
}


def run(script: str, *arguments: str, path: str = "") -> tuple[int, dict[str, Any], str]:
    """Exit status, the JSON of the last line, and what stood on stderr."""
    command = [sys.executable, str(BENCHMARKS / "gpu" / script), *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (path, str(ROOT / "src"))))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    lines = done.stdout.strip().splitlines()
    assert lines, done.stderr
    return done.returncode, json.loads(lines[-1]), done.stderr


def report_here(name: str = "test") -> Report:
    return Report(name, parser(None).parse_args(["--device", "cpu", "--quick", "--repeats", "1"]))


# -- each script, in miniature


@pytest.mark.parametrize(
    ("script", "arguments", "cases"),
    [
        ("kernel.py", (), {"turns tiny-gqa 70", "turns tiny-mha 20", "decode 3 x 100", "prefill 100"}),
        ("transfers.py", (), {"copies 9", "beside", "swapped 20", "swapped 40"}),
        ("decode.py", (), {"step 1 x 40", "step 3 x 40", "host 6 running"}),
        pytest.param(
            "serving.py",
            ("--modes", "stateless,pensieve,gpu-only"),
            {"stateless", "pensieve", "gpu-only"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_script_runs_without_a_gpu(
    script: str, arguments: tuple[str, ...], cases: set[str], tmp_path: Path
) -> None:
    out = tmp_path / "result.json"
    status, told, words = run(
        script, "--device", "cpu", "--quick", "--repeats", "2", "--out", str(out), *arguments
    )
    assert status == 0, words
    assert told["wrong"] == [] and told["not_measured"] == []
    assert cases <= set(told["cases"])
    assert told["goals"] and {goal["verdict"] for goal in told["goals"]} == {"not judged here"}
    assert all(math.isfinite(goal["value"]) and math.isfinite(goal["ratio"]) for goal in told["goals"])
    assert (
        script in told["command"]
        and told["versions"]["torch"]
        and told["machine"]["device"] == "cpu"
        and told["commit"]
    )
    assert json.loads(out.read_text())["cases"] == told["cases"]
    assert "goal" in words and "not judged here" in words


@pytest.mark.slow
def test_a_wrong_backend_fails_the_run_and_is_named_in_every_case(tmp_path: Path) -> None:
    status, told, _ = run(
        "kernel.py",
        "--device",
        "cpu",
        "--quick",
        "--attention",
        "no-such",
        "--parts",
        "decode",
        "--out",
        str(tmp_path / "r"),
    )
    assert status == 1
    assert len(told["wrong"]) == 4 and "no-such" in told["wrong"][0] and told["cases"] == {}


@pytest.mark.slow
def test_vllm_is_driven_by_the_same_arrivals_in_a_process_of_its_own(tmp_path: Path) -> None:
    for name, text in FAKE_VLLM.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    earlier = tmp_path / "earlier.json"
    point = {"rate": 8.0, "requests_per_s": 8.0, "normalized_ms": 2.0}
    case = {"points": [point], "crossing": {"requests_per_s": 8.0, "bound": None}}
    before = {"cases": {"pensieve": case}, "command": "first", "date": "then"}
    earlier.write_text(
        json.dumps({"cases": {}, "with": before, "limit_ms": 50.0, "command": "second", "date": "then"})
    )
    status, told, words = run(
        "serving.py", "--device", "cpu", "--quick", "--modes", "vllm-offload", "--with", str(earlier),
        "--vllm", sys.executable, path=str(tmp_path),
    )  # fmt: skip
    assert status == 0, words
    found = told["cases"]["vllm-offload"]
    assert len(found["points"]) == 2 and found["num_errors"] == 0 and found["limit_ms"] == 50.0
    assert all(point["cached_tokens"] > 0 for point in found["points"])
    assert "vllm-offload" in told["ratios"] and told["goals"][0]["goal"] == "≥ 1.3"
    assert (
        set(told["with"]["cases"]) == {"pensieve"} and told["limit_ms"] == 50.0
    )  # a third run may go on from this one


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is here")
def test_a_system_that_is_not_here_is_named_and_one_that_does_not_start_fails() -> None:
    options = serving.options_of(["--device", "cpu", "--quick", "--modes", "vllm"])
    report = Report("serving", options)
    bench = serving.Bench(report, options)
    bench.run(["vllm"])
    assert report.failed == [] and report.left_out[0].startswith("vllm: ")
    options.vllm = "/no/such/python"
    bench.run(["vllm"])
    assert len(report.failed) == 1 and "/no/such/python" in report.failed[0]


def test_the_list_names_every_script_and_its_command() -> None:
    status, told, words = run("__main__.py", "--out", "here")
    assert status == 0 and not told["ran"]
    assert list(told["scripts"])[:4] == ["kernel", "decode", "transfers", "serving"]
    for job in told["scripts"].values():
        script = job["command"].split()[1]
        assert (ROOT / script).is_file() and job["command"] in words


@pytest.mark.slow
def test_no_server_or_terminal_package_is_needed_and_by_the_driver_of_vllm_no_torch() -> None:
    names = (
        "click",
        "rich",
        "fastapi",
        "uvicorn",
        "pydantic",
        "psutil",
        "platformdirs",
        "prometheus_client",
        "matplotlib",
    )
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        f"for name in {names!r}: sys.modules[name] = None\n"
        "import gpu.vllm_driver\n"
        "assert 'torch' not in sys.modules\n"
        "import gpu.kernel, gpu.transfers, gpu.decode, gpu.serving"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        timeout=120,
    )


# -- wrong answers show


def small_case(past: int = 4000, new: int = 8, layers: int = 2) -> PagedCase:
    return PagedCase(
        Heads("small", 4, 2, 64), torch.bfloat16, CPU, "cpu", requests=2, past=past, new=new, layers=layers, seed=0
    )  # fmt: skip


def test_a_right_kernel_is_right_and_the_cache_is_as_before() -> None:
    case = small_case()
    before = case.store.data.clone()
    assert all(case.check(layer, [0, 1]) <= TOLERANCES[torch.bfloat16] for layer in range(2))
    assert torch.equal(case.store.data, before)
    assert case.check(1, [1], torch.tensor([0, 7])) <= TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("shift", [1, -1])
def test_a_mask_one_token_off_shows_behind_a_long_history(
    shift: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = small_case()
    right = attend_one
    monkeypatch.setattr(
        paged, "attend_one", lambda q, k, v, positions, args: right(q, k, v, positions + shift, args)
    )
    assert case.check(0, [0]) > 10 * TOLERANCES[torch.bfloat16]


def test_keys_from_another_request_or_layer_show() -> None:
    case = small_case()
    assert worst_error(case.attend(0)[8:], case.expected(0, 0)) > 0.5
    assert worst_error(case.attend(1)[:8], case.expected(0, 0)) > 0.5
    assert worst_error(torch.full((1, 2, 4), float("nan")), torch.ones(1, 2, 4)) == math.inf


def test_a_mask_aligned_with_the_upper_left_shows() -> None:
    case = small_case(past=100)
    key, value = (part.transpose(1, 2) for part in case.contiguous(0))
    query = kernel.by_head(case.query, 2)
    right = next(iter(kernel.torch_attention(case).values()))(query, key, value)
    wrong = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    expected = case.expected(0, 1)
    assert worst_error(right[1].transpose(0, 1), expected) <= TOLERANCES[torch.bfloat16]
    assert worst_error(wrong[1].transpose(0, 1), expected) > 0.5


def test_a_copy_that_moves_nothing_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_here()
    bench = transfers.Bench(report, report.options)
    real = transfers.run_copies

    def only_out(transfer: Any, copies: Any, *, up: bool) -> None:
        if not up:
            real(transfer, copies, up=up)

    bench._copies("good", 6)
    assert report.failed == []
    monkeypatch.setattr(transfers, "run_copies", only_out)
    bench._copies("bad", 6)
    assert len(report.failed) == 1 and "swapped-in" in report.failed[0]


def test_a_case_that_breaks_takes_no_other_along(capsys: pytest.CaptureFixture[str]) -> None:
    report = report_here()
    with report.attempt("one"):
        raise ValueError("broken")
    with report.attempt("two"):
        report.case("two", {"x": 1}, "fine")
    assert report.finish() == 1
    told = json.loads(capsys.readouterr().out)
    assert told["wrong"] == ["one: ValueError: broken"] and told["cases"] == {"two": {"x": 1}}


def test_a_case_for_which_no_time_is_left_is_named() -> None:
    report = Report("test", parser(None).parse_args(["--device", "cpu", "--limit-s", "5"]))
    assert report.fits("short", 1) and not report.fits("long", 60)
    assert report.left_out[0].startswith("long: ")


# -- figures


def test_goals() -> None:
    assert (
        Goal("x", 1.5, 1.5, at_least=True).verdict == "met"
        and Goal("x", 1.4, 1.5, at_least=True).verdict == "missed"
    )
    assert (
        Goal("x", 1.0, 1.02, at_least=False).verdict == "met"
        and Goal("x", 1.1, 1.02, at_least=False).verdict == "missed"
    )
    assert Goal("x", math.nan, 1.0, at_least=True).verdict == "missed"
    assert Goal("x", 2.0, 1.5, at_least=True, known="at least").verdict == "met"
    assert Goal("x", 1.2, 1.5, at_least=True, known="at least").verdict == "undecided"
    assert Goal("x", 1.2, 1.5, at_least=True, known="at most").verdict == "missed"
    assert Goal("x", 2.0, 1.5, at_least=True, known="unknown").verdict == "undecided"
    assert (
        str(Goal("x", 1, 0.85, at_least=True)) == "≥ 0.85"
        and str(Goal("x", 1, 1.02, at_least=False)) == "≤ 1.02"
    )


def test_percentiles_and_covered_time() -> None:
    assert (
        percentile([3.0, 1.0, 2.0], 0.5) == 2.0
        and percentile([1.0, 2.0], 0.25) == 1.25
        and percentile([7.0], 0.9) == 7.0
    )
    with pytest.raises(ValueError, match="percentile"):
        percentile([], 0.5)
    assert covered([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0), (5.2, 5.4)]) == 4.0 and covered([]) == 0.0


def test_work_is_timed_in_turns_and_rotates() -> None:
    calls: list[tuple[str, int]] = []
    works = {name: lambda number, name=name: calls.append((name, number)) for name in "ab"}
    times = Clock(CPU).in_turns(works, 2, most=3)
    assert all(len(timing.seconds) == 2 and timing.median_s >= 0 for timing in times.values())
    measured = [name for name, _ in calls[8:]]  # after 4 calls each to warm up
    assert measured == ["a"] * 3 + ["b"] * 3 + ["a"] * 3 + ["b"] * 3
    assert [number for name, number in calls[8:14]] == [0, 1, 2, 0, 1, 2]


def test_rates_close_in_on_the_limit() -> None:
    assert next_rate([], 20.0, 6.0) == 6.0
    assert next_rate([(6.0, 11.0)], 20.0, 6.0) == pytest.approx(13.2)  # nearly idle: a long step
    assert next_rate([(6.0, 18.0)], 20.0, 6.0) == pytest.approx(9.6)
    assert next_rate([(6.0, 25.0)], 20.0, 6.0) == pytest.approx(3.75)
    assert next_rate([(6.0, 11.0), (13.5, 40.0)], 20.0, 6.0) == pytest.approx(9.0)


def test_the_crossing_lies_between_two_points_whatever_their_order() -> None:
    points = [
        {"rate": 12.0, "requests_per_s": 10.0, "normalized_ms": 30.0},
        {"rate": 6.0, "requests_per_s": 6.0, "normalized_ms": 10.0},
    ]
    assert crossing_of(points, 20.0) == Crossing(8.0)
    assert crossing_of(points, 40.0) == Crossing(10.0, "at least") and crossing_of(points, 5.0) == Crossing(
        6.0, "at most"
    )


def test_ratios_say_when_a_sweep_did_not_reach_the_limit() -> None:
    assert ratio_of(Crossing(12.0), Crossing(8.0)) == (1.5, "")
    assert ratio_of(Crossing(12.0, "at least"), Crossing(8.0)) == (1.5, "at least")
    assert ratio_of(Crossing(12.0), Crossing(8.0, "at least")) == (1.5, "at most")
    assert ratio_of(Crossing(12.0, "at least"), Crossing(8.0, "at most")) == (1.5, "at least")
    assert ratio_of(Crossing(12.0, "at least"), Crossing(8.0, "at least")) == (1.5, "unknown")


def test_conversations_are_as_long_as_sharegpts() -> None:
    lengths, think = Lengths(), ThinkTime(5.0, exponential=True)
    scripts = [lengths.script(index, think, 0, 16_384) for index in range(2000)]
    turns = [turn for script in scripts for turn in script.turns]
    assert statistics.mean(len(script.turns) for script in scripts) == pytest.approx(5.56, rel=0.08)
    assert statistics.mean(turn.output_tokens for turn in turns) == pytest.approx(204.58, rel=0.05)
    assert statistics.mean(turn.message_tokens for turn in turns) == pytest.approx(37.77, rel=0.12)
    assert statistics.mean(turn.think_s for turn in turns) == pytest.approx(5.0, rel=0.08)
    assert scripts[7] == lengths.script(7, think, 0, 16_384) != lengths.script(7, think, 1, 16_384)
    assert all(
        sum(t.message_tokens + t.output_tokens for t in s.turns) <= 500
        for s in (lengths.script(i, think, 0, 500) for i in range(50))
    )


def test_figures_are_of_a_window_and_count_what_was_never_answered() -> None:
    def sent(sent_s: float, done_s: float | None, tokens: int = 10) -> Sent:
        answer = None if done_s is None else Answer(tuple(range(tokens)), 0.1, 30, 10, 5)
        return Sent("c", 0, sent_s, 50, 40, tokens, done_s, answer)

    run = Run([sent(0.0, 1.0), sent(2.0, 3.0), sent(2.5, 4.5), sent(3.0, None)], end_s=7.0)
    told = figures(run, (2.0, 4.0))
    assert told["requests_per_s"] == 0.5 and told["sent"] == 3 and told["unanswered"] == 1
    assert told["normalized_ms"] == pytest.approx(1e3 * statistics.mean([0.1, 0.2, 0.4])) and told[
        "normalized_p50_ms"
    ] == pytest.approx(200.0)
    assert (
        told["ttft_p90_ms"] == pytest.approx(100.0)
        and told["history_tokens"] == 80
        and told["cached_tokens"] == 60
    )
    with pytest.raises(ValueError, match="nothing was sent"):
        figures(run, (10.0, 12.0))


class SlowServer:
    """Answers in time that grows with how many it answers at once."""

    def __init__(self) -> None:
        self.busy = self.most = self.cleared = 0
        self.asked: list[tuple[str, int, int]] = []  # conversation, prompt, history

    async def ask(self, conversation: str, prompt: tuple[int, ...], history: int, new: int) -> Answer:
        self.asked.append((conversation, len(prompt), history))
        self.busy += 1
        self.most = max(self.most, self.busy)
        try:
            await asyncio.sleep(0.001 * new * self.busy)
        finally:
            self.busy -= 1
        return Answer((1,) * new, 0.001, history)

    async def clear(self) -> None:
        self.cleared += 1


def load(point_s: float = 0.5) -> Load:
    return Load(
        Lengths(3.0, 8, 5, most_turns=4, most_tokens=10), 0.02, point_s, point_s / 2, 1.0, 4, 200, 100, 0
    )


def test_a_turn_is_sent_after_the_answer_before_and_nothing_after_the_end() -> None:
    turns = (ScriptTurn(3, 5), ScriptTurn(2, 4, 0.05), ScriptTurn(2, 4, 30.0))
    server = SlowServer()
    run = asyncio.run(
        play([Player(0.02, (Script("a", turns),))], server, load(), until_s=1.0, drain_s=5.0, label="x")
    )
    assert server.asked == [("x/a", 3, 0), ("x/a", 10, 8)]
    assert run.end_s < 1.0  # a turn that would come too late is not waited for
    first, second = run.sent
    assert first.done_s is not None and second.sent_s >= first.done_s + 0.05


def test_a_short_answer_and_a_failed_request_are_errors() -> None:
    class Broken(SlowServer):
        async def ask(self, conversation: str, prompt: tuple[int, ...], history: int, new: int) -> Answer:
            if history:
                raise RuntimeError("no")
            return Answer((1,), None, 0)

    script = Script("a", (ScriptTurn(3, 5), ScriptTurn(3, 5), ScriptTurn(3, 5)))
    run = asyncio.run(play([Player(0.0, (script,))], Broken(), load(), until_s=1.0, drain_s=1.0))
    assert run.errors == ["1 tokens came back, 5 were asked for", "RuntimeError: no"]


def test_a_sweep_finds_where_latency_doubles() -> None:
    server = SlowServer()
    said: list[str] = []
    told = asyncio.run(
        sweep(server, load(), limit_ms=None, first_rate=40.0, say=said.append, left_s=lambda: 100.0)
    )
    assert told["unloaded_ms"] == pytest.approx(1.0, rel=0.6) and told["limit_ms"] == 2 * told["unloaded_ms"]
    assert len(told["points"]) == 3 == server.cleared - 1 and told["num_errors"] == 0 and len(said) == 4
    assert (
        told["points"] == sorted(told["points"], key=lambda point: point["rate"])
        and told["crossing"]["requests_per_s"] > 0
    )
    short = asyncio.run(
        sweep(server, load(), limit_ms=3.0, first_rate=40.0, say=said.append, left_s=lambda: 0.1)
    )
    assert short["points"] == [] and short["points_left_out"] == 3 and "crossing" not in short


def test_the_load_survives_json() -> None:
    assert Load.from_json(json.loads(json.dumps(load().as_json()))) == load()
    assert (
        random.Random("words/0/1").random() == random.Random("words/0/1").random()
    )  # what two systems are asked is the same
