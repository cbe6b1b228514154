"""`pensieve simulate` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from simulator_worlds import DOCUMENT

import pensieve.cli.simulate
from pensieve.cli.commands import cli
from pensieve.errors import ConfigError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = ["simulate", "--model", "smollm2-135m", "--hardware", "a100-80gb", "--gpu-cache", "0.05", "--cpu-cache", "0.1", "--max-context", "4000",
         "--turns", "3", "--jobs", "1"]  # fmt: skip


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(cli, [*SMALL, *arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result


def record(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def trace(folder: Path) -> str:
    path = folder / "trace.jsonl"
    rows = [
        {
            "conversation": c,
            "turn": t,
            "new_tokens": 50,
            "output_tokens": 20,
            **({"arrival_s": c * 0.1} if t == 0 else {"gap_s": 1.0}),
        }
        for c in range(8)
        for t in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_sweep_prints_a_table_and_json_and_writes_both(tmp_path: Path) -> None:
    arguments = [
        "--trace",
        trace(tmp_path),
        "--system",
        "pensieve,stateless",
        "--policy",
        "retention,lru",
        "--out",
        str(tmp_path / "out"),
    ]
    result = invoke(*arguments)
    outcomes = record(result)["outcomes"]
    assert [(one["case"]["system"], one["case"]["policy"]) for one in outcomes] == [
        ("pensieve", "retention"), ("pensieve", "lru"), ("stateless", "retention"),
    ]  # fmt: skip
    assert all(one["summary"]["sent"] == 24 for one in outcomes)  # (--turns 3)
    assert "pensieve" in result.stdout and "stateless" in result.stdout
    assert json.loads((tmp_path / "out" / "simulate.json").read_text()) == record(result)
    assert (tmp_path / "out" / "simulate.png").stat().st_size > 10_000
    assert invoke(*arguments).stdout.splitlines()[-1] == result.stdout.splitlines()[-1]


def test_made_conversations_come_at_several_rates() -> None:
    outcomes = record(
        invoke(
            "--trace",
            "ultrachat-like",
            "--rate",
            "1:2",
            "--duration",
            "30",
            "--think",
            "exp:2",
            "--max-context",
            "5000",
        )
    )["outcomes"]
    assert [one["rate"] for one in outcomes] == [1.0, 2.0]
    assert all(one["summary"]["window_s"] == [7.5, 30.0] for one in outcomes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--system", "nonsense"], "no system is called 'nonsense': take pensieve"),
        (["--policy", "lru,nonsense"], "no policy is called 'nonsense': take "),
        (["--figure", "99"], "no figure is called '99': take 3, 4, 12, 10a"),
        (["--rate", "3:1"], "rates are one number"),
        (["--trace", "missing.jsonl"], "cannot read the trace missing.jsonl"),
        (["--rate", "1", "--duration", "10", "--warm-up", "20"], "--warm-up must be shorter"),
        (["--model", "nonsense"], "no architecture is called 'nonsense'"),
        (["--gpu-cache", "100"], "lower --gpu-cache"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        invoke(*arguments)


def test_figures_without_the_repository_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pensieve.cli.simulate, "__file__", str(tmp_path / "a" / "b" / "c" / "simulate.py"))
    with pytest.raises(ConfigError, match="clone the repository and run `make paper-figures`"):
        invoke("--figure", "10a")


def test_it_needs_no_torch_and_no_server_packages() -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'fastapi', 'uvicorn', 'pydantic'): sys.modules[name] = None\n"
        "import pensieve.simulator.sweep, pensieve.simulator.output\n"
        f"sys.path.append({str(BENCHMARKS)!r})\n"
        "import paper.command\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_measured_machine_takes_the_place_of_model_and_hardware(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(DOCUMENT))
    arguments = [
        "simulate",
        "--profile",
        str(profile),
        "--gpu-cache",
        "0.05",
        "--cpu-cache",
        "0.1",
        "--max-context",
        "2000",
        "--jobs",
        "1",
    ]
    load = ["--trace", trace(tmp_path), "--turns", "3"]
    result = CliRunner().invoke(cli, [*arguments, *load], standalone_mode=False)
    assert result.exception is None, result.exception
    (outcome,) = record(result)["outcomes"]
    assert "some model" in result.stdout and "some CPU" in result.stdout
    assert outcome["summary"]["sent"] > 0 and not outcome["summary"]["failed"]
    assert (outcome["case"]["max_batch_tokens"], outcome["case"]["max_running"]) == (
        512,
        64,
    )  # as a server has them on a CPU
    alone = CliRunner().invoke(
        cli, [*(a for a in arguments if a not in ("--cpu-cache", "0.1")), *load], standalone_mode=False
    )
    assert (
        record(alone)["outcomes"][0]["case"]["machine"]["cpu_cache_gb"] == 0.0
    )  # both tiers would be the same memory
    told = CliRunner().invoke(cli, [*arguments, *load, "--hardware", "h100"], standalone_mode=False)
    assert isinstance(told.exception, ConfigError) and "--hardware does not go with --profile" in str(
        told.exception
    )
