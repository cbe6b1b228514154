"""What people type after --model: understood, or refused with the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pensieve.errors import ConfigError, ModelRefused
from pensieve.worker import naming
from pensieve.worker.naming import HubName, choose_gguf, hub_name
from pensieve.worker.weights import resolve
from tiny_gguf import tiny_llama, write_gguf


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PENSIEVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    (tmp_path / "in").mkdir()
    return write_gguf(tmp_path / "in" / "tiny-Q8_0.gguf", tiny_llama())


def found(spec: Path | str) -> str:
    resolved = resolve(str(spec), allow_random=False)
    assert resolved.source == "gguf" and resolved.eos_token_ids == (2, 0)
    return resolved.label


def test_a_gguf_is_known_by_its_first_bytes(gguf: Path) -> None:
    blob = gguf.rename(gguf.parent / f"sha256-{'a' * 64}")
    assert found(blob) == blob.name


def test_a_folder_with_one_gguf_is_that_model(gguf: Path) -> None:
    (gguf.parent / "README.md").write_text("about it")
    (gguf.parent / "mmproj-tiny-f16.gguf").write_bytes(b"GGUF the part that sees")
    assert found(gguf.parent) == gguf.name
    (gguf.parent / "config.json").write_text(
        '{"model_type": "llama"}'
    )  # as some repositories of GGUF files have it
    assert found(gguf.parent) == gguf.name


def test_a_folder_with_several_ggufs_lists_them(gguf: Path) -> None:
    (gguf.parent / "tiny-Q4_K_M.gguf").write_bytes(gguf.read_bytes())
    with pytest.raises(
        ConfigError, match=r"holds 2 GGUF models: name one of them, .*tiny-Q4_K_M\.gguf, .*tiny-Q8_0\.gguf"
    ):
        resolve(str(gguf.parent))


def test_parts_of_one_model_count_as_one() -> None:
    names = ["a-00001-of-00003.gguf", "a-00002-of-00003.gguf", "a-00003-of-00003.gguf", "mmproj.gguf"]
    assert naming.first_parts(names) == names[:1]
    assert naming.parts_of(names[0], names) == names[:3]


def ollama(gguf: Path, *place: str, kinds: tuple[str, ...] = ("model", "template")) -> None:
    root = naming.ollama_root()
    blob = root / "blobs" / f"sha256-{'b' * 64}"
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(gguf.read_bytes())
    manifest = root.joinpath("manifests", *place)
    manifest.parent.mkdir(parents=True)
    layers = [
        {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{'b' * 64}"}
        for kind in kinds
    ]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))


@pytest.mark.parametrize(
    ("spec", "place"),
    [
        ("llama3:8b", ("registry.ollama.ai", "library", "llama3", "8b")),
        ("nomad", ("registry.ollama.ai", "library", "nomad", "latest")),
        ("acme/tiny:q8", ("registry.ollama.ai", "acme", "tiny", "q8")),
        ("hf.co/acme/tiny:Q8_0", ("hf.co", "acme", "tiny", "Q8_0")),
    ],
)
def test_what_ollama_has_is_found_by_its_name(spec: str, place: tuple[str, ...], gguf: Path) -> None:
    ollama(gguf, *place)
    assert found(spec) == spec


def test_what_ollama_has_not_is_refused_with_the_way(gguf: Path) -> None:
    with pytest.raises(ConfigError, match=r"reads like an Ollama name.*`ollama pull llama3:8b`.*\.gguf file"):
        resolve("llama3:8b")
    ollama(gguf, "registry.ollama.ai", "library", "tuned", "latest", kinds=("model", "adapter"))
    with pytest.raises(ConfigError, match="adapter"):
        resolve("tuned")
    (naming.ollama_root() / "blobs" / f"sha256-{'b' * 64}").write_bytes(b"torn")
    ollama_again = naming.ollama_root() / "manifests/registry.ollama.ai/library/tuned/latest"
    ollama_again.write_text(ollama_again.read_text().replace("adapter", "license"))
    with pytest.raises(ConfigError, match="`ollama pull tuned` again"):
        resolve("tuned")


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("org/name", HubName("org/name")),
        ("org/name:Q4_K_M", HubName("org/name", quant="Q4_K_M")),
        ("hf.co/org/name", HubName("org/name")),
        ("hf.co/org/name:Q4_K_M", HubName("org/name", quant="Q4_K_M")),
        ("https://huggingface.co/org/name", HubName("org/name")),
        ("https://huggingface.co/org/name/", HubName("org/name")),
        ("http://www.huggingface.co/org/name/tree/main", HubName("org/name")),
        ("https://huggingface.co/org/name/blob/main/x-Q8_0.gguf", HubName("org/name", file="x-Q8_0.gguf")),
        (
            "https://huggingface.co/org/name/resolve/main/sub/x.gguf?download=true",
            HubName("org/name", file="sub/x.gguf"),
        ),
        ("hf://org/name", HubName("org/name")),
        ("name", None),
        ("./org/name", None),
        ("a/b/c", None),
        ("llama3:8b", None),
        ("https://example.com/a/b", None),
    ],
)
def test_names_of_the_hub(spec: str, name: HubName | None) -> None:
    assert hub_name(spec) == name


FILES = [
    "README.md",
    "x-Q4_K_M.gguf",
    "x-Q8_0.gguf",
    "x-BF16-00001-of-00002.gguf",
    "x-BF16-00002-of-00002.gguf",
    "mmproj-x-f16.gguf",
]


def test_a_gguf_of_a_repository_is_chosen_by_its_number_type() -> None:
    assert choose_gguf("o/n", FILES, HubName("o/n", quant="q4_k_m")) == "x-Q4_K_M.gguf"
    assert choose_gguf("o/n", FILES, HubName("o/n", quant="BF16")) == "x-BF16-00001-of-00002.gguf"
    assert choose_gguf("o/n", FILES, HubName("o/n", file="x-Q8_0.gguf")) == "x-Q8_0.gguf"
    assert choose_gguf("o/n", FILES[:2], HubName("o/n")) == "x-Q4_K_M.gguf"
    assert [naming.quant_of(f"m-{q}.gguf") for q in ("Q8_0", "IQ2_XXS", "UD-Q4_K_XL", "f16", "mxfp4")] == [
        "Q8_0",
        "IQ2_XXS",
        "UD-Q4_K_XL",
        "F16",
        "MXFP4",
    ]


@pytest.mark.parametrize(
    ("name", "files", "words"),
    [
        (HubName("o/n"), FILES, "holds 3 GGUF models: name one, o/n:BF16, o/n:Q4_K_M, o/n:Q8_0"),
        (HubName("o/n", quant="Q2_K"), FILES, "holds no GGUF models 'Q2_K': name one, o/n:BF16"),
        (HubName("o/n", quant="Q2_K"), ["model.safetensors"], "holds no GGUF files.*--model o/n"),
        (HubName("o/n", file="y.gguf"), FILES, "holds no file 'y.gguf'; it holds x-BF16"),
    ],
)
def test_a_gguf_that_is_not_clear_lists_those_there_are(name: HubName, files: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose_gguf("o/n", files, name)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("model.safetensors", "one file of weights.*put config.json"),
        ("pytorch_model.bin", "one file of weights"),
        ("model.onnx", "an ONNX file.*Name a folder"),
        ("model.pt", "a PyTorch file"),
        ("consolidated.00.pth", "a PyTorch file"),
        ("tf_model.h5", "a TensorFlow file"),
        ("tokenizer.model", "name its folder"),
        ("config.json", "name its folder"),
        ("notes.txt", "no GGUF file"),
    ],
)
def test_a_file_that_is_no_model_is_refused_with_the_way(file: str, words: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"????")
    with pytest.raises(ConfigError, match=words):
        resolve(str(tmp_path / file))


def test_a_file_of_weights_in_a_models_folder_names_the_folder(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"name its folder: --model {tmp_path}"):
        resolve(str(tmp_path / "model.safetensors"))


def test_a_gguf_that_is_none_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelRefused, match=r"GGUF"):
        resolve(str(tmp_path / "x.gguf"))


def test_an_adapters_folder_is_refused_with_the_way(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"LoRA adapter.*merge"):
        resolve(str(tmp_path))
