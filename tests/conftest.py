"""What must be told before anything imports torch or Triton."""

from __future__ import annotations

import os

# A thread a process, here and in every process that a test starts: several run side by side, and threads that wait for each other spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():  # Triton's kernels are interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")
