"""Conversations from every form a file may have, and what is said about files that have none."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from pensieve.errors import ConfigError
from pensieve.workloads.conversations import (
    Conversation,
    load_dataset,
    random_tokens,
    select,
    text_length_tokens,
)


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_the_shipped_conversations_are_many_long_and_varied() -> None:
    shipped = load_dataset()
    assert len(shipped) == 24
    assert len({c.id for c in shipped}) == 24
    words = [len(turn.split()) for c in shipped for turn in c.turns]
    assert min(len(c.turns) for c in shipped) >= 12
    assert 20 <= min(words) < 30
    assert 90 < max(words) <= 120
    assert len({turn for c in shipped for turn in c.turns}) == len(words), "no turn comes twice"
    shared = Counter(c.system for c in shipped if c.system)
    assert len(shared) == 3
    assert min(shared.values()) >= 2, "every system prompt is shared"
    assert all(140 <= len(system.split()) <= 180 for system in shared)


def test_our_own_form_one_object_a_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "own.jsonl",
        {"id": "a", "system": "Be kind.", "turns": ["one", "two"]},
        {"turns": ["three"]},
    )
    assert load_dataset(path) == [
        Conversation("a", "Be kind.", ("one", "two")),
        Conversation("line-2", None, ("three",)),
    ]


def test_mt_bench_questions_keep_their_number(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.jsonl", {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]}
    )
    assert load_dataset(path) == [Conversation("81", None, ("Write.", "Rewrite."))]


def test_chat_messages_keep_the_users_side(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "skipped"},
        {"role": "user", "content": [{"type": "text", "text": "tw"}, {"type": "text", "text": "o"}]},
        {"role": "user", "content": "  "},
    ]
    assert load_dataset(write(tmp_path / "m.jsonl", {"id": "m", "messages": messages})) == [
        Conversation("m", "S", ("one", "two"))
    ]


def test_sharegpt_lists(tmp_path: Path) -> None:
    path = tmp_path / "sharegpt.json"
    chats = [
        {
            "id": "x_0",
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "hello"},
                {"from": "user", "value": "bye"},
            ],
        },
        {"id": "empty", "conversations": []},
        {
            "id": "x_0",
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "gpt", "value": "?"},
                {"from": "human", "value": "again"},
            ],
        },
    ]
    path.write_text(json.dumps(chats, indent=2), encoding="utf-8")
    assert load_dataset(path) == [
        Conversation("x_0", None, ("hi", "bye")),
        Conversation("x_0#2", "S", ("again",)),
    ]


def test_a_repeated_id_never_takes_one_that_is_there(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *({"id": name, "turns": ["t"]} for name in ("a", "a#2", "a", "a")))
    ids = [c.id for c in load_dataset(path)]
    assert len(set(ids)) == 4
    assert ids[:2] == ["a", "a#2"]


def test_a_byte_order_mark_and_half_a_surrogate_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "bom.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + rb'{"id": "a", "turns": ["cut \ud83d", "whole \ud83d\ude00"]}' + b"\r\n"
    )
    (conversation,) = load_dataset(path)
    assert conversation.turns == ("cut �", "whole 😀")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"turns": ["a"]}\n{"turns": ["b"', r"bad\.json, line 2, column \d+: not JSON"),
        ("[{]", r"bad\.json, line 1, column 3: not JSON"),
        ('[{"turns": ["a"]}, 7]', r"bad\.json, index 1: a conversation must be a JSON object, got 7"),
        ('{"id": "a"}', r'bad\.json, line 1: none of "turns", "messages" or "conversations"'),
        ('{"turns": []}', r'line 1: "turns" must be a list of at least 1 text, got a list of 0'),
        ('{"turns": ["a", ""]}', r"line 1: turn 1 must be a text that is not blank, got the text ''"),
        ('{"turns": [3]}', r"turn 0 must be a text that is not blank, got 3"),
        ('{"id": ["a"], "turns": ["a"]}', r"the id must be a text or a whole number, got a list of 1"),
        ('{"system": 5, "turns": ["a"]}', r'"system" must be a text, got 5'),
        ('{"messages": {}}', r'"messages" must be a list of messages, got an object'),
        ('{"messages": [3]}', r"messages\[0\] must be an object, got 3"),
        (
            '{"messages": [{"role": "pirate", "content": "arr"}]}',
            r"\"role\" must be one of .*user.*, got 'pirate'",
        ),
        ('{"messages": [{"role": "user"}]}', r'messages\[0\]: "content" must be a text, got nothing'),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            r"has a part that is not text",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "S"}]}',
            r"must come before the first user message",
        ),
        (
            '{"conversations": [{"from": "human", "value": null}]}',
            r'conversations\[0\]: "value" must be a text, got nothing',
        ),
        ("", r"bad\.json holds no conversation with a user's turn"),
        ('{"messages": []}', r"holds no conversation with a user's turn"),
        ('{"turns": ' + "[" * 200_000, r"line 1.*(nested too deeply|not JSON)"),
    ],
)
def test_a_bad_file_is_named_with_the_place_and_the_limit(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=expected):
        load_dataset(path)


def test_bytes_that_are_not_utf8_are_located(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"turns": ["a"]}\n{"turns": ["caf\xe9"]}\n')
    with pytest.raises(ConfigError, match=r"line 2: not UTF-8 \(byte 0xe9 at offset 32\)"):
        load_dataset(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: No such file"):
        load_dataset(tmp_path / "none.json")


THREE = [
    Conversation("a", None, ("1", "2", "3")),
    Conversation("b", None, ("1",)),
    Conversation("c", "S", ("1", "2")),
]


def test_select_filters_and_cuts() -> None:
    found = select(THREE, 2, min_turns=2, max_turns=2)
    assert found.conversations == (Conversation("a", None, ("1", "2")), Conversation("c", "S", ("1", "2")))
    assert found.note is None


def test_select_repeats_under_new_ids_and_says_so() -> None:
    found = select([*THREE, Conversation("a~2", None, ("1", "2"))], 5, min_turns=2)
    assert [c.id for c in found.conversations] == ["a", "c", "a~2", "a~2~", "c~2"]
    assert found.note is not None
    assert "5 conversations were asked for and the dataset has 3" in found.note
    assert "2 are repeats" in found.note


@pytest.mark.parametrize(
    ("num", "min_turns", "max_turns", "expected"),
    [
        (0, 1, None, "number of conversations must be at least 1, got 0"),
        (1, 0, None, "min_turns must be at least 1, got 0"),
        (1, 3, 2, r"max_turns must be at least min_turns \(3\), got 2"),
        (1, 4, None, r"no conversation has 4 turns \(the longest of 3 has 3\)"),
    ],
)
def test_select_refuses_what_cannot_be(
    num: int, min_turns: int, max_turns: int | None, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        select(THREE, num, min_turns, max_turns)


def test_text_lengths_are_about_right() -> None:
    assert text_length_tokens("") == 1
    assert text_length_tokens("The quick brown fox jumps over the lazy dog.") == 11


def test_random_tokens_are_in_range_and_the_same_for_the_same_seed() -> None:
    tokens = random_tokens(1000, 50, "a")
    assert tokens == random_tokens(1000, 50, "a")
    assert tokens[:10] == random_tokens(10, 50, "a")
    assert tokens != random_tokens(1000, 50, "b")
    assert set(tokens) == set(range(50))
    assert random_tokens(0, 50, 1) == ()
    with pytest.raises(ConfigError, match="at least 1 token"):
        random_tokens(1, 0, 1)
    with pytest.raises(ConfigError, match="-1 tokens"):
        random_tokens(-1, 50, 1)


def test_lengths_of_recorded_answers_are_told(tmp_path: Path) -> None:
    messages = [
        {"role": "assistant", "content": "nobody asked"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "x" * 40},
        {"role": "tool", "content": "a long result " * 50},
        {"role": "assistant", "content": "y" * 8},
        {"role": "user", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": ""},
    ]
    (found,) = load_dataset(write(tmp_path / "m.jsonl", {"id": "m", "messages": messages}))
    assert found.answer_tokens == (12, None, None)
    assert select([found], 2, max_turns=1).conversations[1].answer_tokens == (12,)
