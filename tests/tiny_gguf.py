"""A tiny Llama with a byte-level tokenizer, written as a GGUF file the way llama.cpp's converter writes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter, TokenType
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MERGES = ("Ċ Ċ", "Ġ Ġ", "ĊĊ ĠĠ", "h e", "l l", "he ll", "hell o", "Ġ 1")
_VOCAB = [*SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in _MERGES)]


def tiny_llama(*, seed: int = 0, rope: dict[str, Any] | None = None) -> LlamaForCausalLM:
    """Two layers in bfloat16; `rope` overrides the plain rotary parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(_VOCAB), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0, **(rope or {})}, rms_norm_eps=1e-5,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # .to() would round the rotary buffers too
    assert isinstance(model, LlamaForCausalLM)
    return model.eval()


def write_gguf(
    path: Path, model: LlamaForCausalLM, *, pre: str = "smollm", eot: int | None = 0, rope_factors: torch.Tensor | None = None
) -> Path:
    """Write `model` and its tokenizer to `path`; `rope_factors` (head_dim / 2,) go into `rope_freqs.weight`."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(_VOCAB)
    writer.add_token_types([TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in _VOCAB])
    writer.add_token_merges(list(_MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if eot is not None:
        writer.add_eot_token_id(eot)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in _tensors(model).items():
        writer.add_tensor(name, tensor.float().numpy().astype(np.float32))
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inner = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    found = {}
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem in top:
            found[f"{top[stem]}.weight"] = tensor
            continue
        _, _, layer, rest = stem.split(".", 3)
        if (count := heads.get(rest.rsplit(".", 1)[-1])) is not None:
            tensor = _interleaved(tensor, count)
        found[f"blk.{layer}.{inner[rest]}.weight"] = tensor
    return found


def _interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The rotary pairs of each head side by side, as GGUF Llamas have them, not in halves."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
