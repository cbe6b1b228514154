"""Chat templates that fail are said at start, with what fails, where, and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
from text_tokenizers import chat

from pensieve.errors import ConfigError
from pensieve.text.template import read_template, what_fails

GOOD = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + GOOD
)
FIRST_TURN_ONLY = "{% if messages|length > 2 %}{{ raise_exception('one question only') }}{% endif %}" + GOOD


def test_a_good_template_has_no_trouble() -> None:
    assert what_fails(GOOD, {}) == {}
    assert chat(GOOD).note is None


@pytest.mark.parametrize(
    ("source", "what", "line"),
    [
        ("\n\n{% for m in messages %}{{ m.content }", "a user's message", 3),  # does not parse
        ("\n{{ messages[0].content + 3 }}", "a user's message", 2),  # fails when it runs
        ("{{ nothing.at.all }}", "a user's message", 1),
        ("Hello.", "a user's message", None),  # says the same to everything
        (NO_SYSTEM, "a system message", None),
        (FIRST_TURN_ONLY, "a second question", None),
    ],
)
def test_what_a_template_does_not_write_is_found(source: str, what: str, line: int | None) -> None:
    found = what_fails(source, {})
    assert what in found
    assert line is None or found[what][0] == line


def test_a_models_own_template_that_fails_is_noted_with_the_way() -> None:
    broken = chat("{% for m in messages %}{{ m.content }").note
    assert (
        broken is not None
        and "does not write a user's message" in broken
        and "line 1" in broken
        and "--chat-template" in broken
    )
    system = chat(NO_SYSTEM).note
    assert (
        system is not None
        and "a system message (" in system
        and "System role not supported" in system
        and "user's" not in system
    )


def test_no_template_says_what_is_used_instead() -> None:
    note = chat(None).note
    assert note is not None and '"User: ..."' in note and "--chat-template FILE" in note


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "mine.jinja"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_template_of_ones_own_is_read(tmp_path: Path) -> None:
    assert read_template(write(tmp_path, GOOD)) == GOOD
    assert read_template(write(tmp_path, NO_SYSTEM)) == NO_SYSTEM  # noted, not refused


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "{% for m in messages %}\n{{ m.content }",
            r"mine.jinja, line 2: it does not write a user's message",
        ),
        ("{% endfor %}", r"mine.jinja, line 1"),
        (FIRST_TURN_ONLY, "does not write a second question: one question only"),
        ("Hello.", "what was said is not in what it writes"),
        ("  ", "is empty"),
        ('{"chat_template": "x"}', "is JSON"),
        (b"\xff\xfe", "no text in UTF-8"),
    ],
)
def test_a_template_of_ones_own_that_fails_is_refused_by_file_and_line(
    text: str | bytes, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        read_template(write(tmp_path, text))


def test_a_template_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.jinja cannot be read: No such file"):
        read_template(tmp_path / "nowhere.jinja")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_template(tmp_path)
