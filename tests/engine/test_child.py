"""The engine's side of the pipe: events go out at once and in order, and no reader, slow or gone, holds a step up."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest

from pensieve.engine.child import Outbox
from pensieve.engine.messages import Token
from pensieve.engine.wire import StartProgress, receive

PATIENCE_S = 20.0  # far beyond anything here: a hang is a failure, not a measurement


@pytest.fixture(params=[True, False], ids=["socket", "pipe"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[Connection, Connection]]:
    """(the parent's, the child's)."""
    theirs, ours = multiprocessing.Pipe(duplex=request.param)
    yield theirs, ours
    theirs.close()
    ours.close()


def tokens(count: int, first: int = 0) -> list[Any]:
    return [
        Token(f"request-{number}", number, -0.5, ((number, -0.5), (1, -2.0)))
        for number in range(first, first + count)
    ]


def test_tokens_come_out_of_a_pickle_as_they_went_in() -> None:
    plain = [Token("r", 7), *tokens(3)]
    again = pickle.loads(pickle.dumps(plain, protocol=5))
    assert again == plain and all(type(token) is Token for token in again)


def test_a_steps_events_leave_on_its_own_thread(
    ends: tuple[Connection, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = ends
    outbox = Outbox(ours)
    queued: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr(outbox, "_queue", type("Queue", (), {"put": queued.append, "get": outbox._queue.get}))
        outbox.put(tokens(8))
        assert theirs.poll() and receive(theirs) == tokens(8) and not queued
        outbox.put(tokens(5000))  # more than fits: putting it there would wait for the parent
        assert not theirs.poll() and queued == [tokens(5000)]
        outbox.put(tokens(1))  # what comes after goes behind it
        assert not theirs.poll() and queued == [tokens(5000), tokens(1)]
    ours.close()  # (its thread waits for nothing that we could close it with)
    outbox.close()


def test_put_does_not_wait_for_a_reader_that_does_not_read(ends: tuple[Connection, Connection]) -> None:
    """Several threads put small and large messages until the pipe is long full; then everything comes, each thread's in its order."""
    theirs, ours = ends
    outbox = Outbox(ours)
    num_threads, num_messages = 3, 400

    def put(sender: int) -> None:
        for number in range(num_messages):
            outbox.put(
                [Token(str(sender), number), *tokens(900 if number > 350 else 8 * (number % 5))]
            )  # (small ones fill it first)
            if number == num_messages // 2:
                outbox.put(StartProgress(str(sender)))  # no list: nothing is put together with it

    threads = [threading.Thread(target=put, args=(sender,), daemon=True) for sender in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "a put waits for the reader"
    closing = threading.Thread(target=outbox.close, daemon=True)
    closing.start()
    seen: dict[str, list[object]] = {str(sender): [] for sender in range(num_threads)}
    while sum(map(len, seen.values())) < num_threads * (num_messages + 1):
        assert theirs.poll(PATIENCE_S), "something was lost"
        message = receive(theirs)
        for each in message if isinstance(message, list) else [message]:
            if isinstance(each, StartProgress):
                seen[each.text].append("half")
            elif each.request_id in seen:
                seen[each.request_id].append(each.token_id)
    half = num_messages // 2 + 1
    assert all(found == [*range(half), "half", *range(half, num_messages)] for found in seen.values())
    closing.join(PATIENCE_S)
    outbox.put(tokens(1))  # after the end it is dropped
    assert not closing.is_alive()


def test_the_order_is_kept_while_the_reader_catches_up(ends: tuple[Connection, Connection]) -> None:
    theirs, ours = ends
    outbox, count = Outbox(ours), 3000

    def put() -> None:
        for number in range(count):
            outbox.put([Token("r", number), *tokens(200 if number % 50 == 0 else 1, first=count)])

    putting = threading.Thread(target=put, daemon=True)
    putting.start()
    seen: list[int] = []
    while len(seen) < count:
        assert theirs.poll(PATIENCE_S), "something was lost"
        seen += [token.token_id for token in receive(theirs) if token.token_id < count]
    assert seen == list(range(count))
    putting.join(PATIENCE_S)
    outbox.close()


def test_a_parent_that_is_gone_is_not_missed(ends: tuple[Connection, Connection]) -> None:
    theirs, ours = ends
    outbox = Outbox(ours)
    theirs.close()
    for _ in range(3):
        outbox.put(tokens(2))
        outbox.put(tokens(5000))
    outbox.close()
