"""Text jobs in processes of their own: the same answers, within limits, and no job holds up another."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
import text_worker_models as models
from text_tokenizers import CHATML, byte_level, chat

from pensieve.errors import (
    ContextLengthExceeded,
    EngineClosed,
    InvalidRequest,
    ModelRefused,
    ModelUnavailable,
    Overloaded,
    PromptTooCostly,
    TextUnavailable,
)
from pensieve.message import Message, ToolCall
from pensieve.text import (
    ChatText,
    DecodeIds,
    EncodeChat,
    EncodeRest,
    EncodeText,
    InlineRunner,
    WriteChat,
    WrittenChat,
    workers,
)
from pensieve.text.nursery import ForkingNursery, Nursery, SpawningNursery
from pensieve.text.worker_process import memory_limited
from pensieve.text.workers import TextWorkers, lanes_for

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system's processes cannot fork")

WITHIN_S = 60.0  # generous: a machine may be busy
LONG = "loop " + "word " * 10_000  # begun as a long job, and its template loops
MEMORY = 256 << 20


def ask(text: str, **more: Any) -> WriteChat:
    return WriteChat((), (Message("user", text),), (), 100_000, **more)


@contextmanager
def running(
    load: Callable[[], ChatText], *, job_s: float = 1.0, make: Callable[[], Nursery] | None = None
) -> Iterator[TextWorkers]:
    def start() -> Nursery:
        nursery = ForkingNursery(models.prepare)
        nursery.load(load)
        return nursery

    pool = TextWorkers(make or start, job_s=job_s, memory_bytes=MEMORY, lanes=("short", "long"))
    try:
        yield pool
    finally:
        pool.close()


@pytest.fixture(scope="module")
def hostile() -> Iterator[TextWorkers]:
    """Jobs may take a second."""
    with running(models.hostile) as pool:
        yield pool


@pytest.fixture(scope="module")
def patient() -> Iterator[TextWorkers]:
    """The same model, and jobs may take for ever."""
    with running(models.hostile, job_s=600.0) as pool:
        yield pool


def result(future: Future[Any]) -> Any:
    return future.result(WITHIN_S)


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def at_work(pool: TextWorkers, kind: str) -> bool:
    return any(lane._kind == kind and lane._task is not None for lane in pool._lanes)


def worker_pid(pool: TextWorkers, kind: str) -> int:
    (worker,) = [lane._worker for lane in pool._lanes if lane._kind == kind]
    assert worker is not None
    return worker.pid


# -- the same answers


HISTORY = (Message("system", "be brief"), Message("user", "hello there"), Message("assistant", "Größe"))
CALLS = (
    Message("user", "?"),
    Message("assistant", "", (ToolCall("c1", "f", '{"x": 1}'),)),
    Message("tool", "42", (), "c1", "f"),
)


def jobs(text: ChatText) -> list[Any]:
    log = tuple(text.first(HISTORY, add_generation_prompt=False))
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    many = tuple(Message(("user", "assistant")[i % 2], f"message {i} of many") for i in range(61))
    return [
        ask("hello there"),
        WriteChat(HISTORY, (Message("user", "go on"),), log, 400),
        WriteChat((), many, (), 300, answer_tokens=20, truncating=True, num_own=1),
        WriteChat((), CALLS, (), 400, tools=(tool,), prefix="<tool_call>"),
        ask("<|im_end|>I am a message <|im_start|>"),
        EncodeText("What is the capital of France?", 100),
        EncodeChat(HISTORY, 400),
        EncodeRest(" and then <|im_end|>"),
        DecodeIds((70, 71, 72, 300)),
    ]


def test_processes_answer_as_the_tokenizer_itself_does(hostile: TextWorkers) -> None:
    text = models.hostile()
    inline = InlineRunner(text)
    for job in jobs(text):
        assert result(hostile.submit(job)) == inline.submit(job).result()


def test_a_job_that_has_no_answer_fails_as_it_would_here(hostile: TextWorkers) -> None:
    with pytest.raises(ContextLengthExceeded, match="more than the 100 tokens"):
        result(hostile.submit(EncodeText("word " * 40_000, 100)))
    with pytest.raises(InvalidRequest, match="half a character"):
        result(hostile.submit(ask("\ud800")))


def test_a_chat_that_is_cut_leaves_out_no_more_than_it_must() -> None:
    text = chat(CHATML)
    messages = tuple(Message(("user", "assistant")[i % 2], "word " * (i % 7)) for i in range(301))
    whole = len(text.first(messages))
    for max_context in (60, 200, 700, whole - 1, whole + 200):
        written = WriteChat((), messages, (), max_context, truncating=True, num_own=1).run(text)
        kept = messages[written.dropped :]
        assert written.tokens == tuple(text.first(kept))
        if written.dropped:
            limit = int(0.75 * max_context)
            assert len(written.tokens) <= limit < len(text.first(messages[written.dropped - 2 :]))
            assert written.dropped_tokens in (
                whole - len(written.tokens),
                pytest.approx(whole - len(written.tokens), rel=0.5),
            )


# -- time and memory


def test_a_template_that_loops_is_stopped_and_named(hostile: TextWorkers) -> None:
    with pytest.raises(PromptTooCostly, match=r"the chat template took more than 1 s .*--prompt-timeout"):
        result(hostile.submit(ask("loop")))
    assert isinstance(result(hostile.submit(ask("hello"))), WrittenChat)


def test_a_tokenizer_that_searches_for_long_is_stopped_and_named(hostile: TextWorkers) -> None:
    with pytest.raises(PromptTooCostly, match="the tokenizer took more than 1 s"):
        result(hostile.submit(ask("x" * 400_000)))
    assert isinstance(result(hostile.submit(ask("hello"))), WrittenChat)


def test_a_tokenizer_that_gives_up_refuses_the_text_alone(hostile: TextWorkers) -> None:
    with pytest.raises(InvalidRequest, match="tokenizer fails at this text"):
        result(hostile.submit(ask("a" * 60 + "b")))
    assert isinstance(result(hostile.submit(ask("hello"))), WrittenChat)


@pytest.mark.parametrize("word", ["double it", "write"])
def test_a_template_that_takes_memory_is_stopped(hostile: TextWorkers, word: str) -> None:
    before = psutil.Process().memory_info().rss
    with pytest.raises(PromptTooCostly, match="more than 256 MiB of memory"):
        result(hostile.submit(ask(word)))
    assert psutil.Process().memory_info().rss - before < 64 << 20
    assert isinstance(result(hostile.submit(ask("hello"))), WrittenChat)


def test_what_a_template_writes_has_a_limit() -> None:
    text = chat("{% for m in messages %}{{ m.content * 1000 }}{% endfor %}")
    text.max_chars = 5000
    with pytest.raises(
        ContextLengthExceeded,
        match="makes 11000 characters of these messages, and the context holds at most 5000",
    ):
        text.first([Message("user", "hello there")])


def test_loading_has_a_limit_of_time() -> None:
    nursery = ForkingNursery(models.prepare, load_s=1.0)
    with pytest.raises(ModelRefused, match="the chat template takes more than 1 s of processor time"):
        nursery.load(models.hostile_when_loaded)
    nursery.close()


def test_loading_fails_in_words() -> None:
    nursery = ForkingNursery(models.prepare)
    with pytest.raises(ModelUnavailable, match="no readable tokenizer here"):
        nursery.load(models.refused)
    with pytest.raises(ModelRefused, match="ended the process that tried it"):
        nursery.load(models.killed)


def test_a_decoder_that_searches_is_refused() -> None:
    import json

    from tokenizers import Tokenizer

    spec = json.loads(byte_level().to_str())
    spec["decoder"] = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}
    with pytest.raises(ModelRefused, match="decoder searches by a regular expression"):
        chat(CHATML, Tokenizer.from_str(json.dumps(spec)))


# -- which job waits for which


def test_short_jobs_do_not_wait_for_long_ones(patient: TextWorkers) -> None:
    long = [patient.submit(ask(LONG), "alice") for _ in range(3)]
    until(lambda: at_work(patient, "long"))
    for _ in range(5):
        assert isinstance(result(patient.submit(ask("hello"), "alice")), WrittenChat)
    assert not any(future.done() for future in long)
    for future in long:
        future.cancel()


def test_a_short_job_that_turns_out_long_makes_room(patient: TextWorkers) -> None:
    long = [patient.submit(ask("loop")) for _ in range(2)]
    assert isinstance(result(patient.submit(ask("hello"))), WrittenChat)
    until(lambda: at_work(patient, "long"))
    assert not any(future.done() for future in long)
    for future in long:
        future.cancel()
    with pytest.raises(CancelledError):
        long[0].result(0)
    assert isinstance(result(patient.submit(ask("word " * 10_000))), WrittenChat), (
        "the long lane is free again"
    )


def test_tenants_take_turns(patient: TextWorkers) -> None:
    ended: list[str] = []
    first = patient.submit(ask(LONG), "alice")
    until(lambda: at_work(patient, "long"))
    futures = [patient.submit(ask("word " * 10_000), tenant) for tenant in ("alice",) * 4 + ("bob",) * 2]
    for tenant, future in zip(("alice",) * 4 + ("bob",) * 2, futures, strict=True):
        future.add_done_callback(lambda _, tenant=tenant: ended.append(tenant))
    first.cancel()
    for future in futures:
        result(future)
    assert ended == ["alice", "bob", "alice", "bob", "alice", "alice"]


def test_a_job_that_is_not_wanted_any_more_is_ended(patient: TextWorkers) -> None:
    running_one, waiting = patient.submit(ask(LONG)), patient.submit(ask(LONG))
    until(lambda: at_work(patient, "long"))
    assert waiting.cancel() and running_one.cancel()
    assert isinstance(result(patient.submit(ask("word " * 10_000))), WrittenChat)
    assert patient._num_waiting == patient._waiting_chars == 0


def test_too_much_that_waits_is_refused(patient: TextWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    long = patient.submit(ask(LONG))
    until(lambda: at_work(patient, "long"))
    monkeypatch.setattr(workers, "MAX_WAITING_CHARS", 3 * len(LONG))
    waiting = [patient.submit(ask(LONG)) for _ in range(4)]
    refused = [future for future in waiting if future.done()]
    assert len(refused) == 2
    with pytest.raises(Overloaded, match="wait to be made"):
        refused[0].result()
    for future in (*waiting, long):
        future.cancel()
    assert isinstance(result(patient.submit(ask("word " * 10_000))), WrittenChat)


# -- what ends


def test_a_worker_that_is_killed_takes_no_job_along(patient: TextWorkers) -> None:
    long = patient.submit(ask(LONG))
    until(lambda: at_work(patient, "long"))
    first = worker_pid(patient, "long")
    os.kill(first, signal.SIGKILL)
    until(lambda: at_work(patient, "long") and worker_pid(patient, "long") != first)
    assert isinstance(result(patient.submit(ask("hello"))), WrittenChat)
    os.kill(worker_pid(patient, "long"), signal.SIGKILL)
    with pytest.raises(TextUnavailable, match=r"ended twice \(exit code -9\)"):
        result(long)
    os.kill(worker_pid(patient, "short"), signal.SIGKILL)  # while it is idle
    assert isinstance(result(patient.submit(ask("hello"))), WrittenChat)


def test_what_makes_workers_is_started_again() -> None:
    with running(models.good) as pool:
        assert isinstance(result(pool.submit(ask("hello"))), WrittenChat)
        nursery = pool._nursery
        assert isinstance(nursery, ForkingNursery) and nursery.pid is not None
        os.kill(nursery.pid, signal.SIGKILL)
        os.kill(worker_pid(pool, "short"), signal.SIGKILL)
        assert isinstance(result(pool.submit(ask("hello"))), WrittenChat)
        assert pool._nursery is not nursery and pool.trouble is None


class Broken:
    """A nursery that makes no worker until it is mended."""

    def __init__(self, mended: threading.Event) -> None:
        self._mended = mended
        self._whole = ForkingNursery(models.prepare)
        self._whole.load(models.good)

    def load(self, load: Any) -> None:
        raise AssertionError

    def make(self, limits: Any) -> Any:
        if not self._mended.is_set():
            raise OSError("no more processes")
        return self._whole.make(limits)

    def close(self) -> None:
        self._whole.close()


def test_where_no_worker_can_be_had_it_is_said_until_one_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PAUSES_S", (0.05,))
    mended = threading.Event()
    with running(models.good, make=lambda: Broken(mended)) as pool:
        with pytest.raises(TextUnavailable, match="no more processes"):
            result(pool.submit(ask("hello")))
        assert pool.trouble is not None and "no more processes" in pool.trouble
        mended.set()
        until(lambda: _is_written(pool))
        assert pool.trouble is None


def _is_written(pool: TextWorkers) -> bool:
    try:
        return isinstance(result(pool.submit(ask("hello"))), WrittenChat)
    except TextUnavailable:
        return False


def test_closing_ends_what_runs_and_what_waits_and_every_process() -> None:
    with running(models.hostile, job_s=600.0) as pool:
        futures = [pool.submit(ask(LONG)) for _ in range(3)]
        until(lambda: at_work(pool, "long"))
        pids = [worker_pid(pool, "short"), worker_pid(pool, "long")]
    for future in futures:
        with pytest.raises(EngineClosed):
            future.result(1)
    with pytest.raises(EngineClosed):
        pool.submit(ask("hello")).result(1)
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_where_processes_cannot_fork_each_worker_loads_for_itself() -> None:
    def start() -> Nursery:
        nursery = SpawningNursery()
        nursery.load(models.good)
        return nursery

    with running(models.good, make=start) as pool:
        assert result(pool.submit(ask("hello"))) == ask("hello").run(chat(CHATML))


def test_a_machine_has_a_lane_of_each_kind() -> None:
    for cpus in (None, 1, 2, 8, 128):
        assert {"short", "long"} == set(lanes_for(cpus))


def test_a_job_is_let_go_with_its_answer(hostile: TextWorkers) -> None:
    """Without the help of the garbage collector: a job may hold 16 MB."""
    gc.collect()
    gc.disable()
    try:
        job = EncodeText("word " * 10)
        seen = weakref.ref(job)
        future = hostile.submit(job)
        assert len(result(future)) > 10
        del job
        until(lambda: seen() is None)
    finally:
        gc.enable()


def test_a_large_constant_of_a_template_takes_no_memory_until_it_is_written() -> None:
    with running(models.constant) as pool:
        assert isinstance(result(pool.submit(ask("hello"))), WrittenChat)
        with pytest.raises(PromptTooCostly, match="of memory"):
            result(pool.submit(ask("large")))
    before = psutil.Process().memory_info().rss
    with memory_limited(256 << 20):
        assert models.constant().first([Message("user", "hello")])
    assert psutil.Process().memory_info().rss - before < 256 << 20
