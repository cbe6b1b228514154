"""The closed loop: who speaks when, what is replayed, and what a failing turn does."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
from chat_fakes import FakeSystem

from pensieve.bench.compare import run_users
from pensieve.bench.driver import RunProgress
from pensieve.bench.runs import EarlyEnd, RunSettings
from pensieve.bench.systems import CONTEXT_FULL, TurnRequest, TurnResult, failed_turn
from pensieve.errors import ConfigError, Overloaded
from pensieve.workloads.arrivals import ThinkClass
from pensieve.workloads.conversations import Conversation, text_length_tokens


def talk(num: int, turns: int, system: str | None = None) -> list[Conversation]:
    return [Conversation(f"c{i}", system, tuple(f"c{i} says {t}" for t in range(turns))) for i in range(num)]


def settings(interval_s: float = 0.0, **changes: Any) -> RunSettings:
    return RunSettings(**{"request_interval_s": interval_s, "max_new_tokens": 4, **changes})


def test_every_turn_of_every_conversation_is_asked_once_and_in_order() -> None:
    system = FakeSystem(delay_s=0.001)
    run = run_users(system, talk(5, 4, "S"), settings())
    assert [r.key for r in run.records] == [(f"c{i}", t) for i in range(5) for t in range(4)]
    assert all(r.result.ok for r in run.records)
    assert not system.overlapped
    assert sorted(system.ended) == [f"c{i}" for i in range(5)]
    assert [r.request.system_text for r in run.records[:2]] == ["S", None]
    assert run.early_ends == ()
    assert run.duration_s > 0


def test_users_talk_at_the_same_time() -> None:
    system = FakeSystem(delay_s=0.05)
    run_users(system, talk(6, 1), settings())
    assert system.most_in_flight == 6


def test_the_next_turn_is_due_a_think_time_after_the_answer() -> None:
    run = run_users(FakeSystem(), talk(4, 3), settings(0.02))
    by_key = run.by_key()
    for record in run.records:
        think_s = {ThinkClass.HOT: 0.006, ThinkClass.WARM: 0.02, ThinkClass.COLD: 0.05}[record.think]
        if record.request.turn_index:
            assert record.due_s == pytest.approx(by_key[record.key[0], record.key[1] - 1].done_s + think_s)
        else:
            assert record.due_s == pytest.approx(record.user / 4 * 0.02)
        assert record.due_s <= record.sent_s <= record.done_s
    assert [by_key[f"c{i}", 0].think for i in range(4)] == [
        ThinkClass.HOT,
        ThinkClass.WARM,
        ThinkClass.COLD,
        ThinkClass.HOT,
    ]


def test_users_take_their_conversations_one_after_the_other() -> None:
    system = FakeSystem(delay_s=0.002)
    run = run_users(system, talk(5, 2), settings(num_users=2))
    assert {r.key[0]: r.user for r in run.records} == {"c0": 0, "c1": 1, "c2": 0, "c3": 1, "c4": 0}
    assert system.most_in_flight <= 2
    assert len(run.records) == 10


def test_more_users_than_conversations_are_no_more_than_conversations() -> None:
    assert len(run_users(FakeSystem(), talk(2, 1), settings(num_users=9)).records) == 2


def test_random_tokens_at_the_texts_lengths_and_equal_for_equal_texts() -> None:
    system = FakeSystem()
    talks = [
        Conversation("a", "shared system", ("hello there",)),
        Conversation("b", "shared system", ("good-bye",)),
    ]
    run_users(system, talks, settings(vocab_size=50))
    a, b = (turn.tokens for turn in system.asked)
    assert a is not None
    assert b is not None
    shared = text_length_tokens("shared system")
    assert a[:shared] == b[:shared]
    assert len(a) == shared + text_length_tokens("hello there")
    assert a[shared:] != b[shared:]
    assert max(a + b) < 50
    assert all(turn.user_text is None and turn.system_text is None for turn in system.asked)


def test_a_replay_asks_after_the_first_runs_history() -> None:
    class Other(FakeSystem):
        """Says something else, to show that its own answers do not matter."""

        def answer(self, turn: TurnRequest) -> TurnResult:
            assert turn.forced_history is not None
            return super().answer(turn)

    talks = talk(3, 3)
    first = run_users(FakeSystem(), talks, settings())
    again = Other("again")
    second = run_users(again, talks, settings(), replay=first)
    histories = {(t.conversation_id, t.turn_index): t.forced_history for t in again.asked}
    for (conversation_id, turn), record in first.by_key().items():
        if turn == 0:
            assert histories[conversation_id, 0] == ()
        if turn < 2:
            assert histories[conversation_id, turn + 1] == (*record.result.prompt_path, *record.result.output)
    assert [r.result.prompt_path for r in first.records] == [r.result.prompt_path for r in second.records]
    answers = {(t.conversation_id, t.turn_index): t.forced_answer for t in again.asked}
    assert answers["c0", 1] == first.by_key()["c0", 0].result.text
    assert answers["c0", 0] is None


def test_a_replay_asks_nothing_that_the_first_run_did_not() -> None:
    talks = talk(2, 6)
    first = run_users(FakeSystem(max_context=60), talks, settings())
    assert len(first.records) < 12
    second = run_users(FakeSystem("big"), talks, settings(), replay=first)
    assert [r.key for r in second.records] == [r.key for r in first.records]
    with pytest.raises(ConfigError, match="replay a run of the same ones"):
        run_users(FakeSystem(), [Conversation("other", None, ("x",))], settings(), replay=first)


def test_a_full_context_ends_its_conversation_and_is_said() -> None:
    talks = [Conversation("long", None, tuple("x" * 30 for _ in range(5))), *talk(1, 5)]
    run = run_users(FakeSystem(max_context=100), talks, settings())
    (end,) = [e for e in run.early_ends if e.conversation_id == "long"]
    assert (end.code, end.turn_index, end.turns_left, end.context_full) == (CONTEXT_FULL, 2, 2, True)
    assert str(end) == "conversation long ended at turn 3, 2 more not sent: context full"
    assert [r.result.ok for r in run.records if r.key[0] == "long"] == [True, True, False]
    assert len([r for r in run.records if r.key[0] == "c0"]) == 5, "the others go on"


@pytest.mark.parametrize("where", ["raise", "future", "result"])
def test_any_other_error_is_recorded_and_ends_only_its_conversation(where: str) -> None:
    class Broken(FakeSystem):
        def start_turn(self, turn: TurnRequest) -> Future[TurnResult]:
            if turn.conversation_id == "c1" and where == "raise":
                raise Overloaded("the queue is full")
            return super().start_turn(turn)

        def answer(self, turn: TurnRequest) -> TurnResult:
            if turn.conversation_id == "c1" and where == "future":
                raise ZeroDivisionError("oops")
            if turn.conversation_id == "c1":
                return failed_turn("overloaded", "the queue is full", submitted_s=0.0, total_s=0.0)
            return super().answer(turn)

    run = run_users(Broken(), talk(3, 2), settings())
    assert len(run.records) == 5
    (end,) = run.early_ends
    assert end == EarlyEnd("c1", 0, 1, end.code, end.message)
    assert (end.code, end.message) == {
        "raise": ("overloaded", "the queue is full"),
        "future": ("internal_error", "ZeroDivisionError: oops"),
        "result": ("overloaded", "the queue is full"),
    }[where]


class Ears:
    """A listener that writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def begin(self, label: str, progress: RunProgress) -> None:
        self.heard.append(f"begin {label} {progress.num_turns}")

    def show(self, progress: RunProgress) -> None:
        self.heard.append(f"sent {progress.sent}, ended {progress.ended}, failed {progress.failed}")

    def say(self, words: str) -> None:
        self.heard.append(words)

    def end(self, progress: RunProgress) -> None:
        self.heard.append(f"end, skipped {progress.skipped}")


def test_a_turn_that_never_ends_times_out_and_a_late_answer_is_ignored() -> None:
    hung: list[Future[TurnResult]] = []

    class Hanging(FakeSystem):
        def start_turn(self, turn: TurnRequest) -> Future[TurnResult]:
            if turn.conversation_id != "c0":
                return super().start_turn(turn)
            hung.append(Future())
            return hung[-1]

    class AnswersLate(Ears):
        def say(self, words: str) -> None:
            hung[0].set_result(failed_turn("late", "", submitted_s=0.0, total_s=0.0))

    run = run_users(Hanging(), talk(2, 4), settings(0.1, turn_timeout_s=0.05), AnswersLate())
    assert [r.result.error_code for r in run.records] == ["timeout", None, None, None, None]
    assert [e.code for e in run.early_ends] == ["timeout"]


def test_the_listener_hears_everything() -> None:
    ears = Ears()
    run_users(FakeSystem(max_context=25), talk(1, 4), settings(), ears)
    assert ears.heard == [
        "begin fake 4",
        "sent 1, ended 0, failed 0",
        "sent 1, ended 1, failed 0",
        "sent 2, ended 1, failed 0",
        "sent 2, ended 2, failed 0",
        "conversation c0 ended at turn 2, 2 more not sent: context full",
        "end, skipped 2",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"request_interval_s": -1}, "request interval must be at least 0 seconds, got -1"),
        ({"request_interval_s": float("nan")}, "request interval"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"num_users": 0}, "number of users must be at least 1, got 0"),
        ({"vocab_size": 0}, "vocabulary must have at least 1 token"),
        ({"turn_timeout_s": 0}, "turn_timeout_s must be positive, got 0"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(**changes)


def test_conversations_that_cannot_be_run() -> None:
    with pytest.raises(ConfigError, match="at least 1 conversation"):
        run_users(FakeSystem(), [], settings())
    with pytest.raises(ConfigError, match="same id"):
        run_users(FakeSystem(), [*talk(1, 1), *talk(1, 1)], settings())
