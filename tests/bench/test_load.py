"""`pensieve bench` against a small server that counts, well and badly."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from chat_server import Model, Reply, Server, chat_server, chunk, refuse, stream, usage
from serving import serving

from pensieve.bench.chat_client import ChatClient
from pensieve.bench.http_client import HttpClient
from pensieve.bench.probe import Target, probe
from pensieve.cli import main
from pensieve.errors import ModelUnavailable
from pensieve.workloads.prompts import PromptWriter

OUTPUT = 18  # no other request of the command is for as many


@pytest.fixture
def model() -> Model:
    model = Model()
    model.measured_tokens = OUTPUT
    return model


@pytest.fixture
def server(model: Model) -> Iterator[Server]:
    with chat_server() as server:
        server.reply = model
        yield server


class Result:
    """What a run of the command left."""

    def __init__(self, status: object, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err
        self.json: dict[str, Any] = json.loads(out.splitlines()[-1]) if out else {}
        self.run: dict[str, Any] = self.json["runs"][0] if self.json else {}


def bench(capsys: pytest.CaptureFixture[str], url: str, *arguments: str) -> Result:
    status: object = 0
    try:
        main(
            [
                "bench",
                "--url",
                url,
                "--output-tokens",
                str(OUTPUT),
                "--new-tokens",
                "20",
                "--warm-up",
                "1",
                *arguments,
            ]
        )
    except SystemExit as end:
        status = end.code
    return Result(status, *capsys.readouterr())


# -- what is measured


def test_users_converse_and_every_request_is_told(
    server: Server, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = bench(
        *(capsys, server.url, "--users", "2", "--turns", "3", "--first-tokens", "60", "--seed", "4"),
        *("--out", str(tmp_path), "--json", str(tmp_path / "more" / "x.json")),
    )
    assert result.status == 0, result.err
    for words in ("By turn", "Totals", "requests/s", "found cached"):
        assert words in result.out
    assert (
        json.loads((tmp_path / "bench.json").read_text())
        == json.loads((tmp_path / "more" / "x.json").read_text())
        == result.json
    )
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert {
        "kind",
        "version",
        "commit",
        "command",
        "python",
        "date",
        "target",
        "config",
        "runs",
        "requests",
    } <= set(result.json)
    assert (result.json["kind"], result.json["version"]) == ("pensieve-bench", 1)
    target, config, run = result.json["target"], result.json["config"], result.run
    assert (
        {"url", "model", "server", "fixed_lengths"} <= set(target)
        and target["model"] == "tiny"
        and target["fixed_lengths"] is True
    )
    assert (target["tokens_per_word"], target["template_tokens"]) == (2.0, 10.0)
    asked = (
        "users",
        "turns",
        "new_tokens",
        "output_tokens",
        "first_tokens",
        "think",
        "rates",
        "starts_s",
        "trace",
        "seed",
        "warm_up_requests",
    )
    assert [config[name] for name in asked] == [2, 3, 20, OUTPUT, 60, "0", None, 0.0, None, 4, 1]
    assert (run["rate"], run["requests"], run["failed"], run["output_tokens"]) == (None, 6, 0, 6 * OUTPUT)
    for name in ("ttft_ms", "normalized_ms", "inter_token_ms", "latency_ms", "piece_gap_ms"):
        assert (
            set(run[name]) == {"mean", "p50", "p90", "p99"}
            and 0 <= run[name]["p50"] <= run[name]["p90"] <= run[name]["p99"]
        )
    assert (
        run["requests_per_s"] == pytest.approx(6 / run["wall_s"])
        and run["client_cpu_s"] > 0
        and run["client_cpu_share"] > 0
    )
    by_turn = run["by_turn"]
    assert [turn["turn"] for turn in by_turn] == [0, 1, 2] and [turn["requests"] for turn in by_turn] == [
        2,
        2,
        2,
    ]
    # two tokens a word: 30 words, then 10 more and the answer's 18 words each turn
    assert [turn["prompt_tokens"] for turn in by_turn] == [70, 70 + 36 + 20, 70 + 2 * 56]
    assert [turn["cached_tokens"] for turn in by_turn] == [0, 70 + OUTPUT, 126 + OUTPUT]
    assert run["prompt_tokens"] == 2 * (70 + 126 + 182) and run["cached_tokens"] == 2 * (88 + 144)
    requests = result.json["requests"]
    fields = (
        "run",
        "conversation",
        "turn",
        "submitted_s",
        "ttft_s",
        "latency_s",
        "prompt_tokens",
        "cached_tokens",
        "output_tokens",
        "error",
    )
    assert all(set(request) == set(fields) for request in requests) and len(requests) == 6
    assert {(request["conversation"], request["turn"]) for request in requests} == {
        (c, t) for c in range(2) for t in range(3)
    }
    assert all(
        0 < request["ttft_s"] <= request["latency_s"] and request["error"] is None for request in requests
    )


def test_the_history_is_resent_with_the_server_s_own_answers(
    server: Server, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    bench(capsys, server.url, "--users", "1", "--turns", "3")
    first, second, third = (body["messages"] for body in model.measured)
    assert [message["role"] for message in third] == ["user", "assistant", "user", "assistant", "user"]
    assert third[:4] == [*second, third[3]] and second[:1] == first
    assert second[1]["content"] == "".join(f"w{position} " for position in range(OUTPUT))
    assert all(
        body["temperature"] == 0 and body["stream"] and body["stream_options"] == {"include_usage": True}
        for body in model.measured
    )


def test_no_two_conversations_begin_alike_in_any_run(
    server: Server, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    bench(capsys, server.url, "--rate", "40,40", "--duration", "0.3", "--turns", "1", "--seed", "1")
    beginnings = [" ".join(body["messages"][0]["content"].split()[:4]) for body in model.measured]
    assert len(beginnings) > 8 and len(set(beginnings)) == len(beginnings)
    again = len(model.measured)
    bench(capsys, server.url, "--rate", "40,40", "--duration", "0.3", "--turns", "1", "--seed", "1")
    assert [b["messages"] for b in model.measured[again:]] == [
        b["messages"] for b in model.measured[:again]
    ] or sorted(b["messages"][0]["content"] for b in model.measured[again:]) == sorted(
        b["messages"][0]["content"] for b in model.measured[:again]
    )


def test_users_think_and_start_one_after_the_other(
    server: Server, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        "--users",
        "2",
        "--turns",
        "2",
        "--conversations-per-user",
        "2",
        "--think",
        "0.05",
        "--starts",
        "0.1",
    )
    result = bench(capsys, server.url, *options)
    requests = {(request["conversation"], request["turn"]): request for request in result.json["requests"]}
    assert len(requests) == 8
    assert requests[2, 0]["submitted_s"] >= 0.05, "the second user starts half of the time later"
    for before, after in (((0, 0), (0, 1)), ((0, 1), (1, 0)), ((2, 1), (3, 0))):
        assert (
            requests[after]["submitted_s"]
            >= requests[before]["submitted_s"] + requests[before]["latency_s"] + 0.05 - 1e-5
        )


def test_a_sweep_has_a_run_for_each_rate(
    server: Server, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = bench(
        capsys,
        server.url,
        "--rate",
        "20:40:20",
        "--duration",
        "0.5",
        "--turns",
        "2",
        "--seed",
        "3",
        "--out",
        str(tmp_path),
    )
    assert result.status == 0, result.err
    assert [run["rate"] for run in result.json["runs"]] == [20.0, 40.0] and result.json["config"][
        "rates"
    ] == [20.0, 40.0]
    assert {request["run"] for request in result.json["requests"]} == {0, 1}
    assert all(run["requests"] % 2 == 0 and run["requests"] > 0 for run in result.json["runs"])
    assert "By rate" in result.out and (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_trace_is_played_at_its_times(
    server: Server, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        ("a", 0, {"arrival_s": 0.0}),
        ("b", 0, {"arrival_s": 0.4}),
        ("a", 1, {"arrival_s": 0.8}),
        ("b", 1, {"gap_s": 0.2}),
    ]
    path = tmp_path / "t.jsonl"
    lines = [
        json.dumps({"conversation": c, "turn": t, "new_tokens": 40, "output_tokens": OUTPUT} | when)
        for c, t, when in rows
    ]
    path.write_text("\n".join(lines))
    result = bench(capsys, server.url, "--trace", str(path), "--speed", "4")
    assert result.status == 0, result.err
    sent = {
        (request["conversation"], request["turn"]): request["submitted_s"]
        for request in result.json["requests"]
    }
    assert sent[1, 0] >= 0.1 - 1e-5 and sent[0, 1] >= 0.2 - 1e-5 and sent[1, 1] >= sent[1, 0] + 0.05
    assert result.run["by_turn"][0]["prompt_tokens"] == 50


def test_a_session_s_rewritten_history_is_cut_back(
    server: Server, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(
        json.dumps(
            {
                "id": "s",
                "turns": [[1000, OUTPUT, 0, 0, 0], [1500, OUTPUT, 1000, 0, 0], [1600, OUTPUT, 1020, 0, 0]],
            }
        )
    )
    assert bench(capsys, server.url, "--trace", str(path), "--users", "1").status == 0
    _, second, third = (body["messages"] for body in model.measured)
    assert len(third) == 3 and third[:2] == second[:2] and third[2] != second[2]


def test_made_conversations_begin_with_shared_system_prompts(
    server: Server, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gaps = tmp_path / "gaps"
    gaps.write_text("0.01\n0.02\n")
    result = bench(
        capsys,
        server.url,
        "--users",
        "3",
        "--turns",
        "2",
        "--system-prompts",
        "1:60",
        "--think",
        f"file:{gaps}",
    )
    assert result.status == 0, result.err
    assert (result.json["config"]["system_prompts"], result.json["config"]["think"]) == (
        "1:60:1",
        f"file:{gaps}",
    )
    begun = {(body["messages"][0]["role"], body["messages"][0]["content"]) for body in model.measured}
    ((role, words),) = begun
    assert role == "system" and len(words.split()) == 30, "two tokens a word"


# -- servers that fail


def cut_connection(handler: BaseHTTPRequestHandler, _body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write((chunk("half") + "\n\n").encode())
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (refuse(500, b"boom"), "http_500: HTTP 500: boom"),
        (cut_connection, "stream_broken"),
        (lambda h, _b: stream(h, chunk("par"), "", chunk("tial"), ""), "without a finish_reason"),
        (lambda h, _b: stream(h, "data: {oops", ""), "not JSON"),
        (
            lambda h, _b: stream(h, chunk("x", "stop"), "", usage(50, OUTPUT - 1), "", "data: [DONE]", ""),
            "wrong_length",
        ),
        (lambda h, _b: stream(h, chunk("x", "stop"), "", "data: [DONE]", ""), "no_usage"),
        (
            lambda h, _b: stream(h, chunk(None, "stop"), "", usage(50, OUTPUT), "", "data: [DONE]", ""),
            "empty_answer",
        ),
        (lambda h, _b: stream(h, 'data: {"choices": [7]}', ""), "bad_answer"),
    ],
)
def test_a_failed_request_ends_its_conversation_and_the_exit_status_says_so(
    server: Server, model: Model, capsys: pytest.CaptureFixture[str], fault: Reply, words: str
) -> None:
    model.before = lambda index, _body: fault if index == 1 else None
    result = bench(capsys, server.url, "--users", "1", "--turns", "3", "--conversations-per-user", "2")
    assert result.status == 1
    assert f"failed: conversation 0, turn 1: {words.partition(':')[0]}" in result.err or words in result.err
    failed = [request for request in result.json["requests"] if request["error"] is not None]
    assert [(request["conversation"], request["turn"]) for request in failed] == [(0, 1)] and words in failed[
        0
    ]["error"]
    assert (result.run["requests"], result.run["failed"], result.run["turns_not_sent"]) == (5, 1, 1)
    assert result.run["output_tokens"] == 4 * OUTPUT, "what failed counts for nothing"


def test_of_many_failures_a_few_are_told(
    server: Server, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    model.before = lambda _index, _body: refuse(503, b"busy")
    result = bench(capsys, server.url, "--users", "8", "--turns", "2")
    assert (
        result.status == 1
        and result.err.count("failed: conversation") == 5
        and "failed: 3 more requests" in result.err
    )
    assert (
        result.run["ttft_ms"] == {"mean": None, "p50": None, "p90": None, "p99": None}
        and result.run["by_turn"] == []
    )


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    result = bench(capsys, url)
    assert result.status == 2 and "model_unavailable" in result.err and "is the server up?" in result.err


def test_the_key_is_sent_and_never_shown(
    server: Server, model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["pensieve", "bench", "--api-key", "secret-1", "--api-key=secret-2"])
    result = bench(capsys, server.url, "--users", "1", "--turns", "1", "--api-key", "secret-3")
    assert server.headers[-1]["Authorization"] == "Bearer secret-3"
    assert result.status == 0 and "secret" not in result.out + result.err
    assert result.json["command"] == ["pensieve", "bench", "--api-key", "***", "--api-key=***"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rate", "1", "--users", "2"), "--users does not go with --rate"),
        (("--rate", "1", "--starts", "2"), "--starts does not go with --rate"),
        (("--rate", "fast"), "requests a second"),
        (("--think", "soon"), "think time"),
        (("--duration", "5"), "--duration needs --rate"),
        (("--think", "file:nowhere"), "cannot read the gaps"),
        (("--system-prompts", "3"), "COUNT:TOKENS"),
        (("--trace", "sharegpt-like", "--duration", "5"), "--duration needs --rate"),
        (("--speed", "5"), "--speed does not go with no --trace"),
        (("--trace", "nowhere.jsonl"), "cannot read the trace"),
        (("--max-context", "10"), "--max-context 10"),
        (("--rate", "0.001", "--duration", "1"), "take a longer duration"),
        (("--json", "/"), "cannot write /"),
    ],
)
def test_options_that_contradict_each_other_are_told_before_anything_is_asked(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    result = bench(capsys, "http://127.0.0.1:9", *arguments)
    assert result.status == 2 and words in result.err and not result.out


# -- what servers take


def found_out(server: Server, *, natural: bool = False) -> tuple[Target, ChatClient]:
    async def ask() -> tuple[Target, ChatClient]:
        chat = ChatClient(HttpClient(server.url + "/v1", keep_connections=False), "tiny")
        return await probe(chat, None, PromptWriter(0), natural=natural), chat

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("refuses", "ignores", "form"),
    [
        ((), (), ("ignore_eos", "min_tokens")),  # vLLM
        (("min_tokens",), (), ("ignore_eos",)),
        ((), ("min_tokens",), ("ignore_eos", "min_tokens")),  # llama.cpp
        (("ignore_eos", "min_tokens"), (), ("generation_config",)),  # transformers serve
        (("ignore_eos",), ("generation_config",), ("min_tokens",)),
        (("ignore_eos", "min_tokens", "generation_config"), (), ()),
        ((), ("ignore_eos", "min_tokens", "generation_config"), ()),  # says nothing and stops early
    ],
)
def test_the_fields_that_fix_a_length_are_found(
    server: Server, refuses: tuple[str, ...], ignores: tuple[str, ...], form: tuple[str, ...]
) -> None:
    server.reply = Model(refuses=refuses, ignores=ignores)
    target, chat = found_out(server)
    assert (target.length_form, chat.length_form, target.fixed_lengths) == (form, form, bool(form))
    assert any("does not fix the length" in note for note in target.notes) == (not form)


def test_a_server_without_fixed_lengths_is_measured_all_the_same(
    server: Server, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    model.refuses = ("ignore_eos", "min_tokens", "generation_config")
    result = bench(capsys, server.url, "--users", "1", "--turns", "2")
    assert (
        result.status == 0
        and result.json["target"]["fixed_lengths"] is False
        and "output lengths vary" in result.out
    )
    assert result.run["output_tokens"] == 2 * Model.NATURAL


def test_a_server_that_refuses_to_count_is_counted_by_pieces(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.reply = Model(refuses=("stream_options",))
    result = bench(capsys, server.url, "--users", "1", "--turns", "2")
    assert result.status == 0 and "pieces of the stream are counted" in result.out
    assert (result.run["prompt_tokens"], result.run["cached_tokens"], result.run["output_tokens"]) == (
        None,
        None,
        2,
    )
    assert "stream_options" not in server.asked[-1] and "ignore_eos" not in server.asked[-1]


def test_natural_answers_are_asked_without_any_such_field(
    server: Server, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    result = bench(capsys, server.url, "--users", "1", "--turns", "1", "--natural")
    assert result.status == 0 and result.json["target"]["fixed_lengths"] is False
    assert not any({"ignore_eos", "min_tokens", "generation_config"} & set(body) for body in server.asked)


def test_a_server_that_fails_a_plain_request(server: Server) -> None:
    server.reply = refuse(400, b'{"error": {"message": "temperature must be 1"}}')
    with pytest.raises(ModelUnavailable, match="temperature must be 1"):
        found_out(server)


def test_warm_up_and_probes_share_no_beginning_with_what_is_measured(
    server: Server, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    bench(capsys, server.url, "--users", "3", "--turns", "1", "--warm-up", "2")
    measured = [body["messages"][0]["content"].split()[:2] for body in model.measured[-3:]]
    others = [body["messages"][0]["content"].split()[:2] for body in server.asked[:-3]]
    assert len(others) >= 8 and not any(one in others for one in measured)


def test_pieces_and_tokens_are_told_apart(
    server: Server, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eighteen tokens in three pieces 30 ms apart: 60 ms over 17 gaps between tokens, whatever the pieces are."""

    def slow(handler: BaseHTTPRequestHandler, _body: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.end_headers()
        time.sleep(0.05)
        for piece in ("a b c ", "d e f ", "g h i"):
            handler.wfile.write((chunk(piece) + "\n\n").encode())
            handler.wfile.flush()
            time.sleep(0.03)
        handler.wfile.write(
            (chunk(None, "length") + "\n\n" + usage(50, OUTPUT) + "\n\ndata: [DONE]\n\n").encode()
        )

    model.before = lambda _index, _body: slow
    result = bench(capsys, server.url, "--users", "1", "--turns", "1")
    (request,) = result.json["requests"]
    assert request["ttft_s"] >= 0.05 and request["latency_s"] >= 0.05 + 3 * 0.03
    assert result.run["piece_gap_ms"]["p50"] >= 30 - 1 and result.run["inter_token_ms"]["mean"] >= 2 * 29 / 17
    assert result.run["inter_token_ms"]["mean"] == pytest.approx(result.run["piece_gap_ms"]["mean"] * 2 / 17)
    assert result.run["normalized_ms"]["mean"] == pytest.approx(request["latency_s"] * 1e3 / OUTPUT, rel=1e-3)


# -- our own


def test_pensieve_s_own_server_over_a_fake_worker(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(slots=(1000, 100), max_context=3000) as running:
        result = bench(
            capsys, running.url, "--users", "3", "--turns", "3", "--new-tokens", "100", "--seed", "5"
        )
        running.until_idle()
    assert result.status == 0, result.err
    target, by_turn = result.json["target"], result.run["by_turn"]
    assert (
        target["fixed_lengths"] is True
        and "ignore_eos" in target["length_form"]
        and '"version"' in target["server"]
    )
    assert result.run["output_tokens"] == 9 * OUTPUT
    assert by_turn[0]["prompt_tokens"] == pytest.approx(
        100 + target["template_tokens"], rel=0.25
    )  # letters are tokens here: words differ
    assert by_turn[2]["cached_tokens"] > by_turn[1]["cached_tokens"] > by_turn[0]["cached_tokens"]
