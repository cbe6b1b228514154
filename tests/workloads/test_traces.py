"""Recorded traffic, in its forms and with its faults."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pensieve.errors import ConfigError
from pensieve.workloads.arrivals import ThinkTime
from pensieve.workloads.scripts import check_contexts, contexts
from pensieve.workloads.traces import load_trace


def write(path: Path, *records: object) -> Path:
    path.write_text(
        "\n".join(record if isinstance(record, str) else json.dumps(record) for record in records)
    )
    return path


def turn(
    conversation: object = "a", turn: object = 0, new: object = 10, out: object = 5, **when: object
) -> dict[str, object]:
    return {"conversation": conversation, "turn": turn, "new_tokens": new, "output_tokens": out} | when


def test_turns_with_times(tmp_path: Path) -> None:
    records = [
        turn(arrival_s=0),
        turn("b", arrival_s=1.5, new=7),
        "",
        turn(turn=1, gap_s=2),
        turn(turn=2, arrival_s=9.0),
    ]
    trace = load_trace(write(tmp_path / "t.jsonl", *records), 64)
    assert (trace.form, trace.timed) == ("turns", True)
    a, b = trace.scripts
    assert [(t.due_s, t.think_s) for t in a.turns] == [(0.0, 0.0), (None, 2.0), (9.0, 0.0)]
    assert (b.name, b.turns[0].new_tokens, b.turns[0].output_tokens) == ("b", 7, 5)


def test_turns_that_begin_alike_share_a_beginning(tmp_path: Path) -> None:
    def begun(name: str, *blocks: str, new: int = 10, **more: object) -> dict[str, object]:
        return turn(name, arrival_s=0, new=new, blocks=list(blocks), block_tokens=4, **more)

    records = [
        begun("a", "s", "t"),
        begun("b", "s", "t", new=8),
        begun("c", "s", "u"),
        begun("d", "x"),
        turn("c", 1, new=30, gap_s=1),
        turn("c", 2, new=20, gap_s=1, keep_turns=0),
    ]
    a, b, c, d = load_trace(write(tmp_path / "t.jsonl", *records)).scripts
    assert [[piece.tokens for piece in script.prefix] for script in (a, b, c, d)] == [
        [4],
        [4],
        [4],
        [],
    ]  # b's second block is all it says
    assert a.prefix == b.prefix == c.prefix and a.prefix[0].name
    assert [script.turns[0].new_tokens for script in (a, b, c, d)] == [6, 4, 6, 10]
    assert [(t.new_tokens, t.keep_turns) for t in c.turns] == [(6, None), (30, None), (16, 0)], (
        "a prompt made anew has the beginning too"
    )
    assert list(contexts(c)) == [15, 50, 25]
    assert c.where == f"{tmp_path / 't.jsonl'}, line 3"


@pytest.mark.parametrize(
    ("records", "line", "words"),
    [
        ([turn(arrival_s=0), "{oops"], 2, "not JSON"),
        ([turn(arrival_s=0), "[1]"], 2, "must be a JSON object"),
        ([turn()], 1, "exactly one of"),
        ([turn(arrival_s=0, gap_s=0)], 1, "exactly one of"),
        ([turn(arrival_s=-1)], 1, "at least 0"),
        ([turn(arrival_s="soon")], 1, "number of seconds"),
        ([turn(arrival_s=float("nan"))], 1, "number of seconds"),
        ([turn(arrival_s=0, new=0)], 1, "new_tokens"),
        ([turn(arrival_s=0, out=1.5)], 1, "output_tokens"),
        ([turn(arrival_s=0, out=True)], 1, "output_tokens"),
        ([turn(arrival_s=0), turn(turn=2, gap_s=1)], 2, "numbered 0, 1, 2"),
        ([turn(turn=1, arrival_s=0)], 1, "numbered 0, 1, 2"),
        ([turn(arrival_s=5), turn(turn=1, arrival_s=4)], 2, "before an earlier turn"),
        ([turn(None, arrival_s=0)], 1, '"conversation"'),
        ([turn(arrival_s=10**400)], 1, "at least 0"),
        ([turn(arrival_s=0, new=-3)], 1, "at least 1, got -3"),
        ([turn(arrival_s=0, words="hi")], 1, "unknown field 'words'"),
        ([turn(arrival_s=0), turn(turn=1, gap_s=0, keep_turns=2)], 2, "at most 1"),
        (
            [turn(arrival_s=0), turn(turn=1, gap_s=0, keep_turns=0), turn(turn=2, gap_s=0, keep_turns=2)],
            3,
            "at most 1",
        ),
        ([turn(arrival_s=0, keep_turns=-1)], 1, '"keep_turns"'),
        ([turn(arrival_s=0, blocks="ab", block_tokens=4)], 1, "list of texts"),
        ([turn(arrival_s=0, blocks=[1.5], block_tokens=4)], 1, "list of texts"),
        ([turn(arrival_s=0, blocks=["a"])], 1, '"block_tokens"'),
        ([turn(arrival_s=0, block_tokens=4)], 1, '"blocks"'),
        ([turn(arrival_s=0, blocks=["a", "b", "c"], block_tokens=4)], 1, "more than the 10"),
        ([turn(arrival_s=0), turn(turn=1, gap_s=0, blocks=["a"], block_tokens=4)], 2, "turn 0 alone"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, records: list[object], line: int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_trace(write(tmp_path / "t.jsonl", *records), 64)
    assert f"line {line}" in caught.value.message and words in caught.value.message


def test_sessions_of_agents(tmp_path: Path) -> None:
    rows = [[1000, 100, 0, 0, 7.0], [1300, 50, 960, 12.5, 3.0], [1340, 0, 1280, 1.0, 1.0]]
    path = tmp_path / "s.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"id": "s1", "turns": rows}).encode()))
    trace = load_trace(path, 64)
    assert (trace.form, trace.timed) == ("sessions", False)
    (script,) = trace.scripts
    assert [(t.new_tokens, t.output_tokens, t.think_s, t.keep_turns) for t in script.turns] == [
        (1000, 100, 0.0, None),
        (200, 50, 12.5, None),
        (
            1,
            1,
            1.0,
            None,
        ),  # the answer before it was not all kept, and an answer that was cut off has a token at least
    ]


def test_a_session_whose_history_was_rewritten_goes_on_from_what_is_shared(tmp_path: Path) -> None:
    rows = [
        [1000, 100, 0, 0, 0],
        [2000, 100, 960, 1, 0],
        [3000, 100, 1984, 1, 0],
        [2500, 100, 1150, 1, 0],
        [2700, 100, 2496, 1, 0],
    ]
    (script,) = load_trace(write(tmp_path / "s.jsonl", {"id": "s1", "turns": rows}), 64).scripts
    assert [t.keep_turns for t in script.turns] == [None, None, None, 1, None]
    assert [t.new_tokens for t in script.turns] == [1000, 900, 900, 1400, 100]
    nothing = [[1000, 100, 0, 0, 0], [2000, 100, 0, 1, 0]]
    (script,) = load_trace(write(tmp_path / "s.jsonl", {"id": "s1", "turns": nothing}), 64).scripts
    assert [(t.new_tokens, t.keep_turns) for t in script.turns] == [(1000, None), (2000, 0)]


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"id": "x", "turns": []}, "at least 1 turn"),
        ({"id": "x", "turns": [[1, 2]]}, "turns[0] must be a list"),
        ({"id": "x", "turns": [[0, 2, 0, 0, 0]]}, "input tokens"),
        ({"id": "x", "turns": [[1, -2, 0, 0, 0]]}, "output tokens"),
        ({"id": "x", "turns": [[1, 2, 0, -1, 0]]}, "think time"),
        ("nothing", "not JSON"),
    ],
)
def test_a_bad_session_is_named(tmp_path: Path, second: object, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_trace(write(tmp_path / "s.jsonl", {"id": "s", "turns": [[9, 9, 0, 0, 0]]}, second), 64)
    assert "line 2" in caught.value.message and words in caught.value.message


def test_chats_with_their_words(tmp_path: Path) -> None:
    chat = [
        {"from": "system", "value": "be brief"},
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "yo"},
        {"from": "human", "value": "bye"},
    ]
    trace = load_trace(
        write(tmp_path / "c.json", json.dumps([{"id": "c1", "conversations": chat}])), 32, ThinkTime(3.0)
    )
    assert (trace.form, trace.timed) == ("texts", False)
    (script,) = trace.scripts
    assert (script.name, script.system, [t.text for t in script.turns]) == ("c1", "be brief", ["hi", "bye"])
    assert [(t.new_tokens, t.output_tokens, t.think_s) for t in script.turns] == [(None, 32, 3.0)] * 2
    (told,) = load_trace(tmp_path / "c.json").scripts
    assert [t.output_tokens for t in told.turns] == [1, 64], "as many as were answered, or 64"
    shipped = Path(__file__).parents[2] / "src/pensieve/workloads/data/conversations.jsonl"
    assert len(load_trace(shipped, 32).scripts) == 24


def test_what_a_model_cannot_hold_is_named(tmp_path: Path) -> None:
    records = [turn(arrival_s=0), turn("b", arrival_s=0), turn("b", 1, gap_s=1)]
    scripts = load_trace(write(tmp_path / "t.jsonl", *records)).scripts
    check_contexts(scripts, 30)
    with pytest.raises(
        ConfigError,
        match=r"t\.jsonl, line 2: turn 1 of conversation 'b' needs 30 tokens .* holds 29: --max-context 29",
    ):
        check_contexts(scripts, 29)
    with pytest.raises(ConfigError, match="turn 0 of conversation 'a' needs 17 tokens"):
        check_contexts(scripts, 15, template_tokens=1.5)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no entry"),
        ("\n \n", "holds no entry"),
        ("TIMESTAMP,Tokens\n1,2", "line 1: not JSON"),
        ('{"x": 1}', "line 1"),
    ],
)
def test_files_of_no_form(tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_trace(write(tmp_path / "f", content), 64)


def test_a_file_that_is_not_there_or_is_cut_off(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the trace"):
        load_trace(tmp_path / "nowhere", 64)
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"x" * 1000)[:20])
    with pytest.raises(ConfigError, match="cannot read the trace"):
        load_trace(tmp_path / "cut.gz", 64)
