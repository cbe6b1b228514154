"""llm, the command line tool: a configured model, chats that go on, their logs, an endpoint without configuration."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llm
import pytest
from shared import BASE, BRIEF, KEY, MODEL, STORY, assert_hit, unique

Run = Callable[..., str]

MODELS = f"""
- model_id: chat
  model_name: {MODEL}
  api_base: {BASE}
  api_key_name: pensieve
  supports_tools: true
- model_id: whole
  model_name: {MODEL}
  api_base: {BASE}
  api_key_name: pensieve
  can_stream: false
- model_id: responses
  model_name: {MODEL}
  api_base: {BASE}
  api_key_name: pensieve
  responses: true
- model_id: completion
  model_name: {MODEL}
  api_base: {BASE}
  api_key_name: pensieve
  completion: true
- model_id: elsewhere
  model_name: gpt-4o
  api_base: {BASE}
  api_key_name: pensieve
"""
SHORT = ("-o", "max_tokens", "12", "-o", "temperature", "0")
TO_THE_END = (
    "-o",
    "max_tokens",
    "300",
    "-o",
    "temperature",
    "0",
)  # over responses, llm notes no usage of an answer that was cut off
CHATS = pytest.mark.parametrize("model", ["chat", "whole", "responses"])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """llm as a user runs it, with a home of its own."""
    (tmp_path / "extra-openai-models.yaml").write_text(MODELS)

    def run(*arguments: str, words: str | None = None, fails: bool = False) -> str:
        done = subprocess.run(
            [str(Path(sys.executable).with_name("llm")), *arguments],
            env={**os.environ, "LLM_USER_PATH": str(tmp_path)},
            input=words or "",
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert bool(done.returncode) == fails, done.stderr
        return done.stderr if fails else done.stdout

    run("keys", "set", "pensieve", "--value", KEY)
    return run


def usage(entry: dict[str, Any]) -> tuple[int, int]:
    """All tokens of a logged answer, and those of its prompt that were cached."""
    details = json.loads(entry["token_details"] or "{}")
    of_input = details.get("prompt_tokens_details") or details.get("input_tokens_details") or {}
    return entry["input_tokens"] + entry["output_tokens"], of_input.get(
        "cached_tokens", 0
    )  # (noughts are not logged)


@CHATS
def test_a_chat_that_is_continued_hits_the_cache(run: Run, model: str) -> None:
    first = run("-m", model, *TO_THE_END, "-s", BRIEF, unique(STORY + "What animal came? " + BRIEF))
    second = run("-c", *TO_THE_END, "And on Tuesday? " + BRIEF)
    third = run("-c", *TO_THE_END, "What is 2 + 2? " + BRIEF)
    log = json.loads(run("logs", "--json", "-n", "0"))
    assert [entry["response"] for entry in log] == [
        answer.removesuffix("\n") for answer in (first, second, third)
    ]
    assert len({entry["conversation_id"] for entry in log}) == 1
    for before, entry in itertools.pairwise(log):
        assert_hit(usage(entry)[1], usage(before)[0])


def test_an_interactive_chat(run: Run) -> None:
    shown = run("chat", "-m", "chat", *SHORT, words=f"{unique(STORY)}\nAnd on Friday?\nquit\n")
    log = json.loads(run("logs", "--json", "-n", "0"))
    assert len(log) == 2 and all(entry["response"] in shown for entry in log)
    assert_hit(usage(log[1])[1], usage(log[0])[0])


def test_a_model_with_tools_to_hand(run: Run) -> None:
    function = 'def say(word: str = "hello") -> str:\n    "Say a word"\n    return word'
    assert run("-m", "chat", "--functions", function, *SHORT, "Say hello.").strip()


def test_text_completion(run: Run) -> None:
    assert run("-m", "completion", *SHORT, "Once upon a time").strip()


def test_an_endpoint_that_is_not_configured(run: Run) -> None:
    assert run("openai", "endpoint", BASE, "--models", "--key", KEY).split() == [MODEL]
    assert run("openai", "endpoint", BASE, "Hello.", "-m", MODEL, "--key", KEY, *SHORT).strip()
    assert run("openai", "endpoint", BASE, "Hello.", "-m", MODEL, "--key", KEY, "--responses", *SHORT).strip()


def test_failures_are_told(run: Run) -> None:
    assert "not served here" in run("-m", "elsewhere", "Hello.", fails=True)
    assert "not valid here" in run("-m", "chat", "--key", "pk-wrong", "Hello.", fails=True)
    schema = run("-m", "chat", "-o", "json_object", "1", "A city as JSON.", fails=True)
    assert "not constrained" in schema


def test_the_python_api(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    conversation = llm.get_model("chat").conversation()
    first = conversation.prompt(unique(STORY), max_tokens=12, temperature=0)
    assert first.text()
    second = conversation.prompt("And on Friday?", max_tokens=12, temperature=0, stream=False)
    assert second.text() and second.usage().details is not None
    assert_hit(
        second.usage().details["prompt_tokens_details"]["cached_tokens"],
        first.usage().input + first.usage().output,
    )
