"""Spans to tensors, on a story small enough to write every number out."""

from __future__ import annotations

import pytest
import torch

from pensieve.core.plan import BlockTableUpdate, Span
from pensieve.worker.batch import BatchBuilder

CPU = torch.device("cpu")


def never(span: Span) -> int:
    raise AssertionError(f"{span} brings its ids")


def builder(**tables: tuple[int, ...]) -> BatchBuilder:
    made = BatchBuilder(4, CPU)
    made.update(BlockTableUpdate(name, 0, slots) for name, slots in tables.items())
    return made


def test_a_prompt_a_hole_and_a_decode_in_one_batch() -> None:
    batch = builder(a=(7, 2, 5), b=(3,)).build(
        (Span("a", 2, 5, (10, 11, 12), False), Span("a", 8, 10, (13, 14), True), Span("b", 3, 4, None, True)), lambda span: 99
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
    with pytest.raises(AssertionError, match="needs 3 chunks"):
        made.slots_of(Span("a", 8, 9, None, True))


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
