"""An engine in a process of its own: whatever happens to the process, every command is answered."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import engine_children
import psutil
import pytest
from engine_children import BUG, VOCAB, dying, fake, raising, raving, silent

from fake_worker import expected_answer
from pensieve.core.request import FinishReason, SamplingParams
from pensieve.engine.child_process import ChildProcess
from pensieve.engine.messages import Event, Failed, Finished, GetStats, Keep, Lost, Stats, Submit, Token
from pensieve.engine.process import MAX_START_FAILURES, EngineProcess
from pensieve.errors import (
    ConfigError,
    EngineClosed,
    EngineNotReady,
    EngineRestarted,
    ModelUnavailable,
    PensieveError,
)
from pensieve.message import Message
from pensieve.service import ConversationService

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "tests" / "engine")]),
}
PROMPT = tuple(range(20, 60))


class Events:
    """What an engine said, to be waited for."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.seen: list[Event] = []

    def emit(self, events: list[Event]) -> None:
        for event in events:
            self.queue.put(event)

    def until(self, wanted: Callable[[Event], bool], timeout: float = 30.0) -> Any:
        for event in self.seen:
            if wanted(event):
                return event
        deadline = time.monotonic() + timeout
        while True:
            event = self.queue.get(timeout=max(0.01, deadline - time.monotonic()))
            self.seen.append(event)
            if wanted(event):
                return event

    def end_of(self, request_id: str) -> Finished | Failed:
        ending: Finished | Failed = self.until(
            lambda e: isinstance(e, (Finished, Failed)) and e.request_id == request_id
        )
        return ending

    def answer_to(self, tag: str) -> Any:
        return self.until(lambda e: getattr(e, "tag", "") == tag)


@contextmanager
def process(
    main: Callable[..., None], *arguments: object, **options: Any
) -> Iterator[tuple[EngineProcess, Events]]:
    events = Events()
    engine = EngineProcess(main, arguments, emit=events.emit, **{"backoff_s": 0.01, **options})
    try:
        yield engine, events
    finally:
        engine.close(10)
        assert engine.state == "closed"


def submit(
    request_id: str, prompt: tuple[int, ...] = PROMPT, n: int = 12, sequence: str | None = None
) -> Submit:
    return Submit(request_id, sequence or request_id, "n", prompt, 0, SamplingParams(max_new_tokens=n))


def eventually(what: Callable[[], bool], timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def first_token(events: Events, request_id: str) -> Token:
    token: Token = events.until(lambda e: isinstance(e, Token) and e.request_id == request_id)
    return token


def test_commands_posted_before_it_is_ready_are_held_and_tokens_flow() -> None:
    with process(fake, 0.0, 0.3) as (engine, events):
        for i in range(4):
            engine.post(submit(f"r{i}", PROMPT[i:]))
        states = [engine.state]
        info = engine.ready(30)
        assert (info.model, info.vocab_size, info.tiers) == ("fake", VOCAB, engine_children.TIERS)
        assert info.pid != os.getpid()
        states.append(engine.state)
        assert states == ["starting", "ready"]
        for i in range(4):
            end = events.end_of(f"r{i}")
            assert isinstance(end, Finished)
            assert list(end.output) == expected_answer(list(PROMPT[i:]), 12, VOCAB)
            tokens = [e.token_id for e in events.seen if isinstance(e, Token) and e.request_id == f"r{i}"]
            assert tokens == list(end.output)
        engine.post(Keep("r1", "n", True, "keep"))
        assert events.answer_to("keep").error is None
        engine.post(GetStats("stats"))
        assert isinstance(events.answer_to("stats"), Stats)
    assert is_gone(info.pid)


def test_a_killed_engine_fails_what_was_under_way_and_is_started_again() -> None:
    states: list[str] = []
    with process(fake, 0.05, on_state=states.append) as (engine, events):
        first = engine.ready(30)
        engine.post(submit("r", n=300))
        first_token(events, "r")
        engine.post(GetStats("stats"))
        os.kill(first.pid, signal.SIGKILL)
        end = events.end_of("r")
        assert isinstance(end, Failed)
        assert end.code == EngineRestarted.code
        assert "(signal 9)" in end.message and "ask again" in end.message
        assert isinstance(events.answer_to("stats"), (Lost, Stats))
        engine.post(submit("again", n=3))  # held until the new one is ready
        end = events.end_of("again")
        assert isinstance(end, Finished)
        assert list(end.output) == expected_answer(list(PROMPT), 3, VOCAB)
        second = engine.ready(30)
        assert second.pid != first.pid
        assert engine.restarts == 1
        assert engine.last_error is not None and "SIGKILL" in engine.last_error
        assert states == ["ready", "restarting", "ready"]


def test_a_child_started_again_is_told_what_the_first_one_found() -> None:
    with process(fake) as (engine, _):
        first = engine.ready(30)
        engine.restart_with(0.0, 0.0, 1.0, False, "bfloat16")
        os.kill(first.pid, signal.SIGKILL)
        eventually(lambda: engine.restarts == 1 and engine.state == "ready")
        assert (first.dtype, engine.ready(30).dtype) == ("float32", "bfloat16")


def test_an_ask_in_flight_when_the_engine_dies_is_answered() -> None:
    with process(fake, 2.0) as (engine, events):
        pid = engine.ready(30).pid
        engine.post(submit("r"))
        time.sleep(0.3)  # a step of two seconds is under way: nothing is answered before its end
        engine.post(GetStats("stats"))
        engine.post(Keep("r", "n", True, "keep"))
        time.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        for tag in ("stats", "keep"):
            lost = events.answer_to(tag)
            assert isinstance(lost, Lost)
            assert lost.code == EngineRestarted.code and "signal 9" in lost.message


@pytest.mark.parametrize("error", [ModelUnavailable("no weights here"), ConfigError("the tier is too small")])
def test_an_error_of_the_users_at_start_is_raised_as_it_is_and_not_tried_again(error: PensieveError) -> None:
    with process(raising, error) as (engine, events):
        engine.post(submit("r"))
        with pytest.raises(type(error), match=error.message):
            engine.ready(30)
        assert engine.state == "failed"
        assert engine.restarts == 0
        end = events.end_of("r")
        assert isinstance(end, Failed) and (end.code, end.message) == (error.code, error.message)


def test_starts_that_fail_for_ever_are_given_up_and_everything_fails_at_once(tmp_path: Path) -> None:
    with process(raising, RuntimeError("the moon is wrong")) as (engine, events):
        engine.post(submit("held"))
        with pytest.raises(
            PensieveError, match=f"{MAX_START_FAILURES} times in a row: RuntimeError: the moon is wrong"
        ):
            engine.ready(60)
        assert engine.state == "failed"
        assert engine.restarts == MAX_START_FAILURES - 1
        engine.post(submit("late"))
        engine.post(GetStats("stats"))
        for request_id in ("held", "late"):
            end = events.end_of(request_id)
            assert isinstance(end, Failed)
            assert end.code == EngineClosed.code and "the moon is wrong" in end.message
        assert isinstance(events.answer_to("stats"), Lost)


def test_a_start_that_dies_without_a_word_is_tried_again_and_its_last_words_are_kept(tmp_path: Path) -> None:
    with process(dying, tmp_path / "tally", 2) as (engine, events):
        engine.post(submit("r", n=3))
        engine.ready(60)
        assert engine.restarts == 2
        assert engine.last_error is not None
        assert "exit code 3" in engine.last_error and "no more" in engine.last_error
        assert isinstance(events.end_of("r"), Finished)


def test_commands_wait_for_a_restart_only_so_long(tmp_path: Path) -> None:
    with process(fake, 0.0, hold_s=0.2, backoff_s=20.0) as (engine, events):
        pid = engine.ready(30).pid
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: engine.state == "restarting")
        engine.post(submit("r"))
        engine.post(GetStats("stats"))
        end = events.end_of("r")
        assert isinstance(end, Failed)
        assert end.code == EngineRestarted.code and "within 0.2 s" in end.message
        assert isinstance(events.answer_to("stats"), Lost)
        with pytest.raises(EngineNotReady):
            engine.ready(0.01)


def test_without_restart_a_death_is_the_end() -> None:
    with process(fake, restart=False) as (engine, events):
        os.kill(engine.ready(30).pid, signal.SIGKILL)
        eventually(lambda: engine.state == "failed")
        engine.post(submit("r"))
        assert isinstance(events.end_of("r"), Failed)


def test_a_start_without_progress_is_killed_and_its_error_says_so() -> None:
    with (
        process(silent, start_timeout_s=1.0, restart=False) as (engine, _),
        pytest.raises(EngineNotReady, match="no progress for 1 s"),
    ):
        engine.ready(30)


def test_close_ends_the_child_and_answers_every_request() -> None:
    with process(fake, 0.02) as (engine, events):
        info = engine.ready(30)
        engine.post(submit("r", n=300))
        first_token(events, "r")
        engine.close(20)
        end = events.end_of("r")
        assert isinstance(end, Failed) and end.code == EngineClosed.code
        assert is_gone(info.pid)
        engine.post(submit("late"))
        assert isinstance(events.end_of("late"), Failed)
        with pytest.raises(EngineClosed):
            engine.ready(1)
    assert engine.restarts == 0


def test_close_kills_a_child_that_does_not_end_in_time() -> None:
    with process(fake, 30.0) as (engine, events):
        info = engine.ready(30)
        engine.post(submit("r"))
        time.sleep(0.2)
        engine.close(0.3)
        assert is_gone(info.pid)
        end = events.end_of("r")
        assert isinstance(end, Failed) and end.code == EngineClosed.code


@pytest.mark.parametrize("main", [silent, fake])
def test_close_while_it_starts_waits_for_nothing(main: Callable[..., None]) -> None:
    with process(main) as (engine, events):
        engine.post(submit("r"))
        engine.close(60)
        end = events.end_of("r")
        assert isinstance(end, Failed) and end.code == EngineClosed.code


def test_a_child_that_speaks_nonsense_is_replaced_and_half_a_message_blocks_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with process(raving, 0, restart=False) as (engine, _), pytest.raises(PensieveError, match="nonsense"):
        engine.ready(30)
    monkeypatch.setattr("pensieve.engine.process._LEAVE_S", 0.1)
    with process(raving, 1000) as (engine, _):
        eventually(lambda: engine._process is not None)
        time.sleep(1.0)
        engine.close(0.1)


def test_an_exit_that_another_thread_was_told_of_first_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def late(child: object) -> int | None:
        asked.append(1)
        return None if len(asked) < 4 else 3

    class Ended:
        exitcode = property(late)

    child = ChildProcess.__new__(ChildProcess)
    child.process = Ended()  # type: ignore[assignment]
    assert child._exit_code() == 3
    monkeypatch.setattr("pensieve.engine.child_process.REAPED_WITHIN_S", 0.0)
    asked.clear()
    assert child._exit_code() == -signal.SIGKILL


def test_a_supervisor_that_trips_over_a_bug_answers_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def trip(child: object, leave_s: float) -> int:
        raise AssertionError("planted")

    with process(fake, 0.02) as (engine, events):
        pid = engine.ready(30).pid
        engine.post(submit("r", n=500))
        first_token(events, "r")
        monkeypatch.setattr(ChildProcess, "end", trip)
        os.kill(pid, signal.SIGKILL)
        end = events.end_of("r")
        assert isinstance(end, Failed) and "planted" in end.message
        engine.post(submit("late"))
        assert isinstance(events.end_of("late"), Failed)
        assert engine.state == "failed"


def test_signals_to_the_whole_group_leave_the_engine_to_its_parent() -> None:
    with process(fake, 0.02) as (engine, events):
        pid = engine.ready(30).pid
        engine.post(submit("r", n=20))
        first_token(events, "r")
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
        end = events.end_of("r")
        assert isinstance(end, Finished) and end.reason is FinishReason.LENGTH
        assert engine.restarts == 0


def test_a_bug_in_the_step_loop_is_cured_by_a_new_process() -> None:
    with process(fake) as (engine, events):
        engine.ready(30)
        engine.post(submit("bug", (BUG,)))
        end = events.end_of("bug")
        assert isinstance(end, Failed) and end.code == EngineRestarted.code
        engine.post(submit("next", n=3))
        assert isinstance(events.end_of("next"), Finished)
        assert engine.last_error is not None and "planted" in engine.last_error


def test_a_step_loop_that_hangs_shows() -> None:
    with process(fake, 1.0, 0.0, 0.02) as (engine, events):
        engine.ready(30)
        engine.post(submit("r", n=1))
        eventually(lambda: engine.stalled_s > 0.3)
        assert isinstance(events.end_of("r"), Finished)
        eventually(lambda: engine.stalled_s == 0.0)


def test_a_process_that_stands_still_shows() -> None:
    with process(fake) as (engine, _):
        pid = engine.ready(30).pid
        os.kill(pid, signal.SIGSTOP)
        eventually(lambda: engine.stalled_s > 2.5)
        os.kill(pid, signal.SIGCONT)
        eventually(lambda: engine.stalled_s == 0.0)


def test_a_slow_reader_gets_everything_in_order() -> None:
    seen: list[Event] = []
    done = threading.Event()

    def slow(batch: list[Event]) -> None:
        time.sleep(0.02)
        seen.extend(batch)
        if any(isinstance(event, Finished) for event in batch):
            done.set()

    engine = EngineProcess(fake, emit=slow)
    try:
        engine.post(submit("r", n=60))
        assert done.wait(30)
        assert [e.token_id for e in seen if isinstance(e, Token)] == expected_answer(list(PROMPT), 60, VOCAB)
    finally:
        engine.close(10)


def test_an_emit_that_raises_stops_nothing() -> None:
    events = Events()

    def emit(batch: list[Event]) -> None:
        events.emit(batch)
        raise RuntimeError("planted")

    engine = EngineProcess(fake, emit=emit)
    try:
        engine.post(submit("r"))
        assert isinstance(events.end_of("r"), Finished)
    finally:
        engine.close(10)


ORPHANING = """
import sys, time
from engine_children import fake
from pensieve.core.request import SamplingParams
from pensieve.engine.process import EngineProcess
from pensieve.engine.messages import Submit
if __name__ == "__main__":
    process = EngineProcess(fake, (30.0, 0.0, 1.0, sys.argv[1] == "untied"), emit=lambda events: None)
    pid = process.ready(30).pid
    process.post(Submit("r", "r", "n", (1, 2, 3), 0, SamplingParams(max_new_tokens=5)))
    time.sleep(0.3)  # in the middle of a step of half a minute
    print(pid, flush=True)
    {then}
"""


def run_parent(tmp_path: Path, then: str, *arguments: str) -> tuple[subprocess.Popen[str], int]:
    script = tmp_path / "parent.py"
    script.write_text(ORPHANING.format(then=then))
    parent = subprocess.Popen(
        [sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


@pytest.mark.parametrize("tie", ["tied", "untied"])
def test_a_child_whose_parent_is_killed_is_gone_soon(tmp_path: Path, tie: str) -> None:
    parent, pid = run_parent(tmp_path, "time.sleep(60)", tie)
    with parent:
        assert not is_gone(pid)
        parent.kill()
        parent.wait(10)
        eventually(lambda: is_gone(pid), timeout=2.0)


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="elsewhere a child finds out when it has loaded its model"
)
def test_a_child_that_does_not_listen_yet_dies_with_its_parent_too(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import time\nfrom engine_children import silent\nfrom pensieve.engine.process import EngineProcess\n"
        "if __name__ == '__main__':\n    process = EngineProcess(silent, emit=print)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], env=ENVIRONMENT) as parent:
        settled: list[psutil.Process] = []

        def is_settled() -> bool:
            settled[:] = [
                child
                for child in psutil.Process(parent.pid).children()
                if "spawn_main" in " ".join(child.cmdline())
            ]
            return bool(settled) and is_silent(settled[0].pid)

        eventually(is_settled)
        parent.kill()
        parent.wait(10)
        eventually(lambda: is_gone(settled[0].pid), timeout=2.0)


def is_silent(pid: int) -> bool:
    """Whether it got as far as to ignore Ctrl-C."""
    ignored = next(
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn")
    )
    return bool(int(ignored.split()[1], 16) & (1 << (signal.SIGTERM - 1)))


def test_a_parent_that_just_ends_takes_its_child_along(tmp_path: Path) -> None:
    parent, pid = run_parent(tmp_path, "sys.exit(5)", "tied")
    with parent:
        assert parent.wait(20) == 5
        assert is_gone(pid)


def test_the_front_end_imports_no_torch_and_the_engines_process_no_text() -> None:
    front = (
        "import sys; import pensieve.engine.process, pensieve.service, pensieve.store.sqlite, pensieve.text, pensieve.runtime.apart\n"
        "from pensieve.engine.process import EngineProcess\n"
        "from engine_children import raising\n"
        "if __name__ == '__main__':\n"
        "    EngineProcess(raising, (ValueError(),), emit=print, restart=False).close()\n"
        "    assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    child = (
        "import sys; import pensieve.runtime.engine_main, pensieve.worker.worker, pensieve.worker.model\n"
        "assert not [name for name in sys.modules if name.startswith(('pensieve.text', 'pensieve.service', 'pensieve.store'))]"
    )
    for code in (front, child):
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=ENVIRONMENT,
        )
        assert result.returncode == 0, result.stderr


def test_a_conversation_goes_on_after_its_engine_died() -> None:
    from text_tokenizers import CHATML, chat

    service = ConversationService(chat(CHATML), None, max_context=engine_children.MAX_CONTEXT)
    engine = EngineProcess(fake, (0.02,), emit=service.handle, backoff_s=0.01)
    service.connect(engine.post)
    try:
        started = threading.Event()
        turn = service.send(
            "c",
            [Message("user", "hello")],
            SamplingParams(max_new_tokens=200),
            on_text=lambda piece: started.set(),
        )
        assert started.wait(30)
        os.kill(engine.ready().pid, signal.SIGKILL)
        with pytest.raises(EngineRestarted):
            turn.future.result(30)
        done = service.send(
            "c", [Message("user", "hello again")], SamplingParams(max_new_tokens=5)
        ).future.result(30)
        assert list(done.output) == expected_answer(list(done.prompt), len(done.output), VOCAB)
    finally:
        engine.close(10)
        service.close()


@pytest.mark.model
def test_the_real_model_gives_the_same_tokens_as_in_this_process() -> None:
    from pensieve.runtime.apart import start_apart
    from pensieve.runtime.loading import load_model
    from pensieve.runtime.local import start
    from pensieve.runtime.options import Options

    options = Options(gpu_cache_gb=0.2, cpu_cache_gb=0.1, max_context=512)
    turns = ["Name three rivers.", "And three mountains?"]

    def talk(service: ConversationService) -> list[tuple[int, ...]]:
        sampling = SamplingParams(max_new_tokens=8)
        return [
            service.send("c", [Message("user", turn)], sampling, ignore_eos=True).future.result(120).output
            for turn in turns
        ]

    apart = start_apart(options, store=None)
    try:
        assert apart.info.weights == "real" and apart.text is not None
        there = talk(apart.service)
    finally:
        apart.close()
    here = start(options, load_model(options, must_talk=True, say=lambda text: None), store=None)
    try:
        assert there == talk(here.service)
        assert apart.info.max_context == here.sizes.max_context and apart.info.tiers == here.sizes.tiers
    finally:
        here.close()
