"""Commands over two processes: the first speaks, the other follows, both end as they should."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from text_tokenizers import CHATML, hugging_face

from rank_pairs import environment, free_port
from tiny_models import tiny

TIMEOUT_S = 180.0
TIERS = ("--dtype", "float32", "--gpu-cache", "0.002", "--cpu-cache", "0.001", "--debug")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has a tokenizer, with random weights that pass for real ones."""
    path: Path = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = hugging_face(CHATML)
    size = len(tokenizer) + len(tokenizer) % 2
    tiny(
        "llama", vocab_size=size, max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id
    ).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def variables(**more: str) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120", **more}


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
        *arguments,
    ]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=variables()
    )


def test_compare_under_torchrun_speaks_once_and_finds_equal_outputs(folder: Path, tmp_path: Path) -> None:
    result = torchrun(
        *(
            "-m",
            "pensieve",
            "compare",
            "--model",
            str(folder),
            *TIERS,
            "--users",
            "2",
            "--turns",
            "2",
            "--max-new-tokens",
            "4",
        ),
        *("--request-interval", "0", "--out", str(tmp_path)),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("equal outputs under the contract") == 1, result.stdout
    assert result.stderr.count("loading ") == 1, result.stderr
    (record_path,) = tmp_path.glob("*.json")
    assert len(json.loads(record_path.read_text())["runs"]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(
            ("--model", "gpt2", "--weights", "random"),
            "transformers has no tensor parallel plan for 'gpt2' models",
            marks=pytest.mark.slow,
        ),
        (("--gpu-cache", "-1"), "--gpu-cache must be at least 0 GB"),
    ],
)
def test_what_is_wrong_is_said_once_with_the_exit_status_of_one_process(
    arguments: tuple[str, ...], words: str
) -> None:
    processes = start("compare", *arguments)
    (_, first), (nothing, second) = (process.communicate(timeout=TIMEOUT_S) for process in processes)
    assert words in first.splitlines()[-1], first
    assert (nothing, second) == ("", "")
    assert [process.returncode for process in processes] == [2, 0]


def start(*arguments: str) -> list[subprocess.Popen[str]]:
    """Both ranks, as torchrun would start them."""
    port = free_port()
    command = [sys.executable, "-m", "pensieve", *arguments]
    return [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=variables(**environment(rank, 2, port)),
        )
        for rank in range(2)
    ]


@contextmanager
def served(folder: Path, store: Path) -> Iterator[tuple[list[subprocess.Popen[str]], httpx.Client]]:
    processes = start(
        "serve",
        "--model",
        str(folder),
        *TIERS,
        "--port",
        "0",
        "--store",
        f"sqlite:///{store}",
        "--name",
        "tiny",
    )
    try:
        output = processes[0].stdout
        assert output is not None
        found = None
        while found is None and (line := output.readline()):
            found = re.search(r"listening at (http://\S+)", line)
        assert found is not None, processes[0].communicate(timeout=10)
        with httpx.Client(base_url=found.group(1), timeout=60.0) as client:
            yield processes, client
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=10)


def ask(client: httpx.Client, words: str) -> httpx.Response:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": words}],
        "max_tokens": 6,
        "temperature": 0.8,
    }
    return client.post("/v1/chat/completions", json=body)


@pytest.mark.slow
def test_serve_answers_over_two_processes_and_all_end_well(folder: Path, tmp_path: Path) -> None:
    with served(folder, tmp_path / "a.db") as (processes, client):
        for words in ("Hello there", "what is the capital of France"):
            assert ask(client, words).status_code == 200
        for process in processes:  # as Ctrl-C under a starter would reach them
            process.send_signal(signal.SIGTERM)
        _, errors = processes[1].communicate(timeout=TIMEOUT_S)
        assert errors == "" and processes[1].returncode == 0
        processes[0].communicate(timeout=TIMEOUT_S)
        assert processes[0].returncode == 0


@pytest.mark.slow
def test_a_follower_that_dies_ends_the_server_with_a_reason(folder: Path, tmp_path: Path) -> None:
    with served(folder, tmp_path / "b.db") as (processes, client):
        assert ask(client, "Hello there").status_code == 200
        processes[1].kill()
        response = ask(client, "are you there")
        assert response.status_code == 503, response.text
        _, errors = processes[0].communicate(timeout=TIMEOUT_S)
        assert processes[0].returncode == 2
        assert (
            "worker_lost" in errors.splitlines()[-1] and "start all of them again" in errors.splitlines()[-1]
        ), errors


@pytest.mark.slow
def test_an_engine_that_dies_is_not_started_again_and_its_follower_says_so(
    folder: Path, tmp_path: Path
) -> None:
    with served(folder, tmp_path / "c.db") as (processes, client):
        assert ask(client, "Hello there").status_code == 200
        engine = max(psutil.Process(processes[0].pid).children(), key=lambda child: child.memory_info().rss)
        engine.kill()
        begun_s = time.monotonic()
        _, errors = processes[1].communicate(timeout=TIMEOUT_S)
        assert processes[1].returncode == 1
        assert "rank 1 of 2 ends: rank 1 lost the other processes" in errors
        processes[0].communicate(timeout=TIMEOUT_S)
        assert processes[0].returncode == 2
        assert time.monotonic() - begun_s < 60
