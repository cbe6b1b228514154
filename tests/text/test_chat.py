"""A log only grows, unless its template will not have it; then we are told what that costs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_tokenizers import (
    CHATML,
    DATED,
    LLAMA3,
    MISTRAL,
    MOVING_SYSTEM,
    NO_SYSTEM,
    THINKING,
    byte_fallback,
    byte_level,
    chat,
    hugging_face,
)
from tokenizers import Tokenizer

from pensieve.errors import InvalidRequest, ModelUnavailable
from pensieve.text import ChatText, Extension, Message

SYSTEM = Message("system", "You are a helpful assistant.")
ASK = Message("user", "what is the capital of France?")
AGAIN = Message("user", "why is it Paris?")
BACKENDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_level,
    "sentencepiece": byte_fallback,
    "legacy sentencepiece": lambda: byte_fallback(legacy=True),
}
APPEND_ONLY = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "plain": None}


def answer(text: ChatText, log: list[int], content: str, end: bool = True) -> tuple[list[int], Message]:
    """What a model would leave behind: the log with sampled ids, and the message."""
    ids = text.encode_text(content)
    return [*log, *ids, *(sorted(text.stop_token_ids)[:1] if end else [])], Message("assistant", content)


def turn(
    text: ChatText, said: list[Message], content: str, new: list[Message], end: bool = True
) -> tuple[list[int], Extension]:
    log, reply = answer(text, text.first(said), content, end)
    return log, text.extend(log, [*said, reply], new)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("template", APPEND_ONLY)
@pytest.mark.parametrize("end", [True, False])
def test_a_turn_is_appended(template: str, backend: str, end: bool) -> None:
    text = chat(APPEND_ONLY[template], BACKENDS[backend]())
    log, extension = turn(text, [SYSTEM, ASK], "It is Paris.", [AGAIN], end)
    assert extension.rewritten is None
    assert extension.reused_tokens == len(log)
    assert extension.tokens[: len(log)] == log
    assert "why is it Paris?" in text.decode_all(extension.tokens[len(log) :])


@pytest.mark.parametrize("template", ["chatml", "llama3"])
def test_the_log_with_and_without_its_closing_token_go_on_alike(template: str) -> None:
    text = chat(APPEND_ONLY[template])
    with_end = turn(text, [SYSTEM, ASK], "It is Paris.", [AGAIN], end=True)[1]
    without = turn(text, [SYSTEM, ASK], "It is Paris.", [AGAIN], end=False)[1]
    assert (
        with_end.tokens
        == without.tokens
        == text.first([SYSTEM, ASK, Message("assistant", "It is Paris."), AGAIN])
    )


def test_white_space_before_the_closing_token_is_not_repeated() -> None:
    spaced = CHATML.replace("<|im_end|>", " <|im_end|>")
    text = chat(spaced)
    with_end = turn(text, [ASK], "It is Paris.", [AGAIN], end=True)[1]
    assert text.decode_all(with_end.tokens).count("<|im_end|>") == 3
    without = turn(text, [ASK], "It is Paris.", [AGAIN], end=False)[1]
    assert "It is Paris. <|im_end|>" in text.decode_all(without.tokens)


def test_sampled_ids_stay_though_encoding_gives_others() -> None:
    text = chat(CHATML)
    log = text.first([ASK])
    letters = [token for letter in "Paris" for token in text.encode_text(letter)]
    assert letters != text.encode_text("Paris")
    extension = text.extend([*log, *letters], [ASK, Message("assistant", "Paris")], [AGAIN])
    assert extension.tokens[: len(log) + 5] == [*log, *letters]
    assert extension.rewritten is None


def test_an_answer_the_template_trims_is_no_rewriting() -> None:
    text = chat(LLAMA3)
    log, extension = turn(text, [ASK], "\n  Paris. \n", [AGAIN])
    assert extension.rewritten is None
    assert extension.reused_tokens == len(log)


def test_an_aborted_answer_may_be_empty() -> None:
    text = chat(CHATML)
    log, extension = turn(text, [ASK], "", [AGAIN], end=False)
    assert extension.reused_tokens == len(log)
    assert text.decode_all(extension.tokens) == text.decode_all(
        text.first([ASK, Message("assistant", ""), AGAIN])
    )


WORDS = st.text(st.sampled_from("aé 日\n😀e\u0301x1<|>") | st.characters(codec="utf-8"), max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    backend=st.sampled_from(["bytes", "sentencepiece"]),
    turns=st.lists(st.tuples(WORDS, WORDS, st.booleans()), min_size=1, max_size=5),
)
def test_appending_gives_the_text_of_the_whole_rendering(
    backend: str, turns: list[tuple[str, str, bool]]
) -> None:
    text = chat(CHATML, BACKENDS[backend]())
    said = [SYSTEM, Message("user", turns[0][0])]
    log = text.first(said)
    for index, (_, content, end) in enumerate(turns):
        log, reply = answer(text, log, content, end)
        said.append(reply)
        new = Message("user", turns[(index + 1) % len(turns)][0])
        extension = text.extend(log, said, [new])
        assert extension.rewritten is None
        assert extension.tokens[: len(log)] == log
        log = extension.tokens
        said.append(new)
    whole = (
        "".join(f"<|im_start|>{message.role}\n{message.content}<|im_end|>\n" for message in said)
        + "<|im_start|>assistant\n"
    )
    assert text.decode_all(log) == whole


def test_stripped_thinking_rewrites_the_last_answer_only() -> None:
    text = chat(THINKING)
    log, reply = answer(text, text.first([SYSTEM, ASK]), "<think>\nthink about it\n</think>\n\nParis.")
    prompt = len(text.first([SYSTEM, ASK]))
    extension = text.extend(log, [SYSTEM, ASK, reply], [AGAIN])
    assert extension.tokens == text.first([SYSTEM, ASK, reply, AGAIN])
    assert extension.reused_tokens == prompt
    assert f"from token {prompt} on" in (extension.rewritten or "")
    assert f"{len(extension.tokens) - prompt} of {len(extension.tokens)} have to be computed" in (
        extension.rewritten or ""
    )

    # The next turn finds the stripped answer in the log and keeps it.
    log, second = answer(text, extension.tokens, "Because.")
    again = text.extend(log, [SYSTEM, ASK, reply, AGAIN, second], [ASK])
    assert again.rewritten is None
    assert again.reused_tokens == len(log)


def test_thinking_stays_while_a_tool_is_asked() -> None:
    text = chat(THINKING)
    log, extension = turn(text, [ASK], "<think>\nthink\n</think>\n\nLet me see.", [Message("tool", "Paris")])
    assert extension.rewritten is None
    assert extension.reused_tokens == len(log)


def test_a_generation_prompt_that_history_lacks_is_a_rewriting() -> None:
    template = CHATML.replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
    )
    text = chat(template)
    log, extension = turn(text, [ASK], "Paris.", [AGAIN])
    assert extension.rewritten is not None
    assert 0 < extension.reused_tokens < len(log)
    assert extension.tokens == text.first([ASK, Message("assistant", "Paris."), AGAIN])


def test_a_system_prompt_that_moves_is_a_rewriting() -> None:
    text = chat(MOVING_SYSTEM)
    _, extension = turn(text, [SYSTEM, ASK], "Paris.", [AGAIN])
    assert extension.tokens == text.first([SYSTEM, ASK, Message("assistant", "Paris."), AGAIN])
    assert extension.reused_tokens == 2  # the beginning and [INST]
    assert extension.rewritten is not None


def test_a_new_day_is_a_rewriting() -> None:
    log, reply = answer(chat(DATED, today="Monday"), chat(DATED, today="Monday").first([ASK]), "Paris.")
    same = chat(DATED, today="Monday").extend(log, [ASK, reply], [AGAIN])
    assert same.rewritten is None
    tomorrow = chat(DATED, today="Tuesday")
    extension = tomorrow.extend(log, [ASK, reply], [AGAIN])
    assert extension.rewritten is not None
    assert extension.tokens == tomorrow.first([ASK, reply, AGAIN])


def test_a_template_that_drops_answers_is_a_rewriting() -> None:
    template = CHATML.replace(
        "{{ message.content }}", "{% if message.role != 'assistant' %}{{ message.content }}{% endif %}"
    )
    _, extension = turn(chat(template), [ASK], "Paris.", [AGAIN])
    assert extension.rewritten is not None


def test_a_template_may_refuse() -> None:
    with pytest.raises(InvalidRequest, match="System role not supported"):
        chat(NO_SYSTEM).first([SYSTEM, ASK])
    with pytest.raises(InvalidRequest, match="only user and assistant roles are supported"):
        turn(chat(MISTRAL), [ASK], "Paris.", [SYSTEM])
    with pytest.raises(InvalidRequest, match="at least one message"):
        chat(CHATML).first([])
    with pytest.raises(InvalidRequest, match="ends with a user message"):
        chat(CHATML).extend([1], [ASK], [AGAIN])
    with pytest.raises(InvalidRequest, match="is empty"):
        chat(CHATML).extend([1], [], [AGAIN])


def test_without_a_template_there_is_plain_text_and_a_note() -> None:
    text = chat(None)
    assert "no chat template" in (text.note or "")
    assert text.stop_strings == ("\nUser:",)
    prompt = text.decode_all(text.first([SYSTEM, ASK]))
    assert prompt == "You are a helpful assistant.\n\nUser: what is the capital of France?\nAssistant:"
    assert chat(CHATML).note is None
    assert chat(CHATML).stop_strings == ()


def test_answers_end_with_the_templates_token() -> None:
    tokenizer = hugging_face(CHATML)
    tokenizer.eos_token = "<|endoftext|>"
    text = ChatText(tokenizer)
    assert text.stop_token_ids == {
        tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_end|>")
    }


def test_load_reads_a_models_folder(tmp_path: Path) -> None:
    hugging_face(LLAMA3).save_pretrained(tmp_path)
    assert ChatText.load(tmp_path).first([SYSTEM, ASK]) == chat(LLAMA3).first([SYSTEM, ASK])
    with pytest.raises(ModelUnavailable, match="not a folder"):
        ChatText.load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelUnavailable, match="no readable tokenizer"):
        ChatText.load(tmp_path / "empty")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelUnavailable, match="no readable tokenizer"):
        ChatText.load(tmp_path)


def test_a_message_knows_its_roles() -> None:
    with pytest.raises(InvalidRequest, match="system, user, assistant, tool, got 'robot'"):
        Message("robot", "beep")
    with pytest.raises(InvalidRequest, match="must be text, got NoneType"):
        Message("user", None)  # type: ignore[arg-type]


def test_importing_the_room_loads_no_library() -> None:
    code = "import sys, pensieve.text; sys.exit(any(m in sys.modules for m in ('transformers', 'tokenizers', 'torch', 'jinja2')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
