"""The verdict on two runs: what counts as equal, and that planted bugs are seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from chat_fakes import FakeSystem, shifted, with_token

from pensieve.bench.compare import run_users
from pensieve.bench.equality import Equality, Tolerance, Verdict, compare_outputs, default_tolerance
from pensieve.bench.runs import Run, RunSettings
from pensieve.bench.systems import TurnRequest, TurnResult, failed_turn
from pensieve.errors import ConfigError
from pensieve.workloads.conversations import Conversation

TALKS = [Conversation(f"c{i}", None, ("one", "two", "three")) for i in range(2)]
SETTINGS = RunSettings(request_interval_s=0.0, max_new_tokens=6)
Change = Callable[[TurnResult], TurnResult]


class Changed(FakeSystem):
    """Answers like the fake, but one turn is changed."""

    def __init__(self, change: Change, conversation: str = "c1", turn: int = 1) -> None:
        super().__init__("changed")
        self._change, self._where = change, (conversation, turn)

    def answer(self, turn: TurnRequest) -> TurnResult:
        result = super().answer(turn)
        return self._change(result) if (turn.conversation_id, turn.turn_index) == self._where else result


def against(change: Change, dtype: str = "float32", tolerance: Tolerance | None = None) -> Equality:
    first = run_users(FakeSystem("plain"), TALKS, SETTINGS)
    second = run_users(Changed(change), TALKS, SETTINGS, replay=first)
    return compare_outputs(first, second, dtype, tolerance)


def verdict(found: Equality) -> Verdict:
    (turn,) = [t for t in found.turns if (t.conversation_id, t.turn_index) == ("c1", 1)]
    others = [t for t in found.turns if t is not turn]
    assert [t.verdict for t in others] == [Verdict.IDENTICAL] * 5, (
        "a replay keeps one turn's difference from the others"
    )
    return turn.verdict


def other(token: int) -> int:
    return (token + 500) % 1000


def test_the_same_answers_are_equal() -> None:
    found = against(lambda result: result)
    assert verdict(found) is Verdict.IDENTICAL
    assert (found.equal, found.max_delta, found.example) == (True, 0.0, None)
    assert found.verdict_line().startswith(
        "equal outputs under the contract (float32, tolerance 0.001 nats + 0.0001 relative): 6 identical;"
    )


def test_a_near_tie_is_equal_and_shown() -> None:
    found = against(lambda result: with_token(result, 2, other(result.output[2]), 0.0005))
    assert verdict(found) is Verdict.NEAR_TIE
    assert found.equal is True
    assert found.example is not None
    assert found.example.position == 2 and found.example.gap == pytest.approx(0.0005)
    assert "5 identical, 1 near tie" in found.verdict_line()


def test_planted_a_wrong_token_that_was_clearly_not_the_likeliest() -> None:
    found = against(lambda result: with_token(result, 2, other(result.output[2]), 1.5))
    assert verdict(found) is Verdict.DIFFERENT
    assert found.equal is False
    assert found.example is not None
    assert found.example.position == 2
    assert "DIFFERENT outputs" in found.verdict_line()
    assert "1 DIFFERENT" in found.verdict_line()


def test_planted_a_wrong_token_is_seen_in_bfloat16_too() -> None:
    assert (
        verdict(against(lambda result: with_token(result, 2, other(result.output[2]), 0.4), "bfloat16"))
        is Verdict.NEAR_TIE
    )
    assert (
        verdict(against(lambda result: with_token(result, 2, other(result.output[2]), 0.6), "bfloat16"))
        is Verdict.DIFFERENT
    )


def test_planted_logits_that_drift_under_the_same_tokens() -> None:
    found = against(lambda result: shifted(result, 3, 0.01))
    assert verdict(found) is Verdict.DIFFERENT
    assert found.max_delta == pytest.approx(0.01)
    assert found.example is not None
    assert found.example.position == 3
    within = against(lambda result: shifted(result, 3, 0.01), "bfloat16")
    assert verdict(within) is Verdict.IDENTICAL
    assert within.max_delta == pytest.approx(0.01)


def test_planted_a_small_drift_of_every_token_is_seen_in_the_mean() -> None:
    class Drifting(FakeSystem):
        def __init__(self, nats: float) -> None:
            super().__init__("drifting")
            self.nats = nats

        def answer(self, turn: TurnRequest) -> TurnResult:
            result = super().answer(turn)
            return replace(result, logprobs=tuple(value - self.nats for value in result.logprobs))

    for num_tokens, nats, equal in (
        (40, 0.1, False),
        (40, 0.02, True),
        (30, 0.1, True),
    ):  # of 6 turns: 240 tokens, or 180
        settings = RunSettings(request_interval_s=0.0, max_new_tokens=num_tokens)
        first = run_users(FakeSystem("plain"), TALKS, settings)
        found = compare_outputs(first, run_users(Drifting(nats), TALKS, settings, replay=first), "bfloat16")
        assert found.counts[Verdict.IDENTICAL] == 6
        assert found.num_compared == 6 * num_tokens
        assert found.mean_delta == pytest.approx(nats)
        assert found.equal is equal
        assert ("the mean is more than rounding explains (above 0.04)" in found.verdict_line()) is not equal


def test_planted_drift_before_a_near_tie() -> None:
    assert (
        verdict(against(lambda r: with_token(shifted(r, 1, 0.01), 2, other(r.output[2]), 0.0)))
        is Verdict.DIFFERENT
    )


def test_planted_a_tie_that_only_one_run_sees_with_a_candidate_that_moved_far() -> None:
    def change(result: TurnResult) -> TurnResult:
        rival = result.tops[2][1][0]  # 1 nat behind in the first run, chosen by a hair in the second
        return with_token(result, 2, rival, 0.0001)

    found = against(change)
    assert verdict(found) is Verdict.DIFFERENT
    assert found.example is not None
    assert "moved" in found.example.reason


def test_what_comes_after_a_near_tie_is_not_compared() -> None:
    def change(result: TurnResult) -> TurnResult:
        tied = with_token(result, 2, other(result.output[2]), 0.0)
        return replace(
            tied, output=(*tied.output[:3], 1, 2, 3), logprobs=(*tied.logprobs[:3], -9.0, -9.0, -9.0)
        )

    assert verdict(against(change)) is Verdict.NEAR_TIE


def test_planted_an_answer_that_stops_early() -> None:
    found = against(
        lambda r: replace(
            r, output=r.output[:4], logprobs=r.logprobs[:4], tops=r.tops[:4], finish_reason="stop"
        )
    )
    assert verdict(found) is Verdict.DIFFERENT
    assert found.example is not None
    assert "6 tokens (length) against 4 (stop)" in found.example.reason


def test_a_difference_nobody_can_excuse_without_log_probabilities() -> None:
    change: Change = lambda r: replace(r, output=(other(r.output[0]), *r.output[1:]), logprobs=(), tops=())  # noqa: E731
    assert verdict(against(change)) is Verdict.DIFFERENT


def test_planted_another_context() -> None:
    found = against(
        lambda result: replace(result, prompt_path=(*result.prompt_path[:5], 999, *result.prompt_path[6:]))
    )
    assert verdict(found) is Verdict.CONTEXT
    assert found.equal is False
    assert found.example is not None
    assert "differ from token 5 on" in found.example.reason


def test_planted_numbers_that_are_none() -> None:
    assert verdict(against(lambda result: replace(result, logprobs=(float("nan"),) * 6))) is Verdict.DIFFERENT


def test_a_turn_that_fails_in_one_run_only() -> None:
    found = against(lambda _result: failed_turn("worker_failed", "x", submitted_s=0.0, total_s=0.0))
    assert [t.verdict for t in found.turns if t.conversation_id == "c1"] == [
        Verdict.IDENTICAL,
        Verdict.FAILED,
        Verdict.FAILED,
    ]
    assert found.equal is False


def test_a_full_context_in_both_is_no_difference() -> None:
    first = run_users(FakeSystem(max_context=20), TALKS, SETTINGS)
    second = run_users(FakeSystem(max_context=20), TALKS, SETTINGS, replay=first)
    found = compare_outputs(first, second, "float32")
    assert found.counts[Verdict.BOTH_FAILED] == 2
    assert found.equal is True


def test_a_system_that_tells_no_tokens_cannot_be_compared() -> None:
    first = run_users(FakeSystem(), TALKS, SETTINGS)

    def untold(run: Run) -> Run:
        bare: dict[str, Any] = {"prompt_path": (), "output": (), "logprobs": (), "tops": ()}
        records = [replace(record, result=replace(record.result, **bare)) for record in run.records]
        return replace(run, records=tuple(records))

    found = compare_outputs(first, untold(first), "float32")
    assert found.equal is None
    assert found.verdict_line() == "outputs not comparable: 6 not told"


def test_tolerances() -> None:
    assert default_tolerance("torch.bfloat16") == default_tolerance("bf16") == Tolerance(0.0, 0.5, 0.04)
    assert default_tolerance("float32").allows(-20.0, -20.0029)
    assert not default_tolerance("float32").allows(-20.0, -20.0031)
    assert not default_tolerance("float32").allows(float("-inf"), -1.0)
    with pytest.raises(ConfigError, match="no tolerance is known for 'int8'"):
        default_tolerance("int8")
    found = against(lambda result: shifted(result, 0, 5.0), "int8", Tolerance(0.0, 6.0))
    assert found.equal is True
