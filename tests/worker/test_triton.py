"""The Triton kernels against the reference: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention_bench import CPU, HEADS, LONG_STORY, STORY, Bench, args_of, contexts_of, ids, spans_of_a_step
from pensieve.core.plan import Span
from pensieve.worker.attention import AttentionArgs, KVGeometry, make_backend
from pensieve.worker.attention.triton import Reduction, Tiling, TritonAttention, WorkItem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytest.importorskip("triton")

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def also(*arguments: Any) -> Any:
    """A variant that differs from its neighbours in nothing that they do not try together.

    For `make check-kernels`.
    """
    return pytest.param(*arguments, marks=pytest.mark.kernels)


def bench(
    spans: tuple[Span, ...], kv_heads: int, dtype: torch.dtype, *, programs: int | None = 2, **options: Any
) -> Bench:
    return Bench(
        "triton", contexts_of(spans), kv_heads, dtype, device=DEVICE, num_programs=programs, **options
    )


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("plain", torch.float32), ("softcap", torch.bfloat16), ("sinks", torch.float16), also("plain",
            torch.bfloat16),
        also("plain", torch.float16), also("softcap", torch.float32), also("softcap", torch.float16),
            also("sinks", torch.float32),
        also("sinks", torch.bfloat16),
    ],
)  # fmt: skip
def test_ragged_spans_over_scattered_slots(kind: str, dtype: torch.dtype) -> None:
    bench(LONG_STORY, 2, dtype, dim=16, chunk=32).check(LONG_STORY, args_of(kind))


@pytest.mark.parametrize(
    ("window", "kind"),
    [
        (1, "plain"), (7, "sinks"), (40, "plain"), (200, "sinks"), also(1, "sinks"), also(7, "plain"),
            also(40, "sinks"), also(200, "plain"),
    ],
)  # fmt: skip
def test_windows(window: int, kind: str) -> None:
    bench(LONG_STORY, 2, torch.float16, dim=16, chunk=32).check(LONG_STORY, args_of(kind, window))


@pytest.mark.parametrize("dim", [8, 64, 80, also(96), also(128), 256])
def test_every_head_size(dim: int) -> None:
    spans = (ids("prompt", 0, 40), ids("hole", 3, 9), ids("hole", 50, 53), ids("one", 70, 71))
    bench(spans, 2, torch.bfloat16, dim=dim, chunk=32).check(spans, args_of("plain", 30))


@pytest.mark.parametrize("group", [1, 2, 3, 7, 8, 20])
def test_every_group(group: int) -> None:
    spans = (ids("prompt", 0, 40), ids("more", 33, 41), ids("one", 70, 71))
    bench(spans, 2, torch.float16, heads=2 * group, dim=16, chunk=16).check(
        spans, AttentionArgs(0.3, 50, 20.0, torch.linspace(-2, 2, 2 * group))
    )


@pytest.mark.parametrize("chunk", [4, 16, 32, 64])
def test_every_chunk(chunk: int) -> None:
    bench(STORY, 1, torch.float32, chunk=chunk).check(STORY, args_of("plain"))


@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize("window", [None, 300, 600])
def test_long_contexts_are_divided_and_put_together(window: int | None, kind: str) -> None:
    """Of the three parts of the longest, windows leave out the first, or a piece of it."""
    spans = (ids("long", 719, 720), ids("short", 40, 41), ids("some", 500, 503))
    here = bench(spans, 2, torch.float16, programs=64, dim=16, chunk=32)
    (work,) = here.check(spans, args_of(kind, window)).work.values()
    assert len(work.reductions) == 2 and len(work.items) == 3 + 1 + 2


any_step = given(
    spans_of_a_step(3), st.sampled_from(["plain", "softcap", "sinks"]), st.sampled_from([None, 2, 30, 70]),
    st.sampled_from([1, 2, 4]), st.sampled_from(FLOATS), st.sampled_from([8, 32]), st.sampled_from([1, 1000]),
)  # fmt: skip


def check_step(
    spans: tuple[Span, ...],
    kind: str,
    window: int | None,
    kv_heads: int,
    dtype: torch.dtype,
    chunk: int,
    programs: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pensieve.worker.attention.triton._MIN_PART", 1)
        bench(spans, kv_heads, dtype, programs=programs, dim=16, chunk=chunk).check(
            spans, args_of(kind, window)
        )


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@any_step
def test_any_step(
    spans: tuple[Span, ...],
    kind: str,
    window: int | None,
    kv_heads: int,
    dtype: torch.dtype,
    chunk: int,
    programs: int,
) -> None:
    check_step(spans, kind, window, kv_heads, dtype, chunk, programs)


@pytest.mark.kernels  # seconds an example in the interpreter
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@any_step
def test_many_steps(
    spans: tuple[Span, ...],
    kind: str,
    window: int | None,
    kv_heads: int,
    dtype: torch.dtype,
    chunk: int,
    programs: int,
) -> None:
    check_step(spans, kind, window, kv_heads, dtype, chunk, programs)


def test_views_are_taken_as_they_are() -> None:
    """Models hand over (H, T, D) transposed, or slices of one product."""
    spans = (ids("a", 0, 50),)
    plain, viewed = (bench(spans, 2, torch.float32, dim=32, chunk=32) for _ in range(2))
    prepared = [each.backend.prepare(each.batch(*spans)) for each in (plain, viewed)]
    query, key, value = plain._random(50, HEADS), plain._random(50, 2), plain._random(50, 2)
    plain.backend.write(prepared[0], 0, key, value)
    expected = plain.backend.attend(prepared[0], 0, query, args_of("plain"))
    wide = torch.cat([query, key, value], dim=1)
    by_head = wide.transpose(0, 1).contiguous().transpose(0, 1)
    viewed.backend.write(prepared[1], 0, by_head[:, HEADS : HEADS + 2], wide[:, HEADS + 2 :])
    assert torch.equal(viewed.backend.attend(prepared[1], 0, by_head[:, :HEADS], args_of("plain")), expected)
    own = torch.tensor(sorted(viewed.builder.slots_of(spans[0]).tolist()))
    others = [slot for slot in range(viewed.store.num_slots) if slot not in own.tolist()]
    assert bool((viewed.store.data[others] == 0xFF).all()), "a slot that no chunk has was written"


def test_a_fixed_step_takes_other_spans() -> None:
    """What a captured graph replays: the same tensors, other numbers in them."""
    contexts = {"a": 700, "b": 65, "c": 3}
    here = Bench("triton", contexts, 2, torch.float32, dim=16, chunk=32, device=DEVICE, num_programs=16)
    here.write(*(ids(name, 0, stop) for name, stop in contexts.items()))
    query = here._random(4, HEADS)
    first = here.batch(ids("c", 2, 3), ids("b", 64, 65), ids("a", 10, 11), ids("a", 400, 401))
    like = here.backend.prepare(first)
    here.backend.attend(like, 0, query, args_of("sinks"))
    wide = torch.zeros((4, 22), dtype=torch.int64, device=DEVICE)
    step = here.backend.fixed(dataclasses.replace(first, block_tables=wide), like)
    places = [
        tensor.data_ptr() for tensor in (step.work[2].items, step.work[2].reductions, step.work[2].partials)
    ]
    for spans in (
        (ids("a", 699, 700), ids("c", 0, 1)),
        (ids("b", 40, 41),),
        (ids("c", 2, 3), ids("a", 699, 700), ids("b", 5, 6), ids("a", 1, 2)),
    ):
        other = here.batch(*spans)
        wide[: len(spans), : other.block_tables.shape[1]] = other.block_tables
        here.backend.refill(step, spans)
        ours = here.backend.attend(step, 0, query, args_of("sinks"))
        alone = here.backend.prepare(other)
        expected = here.backend.attend(alone, 0, query[: len(spans)], args_of("sinks"))
        torch.testing.assert_close(ours[: len(spans)], expected, rtol=1e-6, atol=1e-6)
        assert len(alone.work[2].items) <= len(step.work[2].items)
    assert places == [
        tensor.data_ptr() for tensor in (step.work[2].items, step.work[2].reductions, step.work[2].partials)
    ]


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 5])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
def test_every_variant(kind: str, window: int | None, group: int, dim: int, dtype: torch.dtype) -> None:
    spans = (
        ids("prompt", 0, 70),
        ids("hole", 0, 32),
        ids("hole", 64, 79),
        ids("hole", 130, 133),
        ids("one", 64, 65),
        ids("long", 600, 601),
    )
    args = dataclasses.replace(args_of(kind, window, 2 * group), scaling=dim**-0.5)
    bench(spans, 2, dtype, programs=16, heads=2 * group, dim=dim, chunk=32).check(spans, args)


# -- how work is divided


def divider(programs: int, kv_heads: int = 2) -> TritonAttention:
    return TritonAttention(KVGeometry(1, kv_heads, 16, torch.bfloat16), 32, num_programs=programs)


def test_short_spans_are_whole() -> None:
    items, reductions = divider(1000).divide((ids("a", 0, 20), ids("b", 100, 101)), Tiling(16, 64), group=2)
    assert items == [
        WorkItem(1, 20, 1, 100, 0, 101, 0, 1), WorkItem(0, 16, 4, 16, 0, 20, 0, 1), WorkItem(0, 8, 8, 8, 0, 16, 0, 1),
        WorkItem(0, 0, 8, 0, 0, 8, 0, 1),
    ]  # fmt: skip
    assert reductions == []


def test_a_long_context_is_cut_at_blocks() -> None:
    items, reductions = divider(8).divide((ids("a", 1000, 1001),), Tiling(16, 64), group=4)
    assert reductions == [Reduction(0, 1, 0, 4)]
    assert sorted(items, key=lambda item: item.first) == [
        WorkItem(0, 0, 1, 1000, 0, 256, 0, 4), WorkItem(0, 0, 1, 1000, 256, 512, 1, 4),
        WorkItem(0, 0, 1, 1000, 512, 768, 2, 4), WorkItem(0, 0, 1, 1000, 768, 1001, 3, 4),
    ]  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(
    spans_of_a_step(200),
    st.integers(1, 2000),
    st.sampled_from([1, 4, 5]),
    st.sampled_from([Tiling(16, 32), Tiling(128, 64)]),
)
def test_every_query_meets_its_whole_context_once(
    spans: tuple[Span, ...], programs: int, group: int, tiling: Tiling
) -> None:
    backend = divider(programs)
    items, reductions = backend.divide(spans, tiling, group)
    seen: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for item in items:
        assert (
            item.num_queries * group <= tiling.rows
            and item.first < item.stop
            and item.first % tiling.block == 0
        )
        for query in range(item.num_queries):
            seen.setdefault((item.span, item.first_position + query), []).append((item.first, item.stop))
    row = 0
    for index, span in enumerate(spans):
        for position in range(span.start, span.stop):
            parts = sorted(seen.pop((index, position)))
            assert parts[0][0] == 0 and parts[-1][1] > position
            assert all(before[1] == after[0] for before, after in itertools.pairwise(parts))
        row += span.stop - span.start
    assert not seen
    num_tiles = len({(item.span, item.first_row) for item in items})
    assert len(items) <= num_tiles + backend._wanted, "a captured graph has room for so many"
    parts = [item.part for item in items if item.num_parts > 1]
    assert sorted(parts) == list(range(sum(reduction.num_parts for reduction in reductions)))


@pytest.mark.parametrize(
    ("geometry", "reason"),
    [
        (KVGeometry(1, 1, 16, torch.float64), "torch.float64 is none of float32, bfloat16, float16"),
        (KVGeometry(1, 1, 512, torch.float32), "heads of 512 numbers are larger than 256"),
    ],
)
def test_what_it_cannot_serve(geometry: KVGeometry, reason: str) -> None:
    assert TritonAttention.why_not(geometry, 32, DEVICE) == reason


def test_the_interpreter_is_never_chosen_by_itself() -> None:
    assert make_backend("auto", KVGeometry(1, 1, 24, torch.float32), 32, CPU).name == "cpu"
