"""A folder is what its config says, or it is refused in words: every tensor of its files is accounted for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from pensieve.errors import ModelRefused, ModelUnavailable
from pensieve.worker.gate import admit
from pensieve.worker.weights import load, resolve
from tiny_models import ARCHITECTURES, CONFIGS, tiny

IDS = torch.tensor([[1, 40, 90, 7, 150, 3]])
State = dict[str, torch.Tensor]


def write(
    folder: Path, model: PreTrainedModel, change: Callable[[State], State] = lambda state: state
) -> Path:
    """A folder of a model, its tensors changed."""
    model.save_pretrained(folder)
    state = change(load_file(folder / "model.safetensors"))
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / "model.safetensors"
    )
    return folder


def loaded(folder: Path) -> PreTrainedModel:
    return load(resolve(str(folder)), "float32")


def refusal(folder: Path) -> str:
    """What a user who names the folder is told."""
    with pytest.raises((ModelRefused, ModelUnavailable)) as refused:
        loaded(folder)
    assert "Traceback" not in refused.value.message and "ignore_mismatched_sizes" not in refused.value.message
    return refused.value.message


def without(*names: str) -> Callable[[State], State]:
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


def renamed(old: str, new: str) -> Callable[[State], State]:
    return lambda state: {
        new + name.removeprefix(old) if name.startswith(old) else name: tensor
        for name, tensor in state.items()
    }


def extended(**more: torch.Tensor) -> Callable[[State], State]:
    return lambda state: state | {name.replace("__", "."): tensor for name, tensor in more.items()}


def same(folder: Path, model: PreTrainedModel) -> None:
    with torch.no_grad():
        assert torch.equal(loaded(folder)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_whole_model_loads(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture)
    same(write(tmp_path, model), model)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("mixtral", {**CONFIGS["llama"], "num_local_experts": 4}),
        (
            "qwen2_moe",
            {
                **CONFIGS["llama"],
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "decoder_sparse_step": 1,
            },
        ),
        (
            "qwen3_moe",
            {
                **CONFIGS["llama"],
                "head_dim": 16,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
            },
        ),
        ("phi3", CONFIGS["llama"]),
        ("gpt_neox", CONFIGS["llama"]),
    ],
)
def test_models_whose_tensors_are_stacked_or_cut_load_too(
    architecture: str, config: dict[str, object], tmp_path: Path
) -> None:
    model = build(architecture, **config)
    same(write(tmp_path, model), model)


def build(architecture: str, **config: object) -> PreTrainedModel:
    CONFIGS.setdefault(architecture, {})
    return tiny(architecture, **config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("lm_head.weight"), r"1 tensor is in no file \(lm_head.weight\) although the config does not tie it"),
        (without("model.embed_tokens.weight"), r"1 tensor is in no file \(model.embed_tokens.weight\)"),
        (without("model.layers.1.mlp.up_proj.weight"),
            r"1 tensor is in no file \(model.layers.1.mlp.up_proj.weight\)"),
        (without("model.norm.weight"), r"1 tensor is in no file \(model.norm.weight\)"),
        (without("model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"),
            "2 tensors are in no file"),
        (extended(model__layers__0__self_attn__q_proj__bias=torch.ones(48)),
            r"1 tensor has no place in the model .*q_proj.bias"),
        (extended(model__layers__0__self_attn__sinks=torch.ones(4)), "no place in the model"),
        (extended(score__weight=torch.ones(2, 48)), "score.weight"),
        (extended(model__layers__2__mlp__up_proj__weight=torch.ones(64, 48)),
            "its files hold 3 layers, its config says 2"),
        (lambda state: {n: t for n, t in state.items() if "layers.1." not in n},
            "its files hold 1 layers?, its config says 2"),
        (
            lambda state: state | {"model.norm.weight": torch.ones(47)},
            r"model.norm.weight is \(47,\) in the files, \(48,\) by the config",
        ),
        (lambda state: {}, "no file"),
    ],
)  # fmt: skip
def test_files_that_differ_from_the_config_are_refused(
    change: Callable[[State], State], words: str, tmp_path: Path
) -> None:
    import re

    said = refusal(write(tmp_path, tiny("llama", tie_word_embeddings=False), change))
    assert re.search(words, said), said
    assert "fetch its files again" in said


def test_another_number_of_layers_is_said_in_words(tmp_path: Path) -> None:
    write(tmp_path, tiny("llama"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "its files hold 2 layers, its config says 3" in refusal(tmp_path)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "qwen2_moe"])
def test_experts_of_another_width_are_said_by_tensor_and_shape(architecture: str, tmp_path: Path) -> None:
    sizes = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 32,
    }
    write(tmp_path, build(architecture, **{**CONFIGS["llama"], **sizes}))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 40}))
    said = refusal(tmp_path)
    assert "of another shape" in said and "experts" in said and "32" in said and "by the config" in said


def test_an_expert_missing_between_others_is_missed(tmp_path: Path) -> None:
    model = build("mixtral", **{**CONFIGS["llama"], "num_local_experts": 4})

    def without_the_second(state: State) -> State:
        """Moved up one place, from the second on: as many as the config says."""
        moved = {}
        for name, tensor in state.items():
            head, mark, rest = name.partition(".experts.")
            number, _, tail = rest.partition(".")
            moved[f"{head}{mark}{int(number) + 1}.{tail}" if mark and int(number) else name] = tensor
        return moved

    said = refusal(write(tmp_path, model, without_the_second))
    assert "tensors of experts are in no file" in said and "experts.1." in said


# --- tied heads


def test_a_tied_head_need_not_be_stored_and_may_be_stored_as_it_is(tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(write(tmp_path / "a", model) / "model.safetensors")
    same(tmp_path / "a", model)
    same(
        write(tmp_path / "b", model, lambda s: s | {"lm_head.weight": s["model.embed_tokens.weight"]}), model
    )


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path: Path) -> None:
    said = refusal(
        write(
            tmp_path, tiny("llama", tie_word_embeddings=True), extended(lm_head__weight=torch.ones(199, 48))
        )
    )
    assert (
        "lm_head.weight that differs from model.embed_tokens.weight" in said and "tie_word_embeddings" in said
    )


# --- names


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module.",
        "base_model.model.",
        "language_model.",
        "model.language_model.",
        "module._orig_mod.",
        "student.net.",
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_beginning_that_all_names_share_is_understood(
    prefix: str, architecture: str, tmp_path: Path
) -> None:
    model = tiny(architecture)
    same(
        write(tmp_path, model, lambda state: {prefix + name: tensor for name, tensor in state.items()}), model
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.", "model.language_model."),  # the text part of a vision model; the head stands beside it
        ("model.", ""),
        ("model.", "model.model."),
        ("model.", "transformer.model."),
        ("model.", "model._orig_mod."),
        ("model.", "decoder."),
    ],
)
def test_names_of_a_part_are_understood(old: str, new: str, tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=False)
    same(write(tmp_path, model, renamed(old, new)), model)


def test_compiled_layers_are_understood(tmp_path: Path) -> None:
    model = tiny("llama")
    same(
        write(
            tmp_path,
            model,
            lambda s: {
                n.replace("layers.0.", "layers.0._orig_mod.").replace("layers.1.", "layers.1._orig_mod."): t
                for n, t in s.items()
            },
        ),
        model,
    )


@pytest.mark.parametrize("prefix", ["_orig_mod.", "ema.", "model.language_model."])
def test_two_sets_of_weights_are_refused(prefix: str, tmp_path: Path) -> None:
    said = refusal(
        write(
            tmp_path,
            tiny("llama"),
            lambda s: (
                s
                | {
                    prefix + name.removeprefix("model.") if "language" in prefix else prefix + name: t + 1
                    for name, t in s.items()
                }
            ),
        )
    )
    assert "two sets of weights" in said


def test_two_sets_of_weights_under_two_beginnings_are_refused(tmp_path: Path) -> None:
    said = refusal(
        write(
            tmp_path,
            tiny("llama"),
            lambda s: {p + name: t for p in ("teacher.", "student.") for name, t in s.items()},
        )
    )
    assert "two sets of weights" in said and "teacher." in said and "student." in said


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.base_layer.weight",
    ],
)
def test_an_adapter_is_refused_with_the_way(name: str, tmp_path: Path) -> None:
    said = refusal(write(tmp_path, tiny("llama"), lambda s: s | {name: torch.ones(4, 48)}))
    assert "LoRA" in said and "merge" in said


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("llama", {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(6)}),
        (
            "gpt2",
            {
                "transformer__h__0__attn__bias": torch.ones(1, 1, 512, 512),
                "transformer__h__0__attn__masked_bias": torch.tensor(-1e4),
            },
        ),
        ("llama", {"model__mtp__0__norm__weight": torch.ones(3)}),
        (
            "llama",
            {
                "model__visual__blocks__0__attn__qkv__weight": torch.ones(3, 3),
                "multi_modal_projector__weight": torch.ones(3),
            },
        ),
    ],
)
def test_what_is_known_to_be_harmless_may_be_left_over(
    architecture: str, more: State, tmp_path: Path
) -> None:
    model = tiny(architecture)
    same(write(tmp_path, model, extended(**more)), model)


def test_a_bias_is_no_mask_because_of_its_name(tmp_path: Path) -> None:
    assert "attn.bias" in refusal(
        write(tmp_path, tiny("gpt2"), extended(transformer__h__0__attn__bias=torch.ones(48)))
    )


def test_a_part_that_sees_is_left_out_with_a_note(tmp_path: Path) -> None:
    write(
        tmp_path,
        tiny("llama"),
        lambda s: (
            renamed("", "language_model.")(s)
            | {"vision_tower.encoder.layers.0.mlp.fc1.weight": torch.ones(3)}
        ),
    )
    found = resolve(str(tmp_path))
    assert found.note is not None and "left out" in found.note
    same(tmp_path, tiny("llama"))


def test_layers_that_guess_ahead_are_harmless_only_if_the_config_has_them(tmp_path: Path) -> None:
    more = extended(model__layers__2__eh_proj__weight=torch.ones(48, 96))
    write(tmp_path, tiny("llama"), more)
    assert "its files hold 3 layers" in refusal(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    same(tmp_path, tiny("llama"))


# --- quantised folders


def fp8(folder: Path, change: Callable[[State], State] = lambda state: state) -> None:
    """A folder as published in 8 bits: blocks of 128 x 128 with a scale each."""

    def narrow(state: State) -> State:
        found: State = {}
        for name, tensor in state.items():
            if "proj" not in name:
                found[name] = tensor
                continue
            rows, columns = tensor.shape
            blocks = tensor.float().view(rows // 128, 128, columns // 128, 128)
            scales = blocks.abs().amax(dim=(1, 3)) / 448
            found[name] = (blocks / scales[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
            found[name.replace(".weight", ".weight_scale_inv")] = scales
        return change(found)

    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    write(folder, tiny("qwen3", dtype=torch.bfloat16, **sizes), narrow)
    config = json.loads((folder / "config.json").read_text())
    quantization = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    }
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_folder_in_8_bits_is_served(dtype: str, tmp_path: Path) -> None:
    fp8(tmp_path)
    admit(load(resolve(str(tmp_path)), dtype))


@pytest.mark.parametrize("suffix", ["weight", "weight_scale_inv"])
def test_a_folder_in_8_bits_with_a_tensor_missing_is_refused(suffix: str, tmp_path: Path) -> None:
    fp8(tmp_path, without(f"model.layers.1.mlp.up_proj.{suffix}"))
    assert "model.layers.1.mlp.up_proj" in refusal(tmp_path)


# --- memory

_MEASURE = """
import sys, threading, time, torch
torch.set_num_threads(1)
from pensieve.worker.weights import load, resolve
from pensieve.worker.gate import admit

def private():
    lines = open('/proc/self/status').read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith('RssAnon')).split()[1])

found = resolve(sys.argv[1])
from transformers import AutoModelForCausalLM
before, seen = private(), []
done = threading.Event()
watch = threading.Thread(target=lambda: [seen.append(private()) for _ in iter(lambda: done.wait(0.001), True)])
watch.start()
model = admit(load(found, sys.argv[2]), keep_modules=False)
done.set()
watch.join()
print(max(seen) - before, private() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_takes_little_more_memory_than_the_model(dtype: str, tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 16_000,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
    }
    tiny("llama", dtype=torch.bfloat16, tie_word_embeddings=True, **sizes).save_pretrained(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path), dtype], capture_output=True, text=True, check=True
    )
    peak, stays = map(int, run.stdout.split())
    assert peak <= 1.2 * stays + (40 << 20)  # beside: stacks of threads, the library's own


# --- files


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    return tmp_path


def test_shards_load(shards: Path) -> None:
    same(shards, tiny("llama"))


def test_a_missing_shard_is_named(shards: Path) -> None:
    gone = sorted(shards.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelUnavailable, match=gone.name):
        resolve(str(shards), allow_random=False)
    found = resolve(str(shards))
    assert found.weights == "random" and found.note is not None and gone.name in found.note


def test_a_shard_that_the_index_does_not_name_is_said(shards: Path) -> None:
    save_file({"x": torch.ones(1)}, shards / "model-00099-of-00099.safetensors")
    assert "model-00099-of-00099.safetensors" in refusal(shards)


def test_an_index_that_names_a_tensor_its_shard_lacks_is_said(shards: Path) -> None:
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.ghost.weight"] = index["weight_map"]["model.norm.weight"]
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.ghost.weight" in refusal(shards)


def test_a_file_beside_shards_is_a_second_set(shards: Path) -> None:
    save_file({"x": torch.ones(1)}, shards / "model.safetensors")
    assert "two sets of weights" in refusal(shards)


def test_a_file_that_is_cut_off_is_said_to_be(tmp_path: Path) -> None:
    path = write(tmp_path, tiny("llama")) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "cut off" in refusal(tmp_path)


def test_pickled_files_are_accounted_for_as_well(tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    same(tmp_path, model)
    torch.save(without("model.norm.weight")(model.state_dict()), tmp_path / "pytorch_model.bin")
    assert "model.norm.weight" in refusal(tmp_path)


@pytest.mark.parametrize("change", ["overwritten", "truncated", "deleted"])
@pytest.mark.parametrize("pickled", [False, True])
def test_a_file_that_changes_underneath_changes_nothing(change: str, pickled: bool, tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    write(tmp_path, model)
    path = tmp_path / "model.safetensors"
    if pickled:
        path.unlink()
        path = tmp_path / "pytorch_model.bin"
        torch.save(model.state_dict(), path)
    ours = loaded(tmp_path)
    if change == "deleted":
        path.unlink()
    else:
        with path.open("r+b") as file:
            file.write(b"\xff" * path.stat().st_size if change == "overwritten" else b"")
            file.truncate(path.stat().st_size if change == "overwritten" else 8)
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_said_to_be_not_finite(value: float, tmp_path: Path) -> None:
    def spoil(state: State) -> State:
        state["model.embed_tokens.weight"][5, 7] = value
        return state

    said = refusal(write(tmp_path, tiny("llama"), spoil))
    assert "not finite" in said and "model.embed_tokens.weight" in said


def test_weights_that_float16_cannot_hold_are_refused_with_the_way(tmp_path: Path) -> None:
    def spoil(state: State) -> State:
        state["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
        return state

    write(tmp_path, tiny("llama"), spoil)
    with pytest.raises(ModelRefused, match=r"not finite in float16.*--dtype bfloat16"):
        load(resolve(str(tmp_path)), "float16")
    load(resolve(str(tmp_path)), "bfloat16")
