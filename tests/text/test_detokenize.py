"""Text that arrives in pieces is the text, and no piece ends within a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_tokenizers import CHATML, byte_fallback, byte_level, chat

from pensieve.text import ChatText, Detokenizer
from pensieve.text.detokenize import SLIDE_AT

TEXTS = {"bytes": lambda: chat(CHATML, byte_level()), "sentencepiece": lambda: chat(CHATML, byte_fallback())}
SAMPLES = [
    "Hello there, how are you today?",
    "👩‍👩‍👧‍👦 family 🇫🇷 flag 👍🏽",
    "日本語の文章、中文句子。한국어",
    "e\u0301 a\u0308\u0323 n\u0303",
    "   indented\n\n\tcode  ",
    "a literal \ufffd and \ufffd\ufffd more",
    "مرحبا بالعالم",
]


def stream(text: ChatText, ids: Sequence[int], size: int = 1) -> list[str]:
    detokenizer = text.detokenizer()
    return [*(detokenizer.push(ids[i : i + size]) for i in range(0, len(ids), size)), detokenizer.finish()]


@pytest.mark.parametrize("backend", TEXTS)
@pytest.mark.parametrize("sample", SAMPLES)
def test_pieces_are_whole_characters_and_sum_up(backend: str, sample: str) -> None:
    text = TEXTS[backend]()
    ids = text.encode_text(sample)
    pieces = stream(text, ids)
    assert "".join(pieces) == text.decode(ids)
    assert "".join(pieces) == (
        sample.removeprefix(" ") if backend == "sentencepiece" else sample
    )  # it drops a leading space
    if "\ufffd" not in sample:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("backend", TEXTS)
def test_long_texts_do(backend: str) -> None:
    text = TEXTS[backend]()
    ids = text.encode_text("\n".join(SAMPLES) * 20)
    assert "".join(stream(text, ids)) == text.decode(ids)


@settings(max_examples=150, deadline=None)
@given(backend=st.sampled_from(list(TEXTS)), content=st.text(max_size=120), size=st.integers(1, 7))
def test_any_text_does(backend: str, content: str, size: int) -> None:
    text = TEXTS[backend]()
    ids = text.encode_text(content)
    assert "".join(stream(text, ids, size)) == text.decode(ids)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), backend=st.sampled_from(list(TEXTS)), size=st.integers(1, 4))
def test_any_ids_do_valid_characters_or_not(data: st.DataObject, backend: str, size: int) -> None:
    text = TEXTS[backend]()
    vocabulary = text._backend.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, vocabulary - 1), max_size=150))
    assert "".join(stream(text, ids, size)) == text.decode(ids)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from([0xFF, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0x41, 0x20]), max_size=120),
    st.sampled_from(list(TEXTS)),
)
def test_any_bytes_do(values: list[int], backend: str) -> None:
    text = TEXTS[backend]()
    if backend == "bytes":
        names = {b: next(iter(c)) for b, c in zip(_gpt2_order(), _gpt2_alphabet(), strict=True)}
        ids = [text._backend.token_to_id(names[value]) for value in values]
    else:
        ids = [text._backend.token_to_id(f"<0x{value:02X}>") for value in values]
    assert None not in ids
    assert "".join(stream(text, ids)) == text.decode(ids)


def _gpt2_order() -> list[int]:
    """Bytes in the order of their stand-ins: printable ones are themselves, the rest follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return printable + [byte for byte in range(256) if byte not in printable]


def _gpt2_alphabet() -> list[str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]


def test_special_tokens_have_no_text() -> None:
    text = chat(CHATML)
    end = text._backend.token_to_id("<|im_end|>")
    ids = [*text.encode_text("a"), end, *text.encode_text("b")]
    assert stream(text, ids) == ["a", "", "b", ""]


def test_half_a_character_is_shown_at_the_end_as_what_it_is() -> None:
    text = chat(CHATML)
    ids = text.encode_text("😀")
    assert len(ids) > 1
    detokenizer = text.detokenizer()
    assert detokenizer.push(ids[:-1]) == ""
    assert detokenizer.holds_back
    assert detokenizer.finish() == "\ufffd"
    assert not detokenizer.holds_back


def recorded(decode: Callable[[Sequence[int]], str], sizes: list[int]) -> Callable[[Sequence[int]], str]:
    def counting(ids: Sequence[int]) -> str:
        sizes.append(len(ids))
        return decode(ids)

    return counting


@pytest.mark.parametrize("backend", TEXTS)
@pytest.mark.parametrize("sample", ["word " * 2000, "日本語" * 700, "\ufffd" * 1000, "a"])
def test_a_token_costs_the_same_however_long_the_answer(backend: str, sample: str) -> None:
    text = TEXTS[backend]()
    ids = text.encode_text(sample)
    sizes: list[int] = []
    detokenizer = Detokenizer(recorded(text.decode, sizes), text._special_ids, text._byte_ids)
    for token_id in ids:
        detokenizer.push((token_id,))
    detokenizer.finish()
    assert sum(sizes) <= 2 * SLIDE_AT * len(ids)


def test_a_stream_of_invalid_bytes_costs_no_more() -> None:
    text = chat(CHATML)
    bad = text._backend.token_to_id("ÿ")  # the byte 0xFF
    sizes: list[int] = []
    detokenizer = Detokenizer(recorded(text.decode, sizes))
    shown = [detokenizer.push((bad,)) for _ in range(2000)]
    assert "".join(shown) + detokenizer.finish() == text.decode([bad] * 2000)
    assert sum(sizes) <= 2 * SLIDE_AT * 2000


def test_tokens_without_text_do_not_swallow_the_next_space() -> None:
    def decode(ids: Sequence[int]) -> str:
        return "".join({0: "", 1: " word"}[token_id] for token_id in ids).removeprefix(" ")

    for silent in (5, SLIDE_AT, 5 * SLIDE_AT):
        ids = [1] * SLIDE_AT + [0] * silent + [1] * 3
        detokenizer = Detokenizer(decode)
        assert "".join(detokenizer.push((token_id,)) for token_id in ids) + detokenizer.finish() == decode(
            ids
        )
