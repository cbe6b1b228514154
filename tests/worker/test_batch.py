"""Spans to tensors, on a story small enough to write every number out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pensieve.core.plan import BlockTableUpdate, Span
from pensieve.worker.batch import Batch, BatchBuilder

CPU = torch.device("cpu")


def never(span: Span) -> int:
    raise AssertionError(f"{span} brings its ids")


def builder(**tables: tuple[int, ...]) -> BatchBuilder:
    made = BatchBuilder(4, CPU)
    made.update(BlockTableUpdate(name, 0, slots) for name, slots in tables.items())
    return made


def test_a_prompt_a_hole_and_a_decode_in_one_batch() -> None:
    batch = builder(a=(7, 2, 5), b=(3,)).build(
        (Span("a", 2, 5, (10, 11, 12), False), Span("a", 8, 10, (13, 14), True), Span("b", 3, 4, None, True)),
        lambda span: 99,
    )
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 14, 99]]
    assert batch.position_ids.tolist() == [[2, 3, 4, 8, 9, 3]]
    assert batch.slot_mapping.tolist() == [7 * 4 + 2, 7 * 4 + 3, 2 * 4, 5 * 4, 5 * 4 + 1, 3 * 4 + 3]
    assert batch.cu_seqlens_q.tolist() == [0, 3, 5, 6]
    assert batch.context_lens.tolist() == [5, 10, 4]
    assert batch.block_tables.tolist() == [[7, 2, 0], [7, 2, 5], [3, 0, 0]]
    assert batch.logit_rows.tolist() == [4, 5]
    assert [span.request_id for span in batch.emitting] == ["a", "b"]
    assert batch.num_tokens == 6


def test_a_batch_that_emits_nothing_has_no_logit_rows() -> None:
    assert builder(a=(1,)).build((Span("a", 0, 2, (5, 6), False),), never).logit_rows.tolist() == []


def test_what_lay_beyond_an_update_is_void() -> None:
    made = builder(a=(1, 2, 3))
    made.update([BlockTableUpdate("a", 1, (8,))])
    assert made.slots_of(Span("a", 0, 8, None, True)).tolist() == [1, 8]
    for ask in (made.slots_of, lambda span: made.build((span,), lambda span: 1)):
        with pytest.raises(AssertionError, match="needs 3 chunks, its block table has 2"):
            ask(Span("a", 8, 9, None, True))


def test_cells_beyond_a_table_that_was_shortened_are_zero() -> None:
    made = builder(a=(1, 2, 3), b=(4, 5))
    made.update([BlockTableUpdate("a", 0, (8,))])
    made.forget(["b"])
    made.update([BlockTableUpdate("c", 0, (6,)), BlockTableUpdate("d", 0, (7, 7))])
    spans = tuple(Span(name, stop - 1, stop, (1,), True) for name, stop in (("a", 4), ("c", 4), ("d", 8)))
    assert made.build(spans, never).block_tables.tolist() == [[8, 0], [6, 0], [7, 7]]


def test_an_update_may_not_leave_a_gap() -> None:
    with pytest.raises(AssertionError, match="update begins at 3"):
        builder(a=(1, 2)).update([BlockTableUpdate("a", 3, (8,))])


def test_ended_requests_are_forgotten() -> None:
    made = builder(a=(1,), b=(2,))
    made.forget(["a"])
    with pytest.raises(KeyError):
        made.slots_of(Span("a", 0, 1, None, True))
    made.slots_of(Span("b", 0, 1, None, True))


def test_ids_must_match_the_span() -> None:
    with pytest.raises(AssertionError, match="1 token ids for"):
        builder(a=(1,)).build((Span("a", 0, 2, (5,), True),), never)


def numbers(batch: Batch) -> list[list[int]]:
    """Everything a batch says, as it says it now."""
    tensors = (
        batch.input_ids,
        batch.position_ids,
        batch.slot_mapping,
        batch.cu_seqlens_q,
        batch.context_lens,
        batch.block_tables,
        batch.logit_rows,
    )
    return [tensor.tolist() for tensor in tensors]


def test_a_decode_alone_takes_the_short_way_to_the_same_numbers() -> None:
    batch = builder(a=(7, 2, 5), b=(3,)).build(
        (Span("b", 3, 4, (8,), True), Span("a", 8, 9, None, False)), lambda span: 99
    )
    assert numbers(batch) == [
        [[8, 99]],
        [[3, 8]],
        [3 * 4 + 3, 5 * 4],
        [0, 1, 2],
        [4, 9],
        [[3, 0, 0], [7, 2, 5]],
        [0],
    ]
    assert [span.request_id for span in batch.emitting] == ["b"]


def test_a_batch_that_waits_to_be_run_is_out_of_reach_of_later_plans() -> None:
    """The next plan lets a request grow, another be admitted anew, a third end and a fourth take its place.

    All before this batch runs.
    """
    made = builder(a=(1, 2), b=(3,), c=(4,))
    spans = (Span("a", 7, 8, (10,), True), Span("b", 3, 4, (11,), True), Span("c", 2, 3, (12,), True))
    waiting = made.build(spans, never)
    before = numbers(waiting)
    made.forget(["c"])
    made.update(
        [
            BlockTableUpdate("a", 0, (9, 9, 9)),
            BlockTableUpdate("b", 1, (8,)),
            BlockTableUpdate("d", 0, (7,) * 200),
        ]
    )
    following = made.build((Span("d", 0, 2, (5, 6), True), Span("a", 8, 9, None, True)), lambda span: 10)
    assert numbers(waiting) == before
    following.block_tables.fill_(0)
    following.context_lens.fill_(0)
    assert made.slots_of(Span("a", 8, 9, None, True)).tolist() == [9, 9, 9]
    again = made.build(spans[:2], never)
    assert again.cu_seqlens_q.tolist() == [0, 1, 2] and again.block_tables.tolist() == [[9, 9], [3, 0]]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_tables_follow_every_history_of_updates(data: st.DataObject) -> None:
    """Against tables kept as plain lists.

    Growth, shortening, requests that end and whose rows others take, wide and many.
    """
    made, truth = BatchBuilder(4, CPU), dict[str, list[int]]()
    for slot in range(data.draw(st.integers(1, 30))):
        name = data.draw(st.sampled_from("abcdefghijklmnop"))
        if data.draw(st.integers(0, 4)) == 0:
            made.forget([name])
            truth.pop(name, None)
        else:
            first = data.draw(st.integers(0, len(truth.get(name, []))))
            added = [slot + 1] * data.draw(st.sampled_from([1, 1, 2, 5, 70, 150]))
            made.update([BlockTableUpdate(name, first, tuple(added))])
            truth[name] = truth.get(name, [])[:first] + added
        if not truth:
            continue
        names = data.draw(st.lists(st.sampled_from(sorted(truth)), min_size=1, unique=True))
        only_decodes = data.draw(st.booleans())
        spans = []
        for name in names:
            stop = data.draw(st.integers(1, 4 * len(truth[name])))
            start = stop - 1 if only_decodes else data.draw(st.integers(max(0, stop - 9), stop - 1))
            spans.append(Span(name, start, stop, tuple(range(start, stop)), data.draw(st.booleans())))
        batch = made.build(tuple(spans), never)
        positions = [position for span in spans for position in range(span.start, span.stop)]
        assert batch.position_ids.tolist() == batch.input_ids.tolist() == [positions]
        slots = [
            truth[span.request_id][position // 4] * 4 + position % 4
            for span in spans
            for position in range(span.start, span.stop)
        ]
        assert batch.slot_mapping.tolist() == slots
        contexts = [truth[span.request_id][: -(-span.stop // 4)] for span in spans]
        width = max(map(len, contexts))
        assert batch.block_tables.tolist() == [context + [0] * (width - len(context)) for context in contexts]
        ends = [sum(other.stop - other.start for other in spans[: index + 1]) for index in range(len(spans))]
        assert batch.cu_seqlens_q.tolist() == [0, *ends] and batch.context_lens.tolist() == [
            span.stop for span in spans
        ]
        assert batch.logit_rows.tolist() == [
            end - 1 for end, span in zip(ends, spans, strict=True) if span.emits_token
        ]
