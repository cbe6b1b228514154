"""The commands as users type them, in processes of their own; what is refused before anything is computed, in this one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from pensieve.cli import main

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.model


def run(*arguments: str, given: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        input=given,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=cwd,
        env=environment(),
    )


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}


def test_compare_reports_both_systems_and_their_equality(tmp_path: Path) -> None:
    result = run(
        *(
            "-m",
            "pensieve",
            "compare",
            "--users",
            "2",
            "--turns",
            "3",
            "--max-new-tokens",
            "4",
            "--request-interval",
            "0.05",
        ),
        *("--gpu-cache", "0.03", "--cpu-cache", "0.01", "--out", str(tmp_path), "--debug"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for words in ("By turn", "By user", "requests/s", "equal outputs under the contract", "recomputed"):
        assert words in result.stdout, result.stdout
    assert "DIFFERENT" not in result.stdout
    (record_path,) = tmp_path.glob("*.json")
    (plot_path,) = tmp_path.glob("*.png")
    assert plot_path.read_bytes().startswith(b"\x89PNG")
    record = json.loads(record_path.read_text())
    assert record["weights"] == "real"
    assert len(record["runs"]) == 2
    assert all(len(run_["requests"]) == 6 for run_ in record["runs"])


def test_main_py_times_random_weights_of_a_named_architecture_and_says_so(tmp_path: Path) -> None:
    dataset = tmp_path / "chats.json"
    turns = [
        {"from": "human", "value": "word " * 500},
        {"from": "gpt", "value": "yes"},
        {"from": "human", "value": "and then? " * 300},
    ]
    dataset.write_text(json.dumps([{"id": f"chat-{i}", "conversations": turns} for i in range(2)]))
    result = run(
        *(
            str(ROOT / "main.py"),
            "--mode",
            "compare",
            "--model",
            "gpt2",
            "--weights",
            "random",
            "--num-concurrent-users",
            "2",
        ),
        *(
            "--max-turns",
            "2",
            "--max-new-tokens",
            "3",
            "--request-interval",
            "0",
            "--dataset",
            str(dataset),
            "--out",
            str(tmp_path),
        ),
        *("--gpu-cache", "0.4", "--cpu-cache", "0.2"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "random weights" in result.stdout.splitlines()[0]
    assert "context full" in result.stdout, "gpt2 has 1,024 positions"
    (record_path,) = tmp_path.glob("compare-*.json")
    assert json.loads(record_path.read_text())["weights"] == "random"


def test_chat_goes_on_after_kill_9_from_raw_tokens(tmp_path: Path) -> None:
    arguments = [
        "-m",
        "pensieve",
        "chat",
        "--conversation",
        "trip",
        "--max-new-tokens",
        "12",
        "--gpu-cache",
        "0.05",
        "--cpu-cache",
        "0.05",
    ]
    first = subprocess.Popen(
        [sys.executable, "-u", *arguments, "--store", str(tmp_path / "c.db")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        stderr=subprocess.DEVNULL,
    )
    assert first.stdin is not None
    assert first.stdout is not None
    first.stdin.write("What is the capital of France? Answer briefly.\n")
    first.stdin.flush()
    receipt = next(line for line in first.stdout if line.startswith("[prompt"))
    first.send_signal(signal.SIGKILL)  # the receipt was shown, so the turn is durable
    first.wait()
    found = [re.search(pattern, receipt) for pattern in (r"prompt (\d+)", r"out (\d+)")]
    prompt, answer = (int(match[1]) for match in found if match)

    second = run(
        *arguments,
        "--store",
        f"sqlite:///{tmp_path}/c.db",
        given="/history\nAnd of Italy?\n/cache\n/quit\n",
        cwd=tmp_path,
    )
    assert second.returncode == 0, second.stderr
    assert not (tmp_path / "sqlite:").exists()
    assert "trip, 1 turns so far" in second.stdout
    assert "What is the capital of France?" in second.stdout
    assert "Paris" in second.stdout
    again = next(line for line in second.stdout.splitlines() if "[prompt" in line)
    assert f"gpu 0 + cpu 0 + recomputed {prompt + answer} + new" in again


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_HUB_OFFLINE has it, which is read when the package is imported."""

    def offline(*_: object, **__: object) -> None:
        raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that ends as one does that was asked for something wrong."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.usefixtures("no_hub")
def test_chat_without_real_weights_fails_with_the_ways_out(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["chat", "--model", "opt-125m"], capsys)
    assert "model_unavailable" in said
    assert "smollm2" in said


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (
            ["compare", "--model", "opt-66b", "--weights", "random", "--dtype", "bfloat16"],
            "model_refused",
            "131.4 GB",
        ),
        (["compare", "--gpu-cache", "0.001"], "invalid_config", "at least 2 are needed"),
        (["compare", "--max-context", "9999999"], "invalid_config", "more than the 8192 tokens"),
        (["compare", "--dataset", "/nonexistent.json"], "invalid_config", "/nonexistent.json"),
        (
            ["chat", "--store", "memory"],
            "invalid_config",
            ":memory: keeps nothing on disk, sqlite:///memory.db is a file in this directory",
        ),
        (["chat", "--store", "sqlite:c.db"], "invalid_config", "must be one of sqlite:///relative.db"),
        (["chat", "--store", ""], "invalid_config", "must be one of sqlite:///relative.db"),
        (
            ["serve", "--port", "0", "--store", "memory"],
            "invalid_config",
            "sqlite:///memory.db is a file in this directory",
        ),
        (["chat", "--temperature", "-1"], "invalid_request", "temperature must be in [0, 100], got -1.0"),
    ],
)
def test_bad_input_gets_one_clear_line(
    arguments: list[str], code: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    last = refused(arguments, capsys).splitlines()[-1]
    assert last.startswith(f"pensieve: {code}: ")
    assert words in last


def test_bad_input_gets_one_clear_line_from_a_process_of_its_own() -> None:
    result = run("-m", "pensieve", "compare", "--model", "nosuch")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("pensieve: invalid_config: there is no model 'nosuch'")


def test_models_names_what_can_be_loaded() -> None:
    result = run("-m", "pensieve", "models", "--json")
    names = {row["name"] for row in json.loads(result.stdout)}
    assert {
        "smollm2",
        "gpt2",
        "opt-125m",
        "opt-13b",
        "opt-66b",
        "llama2-13b-gqa",
        "llama2-70b",
        "llama3-8b",
        "qwen3-0.6b",
    } <= names
