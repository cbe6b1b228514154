"""The engine's commands and what answers them, stepped by hand over a fake worker."""

from __future__ import annotations

import pickle
import threading
from typing import Any, TypeVar

import pytest

from fake_worker import FakeWorker
from pensieve.config import CacheConfig, SchedulerConfig, TierConfig
from pensieve.core import overview
from pensieve.core.cache import TieredCache
from pensieve.core.cost import CostProfile, ResumeQuote
from pensieve.core.eviction import RetentionValue
from pensieve.core.plan import StepPlan, StepResult
from pensieve.core.receipt import Miss
from pensieve.core.request import SamplingParams
from pensieve.core.scheduler import Scheduler
from pensieve.engine.engine import Engine
from pensieve.engine.messages import (
    CacheMap,
    Check,
    Checked,
    Command,
    Event,
    Failed,
    Finished,
    Forget,
    Forgotten,
    GetMap,
    GetRows,
    GetStats,
    HintAnswer,
    Idle,
    Stats,
    Submit,
    Warm,
    tenant_of,
)
from pensieve.errors import ConversationNotFound

CHUNK, CHUNK_BYTES = 4, 100
COST = CostProfile([(4, 1.0), (64, 2.0)], CHUNK)
E = TypeVar("E")


class Desk:
    """An engine whose loop is turned by hand; everything crosses as bytes, as over a pipe."""

    def __init__(
        self,
        gpu: int = 20,
        cpu: int = 20,
        worker: FakeWorker | None = None,
        *,
        quote: ResumeQuote | None = None,
        **config: float,
    ) -> None:
        tiers = (TierConfig("gpu", gpu), TierConfig("cpu", cpu))
        self.cache = TieredCache(CacheConfig(tiers, CHUNK), lambda: RetentionValue(COST.of_chunk))
        settings = {"max_batch_tokens": 64, "max_running": 8, **config}
        scheduler = Scheduler(SchedulerConfig(**settings), self.cache, max_context=200)  # type: ignore[arg-type]
        self.worker = worker or FakeWorker([gpu, cpu], CHUNK)
        self.now_s = 0.0
        self.events: list[Event] = []
        self.engine = Engine(
            scheduler,
            self.worker,
            chunk_bytes=CHUNK_BYTES,
            emit=self.take,
            clock=lambda: self.now_s,
            debug=True,
            quote=quote,
        )

    def take(self, events: list[Event]) -> None:
        self.events += pickle.loads(pickle.dumps(events))

    def post(self, *commands: Command) -> None:
        for command in commands:
            self.engine.post(pickle.loads(pickle.dumps(command)))

    def step(self) -> bool:
        self.now_s += 1.0
        return self.engine.step()

    def run(self) -> None:
        for _ in range(1000):
            if not self.step():
                return
        raise AssertionError("the engine never rests")

    def turn(
        self, name: str, tokens: list[int], history: int = 0, namespace: str = "n", answer: int = 1
    ) -> Finished:
        self.post(
            Submit(
                f"r-{name}-{self.now_s}",
                name,
                namespace,
                tuple(tokens),
                history,
                SamplingParams(max_new_tokens=answer),
            )
        )
        self.run()
        return self.only(Finished)

    def only(self, kind: type[E]) -> E:
        """The one new event of a kind; forgets all."""
        found = [event for event in self.events if isinstance(event, kind)]
        assert len(found) == 1, self.events
        self.events.clear()
        return found[0]

    def ask(self, command: Command, kind: type[E]) -> E:
        self.post(command)
        self.run()
        return self.only(kind)


def test_a_receipt_says_what_was_missing_and_why() -> None:
    desk = Desk()
    first = desk.turn("a", list(range(10)))
    assert first.receipt.misses == (Miss(0, 10, "new"),)
    log = [*range(10), *first.output]
    second = desk.turn("a", [*log, 3, 4], history=len(log))
    assert second.receipt.misses == (Miss(10, 11, "unfinished"), Miss(11, 13, "new"))


def test_forgetting_with_a_tag_is_answered_and_without_is_not() -> None:
    desk = Desk()
    desk.turn("a", list(range(10)))
    assert desk.ask(Forget("a", "n", tag="t"), Forgotten) == Forgotten("t", 3, 300)
    assert desk.ask(Forget("a", "n", tag="t"), Forgotten) == Forgotten("t", 0, 0)
    desk.turn("b", list(range(10)))
    desk.post(Forget("b", "n"))
    desk.run()
    assert desk.events == []
    assert desk.cache.places.pools[0].num_used == 0


def test_an_erasure_is_answered_when_the_bytes_are_zero() -> None:
    desk = Desk(copy_ahead_share=0.9)
    desk.turn("a", list(range(10)))
    desk.run()
    assert any(cell for slot in desk.worker.tiers[1] for cell in slot)
    used = sum(pool.num_used for pool in desk.cache.places.pools)
    answer = desk.ask(Forget("a", "n", erase=True, tag="t"), Forgotten)
    assert answer == Forgotten("t", used, used * CHUNK_BYTES)
    assert not any(cell for tier in desk.worker.tiers for slot in tier for cell in slot)


def test_an_erasure_of_a_running_conversation_ends_its_turn_first() -> None:
    desk = Desk()
    desk.post(Submit("r", "a", "n", tuple(range(10)), 0, SamplingParams(max_new_tokens=50)))
    desk.post(Submit("other", "b", "n", (1, 2, 3), 0, SamplingParams(max_new_tokens=20)))
    desk.step()
    desk.step()
    desk.post(Forget("a", "n", erase=True, tag="t"))
    desk.run()
    order = [type(event).__name__ for event in desk.events if isinstance(event, Finished | Forgotten)]
    assert order == ["Finished", "Forgotten", "Finished"]


def test_a_worker_that_skips_its_wipes_is_seen() -> None:
    """The planted bug: what the erasure test looks for is there."""

    class Forgetful(FakeWorker):
        def wipe(self, tier: int, slot: int) -> None:
            pass

    desk = Desk(worker=Forgetful([20, 20], CHUNK))
    desk.turn("a", list(range(10)))
    desk.ask(Forget("a", "n", erase=True, tag="t"), Forgotten)
    assert any(cell for tier in desk.worker.tiers for slot in tier for cell in slot)


def test_an_engine_that_cannot_wipe_says_so_to_all_and_stops() -> None:
    class Broken(FakeWorker):
        def wipe(self, tier: int, slot: int) -> None:
            raise MemoryError("broken")

    desk = Desk(worker=Broken([20, 20], CHUNK))
    desk.turn("a", list(range(10)))
    desk.post(Forget("a", "n", erase=True, tag="t"))
    told = threading.Event()

    def take(events: list[Any]) -> None:
        desk.take(events)
        if any(isinstance(event, Forgotten) for event in events):
            told.set()

    desk.engine._emit = take
    desk.engine.start()
    assert told.wait(20)
    desk.post(Warm("a", "n", "w"), Check("c"), GetMap("m"), Idle("a", "n", "i"), Forget("a", "n", True, "f"))
    desk.engine.close()
    failed = [event for event in desk.events if isinstance(event, Forgotten)]
    assert (
        failed[0].error is not None
        and "could not be zeroed 3 times in a row: MemoryError: broken" in failed[0].error
    )


def test_hints_are_answered() -> None:
    desk = Desk(6, 20, copy_ahead_share=0.9)
    desk.turn("a", list(range(20)))
    desk.turn("b", list(range(100, 120)))
    below = desk.cache.find("n", "a").chunks  # type: ignore[union-attr]
    num_below = sum(chunk is not None and chunk.slots[0] is None for chunk in below)
    assert num_below > 0
    assert desk.ask(Idle("b", "n", "i"), HintAnswer) == HintAnswer("i", 5)
    assert desk.ask(Warm("a", "n", "w"), HintAnswer) == HintAnswer("w", num_below)
    assert all(chunk is None or chunk.slots[0] is not None for chunk in below)
    refused = desk.ask(Warm("unknown", "n", "x"), HintAnswer)
    assert refused.code == ConversationNotFound.code
    assert refused.error is not None and "nothing is cached for conversation 'unknown'" in refused.error
    assert desk.ask(Idle("a", "other", "y"), HintAnswer).error is not None


def test_a_map_is_answered_while_idle_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(60, 0, quote=ResumeQuote(COST, CHUNK_BYTES, 1000.0))
    for number in range(5):
        desk.turn(f"c{number}", [number, 1, 2, 3, 4], namespace=f"t{number % 2}\x1fsalt")
    monkeypatch.setattr(overview, "MAX_ROWS", 2)
    desk.post(GetMap("m", limit=10))
    steps = 0
    while not desk.events:
        assert desk.step(), "the engine would go to sleep on a map half built"
        steps += 1
    assert steps == 3
    answer = desk.only(CacheMap)
    assert [row.sequence_id for row in answer.rows] == ["c4", "c3", "c2", "c1", "c0"]
    assert (answer.tag, answer.total, answer.chunk_tokens, answer.tiers[0].used) == ("m", 5, 4, 10)
    assert answer.rows[0].cells == "gg" and answer.rows[0].resume_s == 0.0 and answer.rows[0].tokens == 5
    page = desk.ask(GetMap("m", 1, 1, tenant="t0"), CacheMap)
    assert ([row.sequence_id for row in page.rows], page.total) == (["c2"], 3)
    assert tenant_of(page.rows[0].namespace) == "t0"
    assert desk.ask(GetMap("m", 9, 5), CacheMap).rows == ()
    rows = desk.ask(GetRows("r", (("t1\x1fsalt", "c3"), ("t1", "c3"), ("t0\x1fsalt", "c0"))), CacheMap)
    assert [row.sequence_id for row in rows.rows] == ["c3", "c0"]


def test_maps_do_not_hold_up_a_running_request(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(60, 0)
    for number in range(6):
        desk.turn(f"c{number}", [number, 1, 2])
    monkeypatch.setattr(overview, "MAX_ROWS", 1)
    desk.post(
        Submit("r", "x", "n", (1, 2, 3), 0, SamplingParams(max_new_tokens=5)), GetMap("one"), GetMap("two")
    )
    desk.run()
    kinds = [type(event).__name__ for event in desk.events]
    assert kinds.index("Finished") < kinds.index("CacheMap")
    assert [event.tag for event in desk.events if isinstance(event, CacheMap)] == ["one", "two"]


def test_a_check_finds_what_is_broken() -> None:
    desk = Desk()
    desk.post(Submit("r", "a", "n", tuple(range(10)), 0, SamplingParams(max_new_tokens=9)))
    desk.step()
    desk.post(Check("c"))
    desk.step()
    assert desk.only(Checked) == Checked("c", None, 3, (3, 0))
    desk.run()
    desk.events.clear()
    desk.cache.places.num_chunks += 1
    desk.engine._debug = False
    checked = desk.ask(Check("c"), Checked)
    assert checked.error is not None and "chunks counted" in checked.error and checked.leases == 0


def test_stats_tell_evictions_and_keeps() -> None:
    desk = Desk(6, 8, copy_ahead_share=0.5)
    for number in range(4):
        desk.turn(f"c{number}", [number + i for i in range(20)])
    stats = desk.ask(GetStats("s"), Stats)
    evictions = dict(stats.evictions)
    assert set(evictions) == {"copied_down", "reclaimed", "dropped", "failed"}
    assert (
        evictions["copied_down"] > 0
        and evictions["reclaimed"] == stats.chunks_reclaimed
        and evictions["dropped"] > 0
    )
    assert (stats.kept_chunks, stats.keep_limit) == (0, 4)


def test_a_worker_that_raises_does_not_count_as_having_wiped() -> None:
    class Raises(FakeWorker):
        broken = False

        def run(self, plan: StepPlan) -> StepResult:
            if self.broken:
                self.broken = False
                raise RuntimeError("lost the device")
            return super().run(plan)

    worker = Raises([20, 20], CHUNK)
    desk = Desk(worker=worker)
    desk.turn("a", list(range(10)))
    worker.broken = True
    desk.post(Forget("a", "n", erase=True, tag="t"))
    desk.step()
    assert desk.events == []
    desk.run()
    desk.only(Forgotten)
    assert not any(cell for tier in worker.tiers for slot in tier for cell in slot)


def test_a_command_that_trips_over_a_bug_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk()

    def broken(*_: object, **__: object) -> None:
        raise ValueError("a bug")

    for name in ("submit", "warm", "forget"):
        monkeypatch.setattr(desk.engine._scheduler, name, broken)
    desk.post(
        Submit("r", "a", "n", (1,), 0, SamplingParams()), Warm("a", "n", "w"), Forget("a", "n", tag="f")
    )
    desk.step()
    assert [type(event) for event in desk.events] == [Failed, HintAnswer, Forgotten]
    assert all("a bug" in str(event) for event in desk.events)
