"""The oldest turns go first, question and answer together; the system prompt and the newest question stay."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pensieve.errors import ContextLengthExceeded
from pensieve.text import Message, Truncated, overflow, surely_exceed, truncate


def count(messages: Sequence[Message]) -> int:
    return sum(len(message.content) for message in messages)


SYSTEM = Message("system", "s" * 10)
CHAT = [
    SYSTEM,
    *(Message(role, role[0] * 10) for _ in range(3) for role in ("user", "assistant")),
    Message("user", "u" * 10),
]


def test_what_fits_stays() -> None:
    assert truncate(CHAT, 80, count) == Truncated(tuple(CHAT), 0)


@pytest.mark.parametrize(("limit", "dropped"), [(79, 2), (60, 2), (59, 4), (40, 4), (39, 6), (20, 6)])
def test_whole_turns_are_dropped(limit: int, dropped: int) -> None:
    assert truncate(CHAT, limit, count) == Truncated((SYSTEM, *CHAT[1 + dropped :]), dropped)


def test_tool_messages_go_with_their_turn() -> None:
    messages = [
        Message("user", "a"),
        Message("assistant", "b"),
        Message("tool", "c"),
        Message("assistant", "d"),
        Message("user", "e"),
    ]
    assert truncate(messages, 4, count) == Truncated((messages[-1],), 4)


def test_an_answer_without_a_question_goes_first() -> None:
    messages = [SYSTEM, Message("assistant", "Welcome!"), Message("user", "hi")]
    assert truncate(messages, 12, count) == Truncated((SYSTEM, messages[-1]), 1)


def test_the_newest_turn_must_fit() -> None:
    with pytest.raises(ContextLengthExceeded, match=r"have 20 tokens, the context holds 19"):
        truncate(CHAT, 19, count)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 60))
def test_no_more_than_necessary(lengths: list[int], limit: int) -> None:
    messages = [m for n in lengths for m in (Message("user", "u" * n), Message("assistant", "a"))][:-1]
    try:
        kept = truncate(messages, limit, count)
    except ContextLengthExceeded:
        assert count(messages[-1:]) > limit
        return
    assert count(kept.messages) <= limit
    assert kept.messages == tuple(messages[kept.dropped :])
    assert kept.dropped % 2 == 0
    assert kept.dropped == 0 or count(messages[kept.dropped - 2 :]) > limit


@given(
    st.lists(st.text(alphabet="ab \u00e9", max_size=60), max_size=6), st.integers(0, 120), st.integers(1, 9)
)
def test_only_what_does_not_fit_is_called_too_long(texts: list[str], limit: int, width: int) -> None:
    def count(text: str) -> int:  # tokens of up to `width` characters
        return -(-len(text) // width)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overflow, "PIECE_CHARS", 7)
        patch.setattr(overflow, "CUT_TOKENS", 1)
        patch.setattr(overflow, "FREE_CHARS", 0)
        patch.setattr(overflow, "FREE_CHARS_PER_TOKEN", 0)
        exceeds = surely_exceed(texts, limit, count)
    assert not exceeds or sum(map(count, texts)) > limit


def test_a_long_text_is_not_counted_to_its_end() -> None:
    seen: list[int] = []

    def count(text: str) -> int:
        seen.append(len(text))
        return len(text) // 4

    assert surely_exceed(["x" * 10_000_000], 1000, count) and sum(seen) <= 2 * overflow.PIECE_CHARS
    assert not surely_exceed(["x" * 900], 1000, count)
