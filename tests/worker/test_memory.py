"""How large the first tier may be: what a device says is left, less what the largest step takes."""

from __future__ import annotations

import functools

import pytest
import torch

from pensieve.errors import ConfigError
from pensieve.worker.gate import admit
from pensieve.worker.memory import DeviceShare, device_share
from pensieve.worker.model import CausalModel
from pensieve.worker.worker import ModelWorker
from tiny_models import tiny

GB = 1_000_000_000


@functools.cache
def model() -> CausalModel:
    return admit(tiny("llama"))


class FakeMeter:
    def __init__(self, free: int, peak: int, total: int = 80 * GB) -> None:
        self.free, self.peak, self.total = free, peak, total
        self.num_starts = 0

    def free_bytes(self) -> tuple[int, int]:
        return self.free, self.total

    def start(self) -> None:
        self.num_starts += 1

    def peak_bytes(self) -> int:
        assert self.num_starts == 1
        return self.peak


def find(meter: FakeMeter, tokens: int = 100, running: int = 7, graph_rows: int = 0) -> DeviceShare:
    return device_share(
        model(),
        max_batch_tokens=tokens,
        max_running=running,
        chunk_tokens=8,
        graph_rows=graph_rows,
        meter=meter,
    )


def test_the_tier_gets_what_weights_step_and_graphs_leave() -> None:
    room = find(FakeMeter(60 * GB, 3 * GB), graph_rows=64)
    assert room.step == 3 * GB and room.left == 3_200_000_000 and room.graphs == 64 << 21
    assert room.tier == 60 * GB - room.step - room.graphs - room.left
    assert "53.67 GB of 80.00 for the first tier" in str(room)


def test_the_step_that_is_run_is_the_largest_there_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    run = ModelWorker.run
    monkeypatch.setattr(ModelWorker, "run", lambda worker, plan: (plans.append(plan), run(worker, plan))[1])
    find(FakeMeter(60 * GB, GB), tokens=100, running=7)
    (plan,) = plans
    assert [span.stop for span in plan.spans] == [15, 15, 14, 14, 14, 14, 14]
    assert plan.num_tokens == 100 and all(span.emits_token for span in plan.spans)
    slots = [slot for table in plan.tables for slot in table.slots]
    assert sorted(slots) == list(range(14)), "no two requests share a slot"


@pytest.mark.parametrize(("free", "peak"), [(4 * GB, 3 * GB), (2 * GB, 3 * GB)])
def test_no_room_is_said_with_the_way_out(free: int, peak: int) -> None:
    with pytest.raises(ConfigError, match=r"no memory is left for the cache .*--max-batch-tokens less"):
        find(FakeMeter(free, peak))


def test_a_step_that_does_not_fit_is_said_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model(), "forward", fail)
    with pytest.raises(
        ConfigError,
        match=r"a step of 100 tokens does not fit beside the weights: 2\.00 of 80\.00 GB are free",
    ):
        find(FakeMeter(2 * GB, GB))


def test_a_step_that_fails_otherwise_is_no_question_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("odd")

    monkeypatch.setattr(model(), "forward", fail)
    with pytest.raises(ConfigError, match="the largest step fails on this device: ValueError: odd"):
        find(FakeMeter(60 * GB, GB))
