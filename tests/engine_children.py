"""What tests run in an engine's process: the real scheduler over the fake worker, and mains that misbehave."""

from __future__ import annotations

import ctypes
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pensieve.engine_child
from fake_worker import FakeWorker
from pensieve.config import CacheConfig, SchedulerConfig, TierConfig
from pensieve.core.cache import TieredCache
from pensieve.core.cost import CostProfile
from pensieve.core.eviction import RetentionValue
from pensieve.core.plan import StepPlan, StepResult
from pensieve.core.scheduler import Scheduler
from pensieve.engine import Engine
from pensieve.engine_child import Emit, EngineInfo, Say, ServedEngine, serve_engine

CHUNK, VOCAB, MAX_CONTEXT = 8, 400, 400
TIERS = (TierConfig("gpu", 64), TierConfig("cpu", 64))
BUG = 7  # a prompt of this token and nothing else trips the step loop itself


class SlowWorker(FakeWorker):
    """Takes its time over each step."""

    def __init__(self, step_s: float) -> None:
        super().__init__([tier.num_slots for tier in TIERS], CHUNK, vocab=VOCAB)
        self.step_s = step_s

    def run(self, plan: StepPlan) -> StepResult:
        if plan.spans:
            time.sleep(self.step_s)
            if plan.spans[0].token_ids == (BUG,):
                raise SystemExit("a bug of the loop's own")  # (an Exception would be caught as a worker's failure)
        return super().run(plan)


class BuggyEngine(Engine):
    """Its loop ends on a bug when it meets `BUG`."""

    def _begin(self, plan: StepPlan) -> None:
        try:
            super()._begin(plan)
        except SystemExit as error:
            raise AssertionError("planted") from error


def fake(
    connection: Connection, step_s: float = 0.0, start_s: float = 0.0, beat_s: float = 1.0, untied: bool = False, dtype: str = "float32"
) -> None:
    """An engine over the fake worker. `untied`: as where the system does not tie children to parents."""
    if untied:
        ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
    pensieve.engine_child.BEAT_S = beat_s

    def build(emit: Emit, say: Say) -> tuple[ServedEngine, EngineInfo]:
        say("thinking of a number")
        time.sleep(start_s)
        cost = CostProfile([(8, 1.0), (512, 3.0)], CHUNK)
        cache = TieredCache(CacheConfig(TIERS, CHUNK), lambda: RetentionValue(cost.of_chunk))
        scheduler = Scheduler(SchedulerConfig(max_batch_tokens=128), cache, MAX_CONTEXT)
        engine = BuggyEngine(scheduler, SlowWorker(step_s), chunk_bytes=1000, emit=emit, debug=True)
        engine.start()
        info = EngineInfo(
            os.getpid(),
            "fake",
            "random",
            0,
            dtype,
            "cpu",
            VOCAB,
            MAX_CONTEXT,
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


def silent(connection: Connection) -> None:
    """Starts for ever."""
    time.sleep(600)


def raving(connection: Connection, num_bytes: int) -> None:
    """Says what nobody understands; more than a message's worth, it says half of it and stops."""
    if num_bytes:
        os.write(connection.fileno(), num_bytes.to_bytes(4, "big") + b"x")
        time.sleep(600)
    connection.send_bytes(b"nonsense")
    time.sleep(600)
