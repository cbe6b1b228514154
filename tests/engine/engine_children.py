"""What tests run in an engine's process: the real scheduler over the fake worker, and mains that misbehave."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pensieve.engine.child
from fake_worker import FakeWorker
from pensieve.config import CacheConfig, SchedulerConfig, TierConfig
from pensieve.core.cache import TieredCache
from pensieve.core.cost import CostProfile
from pensieve.core.eviction import RetentionValue
from pensieve.core.plan import StepPlan, StepResult
from pensieve.core.scheduler import Scheduler
from pensieve.engine.child import Emit, Say, ServedEngine, serve_engine
from pensieve.engine.engine import Engine
from pensieve.engine.messages import Event
from pensieve.engine.wire import EngineInfo

CHUNK, VOCAB, MAX_CONTEXT = 8, 400, 400
TIERS = (TierConfig("gpu", 64), TierConfig("cpu", 64))
BUG = 7  # a prompt of this token and nothing else trips the step loop itself
POISON = 8  # a forward that computes this token fails


class SlowWorker(FakeWorker):
    """Takes its time over each step."""

    def __init__(self, step_s: float) -> None:
        super().__init__(
            [tier.num_slots for tier in TIERS], CHUNK, vocab=VOCAB, poison=lambda token: token == POISON
        )
        self.step_s = step_s

    def run(self, plan: StepPlan) -> StepResult:
        if plan.spans:
            time.sleep(self.step_s)
            if plan.spans[0].token_ids == (BUG,):
                raise SystemExit(
                    "a bug of the loop's own"
                )  # (an Exception would be caught as a worker's failure)
        return super().run(plan)


class BuggyEngine(Engine):
    """Its loop ends on a bug when it meets `BUG`."""

    def _begin(self, plan: StepPlan) -> None:
        try:
            super()._begin(plan)
        except SystemExit as error:
            raise AssertionError("planted") from error


class SpinningEngine(Engine):
    """Its loop answers and turns as fast as it can, but once there is a request it makes no step."""

    def step(self) -> bool:
        events: list[Event] = []
        self._drain_inbox(events)
        if events:
            self._emit(events)
        return True


def fake(
    connection: Connection,
    step_s: float = 0.0,
    start_s: float = 0.0,
    beat_s: float = 1.0,
    untied: bool = False,
    dtype: str = "float32",
    kind: type[Engine] = BuggyEngine,
    max_failed_steps: int | None = None,
    max_context: int = MAX_CONTEXT,
) -> None:
    """An engine over the fake worker. `untied`: as where the system does not tie children to parents."""
    if untied:
        ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
    pensieve.engine.child.BEAT_S = beat_s

    def build(emit: Emit, say: Say) -> tuple[ServedEngine, EngineInfo]:
        say("thinking of a number")
        time.sleep(start_s)
        cost = CostProfile([(8, 1.0), (512, 3.0)], CHUNK)
        cache = TieredCache(CacheConfig(TIERS, CHUNK), lambda: RetentionValue(cost.of_chunk))
        scheduler = Scheduler(SchedulerConfig(max_batch_tokens=128), cache, max_context)
        engine = kind(
            scheduler,
            SlowWorker(step_s),
            chunk_bytes=1000,
            emit=emit,
            debug=True,
            max_failed_steps=max_failed_steps,
        )
        engine.start()
        info = EngineInfo(
            os.getpid(),
            "fake",
            "random",
            0,
            dtype,
            "cpu",
            VOCAB,
            max_context,
            CHUNK,
            1000,
            TIERS,
            "made up",
            "none",
            "none",
            load_s=0.0,
        )
        return engine, info

    serve_engine(connection, build)


def raising(connection: Connection, error: Exception) -> None:
    """A start that fails."""
    raise error


def dying(connection: Connection, tally: Path, survives: int) -> None:
    """Dies without a word at its first starts; the one after `survives` of them lives."""
    with tally.open("a") as file:
        file.write(".")
    if len(tally.read_text()) <= survives:
        os.write(2, b"no more\n")
        os._exit(3)
    fake(connection)


def fragile(connection: Connection, failing: Path, error: Exception, max_context: Path) -> None:
    """Starts fail with `error` as long as the file `failing` is there; the context is what `max_context` says, if it is there."""
    if failing.exists():
        failing.write_text(failing.read_text() + ".")
        raise error
    fake(connection, 0.02, max_context=int(max_context.read_text()) if max_context.exists() else MAX_CONTEXT)


def half_said(connection: Connection, step_s: float) -> None:
    """Is ready, then says half a message and stands still."""
    threading.Thread(target=_half_say, args=(connection,), daemon=True).start()
    fake(connection, step_s)


def _half_say(connection: Connection) -> None:
    time.sleep(1.0)
    os.write(connection.fileno(), (1000).to_bytes(4, "big") + b"x")
    os.kill(os.getpid(), signal.SIGSTOP)


def silent(connection: Connection) -> None:
    """Starts for ever."""
    time.sleep(600)


def raving(connection: Connection, num_bytes: int) -> None:
    """Sends bytes that are no message; with `num_bytes`, half a message of that length."""
    if num_bytes:
        os.write(connection.fileno(), num_bytes.to_bytes(4, "big") + b"x")
        time.sleep(600)
    connection.send_bytes(b"nonsense")
    time.sleep(600)
