"""What finished turns become in a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pensieve.workloads.recording import Recording
from pensieve.workloads.scripts import contexts
from pensieve.workloads.traces import load_trace


def test_turns_are_numbered_and_say_what_they_add() -> None:
    recording = Recording(4)
    lines = [
        recording.line("a", 0.0, 10, 5, ["1", "2"]),
        recording.line("b", 0.5, 3, 2, []),
        recording.line("a", 1.0, 20, 5, ["1", "2", "3", "4", "5"]),
        recording.line("b", 2.0, 9, 2, ["8", "9"]),
    ]
    assert [(line["conversation"], line["turn"], line["new_tokens"]) for line in lines] == [
        ("a", 0, 10),
        ("b", 0, 3),
        ("a", 1, 5),
        ("b", 1, 4),
    ]
    assert (
        lines[0]["blocks"] == ["1", "2"]
        and lines[0]["block_tokens"] == 4
        and "blocks" not in lines[2]
        and "blocks" not in lines[1]
    )
    assert not any("keep_turns" in line for line in lines)
    assert (recording.num_turns, recording.num_conversations) == (4, 2)


def test_a_history_that_was_taken_back_is_told() -> None:
    recording = Recording(4)
    recording.line("a", 0.0, 10, 5, ["1", "2"])
    recording.line("a", 1.0, 20, 5, ["1", "2", "3", "4", "5"])
    again = recording.line("a", 2.0, 21, 5, ["1", "2", "3", "6", "7"])
    assert (again["turn"], again["keep_turns"], again["new_tokens"]) == (2, 1, 6)
    anew = recording.line("a", 3.0, 12, 5, ["x", "y", "z"])
    assert (anew["keep_turns"], anew["new_tokens"]) == (0, 12)
    shorter = recording.line("a", 4.0, 13, 5, ["x", "y", "z"])  # no room for the answer before it
    assert (shorter["keep_turns"], shorter["new_tokens"]) == (0, 13)


def test_what_was_recorded_can_be_read(tmp_path: Path) -> None:
    recording = Recording(4)
    told: list[tuple[Any, ...]] = [
        ("a", 5.0, 10, 5, ["1", "2"]),
        ("a", 4.0, 20, 5, ["1", "2", "3", "4", "5"]),  # arrived first and ended last
        ("b", 6.0, 11, 5, ["1", "7"]),
        ("a", 7.0, 21, 5, ["1", "2", "3", "6", "7"]),
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(recording.line(*one)) + "\n" for one in told))
    a, b = load_trace(path).scripts
    assert (
        [turn.due_s for turn in a.turns] == [5.0, 5.0, 7.0] and a.prefix == b.prefix and a.prefix_tokens == 4
    )
    assert list(contexts(a)) == [15, 25, 26], "prompts and answers are as long as they were"
