"""`python benchmarks/paper`: simulates figures and writes them to a folder."""

import argparse
import sys
from pathlib import Path

if not __package__:  # Python puts this folder on its path; the modules are found in their package only
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from paper.command import write_figures
from pensieve.errors import PensieveError


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/paper", description="Simulate the paper's figures."
    )
    parser.add_argument("--figures", default="all", help="10a | 3,4,10b-d | all (the default)")
    parser.add_argument(
        "--out", type=Path, default=Path("figures"), help="folder for the page and its pictures"
    )
    parser.add_argument("--jobs", type=int, default=None, help="processes (default: one per core)")
    options = parser.parse_args()
    try:
        write_figures(options.figures, options.out, options.jobs)
    except PensieveError as error:
        sys.exit(f"error: {error.message}")


if __name__ == "__main__":
    main()
