"""Traces as others published them: requests without conversations."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from pensieve.errors import ConfigError
from pensieve.workloads.scripts import Script, as_recorded
from pensieve.workloads.traces import load_trace

BLOCK = 512


def request(
    at_ms: object, tokens: object, blocks: object, output: object = 10, **more: object
) -> dict[str, object]:
    return {"timestamp": at_ms, "input_length": tokens, "output_length": output, "hash_ids": blocks} | more


def write(path: Path, *records: object) -> Path:
    path.write_text(
        "\n".join(record if isinstance(record, str) else json.dumps(record) for record in records)
    )
    return path


def mooncake(path: Path, *records: object) -> tuple[Script, ...]:
    trace = load_trace(write(path / "m.jsonl", *records))
    assert (trace.form, trace.timed) == ("mooncake", True)
    return trace.scripts


def raw_hit_rate(records: list[dict[str, object]]) -> float:
    """Of blocks, with a cache that forgets nothing."""
    seen: set[int] = set()
    hits = total = 0
    for record in records:
        blocks: list[int] = record["hash_ids"]  # type: ignore[assignment]
        hits += sum(block in seen for block in blocks)
        total += len(blocks)
        seen.update(blocks)
    return hits / total


def script_hit_rate(scripts: tuple[Script, ...]) -> float:
    """The same, from scripts: what begins alike, and each turn's history but for its last answer (which no prompt held yet)."""
    seen: set[tuple[str, ...]] = set()
    hits = total = 0
    for player in as_recorded(scripts):
        (script,) = player.scripts
        for stop in range(1, len(script.prefix) + 1):
            path = tuple(piece.name for piece in script.prefix[:stop])
            hits += script.prefix[stop - 1].tokens // BLOCK if path in seen else 0
            seen.add(path)
        prompt, history = 0, script.prefix_tokens
        for turn in script.turns:
            hits += prompt // BLOCK
            prompt = history + turn.message_tokens
            history = prompt + turn.output_tokens
            total += -(-prompt // BLOCK)
    return hits / total


def test_requests_become_turns_of_conversations(tmp_path: Path) -> None:
    first, second = mooncake(
        tmp_path,
        request(0, 1200, [0, 1, 2]),
        request(1500, 2600, [0, 1, 3, 4, 5, 6], output=0),
        request(1700, 1500, [0, 7, 8]),  # begins alike, and is somebody else's
        request(9000, 3000, [0, 1, 3, 4, 5, 9]),
    )
    assert [(turn.due_s, turn.new_tokens, turn.output_tokens) for turn in first.turns] == [
        (0.0, 688, 10),
        (1.5, 1390, 1),
        (9.0, 399, 10),
    ]
    assert [(turn.due_s, turn.new_tokens) for turn in second.turns] == [(1.7, 988)]
    assert first.prefix == second.prefix and first.prefix_tokens == BLOCK
    assert (first.name, second.name) == ("line-1", "line-3") and str(second.where).endswith("m.jsonl, line 3")


def test_a_prompt_without_room_for_the_answer_before_is_another_conversation(tmp_path: Path) -> None:
    first, again = mooncake(tmp_path, request(0, 1100, [0, 1, 2]), request(5, 1100, [0, 1, 2]))
    assert (
        [len(first.turns), len(again.turns)] == [1, 1]
        and first.prefix == again.prefix
        and first.prefix_tokens == 2 * BLOCK
    )


def test_whose_a_prompt_is_that_all_began_nobody_knows(tmp_path: Path) -> None:
    scripts = mooncake(
        tmp_path, request(0, 600, [0, 1]), request(1, 590, [0, 2]), request(2, 2000, [0, 3, 4, 5])
    )
    assert [len(script.turns) for script in scripts] == [1, 1, 1] and all(
        script.prefix_tokens == BLOCK for script in scripts
    )


def test_a_prompt_of_whole_blocks_keeps_a_message(tmp_path: Path) -> None:
    first, second = mooncake(tmp_path, request(0, 1024, [0, 1]), request(1, 1024, [0, 1]))
    assert [(script.prefix_tokens, script.turns[0].new_tokens) for script in (first, second)] == [
        (BLOCK, BLOCK)
    ] * 2


def busy_hour(num: int) -> list[dict[str, object]]:
    """Requests of conversations that begin with one of 3 system prompts and grow."""
    rng = random.Random(1)
    fresh = iter(range(100, 10**9))
    talks: list[tuple[list[int], int]] = []  # blocks of the latest prompt, its tokens
    records = []
    for at in range(num):
        if talks and rng.random() < 0.4:
            which = rng.randrange(len(talks))
            blocks, tokens = talks[which]
            blocks, tokens = blocks[: tokens // BLOCK], tokens + rng.randint(20, 3000)
        else:
            which = len(talks)
            talks.append(([], 0))
            blocks, tokens = [[0], [0, 1], [2, 3, 4]][rng.randrange(3)], rng.randint(1600, 9000)
        blocks = [*blocks, *(next(fresh) for _ in range(-(-tokens // BLOCK) - len(blocks)))]
        talks[which] = (blocks, tokens)
        records.append(request(at * 10, tokens, blocks, output=rng.randint(1, 15)))
    return records


def test_what_can_be_found_in_a_cache_survives(tmp_path: Path) -> None:
    records = busy_hour(800)
    scripts = mooncake(tmp_path, *records)
    assert sum(len(script.turns) for script in scripts) == len(records)
    assert raw_hit_rate(records) > 0.25
    assert script_hit_rate(scripts) == pytest.approx(raw_hit_rate(records), abs=0.005)


def test_a_long_file_takes_seconds(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", *busy_hour(8000))
    begun_s = time.process_time()
    assert sum(len(script.turns) for script in load_trace(path).scripts) == 8000
    assert time.process_time() - begun_s < 5.0


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (request(-1, 600, [0, 1]), '"timestamp" must be a number of milliseconds of at least 0, got -1'),
        (request(float("nan"), 600, [0, 1]), '"timestamp"'),
        (request("soon", 600, [0, 1]), '"timestamp"'),
        (request(4, 600, [0, 1]), '"timestamp" must not go back: it is 4 ms after 5 ms'),
        (request(5, -600, [0, 1]), '"input_length" must be a whole number of at least 1, got -600'),
        (request(5, 600.5, [0, 1]), '"input_length"'),
        (request(5, 600, [0, 1], output=-1), '"output_length" must be a whole number of at least 0, got -1'),
        (request(5, 600, [0, 1], output=None), '"output_length"'),
        (request(5, 600, "01"), '"hash_ids" must be a list'),
        (request(5, 600, [0, None]), '"hash_ids" must be a list'),
        (request(5, 600, [0]), "2 for 600, got 1"),
        (request(5, 600, [0, 1], sesion="x"), "unknown field 'sesion'"),
        ({"timestamp": 5, "input_length": 600, "output_length": 1}, '"hash_ids"'),
        ({"input_length": 600, "output_length": 1, "hash_ids": [0, 1]}, '"timestamp"'),
        ("[1]", "must be a JSON object"),
        ("{", "not JSON"),
    ],
)
def test_a_bad_request_is_named(tmp_path: Path, second: object, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_trace(write(tmp_path / "m.jsonl", request(5, 600, [0, 1]), second))
    assert "m.jsonl, line 2: " in caught.value.message and words in caught.value.message


# -- Azure

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


def test_requests_of_lengths_alone(tmp_path: Path) -> None:
    rows = [
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:50.1805900,396,0\r",
        "",
        "2023-11-16 19:15:46.6805900,5,1",
    ]
    trace = load_trace(write(tmp_path / "a.csv", HEADER + "\r", *rows))
    assert (trace.form, trace.timed) == ("azure", True)
    assert [
        (s.name, s.turns[0].due_s, s.turns[0].new_tokens, s.turns[0].output_tokens) for s in trace.scripts
    ] == [
        ("line-2", 0.0, 374, 44),
        ("line-3", 3.5, 396, 1),
        ("line-5", 3600.0, 5, 1),
    ]
    zoned = load_trace(
        write(
            tmp_path / "b.csv",
            HEADER,
            "2024-05-10 00:00:00.009930+00:00,2162,5",
            "2024-05-10 00:00:01+00:00,1,1",
        )
    )
    assert zoned.scripts[1].turns[0].due_s == pytest.approx(0.99007)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("2023-11-16 18:15:45,1,1", "TIMESTAMP must not go back"),
        ("2023-11-16 18:15:47+00:00,1,1", "time zone"),
        ("yesterday,1,1", "must be a date and time (2023-11-16 18:15:46.68), got 'yesterday'"),
        ("2023-11-16 18:15:47,-1,1", "ContextTokens must be a whole number of at least 1, got -1"),
        ("2023-11-16 18:15:47,0,1", "ContextTokens"),
        ("2023-11-16 18:15:47,1.5,1", "ContextTokens"),
        ("2023-11-16 18:15:47,1,-1", "GeneratedTokens must be a whole number of at least 0, got -1"),
        ("2023-11-16 18:15:47,1,nan", "GeneratedTokens"),
        ("2023-11-16 18:15:47,1", "must have 3 values"),
        ("2023-11-16 18:15:47,1,1,1", "must have 3 values"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_trace(write(tmp_path / "a.csv", HEADER, "2023-11-16 18:15:46.68,374,44", row))
    assert "a.csv, line 3: " in caught.value.message and words in caught.value.message


def test_a_header_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no request below its header"):
        load_trace(write(tmp_path / "a.csv", HEADER))
