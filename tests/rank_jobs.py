"""What two processes that share a model do in tests: each job runs on one rank, in a process of its own (see `rank_pairs`)."""

from __future__ import annotations

import functools
import os
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from oracle import Lab, assert_answer_is_stateless, eager_logits, random_play
from pensieve.core.plan import Copy, Span, StepPlan, StepResult
from pensieve.core.request import FinishReason, SamplingParams
from pensieve.errors import ConfigError, WorkerLost
from pensieve.worker import parallel, sharding
from pensieve.worker.gate import admit
from pensieve.worker.group import Group
from pensieve.worker.kv_store import KVStore
from pensieve.worker.model import CausalModel
from pensieve.worker.parallel import ParallelWorker, RankWorker, follow
from pensieve.worker.transfer import SourceLost
from pensieve.worker.worker import Hooks
from tiny_models import tiny
from worker_plans import Driver, relative_error, some_ids

VOCAB = 200  # (older versions of transformers divide a vocabulary evenly or not at all)
DRAWN = SamplingParams(max_new_tokens=8, temperature=1.0, seed=3, repetition_penalty=1.1)


def whole(architecture: str) -> PreTrainedModel:
    model = tiny(architecture, vocab_size=VOCAB)
    model.set_attn_implementation("eager")
    return model


def share(group: Group, architecture: str) -> CausalModel:
    """A rank's share, through the gate together with the other."""
    return admit(sharding.split(tiny(architecture, vocab_size=VOCAB), group.device, group.size), architecture)


def just_follow(group: Group, architecture: str, *_: Any) -> None:
    follow(group, share(group, architecture))


def play(group: Group, architecture: str) -> dict[str, int]:
    """Many conversations through small tiers on rank 0, each answer checked against a stateless run. Returns what was met on the way."""
    model, reference = share(group, architecture), whole(architecture)
    assert model.geometry.num_kv_heads == 1, "half of the heads"
    lab = Lab(
        model, (12, 10), max_context=80, make_worker=functools.partial(ParallelWorker, group, debug=True)
    )
    logs = {f"c{index}": list(some_ids(20 + index, index, VOCAB)) for index in range(5)}
    turns = 0
    for _ in range(3):
        for first, second in (("c0", "c1"), ("c2", "c3"), ("c4", "c0"), ("c1", "c2")):
            for name in (first, second):
                turns += 1
                lab.submit(
                    f"{name}-{turns}", name, logs[name] + list(some_ids(3, turns, VOCAB)), 4, len(logs[name])
                )
            lab.run()
            for request in lab.done.values():
                if (
                    request.request_id.endswith((f"-{turns}", f"-{turns - 1}"))
                    and request.ending is not FinishReason.ERROR
                ):
                    logs[request.request_id.partition("-")[0]] = list(request.tokens)
    requests = lab.done.values()
    assert len(requests) == turns == 24
    for request in requests:
        assert_answer_is_stateless(reference, request)
    places = lab.cache.places
    met = {
        "copied": places.num_copied_down,
        "dropped": places.num_dropped,
        "failed": lab.cache.history.num_failed,
        "swapped in": sum(
            request.receipt.cpu_tokens + request.receipt.resume_cpu_tokens for request in requests
        ),
        "recomputed": sum(
            request.receipt.recomputed_tokens - 1 for request in requests if request.receipt.recomputed_tokens
        ),  # (but for the last sampled one)
        "broken requests": sum(request.ending is FinishReason.ERROR for request in requests),
    }
    for name in logs:
        lab.erase(name)
    lab.close()
    return met


def play_at_random(group: Group, architecture: str, seeds: tuple[int, ...]) -> None:
    """Random conversations, forks, aborts and erasures, with failures on rank 0."""
    model, reference = share(group, architecture), whole(architecture)
    for seed in seeds:
        random_play(
            model,
            reference,
            seed,
            faults=True,
            make_worker=functools.partial(ParallelWorker, group, debug=True),
        ).close()


def follow_with_faults(group: Group, architecture: str, *_: Any) -> None:
    rng = random.Random(99)

    def maybe(rate: float, message: str) -> None:
        if rng.random() < rate:
            raise SourceLost(message) if rng.random() < 0.3 else RuntimeError(message)

    hooks = Hooks(
        before_copy=lambda copy: maybe(0.1, "injected copy"),
        before_forward=lambda plan: maybe(0.02, "injected forward"),
    )
    follow(group, share(group, architecture), hooks=hooks)


class ParallelDriver(Driver):
    """Plans by hand, for both ranks."""

    def __init__(self, group: Group, *slots: int, debug: bool = True) -> None:
        super().__init__(
            share(group, "llama"), *slots, make_worker=functools.partial(ParallelWorker, group, debug=debug)
        )


def compare_logits(group: Group, architecture: str) -> float:
    """A prompt in pieces, then decodes, against the whole model: the largest relative difference of any logits."""
    model, reference = share(group, architecture), whole(architecture)
    seen: dict[int, torch.Tensor] = {}
    forward = model.forward

    def spy(batch: Any, attending: Any) -> torch.Tensor:
        logits = forward(batch, attending)
        seen.update(
            {span.stop - 1: row.float().clone() for span, row in zip(batch.emitting, logits, strict=True)}
        )
        return logits

    model.forward = spy  # type: ignore[method-assign]
    lab = Lab(model, (12,), make_worker=functools.partial(ParallelWorker, group))
    lab.submit("r", "c", list(some_ids(33, 5, VOCAB)), 12)
    lab.run()
    lab.close()
    request = lab.done["r"]
    assert assert_answer_is_stateless(reference, request) == 0
    expected = eager_logits(reference, request.tokens)
    assert len(seen) == 12
    return max(relative_error(row, expected[position]) for position, row in seen.items())


def sample(group: Group) -> list[list[int]]:
    """With a seed, then without one."""
    model = share(group, "llama")
    found = []
    for seed in (3, None):
        lab = Lab(model, (12,), make_worker=functools.partial(ParallelWorker, group, debug=True))
        found.append(answer(lab, replace(DRAWN, seed=seed)))
        lab.close()
    return found


def answer(lab: Lab, sampling: SamplingParams) -> list[int]:
    lab.scheduler.submit("r", "n", "c", some_ids(9, 1, VOCAB), 0, sampling, 0.0)
    lab.run()
    return lab.done["r"].output


def follow_llama(group: Group, *_: Any) -> None:
    follow(group, share(group, "llama"))


def run_broken(group: Group, what: str) -> tuple[list[StepResult], list[int]]:
    """Three steps, of which rank 1 breaks the second; then the second again."""
    driver = ParallelDriver(group, 16, 8)
    prompt = some_ids(9, 1, VOCAB)
    driver.start("r", prompt, range(8))
    results = [driver.run(Span("r", 0, 9, prompt, True))]
    token = results[0].tokens[0].token_id
    copy = driver.copy((1, 2), (0, 12))
    wiped = [(1, 4)] if what == "wipe" else []
    results.append(driver.run(Span("r", 9, 10, None, True), swap_in=[copy], wiped=wiped))
    results.append(driver.run(Span("r", 10, 11, None, True)))  # planned before anybody knew
    results.append(driver.run(Span("r", 9, 10, (token,), True)))
    results += [driver.run(Span("r", position, position + 1, None, True)) for position in (10, 11)]
    tokens = [token, *(result.tokens[0].token_id for result in results[3:])]
    driver.close()
    return results, tokens


def follow_broken(group: Group, what: str) -> None:
    broken = [1]

    def before_forward(plan: StepPlan) -> None:
        if what == "forward" and plan.step_id in broken:
            raise MemoryError("out of activations")

    if what == "wipe":
        wipe = KVStore.wipe

        def broken_wipe(self: KVStore, slots: Sequence[int]) -> None:
            KVStore.wipe = wipe  # type: ignore[method-assign]  # the next is a good one
            raise MemoryError("no")

        KVStore.wipe = broken_wipe  # type: ignore[method-assign]
    follow(group, share(group, "llama"), hooks=Hooks(before_forward=before_forward))


def lose_swap_ins(group: Group) -> list[StepResult]:
    """Two chunks go down and come back, under a request that attends them and one that does not."""
    driver = ParallelDriver(group, 16, 4)
    prompt, other = some_ids(9, 1, VOCAB), some_ids(6, 2, VOCAB)
    driver.start("r", prompt, (0, 1, 2))
    driver.start("o", other, (8, 9))
    driver.run(Span("r", 0, 9, prompt, True), Span("o", 0, 6, other, True))
    out = [driver.copy((0, 0), (1, 0)), driver.copy((0, 1), (1, 1))]
    results = driver.settle({0, 1}, [driver.run(swap_out=out)])
    back = [driver.copy((1, 0), (0, 4)), driver.copy((1, 1), (0, 5))]
    results.append(driver.run(Span("o", 6, 7, None, True), swap_in=back))
    driver.close()
    return results


def follow_losing(group: Group) -> None:
    def before_copy(copy: Copy) -> None:
        if copy.copy_id == 1:
            raise OSError("full")
        if copy.copy_id == 3:
            raise SourceLost("unreadable")

    follow(group, share(group, "llama"), hooks=Hooks(before_copy=before_copy))


def wait_for_the_other(group: Group) -> tuple[float, tuple[int, ...]]:
    """A copy that is late on rank 1: what the step after rank 0's own waker reports."""
    driver = ParallelDriver(group, 8, 4, debug=False)
    woken: list[float] = []
    driver.worker.set_waker(lambda: woken.append(time.monotonic()))
    driver.run(swap_out=[driver.copy((0, 3), (1, 1))])
    deadline_s = time.monotonic() + 20
    while not woken and time.monotonic() < deadline_s:
        time.sleep(0.001)
    begun_s = time.monotonic()
    result = driver.run()
    assert driver.run() == StepResult(2), "nothing is under way any more"
    driver.close()
    return time.monotonic() - begun_s, result.copies_done


def follow_late(group: Group) -> None:
    follow(group, share(group, "llama"), hooks=Hooks(before_copy=lambda copy: time.sleep(0.3)))


def two_steps(group: Group, *_: Any) -> None:
    driver = ParallelDriver(group, 16)
    prompt = some_ids(9, 1, VOCAB)
    driver.start("r", prompt, range(8))
    driver.run(Span("r", 0, 9, prompt, True))
    driver.run(Span("r", 9, 10, None, True))
    driver.close()


def follow_another_plan(group: Group, what: str) -> None:
    run = RankWorker.run
    if what == "plan":
        hear = group.hear

        def mishear() -> Any:
            message = hear()
            plan = getattr(message, "plan", None)
            if plan is not None and plan.step_id == 1:
                other = plan.spans[0]._replace(token_ids=(7,))
                message = replace(message, plan=replace(plan, spans=(other,)))
            return message

        group.hear = mishear  # type: ignore[method-assign]
    else:

        def misrun(self: RankWorker, plan: StepPlan) -> StepResult:
            result = run(self, plan)
            if plan.step_id == 1:
                result = replace(result, tokens=(replace(result.tokens[0], token_id=7),))
            return result

        RankWorker.run = misrun  # type: ignore[method-assign]
    try:
        follow(group, share(group, "llama"))
    finally:
        RankWorker.run = run  # type: ignore[method-assign]


def lead_until_lost(group: Group, *_: Any) -> str:
    with pytest.raises(WorkerLost) as first:
        two_steps(group)
    return first.value.message


def die(group: Group, *_: Any) -> None:
    if group.rank == 1:
        share(group, "llama")
        group.hear()  # to open the tiers
        os._exit(9)
    ParallelDriver(group, 16)
    os._exit(9)


def fail_on_one(group: Group) -> None:
    with group.agreeing():
        if group.rank == 1:
            raise ConfigError("no room here")


def refused(group: Group, *_: Any) -> list[str]:
    """What both ranks say alike."""
    messages = []
    model = sharding.split(tiny("llama", vocab_size=VOCAB), group.device, group.size)
    wrong: tuple[dict[str, Any], ...] = ({"forward": "fused"}, {"int8": True})
    for options in wrong:
        with pytest.raises(ConfigError) as error:
            admit(model, "llama", **options)
        messages.append(error.value.message)
    with pytest.raises(ConfigError) as error:
        fail_on_one(group)
    messages.append(error.value.message)
    return messages


def break_in_forward(group: Group, ranks: tuple[int, ...]) -> list[StepResult]:
    """The second forward breaks on some ranks after it has begun; then one more."""
    parallel._PATIENCE = timedelta(seconds=1)
    logits = CausalModel.logits

    def broken(self: CausalModel, *arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2 and group.rank in ranks:
            raise MemoryError("out of activations")
        return logits(self, *arguments)

    model = share(group, "llama")
    calls: list[int] = []
    CausalModel.logits = broken  # type: ignore[method-assign,assignment]
    try:
        if group.rank > 0:
            follow(group, model)
            return []
        driver = Driver(model, 16, make_worker=functools.partial(ParallelWorker, group))
        prompt = some_ids(9, 1, VOCAB)
        driver.start("r", prompt, range(8))
        results = [driver.run(Span("r", 0, 9, prompt, True)), driver.run(Span("r", 9, 10, None, True))]
        results.append(driver.run(Span("r", 9, 10, (results[0].tokens[0].token_id,), True)))
        driver.close()
        return results
    except WorkerLost:
        if group.rank > 0:
            os._exit(1)  # as a follower does
        raise
    finally:
        CausalModel.logits = logits  # type: ignore[method-assign]
