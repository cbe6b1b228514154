"""What a user should know of a model is said at every start; a model that must talk and cannot is refused before its weights are loaded."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pensieve.cli.commands import cli
from pensieve.errors import PensieveError
from pensieve.worker import weights
from pensieve.worker.weights import resolve
from tiny_gguf import TEMPLATE, tiny_llama, write_gguf

SMALL = ["--gpu-cache", "0.005", "--cpu-cache", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer and a template, as a plain folder."""
    place = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENSIEVE_CACHE", str(place / "cache"))
        converted = resolve(str(write_gguf(place / "tiny.gguf", tiny_llama()))).folder
        assert converted is not None
        shutil.copytree(converted, place / "tiny")
    return place / "tiny"


def chat(model: Path, *words: str) -> Result:
    return CliRunner().invoke(
        cli,
        ["chat", "--model", str(model), "--store", ":memory:", "--max-new-tokens", "2", *SMALL, *words],
        input="hello\n",
    )


def with_template(folder: Path, place: Path, template: str | None) -> Path:
    shutil.copytree(folder, place / "copy")
    (place / "copy" / "chat_template.jinja").unlink(missing_ok=True)
    if template is not None:
        (place / "copy" / "chat_template.jinja").write_text(template)
    return place / "copy"


def test_a_model_in_order_has_no_notes(folder: Path) -> None:
    said = chat(folder)
    assert said.exit_code == 0 and "note:" not in said.output and "[prompt" in said.output


def test_what_conversion_knew_is_said_at_every_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSIEVE_CACHE", str(tmp_path))
    gguf = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), pre="never-heard-of")
    for _ in range(2):
        assert chat(gguf).output.count("note: text is split as GPT-2 does") == 1


def test_a_broken_template_is_said_at_start_and_another_can_be_given(folder: Path, tmp_path: Path) -> None:
    model = with_template(folder, tmp_path, "{% for m in messages %}{{ m.content }")
    said = chat(model)
    assert re.search(
        r"note: the model's chat template does not write a user's message.*line 1.*--chat-template",
        said.output,
    )
    (tmp_path / "good.jinja").write_text(TEMPLATE)
    again = chat(model, "--chat-template", str(tmp_path / "good.jinja"))
    assert "note:" not in again.output and "[prompt" in again.output


def test_a_model_without_a_template_says_what_is_used(folder: Path, tmp_path: Path) -> None:
    assert "note: this model has no chat template" in chat(with_template(folder, tmp_path, None)).output


@pytest.mark.parametrize("command", ["chat", "serve", "compare"])
def test_a_template_of_ones_own_that_fails_is_refused_at_start(
    command: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "load", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "bad.jinja").write_text("\n{% if %}")
    for file, words in (("bad.jinja", r"bad\.jinja, line 2"), ("none.jinja", r"none\.jinja cannot be read")):
        store = {
            "chat": ["--store", ":memory:"],
            "serve": ["--port", "0", "--store", ":memory:"],
            "compare": [],
        }[command]
        said = CliRunner().invoke(
            cli, [command, "--model", str(folder), "--chat-template", str(tmp_path / file), *store]
        )
        assert isinstance(said.exception, PensieveError) and re.search(words, said.exception.message)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda place: [path.unlink() for path in place.glob("*token*")], "has no tokenizer"),
        (lambda place: (place / "tokenizer.json").write_text("{"), "tokenizer.json is not JSON"),
        (lambda place: (place / "tokenizer.json").write_text("{}"), "no readable tokenizer"),
        (lambda place: (place / "tokenizer.json").write_text("[]"), "tokenizer.json is not JSON"),
        (lambda place: (place / "tokenizer.json").rename(place / "tokenizer.model"), "tokenizer.model only"),
    ],
)
def test_who_must_talk_and_cannot_is_refused_before_weights_are_loaded(
    spoil: object, words: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(spoil)
    model = with_template(folder, tmp_path, TEMPLATE)
    spoil(model)
    monkeypatch.setattr(weights, "load", lambda *_, **__: pytest.fail("loaded"))
    said = chat(model)
    assert isinstance(said.exception, PensieveError) and words in said.exception.message


def test_a_server_says_its_notes_where_it_says_that_it_listens(folder: Path, tmp_path: Path) -> None:
    model = with_template(folder, tmp_path, None)
    command = [
        sys.executable,
        "-u",
        "-m",
        "pensieve",
        "serve",
        "--model",
        str(model),
        "--port",
        "0",
        "--store",
        f"sqlite:///{tmp_path}/c.db",
        *SMALL,
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        lines = []
        for line in server.stdout:
            lines.append(line)
            if line.startswith("listening"):
                break
        assert sum("note: this model has no chat template" in line for line in lines) == 1
    finally:
        server.terminate()
        server.wait(60)
