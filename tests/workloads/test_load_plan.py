"""What a load test asks for: conversations that are made."""

from __future__ import annotations

from pathlib import Path

import pytest

from pensieve.errors import ConfigError
from pensieve.workloads.load_plan import LoadOptions
from pensieve.workloads.scripts import SystemPrompts
from pensieve.workloads.traces import load_trace

SHAREGPT = Path("sharegpt-like")


def test_users_with_made_conversations() -> None:
    (run,) = LoadOptions(trace=SHAREGPT, users=3, conversations_per_user=2).plan()
    assert [[script.name for script in player.scripts] for player in run.players] == [
        ["0", "3"],
        ["1", "4"],
        ["2", "5"],
    ]


@pytest.mark.parametrize("limits", [{}, {"turns": 3}, {"max_context": 700}])
def test_made_conversations_arrive_without_end_at_the_rate_asked_for(limits: dict[str, int]) -> None:
    (run,) = LoadOptions(trace=SHAREGPT, rates=(4.0,), duration_s=3000.0, **limits).plan()  # type: ignore[arg-type]
    assert sum(player.num_turns for player in run.players) / 3000.0 == pytest.approx(4.0, rel=0.12)


def test_a_sweep_draws_others_for_each_rate() -> None:
    first, second = LoadOptions(trace=SHAREGPT, rates=(4.0, 4.0)).plan()
    assert first.players != second.players


def test_a_file_of_a_reserved_name_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ultrachat-like").write_text("{}")
    trace = load_trace("ultrachat-like", 64)
    assert (trace.form, trace.timed, len(trace.scripts)) == ("ultrachat-like", False, 1000)
    assert trace.generator is not None and trace.generator.script(7) == trace.scripts[7]


def test_system_prompts_are_for_made_conversations(tmp_path: Path) -> None:
    prompts = SystemPrompts(1, 50)
    (run,) = LoadOptions(users=2, system_prompts=prompts).plan()
    assert all(script.prefix_tokens == 50 for player in run.players for script in player.scripts)
    with pytest.raises(ConfigError, match="--system-prompts does not go with a recorded trace"):
        LoadOptions(trace=tmp_path / "t.jsonl", system_prompts=prompts)


def test_nothing_that_fits() -> None:
    with pytest.raises(ConfigError, match="raise it"):
        LoadOptions(trace=SHAREGPT, rates=(4.0,), max_context=2).plan()
