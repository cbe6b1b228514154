from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pensieve.errors import ModelRefused, ModelUnavailable
from pensieve.worker import gguf_convert, random_weights
from pensieve.worker.gguf_convert import (
    converted_path,
    ensure_converted,
    file_hash,
    is_sound,
    read_manifest,
    sha256_of,
)
from pensieve.worker.weights import load, resolve
from tiny_gguf import SPECIAL, tiny_llama, write_gguf

CONVERT_ONE = """
import sys
from pathlib import Path
from types import SimpleNamespace
from pensieve.worker.gguf_convert import ensure_converted, file_hash
path = Path(sys.argv[1])
print(ensure_converted(lambda: path, file_hash(path), lambda what, share: print(what)))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path, Path]:
    """(model, its GGUF file, a cache that holds the conversion).

    Made once, copied by tests that damage it.
    """
    place = tmp_path_factory.mktemp("made")
    model = tiny_llama()
    gguf = write_gguf(place / "tiny.gguf", model)
    os.environ["PENSIEVE_CACHE"] = str(place / "cache")
    try:
        ensure_converted(lambda: gguf, file_hash(gguf))
    finally:
        del os.environ["PENSIEVE_CACHE"]
    return model, gguf, place / "cache"


@pytest.fixture
def cache(made: tuple[LlamaForCausalLM, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made[2], tmp_path / "cache")
    monkeypatch.setenv("PENSIEVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def never() -> Path:
    raise AssertionError("nothing needed converting")


def test_the_converted_model_computes_what_the_original_did(
    made: tuple[LlamaForCausalLM, Path, Path], cache: Path
) -> None:
    model, gguf, _ = made
    found = resolve(str(gguf), allow_random=False)
    assert (found.source, found.weights, found.label, found.note) == ("gguf", "real", "tiny.gguf", None)
    assert found.num_parameters == sum(p.numel() for p in model.parameters())
    ids = torch.tensor([[1, 40, 90, 7, 200, 130, 3]])
    assert torch.equal(load(found)(ids).logits, model(ids).logits)
    assert load(found, "float32").dtype == torch.float32


def test_the_files_own_stop_tokens_are_kept(made: tuple[LlamaForCausalLM, Path, Path], cache: Path) -> None:
    found = resolve(str(made[1]))
    assert found.eos_token_ids == (2, 0)  # end of sequence, end of turn
    loaded = load(found)
    assert loaded.config.eos_token_id == [2, 0]
    assert loaded.generation_config.bos_token_id == 1


def test_the_converted_tokenizer_reads_and_writes_every_text(
    made: tuple[LlamaForCausalLM, Path, Path], cache: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve(str(made[1])).tokenizer_dir)
    for text in (
        "hello 123",
        "😀 👩‍👩‍👧",
        "def f(x):\n\treturn x ** 2\n\n\n",
        "  lead",
        "日本語 naïve",
        "it's",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.encode(token) for token in SPECIAL] == [[0], [1], [2]]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.model_max_length) == (2, 1, 256)


def test_numbers_are_split_digit_by_digit_where_the_file_says_so(
    made: tuple[LlamaForCausalLM, Path, Path], cache: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve(str(made[1])).tokenizer_dir)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("\n\n  12"))
    assert tokens == ["ĊĊĠĠ", "1", "2"]  # GPT-2's own split gives "ĊĊ", "Ġ", "Ġ1", "2"


def test_an_unknown_way_to_split_text_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSIEVE_CACHE", str(tmp_path / "cache"))
    gguf = write_gguf(tmp_path / "odd.gguf", tiny_llama(), pre="unknown-split", eot=None)
    found = resolve(str(gguf))
    assert found.note is not None and "'unknown-split'" in found.note
    assert found.eos_token_ids == (2,)


def test_a_second_start_converts_and_hashes_nothing(
    made: tuple[LlamaForCausalLM, Path, Path], cache: Path, monkeypatch
) -> None:
    monkeypatch.setattr(gguf_convert, "sha256_of", lambda path: pytest.fail(f"hashed {path}"))
    monkeypatch.setattr(gguf_convert, "_convert", lambda *_: pytest.fail("converted again"))
    for name in (cache / "hashes").iterdir():  # the memo is keyed by path: the copy of the cache has the same
        assert json.loads(name.read_text())["stamps"][0][0] == str(made[1])
    folder = converted_path(json.loads(next((cache / "hashes").iterdir()).read_text())["sha256"])
    for name, entry in read_manifest(folder)["files"].items():
        os.utime(folder / name, ns=(entry["mtime_ns"], entry["mtime_ns"]))
    assert resolve(str(made[1])).folder == folder


def test_a_changed_file_of_the_same_name_is_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSIEVE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"one")
    assert file_hash(path) == file_hash(path) == sha256_of(path)
    path.write_bytes(b"two!")
    assert file_hash(path) == sha256_of(path)
    memo = next((tmp_path / "cache/hashes").iterdir())
    memo.write_text("{half")
    assert file_hash(path) == sha256_of(path)


DAMAGE = {
    "truncated weights": lambda f: os.truncate(f / "model.safetensors", 1000),
    "missing tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "edited config": lambda f: (f / "config.json").write_text(
        (f / "config.json").read_text().replace("llama", "lmama")
    ),
    "missing manifest": lambda f: (f / "manifest.json").unlink(),
    "half a manifest": lambda f: os.truncate(f / "manifest.json", 50),
    "manifest of another format": lambda f: (f / "manifest.json").write_text('{"format": 0, "files": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_conversion_is_built_again(
    made: tuple[LlamaForCausalLM, Path, Path], cache: Path, damage: str
) -> None:
    gguf = made[1]
    folder = converted_path(sha256_of(gguf))
    assert is_sound(folder)
    DAMAGE[damage](folder)
    assert not is_sound(folder)
    found = resolve(str(gguf))
    assert found.folder == folder and is_sound(folder, full=True)
    ids = torch.tensor([[1, 40, 90]])
    assert torch.equal(load(found)(ids).logits, made[0](ids).logits)
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


def test_a_short_file_is_seen_by_its_size_alone(
    made: tuple[LlamaForCausalLM, Path, Path], cache: Path
) -> None:
    folder = converted_path(sha256_of(made[1]))
    entry = read_manifest(folder)["files"]["model.safetensors"]
    os.truncate(folder / "model.safetensors", entry["bytes"] - 1)
    os.utime(folder / "model.safetensors", ns=(entry["mtime_ns"], entry["mtime_ns"]))
    assert not is_sound(folder)


def test_damage_that_keeps_size_and_time_is_found_when_loading_fails(
    made: tuple[LlamaForCausalLM, Path, Path], cache: Path
) -> None:
    found = resolve(str(made[1]))
    assert found.folder is not None
    weights = found.folder / "model.safetensors"
    entry = read_manifest(found.folder)["files"]["model.safetensors"]
    with weights.open("r+b") as file:
        file.seek(8)
        file.write(b"\0" * 64)  # of the header
    os.utime(weights, ns=(entry["mtime_ns"], entry["mtime_ns"]))
    assert is_sound(found.folder) and not is_sound(found.folder, full=True)
    ids = torch.tensor([[1, 40, 90]])
    assert torch.equal(load(found)(ids).logits, made[0](ids).logits)


def test_a_conversion_that_breaks_off_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSIEVE_CACHE", str(tmp_path))

    def breaks(path: Path, sha256: str, into: Path, *_: object) -> None:
        (into / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_convert, "_convert", breaks)
    killed = tmp_path / "converted" / f".{'ab' * 8}-left-by-a-kill"
    killed.mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        ensure_converted(lambda: tmp_path / "x.gguf", "ab" * 32)
    assert not converted_path("ab" * 32).exists()
    assert not any(path.is_dir() for path in (tmp_path / "converted").iterdir())


def test_two_processes_convert_once(made: tuple[LlamaForCausalLM, Path, Path], tmp_path: Path) -> None:
    environment = {**os.environ, "PENSIEVE_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CONVERT_ONE, str(made[1])]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0].splitlines() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert said[0][-1] == said[1][-1]
    assert sum(any(line.startswith("converting") for line in lines) for lines in said) == 1


def test_llama_3_rope_factors_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSIEVE_CACHE", str(tmp_path / "cache"))
    rope = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    scaled = tiny_llama(rope=rope)
    plain = 1.0 / 500_000.0 ** (torch.arange(0, 8, 2).float() / 8)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled.config, torch.device("cpu"))
    known = resolve(str(write_gguf(tmp_path / "known.gguf", scaled, rope_factors=plain / frequencies)))
    assert known.note is None
    assert known.config.rope_parameters == {**rope, "rope_theta": 500_000.0}
    ids = torch.arange(200)[None]
    assert torch.equal(load(known)(ids).logits, scaled(ids).logits)
    assert not torch.equal(tiny_llama()(ids).logits, scaled(ids).logits)

    odd = write_gguf(tmp_path / "odd.gguf", scaled, rope_factors=torch.tensor([1.0, 3.0, 2.0, 5.0]))
    with pytest.raises(ModelRefused, match=r"odd\.gguf cannot be converted: its rotary frequency factors"):
        resolve(str(odd))


def test_what_is_no_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSIEVE_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.gguf"
    text.write_text("not at all")
    with pytest.raises(ModelRefused, match=r"text\.gguf is not a readable GGUF file"):
        resolve(str(text))
    whole = write_gguf(tmp_path / "whole.gguf", tiny_llama())
    os.truncate(whole, whole.stat().st_size // 2)
    with pytest.raises(ModelRefused, match=r"whole\.gguf"):
        resolve(str(whole))


def test_missing_packages_are_named_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSIEVE_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelUnavailable, match=r"the package gguf: pip install 'pensieve-serve\[gguf\]'"):
        ensure_converted(never, "cd" * 32)


def test_a_transformers_that_builds_wrong_tokenizers_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.17.0")
    with pytest.raises(ModelUnavailable, match=r"needs transformers 5\.23 or later.*this is 5\.17\.0"):
        gguf_convert.require_packages()


def test_no_room_on_the_disk_or_in_memory_is_said_with_sizes(
    made: tuple[LlamaForCausalLM, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSIEVE_CACHE", str(tmp_path))
    monkeypatch.setattr(gguf_convert.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(ModelUnavailable, match=r"0\.0 GB are free"):
        resolve(str(made[1]))
    monkeypatch.setattr(random_weights, "available_bytes", lambda device="cpu": 1 << 10)
    with pytest.raises(ModelRefused, match=r"tiny\.gguf does not fit: its 0\.00 billion weights"):
        resolve(str(made[1]))
    with pytest.raises(ModelRefused, match=r"tiny\.gguf does not fit: converting it takes"):
        ensure_converted(lambda: made[1], file_hash(made[1]))
