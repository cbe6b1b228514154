"""Two processes that share a model answer as one does, and never wait for each other in vain."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import rank_jobs as jobs
from oracle import Lab
from pensieve.core.plan import Copy, CopyFailure, StepPlan
from pensieve.core.request import SamplingParams
from pensieve.errors import ConfigError, WorkerLost
from pensieve.worker import sharding
from pensieve.worker.gate import admit
from pensieve.worker.ledger import CopyLedger
from pensieve.worker.rank import Rank
from rank_jobs import DRAWN, VOCAB
from rank_pairs import RankPair, environment
from tiny_models import tiny

WITH_PLANS = ("llama", "qwen3", "gemma2", "mistral")


@pytest.fixture(scope="module")
def pair() -> Iterator[RankPair]:
    pair = RankPair()
    yield pair
    pair.close()


def alone(sampling: SamplingParams) -> list[int]:
    """What one process answers."""
    torch.set_num_threads(1)
    lab = Lab(admit(tiny("llama", vocab_size=VOCAB), test=False), (12,))
    try:
        return jobs.answer(lab, sampling)
    finally:
        lab.close()


# -- the same answers


@pytest.mark.parametrize("architecture", WITH_PLANS)
def test_logits_are_those_of_one_process(pair: RankPair, architecture: str) -> None:
    difference, _ = pair.run(jobs.compare_logits, jobs.just_follow, architecture)
    assert difference < 1e-4


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_conversations_in_small_tiers_answer_as_a_stateless_run(pair: RankPair, architecture: str) -> None:
    """Swapped out and in, dropped, recomputed, erased.

    Plans, batches and tokens compared between the ranks in every step.
    """
    met, _ = pair.run(jobs.play, jobs.just_follow, architecture)
    assert all(met[name] > 0 for name in ("copied", "swapped in", "recomputed", "dropped")), met
    assert met["failed"] == met["broken requests"] == 0, met


def test_what_fails_on_either_rank_alone_is_recomputed(pair: RankPair) -> None:
    """Copies and forwards fail on both, at different times."""
    met, _ = pair.run(jobs.play, jobs.follow_with_faults, "llama")
    assert met["failed"] > 0, met
    pair.run(jobs.play_at_random, jobs.follow_with_faults, "gemma2", (2, 18, 31))


def test_what_is_drawn_is_drawn_on_both(pair: RankPair) -> None:
    """A seed draws what it draws in one process.

    Without one, rank 0 draws the seed (the ranks compare their tokens).
    """
    (seeded, unseeded), _ = pair.run(jobs.sample, jobs.follow_llama)
    assert seeded == alone(DRAWN)
    assert len(unseeded) == 8


# -- failures on one rank


@pytest.mark.parametrize("what", ["forward", "wipe"])
def test_a_step_that_breaks_on_one_rank_is_void_on_both_and_poisons_nothing(
    pair: RankPair, what: str
) -> None:
    (results, tokens), _ = pair.run(jobs.run_broken, jobs.follow_broken, what)
    second = results[1]
    assert (
        second.tokens == ()
        and second.forward_error is not None
        and "rank 1: MemoryError: " in second.forward_error
    )
    assert (second.wipe_error is not None) is (what == "wipe")
    copy_ids = (
        second.copies_done
        if what == "forward"
        else tuple(failure.copy_id for failure in second.copies_failed)
    )
    assert copy_ids == (0,), "what is copied does not depend on the forward, but on the wipes"
    assert tokens == alone(SamplingParams(max_new_tokens=4))


def test_a_copy_is_good_where_it_is_good_on_both(pair: RankPair) -> None:
    results, _ = pair.run(jobs.lose_swap_ins, jobs.follow_losing)
    done = [copy_id for result in results for copy_id in result.copies_done]
    failed = [failure for result in results for failure in result.copies_failed]
    assert sorted(done) == [0, 2]
    assert failed == [
        CopyFailure(1, False, "rank 1: OSError: full"),
        CopyFailure(3, True, "rank 1: SourceLost: unreadable"),
    ]
    assert [token.request_id for token in results[-1].tokens] == ["o"]


def test_the_step_after_the_waker_waits_for_the_other_ranks_copy(pair: RankPair) -> None:
    (seconds, done), _ = pair.run(jobs.wait_for_the_other, jobs.follow_late)
    assert done == (0,) and seconds > 0.1


# -- ranks that disagree


@pytest.mark.parametrize(
    ("what", "words"), [("plan", "would compute something else"), ("tokens", "sampled other tokens")]
)
def test_in_debug_a_disagreement_ends_both_naming_step_and_rank(
    pair: RankPair, what: str, words: str
) -> None:
    for result in pair.outcomes(jobs.two_steps, jobs.follow_another_plan, what):
        assert isinstance(result, WorkerLost)
        assert f"in step 1 rank 1 {words} than rank 0" in result.message


# -- refusals


def test_shares_are_computed_by_modules_and_refusals_are_shared(pair: RankPair) -> None:
    ours, theirs = pair.run(jobs.refused, jobs.refused)
    assert "its weights are split over 2 processes" in ours[0] and "--forward auto or modules" in ours[0]
    assert "its weights are split over 2 processes" in ours[1] and "--quantize none" in ours[1]
    assert (ours[2], theirs[2]) == ("rank 1: no room here", "no room here")


@pytest.mark.parametrize(
    ("architecture", "num_ranks", "words"),
    [
        ("gpt2", 2, "transformers has no tensor parallel plan for 'gpt2' models"),
        ("opt", 2, "without torchrun"),
        (
            "llama",
            3,
            r"llama has 2 key/value heads, .* 3 processes: start a number that divides them \(2\), or",
        ),
    ],
)
def test_models_that_cannot_be_split_are_refused_with_the_way_out(
    architecture: str, num_ranks: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        sharding.require_divisible(tiny(architecture).config, architecture, num_ranks)


def test_a_place_is_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(1, 4, 29500).items():
        monkeypatch.setenv(name, value)
    assert Rank.from_environment() == Rank(1, 4, 1, 4)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(ConfigError, match=r"\[0, WORLD_SIZE = 4\), got 4"):
        Rank.from_environment()
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(ConfigError, match="must be numbers"):
        Rank.from_environment()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Rank.from_environment() is None
    monkeypatch.delenv("MASTER_ADDR")
    assert Rank.from_environment() is None


def test_a_ledger_of_three_ranks() -> None:
    ledger = CopyLedger(3)
    copies = tuple(Copy(copy_id, 0, copy_id, 1, copy_id) for copy_id in range(4))
    ledger.begin(StepPlan(0, (), copies[:1], copies[1:], (), (), (), ()))
    ledger.settle(0, (0, 1, 3), ())
    ledger.settle(1, (0, 1), [CopyFailure(2, False, "full")])
    assert ledger.others_owe and ledger.take() == ((), ()), "rank 2 has said nothing"
    ledger.settle(2, (0, 2), [CopyFailure(1, True, "gone")])
    assert ledger.take() == ((0,), (CopyFailure(1, True, "rank 2: gone"),))
    ledger.settle(0, (), [CopyFailure(2, True, "torn")])
    assert ledger.take() == ((), (CopyFailure(2, True, "rank 1: full; rank 0: torn"),))
    assert ledger.num_open == 1 and ledger.others_owe
    ledger.settle(1, (3,), ())
    ledger.settle(2, (3,), ())
    assert ledger.take() == ((3,), ()) and ledger.num_open == 0 and not ledger.others_owe


# -- last, since they cost processes


def test_who_is_left_alone_says_so_and_does_not_hang(pair: RankPair) -> None:
    message, gone = pair.outcomes(jobs.lead_until_lost, jobs.die)
    assert isinstance(gone, EOFError)
    assert "rank 0 lost the other processes" in message
    gone, lost = pair.outcomes(jobs.die, jobs.just_follow, "llama")
    assert isinstance(gone, EOFError)
    assert isinstance(lost, WorkerLost) and "rank 1 lost the other processes" in lost.message


def test_a_forward_that_breaks_midway_is_void_if_it_breaks_on_all_and_the_end_if_on_one(
    pair: RankPair,
) -> None:
    results, _ = pair.run(jobs.break_in_forward, jobs.break_in_forward, (0, 1))
    assert (
        results[1].forward_error is not None
        and "rank 0: MemoryError" in results[1].forward_error
        and "rank 1" in results[1].forward_error
    )
    assert [token.token_id for result in (results[0], results[2]) for token in result.tokens] == alone(
        SamplingParams(max_new_tokens=2)
    )
    error, gone = pair.outcomes(jobs.break_in_forward, jobs.break_in_forward, (1,))
    assert isinstance(error, WorkerLost) and isinstance(gone, EOFError), (error, gone)
