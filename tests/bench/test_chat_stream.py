"""Streamed answers, cut anywhere."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pensieve.bench.chat_stream import EventSplitter, StreamedAnswer, TurnFailed, refusal


def events_of(*pieces: bytes) -> list[bytes]:
    splitter = EventSplitter()
    return [event for piece in pieces for event in splitter.feed(piece)] + list(splitter.finish())


STREAM = b': hello\n\nevent: x\ndata: {"a": 1}\n\ndata: one\ndata:two\r\n\r\nid: 7\n\ndata: [DONE]\n\ndata: \xc3\xa9'
EVENTS = [b'{"a": 1}', b"one\ntwo", b"[DONE]", b"\xc3\xa9"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@given(cuts=st.lists(st.integers(0, 120), max_size=8))
def test_events_do_not_depend_on_where_the_bytes_are_cut(end: bytes, cuts: list[int]) -> None:
    data = STREAM.replace(b"\r\n", b"\n").replace(b"\n", end)
    marks = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    assert events_of(*(data[start:stop] for start, stop in itertools.pairwise(marks))) == EVENTS


def test_an_event_without_end_is_refused() -> None:
    with pytest.raises(TurnFailed, match="more than"):
        events_of(*[b"x" * (1 << 22)] * 5)


def chunk(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def test_pieces_without_words_are_not_the_first_token() -> None:
    answer = StreamedAnswer()
    answer.take(chunk(choices=[{"delta": {"role": "assistant", "content": ""}}]), 1.0)
    answer.take(chunk(choices=[{"delta": {"content": "a"}}]), 2.0)
    answer.take(chunk(choices=[{"delta": {"content": "b"}, "finish_reason": "length"}]), 3.5)
    assert (answer.text, answer.first_s, answer.piece_times_s, answer.finish_reason) == (
        "ab",
        2.0,
        [2.0, 3.5],
        "length",
    )


def test_reasoning_is_time_but_no_answer() -> None:
    answer = StreamedAnswer()
    answer.take(chunk(choices=[{"delta": {"reasoning_content": "hm"}}]), 1.0)
    answer.take(chunk(choices=[{"delta": {"content": "yes"}}]), 2.0)
    assert (answer.text, answer.first_s, answer.num_pieces) == ("yes", 1.0, 2)


@pytest.mark.parametrize(
    ("fields", "cached"),
    [
        ({"usage": {"prompt_tokens": 9}}, None),
        ({"usage": {"prompt_tokens": 9, "prompt_tokens_details": None}}, None),
        ({"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}}, 4),
        ({"usage": {"prompt_tokens": 9}, "timings": {"cache_n": 6, "prompt_n": 3}}, 6),
        ({"usage": {"prompt_tokens_details": {"cached_tokens": 0}}, "timings": {"cache_n": 6}}, 0),
    ],
)
def test_where_servers_say_what_they_had(fields: dict[str, object], cached: int | None) -> None:
    answer = StreamedAnswer()
    answer.take(chunk(choices=[], **fields), 1.0)
    assert answer.cached_tokens == cached


def test_a_refusal_keeps_its_status() -> None:
    failure = refusal(422, b'{"detail": "Unexpected fields in the request: {\'ignore_eos\'}"}')
    assert failure.status == 422 and "ignore_eos" in failure.message
