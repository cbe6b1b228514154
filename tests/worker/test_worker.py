"""A hand-written history of plans equals a fresh stateless run, for every architecture and backend."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from pensieve.config import TierConfig
from pensieve.core.plan import BlockTableUpdate, Copy, Span, StepPlan, StepResult
from pensieve.core.request import SamplingParams
from pensieve.errors import ConfigError
from pensieve.worker.attention import BACKENDS
from pensieve.worker.gate import admit
from pensieve.worker.model import CausalModel
from pensieve.worker.transfer import SourceLost
from pensieve.worker.worker import Hooks, ModelWorker, memory_available_bytes
from tiny_models import ARCHITECTURES, tiny
from worker_plans import CHUNK, GREEDY, Driver, eager_logits, relative_error, some_ids


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> CausalModel:
    torch.set_num_threads(1)
    return admit(tiny(request.param), request.param, test=False)


@pytest.mark.parametrize("attention", sorted(BACKENDS))
def test_a_history_of_plans_equals_a_stateless_run(model: CausalModel, attention: str) -> None:
    """In pieces, decoding, out and in, with a dropped prefix and a hole computed in the same forward as the
    new prompt.
    """
    if reason := BACKENDS[attention].why_not(model.geometry, CHUNK, model.device):
        pytest.skip(reason)
    driver = Driver(model, 20, 8, attention=attention)
    a, b = list(some_ids(22, 1)), list(some_ids(9, 2))
    driver.start("a", a, (9, 2, 14, 5, 0, 11, 16))  # chunks of 4
    driver.start("b", b, (3, 8, 1))
    driver.run(Span("a", 0, 8, tuple(a[:8]), False), Span("b", 0, 9, tuple(b), True))
    result = driver.run(Span("a", 8, 22, tuple(a[8:]), True), Span("b", 9, 10, None, True))
    b.append(int(driver.logits["b", 8].argmax()))
    driver.tables.append(BlockTableUpdate("b", 3, (19,)))
    for _ in range(3):  # both decode; "a" is asked for by id, "b" by "the token sampled last"
        sampled = {token.request_id: token.token_id for token in result.tokens}
        a.append(sampled["a"])
        b.append(sampled["b"])
        result = driver.run(
            Span("a", len(a) - 1, len(a), (a[-1],), True), Span("b", len(b) - 1, len(b), None, True)
        )
    # "a" leaves the first tier but for chunk 2; chunks 0, 4 and 6 are dropped, the others come back to other
    # slots.
    out = [driver.copy((0, slot), (1, place)) for slot, place in ((2, 6), (5, 0), (11, 3))]  # chunks 1, 3, 5
    driver.settle({copy.copy_id for copy in out}, [driver.run(swap_out=out)])
    for slot in (9, 2, 5, 0, 11, 16):
        driver.worker._stores[0].data[slot] = 0xFF  # NaN in every floating dtype
    b.append(next(token.token_id for token in result.tokens if token.request_id == "b"))
    a += some_ids(10, 3)
    driver.start("a2", a, (4, 7, 14, 10, 6, 12, 13, 15, 2))
    back = [driver.copy((1, place), (0, slot)) for slot, place in ((7, 6), (10, 0), (12, 3))]
    result = driver.run(
        Span("a2", 0, 4, tuple(a[:4]), False), Span("a2", 16, 20, tuple(a[16:20]), False),
        Span("a2", 24, 35, tuple(a[24:]), True), Span("b", len(b) - 1, len(b), None, True), swap_in=back,
        ended=["a"],
    )  # fmt: skip
    assert set(result.copies_done) == {copy.copy_id for copy in back}
    driver.close()
    expected = {"a": eager_logits(model, a), "a2": eager_logits(model, a), "b": eager_logits(model, b)}
    assert len(driver.logits) == 1 + 3 + 1 + 6
    for (name, position), logits in driver.logits.items():
        assert relative_error(logits, expected[name][position]) < 1e-4, (name, position)


@pytest.fixture
def llama() -> CausalModel:
    torch.set_num_threads(1)
    return admit(tiny("llama"), "llama", test=False)


def answer(model: CausalModel, prompt: list[int], count: int, sampling: SamplingParams = GREEDY) -> list[int]:
    """What an undisturbed request answers."""
    driver = Driver(model, 16)
    driver.start("r", prompt, tuple(range(16)), sampling)
    result = driver.run(Span("r", 0, len(prompt), tuple(prompt), True))
    found = [result.tokens[0].token_id]
    while len(found) < count:
        position = len(prompt) + len(found) - 1
        found.append(driver.run(Span("r", position, position + 1, None, True)).tokens[0].token_id)
    driver.close()
    return found


def test_a_forward_that_raises_is_a_result_and_poisons_nothing(llama: CausalModel) -> None:
    """Its swap-ins have settled, nothing was sampled, and the same plan again gives the right token."""
    broken = [1]

    def hook(plan: StepPlan) -> None:
        if plan.step_id in broken:
            raise MemoryError("out of activations")

    driver = Driver(llama, 16, 4, hooks=Hooks(before_forward=hook))
    prompt = list(some_ids(9, 1))
    sampling = SamplingParams(temperature=1.0, seed=3)
    expected = answer(llama, prompt, 4, sampling)
    driver.start("r", prompt, range(8), sampling)
    first = driver.run(Span("r", 0, 9, tuple(prompt), True))
    copy = driver.copy((1, 2), (0, 12))
    failed = driver.run(Span("r", 9, 10, None, True), swap_in=[copy])
    assert failed.forward_error == "MemoryError: out of activations"
    assert failed.tokens == () and failed.copies_done == (copy.copy_id,)
    void = driver.run(Span("r", 10, 11, None, True))  # planned before that was known
    assert void.forward_error is None
    again = driver.run(Span("r", 9, 10, (first.tokens[0].token_id,), True))
    more = [
        driver.run(Span("r", position, position + 1, None, True)).tokens[0].token_id for position in (10, 11)
    ]
    assert [first.tokens[0].token_id, again.tokens[0].token_id, *more] == expected
    driver.close()


@pytest.mark.parametrize(
    "wrong",
    [Span("ghost", 0, 1, (3,), True), Span("r", 0, 200, (1,) * 200, True), Span("r", 0, 2, (1,), True)],
)
def test_a_plan_that_makes_no_sense_does_not_raise(llama: CausalModel, wrong: Span) -> None:
    driver = Driver(llama, 16)
    driver.start("r", some_ids(4), range(4))
    assert driver.run(wrong).forward_error is not None
    assert driver.run(Span("r", 0, 4, some_ids(4), True)).tokens != ()
    driver.close()


def test_a_swap_in_that_fails_silences_only_those_who_attend_it(llama: CausalModel) -> None:
    """The seed's next token is not lost with it: recomputed, it comes out as if nothing had happened."""
    failing: list[int] = []

    def hook(copy: Copy) -> None:
        if copy.copy_id in failing:
            raise SourceLost("unreadable") if copy.copy_id % 2 else OSError("timeout")

    driver = Driver(llama, 16, 4, hooks=Hooks(before_copy=hook))
    prompt, other = list(some_ids(9, 1)), list(some_ids(6, 2))
    sampling = SamplingParams(temperature=1.0, seed=3)
    expected = answer(llama, prompt, 3, sampling)
    driver.start("r", prompt, (0, 1, 2), sampling)
    driver.start("o", other, (8, 9))
    first = driver.run(Span("r", 0, 9, tuple(prompt), True), Span("o", 0, 6, tuple(other), True))
    out = [driver.copy((0, 0), (1, 0)), driver.copy((0, 1), (1, 1))]
    driver.settle({0, 1}, [driver.run(swap_out=out)])
    driver.tables.append(BlockTableUpdate("r", 0, (4, 5, 2)))
    back = [driver.copy((1, 0), (0, 4)), driver.copy((1, 1), (0, 5))]
    failing += [copy.copy_id for copy in back]
    driver.worker._stores[0].data[[4, 5]] = (
        0xFF  # what the failed copies leave is NaN: no other request fails because of it
    )
    result = driver.run(Span("r", 9, 10, None, True), Span("o", 6, 7, None, True), swap_in=back)
    assert [token.request_id for token in result.tokens] == ["o"] and result.requests_failed == ()
    assert sorted((f.copy_id % 2 == 1, f.source_lost) for f in result.copies_failed) == [
        (False, False),
        (True, True),
    ]
    token = next(token.token_id for token in first.tokens if token.request_id == "r")
    result = driver.run(Span("r", 0, 8, tuple(prompt[:8]), False), Span("r", 9, 10, (token,), True))
    last = driver.run(Span("r", 10, 11, None, True))
    assert [token, result.tokens[0].token_id, last.tokens[0].token_id] == expected
    driver.close()


def test_a_request_that_breaks_in_sampling_fails_alone(llama: CausalModel) -> None:
    def hook(request_id: str) -> None:
        if request_id == "bad":
            raise ValueError("no")

    driver = Driver(llama, 16, hooks=Hooks(before_sample=hook))
    for index, name in enumerate(("good", "bad")):
        driver.start(name, some_ids(4), (index,))
    result = driver.run(*(Span(name, 0, 4, some_ids(4), True) for name in ("good", "bad")))
    assert [token.request_id for token in result.tokens] == ["good"]
    assert [failure.request_id for failure in result.requests_failed] == [
        "bad"
    ] and result.forward_error is None
    driver.close()


def test_a_context_of_nan_fails_its_request_and_not_its_neighbour(llama: CausalModel) -> None:
    driver = Driver(llama, 16)
    driver.start("bad", some_ids(9), (0, 1, 2))
    driver.start("good", some_ids(9, 4), (3, 4, 5))
    driver.run(*(Span(name, 0, 8, some_ids(8, seed), False) for name, seed in (("bad", 0), ("good", 4))))
    driver.worker._stores[0].data[1] = 0xFF
    result = driver.run(Span("bad", 8, 9, (5,), True), Span("good", 8, 9, some_ids(9, 4)[8:], True))
    assert [failure.request_id for failure in result.requests_failed] == ["bad"]
    assert "not finite" in result.requests_failed[0].message
    assert relative_error(driver.logits["good", 8], eager_logits(llama, some_ids(9, 4))[8]) < 1e-4
    driver.close()


def test_a_plan_of_copies_alone_and_an_empty_one(llama: CausalModel) -> None:
    driver = Driver(llama, 16, 4)
    assert driver.run() == StepResult(0)
    copy = driver.copy((0, 3), (1, 1))
    driver.settle({copy.copy_id}, [driver.run(swap_out=[copy])])
    driver.close()


def test_a_third_tier_needs_no_change(llama: CausalModel) -> None:
    driver = Driver(llama, 8, 4, 4)
    prompt = list(some_ids(9, 1))
    driver.start("r", prompt, (0, 1, 2))
    driver.run(Span("r", 0, 8, tuple(prompt[:8]), False))
    for stage in ([((0, 0), (1, 3)), ((0, 1), (1, 2))], [((1, 3), (2, 0)), ((1, 2), (2, 1))]):
        copies = [driver.copy(*move) for move in stage]
        driver.settle({copy.copy_id for copy in copies}, [driver.run(swap_out=copies)])
    driver.tables.append(BlockTableUpdate("r", 0, (7, 6, 2)))
    driver.run(
        Span("r", 8, 9, (prompt[8],), True),
        swap_in=[driver.copy((2, 0), (0, 7)), driver.copy((2, 1), (0, 6))],
    )
    assert relative_error(driver.logits["r", 8], eager_logits(llama, prompt)[8]) < 1e-4
    driver.close()


def test_the_waker_is_called_when_a_swap_out_settles_between_runs(llama: CausalModel) -> None:
    reached, may_go, woken = threading.Event(), threading.Event(), threading.Event()

    def hook(copy: Copy) -> None:
        reached.set()
        assert may_go.wait(20)

    driver = Driver(llama, 8, 4, hooks=Hooks(before_copy=hook))
    driver.worker.set_waker(woken.set)
    copy = driver.copy((0, 3), (1, 1))
    assert driver.run(swap_out=[copy]).copies_done == ()
    assert reached.wait(20) and not woken.is_set()
    may_go.set()
    assert woken.wait(20)
    assert driver.run().copies_done == (copy.copy_id,)
    driver.close()


def test_a_plan_that_settles_reports_its_own_swap_outs(llama: CausalModel) -> None:
    """Even where a copy takes its time."""
    driver = Driver(llama, 8, 4, hooks=Hooks(before_copy=lambda copy: time.sleep(0.02)))
    copies = [driver.copy((0, slot), (1, slot)) for slot in range(3)]
    assert driver.run(swap_out=copies, settles=True).copies_done == tuple(copy.copy_id for copy in copies)
    driver.close()


def test_ended_requests_leave_nothing_behind(llama: CausalModel) -> None:
    driver = Driver(llama, 16)
    for index in range(5):
        driver.start(f"r{index}", some_ids(4), (index,))
        driver.run(Span(f"r{index}", 0, 4, some_ids(4), True))
    driver.run(ended=[f"r{index}" for index in range(5)])
    assert not driver.worker._sampler._states and not driver.worker._builder._rows
    driver.start("r0", some_ids(4), (0,))  # the same id again, ended and started in one plan
    driver.run(Span("r0", 0, 4, some_ids(4), True), ended=["r0"])
    assert driver.worker._builder._rows.keys() == {"r0"}
    driver.close()


def test_tiers_take_exactly_their_bytes(llama: CausalModel) -> None:
    worker = ModelWorker(llama, (TierConfig("gpu", 5), TierConfig("cpu", 0), TierConfig("disk", 3)), 32)
    assert worker.chunk_bytes == 32 * llama.shape.kv_bytes_per_token(4)
    assert [store.data.untyped_storage().nbytes() for store in worker._stores] == [
        n * worker.chunk_bytes for n in (5, 0, 3)
    ]
    worker.close()
    worker.close()
    assert worker._stores == ()


def test_tiers_that_do_not_fit_are_refused_with_their_sizes(llama: CausalModel) -> None:
    num_threads = threading.active_count()
    room = memory_available_bytes()
    assert room is not None and room > 0
    slots = 2 * room // (2 * 32 * llama.shape.kv_bytes_per_token(4))
    with pytest.raises(
        ConfigError,
        match=rf"does not fit in the memory of cpu: gpu {slots} chunks = .* GB, cpu {slots} chunks = .* available",
    ):
        ModelWorker(llama, (TierConfig("gpu", slots), TierConfig("cpu", slots)), 32)
    assert threading.active_count() == num_threads


def test_a_device_that_breaks_only_when_its_logits_are_read_fails_the_forward(
    llama: CausalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA a kernel's error surfaces at the first read, long after the forward has returned."""
    driver = Driver(llama, 16, 4)
    driver.start("r", some_ids(4), (0,))

    def broken(*_: object) -> None:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(driver.worker._sampler, "collect", broken)
    copy = driver.copy((1, 0), (0, 5))
    result = driver.run(Span("r", 0, 4, some_ids(4), True), swap_in=[copy])
    assert result.forward_error == "RuntimeError: device-side assert"
    assert result.tokens == () and result.copies_done == (copy.copy_id,)
    driver.close()


def test_wipes_come_before_copies_and_spans(llama: CausalModel) -> None:
    driver = Driver(llama, 8, 8)
    first, below = driver.worker._stores[0].data, driver.worker._stores[1].data
    first.fill_(255)
    below.fill_(7)
    copy = driver.copy((0, 3), (1, 2))
    driver.settle({copy.copy_id}, [driver.run(wiped=[(0, 3), (0, 5), (1, 2), (1, 6)], swap_out=[copy])])
    assert not first[[3, 5]].any() and first[[0, 1, 2, 4, 6, 7]].eq(255).all()
    assert not below[[2, 6]].any(), "the copy of a zero, not what was there"
    assert below[[0, 1, 3, 4, 5, 7]].eq(7).all()
    driver.start("r", some_ids(2), (1,))
    driver.run(Span("r", 0, 2, some_ids(2), True), wiped=[(0, 1)])
    expected = eager_logits(llama, some_ids(2))[1]
    assert relative_error(driver.logits["r", 1], expected) < 1e-4, "wiped first, then computed"
    driver.close()


def test_a_wipe_that_raises_computes_and_copies_nothing(
    llama: CausalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(llama, 8, 8)
    driver.start("r", some_ids(2), (1,))

    def broken(slots: list[int]) -> None:
        raise MemoryError("no")

    monkeypatch.setattr(driver.worker._stores[1], "wipe", broken)
    copy = driver.copy((1, 0), (0, 5))
    result = driver.run(Span("r", 0, 2, some_ids(2), True), swap_in=[copy], wiped=[(1, 4)])
    assert result.wipe_error == result.forward_error == "MemoryError: no"
    assert [failure.copy_id for failure in result.copies_failed] == [copy.copy_id] and result.tokens == ()
    monkeypatch.undo()
    assert driver.run(Span("r", 0, 2, some_ids(2), True), wiped=[(1, 4)]).wipe_error is None
    driver.close()
