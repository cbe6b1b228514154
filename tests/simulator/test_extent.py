"""What a load asks of a machine: contexts are cut, refused with their line, or played as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pensieve.errors import ConfigError
from pensieve.simulator.extent import LONG_CHUNK, USERS, extent_of
from pensieve.workloads.load_plan import LoadOptions


def sessions(folder: Path, longest: int, count: int = 3) -> Path:
    path = folder / "sessions.jsonl"
    rows = [
        {"id": f"s{n}", "turns": [[1000, 10, 0, 0, 1], [longest if n == 1 else 2000, 10, 1000, 5, 1]]}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_made_conversations_are_cut_where_the_papers_are() -> None:
    found = extent_of(LoadOptions(rates=(1.0,), trace=Path("sharegpt-like")), 10_000, None, None)
    assert (found.max_context, found.chunk_tokens, found.load.max_context, found.remarks) == (
        16_384,
        32,
        16_384,
        (),
    )


def test_recorded_conversations_are_played_as_long_as_they_are(tmp_path: Path) -> None:
    found = extent_of(LoadOptions(trace=sessions(tmp_path, 100_000)), 200_000, None, None)
    assert found.max_context == 100_011 and found.chunk_tokens == LONG_CHUNK and found.load.users == 3 < USERS
    assert [word in " ".join(found.remarks) for word in ("3 at once", "100,011", str(LONG_CHUNK))] == [
        True
    ] * 3


def test_one_that_outgrows_the_first_tier_is_refused_with_its_line(tmp_path: Path) -> None:
    load = LoadOptions(trace=sessions(tmp_path, 100_000), users=2)
    with pytest.raises(
        ConfigError,
        match=r"sessions.jsonl, line 2: turn 1 of conversation 's1' needs 100010 tokens .* holds 50000: --max-context 50000",
    ):
        extent_of(load, 50_000, None, None)
    cut = extent_of(load, 50_000, 50_000, None)
    assert (cut.max_context, cut.chunk_tokens, cut.load.users) == (50_000, 32, 2)
    assert extent_of(load, 50_000, 50_000, 64).chunk_tokens == 64
