"""What must be told before anything imports torch or Triton."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# A thread a process, here and in every process that a test starts: several run side by side, and threads that wait for each other spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():  # Triton's kernels are interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The packages of benchmarks/ are not installed; their names come last, behind the modules of tests/.
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
