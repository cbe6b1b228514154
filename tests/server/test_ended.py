"""What is kept of answers: bounded by bytes and time, nothing of what was erased, and no prompt at all."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from serving import serving

from pensieve.core.request import SamplingParams
from pensieve.engine.messages import Token
from pensieve.errors import PensieveError
from pensieve.server import open_answers
from pensieve.server.answer import Answer
from pensieve.server.ended import MAX_ENDED, EndedAnswers, bytes_of, bytes_of_piece
from pensieve.service import PendingTurn, Piece, TurnSpec

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"


def ended(
    name: str, num_bytes: int = 0, at_s: float = 0.0, conversation: str = "c", namespace: str = "n"
) -> Answer:
    spec = TurnSpec(namespace, conversation, (), SamplingParams(), turn_id=name)
    turn = PendingTurn(spec, 0.0, conversation_id=conversation)
    return Answer(turn, 0, error=PensieveError("it failed"), ended_s=at_s, num_bytes=num_bytes)


class Loop:
    """A loop whose time is told."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.timers: list[tuple[float, Any]] = []

    def time(self) -> float:
        return self.now_s

    def call_at(self, at_s: float, what: Any) -> None:
        self.timers.append((at_s, what))

    def go_on(self, to_s: float) -> None:
        self.now_s = to_s
        due, self.timers = (
            [what for at_s, what in self.timers if at_s <= to_s],
            [timer for timer in self.timers if timer[0] > to_s],
        )
        for what in due:
            what()


def test_ended_answers_are_bounded_by_bytes_together_the_oldest_going_first() -> None:
    kept = EndedAnswers(Loop(), 600.0, max_bytes=1_000_000)  # type: ignore[arg-type]
    for number in range(20):
        kept.add(ended(str(number), 90_000))
    assert kept.num_bytes <= 1_000_000 and len(kept) == 10
    assert kept.get("9") is None and kept.get("10") is not None and kept.get("19") is not None
    kept.add(ended("huge", 2_000_000))
    assert kept.get("huge") is None and len(kept) == 0 and kept.num_bytes == 0


def test_ended_answers_are_bounded_in_number() -> None:
    kept = EndedAnswers(Loop(), 600.0)  # type: ignore[arg-type]
    for number in range(MAX_ENDED + 3):
        kept.add(ended(str(number)))
    assert len(kept) == MAX_ENDED and kept.get("2") is None and kept.get("3") is not None


def test_ended_answers_go_when_their_time_is_up_also_where_nothing_new_ends() -> None:
    loop = Loop()
    kept = EndedAnswers(loop, 600.0)  # type: ignore[arg-type]
    kept.add(ended("a", at_s=0.0))
    loop.go_on(100.0)
    kept.add(ended("b", at_s=100.0))
    loop.go_on(599.0)
    assert len(kept) == 2
    loop.go_on(600.0)
    assert kept.get("a") is None and kept.get("b") is not None
    loop.go_on(700.0)
    assert len(kept) == 0 and kept.num_bytes == 0 and not loop.timers


def test_what_was_erased_is_forgotten_and_another_tenants_is_not() -> None:
    kept = EndedAnswers(Loop(), 600.0)  # type: ignore[arg-type]
    for name, conversation, namespace in (
        ("a", "c", "n"),
        ("b", "c", "n"),
        ("d", "other", "n"),
        ("e", "c", "m"),
    ):
        kept.add(ended(name, conversation=conversation, namespace=namespace))
    kept.forget("n", "c")
    kept.forget_turn("n", "e")
    assert [kept.get(name) is not None for name in "abde"] == [False, False, True, True]
    kept.forget_turn("m", "e")
    assert kept.get("e") is None


def test_weights_follow_what_is_held() -> None:
    plain = Piece("ab", (Token("r", 1, -0.5, ()),))
    tops = Piece("ab", (Token("r", 1, -0.5, tuple((i, -1.0) for i in range(20))),))
    assert bytes_of_piece(tops) - bytes_of_piece(plain) == 20 * 128
    assert bytes_of({"a": ["x" * 1000] * 10}) >= 10_000
    assert bytes_of([0] * 1_000_000) == bytes_of([[]] * 200_000)  # beyond counting: too much to be kept


def test_an_ended_answer_holds_no_prompt_and_reads_the_same() -> None:
    with serving() as server:
        made = server.post(
            RESPONSES, {"model": "tiny", "input": "word " * 40, "max_output_tokens": 8, "temperature": 0}
        ).json()
        kept = server.context.answers.find("default", made["id"].removeprefix("resp_"))
        assert kept is not None and kept.done is not None
        assert (
            kept.turn.spec.messages == ()
            and kept.done.prompt == ()
            and kept.turn.prompt.tokens == ()
            and kept.turn.sampled == []
        )
        assert kept.turn.conversation_id.startswith("chat_")
        again = server.client.get(f"{RESPONSES}/{made['id']}?stream=true").text
        assert (
            "response.incomplete" in again
            and json.dumps(made["output"][0]["content"][0]["text"], ensure_ascii=False) in again
        )


def test_a_failed_answer_is_told_again_and_again_and_holds_no_frames() -> None:
    with serving(config={"request_timeout_s": 0.3}) as server:
        server.worker.pause_s = 0.05
        made = server.post(
            RESPONSES, {"model": "tiny", "input": "x", "max_output_tokens": 200, "background": True}
        ).json()["id"]
        server.until_idle()
        for _ in range(3):
            assert "response.failed" in server.client.get(f"{RESPONSES}/{made}?stream=true").text
            assert server.client.get(f"{RESPONSES}/{made}").json()["error"]["type"] == "request_timeout"
        kept = server.context.answers.find("default", made.removeprefix("resp_"))
        assert kept is not None and kept.error is not None and kept.error.__traceback__ is None


def test_log_probabilities_are_kept_for_a_retry_and_no_longer_than_their_bytes_allow() -> None:
    asking = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 20,
        "temperature": 0,
        "logprobs": True,
    }
    with serving() as server:
        first = server.post(CHAT, asking, **{"Idempotency-Key": "k"}).json()
        assert server.post(CHAT, asking, **{"Idempotency-Key": "k"}).json() == first
        kept = server.context.answers._ended
        before = kept.num_bytes
        server.post(CHAT, {**asking, "messages": [{"role": "user", "content": "y"}]})
        assert kept.num_bytes - before > 20 * 320


def test_nothing_of_an_erased_conversation_or_a_deleted_response_stays() -> None:
    with serving() as server:
        made = server.post("/v1/conversations", {}).json()["id"]
        first = server.post(
            RESPONSES, {"model": "tiny", "conversation": made, "input": "a secret", "max_output_tokens": 4}
        ).json()["id"]
        alone = server.post(RESPONSES, {"model": "tiny", "input": "alone", "max_output_tokens": 4}).json()[
            "id"
        ]
        find = server.context.answers.find
        assert find("default", first.removeprefix("resp_")) is not None
        server.client.delete(f"/v1/conversations/{made}")
        assert find("default", first.removeprefix("resp_")) is None
        assert server.client.get(f"{RESPONSES}/{first}").status_code == 404
        assert find("default", alone.removeprefix("resp_")) is not None
        server.client.delete(f"{RESPONSES}/{alone}")
        assert find("default", alone.removeprefix("resp_")) is None


def test_answers_under_way_are_bounded_by_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_answers, "MAX_OPEN_BYTES", 8_000)
    with serving() as server:
        server.worker.pause_s = 0.01
        made = server.post(
            RESPONSES, {"model": "tiny", "input": "long", "max_output_tokens": 300, "background": True}
        ).json()["id"]
        seen: list[httpx.Response] = []

        def refused() -> bool:
            seen.append(
                server.post(
                    CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
                )
            )
            return seen[-1].status_code == 429

        while not refused():
            assert len(seen) < 500
        assert (
            "answers under way take" in seen[-1].json()["error"]["message"]
            and seen[-1].headers["retry-after"]
        )
        server.until_idle()
        failed = server.client.get(f"{RESPONSES}/{made}").json()
        assert failed["status"] == "failed" and failed["error"]["type"] == "answer_too_large"
        assert "fewer top_logprobs" in failed["error"]["message"]
        assert server.context.answers._open_bytes == 0
        server.worker.pause_s = 0.0
        assert server.ask("and now", n=2)["usage"]["completion_tokens"] == 2


def test_the_loop_keeps_time_by_itself() -> None:
    async def wait() -> int:
        kept = EndedAnswers(asyncio.get_running_loop(), 0.05)
        kept.add(ended("a", at_s=asyncio.get_running_loop().time()))
        await asyncio.sleep(0.5)
        return len(kept)

    assert asyncio.run(wait()) == 0
