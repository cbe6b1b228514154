"""The Markdown pages say what is there: their links lead somewhere, the files, options and `make` targets they name exist."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")))
GUIDES = [page for page in PAGES if not {"log", "benchmarks"} & set(page.relative_to(ROOT).parts)]
GUIDES = [page for page in GUIDES if page.name != "CHANGELOG.md"]  # it names what was, too
OTHER_TOOLS = {  # of vLLM and torchrun
    "--enable-prompt-tokens-details",
    "--nproc-per-node",
    "--max-restarts",
    "--master-port",
    "--master-addr",
    "--nnodes",
    "--standalone",
}

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"`((?:[a-z_]+/)*[a-z_]+\.(?:py|c|h|md|json))`")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
WIDTH = 100


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = HEADING.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} leads nowhere"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{target}: {file.name} has no such heading"


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_files_named_in_guides_exist(page: Path) -> None:
    for name in FILE.findall(page.read_text(encoding="utf-8")):
        if "/" in name:
            places = [ROOT / name, ROOT / "src/pensieve" / name, ROOT / "src" / name, ROOT / "docs" / name]
            assert any(place.exists() for place in places), f"{name} is not there"


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_make_targets_named_in_guides_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in re.findall(r"`?make ([a-z]+(?:-[a-z]+)*)(?:`| +[#A-Z])", page.read_text(encoding="utf-8")):
        assert target in targets, f"there is no `make {target}`"


@pytest.fixture(scope="module")
def options() -> set[str]:
    """The options of all commands."""
    from pensieve.cli.commands import cli

    experiment = runpy.run_path(str(ROOT / "main.py"))["experiment"]
    return {option for command in commands(cli) for option in of(command)} | set(of(experiment)) | {"--help"}


def commands(command: click.Command) -> Iterator[click.Command]:
    yield command
    if isinstance(command, click.Group):
        for below in command.commands.values():
            yield from commands(below)


def of(command: click.Command) -> Iterator[str]:
    for parameter in command.params:
        yield from (*parameter.opts, *parameter.secondary_opts)


def test_options_named_in_guides_exist(options: set[str]) -> None:
    scripts = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "benchmarks").rglob("*.py"))
    for page in GUIDES:
        for option in OPTION.findall(page.read_text(encoding="utf-8")):
            known = option in options or option in OTHER_TOOLS or f'"{option}"' in scripts
            assert known, f"{name_of(page)} names {option}, which no command has"


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_prose_is_wrapped(page: Path) -> None:
    for line in FENCE.sub("", page.read_text(encoding="utf-8")).splitlines():
        if not line.startswith(("|", "    ", "!", "#")) and " " in line.strip():
            assert len(line) <= WIDTH, f"{line[:60]}... has {len(line)} columns"
