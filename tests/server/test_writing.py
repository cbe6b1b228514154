"""Answers with so many log-probabilities that they are written beside the event loop."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from serving import Serving, serving

from pensieve.server import writing

ASKED = {"model": "tiny", "ignore_eos": True, "seed": 7}
CHAT, COMPLETION, RESPONSE = "/v1/chat/completions", "/v1/completions", "/v1/responses"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {**ASKED, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 60, "logprobs": True, "top_logprobs": 20, "store": False},
    COMPLETION: {**ASKED, "prompt": "hi", "max_tokens": 60, "logprobs": 5},
    RESPONSE: {"model": "tiny", "input": "hi", "max_output_tokens": 60, "top_logprobs": 20, "include": ["message.output_text.logprobs"], "ignore_eos": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving() as server:
        yield server


def without_names(answer: Any) -> Any:
    """An answer but for what differs from one to the next."""
    if isinstance(answer, dict):
        return {
            key: without_names(value)
            for key, value in answer.items()
            if key
            not in (
                "id",
                "item_id",
                "created",
                "created_at",
                "completed_at",
                "pensieve",
                "usage",
                "sequence_number",
            )
        }
    return [without_names(value) for value in answer] if isinstance(answer, list) else answer


def streamed(server: Serving, path: str) -> list[Any]:
    with server.client.stream("POST", path, json={**BODIES[path], "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    return [without_names(json.loads(line)) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize("path", BODIES)
def test_long_answers_are_those_that_would_have_been_written_at_once(
    server: Serving, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()
    written = writing._written

    def watched(value: Any) -> bytes:
        threads.add(threading.current_thread().name)
        return written(value)

    monkeypatch.setattr(writing, "_written", watched)
    monkeypatch.setattr(writing, "FEW", 10**9)
    whole, stream = without_names(server.client.post(path, json=BODIES[path]).json()), streamed(server, path)
    assert not threads
    monkeypatch.setattr(writing, "FEW", 100)
    assert without_names(server.client.post(path, json=BODIES[path]).json()) == whole
    assert threads and "MainThread" not in threads
    assert streamed(server, path) == stream
