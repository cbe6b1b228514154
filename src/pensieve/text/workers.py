"""Runs text jobs in worker processes, so that no job delays another for long.

Knows queues, times and tenants; never text.

There are two kinds of lanes, each a thread with a worker process. Short jobs have lanes of their own and
never wait for a long one. A job that turns out to be long in a short lane is ended after `SHORT_S` and run
again as a long one. Jobs of one kind are taken from the tenants in turn.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pensieve.errors import (
    EngineClosed,
    Overloaded,
    PensieveError,
    PromptTooCostly,
    TextUnavailable,
    error_from,
)
from pensieve.text.jobs import TextJob
from pensieve.text.nursery import Nursery, NurseryLost, Worker, WorkerLimits
from pensieve.text.worker_process import HARD_ALARM, Reply, receive_frame, send_frame

log = logging.getLogger(__name__)

T = TypeVar("T")
Kind = Literal["short", "long"]

SHORT_CHARS = 1 << 15  # a job of at most so many characters begins as a short one
SHORT_S = 0.25  # seconds of processor time in a short lane
SHORT_WALL_S = 20.0  # a worker that does not reply for so long is stopped, or its machine is
LONG_WALL_FACTOR = (
    12.0  # the same for long jobs, as a multiple of their processor time: they come last on a busy machine
)
NICENESS = 5  # of long jobs: the engine comes first
MAX_WAITING = 4096  # jobs
MAX_WAITING_CHARS = 1 << 26  # of all waiting jobs
BASE_MEMORY_BYTES, MEMORY_A_CHAR = 160 << 20, 128  # tokenizing takes about 100 bytes a character
MAX_MEMORY_BYTES = 2 << 30
PAUSES_S = (0.5, 2.0, 10.0, 30.0)  # seconds between attempts to restart the nursery


def lanes_for(num_cpus: int | None) -> tuple[Kind, ...]:
    """The lanes of a machine with so many processors."""
    num_short = 1 if num_cpus is None or num_cpus < 4 else 2
    num_long = 1 if num_cpus is None or num_cpus < 16 else 2
    short: tuple[Kind, ...] = ("short",)
    long: tuple[Kind, ...] = ("long",)
    return short * num_short + long * num_long


def memory_for(max_chars: int) -> int:
    """Bytes that a job may take if prompts have at most so many characters."""
    return min(MAX_MEMORY_BYTES, BASE_MEMORY_BYTES + MEMORY_A_CHAR * max_chars)


@dataclass(eq=False)
class _Task:
    """A job that waits or runs."""

    job: TextJob[Any]
    tenant: str
    future: Future[Any]
    kind: Kind
    chars: int
    lost: bool = False  # its worker was killed from outside: the job is run once more
    lane: _Lane | None = field(default=None, repr=False)  # the lane that runs it; None while it waits


class TextWorkers:
    """A `TextRunner` over processes.

    Args:
        start_nursery: starts a loaded nursery. Called now, and again when the nursery is lost.
        job_s: processor time that a job may take.
        memory_bytes: memory that a job may take; see `memory_for`.
        lanes: one worker each; at least one of each kind. None takes those that suit the machine.

    Raises:
        PensieveError: what `start_nursery` raises; ModelRefused if no worker can be made.
    """

    def __init__(
        self,
        start_nursery: Callable[[], Nursery],
        *,
        job_s: float,
        memory_bytes: int,
        lanes: tuple[Kind, ...] | None = None,
    ) -> None:
        self._start_nursery = start_nursery
        self._job_s, self._memory_bytes = job_s, memory_bytes
        self._nursery: Nursery | None = start_nursery()
        self._nursery_lock = threading.Lock()
        self._changed = threading.Condition()
        self._waiting: dict[Kind, OrderedDict[str, deque[_Task]]] = {
            "short": OrderedDict(),
            "long": OrderedDict(),
        }  # by tenant
        self._num_waiting = self._waiting_chars = 0
        self._closed = threading.Event()
        self.trouble: str | None = None  # why no worker can be made now; None if they can
        self._lanes = [_Lane(self, kind) for kind in lanes or lanes_for(os.cpu_count())]
        for lane in self._lanes:
            lane.thread.start()

    def submit(self, job: TextJob[T], tenant: str = "") -> Future[T]:
        """Queue a job; see `TextRunner`. The future may also fail with these:

        Raises:
            Overloaded: too many jobs wait already.
            PromptTooCostly: the job took more time or memory than it may.
            TextUnavailable: no worker can be made.
        """
        future: Future[T] = Future()
        chars = job.num_chars
        task = _Task(job, tenant, future, "short" if chars <= SHORT_CHARS else "long", chars)
        with self._changed:
            if self._closed.is_set():
                future.set_exception(EngineClosed("the server is shutting down"))
            elif self._num_waiting >= MAX_WAITING or (
                self._num_waiting and self._waiting_chars + chars > MAX_WAITING_CHARS
            ):
                future.set_exception(
                    Overloaded(
                        f"{self._num_waiting} prompts of {self._waiting_chars} characters wait to be made: "
                        "try again later"
                    )
                )
            else:
                self._put(task)
        ours = weakref.ref(task)  # a future keeps its callbacks, and would keep the job

        def cancelled(done: Future[T]) -> None:
            if done.cancelled() and (left := ours()) is not None:
                self._end(left)

        future.add_done_callback(cancelled)
        return future

    def close(self) -> None:
        """End all workers. Jobs that are not done fail with `EngineClosed`."""
        with self._changed:
            self._closed.set()
            waiting = [task for queue in self._waiting.values() for tasks in queue.values() for task in tasks]
            for queue in self._waiting.values():
                queue.clear()
            self._changed.notify_all()
        for task in waiting:
            _fail(task.future, EngineClosed("the server is shutting down"))
        for lane in self._lanes:
            lane.interrupt()
        for lane in self._lanes:
            lane.thread.join()
        with self._nursery_lock:
            if self._nursery is not None:
                self._nursery.close()

    # -- the queues, under the lock

    def _put(self, task: _Task) -> None:
        self._waiting[task.kind].setdefault(task.tenant, deque()).append(task)
        self._num_waiting += 1
        self._waiting_chars += task.chars
        self._changed.notify_all()

    def take(self, kind: Kind, lane: _Lane) -> _Task | None:
        """Wait for the next task of a lane, from the tenant whose turn it is; None at the end."""
        queue = self._waiting[kind]
        with self._changed:
            while not queue and not self._closed.is_set():
                self._changed.wait()
            if self._closed.is_set():
                return None
            tenant, tasks = next(iter(queue.items()))
            task = tasks.popleft()
            del queue[tenant]
            if tasks:
                queue[tenant] = tasks  # behind the other tenants
            self._num_waiting -= 1
            self._waiting_chars -= task.chars
            task.lane = lane
            return task

    def again(self, task: _Task, kind: Kind) -> None:
        """Queue a task again."""
        with self._changed:
            task.lane, task.kind = None, kind
            if self._closed.is_set():
                _fail(task.future, EngineClosed("the server is shutting down"))
            elif not task.future.cancelled():
                self._put(task)

    def _end(self, task: _Task) -> None:
        """Take a cancelled task from its queue, or end the worker that runs it."""
        with self._changed:
            queue = self._waiting[task.kind]
            tasks = queue.get(task.tenant)
            if tasks is not None and task in tasks:
                tasks.remove(task)
                if not tasks:
                    del queue[task.tenant]
                self._num_waiting -= 1
                self._waiting_chars -= task.chars
            elif task.lane is not None:
                task.lane.interrupt(task)

    def release(self, task: _Task) -> None:
        """Forget a task that a lane is done with."""
        with self._changed:
            task.lane = None

    # -- workers

    def limit_s(self, kind: Kind) -> float:
        """Processor time of a job in a lane of this kind."""
        return min(SHORT_S, self._job_s) if kind == "short" else self._job_s

    def is_long(self, limit_s: float) -> bool:
        """Whether a job with this limit had all the time that a job may have."""
        return limit_s >= self._job_s

    def make(self, kind: Kind) -> Worker:
        """Make a fresh worker.

        Raises:
            PensieveError: none can be made now.
        """
        limits = WorkerLimits(self._memory_bytes, NICENESS if kind == "long" else 0)
        with self._nursery_lock:
            for attempt in range(2):
                if self._closed.is_set():
                    raise EngineClosed("the server is shutting down")
                if self._nursery is None:
                    self._nursery = self._start_nursery()
                try:
                    worker = self._nursery.make(limits)
                except NurseryLost:
                    log.warning("the process that text workers come from ended: it is started again")
                    self._nursery.close()
                    self._nursery = None
                    if attempt:
                        raise TextUnavailable(
                            "the processes that make prompts end as soon as they are started: try again later"
                        ) from None
                else:
                    self.trouble = None
                    return worker
        raise AssertionError

    def end(self, worker: Worker) -> int | None:
        """Make sure that a worker has ended; its exit code, None if that is unknown."""
        with self._nursery_lock:
            return worker.end()

    def wait(self, seconds: float) -> bool:
        """Wait for some seconds; True if the runner closes meanwhile."""
        return self._closed.wait(seconds)

    def too_costly(self, what: str) -> PensieveError:
        """The error of a job that took too much time."""
        return PromptTooCostly(
            f"making the prompt was stopped: {what} took more than {self._job_s:g} s of processor time "
            "(--prompt-timeout). Send less; "
            "if short messages fail as well, the model's chat template or tokenizer is at fault"
        )

    def too_large(self) -> PensieveError:
        """The error of a job that took too much memory."""
        return PromptTooCostly(
            f"making the prompt was stopped: it took more than {self._memory_bytes >> 20} MiB of memory. "
            "Send less; if short messages fail "
            "as well, the model's chat template or tokenizer is at fault"
        )


class _Lane:
    """One thread, one worker, one job at a time."""

    def __init__(self, pool: TextWorkers, kind: Kind) -> None:
        self._pool, self._kind = pool, kind
        self._worker: Worker | None = None
        self._lock = threading.Lock()  # between this thread and those that interrupt it
        self._task: _Task | None = None
        self._failures = 0
        self.thread = threading.Thread(target=self._run, name=f"pensieve-text-{kind}", daemon=True)

    def interrupt(self, task: _Task | None = None) -> None:
        """Close the worker's connection if it runs this task; None closes it whatever it runs."""
        with self._lock:
            if self._worker is not None and (task is None or task is self._task):
                try:
                    self._worker.connection.shutdown(2)
                except OSError:
                    return  # the worker was faster

    def _run(self) -> None:
        self._ensure_worker()
        while (task := self._pool.take(self._kind, self)) is not None:
            try:
                self._do(task)
            except Exception as error:
                log.exception("a text job could not be handled")
                self._replace()
                _fail(
                    task.future, PensieveError(f"the text could not be read: {type(error).__name__}: {error}")
                )
            finally:
                self._pool.release(task)
                del task
        if self._worker is not None:
            self._pool.end(self._worker)

    def _ensure_worker(self) -> PensieveError | None:
        """Make sure that there is a worker.

        Returns:
            Why there is none, after a pause that grows; None if there is one.
        """
        if self._worker is not None:
            return None
        try:
            worker = self._pool.make(self._kind)
        except Exception as error:
            reason = (
                error
                if isinstance(error, PensieveError)
                else TextUnavailable(f"{type(error).__name__}: {error}")
            )
            log.warning("no text worker can be started: %s", reason.message)
            self._pool.trouble = f"the processes that make prompts cannot be started: {reason.message}"
            self._pool.wait(PAUSES_S[min(self._failures, len(PAUSES_S) - 1)])
            self._failures += 1
            return reason
        self._failures = 0
        with self._lock:
            self._worker = worker
        return None

    def _do(self, task: _Task) -> None:
        pool = self._pool
        if (reason := self._ensure_worker()) is not None:
            _fail(task.future, TextUnavailable(f"no prompt can be made now: {reason.message}"))
            return
        if task.future.cancelled():
            return
        limit_s = pool.limit_s(self._kind)
        wall_s = SHORT_WALL_S if self._kind == "short" else LONG_WALL_FACTOR * limit_s
        assert self._worker is not None
        connection = self._worker.connection
        data = pickle.dumps((limit_s, task.job), pickle.HIGHEST_PROTOCOL)
        with self._lock:
            self._task = task
        try:
            connection.settimeout(wall_s)
            send_frame(connection, data)
            reply: Reply | None = pickle.loads(receive_frame(connection))
            stopped = False
        except (EOFError, OSError) as error:
            reply, stopped = None, isinstance(error, TimeoutError)
        with self._lock:
            self._task = None
        if reply is None:
            self._lost(task, stopped, limit_s)
            return
        if reply.leaves:
            self._replace()
        self._answer(task, reply, limit_s)

    def _answer(self, task: _Task, reply: Reply, limit_s: float) -> None:
        if reply.kind == "done":
            _succeed(task.future, reply.value)
        elif reply.kind == "error":
            _fail(task.future, error_from(*reply.value))
        elif reply.kind == "memory":
            _fail(task.future, self._pool.too_large())
        elif reply.kind == "slow":
            self._slow(task, reply.value, limit_s)
        else:
            log.error("a text job failed:\n%s", reply.value)
            _fail(task.future, PensieveError("the text could not be read: the server's log says why"))

    def _slow(self, task: _Task, what: str, limit_s: float) -> None:
        if self._kind == "short" and not self._pool.is_long(limit_s):
            self._pool.again(task, "long")
        else:
            _fail(task.future, self._pool.too_costly(what))

    def _lost(self, task: _Task, stopped: bool, limit_s: float) -> None:
        """Handle a worker that ended during a task, or does not reply."""
        code = self._replace()
        if task.future.cancelled():
            return
        if self._pool.wait(0):
            _fail(task.future, EngineClosed("the server is shutting down"))
        elif stopped or (HARD_ALARM is not None and code == -HARD_ALARM):
            self._slow(task, "the tokenizer", limit_s)
        elif code == -signal.SIGABRT:  # libraries that get no memory end so
            _fail(task.future, self._pool.too_large())
        elif not task.lost:
            task.lost = True
            self._pool.again(task, self._kind)
        else:
            _fail(
                task.future,
                TextUnavailable(
                    f"the process that made the prompt ended twice (exit code {code}): try again later"
                ),
            )

    def _replace(self) -> int | None:
        """End the worker and make another one; returns the old one's exit code."""
        with self._lock:
            worker, self._worker = self._worker, None
        code = None if worker is None else self._pool.end(worker)
        if not self._pool.wait(0):
            self._ensure_worker()
        return code


def _succeed(future: Future[Any], value: object) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(value)


def _fail(future: Future[Any], error: PensieveError) -> None:
    if not future.done() and future.set_running_or_notify_cancel():
        future.set_exception(error)
