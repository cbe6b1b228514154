"""`pensieve serve --stateless`: the same answers, and nothing kept between turns.

A server without it shows that the question is a fair one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from real import RealServer, real_server

pytestmark = pytest.mark.model


def ask(server: RealServer, messages: list[dict[str, str]]) -> tuple[str, dict[str, Any]]:
    body = {"model": "smollm2", "messages": messages, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    answer = server.client.post("/v1/chat/completions", json=body).json()
    return answer["choices"][0]["message"]["content"], answer["usage"]


def test_a_stateless_server_finds_nothing_of_the_turn_before(tmp_path: Path) -> None:
    told = {}
    for options in ((), ("--stateless",)):
        with real_server(tmp_path / f"{len(options)}.db", *options) as server:
            first = [{"role": "user", "content": "Name three fruits and describe each of them."}]
            words, usage = ask(server, first)
            again, second = ask(
                server,
                [
                    *first,
                    {"role": "assistant", "content": words},
                    {"role": "user", "content": "And a fourth?"},
                ],
            )
            assert ("stateless" in "\n".join(server.log)) == bool(options)
            told[options] = words, again, usage["prompt_tokens"], second["prompt_tokens"]
            cached = second["prompt_tokens_details"]["cached_tokens"]
            assert cached == 0 if options else cached > 0
    assert told[()] == told[("--stateless",)]
