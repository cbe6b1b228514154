"""What must hold of every simulation: nothing is lost or counted twice, time adds up, and the scheduler is the real one."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator_worlds import LOAD, MACHINE, small

import pensieve.simulator
from pensieve.core.eviction import POLICIES
from pensieve.core.filling import Filling
from pensieve.core.room import Room
from pensieve.errors import ConfigError
from pensieve.simulator.case import SYSTEMS, Case, Outcome, run_case
from pensieve.simulator.output import to_json
from pensieve.simulator.phases import PhasedFilling
from pensieve.simulator.policies import COMPARED
from pensieve.simulator.simulation import Simulation
from pensieve.simulator.sweep import Tick, run_cases
from pensieve.workloads.arrivals import ThinkTime
from pensieve.workloads.load_plan import LoadOptions
from pensieve.workloads.scripts import SystemPrompts

NAMES = sorted((*POLICIES, *COMPARED))


def check_conservation(outcome: Outcome) -> None:
    """Every token asked for was found, swapped in, recomputed or new, exactly once; time and requests add up."""
    for record in outcome.records:
        assert record.error is None
        r = record.receipt
        assert r.prompt_tokens == r.gpu_tokens + r.cpu_tokens + r.recomputed_tokens + r.new_tokens
        assert record.history_tokens <= r.prompt_tokens
        assert r.first_token_s is not None
        assert 0.0 <= r.queue_s <= r.first_token_s <= r.total_s
        assert r.total_s == record.latency_s
        assert record.finished_s <= outcome.simulated_s
    # Little's law, as an identity: the mean number in the system times the time is the sum of everybody's time in it
    in_system_s = sum(record.latency_s for record in outcome.records)
    assert outcome.mean_in_system * outcome.simulated_s == pytest.approx(in_system_s, rel=1e-9)
    assert 0.0 <= outcome.swap_wait_share <= outcome.busy_share <= 1.0 + 1e-9


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_tokens_and_time_add_up(system: str) -> None:
    outcome = run_case(small(system), keep_records=True)
    check_conservation(outcome)
    records = outcome.records
    assert len(records) == 12 * 5
    receipts = [record.receipt for record in records]
    assert all(receipt.output_tokens == 30 for receipt in receipts)
    computed = sum(
        r.recomputed_tokens + r.new_tokens + r.output_tokens - 1 + r.resume_recomputed_tokens
        for r in receipts
    )
    # (a suspended request computes its last sampled token with what it lost, not in a decode of its own)
    assert outcome.computed_tokens == computed - sum(r.suspensions for r in receipts)
    if not SYSTEMS[system].retain:
        assert all(record.receipt.gpu_tokens == record.receipt.cpu_tokens == 0 for record in records)
        assert all(slots == 0 for slots in outcome.used_slots)
    else:
        assert sum(record.receipt.gpu_tokens for record in records) > 0
        assert (sum(record.receipt.cpu_tokens for record in records) > 0) == SYSTEMS[system].lower_tiers


@pytest.mark.parametrize("policy", NAMES)
def test_every_policy_serves_everybody(policy: str) -> None:
    outcome = run_case(small(policy=policy), keep_records=True)
    check_conservation(outcome)
    assert len(outcome.records) == 12 * 5


@given(
    users=st.integers(1, 10), turns=st.integers(1, 6), new=st.integers(1, 120), out=st.integers(1, 80), think=st.floats(0, 2),
    system=st.sampled_from(sorted(SYSTEMS)), policy=st.sampled_from(NAMES), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_whoever_comes_the_sums_hold(
    users: int, turns: int, new: int, out: int, think: float, system: str, policy: str, seed: int
) -> None:
    load = LoadOptions(
        users=users,
        turns=turns,
        new_tokens=new,
        output_tokens=out,
        think=ThinkTime(think, exponential=True),
        max_context=1000,
        seed=seed,
    )
    check_conservation(run_case(small(system, policy, load), keep_records=True))


def test_an_open_loop_counts_its_window_and_waits_for_its_requests() -> None:
    load = LoadOptions(
        rates=(20.0,), duration_s=10.0, turns=3, new_tokens=50, output_tokens=20, think=ThinkTime(0.5), seed=1
    )
    outcome = run_case(small(load=load, warm_up_s=2.0, debug=False), keep_records=True)
    window = [record for record in outcome.records if 2.0 <= record.sent_s < 10.0]
    assert outcome.summary.sent == len(window) > 50
    assert outcome.summary.window_s == (2.0, 10.0)
    assert outcome.simulated_s >= max(record.finished_s for record in window)
    assert not math.isnan(outcome.summary.normalized_s.p90)


def test_the_same_case_gives_the_same_result_to_the_last_digit_in_any_process() -> None:
    cases = [small(), small("baseline"), small(policy="lru")]
    alone = [json.dumps(to_json([run_case(case)])) for case in cases]
    assert alone == [json.dumps(to_json([run_case(case)])) for case in cases]
    assert len(set(alone)) == 3
    ticks: list[Tick] = []
    together = run_cases(cases, jobs=2, tell=ticks.append, keep_records=True)
    assert [json.dumps(to_json([run_case(case, keep_records=True)])) for case in cases] == [
        json.dumps(to_json([o])) for o in together
    ]
    assert {tick.index for tick in ticks} <= {0, 1, 2}


@pytest.mark.parametrize("system", sorted(SYSTEMS))
@pytest.mark.parametrize(
    ("open_loop", "chunk_tokens", "admission"), [(False, 32, "fcfs"), (True, 32, "work"), (False, 1, "fcfs")]
)
def test_steps_taken_many_at_a_time_change_no_digit(
    system: str, open_loop: bool, chunk_tokens: int, admission: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = LoadOptions(
        rates=(12.0,), duration_s=8.0, turns=3, new_tokens=50, output_tokens=70, think=ThinkTime(0.5), seed=1
    )
    case = (
        small(system, load=load, warm_up_s=2.0)
        if open_loop
        else small(system, load=replace(LOAD, output_tokens=70))
    )
    case = replace(case, chunk_tokens=chunk_tokens, admission=admission)  # type: ignore[arg-type]
    one_by_one = run_case(case, keep_records=True)
    sizes, real = [], Simulation._run_steadily

    def counted(self: Simulation, *arguments: object) -> int:
        sizes.append(real(self, *arguments))  # type: ignore[arg-type]
        return sizes[-1]

    monkeypatch.setattr(Simulation, "_run_steadily", counted)
    at_once = run_case(replace(case, debug=False), keep_records=True)
    assert replace(at_once, case=case) == one_by_one
    assert (max(sizes) > 1) == (chunk_tokens > 1), "some were, but where every token begins a chunk"


def test_an_error_in_one_process_is_the_error() -> None:
    with pytest.raises(ConfigError, match="no architecture is called 'nonsense'"):
        run_cases([small(), small(machine=type(MACHINE)("nonsense"))], jobs=2)


def test_the_scheduler_and_the_cache_are_the_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    before = to_json([run_case(small())])
    real = Filling._grow
    grown = []

    def never_twice(self: Filling, *arguments: object) -> int | None:
        grown.append(1)
        return None if len(grown) % 2 else real(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Filling, "_grow", never_twice)
        assert to_json([run_case(small())]) != before
    with monkeypatch.context() as patch:
        patch.setattr(Room, "copy_ahead", lambda *arguments: None)
        assert to_json([run_case(small())]) != before
    assert to_json([run_case(small())]) == before
    assert {name for name in vars(PhasedFilling) if not name.startswith("__")} == {"fill"}


def test_nothing_of_them_is_written_twice() -> None:
    """The simulator defines no function that the scheduler, the cache or its parts have, but for the Worker's and policies' own words."""
    core = Path(pensieve.simulator.__file__).parents[1] / "core"
    theirs = set().union(
        *(
            _functions(core / f"{name}.py")
            for name in ("scheduler", "cache", "places", "room", "victims", "recovery", "pool")
        )
    )
    ours = {
        name: path.name
        for path in Path(pensieve.simulator.__file__).parent.glob("*.py")
        for name in _functions(path)
    }
    shared = {name for name in ours if name in theirs and not name.startswith("__")}
    assert shared <= {"_fill", "close", "add", "remove", "worst", "worth"}, (
        shared
    )  # the phases' one override, a worker's and a policy's words


def _functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_a_turn_that_does_not_fit_ends_its_conversation_and_nobody_elses() -> None:
    load = LoadOptions(users=3, turns=30, new_tokens=60, output_tokens=30, seed=0)
    outcome = run_case(small(load=load), keep_records=True)
    failed = [record for record in outcome.records if record.error is not None]
    assert {record.conversation for record in failed} == {"0", "1", "2"}
    assert all("context of 1024" in str(record.error) for record in failed)
    assert outcome.summary.failed == 3


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (lambda: small("nonsense"), "no system is called 'nonsense'"),
        (lambda: small(policy="nonsense"), "no policy is called 'nonsense'"),
        (lambda: small(machine=type(MACHINE)(hardware="abacus")), "no hardware is called 'abacus'"),
        (lambda: small(machine=type(MACHINE)("gpt-oss-20b")), "mixture of experts"),
        (lambda: small(machine=type(MACHINE)("opt-66b")), "take more devices"),
        (lambda: small(machine=type(MACHINE)("smollm2-135m", "laptop-cpu", 2, 1.0, 1.0)), "computes alone"),
        (
            lambda: small(load=LoadOptions(rates=(1.0,), duration_s=10.0), warm_up_s=10.0),
            "--warm-up must be shorter",
        ),
    ],
)
def test_what_cannot_be_simulated_is_said(case: Callable[[], Case], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run_case(case())


def test_shared_beginnings_are_found_by_others() -> None:
    alone = run_case(small(load=LOAD)).summary
    shared = run_case(small(load=replace(LOAD, system_prompts=SystemPrompts(1, 200))), keep_records=True)
    check_conservation(shared)
    first_turns = [record for record in shared.records if record.turn == 0]
    assert sum(record.receipt.gpu_tokens >= 192 for record in first_turns) >= len(first_turns) // 2
    assert alone.history_tokens > 0
