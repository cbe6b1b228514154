from __future__ import annotations

import json
from pathlib import Path

import filelock
import pytest
from click.testing import CliRunner

from pensieve.cli.models import models
from pensieve.errors import ConfigError
from pensieve.worker import conversions, embedded
from pensieve.worker.gguf_convert import FORMAT

A, B, C = "a" * 64, "ab" + "c" * 62, "d" * 64


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two finished conversions, one of an older format, one damaged and one unfinished."""
    monkeypatch.setenv("PENSIEVE_CACHE", str(tmp_path))
    folder = tmp_path / "converted"
    made(folder / f"{A}-v{FORMAT}", "one.gguf", 1000)
    made(folder / f"{A}-v{FORMAT - 1}", "one.gguf", 500)
    made(folder / f"{embedded.GGUF_SHA256}-v{FORMAT}", embedded.GGUF_NAME, 10)
    made(folder / f"{B}-v{FORMAT}", "one.gguf", 10)
    (folder / f"{C}-v{FORMAT}").mkdir()
    made(folder / f".{A[:16]}-half" / "model", "one.gguf", 70)
    (folder / f"{A}.lock").touch()
    return folder


def made(folder: Path, name: str, size: int) -> None:
    folder.mkdir(parents=True)
    manifest = json.dumps({"format": FORMAT, "source": {"name": name}})
    (folder / "manifest.json").write_text(manifest)
    (folder / "model.safetensors").write_bytes(b"0" * (size - len(manifest)))


def test_all_that_was_converted_is_listed_with_its_size(place: Path) -> None:
    found = {
        (one.name, one.sha256[:3], one.state, one.format): one.num_bytes for one in conversions.converted()
    }
    assert found[("one.gguf", "aaa", "ready", FORMAT)] == 1000
    assert found[("one.gguf", "aaa", "old format", FORMAT - 1)] == 500
    assert found[("one.gguf", "aaa", "unfinished", None)] > 0
    assert ("one.gguf", "abc", "ready", FORMAT) in found
    assert ("?", "ddd", "damaged", FORMAT) in found
    assert (embedded.NAME, embedded.GGUF_SHA256[:3], "ready", FORMAT) in found
    assert len(found) == 6


def test_the_command_lists_and_prints_json(place: Path) -> None:
    shown = CliRunner().invoke(models, ["--cached"]).output
    assert (
        "one.gguf" in shown
        and "smollm2" in shown
        and "old format: not used any more" in shown
        and "GB together" in shown
    )
    rows = json.loads(CliRunner().invoke(models, ["--cached", "--json"]).output)
    assert {row["state"] for row in rows} == {"ready", "old format", "damaged", "unfinished"}
    assert all(row["changed"] and Path(row["path"]).exists() for row in rows)


def test_one_is_removed_by_its_hash_with_all_that_is_left_of_it(place: Path) -> None:
    gone = conversions.remove("aaaa")
    assert {one.state for one in gone} == {"ready", "old format", "unfinished"}
    assert not list(place.glob(f"{A}-*")) and not list(place.glob(".*-half"))
    assert (place / f"{B}-v{FORMAT}").exists()


def test_a_name_of_several_files_must_be_told_apart(place: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"'one\.gguf' stands for 2 conversions: name one by its hash \(aaaaaaaaaaaa, abcccccccccc\)",
    ):
        conversions.remove("one.gguf")
    conversions.remove("abcc")
    assert len(conversions.remove("one.gguf")) == 3


def test_the_default_model_is_removed_by_its_name(place: Path) -> None:
    assert [one.name for one in conversions.remove("smollm2")] == ["smollm2"]


@pytest.mark.parametrize("which", ["two.gguf", "eeee", "a", ""])
def test_what_is_not_there_is_said(place: Path, which: str) -> None:
    with pytest.raises(ConfigError, match="nothing converted is called"):
        conversions.remove(which)


def test_one_that_is_being_built_is_left_alone(place: Path) -> None:
    with filelock.FileLock(place / f"{A}.lock"):
        with pytest.raises(ConfigError, match="is being converted by another process"):
            conversions.remove(A)
        assert A not in {one.sha256 for one in conversions.remove("all")}
        assert (place / f"{A}-v{FORMAT}").exists() and list(place.glob(".*-half"))
    conversions.remove("all")
    assert conversions.converted() == []


def test_an_empty_cache_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSIEVE_CACHE", str(tmp_path))
    assert "Nothing converted lies in" in CliRunner().invoke(models, ["--cached"]).output
    assert CliRunner().invoke(models, ["--remove", "all"]).output == "Nothing to remove.\n"
    assert json.loads(CliRunner().invoke(models, ["--cached", "--json"]).output) == []
