"""Plans of whole runs: who plays what from when."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import pytest

from pensieve.errors import ConfigError
from pensieve.workloads.arrivals import ThinkTime
from pensieve.workloads.scripts import (
    Script,
    ScriptTurn,
    Shape,
    as_recorded,
    closed_loop,
    faster,
    fitting,
    open_loop,
)

SHAPE = Shape(3, new_tokens=10, output_tokens=5, first_tokens=40, think=ThinkTime(2.0))


def test_a_shape_s_conversations_differ_in_name_and_think_times_only() -> None:
    first, second = SHAPE.script(0), SHAPE.script(1)
    assert [turn.new_tokens for turn in first.turns] == [40, 10, 10]
    assert first.turns == second.turns and first.name != second.name
    exponential = Shape(3, 10, 5, think=ThinkTime(2.0, exponential=True))
    assert exponential.script(0).turns != exponential.script(1).turns


@pytest.mark.parametrize(
    "wrong", [{"num_turns": 0}, {"new_tokens": 0}, {"output_tokens": -1}, {"first_tokens": 0}]
)
def test_a_shape_without_tokens_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Shape(**({"num_turns": 1, "new_tokens": 1, "output_tokens": 1} | wrong))


def test_users_share_scripts_out_and_begin_without_thinking() -> None:
    players = closed_loop([SHAPE.script(index) for index in range(5)], 2, starts_s=3.0)
    assert [[script.name for script in player.scripts] for player in players] == [["0", "2", "4"], ["1", "3"]]
    assert [player.start_s for player in players] == [0.0, 1.5]
    assert [[script.turns[0].think_s for script in player.scripts] for player in players] == [
        [0.0, 2.0, 2.0],
        [0.0, 2.0],
    ]
    assert players[0].num_turns == 9
    with pytest.raises(ConfigError, match="lower the number of users"):
        closed_loop([SHAPE.script(0)], 2)


def test_turns_arrive_at_the_rate_asked_for() -> None:
    scripts = (SHAPE.script(index) for index in itertools.count())
    players = open_loop(scripts, 3.0, rate_per_s=6.0, duration_s=1000.0, seed=3)
    assert sum(player.num_turns for player in players) / 1000.0 == pytest.approx(6.0, rel=0.1)
    gaps_s = [b.start_s - a.start_s for a, b in itertools.pairwise(players)]
    assert statistics.stdev(gaps_s) == pytest.approx(
        statistics.fmean(gaps_s), rel=0.1
    )  # Poisson: gaps are exponential
    assert all(player.start_s < 1000.0 for player in players)


def test_arrivals_end_with_the_scripts() -> None:
    assert len(open_loop([SHAPE.script(0), SHAPE.script(1)], 3.0, 6.0, 1000.0)) == 2
    with pytest.raises(ConfigError, match="take a longer duration"):
        open_loop([SHAPE.script(0)], 3.0, 0.001, 1.0)


def timed(name: str, *due_s: float) -> Script:
    return Script(name, tuple(ScriptTurn(10, 5, due_s=time_s) for time_s in due_s))


def test_recorded_conversations_begin_when_they_did() -> None:
    scripts = [timed("late", 9.0, 10.0), timed("early", 1.0)]
    assert [(player.start_s, player.scripts[0].name) for player in as_recorded(scripts)] == [
        (1.0, "early"),
        (9.0, "late"),
    ]
    assert len(as_recorded(scripts, until_s=5.0)) == 1
    with pytest.raises(ConfigError, match="take a longer duration"):
        as_recorded(scripts, until_s=0.5)


def test_faster_divides_every_time() -> None:
    script = faster(Script("a", (ScriptTurn(1, 1, think_s=4.0), ScriptTurn(1, 1, due_s=8.0))), 2.0)
    assert (script.turns[0].think_s, script.turns[0].due_s, script.turns[1].due_s) == (2.0, None, 4.0)
    with pytest.raises(ConfigError, match="positive"):
        faster(script, 0.0)


def test_turns_that_do_not_fit_are_left_out() -> None:
    script = SHAPE.script(0)  # 45, 60, 75 tokens
    assert [len(kept.turns) if (kept := fitting(script, limit)) else 0 for limit in (44, 45, 74, 75)] == [
        0,
        1,
        2,
        3,
    ]
    assert fitting(script, 75, template_tokens=1.0) == Script("0", script.turns[:2])
    cut_back = Script("x", (ScriptTurn(40, 5), ScriptTurn(40, 5), ScriptTurn(40, 5, keep_turns=1)))
    assert fitting(cut_back, 90) == cut_back, "the last turn goes on from the first"
