"""Observed think times: their quantiles, and files of them."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest

from pensieve.errors import ConfigError
from pensieve.workloads.arrivals import ThinkTime
from pensieve.workloads.gaps import CHATS, read_gaps


def test_gaps_of_chats() -> None:
    think = ThinkTime.parse("chats")
    assert str(think) == "chats" and think.mean_s == pytest.approx(38.8, abs=0.1)
    drawn = sorted(think.draw_s(1, conversation, 0) for conversation in range(8000))
    assert [round(drawn[int(share * 8000)]) for share in (0.1, 0.5, 0.9)] == [
        pytest.approx(gap, abs=4) for gap in (3, 17, 81)
    ]
    assert fmean(drawn) == pytest.approx(think.mean_s, rel=0.1) and drawn[0] >= 0 and drawn[-1] <= 3600
    assert think.draw_s(1, 5, 0) == think.draw_s(1, 5, 0) != think.draw_s(2, 5, 0)
    assert list(CHATS.shares) == sorted(set(CHATS.shares)) and list(CHATS.gaps_s) == sorted(CHATS.gaps_s)
    assert (CHATS.at(0.0), CHATS.at(1.0)) == (CHATS.gaps_s[0], CHATS.gaps_s[-1])


def test_gaps_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "gaps"
    path.write_text("\ufeff# seconds\r\n10\r\n\n0\n5.0\n")
    think = ThinkTime.parse(f"file:{path}")
    assert str(think) == f"file:{path}" and think.mean_s == 5.0
    gaps = read_gaps(path)
    assert [gaps.at(share) for share in (0.0, 0.25, 0.5, 1.0)] == [0.0, 2.5, 5.0, 10.0]
    path.write_text("7")
    assert ThinkTime.parse(f"file:{path}").draw_s(0, 0, 0) == 7.0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("1\n-2", "line 2: a gap must be a number of seconds of at least 0, got '-2'"),
        ("nan", "line 1"),
        ("1\n\nsoon", "line 3"),
        ("inf", "line 1"),
        ("\xff", "line 1"),
        ("\n# none\n", "holds no gap"),
    ],
)
def test_a_bad_file_of_gaps(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "gaps"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=words):
        ThinkTime.parse(f"file:{path}")


def test_a_file_of_gaps_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the gaps"):
        ThinkTime.parse(f"file:{tmp_path / 'nowhere'}")
    with pytest.raises(ConfigError, match="think time"):
        ThinkTime.parse("file:")
