"""`pensieve conversations`, `keys` and `serve`, as typed."""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from serving import Serving, serving

from pensieve.cli.commands import cli
from pensieve.errors import PensieveError
from pensieve.server.keys import KeyFile
from pensieve.server.listener import is_loopback
from pensieve.workloads.conversations import load_dataset


def type_in(*words: str, answer: str | None = None) -> Result:
    return CliRunner().invoke(cli, list(words), input=answer, catch_exceptions=True)


def conversations(server: Serving, *words: str, key: str | None = None, answer: str | None = None) -> Result:
    options = ["--url", server.url, *(["--api-key", key] if key else [])]
    return type_in("conversations", *options, *words, answer=answer)


def test_conversations_from_a_command_line(tmp_path: Path) -> None:
    with serving() as server:
        name = server.ask("the first words", n=20)["pensieve"]["conversation"]
        listed = conversations(server, "list")
        assert listed.exit_code == 0 and "the first words" in listed.output and "1 of 1" in listed.output
        assert json.loads(conversations(server, "list", "--json").output)[0]["id"] == name
        shown = conversations(server, "show", name)
        assert "user: the first words" in shown.output and "gpu" in shown.output
        exported = tmp_path / "one.jsonl"
        exported.write_text(conversations(server, "export", name).output)
        assert len(load_dataset(str(exported))) == 1
        assert "is pinned" in conversations(server, "pin", name).output
        assert "pinned" in conversations(server, "list").output
        assert "not pinned" in conversations(server, "unpin", name).output
        forked = conversations(server, "fork", name).output.strip()
        assert conversations(server, "show", forked).exit_code == 0
        assert conversations(server, "delete", name, answer="n\n").exit_code != 0
        deleted = conversations(server, "delete", name, answer="y\n")
        assert deleted.exit_code == 0 and "bytes of KV" in deleted.output
        gone = conversations(server, "show", name)
        assert isinstance(gone.exception, PensieveError) and name in gone.exception.message
        assert conversations(server, "show", forked).exit_code == 0  # what a fork stands on stays
    nobody = conversations(server, "list")
    assert isinstance(nobody.exception, PensieveError) and "pensieve serve" in nobody.exception.message


def test_keys_are_made_printed_once_and_kept_as_hashes(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    key = type_in("keys", "add", "alice", "--file", str(path), "--remark", "laptop").output.strip()
    other = type_in("keys", "add", "alice", "--file", str(path)).output.strip()
    assert key != other and key not in path.read_text() and path.stat().st_mode & 0o077 == 0
    assert KeyFile(path).tenant(key) == KeyFile(path).tenant(other) == "alice"
    wrong = type_in("keys", "add", "not a name", "--file", str(path))
    assert isinstance(wrong.exception, PensieveError)
    with serving(keys=path, key=key) as server:
        server.ask("mine")
        assert "mine" in conversations(server, "list", key=key).output
        refused = conversations(server, "list")
        assert isinstance(refused.exception, PensieveError) and "API key" in refused.exception.message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--host", "::"], "--insecure"),
        (["--api-key-file", "/nowhere/keys"], "cannot be read"),
        (["--queue-timeout", "0"], "--queue-timeout must be positive"),
        (["--gpu-cache", "-1"], "--gpu-cache"),
        (["--store", "mysql://x"], "sqlite:///"),
        (["--private"], "--api-key-file"),
        (["--max-body", "8", "--max-bodies", "4"], "--max-bodies"),
        (["--allow-origin", "*"], "https://host"),
        (["--allow-origin", "https://a.example/path"], "https://host"),
        (["--metrics-port", "8123", "--metrics-host", "192.0.2.1"], "cannot listen"),
    ],
)
def test_serve_refuses_what_cannot_be_before_it_loads_anything(words: list[str], expected: str) -> None:
    result = type_in("serve", "--port", "0", *words)
    assert isinstance(result.exception, PensieveError) and expected in result.exception.message


def test_serve_says_that_a_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = str(listener.getsockname()[1])
        result = type_in("serve", "--port", taken)
        same = type_in("serve", "--port", taken, "--metrics-port", taken)
    assert isinstance(same.exception, PensieveError) and "must not be --port" in same.exception.message
    assert isinstance(result.exception, PensieveError) and "--port" in result.exception.message


def test_loopback_is_told_from_the_rest() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.0.1", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.2", "example.org")))


def test_neither_prompts_nor_keys_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    key = type_in("keys", "add", "alice", "--file", str(path)).output.strip()
    caplog.set_level(logging.DEBUG)
    with serving(keys=path, key=key) as server:
        server.ask("a secret zebra walks")
        server.post(
            "/v1/chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": "a secret zebra " * 400}]},
        )
        server.post(
            "/v1/responses",
            {
                "model": "tiny",
                "input": "a secret zebra",
                "instructions": "a secret zebra",
                "max_output_tokens": 3,
            },
        )
        wrong: dict[str, Any] = {"model": "tiny", "messages": [{"role": "king", "content": "a secret zebra"}]}
        server.post("/v1/chat/completions", wrong)
        server.until_idle()
    ours = [
        record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))
    ]  # (the client's own)
    assert not any("zebra" in line or key in line for line in ours)
