"""What pyproject.toml, constraints.txt and CHANGELOG.md say of the package agrees with what is there; `make dist` runs it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pensieve

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "pensieve"
NOT_PINNED = {"torch", "pensieve-serve"}  # the Makefile has torch's version


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_changelog_begins_with_this_version() -> None:
    released = re.findall(
        r"^## \[(\d[^\]]*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE
    )
    assert released[0][0] == pensieve.__version__
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", released[0][1])


def test_every_kind_of_packaged_data_is_there(project: dict[str, Any]) -> None:
    for pattern in project["tool"]["setuptools"]["package-data"]["pensieve"]:
        assert any(PACKAGE.glob(pattern)), f"no file is {pattern}"


def test_every_folder_of_code_is_a_package() -> None:
    folders = {file.parent for file in PACKAGE.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_every_requirement_is_pinned(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonicalize_name(line.split("==")[0]) for line in lines if "==" in line}
    extras = project["project"]["optional-dependencies"].values()
    wanted = [*project["project"]["dependencies"], *(word for extra in extras for word in extra)]
    names = {canonicalize_name(Requirement(word).name) for word in wanted} - NOT_PINNED
    assert names - pinned == set()
