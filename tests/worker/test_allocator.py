"""Freed memory is kept: asked of a process of its own, since the setting lasts as long as the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROBE = """
import resource, sys, torch
from pensieve.worker.allocator import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def work():
    parts = [torch.ones(n << 18) for n in (1, 2, 3, 4)]  # 1 to 4 MB each
    return sum(float(part[0]) for part in parts)
for _ in range(20):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    result = subprocess.run([sys.executable, "-c", PROBE, mode], capture_output=True, text=True, timeout=60, check=True)
    return int(result.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_steps_after_the_first_get_no_fresh_pages() -> None:
    assert faults("keep") < 100  # one a step; without it there are 50 to 2,000 a step, as huge pages have it
