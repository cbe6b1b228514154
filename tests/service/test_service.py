"""Turns of conversations over a real engine, a real store and a worker whose answers can be computed from
token ids alone.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any, Literal

import pytest
from text_tokenizers import CHATML, THINKING, chat

from fake_worker import FakeWorker, expected_answer
from pensieve.config import CacheConfig, SchedulerConfig, TierConfig
from pensieve.core.cache import TieredCache
from pensieve.core.cost import CostProfile
from pensieve.core.eviction import RetentionValue
from pensieve.core.request import FinishReason, SamplingParams
from pensieve.core.scheduler import Scheduler
from pensieve.engine.engine import Engine
from pensieve.engine.messages import KeepAnswer, Stats
from pensieve.errors import (
    ContextLengthExceeded,
    ConversationConflict,
    ConversationNotFound,
    EngineClosed,
    InvalidRequest,
    PensieveError,
    PromptTooCostly,
)
from pensieve.service import ConversationService, Path, PendingTurn, Piece, TurnDone, TurnSpec, prompt
from pensieve.service.answer_parser import AnswerForm
from pensieve.store import path_messages, path_tokens
from pensieve.store.sqlite import SqliteStore
from pensieve.text import (
    ChatText,
    ContentDelta,
    EncodeRest,
    InlineRunner,
    Message,
    TextJob,
    TextRunner,
    WriteChat,
)

CHUNK = 8
VOCAB = 400  # below the special tokens of the test tokenizer
COST = CostProfile([(8, 1.0), (512, 3.0)], CHUNK)


@contextmanager
def running(
    store: SqliteStore | None,
    text: ChatText | None = None,
    *,
    slots: tuple[int, int] = (64, 64),
    max_context: int = 400,
    overflow: Literal["refuse", "truncate"] = "refuse",
    pause_s: float = 0.0,
    runner: TextRunner | None = None,
) -> Iterator[ConversationService]:
    cache = TieredCache(
        CacheConfig((TierConfig("gpu", slots[0]), TierConfig("cpu", slots[1])), CHUNK),
        lambda: RetentionValue(COST.of_chunk),
    )
    service = ConversationService(
        text or chat(CHATML), store, max_context=max_context, overflow=overflow, runner=runner
    )
    worker = FakeWorker(list(slots), CHUNK, vocab=VOCAB)
    worker.pause_s = pause_s
    engine = Engine(
        Scheduler(SchedulerConfig(max_batch_tokens=128), cache, max_context),
        worker,
        chunk_bytes=1000,
        emit=service.handle,
        debug=True,
    )
    service.connect(engine.post)
    engine.start()
    try:
        yield service
    finally:
        engine.close()
        service.close()


@pytest.fixture
def store() -> Iterator[SqliteStore]:
    store = SqliteStore(":memory:")
    yield store
    store.close()


def ask(
    service: ConversationService, text: str, conversation: str = "c", n: int = 12, **options: Any
) -> TurnDone:
    return service.send(
        conversation, [Message("user", text)], SamplingParams(max_new_tokens=n), **options
    ).future.result(20)


def test_a_second_turn_finds_the_first_in_the_cache(store: SqliteStore) -> None:
    with running(store) as service:
        first = ask(service, "hello there")
        second = ask(service, "and again")
    assert first.receipt.new_tokens == first.receipt.prompt_tokens == len(first.prompt)
    assert second.prompt[: len(first.prompt) + len(first.output)] == first.prompt + first.output
    known = len(first.prompt) + len(first.output) - 1  # the last sampled token has no KV yet
    assert second.receipt.gpu_tokens == known
    assert second.receipt.recomputed_tokens == 1
    for turn in (first, second):
        assert list(turn.output) == expected_answer(list(turn.prompt), len(turn.output), VOCAB)
        r = turn.receipt
        assert r.gpu_tokens + r.cpu_tokens + r.recomputed_tokens + r.new_tokens == r.prompt_tokens


def test_what_is_acknowledged_is_stored_and_goes_on_after_a_restart(tmp_path: FilePath) -> None:
    store = SqliteStore(tmp_path / "c.db")
    with running(store) as service:
        first = ask(service, "hello there")
    store.close()
    store = SqliteStore(tmp_path / "c.db")
    turns = store.path("default", store.get("default", "c").leaf)
    assert [(m.role, m.content) for m in path_messages(turns)] == [
        ("user", "hello there"),
        ("assistant", first.text),
    ]
    assert tuple(path_tokens(turns)) == first.prompt + first.output
    with running(store) as service:  # a new engine: everything is recomputed from raw tokens
        second = ask(service, "and again")
    assert second.prompt[: len(first.prompt) + len(first.output)] == first.prompt + first.output
    assert second.receipt.recomputed_tokens == len(first.prompt) + len(first.output)
    assert second.receipt.gpu_tokens == second.receipt.cpu_tokens == 0
    assert list(second.output) == expected_answer(list(second.prompt), len(second.output), VOCAB)
    store.close()


def test_two_turns_of_one_conversation_queue(store: SqliteStore) -> None:
    with running(store) as service:
        turns = [
            service.send("c", [Message("user", f"turn {i}")], SamplingParams(max_new_tokens=5))
            for i in range(6)
        ]
        done = [turn.future.result(20) for turn in turns]
    for before, after in itertools.pairwise(done):
        assert after.prompt[: len(before.prompt) + len(before.output)] == before.prompt + before.output


def test_many_conversations_under_pressure_all_answer_right(store: SqliteStore) -> None:
    with running(store, slots=(34, 20)) as service:
        turns = [
            service.send(
                f"c{i % 7}",
                [Message("user", f"message {i} of some length")],
                SamplingParams(max_new_tokens=9),
            )
            for i in range(28)
        ]
        done = [turn.future.result(60) for turn in turns]
        stats = service.engine.stats().result(20)
    assert isinstance(stats, Stats)
    assert stats.running == stats.waiting == 0
    assert stats.recomputed_tokens > 0
    for turn in done:
        assert list(turn.output) == expected_answer(list(turn.prompt), len(turn.output), VOCAB)


def test_text_streams_and_sums_to_the_answer(store: SqliteStore) -> None:
    pieces: list[str] = []
    with running(store) as service:
        done = ask(service, "stream please", n=40, on_text=pieces.append)
    assert "".join(pieces) == done.text
    assert len(pieces) > 3


def test_a_stop_string_ends_the_answer_and_the_log_goes_on_from_what_was_kept(store: SqliteStore) -> None:
    with running(store) as service:
        free = ask(service, "hello there", "free", n=40)
        middle = len(free.text) // 2
        stop = free.text[middle : middle + 4]
        cut = ask(service, "hello there", "cut", n=40, stop=[stop])
        assert cut.reason is FinishReason.STOP
        assert cut.text == free.text[: free.text.index(stop)]
        following = ask(service, "go on", "cut")
    assert following.prompt[: len(cut.prompt) + len(cut.output)] == cut.prompt + cut.output
    assert list(following.output) == expected_answer(list(following.prompt), len(following.output), VOCAB)


def test_a_stop_string_does_not_end_an_answer_before_its_least_length(store: SqliteStore) -> None:
    with running(store) as service:
        free = ask(service, "hello there", "free", n=40)
        stop = free.text[:2]
        sampling = SamplingParams(max_new_tokens=40, min_new_tokens=40)
        done = service.send("c", [Message("user", "hello there")], sampling, stop=[stop]).future.result(20)
    assert (done.text, len(done.output)) == (free.text, 40)


def test_an_aborted_turn_keeps_what_was_said(store: SqliteStore) -> None:
    begun = threading.Event()
    with running(store, pause_s=0.005) as service:
        turn = service.send(
            "c",
            [Message("user", "talk for long")],
            SamplingParams(max_new_tokens=300),
            on_text=lambda piece: begun.set(),
        )
        assert begun.wait(20)
        service.abort(turn)
        done = turn.future.result(20)
        assert done.reason is FinishReason.ABORT
        assert 0 < len(done.output) < 300
        following = ask(service, "go on")
    assert following.prompt[: len(done.prompt) + len(done.output)] == done.prompt + done.output


def test_a_prompt_past_the_context_is_refused_and_the_conversation_is_unharmed(store: SqliteStore) -> None:
    with running(store, max_context=60) as service:
        first = ask(service, "hi", n=4)
        with pytest.raises(ContextLengthExceeded, match=r"tokens, but at most 59 fit in the context of 60"):
            ask(service, "word " * 60)
        second = ask(service, "hi", n=4)
    assert second.prompt[: len(first.prompt) + len(first.output)] == first.prompt + first.output


def test_overflow_truncate_keeps_the_system_prompt_and_says_what_it_cost(store: SqliteStore) -> None:
    with running(store, max_context=160, overflow="truncate") as service:
        service.send(
            "c", [Message("system", "be brief"), Message("user", "hello")], SamplingParams(max_new_tokens=8)
        ).future.result(20)
        done = [ask(service, f"turn number {i}", n=8) for i in range(12)]
    cut = [turn for turn in done if turn.receipt.truncated_tokens]
    assert cut
    assert len(cut) < len(done) // 2, "after a cut the next turns append again"
    first = cut[0]
    assert first.warning is not None and "left out" in first.warning
    assert len(first.prompt) < 160
    assert chat(CHATML).decode_all(first.prompt).startswith("<|im_start|>system\nbe brief")
    assert first.receipt.recomputed_tokens > 0
    assert first.receipt.new_tokens > 0, "the newest message was never computed before"
    for turn in done:
        assert list(turn.output) == expected_answer(list(turn.prompt), len(turn.output), VOCAB)


def test_a_template_that_rewrites_earlier_turns_reuses_the_common_prefix_and_warns(
    store: SqliteStore,
) -> None:
    text = chat(THINKING)
    with running(store, text) as service:
        history = (Message("user", "why is it so"), Message("assistant", "<think>\nhmm\n</think>\n\nbecause"))
        tokens = tuple(text.first(history, add_generation_prompt=False))
        done = ask(service, "and then", forced=Path(history, tokens))
    assert done.warning is not None
    assert "think" not in text.decode_all(done.prompt)
    assert done.turn_id is None, "a replay stores nothing"


def test_a_keep_is_answered_and_a_delete_frees_everything(store: SqliteStore) -> None:
    with running(store) as service:
        ask(service, "hello there, keep me")
        kept = service.engine.keep("c", True).result(20)
        assert isinstance(kept, KeepAnswer)
        assert kept.error is None
        refused = service.engine.keep("unknown", True).result(20)
        assert isinstance(refused, KeepAnswer) and refused.error is not None
        service.delete("c").result(20)
        stats = service.engine.stats().result(20)
        assert isinstance(stats, Stats) and [tier.used for tier in stats.tiers] == [0, 0]
        with pytest.raises(PensieveError):
            store.get("default", "c")


def test_closing_fails_what_is_under_way() -> None:
    with running(None) as service:
        turn = service.send("c", [Message("user", "talk")], SamplingParams(max_new_tokens=350))
    with pytest.raises(EngineClosed):
        turn.future.result(1)


def test_token_ids_alone_need_no_text(store: SqliteStore) -> None:
    with running(store) as service:
        done = service.complete("s", [1, 2, 3], 0, SamplingParams(max_new_tokens=4)).future.result(20)
    assert list(done.output) == expected_answer([1, 2, 3], 4, VOCAB)
    assert done.text == ""


def test_a_bad_request_disturbs_no_other(store: SqliteStore) -> None:
    with running(store) as service:
        for bad in ([-1] * 10, [2**32] * 10, ["x"] * 10):
            with pytest.raises(InvalidRequest, match="token ids must be integers"):
                service.complete("bad", bad, 0, SamplingParams()).future.result(20)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="namespace"):
            service.complete("bad", [1, 2], 0, SamplingParams(), namespace="\ud800").future.result(20)
        assert ask(service, "hello").text


def test_a_cancelled_turn_does_not_take_others_along(store: SqliteStore) -> None:
    with running(
        store, pause_s=0.005
    ) as service:  # (so that the turn is under way when it is cancelled, on a busy machine too)
        turns = [
            service.send(f"c{i}", [Message("user", "hello")], SamplingParams(max_new_tokens=30))
            for i in range(4)
        ]
        assert turns[0].future.cancel()
        for turn in turns[1:]:
            assert turn.future.result(20).text


def test_an_engine_that_breaks_fails_open_turns_and_later_ones(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Scheduler, now_s: float) -> None:
        raise RuntimeError("planted")

    with running(store) as service:
        assert ask(service, "hello").text
        monkeypatch.setattr(Scheduler, "schedule", broken)
        for _ in range(2):
            with pytest.raises(EngineClosed, match="planted"):
                ask(service, "again")
        kept = service.engine.keep("c", True).result(20)
        assert isinstance(kept, KeepAnswer) and kept.error is not None


def test_after_closing_everything_is_refused_at_once(store: SqliteStore) -> None:
    with running(store) as service:
        pass
    with pytest.raises(EngineClosed):
        ask(service, "too late")
    for future in (service.engine.stats(), service.engine.keep("c", True), service.delete("c")):
        with pytest.raises(EngineClosed):
            future.result(5)


def test_two_keeps_in_a_row_are_both_answered(store: SqliteStore) -> None:
    with running(store) as service:
        ask(service, "hello")
        answers = [
            service.engine.keep("c", True),
            service.engine.keep("c", True),
            service.engine.keep("c", False),
        ]
        for answer in answers:
            kept = answer.result(20)
            assert isinstance(kept, KeepAnswer) and kept.error is None


def test_a_turn_answered_elsewhere_meanwhile_is_a_conflict_and_nothing_is_lost(tmp_path: FilePath) -> None:
    first, second = SqliteStore(tmp_path / "c.db"), SqliteStore(tmp_path / "c.db")
    with running(first) as a, running(second) as b:
        ask(a, "the beginning")
        sent = {
            text: service.send("c", [Message("user", text)], SamplingParams(max_new_tokens=200))
            for text, service in (("from here", a), ("from there", b))
        }
        acknowledged = []
        for text, turn in sent.items():
            with contextlib.suppress(ConversationConflict):
                turn.future.result(20)
                acknowledged.append(text)
    said = [
        m.content
        for m in path_messages(first.path("default", first.get("default", "c").leaf))
        if m.role == "user"
    ]
    first.close()
    second.close()
    assert acknowledged
    assert said == ["the beginning", *acknowledged], "an acknowledged turn is not in its conversation"


def test_a_turn_behind_a_deleted_conversation_does_not_bring_it_back(store: SqliteStore) -> None:
    with running(store) as service:
        turns = [
            service.send("c", [Message("user", "hello")], SamplingParams(max_new_tokens=200))
            for _ in range(2)
        ]
        service.delete("c").result(20)
        for turn in turns:
            with contextlib.suppress(PensieveError):  # the first may have ended before
                turn.future.result(20)
        with pytest.raises(PensieveError):
            store.get("default", "c")


def test_the_receipt_counts_the_time_spent_behind_an_earlier_turn(store: SqliteStore) -> None:
    with running(store) as service:
        turns = [
            service.send("c", [Message("user", "hello")], SamplingParams(max_new_tokens=100))
            for _ in range(2)
        ]
        first, second = (turn.future.result(20).receipt for turn in turns)
    later_s = turns[1].submitted_s - turns[0].submitted_s
    assert later_s + second.queue_s >= first.total_s  # it was admitted after the first had ended


# -- while a prompt is made


class HeldRunner:
    """Does jobs when it is told to; those that begin with `quick` at once."""

    def __init__(self, text: ChatText) -> None:
        self._inline = InlineRunner(text)
        self.held: list[tuple[TextJob[Any], Future[Any], str]] = []

    def submit(self, job: TextJob[Any], tenant: str = "") -> Future[Any]:
        if isinstance(job, EncodeRest) or job.new[-1].content.startswith("quick"):  # type: ignore[attr-defined]
            return self._inline.submit(job)
        future: Future[Any] = Future()
        self.held.append((job, future, tenant))
        return future

    def until(self, count: int) -> None:
        until(lambda: len(self.held) == count)

    def do(self, at: int = 0, error: PensieveError | None = None) -> None:
        job, future, _ = self.held.pop(at)
        done = self._inline.submit(job)
        if (failure := error or done.exception()) is not None:
            future.set_exception(failure)
        else:
            future.set_result(done.result())


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


@contextmanager
def held(store: SqliteStore) -> Iterator[tuple[ConversationService, HeldRunner]]:
    text = chat(CHATML)
    runner = HeldRunner(text)
    with running(store, text, runner=runner) as service:
        yield service, runner


def send(service: ConversationService, text: str, conversation: str = "c") -> PendingTurn:
    return service.send(conversation, [Message("user", text)], SamplingParams(max_new_tokens=4))


def test_a_prompt_that_is_being_made_holds_up_its_own_conversation_alone(store: SqliteStore) -> None:
    with held(store) as (service, runner):
        slow = [send(service, "one"), send(service, "two")]
        runner.until(1)
        assert ask(service, "quick", "other").text
        runner.do()
        first = slow[0].future.result(20)
        runner.until(1)
        runner.do()
        second = slow[1].future.result(20)
        assert second.prompt[: len(first.prompt) + len(first.output)] == first.prompt + first.output
    said = [
        m.content
        for m in path_messages(store.path("default", store.get("default", "c").leaf))
        if m.role == "user"
    ]
    assert said == ["one", "two"]


def test_a_turn_is_aborted_while_its_prompt_is_made_and_the_next_one_begins(store: SqliteStore) -> None:
    with held(store) as (service, runner):
        slow, following = send(service, "one"), send(service, "quick two")
        runner.until(1)
        service.abort(slow)
        with pytest.raises(EngineClosed, match="aborted while its prompt was being made"):
            slow.future.result(20)
        assert runner.held[0][1].cancelled(), "it is still being made"
        assert following.future.result(20).text
    said = [
        m.content
        for m in path_messages(store.path("default", store.get("default", "c").leaf))
        if m.role == "user"
    ]
    assert said == ["quick two"]


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("erase", [False, True])
def test_a_conversation_is_deleted_while_a_prompt_is_made_in_it(
    store: SqliteStore, begun: bool, erase: bool
) -> None:
    with held(store) as (service, runner):
        if begun:
            ask(service, "quick")
        turns = [send(service, "one"), send(service, "two")]
        runner.until(1)
        (service.erase("c") if erase else service.delete("c")).result(20)
        for turn in turns:
            with pytest.raises(ConversationNotFound, match="was deleted"):
                turn.future.result(20)
        assert runner.held[0][1].cancelled()
        with pytest.raises(ConversationNotFound):
            store.get("default", "c")
        assert ask(service, "quick").text, "the name is free again"


def test_a_prompt_that_cannot_be_made_fails_its_turn_alone(store: SqliteStore) -> None:
    with held(store) as (service, runner):
        slow, following = send(service, "one"), send(service, "quick two")
        runner.until(1)
        runner.do(error=PromptTooCostly("too long"))
        with pytest.raises(PromptTooCostly):
            slow.future.result(20)
        assert following.future.result(20).text


def test_closing_fails_a_turn_whose_prompt_is_being_made(store: SqliteStore) -> None:
    with held(store) as (service, runner):
        slow = send(service, "one")
        runner.until(1)
    with pytest.raises(EngineClosed):
        slow.future.result(1)


def test_a_turn_that_its_caller_cancelled_leaves_its_conversation(store: SqliteStore) -> None:
    with held(store) as (service, runner):
        slow = send(service, "one")
        runner.until(1)
        assert slow.future.cancel()
        runner.do()
        assert ask(service, "quick").text


def test_what_waits_of_a_tenant_is_its_own(store: SqliteStore) -> None:
    with held(store) as (service, runner):
        service.send("c", [Message("user", "one")], SamplingParams(), namespace="alice")
        runner.until(1)
        assert runner.held[0][2] == "alice"


def test_a_resent_history_whose_prompt_is_being_made_is_forked_not_joined(store: SqliteStore) -> None:
    """Its conversation is busy from the first moment on."""
    history = (Message("user", "quick"),)
    with held(store) as (service, runner):
        first = service.start(
            TurnSpec("default", None, history, SamplingParams(max_new_tokens=4))
        ).future.result(20)
        assert first.message is not None
        resent = (*history, first.message, Message("user", "slow"))
        turns = [
            service.start(TurnSpec("default", None, resent, SamplingParams(max_new_tokens=4)))
            for _ in range(2)
        ]
        runner.until(2)
        runner.do()
        runner.do()
        for turn in turns:
            assert turn.future.result(20).prompt[: len(first.prompt)] == first.prompt
        assert turns[0].conversation_id != turns[1].conversation_id


# -- lengths


def test_a_prompt_of_more_characters_than_the_context_holds_is_refused_without_a_look(
    store: SqliteStore,
) -> None:
    text = chat(CHATML)
    with held(store) as (service, runner):
        for messages in (
            [Message("user", " " * 15_000_000)],
            [Message("system", "\n" * 100_000), Message("user", "hi")],
        ):
            with pytest.raises(ContextLengthExceeded, match="400 tokens of the context hold at most 65536"):
                service.send("c", messages, SamplingParams()).future.result(20)
        tools = ({"type": "function", "function": {"name": "f", "description": "word " * 20_000}},)
        spec = TurnSpec("default", "c", (Message("user", "hi"),), SamplingParams(), form=AnswerForm(tools))
        with pytest.raises(ContextLengthExceeded, match="messages and tools"):
            service.start(spec).future.result(20)
        assert runner.held == [] and text.most_chars(400) == 65_536


def test_a_long_history_is_cut_before_it_is_sent_anywhere(store: SqliteStore) -> None:
    history = tuple(Message(("user", "assistant")[i % 2], f"{i} " + "word " * 200) for i in range(401))
    with held(store) as (service, runner):
        turn = service.start(
            TurnSpec("default", "c", history, SamplingParams(max_new_tokens=4), overflow="truncate")
        )
        runner.until(1)
        job = runner.held[0][0]
        assert isinstance(job, WriteChat)
        assert (
            sum(len(message.content) for message in job.new) <= 65_536 and job.left_out + len(job.new) == 401
        )
        runner.do()
        with pytest.raises(ContextLengthExceeded):  # the newest message alone has more than the context
            turn.future.result(20)
        short = (*history[:-1], Message("user", "hi"))
        turn = service.start(
            TurnSpec("default", "d", short, SamplingParams(max_new_tokens=4), overflow="truncate")
        )
        runner.until(1)
        runner.do()
        done = turn.future.result(20)
    assert done.warning is not None and "oldest 400 messages" in done.warning
    assert done.receipt.truncated_tokens > 10_000


def test_a_conversation_has_a_longest_length(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "MAX_STORED_CHARS", 100)
    for _ in range(2):  # the second time it is read from the store
        with running(store) as service:
            with contextlib.suppress(InvalidRequest):
                for _ in range(20):
                    ask(service, "a message of thirty characters")
            with pytest.raises(InvalidRequest, match="fork it at an earlier turn"):
                ask(service, "again")
    assert len(store.path("default", store.get("default", "c").leaf)) < 6


def test_remembered_paths_are_bounded_by_their_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "MAX_REMEMBERED_CHARS", 100)
    prompts = prompt.Prompts(None, lambda conversation_id: None, 400, "refuse")
    for i in range(10):
        prompts.remember("n", f"t{i}", Path((Message("user", "x" * 40),), (1, 2)))
    assert list(prompts._paths) == [("n", "t8"), ("n", "t9")]
    prompts.forget("n")
    assert prompts._num_remembered_chars == prompts._num_remembered_tokens == 0


def test_readers_see_the_pieces_of_the_turn_and_the_store_gets_the_parser_s_message(
    store: SqliteStore,
) -> None:
    pieces: list[Piece] = []
    with running(store, chat(CHATML)) as service:
        spec = TurnSpec(
            "default", "c", (Message("user", "hi"),), SamplingParams(max_new_tokens=12), form=AnswerForm()
        )
        turn = service.start(spec, pieces.append)
        done = turn.future.result(20)
    assert len(pieces) == len(turn.pieces) and all(a is b for a, b in zip(pieces, turn.pieces, strict=True))
    content = "".join(e.text for piece in pieces for e in piece.events if isinstance(e, ContentDelta))
    assert done.message == Message("assistant", content) and content == done.text
    turns = store.path("default", store.get("default", "c").leaf)
    assert turns[-1].messages[-1] == done.message
