"""Fails when the source tree holds litter: files that git does not know, or binary files where only text belongs.

    python tests/check_tree.py [FOLDER]

`make test` runs it before and after the tests, so that neither a forgotten `git add` nor a file that a test leaves
behind goes unseen. Files that .gitignore names do not count. Without git, or outside a checkout, there is nothing to
compare with: it says so and passes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

PICTURES = ("docs/", "benchmarks/results/")  # where binary files belong
HEAD_BYTES = 8000  # git, too, calls a file binary if there is a NUL among its first 8,000 bytes


def untracked(root: Path) -> list[str]:
    """Files that are neither tracked nor ignored."""
    return _listed(root, "--others", "--exclude-standard")


def misplaced_binaries(root: Path) -> list[str]:
    """Tracked binary files outside of `PICTURES`."""
    return [
        name
        for name in _listed(root, "--cached")
        if not name.startswith(PICTURES) and (root / name).is_file() and _is_binary(root / name)
    ]


def _is_checkout(root: Path) -> bool:
    if shutil.which("git") is None or not (root / ".git").exists():
        return False
    return subprocess.run(["git", "rev-parse"], cwd=root, capture_output=True).returncode == 0


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(HEAD_BYTES)


def _listed(root: Path, *options: str) -> list[str]:
    found = subprocess.run(["git", "ls-files", "-z", *options], cwd=root, check=True, capture_output=True)
    return sorted({name for name in found.stdout.decode().split("\0") if name})


def main(root: Path) -> int:
    """The exit status: 1 if there is litter."""
    if not _is_checkout(root):
        print(f"{root} is no git checkout: its files were not checked")
        return 0
    strangers, binaries = untracked(root), misplaced_binaries(root)
    for name in strangers:
        print(f"{name}: not in git; add it, remove it, or name it in .gitignore", file=sys.stderr)
    for name in binaries:
        print(f"{name}: a binary file; those belong into {' or '.join(PICTURES)}", file=sys.stderr)
    return 1 if strangers or binaries else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()))
