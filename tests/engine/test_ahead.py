"""Steps that are begun before the one before is over, and decodes captured as graphs: the same answers, whatever else happens."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle import EagerRecorder, Lab, assert_answer_is_stateless, pair, random_play
from pensieve.config import CacheConfig, SchedulerConfig, TierConfig
from pensieve.core.cache import TieredCache
from pensieve.core.cost import CostProfile
from pensieve.core.eviction import POLICIES
from pensieve.core.request import FinishReason, SamplingParams
from pensieve.core.scheduler import Scheduler
from pensieve.engine.engine import Engine
from pensieve.engine.messages import Event, Failed, Finished, Submit, Token
from pensieve.worker.graphs import _sizes
from pensieve.worker.sampler import Sampler
from pensieve.worker.worker import Hooks, ModelWorker

cached_pair = functools.cache(pair)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1 << 32), faults=st.booleans())
def test_any_history_of_the_cache_gives_the_stateless_answer(
    architecture: str, seed: int, faults: bool
) -> None:
    model, reference = cached_pair(architecture)
    random_play(model, reference, seed, faults=faults, ahead=True).close()


WISHES: dict[str, dict[str, Any]] = {
    "greedy": {}, "wordless": {"logprobs": None}, "drawn": {"temperature": 1.0, "seed": 5}, "top_p": {"temperature": 1.3, "top_p": 0.8, "seed": 6},
    "top_k": {"temperature": 1.1, "top_k": 7, "min_p": 0.05, "seed": 7}, "penalties": {"frequency_penalty": 1.5, "repetition_penalty": 1.3},
    "both": {"presence_penalty": 1.0, "temperature": 0.9, "seed": 8}, "long": {"min_new_tokens": 12, "stop_token_ids": frozenset(range(0, 199, 2))},
    "stops": {"stop_token_ids": frozenset(range(0, 199, 5))},
}  # fmt: skip


def answers(ahead: bool) -> dict[str, list[int]]:
    model, _ = cached_pair("llama")
    lab = Lab(model, (60, 20), ahead=ahead)
    for index, (name, wish) in enumerate(WISHES.items()):
        lab.submit(name, name, [(3 * index + 7 * i) % 199 for i in range(20 + index)], 14, **wish)
    lab.run()
    lab.close()
    return {name: lab.done[name].output for name in WISHES}


def test_every_kind_of_sampling_answers_the_same() -> None:
    ahead = answers(ahead=True)
    assert ahead == answers(ahead=False)
    assert len({tuple(answer) for answer in ahead.values()}) > 5
    assert len(ahead["long"]) >= 12 and len(ahead["stops"]) < 14


def test_the_next_step_is_begun_before_tokens_are_known() -> None:
    """The plan says "the one sampled last", and it has not been fetched yet."""
    model, reference = cached_pair("llama")
    lab = Lab(model, (40,), ahead=True)
    lab.submit("a", "a", list(range(10)), 6)
    known: list[bool] = []
    begin = lab.worker.begin

    def spy(plan: Any) -> None:
        known.extend(span.token_ids is not None for span in plan.spans)
        begin(plan)

    lab.worker.begin = spy
    lab.run()
    assert known == [True, *[False] * 5]
    assert_answer_is_stateless(reference, lab.done["a"])
    lab.close()


def test_a_token_that_stays_behind_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle can fail: a step that computes over an old token answers wrong."""
    model, reference = cached_pair("llama")
    lab = Lab(model, (40,), ahead=True)
    lab.submit("a", "a", list(range(10)), 8)
    launch = Sampler.launch

    def late(sampler: Sampler, spans: Any, logits: torch.Tensor) -> Any:
        choice = launch(sampler, spans, logits)
        choice.tokens = torch.zeros_like(choice.tokens)  # what the next step finds on the device
        return choice

    monkeypatch.setattr(Sampler, "launch", late)
    lab.run()
    with pytest.raises(AssertionError, match="a stateless run gives"):
        assert_answer_is_stateless(reference, lab.done["a"])
    lab.close()


def test_logits_that_are_no_numbers_fail_their_request_alone() -> None:
    model, reference = cached_pair("llama")
    lab = Lab(model, (40,), ahead=True)
    for name in ("good", "bad"):
        lab.submit(name, name, [ord(letter) for letter in name * 4], 6)
    forward, calls = model.forward, 0

    def spoil(batch: Any, attending: Any) -> torch.Tensor:
        nonlocal calls
        logits = forward(batch, attending).clone()
        calls += 1
        if calls == 3:
            logits[[span.request_id for span in batch.emitting].index("bad")] = torch.nan
        return logits

    model.forward = spoil  # type: ignore[method-assign]
    try:
        lab.run()
    finally:
        del model.forward
    assert lab.done["bad"].ending is FinishReason.ERROR and "not finite" in (lab.done["bad"].error or "")
    assert len(lab.done["good"].output) == 6
    assert_answer_is_stateless(reference, lab.done["good"])
    lab.close()


def test_a_swap_in_that_fails_under_two_steps_loses_nothing() -> None:
    model, reference = cached_pair("llama")
    failing = {"now": False}

    def refuse(copy: Any) -> None:
        if failing["now"] and copy.dst_tier == 0:
            failing["now"] = False
            raise OSError("injected")

    lab = Lab(model, (10, 30), hooks=Hooks(before_copy=refuse), ahead=True)
    logs = {}
    for name in ("a", "b"):
        lab.submit(name, name, [(ord(name) * 31 + 5 * i) % 199 for i in range(50)], 4)
        lab.run()
        logs[name] = lab.done[name].tokens
    failing["now"] = True
    lab.submit("again", "a", logs["a"] + [1, 2, 3], 6, len(logs["a"]))
    lab.run()
    assert lab.scheduler.num_copies_failed == 1 and len(lab.done["again"].output) == 6
    assert_answer_is_stateless(reference, lab.done["again"])
    lab.close()


# -- the engine


class Listener:
    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, Event] = {}
        self.changed = threading.Condition()

    def take(self, events: list[Event]) -> None:
        with self.changed:
            for event in events:
                if isinstance(event, Token):
                    self.tokens.setdefault(event.request_id, []).append(event.token_id)
                elif isinstance(event, (Finished, Failed)):
                    self.ended[event.request_id] = event
            self.changed.notify_all()


@pytest.fixture
def make_engine() -> Iterator[Callable[..., tuple[Engine, Listener]]]:
    made: list[Engine] = []

    def build(ahead: bool, hooks: Hooks = Hooks()) -> tuple[Engine, Listener]:
        model, _ = cached_pair("llama")
        tiers = (TierConfig("gpu", 16), TierConfig("cpu", 20))
        cost = CostProfile([(8, 1.0), (120, 2.0)], 8)
        cache = TieredCache(CacheConfig(tiers, 8), POLICIES["retention"](cost.of_chunk))
        scheduler = Scheduler(SchedulerConfig(max_batch_tokens=72, max_running=8), cache, 120)
        worker = ModelWorker(model, tiers, 8, hooks=hooks, on_device=ahead)
        listener = Listener()
        engine = Engine(
            scheduler, worker, chunk_bytes=worker.chunk_bytes, emit=listener.take, debug=True, ahead=ahead
        )
        engine.start()
        made.append(engine)
        return engine, listener

    yield build
    for engine in made:
        engine.close()


def chat(engine: Engine, listener: Listener) -> dict[str, list[int]]:
    names = [f"r{index}" for index in range(6)]
    for index, name in enumerate(names):
        prompt = tuple((11 * index + 3 * i) % 199 for i in range(15 + 2 * index))
        engine.post(Submit(name, "n", name, prompt, 0, SamplingParams(max_new_tokens=9)))
    with listener.changed:
        assert listener.changed.wait_for(lambda: len(listener.ended) == len(names), 60)
    return listener.tokens


def test_an_engine_that_plans_ahead_says_the_same(
    make_engine: Callable[..., tuple[Engine, Listener]],
) -> None:
    assert chat(*make_engine(True)) == chat(*make_engine(False))


def test_an_engine_that_plans_ahead_survives_a_forward_that_raises(
    make_engine: Callable[..., tuple[Engine, Listener]],
) -> None:
    calls = iter(range(1000))

    def refuse(plan: Any) -> None:
        if next(calls) == 3:
            raise RuntimeError("injected")

    assert chat(*make_engine(True, Hooks(before_forward=refuse))) == chat(*make_engine(False))


# -- graphs


@pytest.mark.parametrize(("architecture", "ahead"), [("llama", False), ("gemma2", True)])
def test_graphs_of_padded_batches_answer_the_same(architecture: str, ahead: bool) -> None:
    pytest.importorskip("triton")
    model, reference = cached_pair(architecture)
    lab = Lab(model, (60,), attention="triton", graph_rows=4, ahead=ahead)
    for index in range(5):  # decode batches of 5, more than are captured, then 4 to 1
        lab.submit(
            f"r{index}",
            f"c{index}",
            [(31 * index + 5 * i) % 199 for i in range(9 + 3 * index)],
            3 + 2 * index,
            logprobs=None,
        )
    lab.run()
    assert lab.worker.graphs is not None and lab.worker.graphs.num_captured == 4
    recorder = lab.worker.graphs._recorder
    assert isinstance(recorder, EagerRecorder) and recorder.num_replays > 3
    for index in range(5):
        assert len(lab.done[f"r{index}"].output) == 3 + 2 * index
        assert_answer_is_stateless(reference, lab.done[f"r{index}"])
    lab.close()


@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_any_history_with_graphs(seed: int) -> None:
    pytest.importorskip("triton")
    model, reference = cached_pair("llama")
    random_play(model, reference, seed, faults=True, attention="triton", ahead=True, graph_rows=6).close()


def test_a_graph_over_another_batchs_tables_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from pensieve.worker.attention.triton import TritonAttention

    model, reference = cached_pair("llama")
    lab = Lab(model, (60,), attention="triton", graph_rows=4)
    monkeypatch.setattr(TritonAttention, "refill", lambda backend, step, spans: None)
    lab.submit("a", "a", list(range(10, 30)), 8)
    lab.run()
    with pytest.raises(AssertionError, match="a stateless run gives"):
        assert_answer_is_stateless(reference, lab.done["a"])
    lab.close()


def test_a_model_that_cannot_be_captured_is_computed_as_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    model, reference = cached_pair("llama")
    lab = Lab(model, (60,), attention="triton", graph_rows=4)

    def refuse(recorder: EagerRecorder, work: Any) -> Any:
        raise RuntimeError("it looks at its own numbers")

    monkeypatch.setattr(EagerRecorder, "record", refuse)
    lab.submit("a", "a", list(range(10, 30)), 5)
    lab.run()
    assert_answer_is_stateless(reference, lab.done["a"])
    assert lab.worker.graphs is not None and lab.worker.graphs.num_captured == 0
    assert caplog.text.count("not captured as graphs") == 1
    lab.close()


def test_sizes_of_graphs() -> None:
    assert _sizes(1) == [1]
    assert _sizes(64) == [1, 2, 3, 4, 6, 8, 16, 24, 32, 40, 48, 56, 64]
    assert _sizes(100)[-3:] == [80, 96, 100]
    for most in (5, 200, 1000):
        sizes = _sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most
