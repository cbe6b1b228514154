"""How large the tiers come out, what limits a context, and what an error says that would lift the limit."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pensieve.config import CacheConfig, ContextLimit, ModelShape, SchedulerConfig, TierConfig
from pensieve.core.cache import TieredCache
from pensieve.core.cost import CostProfile
from pensieve.core.eviction import POLICIES
from pensieve.core.request import SamplingParams
from pensieve.core.scheduler import Scheduler
from pensieve.engine.messages import Stats
from pensieve.engine.wire import EngineInfo
from pensieve.errors import ConfigError, ContextLengthExceeded, RequestTooLarge
from pensieve.runtime.apart import as_started
from pensieve.runtime.loading import LoadedModel, load_model, settled
from pensieve.runtime.local import size_tiers, start
from pensieve.runtime.options import GB, Options, as_json
from pensieve.worker import memory
from pensieve.worker.memory import host_share
from tiny_models import tiny

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    vocab_size=100,
    max_positions=4096,
)
TOKEN = SHAPE.kv_bytes_per_token(4)
GIB = 1 << 30


def sizes(**options: Any) -> Any:
    made = Options(dtype="float32", **options)
    return size_tiers(made, SHAPE, made.gpu_cache_gb or 0.01)


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: int | None) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: num_bytes)


def test_on_a_cpu_there_is_one_tier_unless_a_second_is_asked_for() -> None:
    assert [tier.name for tier in sizes().tiers] == ["gpu"]
    assert [tier.name for tier in sizes(cpu_cache_gb=0.0).tiers] == ["gpu"]
    assert [tier.name for tier in sizes(cpu_cache_gb=0.01).tiers] == ["gpu", "cpu"]
    assert [tier.name for tier in sizes(device="cuda").tiers] == ["gpu", "cpu"]
    assert Options(device="cuda").second_tier_gb == 2.0


def test_the_first_tier_is_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 12 * GIB)
    share = host_share(1 << 60, 0, GB)
    assert share.tier == 6 * GIB
    assert str(share) == "6.44 GB of 12.9 GB free"
    assert host_share(1 << 60, 2 * GIB, GB).tier == 4 * GIB, "the second lies in the same memory"
    assert host_share(1 << 60, 0, GB, sharers=3).tier == 2 * GIB
    assert host_share(GIB, 0, GB).tier == GIB, "never more than would be used"


@pytest.mark.parametrize(
    ("available", "expected"), [(GIB, 512 << 20), (800 << 20, 288 << 20), (300 << 20, 0), (0, 0)]
)
def test_where_little_is_free_the_rest_is_for_computing(
    monkeypatch: pytest.MonkeyPatch, available: int, expected: int
) -> None:
    free(monkeypatch, available)
    assert host_share(1 << 60, 0, GB).tier == expected


def test_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, None)
    assert host_share(1 << 60, 0, GB).tier == GB
    assert str(host_share(1 << 60, 0, GB)) == "1 GB"


@pytest.mark.parametrize("device", ["gpu", "mps", "CPU", ""])
def test_a_device_that_is_none(device: str) -> None:
    with pytest.raises(ConfigError, match=f"--device must be cpu or cuda .*, got '{device}'"):
        Options(device=device)


# -- with a model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("model") / "m"
    tiny("llama").save_pretrained(path)
    return str(path)


def loaded(options: Options) -> tuple[LoadedModel, list[str]]:
    told: list[str] = []
    return load_model(options, must_talk=False, say=told.append, with_text=False), told


def test_the_default_is_said_and_bounded_by_what_all_running_requests_could_use(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(model=folder, dtype="float32")
    free(monkeypatch, 12 * GIB)
    model, told = loaded(options)
    found = size_tiers(settled(options, model), model.shape, model.gpu_cache_gb)
    assert found.max_context == model.shape.max_positions
    assert found.tiers == (TierConfig("gpu", options.max_running * (model.shape.max_positions // 32 + 1)),)
    assert told[-1] == model.remarks[-1] == f"first tier: {model.gpu_cache_gb:.3g} GB of 12.9 GB free"
    assert as_json(settled(options, model))["gpu_cache_gb"] == model.gpu_cache_gb

    free(monkeypatch, GIB)
    model, told = loaded(Options(model=folder, dtype="float32", max_running=10_000_000))
    assert model.gpu_cache_gb == pytest.approx(0.537, abs=0.001)
    assert told[-1] == "first tier: 0.537 GB of 1.07 GB free"


def test_a_first_tier_that_was_told_is_taken_and_nothing_is_said(folder: str) -> None:
    model, told = loaded(Options(model=folder, dtype="float32", gpu_cache_gb=0.003))
    assert (
        model.gpu_cache_gb == 0.003 and model.remarks == () and not any("first tier" in line for line in told)
    )


def test_without_memory_the_way_out_is_named(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 0)
    with pytest.raises(
        ConfigError,
        match=r"too little memory is left for the cache \(0 GB of 0 GB free\): .* at least --gpu-cache 0\.0000246",
    ):
        loaded(Options(model=folder, dtype="float32"))
    with pytest.raises(
        ConfigError,
        match=r"--gpu-cache 1e-06 holds 0 chunks .*; at least 2 are needed: give it 0\.0000\d\d\d GB or more",
    ):
        sizes(gpu_cache_gb=1e-6)


def test_memory_that_is_not_there_is_refused_and_what_is_there_is_not_touched_at_the_start(
    folder: str,
) -> None:
    options = Options(model=folder, dtype="float32", gpu_cache_gb=1e5)
    model, _ = loaded(options)
    with pytest.raises(
        ConfigError,
        match=r"does not fit in the memory of cpu: gpu \d+ chunks = 100000\.00 GB; .* \(--gpu-cache, --cpu-cache\)",
    ):
        start(options, model, store=None)
    gpu_cache_gb = min(2.0, 0.25 * psutil.virtual_memory().available / GB)
    options = Options(model=folder, dtype="float32", gpu_cache_gb=gpu_cache_gb)
    model, _ = loaded(options)
    before = psutil.Process().memory_info().rss
    runtime = start(options, model, store=None)
    try:
        assert psutil.Process().memory_info().rss - before < 0.2 * gpu_cache_gb * GB
        stats = runtime.service.engine.stats().result()
        assert isinstance(stats, Stats) and [tier.name for tier in stats.tiers] == ["gpu"]
    finally:
        runtime.close()


@pytest.mark.parametrize("cpu_cache_gb", [None, 0.002])
def test_the_stateless_baseline_gets_the_same_bytes_and_context(
    folder: str, cpu_cache_gb: float | None
) -> None:
    options = Options(model=folder, dtype="float32", gpu_cache_gb=0.004, cpu_cache_gb=cpu_cache_gb)
    model, _ = loaded(options)
    found = []
    for retain in (True, False):
        runtime = start(options, model, store=None, retain=retain)
        runtime.close()
        found.append(runtime.sizes)
    stateful, stateless = found
    assert (
        abs(sum(t.num_slots for t in stateful.tiers) - stateless.tiers[0].num_slots) <= 1
        and len(stateless.tiers) == 1
    )
    assert stateful.max_context == stateless.max_context


# -- what would take a longer prompt


def scheduler(limit: ContextLimit) -> Scheduler:
    cost = CostProfile.from_shape(SHAPE, limit.chunk_tokens)
    cache = TieredCache(
        CacheConfig((TierConfig("gpu", limit.num_slots),), limit.chunk_tokens),
        POLICIES["retention"](cost.of_chunk),
    )
    return Scheduler(SchedulerConfig(max_batch_tokens=128), cache, limit.tokens, limit=limit)


def refused(limit: ContextLimit, num_tokens: int, new: int = 16) -> str:
    with pytest.raises((ContextLengthExceeded, RequestTooLarge)) as error:
        scheduler(limit).submit("r", "n", "s", (1,) * num_tokens, 0, SamplingParams(max_new_tokens=new), 0.0)
    return error.value.message


@given(
    num_prompt=st.integers(1, 5000), new=st.integers(1, 300), slots=st.integers(2, 140), chunk_tokens=st.sampled_from([4, 16, 32]),
    told=st.none() | st.integers(2, 4096),
)  # fmt: skip
def test_an_engine_started_as_the_error_says_takes_the_prompt_and_its_answer(
    num_prompt: int, new: int, slots: int, chunk_tokens: int, told: int | None
) -> None:
    gpu_cache_gb = (slots + 0.5) * chunk_tokens * TOKEN / GB
    told = None if told is None else min(told, slots * chunk_tokens)
    made = sizes(gpu_cache_gb=gpu_cache_gb, chunk_tokens=chunk_tokens, max_context=told)
    if num_prompt < made.max_context:
        return
    message = refused(made.limit, num_prompt, new)
    assert message.startswith(
        f"the prompt has {num_prompt} tokens, but at most {made.max_context - 1} fit in the context of {made.max_context}: "
    )
    if num_prompt >= SHAPE.max_positions:
        assert message.endswith(", or take another model: this one was built for 4096 tokens")
        return
    assert ", or start with --" in message
    grown = re.search(r"--gpu-cache ([\d.e+-]+) \(GB\) or more", message)
    longer = re.search(r"--max-context (\d+) or more", message)
    again = sizes(
        gpu_cache_gb=float(grown[1]) if grown else gpu_cache_gb,
        chunk_tokens=chunk_tokens,
        max_context=int(longer[1]) if longer else told,
    )
    assert again.max_context >= min(num_prompt + new, SHAPE.max_positions) > num_prompt
    if grown:  # and it asks for no more than it must
        assert (
            float(grown[1])
            < 1.02 * (min(num_prompt + new, SHAPE.max_positions) + 2 * chunk_tokens) * TOKEN / GB
        )


def test_the_words_of_a_context_that_the_first_tier_limits() -> None:
    limit = sizes(gpu_cache_gb=0.001, chunk_tokens=32).limit
    assert limit.tokens == 1952 == limit.num_slots * 32
    assert refused(limit, 3000) == (
        "the prompt has 3000 tokens, but at most 1951 fit in the context of 1952: shorten it, start a new conversation, allow the oldest "
        "turns to be dropped (--overflow truncate), or start with --gpu-cache 0.00156 (GB) or more"
    )
    assert limit.way_out() == "start with a larger --gpu-cache"


def test_the_words_of_a_context_that_was_told() -> None:
    limit = sizes(gpu_cache_gb=0.001, max_context=100).limit
    assert refused(limit, 200).endswith(", or start with --max-context 216 or more")
    assert refused(limit, 3000).endswith(
        ", or start with --gpu-cache 0.00156 (GB) or more and --max-context 3016 or more"
    )
    assert limit.way_out() == "start with a larger --gpu-cache and --max-context"


def test_slots_that_others_keep_are_counted_in() -> None:
    limit = sizes(gpu_cache_gb=0.001).limit
    full = scheduler(limit)
    full.cache.slots_for_one = lambda sequence, digests: 10  # type: ignore[method-assign]  # 51 of 61 are kept
    with pytest.raises(
        RequestTooLarge,
        match=r"the first tier has 10 for one request: shorten it, or start with --gpu-cache 0\.00117 \(GB\) or more",
    ):
        full.submit("r", "n", "s", (1,) * 600, 0, SamplingParams(max_new_tokens=16), 0.0)


def test_more_context_than_the_first_tier_holds_names_what_would() -> None:
    with pytest.raises(
        ConfigError,
        match=r"--max-context 3000 is more than the 1952 tokens the first tier holds: start with --gpu-cache 0\.00155 \(GB\) or more",
    ):
        sizes(gpu_cache_gb=0.001, max_context=3000)
    with pytest.raises(
        ConfigError, match="--max-context 5000 is more than the 4096 tokens the model was built for"
    ):
        sizes(gpu_cache_gb=0.01, max_context=5000)


@given(
    first=st.integers(2 * 32 * TOKEN, 400 * 32 * TOKEN),
    second=st.sampled_from([None, 0.001, 0.0123456789]),
    retain=st.booleans(),
)
def test_an_engine_that_is_started_again_has_the_tiers_and_the_context_that_it_had(
    first: int, second: float | None, retain: bool
) -> None:
    options = Options(dtype="auto", cpu_cache_gb=second)
    as_one = not retain
    before = size_tiers(replace(options, dtype="float32"), SHAPE, first / GB, total_as_one=as_one)
    info = EngineInfo(
        1, "m", "real", 1, "float32", "cpu", SHAPE.vocab_size, before.max_context, options.chunk_tokens, before.chunk_bytes, before.tiers,
        "", "", "", 0.0,
    )  # fmt: skip
    again = as_started(options, info, retain)
    assert again.dtype == "float32" and again.gpu_cache_gb is not None
    after = size_tiers(again, SHAPE, again.gpu_cache_gb, total_as_one=as_one)
    assert (after.tiers, after.max_context) == (before.tiers, before.max_context)


def test_what_was_told_is_told_again_as_it_was() -> None:
    info = EngineInfo(
        1, "m", "real", 1, "bfloat16", "cpu", 9, 64, 32, 7, (TierConfig("gpu", 5),), "", "", "", 0.0
    )
    assert as_started(Options(gpu_cache_gb=0.5), info, True) == Options(gpu_cache_gb=0.5, dtype="bfloat16")


def test_what_libraries_take_is_not_left_to_the_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    from pensieve.worker import worker

    monkeypatch.setattr(worker, "memory_available_bytes", lambda place: 3 * GIB)
    tiers = (
        TierConfig("gpu", 2048),
        TierConfig("cpu", 512),
    )  # of 1 MiB: 2.5 GiB, and 0.25 are needed for computing
    worker.require_tiers_fit(tiers, 1 << 20, torch.device("cpu"))
    worker.require_tiers_fit(tiers, 1 << 20, torch.device("cpu"), beside=255 << 20)
    with pytest.raises(ConfigError, match=r"3.22 GB are available, 0.55 GB of them needed for computing"):
        worker.require_tiers_fit(tiers, 1 << 20, torch.device("cpu"), beside=270 << 20)
