"""Conversations like a dataset's: its means, its shape, the same in any order."""

from __future__ import annotations

import math
from statistics import fmean

import pytest

from pensieve.errors import ConfigError
from pensieve.workloads.arrivals import ThinkTime
from pensieve.workloads.generators import LIKENESSES, MAX_CONTEXT, Generator, generator
from pensieve.workloads.scripts import Piece, Script, Shape, SystemPrompts, fitting

TABLE_2 = {"sharegpt-like": (5.56, 37.77, 204.58), "ultrachat-like": (3.86, 51.78, 257.81)}


def made(name: str, num: int, **options: object) -> list[Script]:
    one = Generator(LIKENESSES[name], **options)  # type: ignore[arg-type]
    return [one.script(index) for index in range(num)]


@pytest.mark.parametrize("name", TABLE_2)
def test_the_paper_s_means_hold_after_the_cut(name: str) -> None:
    scripts = made(name, 20_000, seed="means")
    turns = [turn for script in scripts for turn in script.turns]
    means = (
        len(turns) / len(scripts),
        fmean(turn.message_tokens for turn in turns),
        fmean(turn.output_tokens for turn in turns),
    )
    assert means == pytest.approx(TABLE_2[name], rel=0.02)
    for seed in range(3):
        assert fmean(len(script.turns) for script in made(name, 3200, seed=seed)) == pytest.approx(
            TABLE_2[name][0], rel=0.02
        )
    assert generator(name).mean_turns == TABLE_2[name][0]
    assert all(fitting(script, MAX_CONTEXT) == script for script in scripts), "nothing is cut a second time"


def test_the_tails_are_long_where_the_dataset_s_are() -> None:
    sharegpt, ultrachat = (sorted(len(script.turns) for script in made(name, 4000)) for name in TABLE_2)
    assert 0.22 < sharegpt.count(1) / 4000 < 0.32 and sharegpt[2000] == 3 and sharegpt[3960] > 35
    assert [one.num_turns(math.nextafter(1.0, 0.0)) > 15 for one in LIKENESSES.values()] == [True, True]
    assert ultrachat.count(1) / 4000 < 0.1 and ultrachat[2000] == 4 and ultrachat[-1] < 20


def test_a_conversation_is_a_function_of_seed_and_number() -> None:
    one = generator("sharegpt-like", ThinkTime(3.0, exponential=True), seed=7)
    forward = [one.script(index) for index in range(20)]
    assert [one.script(index) for index in reversed(range(20))] == forward[::-1]
    assert forward[0] == generator("sharegpt-like", ThinkTime(3.0, exponential=True), seed=7).script(0)
    assert (
        forward[0].turns
        != generator("sharegpt-like", ThinkTime(3.0, exponential=True), seed=8).script(0).turns
    )
    assert len({script.name for script in forward}) == 20


def test_a_share_begins_with_a_system_prompt() -> None:
    scripts = made("ultrachat-like", 2000, system=SystemPrompts(3, 500, 0.4))
    begun = [script for script in scripts if script.prefix]
    assert 0.36 < len(begun) / 2000 < 0.44
    assert {script.prefix for script in begun} == {(Piece(f"system-{which}", 500),) for which in range(3)}
    assert begun[0].prefix_tokens == 500
    shape = Shape(2, 10, 5, system=SystemPrompts(1, 500))
    assert shape.script(0).prefix == shape.script(1).prefix and fitting(shape.script(0), 514) is None


def test_mean_turns_follow_a_longer_beginning() -> None:
    crowded = Generator(LIKENESSES["sharegpt-like"], system=SystemPrompts(1, 10_000))
    assert crowded.mean_turns < 0.97 * TABLE_2["sharegpt-like"][0]


def test_system_prompts_in_words() -> None:
    assert SystemPrompts.parse("4:500") == SystemPrompts(4, 500) and SystemPrompts.parse(
        "4:500:0.3"
    ) == SystemPrompts(4, 500, 0.3)
    assert str(SystemPrompts.parse("4:500:0.3")) == "4:500:0.3"
    for wrong in ("", "4", "4:x", "4:500:0.3:1", "0:5", "4:0", "4:500:0", "4:500:1.5", "4:500:nan", "4.5:10"):
        with pytest.raises(ConfigError, match="system prompts"):
            SystemPrompts.parse(wrong)


def test_what_cannot_be_made() -> None:
    with pytest.raises(ConfigError, match="take sharegpt-like or ultrachat-like"):
        generator("sharegpt")
    with pytest.raises(ConfigError, match="max_context must be at least"):
        Generator(LIKENESSES["sharegpt-like"], max_context=1000)
