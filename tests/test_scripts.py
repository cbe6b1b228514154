"""The two checks that users run by name: they pass, and a planted bug makes each fail and say so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"

LEAK = """
from pensieve.core.places import Places
def leak(self, chunk, tier):
    chunk.slots[tier] = None  # and the slot is never given back
Places._free_slot = leak
"""
NO_LEASES = """
from pensieve.core.places import Places
def forget(self, chunk, change):
    self.reindex(chunk)  # leases are not counted
Places.lease = forget
"""


def run(script: str, planted: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import runpy, sys\nsys.path.insert(0, {str(SCRIPTS)!r})\n{planted}\nrunpy.run_path({str(SCRIPTS / script)!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize(
    ("script", "summary"),
    [
        ("test_memory_safety.py", "memory safety: 5 of 5 checks passed"),
        ("test_chunk_pinning.py", "chunk pinning: 6 of 6 checks passed"),
    ],
)
def test_the_check_passes(script: str, summary: str) -> None:
    result = run(script)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == summary


@pytest.mark.parametrize(("script", "planted"), [("test_memory_safety.py", LEAK), ("test_chunk_pinning.py", NO_LEASES)])
def test_a_planted_bug_makes_it_fail(script: str, planted: str) -> None:
    result = run(script, planted)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "FAIL" in result.stdout
    assert "FAILED" in result.stdout.splitlines()[-1]
