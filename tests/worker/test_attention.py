"""The fast backends against the reference, and the reference against the definition written out number by
number.
"""

from __future__ import annotations

import ctypes
import math
import platform
import shutil
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention_bench import (
    CHUNK,
    CONTEXTS,
    CPU,
    DIM,
    HEADS,
    LONG_STORY,
    STORY,
    Bench,
    args_of,
    contexts_of,
    ids,
    spans_of_a_step,
)
from pensieve.core.plan import Span
from pensieve.errors import ConfigError
from pensieve.worker import kernel
from pensieve.worker.attention import AttentionArgs, KVGeometry, cpu, make_backend, native
from pensieve.worker.attention.native import NativeAttention
from pensieve.worker.attention.reference import attend_one

VARIANTS = ["cpu", "reference", *(f"native {level.name}" for level in kernel.levels())]
NATIVE = VARIANTS[2:]


@pytest.mark.parametrize("window", [None, 1, 3, 6])
@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
def test_the_reference_is_the_definition(kind: str, window: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(count, heads, DIM, generator=generator) for count, heads in ((3, HEADS), (9, 2), (9, 2))
    )
    args = args_of(kind, window)
    ours = attend_one(query, key, value, torch.tensor([2, 7, 8]), args)
    for row, position in enumerate((2, 7, 8)):
        for head in range(HEADS):
            weights: dict[int, float] = {}
            for k in range(9):
                if 0 <= position - k < (window or 1000):
                    score = float(query[row, head] @ key[k, head // 2]) * args.scaling
                    weights[k] = math.exp(
                        args.softcap * math.tanh(score / args.softcap) if args.softcap else score
                    )
            total = sum(weights.values()) + (
                math.exp(float(args.sinks[head])) if args.sinks is not None else 0.0
            )
            expected = sum(
                (weight / total * value[k, head // 2] for k, weight in weights.items()), torch.zeros(DIM)
            )
            torch.testing.assert_close(ours[row, head], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ragged_spans_over_scattered_slots(
    variant: str, kv_heads: int, kind: str, window: int | None, dtype: torch.dtype
) -> None:
    if variant in NATIVE:
        Bench(variant, contexts_of(LONG_STORY), kv_heads, dtype, dim=16, chunk=32).check(
            LONG_STORY, args_of(kind, window)
        )
    Bench(variant, CONTEXTS, kv_heads, dtype, dim=16 if variant in NATIVE else DIM).check(
        STORY, args_of(kind, window)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("dim", [16, 48, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("variant", NATIVE)
def test_the_kernel_serves_every_head_size_and_group(
    variant: str, dim: int, group: int, dtype: torch.dtype
) -> None:
    bench = Bench(variant, contexts_of(LONG_STORY), 2, dtype, heads=2 * group, dim=dim, chunk=32)
    bench.check(LONG_STORY, AttentionArgs(dim**-0.5, 50, 20.0, torch.linspace(-2, 2, 2 * group)))


@pytest.mark.parametrize("chunk", [4, 6, 8, 16, 24, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", NATIVE)
def test_the_kernel_serves_smaller_chunks(variant: str, dtype: torch.dtype, chunk: int) -> None:
    Bench(variant, contexts_of(LONG_STORY), 2, dtype, dim=32, chunk=chunk).check(LONG_STORY, args_of("plain"))


@settings(max_examples=60, deadline=None)
@given(
    spans_of_a_step(), st.sampled_from(["plain", "softcap", "sinks"]), st.sampled_from([None, 2, 9]),
    st.sampled_from([1, 2, 4]), st.sampled_from([0, 600, cpu._BATCH_BYTES]), st.sampled_from([0, 128]),
)  # fmt: skip
def test_any_step_on_the_fast_backend(
    spans: tuple[Span, ...], kind: str, window: int | None, kv_heads: int, batch_bytes: int, fold_queries: int
) -> None:
    """Whatever goes together and however heads are folded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_BATCH_BYTES", batch_bytes)
        patch.setattr(cpu, "_FOLD_QUERIES", fold_queries)
        Bench("cpu", contexts_of(spans), kv_heads, torch.float32).check(spans, args_of(kind, window))


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads, and contexts divided between them from one chunk on."""
    monkeypatch.setattr(native, "_PART_CHUNKS", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("variant", NATIVE)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    spans_of_a_step(8), st.sampled_from(["plain", "softcap", "sinks"]), st.sampled_from([None, 2, 30, 200]),
    st.sampled_from([1, 2, 4]), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([8, 32]),
    st.sampled_from([16, 64]),
)  # fmt: skip
def test_any_step_on_the_kernel(
    variant: str,
    spans: tuple[Span, ...],
    kind: str,
    window: int | None,
    kv_heads: int,
    dtype: torch.dtype,
    chunk: int,
    dim: int,
) -> None:
    Bench(variant, contexts_of(spans), kv_heads, dtype, dim=dim, chunk=chunk).check(
        spans, args_of(kind, window)
    )


def parts_of(bench: Bench, prepared: Any) -> int:
    """Into how many pieces of work the kernel cuts what it was asked last."""
    return int(bench.backend._kernel.pensieve_count_parts(ctypes.byref(prepared.call)))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1000])
@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize("variant", NATIVE)
def test_a_long_context_is_divided_between_threads(
    variant: str, kind: str, window: int | None, dtype: torch.dtype
) -> None:
    spans = (ids("long", 2003, 2004), ids("short", 40, 41), ids("some", 900, 905))
    bench = Bench(variant, contexts_of(spans), 2, dtype, dim=64, chunk=32)
    bench.check(spans, args_of(kind, window))
    prepared = bench.fill(spans)
    bench.backend.attend(prepared, 0, bench._random(7, HEADS), args_of(kind, window))
    assert parts_of(bench, prepared) > 3 * 2  # three spans, two KV heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", NATIVE)
def test_undivided_a_token_gets_the_same_bits_in_any_company(variant: str, dtype: torch.dtype) -> None:
    bench = Bench(variant, contexts_of(LONG_STORY), 2, dtype, dim=64, chunk=32)
    query = bench._random(sum(span.stop - span.start for span in LONG_STORY), HEADS)
    together = bench.backend.attend(bench.fill(LONG_STORY), 1, query, args_of("sinks"))
    row = 0
    for span in LONG_STORY:
        for position in range(span.start, span.stop):
            alone = bench.backend.prepare(bench.batch(ids(span.request_id, position, position + 1)))
            assert torch.equal(
                bench.backend.attend(alone, 1, query[row : row + 1], args_of("sinks"))[0], together[row]
            )
            row += 1


@pytest.mark.parametrize("variant", NATIVE)
def test_a_step_outlives_the_scratch_it_began_with(variant: str) -> None:
    spans = (ids("a", 0, 1),)
    bench = Bench(variant, {"a": 1}, 2, torch.float32, dim=64, chunk=32)
    early, query = bench.fill(spans), bench._random(1, HEADS)
    expected = bench.backend.attend(early, 0, query, args_of("plain"))
    small = bench.backend._scratch
    bench.backend._scratch = torch.empty(2 * len(small), dtype=torch.uint8)
    small.fill_(0xFF)
    assert torch.equal(bench.backend.attend(early, 0, query, args_of("plain")), expected)
    assert early.call.scratch == bench.backend._scratch.data_ptr() and bool((small == 0xFF).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", NATIVE)
def test_views_are_taken_as_they_are(variant: str, dtype: torch.dtype) -> None:
    """Models hand over (H, T, D) transposed, or slices of one product; or another dtype."""
    spans = (ids("a", 0, 70),)
    plain, viewed = (Bench(variant, {"a": 70}, 2, dtype, dim=32, chunk=32) for _ in range(2))
    prepared = [bench.backend.prepare(bench.batch(*spans)) for bench in (plain, viewed)]
    query, key, value = plain._random(70, HEADS), plain._random(70, 2), plain._random(70, 2)
    plain.backend.write(prepared[0], 0, key, value)
    expected = plain.backend.attend(prepared[0], 0, query, args_of("plain"))

    wide = torch.cat([query, key, value], dim=1)  # (T, H + 2 Hkv, D)
    views = [
        wide.transpose(0, 1).contiguous().transpose(0, 1),
        wide.permute(2, 0, 1).contiguous().permute(1, 2, 0),  # each head's numbers apart
        wide.double(),
    ]
    for view in (wide, *views):
        query, key, value = view.split([HEADS, 2, 2], dim=1)
        viewed.store.data.fill_(0xFF)
        viewed.backend.write(prepared[1], 0, key, value)
        ours = viewed.backend.attend(prepared[1], 0, query, args_of("plain"))
        assert ours.dtype == view.dtype and torch.equal(ours.to(dtype), expected)


@pytest.mark.parametrize("variant", NATIVE)
def test_a_nan_of_its_own_is_not_hidden(variant: str) -> None:
    bench = Bench(variant, {"a": 40}, 2, torch.bfloat16, dim=16, chunk=32)
    bench.contents["a", 0][0, 35, 1, 3] = math.nan
    prepared = bench.fill((ids("a", 0, 40),))
    ours = bench.backend.attend(prepared, 0, bench._random(40, HEADS), args_of("plain"))
    assert ours[:35].isfinite().all() and ours[35:, :2].isfinite().all()
    assert ours[35:, 2:].isnan().all()


@pytest.mark.skipif(not NATIVE, reason="the kernel is not built")
@pytest.mark.usefixtures("two_threads")
def test_the_kernel_runs_on_the_threads_of_torch() -> None:
    bench = Bench("native", {"a": 3000}, 4, torch.float32, dim=64, chunk=32)
    torch.mm(torch.ones(500, 500), torch.ones(500, 500))
    before = psutil.Process().num_threads()
    prepared = bench.fill((ids("a", 2900, 3000),))
    assert prepared.call.num_threads == 2
    bench.backend.attend(prepared, 0, bench._random(100, HEADS), args_of("plain"))
    assert psutil.Process().num_threads() == before


def test_where_there_is_a_compiler_the_kernel_is_built() -> None:
    """Otherwise half of this file would be left out without a word."""
    if not any(map(shutil.which, ("cc", "gcc", "clang"))) or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("no compiler, or no CPU it is written for")
    assert not isinstance(kernel.library(), str), kernel.library()


@pytest.mark.parametrize(
    ("geometry", "chunk", "device", "reason"),
    [
        (KVGeometry(1, 1, 16, torch.float32), 32, "cuda", "it runs on a CPU, not on cuda"),
        (KVGeometry(1, 1, 16, torch.float16), 32, "cpu", "torch.float16 is neither bfloat16 nor float32"),
        (KVGeometry(1, 1, 24, torch.float32), 32, "cpu", "heads of 24 numbers are no multiple of 16"),
        (
            KVGeometry(1, 1, 16, torch.float32),
            64,
            "cpu",
            "chunks of 64 tokens are no even number from 4 to 32",
        ),
        (KVGeometry(1, 1, 16, torch.float32), 5, "cpu", "chunks of 5 tokens are no even number from 4 to 32"),
    ],
)
def test_what_the_kernel_cannot_serve(geometry: KVGeometry, chunk: int, device: str, reason: str) -> None:
    assert NativeAttention.why_not(geometry, chunk, torch.device(device)) == reason
    if device == "cpu":
        assert make_backend("auto", geometry, chunk, CPU).name == "cpu"


@pytest.fixture
def fresh_library() -> Iterator[None]:
    kernel.library.cache_clear()
    yield
    kernel.library.cache_clear()


@pytest.mark.usefixtures("fresh_library")
def test_without_a_kernel_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.machinery.EXTENSION_SUFFIXES", [".none"])
    geometry = KVGeometry(1, 1, 64, torch.bfloat16)
    assert make_backend("auto", geometry, 32, CPU).name == "cpu"
    with pytest.raises(ConfigError, match="native: built without a C compiler: install one"):
        make_backend("native", geometry, 32, CPU)


@pytest.mark.skipif(not NATIVE, reason="the kernel is not built")
@pytest.mark.usefixtures("fresh_library")
def test_a_kernel_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shorter = {"_fields_": native._AttentionCall._fields_[1:]}
    monkeypatch.setattr(native, "_AttentionCall", type("_AttentionCall", (ctypes.Structure,), shorter))
    reason = NativeAttention.why_not(KVGeometry(1, 1, 64, torch.bfloat16), 32, CPU)
    assert reason is not None and "built from other sources" in reason


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize(
    ("window", "planted"),
    [
        (7, {"window": 8}),  # one key too many
        (7, {"window": 6}),  # one too few
        (None, {"window": 40}),  # a window where there is none
        (None, {"query_head_stride": 0}),  # every head asks what the first one asks
    ],
)
def test_a_planted_bug_in_the_call_is_caught(
    monkeypatch: pytest.MonkeyPatch, variant: str, window: int | None, planted: dict[str, int]
) -> None:
    bench = Bench(variant, contexts_of(LONG_STORY), 2, torch.float32, dim=16, chunk=32)

    class Kernel:
        pensieve_write = bench.backend._kernel.pensieve_write

        def pensieve_attend(self, call: Any) -> int:
            for field, number in planted.items():
                setattr(call._obj, field, number)
            return int(kernel.library().pensieve_attend(call))  # type: ignore[union-attr]

    monkeypatch.setattr(bench.backend, "_kernel", Kernel())
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        bench.check(LONG_STORY, args_of("plain", window))


@pytest.mark.parametrize(
    ("window", "function", "replacement"),
    [
        (7, "_first_visible", lambda position, window: max(0, position - window)),  # one key too many
        (7, "_first_visible", lambda position, window: max(0, position - window + 2)),  # one too few
        (None, "_causal_mask", lambda num, like: torch.zeros(num, num, dtype=like.dtype)),  # looks ahead
    ],
)
def test_a_planted_bug_is_caught(
    monkeypatch: pytest.MonkeyPatch, window: int | None, function: str, replacement: Any
) -> None:
    monkeypatch.setattr(cpu, function, replacement)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        Bench("cpu", CONTEXTS, 2, torch.float32).check(STORY, args_of("softcap", window))


def test_what_another_request_left_in_a_slot_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: padded cells that are only masked. 0 times NaN is NaN."""
    monkeypatch.setattr(torch.Tensor, "index_fill_", lambda self, *_: self)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        Bench("cpu", CONTEXTS, 2, torch.float32).check(STORY, args_of("plain"))


def test_an_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigError,
        match="'auto' or one of 'native', 'triton', 'flashinfer', 'cpu', 'reference', got 'flash'",
    ):
        make_backend("flash", KVGeometry(1, 1, 8, torch.float32), CHUNK, CPU)


def test_a_backend_that_cannot_says_why() -> None:
    with pytest.raises(ConfigError, match=r"cpu: torch.int8 is none of"):
        make_backend("auto", KVGeometry(1, 1, 8, torch.int8), CHUNK, CPU)
