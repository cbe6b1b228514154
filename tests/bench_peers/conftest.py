"""The package under test lies beside the other benchmarks, off the path; so do the fakes of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[2] / "benchmarks"), str(Path(__file__).parent)]
