"""What is measured, with a clock that the test winds; what is kept, and what becomes of a damaged file."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pensieve.core.plan import StepPlan, StepResult
from pensieve.core.scheduler import Scheduler, StepEvents
from pensieve.errors import ConfigError
from pensieve.runtime import profiling as profile_module
from pensieve.runtime.profiling import Profile, constant_of, contexts, load, load_or_measure, measure, save
from pensieve.worker.gate import admit
from pensieve.worker.model import CausalModel
from pensieve.worker.worker import ModelWorker
from tiny_models import tiny

CHUNK = 4
SOME = Profile(
    chunk_tokens=4,
    points=((4, 0.5), (8, 0.75)),
    rest_s=0.25,
    prefill_tokens_per_s=100.0,
    decode_step_s=0.125,
    copy_bytes_per_s={"gpu->cpu": 1e9, "cpu->gpu": 2e9},
    step_points=((1, 0.5), (8, 1.5)),
    answer_points=((1, 0.0), (8, 0.25)),
    decode_token_s=1e-3,
    chunk_token_s=4e-3,
    plan_step_s=0.0,
    plan_request_s=1e-5,
    commit_step_s=0.0,
    commit_request_s=1e-5,
    commit_end_s=1e-4,
)


@pytest.fixture(scope="module")
def model() -> CausalModel:
    return admit(tiny("llama"), "some/llama", test=False)


class Clock:
    """A worker on this clock takes 1 s a new token, 1 ms a token of context before it, 10 s an answer, and 2 s a copying step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        run = ModelWorker.run

        def timed(worker: ModelWorker, plan: StepPlan) -> StepResult:
            self.now += sum(
                span.stop - span.start + 1e-3 * span.start + 10 * span.emits_token for span in plan.spans
            )
            self.now += 2.0 * bool(plan.swap_in or plan.swap_out)
            return run(worker, plan)

        monkeypatch.setattr(ModelWorker, "run", timed)

    def __call__(self) -> float:
        return self.now


def test_contexts_are_powers_of_two_from_one_chunk() -> None:
    assert contexts(4, 4) == [4]
    assert contexts(100, 4) == [4, 8, 16, 32, 64]
    assert contexts(128, 32) == [32, 64, 128]


def test_each_point_is_one_chunk_at_its_context(model: CausalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    told: list[tuple[str, float]] = []
    found = measure(model, 300, CHUNK, clock=clock, progress=lambda what, share: told.append((what, share)))
    assert [context for context, _ in found.points] == [4, 8, 16, 32, 64, 128, 256]
    for context, seconds in found.points:
        assert seconds == pytest.approx(CHUNK + 1e-3 * (context - CHUNK))
    assert found.rest_s == pytest.approx(CHUNK - 1e-3 * CHUNK)
    assert found.prefill_tokens_per_s == pytest.approx(1.0)
    assert found.decode_step_s == pytest.approx(11.299)
    assert found.copy_bytes_per_s["cpu->gpu"] == pytest.approx(
        8 * CHUNK * model.shape.kv_bytes_per_token(4) / 2.0
    )
    assert found.copy_bytes_per_s["gpu->cpu"] == pytest.approx(
        8 * CHUNK * model.shape.kv_bytes_per_token(4) / 2.0
    )
    assert found.decode_token_s == pytest.approx(1e-3) and found.chunk_token_s == pytest.approx(1e-3)
    assert [tokens for tokens, _ in found.step_points] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    for tokens, seconds in found.step_points:
        assert seconds == pytest.approx(tokens - 1e-3 * tokens)  # (its attention, as the costs above have it)
    assert found.answer_points == tuple((rows, pytest.approx(10.0 * rows)) for rows in (1, 2, 4, 8, 16, 32))
    assert (found.plan_step_s, found.plan_request_s, found.commit_step_s, found.commit_end_s) == (
        0.0,
    ) * 4  # no time on this clock
    shares = [share for _, share in told]
    assert shares == sorted(shares) and shares[0] == 0.0 and told[-1] == ("done", 1.0)


def test_warm_up_and_rounds_on_a_slow_machine_do_not_count(
    model: CausalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    rounds: list[str] = []
    timed = ModelWorker.run

    def uneven(worker: ModelWorker, plan: StepPlan) -> StepResult:
        if rounds and rounds[-1] in ("warm-up", "round 2 of 5", "round 5 of 5"):
            clock.now += 1000.0 * len(plan.spans)
        return timed(worker, plan)

    monkeypatch.setattr(ModelWorker, "run", uneven)
    found = measure(model, 8, CHUNK, clock=clock, repeats=5, progress=lambda what, share: rounds.append(what))
    assert found.points[0][1] == pytest.approx(CHUNK)
    assert found.step_points[0][1] == pytest.approx(1.0 - 1e-3) and found.answer_points[-1][
        1
    ] == pytest.approx(320.0)


def test_planning_is_what_the_scheduler_takes(model: CausalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    schedule, commit = Scheduler.schedule, Scheduler.commit

    def slow_schedule(scheduler: Scheduler, now_s: float) -> StepPlan:
        plan = schedule(scheduler, now_s)
        clock.now += 0.5 + 0.25 * len(plan.spans)
        return plan

    def slow_commit(scheduler: Scheduler, plan: StepPlan, result: StepResult, now_s: float) -> StepEvents:
        events = commit(scheduler, plan, result, now_s)
        clock.now += 0.125 * len(plan.spans) + 2.0 * len(events.finished)
        return events

    monkeypatch.setattr(Scheduler, "schedule", slow_schedule)
    monkeypatch.setattr(Scheduler, "commit", slow_commit)
    found = measure(model, 128, CHUNK, clock=clock, repeats=1)
    assert found.plan_step_s == pytest.approx(0.5) and found.plan_request_s == pytest.approx(0.25)
    assert found.commit_step_s == pytest.approx(0.0) and found.commit_request_s == pytest.approx(0.125)
    assert found.commit_end_s == pytest.approx(2.0)


def test_a_long_context_is_measured_in_little_memory(
    model: CausalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_module, "_STORE_BYTES", 10 * CHUNK * model.shape.kv_bytes_per_token(4))
    assert measure(model, 512, CHUNK, repeats=1).points[-1][0] == 512


@pytest.mark.parametrize("max_context", [3, 513])
def test_a_context_that_the_model_has_not_is_refused(model: CausalModel, max_context: int) -> None:
    with pytest.raises(ConfigError, match=rf"\(4\) and the model's 512 tokens, got {max_context}"):
        measure(model, max_context, CHUNK)


def test_the_constant_rest_stays_within_its_points() -> None:
    assert constant_of([(4, 2.0)]) == 2.0
    assert constant_of([(4, 3.0), (8, 2.0)]) == 2.0  # noise: falling
    assert constant_of([(4, 0.1), (8, 8.0)]) == 0.0
    assert constant_of([(10, 2.0), (20, 3.0), (40, 5.0)]) == pytest.approx(1.0)


def test_a_profile_comes_back_as_it_was_kept(model: CausalModel, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "p.json"
    save(SOME, path, model)
    assert load(path) == SOME
    assert [file.name for file in path.parent.iterdir()] == ["p.json"]
    content = json.loads(path.read_text())
    assert content["model"] == "some/llama" and content["shape"]["num_layers"] == model.shape.num_layers
    assert (content["bytes_per_value"], content["device_type"], content["dtype"]) == (4, "cpu", "float32")
    assert load(tmp_path / "none.json") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: "{",
        lambda content: "[]",
        lambda content: json.dumps({**content, "points": []}),
        lambda content: json.dumps({**content, "points": [[8, 1.0], [4, 1.0]]}),
        lambda content: json.dumps({**content, "points": [[4, -1.0]]}),
        lambda content: json.dumps({**content, "points": [[4, float("nan")]]}),
        lambda content: json.dumps({**content, "rest_s": 9.0}),
        lambda content: json.dumps({key: value for key, value in content.items() if key != "decode_step_s"}),
        lambda content: json.dumps({**content, "step_points": [[8, 1.0], [1, 1.0]]}),
        lambda content: json.dumps({**content, "plan_step_s": -1.0}),
        lambda content: json.dumps({**content, "copy_bytes_per_s": None}),
    ],
)
def test_a_damaged_file_is_ignored_with_a_warning(
    damage: Any, model: CausalModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "p.json"
    save(SOME, path, model)
    path.write_text(damage(json.loads(path.read_text())))
    assert load(path) is None
    assert "is damaged" in caplog.text and str(path) in caplog.text


def test_a_write_that_fails_leaves_the_old_file(
    model: CausalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.json"
    save(SOME, path, model)

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        save(dataclasses.replace(SOME, decode_step_s=9.0), path, model)
    assert load(path) == SOME and [file.name for file in tmp_path.iterdir()] == ["p.json"]


def test_measured_once_then_read(model: CausalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def fake(model: CausalModel, max_context: int, chunk_tokens: int, **_: Any) -> Profile:
        measured.append(max_context)
        places = contexts(max_context, chunk_tokens)
        return dataclasses.replace(
            SOME, points=tuple((place, 1.0) for place in places), chunk_tokens=chunk_tokens
        )

    monkeypatch.setattr(profile_module, "measure", fake)
    first = load_or_measure(model, 16, CHUNK, folder=tmp_path)
    assert load_or_measure(model, 16, CHUNK, folder=tmp_path) == first and measured == [16]
    load_or_measure(model, 8, CHUNK, folder=tmp_path)  # covered
    load_or_measure(model, 40, CHUNK, folder=tmp_path)  # further than was measured
    load_or_measure(model, 40, CHUNK, folder=tmp_path, fresh=True)
    load_or_measure(model, 40, 8, folder=tmp_path)  # another chunk is another profile
    assert measured == [16, 40, 40, 40] and len(list(tmp_path.iterdir())) == 2
    next(tmp_path.iterdir()).write_text("rubbish")
    load_or_measure(model, 16, CHUNK, folder=tmp_path)
    load_or_measure(model, 16, 8, folder=tmp_path)
    assert len(measured) == 5


def test_the_cache_folder_follows_the_environment(
    model: CausalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSIEVE_CACHE", str(tmp_path))
    load_or_measure(model, 8, CHUNK)
    (file,) = (tmp_path / "profiles").iterdir()
    assert file.name.startswith("llama-") and load(file) is not None


def test_a_folder_that_cannot_be_written_costs_only_the_next_start(
    model: CausalModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert load_or_measure(model, 8, CHUNK, folder=tmp_path / "file").points
    assert "could not be kept" in caplog.text
