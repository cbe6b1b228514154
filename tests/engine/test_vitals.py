"""An engine is known dead by what it does: silent, hung, spinning or failing, it is replaced; a restart is tried for as long as it takes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from engine_children import MAX_CONTEXT, POISON, SpinningEngine, fake, fragile, half_said
from test_process import eventually, first_token, process, submit

from fake_worker import FakeWorker
from pensieve.config import CacheConfig, SchedulerConfig, TierConfig
from pensieve.core.cache import TieredCache
from pensieve.core.cost import CostProfile
from pensieve.core.eviction import RetentionValue
from pensieve.core.scheduler import Scheduler
from pensieve.engine.engine import Engine
from pensieve.engine.messages import Event, Failed, Finished, GetStats, Lost, Stats
from pensieve.engine.process import MAX_START_FAILURES
from pensieve.engine.vitals import LivedTime, Patience, Vitals
from pensieve.engine.wire import Inbox
from pensieve.errors import ConfigError, EngineRestarted, ModelRefused, ModelUnavailable, PensieveError

QUICK = Patience(silent_s=1.5, step_s=30.0)
FORWARD = Patience(silent_s=30.0, step_s=1.5)


# -- judging, without processes


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_time_in_which_the_judge_stood_still_does_not_count() -> None:
    clock = Clock()
    lived = LivedTime(2.0, clock)
    for step_s, expected_s in ((0.5, 0.5), (1.5, 2.0), (3600.0, 4.0), (0.5, 4.5), (-5.0, 4.5)):
        clock.now_s += step_s
        assert lived.now() == pytest.approx(expected_s)


def test_silence_and_steps_without_end_are_deaths_and_nothing_shorter_is() -> None:
    vitals = Vitals(Patience(silent_s=30.0, step_s=300.0), 10.0)
    assert vitals.why_dead(39.9) is None
    assert vitals.why_dead(40.0) == "it sent no heartbeat for 30 s"
    for second in range(40, 340):  # an honest step of five minutes: heartbeats go on
        vitals.heard(second)
        vitals.beat(second - 40.5)
        assert vitals.why_dead(second) is None
    vitals.beat(300.0)
    assert vitals.why_dead(340.0) == "its step did not end within 300 s"
    vitals.beat(0.0)
    assert vitals.why_dead(340.0) is None


@pytest.mark.parametrize(
    ("silent_s", "step_s", "named"), [(1.0, 300.0, "--engine-timeout"), (30.0, 0.0, "--step-timeout")]
)
def test_patience_shorter_than_a_heartbeat_is_refused(silent_s: float, step_s: float, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Patience(silent_s, step_s)


def test_messages_come_out_whole_however_they_were_cut() -> None:
    import multiprocessing
    import pickle

    theirs, ours = multiprocessing.Pipe()
    said = [list(range(50)), "x", {"a": 1}]
    data = b"".join(len(one).to_bytes(4, "big") + one for one in map(pickle.dumps, said))
    data += (
        (-1).to_bytes(4, "big", signed=True)
        + len(pickle.dumps("long")).to_bytes(8, "big")
        + pickle.dumps("long")
    )
    inbox, heard = Inbox(theirs), []
    for start in range(0, len(data), 7):
        os.write(ours.fileno(), data[start : start + 7])
        heard += inbox.take()
    assert heard == [*said, "long"]
    ours.close()
    with pytest.raises(EOFError):
        inbox.take()
    theirs.close()


# -- engines that do not die by themselves


def test_a_frozen_engine_is_replaced_and_what_it_was_given_is_answered() -> None:
    states: list[str] = []
    with process(fake, 0.05, patience=QUICK, on_state=states.append) as (engine, events):
        first = engine.ready(30)
        engine.post(submit("r", n=300))
        first_token(events, "r")
        os.kill(first.pid, signal.SIGSTOP)
        engine.post(GetStats("stats"))
        end = events.end_of("r")
        assert isinstance(end, Failed) and end.code == EngineRestarted.code
        assert (
            end.message
            == "the engine process died (it sent no heartbeat for 1.5 s) while this request ran; it is started again; ask again"
        )
        assert isinstance(events.answer_to("stats"), Lost)
        engine.post(submit("again", n=3))
        assert isinstance(events.end_of("again"), Finished)
        assert engine.ready(30).pid != first.pid and states == ["ready", "restarting", "ready"]


def test_a_frozen_engine_is_trouble_before_it_is_replaced() -> None:
    with process(fake) as (engine, _):
        pid = engine.ready(30).pid
        assert engine.trouble() is None
        os.kill(pid, signal.SIGSTOP)
        eventually(lambda: engine.trouble() is not None)
        assert engine.trouble() == "the engine has sent no heartbeat for 5 s" and engine.state == "ready"
        os.kill(pid, signal.SIGCONT)
        eventually(lambda: engine.trouble() is None)
        assert engine.restarts == 0


def test_an_engine_frozen_in_the_middle_of_a_message_is_replaced() -> None:
    with process(half_said, 0.0, patience=QUICK) as (engine, _):
        engine.ready(30)
        eventually(lambda: engine.restarts > 0)
        assert engine.last_error is not None and "no heartbeat" in engine.last_error


def test_a_step_that_hangs_ends_its_engine() -> None:
    with process(fake, 30.0, 0.0, 0.1, patience=FORWARD) as (engine, events):
        engine.ready(30)
        engine.post(submit("r"))
        end = events.end_of("r")
        assert isinstance(end, Failed) and "its step did not end within 1.5 s" in end.message
        eventually(lambda: engine.restarts == 1 and engine.state == "ready")


def test_a_loop_that_spins_without_a_step_ends_its_engine() -> None:
    with process(fake, 0.0, 0.0, 0.1, False, "float32", SpinningEngine, patience=FORWARD) as (engine, events):
        engine.ready(30)
        engine.post(GetStats("stats"))
        assert isinstance(events.answer_to("stats"), Stats)  # it does answer
        time.sleep(2.0)
        assert engine.restarts == 0  # with nothing to do it may spin
        engine.post(submit("r"))
        end = events.end_of("r")
        assert isinstance(end, Failed) and "its step did not end" in end.message


def test_honest_steps_longer_than_the_silence_allowed_are_let_run() -> None:
    with process(fake, 2.5, patience=QUICK) as (engine, events):
        engine.ready(30)
        engine.post(submit("r", n=2))
        assert isinstance(events.end_of("r"), Finished)
        assert engine.restarts == 0


def test_an_engine_whose_every_step_fails_is_replaced_and_one_bad_request_ends_none() -> None:
    with process(fake, 0.0, 0.0, 1.0, False, "float32", Engine, 4, patience=QUICK) as (engine, events):
        pid = engine.ready(30).pid
        for number in range(
            3
        ):  # each fails twice, and is answered for itself; a good step lies between two of them
            engine.post(submit(f"bad-{number}", (POISON,)))
            end = events.end_of(f"bad-{number}")
            assert isinstance(end, Failed) and end.code == "worker_failed"
            engine.post(submit(f"good-{number}", n=2))
            assert isinstance(events.end_of(f"good-{number}"), Finished)
        assert engine.restarts == 0
        for number in range(3):
            engine.post(submit(f"worse-{number}", (POISON,)))
        ends = [events.end_of(f"worse-{number}") for number in range(3)]
        assert all(isinstance(end, Failed) for end in ends)
        eventually(lambda: engine.state == "ready" and engine.restarts == 1)
        assert engine.ready(30).pid != pid
        assert (
            engine.last_error is not None
            and "4 steps failed in a row" in engine.last_error
            and "the forward broke" in engine.last_error
        )


def test_an_engine_without_a_process_goes_on_after_any_number_of_failures() -> None:
    events: list[Event] = []
    tiers = (TierConfig("gpu", 8), TierConfig("cpu", 8))
    cost = CostProfile([(8, 1.0), (512, 3.0)], 8)
    scheduler = Scheduler(
        SchedulerConfig(), TieredCache(CacheConfig(tiers, 8), lambda: RetentionValue(cost.of_chunk)), 64
    )
    engine = Engine(
        scheduler, FakeWorker([8, 8], 8, forward_failure_rate=1.0), chunk_bytes=1, emit=events.extend
    )
    for number in range(12):
        engine.post(submit(f"r{number}", (1, 2, 3)))
        while engine.step():
            pass
    assert (
        len([event for event in events if isinstance(event, Failed) and event.code == "worker_failed"]) == 12
    )


# -- starting again


@pytest.mark.parametrize("error", [ModelUnavailable("there is no model '/home/x'"), RuntimeError("odd")])
def test_a_restart_that_fails_is_tried_until_it_works(tmp_path: Path, error: Exception) -> None:
    failing = tmp_path / "failing"
    with process(fragile, failing, error, tmp_path / "context", max_backoff_s=0.05, hold_s=0.5) as (
        engine,
        events,
    ):
        pid = engine.ready(30).pid
        failing.write_text("")
        os.kill(pid, signal.SIGKILL)
        engine.post(submit("r"))
        end = events.end_of("r")  # told to ask again
        assert isinstance(end, Failed) and end.code == EngineRestarted.code and "/home" not in end.message
        eventually(lambda: len(failing.read_text()) > MAX_START_FAILURES, timeout=60)
        assert engine.state == "restarting"
        assert engine.last_error is not None and "times in a row" in engine.last_error
        failing.unlink()
        eventually(lambda: engine.state == "ready")
        engine.post(submit("again", n=3))
        assert isinstance(events.end_of("again"), Finished)


def test_an_engine_that_comes_back_as_another_one_is_not_used(tmp_path: Path) -> None:
    context = tmp_path / "context"
    with process(fragile, tmp_path / "failing", ValueError(), context, max_backoff_s=0.05) as (engine, _):
        pid = engine.ready(30).pid
        context.write_text(str(MAX_CONTEXT // 2))
        os.kill(pid, signal.SIGKILL)
        eventually(
            lambda: engine.last_error is not None and "max_context was 400 and is 200" in engine.last_error
        )
        assert engine.state == "restarting"
        context.unlink()
        eventually(lambda: engine.state == "ready")


def test_a_first_start_that_fails_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "failing").write_text("")
    with process(fragile, tmp_path / "failing", ModelRefused("unfit"), tmp_path / "context") as (engine, _):
        with pytest.raises(PensieveError, match="unfit"):
            engine.ready(30)
        assert engine.state == "failed" and engine.restarts == 0
