"""Files that are not models we can serve, and why.

Knows other kinds of files, and architectures of another kind; never tensors.
"""

from __future__ import annotations

from pensieve.errors import ModelRefused
from pensieve.worker.gguf.file import GgufModel

_WHY = {
    "it has recurrent or convolution layers, whose state cannot be cached as keys and values": (
        "arwkv7, falcon-h1, granitehybrid, jamba, kimi-linear, lfm2, lfm2moe, mamba, mamba2, nemotron_h, "
        "nemotron_h_moe, plamo2, plamo3, "
        "qwen35, qwen35moe, qwen3next, rwkv6, rwkv6qwen2, rwkv7"
    ),
    "its attention is of the MLA kind, whose keys and values differ in size and cannot be cached here": (
        "deepseek2, glm-dsa, minicpm3, mistral4, plm"
    ),
    "it is an encoder, not a causal decoder": (
        "bert, eurobert, gemma-embedding, jina-bert-v2, jina-bert-v3, llama-embed, modern-bert, neo-bert, "
        "nomic-bert, nomic-bert-moe, t5, "
        "t5encoder, wavtokenizer-dec"
    ),
    "it writes by diffusion, not token by token": "dream, llada, llada-moe, rnd1",
    "it takes images, and positions of more than one dimension": (
        "chameleon, cogvlm, mllama, paddleocr, qwen2vl, qwen3vl, qwen3vlmoe"
    ),
    "transformers does not compute its attention through its attention interface, "
    "so that it cannot be cached here": "bloom, codeshell, falcon, gptj, mpt, nemotron, stablelm",
    "it attends in chunks, which is not served here": "llama4",
    "its layers share keys and values or differ in the size of heads, which is not served here": (
        "gemma3n, gemma4"
    ),
}
UNSERVED = {name: why for why, names in _WHY.items() for name in names.split(", ")}


def require_model(model: GgufModel) -> None:
    """Refuse a file that is not a language model.

    Raises:
        ModelRefused: it is an adapter, a part of a model, or a vocabulary.
    """
    kind = model.metadata.get("general.type", "model")
    if kind == "adapter" or any(key.startswith("adapter.") for key in model.metadata):
        raise ModelRefused(
            f"{model.name} is an adapter (LoRA), not a model: merge it into its base model, and name the "
            "result"
        )
    if kind == "mmproj" or model.architecture == "clip":
        raise ModelRefused(
            f"{model.name} is the image or audio part of a model (mmproj): name the file of its language "
            "model instead"
        )
    if kind != "model":
        raise ModelRefused(f"{model.name} is no model: its general.type is {kind!r}")
    if not model.tensors:
        raise ModelRefused(
            f"{model.name} holds no tensors, only a vocabulary: name the file of the model itself"
        )
