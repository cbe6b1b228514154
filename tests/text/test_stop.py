"""The first stop string ends the text, wherever the pieces are cut."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_tokenizers import CHATML, byte_fallback, byte_level, chat

from pensieve.errors import InvalidRequest
from pensieve.text import StopStrings, keep_tokens

TEXT = st.text("ab\nX", max_size=30)
STOPS = st.lists(st.text("ab\nX", min_size=1, max_size=5), max_size=4)


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Read on until some stop string is complete; of several, the one that begins first."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=300, deadline=None)
@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 30), max_size=10))
def test_any_pieces_give_what_a_plain_search_gives(text: str, stops: list[str], cuts: list[int]) -> None:
    searcher = StopStrings(stops)
    shown, hit = "", None
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, stop in itertools.pairwise(edges):
        emit, hit = searcher.feed(text[start:stop])
        shown += emit
    shown += searcher.finish()
    assert (shown, hit) == naive(text, stops)
    assert searcher.hit == hit


@settings(max_examples=200, deadline=None)
@given(text=TEXT, stops=STOPS)
def test_nothing_is_held_back_without_need(text: str, stops: list[str]) -> None:
    searcher = StopStrings(stops)
    shown = ""
    for index, char in enumerate(text, start=1):
        emit, hit = searcher.feed(char)
        shown += emit
        if hit is not None:
            break
        held = text[len(shown) : index]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_after_a_hit_nothing_more_is_shown() -> None:
    searcher = StopStrings(["END"])
    assert searcher.feed("one E") == ("one ", None)
    assert searcher.feed("ND two") == ("", "END")
    assert searcher.feed("three") == ("", "END")
    assert searcher.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="at least one character"):
        StopStrings(["x", ""])


@pytest.mark.parametrize("backend", [byte_level, byte_fallback])
def test_kept_tokens_and_the_rest_are_the_kept_text(backend: object) -> None:
    text = chat(CHATML, backend())  # type: ignore[operator]
    ids = text.encode_text("Hello there, 日本 how are you? 😀 thank you very much")
    whole = text.decode(ids)
    best = [n for n in range(len(ids) + 1) if "\ufffd" not in text.decode(ids[:n])]
    for length in range(len(whole) + 1):
        kept = whole[:length]
        count, residue = keep_tokens(text.detokenizer(), ids, kept)
        assert text.decode(ids[:count]) + residue == kept
        assert count >= max(
            n for n in best if kept.startswith(text.decode(ids[:n])) and _settled(text, ids, n)
        )


def _settled(text: object, ids: list[int], n: int) -> bool:
    """A run of byte tokens is only over when something else comes."""
    return n == len(ids) or n == 0 or ids[n - 1] not in text._byte_ids  # type: ignore[attr-defined]


def test_an_answer_kept_whole_keeps_its_end_token() -> None:
    text = chat(CHATML)
    ids = [*text.encode_text("Paris."), *text.stop_token_ids]
    assert keep_tokens(text.detokenizer(), ids, "Paris.") == (len(ids), "")
    count, residue = keep_tokens(text.detokenizer(), ids, "Pari")
    assert count < len(ids) - 1
    assert text.decode(ids[:count]) + residue == "Pari"


def test_a_text_that_nearly_stops_again_and_again_takes_no_longer() -> None:
    search = StopStrings(["a" * 1000 + str(digit) for digit in range(10)])
    begun = time.process_time()
    shown = "".join(search.feed("aaaa")[0] for _ in range(3000))
    assert len(shown) == 12_000 - 1000
    assert time.process_time() - begun < 5.0  # (it took the cube of the stop strings' length)
