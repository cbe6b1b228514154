"""The check of the source tree finds litter, and passes where there is none or no git."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import check_tree

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with one text file, one picture in docs/, and one ignored database."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "code.py").write_text("x = 1\n")
    (tmp_path / "docs" / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".gitignore").write_text("*.db\n")
    (tmp_path / "store.db").write_bytes(b"SQLite\0")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    return tmp_path


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


def test_a_clean_tree_passes(tree: Path) -> None:
    assert check_tree.main(tree) == 0


def test_a_file_that_git_does_not_know_fails(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "left behind").write_text("by a test")
    assert check_tree.main(tree) == 1
    assert "left behind: not in git" in capsys.readouterr().err


def test_a_binary_file_outside_docs_fails(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "memory").write_bytes(b"SQLite format 3\0")
    git(tree, "add", "memory")
    assert check_tree.main(tree) == 1
    assert "memory: a binary file" in capsys.readouterr().err


def test_a_tree_without_git_passes(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(tree / ".git")
    (tree / "left behind").write_text("by a test")
    assert check_tree.main(tree) == 0
    assert "no git checkout" in capsys.readouterr().out
