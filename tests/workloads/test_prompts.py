"""Words in a random order: as many as asked for, never the same beginning twice."""

from __future__ import annotations

import pytest

from pensieve.errors import ConfigError
from pensieve.workloads.prompts import PromptWriter


def test_a_text_has_the_words_asked_for_and_is_the_same_every_time() -> None:
    writer = PromptWriter(5)
    for num_words in (1, 2, 13, 400):
        text = writer.write("0/0", num_words)
        assert len(text.split()) == num_words and text == PromptWriter(5).write("0/0", num_words)
        assert text.endswith(".") and text[0].isupper()


def test_no_two_texts_begin_alike() -> None:
    texts = [
        writer.write(f"{c}/{turn}", 20)
        for writer in (PromptWriter(0), PromptWriter(1))
        for c in range(100)
        for turn in range(3)
    ]
    assert len({" ".join(text.split()[:3]) for text in texts}) == len(texts)


def test_the_vocabulary_is_of_common_words() -> None:
    words = PromptWriter(0).words
    assert (
        len(words) > 1000
        and {"the", "what"} <= set(words)
        and all(word.isalpha() and word.islower() for word in words)
    )


def test_a_text_of_no_words_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1 word"):
        PromptWriter(0).write("0/0", 0)
