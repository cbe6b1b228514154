"""The two checks that users run by name: they pass, and a planted bug makes each fail and say so."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pensieve.core.places import Places

SCRIPTS = Path(__file__).parent.parent / "scripts"


def leak(self: Places, chunk: Any, tier: int) -> None:
    chunk.slots[tier] = None  # and the slot is never given back


def no_leases(self: Places, chunk: Any, change: int) -> None:
    self.reindex(chunk)  # leases are not counted


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script's exit status. In this process: a new one would take longer to import torch than the checks take."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delitem(sys.modules, "lab", raising=False)

    def run(script: str) -> Any:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        return ended.value.code

    yield run
    sys.modules.pop("lab", None)


def test_a_check_runs_as_users_run_it() -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPTS / "test_chunk_pinning.py")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "chunk pinning: 6 of 6 checks passed"


def test_the_other_check_passes(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("test_memory_safety.py") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "memory safety: 5 of 5 checks passed"


@pytest.mark.parametrize(
    ("script", "method", "planted"),
    [("test_memory_safety.py", "_free_slot", leak), ("test_chunk_pinning.py", "lease", no_leases)],
)
def test_a_planted_bug_makes_it_fail(
    run: Any,
    script: str,
    method: str,
    planted: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Places, method, planted)
    assert run(script) == 1
    told = capsys.readouterr().out
    assert "FAIL" in told
    assert "FAILED" in told.splitlines()[-1]
