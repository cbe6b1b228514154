"""What a GGUF file says and cannot be carried over is refused from its header.

With words, and with nothing converted.
"""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pensieve.errors import ModelRefused
from pensieve.worker import gguf_convert
from pensieve.worker.gguf.file import open_model
from pensieve.worker.gguf.plan import account, describe
from pensieve.worker.gguf_convert import ensure_converted, ensure_file_converted, file_hash, sha256_of
from pensieve.worker.weights import load, resolve
from tiny_gguf import tensors_of, tiny, write_gguf

EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PENSIEVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refusal(path: Path, cache: Path) -> str:
    """Why a file is refused; no tensor was read, and nothing is kept or hashed."""
    with pytest.raises(ModelRefused) as refused:
        resolve(str(path))
    assert not list(cache.rglob("*.safetensors")) and not list(cache.glob("hashes/*"))
    return refused.value.message


def test_missing_tensors_are_counted_and_named(tmp_path: Path, cache: Path) -> None:
    model = tiny("llama")
    held = tensors_of(model)
    del held["blk.1.ffn_up.weight"]
    path = write_gguf(tmp_path / "m.gguf", model, tensors=held)
    assert "1 of the tensors it needs are missing (blk.1.ffn_up.weight)" in refusal(path, cache)
    held = {name: tensor for name, tensor in held.items() if not name.startswith("blk.")}
    assert "18 of the tensors it needs are missing (blk.0.attn_q.weight, " in (
        said := refusal(write_gguf(path, model, tensors=held), cache)
    )
    assert "it says 2 layers and holds 0" in said


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_q_norm.weight",
        "blk.1.ffn_gate_shexp.weight",
        "output.bias",
        "rope_factors_long.weight",
        "x",
    ],
)
def test_a_tensor_without_a_place_is_named(name: str, tmp_path: Path, cache: Path) -> None:
    model = tiny("llama")
    path = write_gguf(tmp_path / "m.gguf", model, tensors={**tensors_of(model), name: np.ones(32)})
    assert f"1 of its 22 tensors have no place in the model ({name})" in refusal(path, cache)


def test_a_missing_head_is_a_tied_one_and_never_invented(tmp_path: Path) -> None:
    model = tiny("llama")
    held = tensors_of(model)
    del held["output.weight"]
    loaded = load(resolve(str(write_gguf(tmp_path / "m.gguf", model, tensors=held))), "float32")
    assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight)


def test_a_tensor_of_another_shape_is_named_with_both(tmp_path: Path, cache: Path) -> None:
    model = tiny("llama")
    held = tensors_of(model)
    held["blk.0.ffn_up.weight"] = held["blk.0.ffn_up.weight"][:40]
    said = refusal(write_gguf(tmp_path / "m.gguf", model, tensors=held), cache)
    assert (
        "1 tensors are of another shape (model.layers.0.mlp.up_proj.weight (40, 32) instead of (48, 32))"
        in said
    )


@pytest.mark.parametrize(("said", "held"), [(1, 2), (3, 2)])
def test_more_or_fewer_layers_than_it_says(said: int, held: int, tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), keys={"block_count": said})
    assert f"it says {said} layers and holds {held}" in refusal(path, cache)


KEYS: dict[str, tuple[str, dict[str, Any], str]] = {
    "one that is not known": ("llama", {"attention.some_new_scale": 2.0},
        "llama.attention.some_new_scale = 2"),
    "a cap llama has not": ("llama", {"attn_logit_softcapping": 30.0},
        "llama.attn_logit_softcapping = 30.0 (a limit to attention scores)"),
    "a window llama has not": ("llama", {"attention.sliding_window": 64},
        "llama.attention.sliding_window = 64"),
    "multipliers llama has not": ("llama", {"residual_scale": 0.5, "embedding_scale": 3.0},
        "2 of its keys have no place"),
    "another attention scale": ("qwen2", {"attention.scale": 0.5}, "its attention.scale is 0.5"),
    "an unknown scaling": ("llama", {"rope.scaling.type": "ntk"},
        "scaled in a way that is not known here ('ntk')"),
    "longrope without factors": ("llama", {"rope.scaling.type": "longrope"}, "it holds no factors"),
    "attention scaled without yarn": ("llama", {"rope.scaling.attn_factor": 1.2},
        "which transformers does for yarn only"),
    "a yarn factor of two readings": (
        "llama",
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 2.0},
        "scales attention by 2 (rope.scaling.attn_factor), yarn by 4 usually by 1.139",
    ),
    "yarn that extrapolates less": (
        "llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
            "rope.scaling.yarn_ext_factor": 0.5}, "transformers extrapolates by 1"
    ),
    "a partly rotated head": ("llama", {"rope.dimension_count": 4},
        "it rotates 4 of the 8 numbers of a head"),
    "keys wider than values": ("llama", {"attention.key_length": 16, "attention.value_length": 8},
        "keys and values are of different sizes"),
    "heads of another size": ("qwen2", {"attention.key_length": 16, "attention.value_length": 16},
        "its heads are of size 16"),
    "heads that differ between layers": ("llama", {"attention.head_count_kv": [2, 4]},
        "attention.head_count_kv differs from layer to layer (2, 4"),
    "no sizes": ("llama", {"embedding_length": None}, "it does not say its embedding_length"),
    "a size that is text": ("llama", {"block_count": "two"}, "its block_count is 'two', which is no count"),
    "an epsilon that is text": ("llama", {"attention.layer_norm_rms_epsilon": "small"}, "which is no number"),
    "another vocabulary": ("llama", {"vocab_size": 400}, "it has 267 embeddings for 400 tokens"),
    "fewer tokens": ("llama", {"vocab_size": 200}, "it has 267 embeddings for"),
    "a million layers": ("llama", {"block_count": 1 << 20}, "it says 1,048,576 layers and holds 21 tensors"),
    "no heads": ("llama", {"attention.head_count": 0}, "cannot be converted"),
    "both norms of experts": ("mixtral", {"expert_gating_func": 2}, "its expert_gating_func is 2"),
    "a pattern for other layers": ("gpt_oss", {"attention.sliding_window_pattern": [True]},
        "is for 1 layers, it has 2"),
    "an embedding model": ("qwen3", {"pooling_type": 3},
        "qwen3.pooling_type = 3 (one vector of a whole text"),
    "layers of prediction": ("qwen3", {"nextn_predict_layers": 1}, "nextn_predict_layers = 1"),
    "both directions": ("qwen3", {"attention.causal": False}, "attention.causal = False"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_a_key_that_cannot_be_carried_over_is_named(name: str, tmp_path: Path, cache: Path) -> None:
    model_type, keys, why = KEYS[name]
    path = write_gguf(
        tmp_path / "m.gguf",
        tiny(model_type, **(EXPERTS if model_type in ("mixtral", "gpt_oss") else {})),
        keys=keys,
    )
    said = refusal(path, cache)
    assert why in said and "folder with safetensors of the same model" in said


@pytest.mark.parametrize(
    "keys",
    [
        {
            "expert_count": 0,
            "expert_used_count": 0,
            "attention.causal": True,
            "rope.scaling.finetuned": False,
        },
        {
            "attention.scale": 8**-0.5,
            "attention.clamp_kqv": 0.0,
            "pooling_type": 0,
            "tensor_data_layout": "Meta AI original pth",
        },
        {"attention.head_count_kv": [2, 2], "feed_forward_length": [48, 48], "rope.scaling.type": "none"},
    ],
)
def test_keys_that_say_nothing_are_no_reason(keys: dict[str, Any], tmp_path: Path) -> None:
    account(describe(open_model(write_gguf(tmp_path / "m.gguf", tiny("llama"), keys=keys))))


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ("lfm2", "recurrent or convolution layers"),
        ("mamba", "recurrent or convolution layers"),
        ("qwen35", "recurrent or convolution layers"),
        ("deepseek2", "of the MLA kind"),
        ("bert", "an encoder"),
        ("qwen2vl", "takes images"),
        ("falcon", "attention interface"),
        ("gemma4", "differ in the size of heads"),
        ("never-seen", "it is not known here"),
    ],
)
def test_an_architecture_that_cannot_be_read_is_refused_with_what_it_is(
    architecture: str, why: str, tmp_path: Path, cache: Path
) -> None:
    said = refusal(write_gguf(tmp_path / "m.gguf", tiny("llama"), architecture=architecture), cache)
    assert f"is of the architecture {architecture!r}" in said and why in said and "llama" in said


@pytest.mark.parametrize(
    ("metadata", "why"),
    [
        ({"general.type": "adapter", "adapter.type": "lora"}, "an adapter"),
        ({"general.type": "mmproj"}, "name the file of its language model"),
        ({"general.type": "imatrix"}, "its general.type is 'imatrix'"),
    ],
)
def test_files_that_are_no_models(metadata: dict[str, Any], why: str, tmp_path: Path, cache: Path) -> None:
    assert why in refusal(write_gguf(tmp_path / "m.gguf", tiny("llama"), metadata=metadata), cache)


def test_a_file_of_a_vocabulary_alone(tmp_path: Path, cache: Path) -> None:
    assert "holds no tensors, only a vocabulary" in refusal(
        write_gguf(tmp_path / "m.gguf", tiny("llama"), tensors={}), cache
    )


def test_a_clip_file(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf",
        tiny("llama"),
        architecture="clip",
        tensors={"v.blk.0.attn_q.weight": np.ones((4, 4))},
    )
    assert "image or audio part of a model" in refusal(path, cache)


@pytest.mark.parametrize("kind", ["bert", "rwkv", "no_vocab", None])
def test_a_tokenizer_that_transformers_cannot_build(kind: str | None, tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), tokenizer=kind)
    assert ("holds no tokenizer" if kind is None else f"has a tokenizer (of the kind '{kind}')") in refusal(
        path, cache
    )


def test_files_beside_a_gguf_are_not_mixed_into_its_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "BertTokenizer", "chat_template": "of another model"}'
    )
    (tmp_path / "chat_template.jinja").write_text("of another model")
    found = resolve(str(write_gguf(tmp_path / "m.gguf", tiny("llama"))))
    assert found.folder is not None
    assert not [file for file in found.folder.iterdir() if b"of another model" in file.read_bytes()]


def test_the_notes_of_a_conversion_are_kept_for_every_start(tmp_path: Path) -> None:
    model = tiny(
        "gemma3_text", head_dim=16, query_pre_attn_scalar=16, sliding_window=24, tie_word_embeddings=True
    )
    held = {**tensors_of(model), "v.blk.0.attn_q.weight": np.ones((4, 4))}
    path = write_gguf(tmp_path / "m.gguf", model, tensors=held, pre="unknown-split")
    for _ in range(2):
        note = resolve(str(path)).note
        assert note is not None and "image encoder is left out" in note and "'unknown-split'" in note


# Damaged files.


def test_a_file_that_is_cut_short_says_what_is_missing(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"))
    size = path.stat().st_size
    os.truncate(path, size - 5000)
    said = refusal(path, cache)
    assert (
        "is cut short: the data of" in said and f"({size - 5000:,} bytes" in said and "fetch it again" in said
    )
    for length in (size // 3, 5000, 100, 24, 10, 4, 3, 0):
        os.truncate(path, length)
        assert "m.gguf" in refusal(path, cache)


def patched(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    return path


def test_damaged_headers_are_refused_with_words(tmp_path: Path, cache: Path) -> None:
    def fresh() -> Path:
        return write_gguf(tmp_path / "m.gguf", tiny("llama"))

    assert "version 1, not 2 or 3" in refusal(patched(fresh(), b"GGUF\3\0\0\0", b"GGUF\1\0\0\0"), cache)
    assert "big-endian" in refusal(patched(fresh(), b"GGUF\3\0\0\0", b"GGUF\0\0\0\3"), cache)
    assert "does not begin as one" in refusal(patched(fresh(), b"GGUF", b"GGML"), cache)
    twice = patched(
        patched(fresh(), b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"),
        b"blk.1.attn_k.weight",
        b"blk.0.attn_k.weight",
    )
    assert "holds 2 tensors twice (blk.0.attn_q.weight, blk.0.attn_k.weight)" in refusal(twice, cache)
    both = write_gguf(tmp_path / "m.gguf", tiny("llama"), keys={"block_coun2": 2})
    assert "it says llama.block_count twice" in refusal(
        patched(both, b"llama.block_coun2", b"llama.block_count"), cache
    )
    for count in (2**20, 2**62):
        said = refusal(patched(fresh(), struct.pack("<Q", 21), struct.pack("<Q", count)), cache)
        assert "m.gguf is not a readable GGUF file" in said


def test_an_unknown_number_type_says_what_to_do(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"))
    name = b"blk.0.attn_norm.weight"
    data = path.read_bytes()
    at = data.index(name) + len(name) + 4 + 8
    path.write_bytes(data[:at] + struct.pack("<I", 99) + data[at + 4 :])
    assert "blk.0.attn_norm.weight is of a number type (99)" in refusal(path, cache)


def test_no_damage_of_a_header_gives_anything_but_a_refusal(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf", tiny("llama"), metadata={"split.count": 1, "general.alignment": 32}
    )
    whole = path.read_bytes()
    spots = [
        *range(whole.index(b"tokenizer.ggml.model")),
        *range(whole.index(b"token_embd.weight") - 8, whole.index(b"output_norm.weight")),
    ]
    chance = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for spot in chance.sample(spots, chance.choice((1, 1, 3))):
            damaged[spot] = chance.choice((0, 1, 255, damaged[spot] ^ 1, damaged[spot] ^ 128))
        path.write_bytes(damaged)
        try:
            account(describe(open_model(path)))
        except ModelRefused:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    "metadata",
    [
        {"split.count": "two"},
        {"tokenizer.ggml.bos_token_id": "<s>"},
        {"tokenizer.ggml.padding_token_id": 1.5},
    ],
)
def test_values_of_another_kind(metadata: dict[str, Any], tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), tokenizer=None, metadata=metadata)
    assert "m.gguf" in refusal(path, cache)


# Split files.


def split(tmp_path: Path, model: Any = None, name: str = "m", parts: int = 3) -> list[Path]:
    first = write_gguf(tmp_path / f"{name}-00001-of-{parts:05}.gguf", model or tiny("llama"), parts=parts)
    return [first.with_name(f"{name}-{i + 1:05}-of-{parts:05}.gguf") for i in range(parts)]


def test_any_part_finds_the_others(tmp_path: Path) -> None:
    model = tiny("llama")
    parts = split(tmp_path, model)
    ids = torch.tensor([[1, 40, 90, 7, 200]])
    found = [resolve(str(part)) for part in parts]
    assert len({one.folder for one in found}) == 1
    loaded = load(found[0], "float32")
    assert float((loaded(ids).logits.log_softmax(-1) - model(ids).logits.log_softmax(-1)).abs().max()) <= 1e-4


def test_the_hash_of_a_split_model_is_that_of_all_parts(tmp_path: Path) -> None:
    parts = split(tmp_path)
    before = resolve(str(parts[0])).folder
    changed = split(tmp_path, tiny("llama", seed=1))
    assert changed == parts and resolve(str(parts[0])).folder != before
    whole = write_gguf(tmp_path / "whole.gguf", tiny("llama"))
    assert file_hash(whole) == sha256_of(whole) and file_hash(whole, parts=[whole]) == sha256_of(whole)


def test_missing_parts_are_named(tmp_path: Path, cache: Path) -> None:
    parts = split(tmp_path)
    parts[1].unlink()
    for part in (parts[0], parts[2]):
        assert "1 parts are not beside it: m-00002-of-00003.gguf" in refusal(part, cache)


def test_a_renamed_part_says_how_it_must_be_called(tmp_path: Path, cache: Path) -> None:
    parts = split(tmp_path)
    moved = parts[1].rename(tmp_path / "model.gguf")
    assert "is part 2 of 3 of a split model, and its name does not say so" in (said := refusal(moved, cache))
    assert "NAME-00002-of-00003.gguf" in said
    moved.rename(tmp_path / "m-00001-of-00003.gguf")  # over the first
    assert "is part 2 of 3" in refusal(tmp_path / "m-00001-of-00003.gguf", cache)


def test_a_part_of_another_model_is_found_out(tmp_path: Path, cache: Path) -> None:
    parts = split(tmp_path)
    other = split(tmp_path, tiny("llama", num_hidden_layers=3), name="other")
    other[1].replace(parts[1])
    assert "a part belongs to another model" in refusal(parts[0], cache)
    (tmp_path / "deep").mkdir()
    again, pair = split(tmp_path), split(tmp_path / "deep", parts=2)
    pair[1].replace(again[1])
    assert "calls itself part 2 of 2, its name says 2 of 3" in refusal(again[0], cache)


def test_a_first_part_that_does_not_say_so_is_not_taken_for_the_whole(tmp_path: Path, cache: Path) -> None:
    model = tiny("llama")
    held = dict(list(tensors_of(model).items())[:10])
    assert "tensors it needs are missing" in refusal(
        write_gguf(tmp_path / "m-00001-of-00002.gguf", model, tensors=held), cache
    )


# Cheap answers first.


def test_what_cannot_be_served_is_refused_before_anything_is_read_hashed_or_written(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"))
    monkeypatch.setattr(gguf_convert, "sha256_of", lambda path: pytest.fail(f"hashed {path}"))

    def check(config: Any) -> None:
        assert config.model_type == "llama"
        raise ModelRefused("not today")

    def room(count: int) -> None:
        raise ModelRefused(f"{count} weights are too many")

    with pytest.raises(ModelRefused, match="not today"):
        ensure_file_converted(path, check=check, room=room)
    with pytest.raises(ModelRefused, match="not today"):
        ensure_converted(lambda: path, "ab" * 32, check=check)
    count = sum(p.numel() for p in tiny("llama").parameters())
    with pytest.raises(ModelRefused, match=f"{count} weights are too many"):
        ensure_file_converted(path, room=room)
    assert not list(cache.rglob("*.json")) and not list(cache.rglob("*.safetensors"))


def test_a_conversion_found_is_checked_too(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"))
    folder = ensure_file_converted(path)
    seen: list[str] = []
    assert ensure_file_converted(path, check=lambda config: seen.append(config.model_type)) == folder
    assert seen == ["llama"]


def test_a_model_that_cannot_be_loaded_is_not_converted(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pensieve.worker.random_weights.available_bytes", lambda device="cpu": 1 << 20)
    assert "does not fit" in refusal(write_gguf(tmp_path / "m.gguf", tiny("llama")), cache)
