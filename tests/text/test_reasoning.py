"""What a model thinks is not what it says, wherever the pieces are cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_tokenizers import CHATML, HERMES, THINKING, chat

from pensieve.text import ContentDelta, ReasoningDelta, ReasoningSplitter


def split(text: str, cuts: list[int], enabled: bool = True, inside: bool = False) -> tuple[str, str]:
    splitter = ReasoningSplitter(enabled, inside)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    events = [
        event for start, stop in itertools.pairwise(edges) for event in splitter.feed(text[start:stop])
    ] + splitter.finish()
    assert all(event.text for event in events)
    kinds = [isinstance(event, ContentDelta) for event in events]
    assert kinds == sorted(kinds)  # reasoning first
    return (
        "".join(event.text for event in events if isinstance(event, ReasoningDelta)),
        "".join(event.text for event in events if isinstance(event, ContentDelta)),
    )


@pytest.mark.parametrize(
    ("text", "thought", "said"),
    [
        ("<think>\nwell < now </ then\n</think>\n\nParis.\n", "well < now </ then", "Paris.\n"),
        ("\n<think></think>Paris", "", "Paris"),
        ("<think>\n\n</think>\n\n  Paris", "", "Paris"),
        ("<think>and on \n", "and on", ""),
        ("<think>and on</thin", "and on</thin", ""),
        ("<think>", "", ""),
        (" \nParis <think>no</think>", "", " \nParis <think>no</think>"),
        ("<thin air", "", "<thin air"),
        (" <thin", "", " <thin"),
        ("<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),
        ("<think>a</think>", "a", ""),
    ],
)
def test_reasoning_and_content(text: str, thought: str, said: str) -> None:
    for cuts in ([], [3], list(range(len(text)))):
        assert split(text, cuts) == (thought, said)
    assert split(text, list(range(len(text))), enabled=False) == ("", text)


def test_the_template_may_have_begun_to_think() -> None:
    assert split("\nwell\n</think>\n\nParis", [2, 8], inside=True) == ("well", "Paris")
    assert split("well", [], inside=True) == ("well", "")


PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", "<th", "</", "<", " ", "\n", "a", "bc", "é"]), max_size=10
).map("".join)


@settings(max_examples=400, deadline=None)
@given(text=PIECES, cuts=st.lists(st.integers(0, 40), max_size=8), inside=st.booleans())
def test_pieces_do_not_matter(text: str, cuts: list[int], inside: bool) -> None:
    thought, said = split(text, [], inside=inside)
    assert (
        split(text, cuts, inside=inside)
        == split(text, list(range(len(text))), inside=inside)
        == (thought, said)
    )
    begins = text.lstrip().startswith("<think>")
    if not inside and not begins:
        assert (thought, said) == ("", text)
    else:
        rest = text if inside else text.lstrip()[len("<think>") :]
        before, _, after = rest.partition("</think>")
        assert (thought, said) == (before.strip(), after.lstrip())


@settings(max_examples=200, deadline=None)
@given(text=PIECES, inside=st.booleans())
def test_nothing_is_held_back_without_need(text: str, inside: bool) -> None:
    splitter = ReasoningSplitter(inside=inside)
    for index, char in enumerate(text):
        shown = splitter.feed(char)
        if index and shown and not text[:index].strip() and char.strip() and char != "<":
            assert shown[-1].text.endswith(char)
    assert len(splitter._held.strip()) < len("</think>")


def test_templates_decide() -> None:
    asked = [ContentDelta("<think>a</think>b")]
    assert chat(CHATML).reasoning_splitter().feed("<think>a</think>b") == asked
    assert chat(HERMES).reasoning_splitter().feed("<think>a</think>b") == asked
    thought = [ReasoningDelta("a"), ContentDelta("b")]
    assert chat(THINKING).reasoning_splitter().feed("<think>a</think>b") == thought
    begun = chat(
        THINKING.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    )
    assert begun.reasoning_splitter().feed("a</think>b") == thought
