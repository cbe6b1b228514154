"""A tiny random Llama with the default model's tokenizer, so that the server is measured and not a model.

python tests/attack/model.py FOLDER
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make(folder: Path) -> None:
    """Write the model into a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pensieve.worker.weights import fetch_default

    source = fetch_default()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 1.0 if "embed" in name else 0.3)
    model.to(torch.float32).save_pretrained(folder)
    for name in COPIED:
        shutil.copy(source / name, folder / name)


def made(folder: Path) -> Path:
    """The model, made in a process of its own: torch is large."""
    if not (folder / "model.safetensors").is_file():
        subprocess.run([sys.executable, __file__, str(folder)], check=True)
    return folder


def variant(
    model: Path, folder: Path, *, template: str | None = None, tokenizer: Any = None, **config: Any
) -> Path:
    """A copy with another chat template, another tokenizer (a function that changes its JSON) or another config."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path)
    if template is not None:
        _write(folder / "chat_template.jinja", template)
    if tokenizer is not None:
        found = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
        tokenizer(found)
        _write(folder / "tokenizer.json", json.dumps(found))
    if config:
        _write(
            folder / "config.json",
            json.dumps(json.loads((model / "config.json").read_text(encoding="utf-8")) | config),
        )
    return folder


def _write(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
