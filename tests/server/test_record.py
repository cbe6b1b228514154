"""`pensieve record`: the traffic of a running server as a trace that can be played."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from serving import Serving, serving

from pensieve.cli import main, record
from pensieve.cli.commands import cli
from pensieve.errors import PensieveError
from pensieve.server import recorders
from pensieve.server.keys import key_line, new_key
from pensieve.server.shares import Shares
from pensieve.workloads.traces import load_trace

CHUNK = 8


def wait_for(what: Any) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def recording(server: Serving, path: Path, *words: str) -> Iterator[None]:
    """A recorder at work, until the server says that it goes down."""
    before = server.context.recorders.num_held
    arguments = ["record", "--url", f"{server.url}/v1", "--out", str(path), *words]
    thread = threading.Thread(target=lambda: cli.main(arguments, standalone_mode=False), daemon=True)
    thread.start()
    wait_for(lambda: server.context.recorders.num_held > before)
    yield
    server.context.answers.draining = True
    thread.join(20)
    assert not thread.is_alive()
    wait_for(lambda: server.context.recorders.num_held <= before)
    server.context.answers.draining = False


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def text_of(body: dict[str, Any]) -> str:
    text: str = body["choices"][0]["message"]["content"]
    return text


def test_what_is_recorded_can_be_played(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.jsonl"
    with serving(max_context=1200, slots=(256, 256)) as server:
        early = server.ask("before the recording", n=6)
        with recording(server, path):
            first = server.ask("a secret zebra walks home", n=9)
            other = server.ask("a secret zebra walks away", n=5)
            second = server.ask("a secret zebra walks home", text_of(first), "and then?", n=7)
            server.ask("before the recording", text_of(early), "and after", n=4)
            server.post("/v1/completions", {"model": "tiny", "prompt": "a zebra's text", "max_tokens": 3})
        told = lines(path)
        assert [(line["turn"], line["output_tokens"]) for line in told] == [
            (0, 9),
            (0, 5),
            (1, 7),
            (0, 4),
            (0, 3),
        ]
        assert (
            told[0]["conversation"] == told[2]["conversation"]
            and len({line["conversation"] for line in told}) == 4
        )
        receipts = [body["pensieve"]["prompt_tokens"] for body in (first, other, second)]
        assert [
            told[0]["new_tokens"],
            told[1]["new_tokens"],
            told[2]["new_tokens"] + receipts[0] + 9,
        ] == receipts
        assert all(before["arrival_s"] <= after["arrival_s"] for before, after in pairwise(told))
        everything = path.read_text()
        names = [
            body["pensieve"][name] for body in (first, other, early) for name in ("conversation", "turn")
        ]
        assert not any(word in everything for word in ["zebra", *names])

        trace = load_trace(path)
        assert (trace.form, trace.timed, len(trace.scripts)) == ("turns", True, 4)
        home, away = trace.scripts[:2]
        assert home.prefix[0] == away.prefix[0] and home.prefix_tokens % CHUNK == 0, (
            "the same words at the beginning"
        )
        capsys.readouterr()
        main(
            [
                "bench",
                "--url",
                server.url,
                "--trace",
                str(path),
                "--speed",
                "20",
                "--warm-up",
                "0",
                "--max-context",
                "1000",
            ]
        )
        run = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"][0]
        assert (run["requests"], run["failed"], run["output_tokens"]) == (5, 0, 28)
        server.until_idle()


def test_two_recordings_cannot_be_compared(tmp_path: Path) -> None:
    with serving() as server:
        with recording(server, tmp_path / "a"), recording(server, tmp_path / "b"):
            server.ask("the same words for both, and a few more", n=4)
        (one,), (two,) = lines(tmp_path / "a"), lines(tmp_path / "b")
        assert one["new_tokens"] == two["new_tokens"] and len(one["blocks"]) == len(two["blocks"]) > 0
        assert one["conversation"] != two["conversation"] and not set(one["blocks"]) & set(two["blocks"])


def test_a_key_records_its_tenant_s_turns_alone(tmp_path: Path) -> None:
    alice, bob = new_key(), new_key()
    (tmp_path / "keys").write_text(key_line("alice", alice) + "\n" + key_line("bob", bob) + "\n")
    with serving(keys=tmp_path / "keys", key=alice) as server:
        with recording(server, tmp_path / "t", "--api-key", alice):
            server.ask("mine", n=3)
            ask = {"model": "tiny", "messages": [{"role": "user", "content": "mine"}], "max_tokens": 5}
            assert server.post("/v1/chat/completions", ask, Authorization=f"Bearer {bob}").status_code == 200
            assert server.post("/v1/chat/completions", ask, **{"X-Cache-Salt": "apart"}).status_code == 200
        mine, apart = lines(tmp_path / "t")
        assert (mine["output_tokens"], apart["output_tokens"]) == (3, 5) and not set(mine["blocks"]) & set(
            apart["blocks"]
        )
        with pytest.raises(PensieveError, match="API key"):
            cli.main(["record", "--url", server.url], standalone_mode=False)


def test_a_slow_recorder_loses_turns_and_is_told_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorders, "MAX_WAITING", 2)
    gate = threading.Event()
    line = recorders.Recorder.line

    def slow(self: recorders.Recorder, answer: Any) -> Any:
        gate.wait(20)
        return line(self, answer)

    monkeypatch.setattr(recorders.Recorder, "line", slow)
    with serving() as server, server.client.stream("GET", "/v1/pensieve/record") as response:
        events = response.iter_lines()
        assert next(events) == "event: begin"
        for number in range(6):
            server.ask(f"number {number}", n=2)  # no request waits for the recorder
        gate.set()
        server.context.answers.draining = True
        told = list(events)
        assert told.count("event: turn") == 3, "one was being written, two waited"
        assert 'data: {"turns":3}' in told and told[-2] == 'data: {"turns_lost":3}'
        server.context.answers.draining = False


def test_a_recording_has_a_duration_and_there_are_few_at_once(tmp_path: Path) -> None:
    with serving() as server:
        cli.main(
            ["record", "--url", server.url, "--duration", "0.05", "--out", str(tmp_path / "t")],
            standalone_mode=False,
        )
        assert (tmp_path / "t").read_text() == ""
        wait_for(lambda: not server.context.recorders.num_held)
        server.context.recorders = Shares(1)
        with server.client.stream("GET", "/v1/pensieve/record") as response:
            events = response.iter_lines()  # (kept: a stream whose reader is gone is closed)
            next(events)
            with pytest.raises(PensieveError, match="at most 1 may"):
                cli.main(["record", "--url", server.url], standalone_mode=False)
        wait_for(lambda: not server.context.recorders.num_held)
        for wrong in ("0", "-1", "nan", "inf", "soon"):
            assert server.client.get("/v1/pensieve/record", params={"duration_s": wrong}).status_code == 400


def test_ctrl_c_ends_a_recording(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def events(*_: object) -> Iterator[tuple[str, dict[str, Any]]]:
        yield "begin", {"block_tokens": 8}
        yield (
            "turn",
            {"conversation": "a", "arrival_s": 0.5, "prompt_tokens": 9, "output_tokens": 2, "blocks": ["x"]},
        )
        yield "lost", {"turns": 2}
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "_events", events)
    cli.main(["record"], standalone_mode=False)
    out, err = capsys.readouterr()
    assert (
        json.loads(out)["blocks"] == ["x"] and "recorded 1 turns of 1 conversations; 2 turns were lost" in err
    )


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ([("begin", {"block_tokens": 8}), ("turn", {"words": "x"})], "in a form that is not known"),
        ([("begin", {})], "in a form that is not known"),
        ([("begin", {"block_tokens": 8})], "broke the recording off"),
    ],
)
def test_a_server_that_tells_something_else(
    told: list[tuple[str, dict[str, Any]]], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "_events", lambda *_: iter(told))
    with pytest.raises(PensieveError, match=words):
        cli.main(["record"], standalone_mode=False)


def test_files_and_servers_that_will_not_do(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("x")
    for words, expected in (
        (["--out", str(tmp_path / "there")], "is there already"),
        (["--out", str(tmp_path / "no" / "folder")], "cannot write"),
        (["--url", "http://127.0.0.1:9"], "pensieve serve"),
        (["--url", "nonsense"], "pensieve serve"),
    ):
        with pytest.raises(PensieveError, match=expected):
            cli.main(["record", *words], standalone_mode=False)
    assert (tmp_path / "there").read_text() == "x"


def test_a_server_without_recordings_says_so() -> None:
    with serving() as server, pytest.raises(PensieveError, match="v2"):
        cli.main(["record", "--url", f"{server.url}/v2"], standalone_mode=False)
