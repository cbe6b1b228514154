"""A Hugging Face model's folder: its config, and the ids that end an answer. Knows files; never weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pensieve.errors import ConfigError, ModelRefused

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# transformers is imported where it is used: listing models needs none of it.

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "spiece.model",
)


def holds_model(folder: Path) -> bool:
    """Whether a folder is a Hugging Face model, and not just one of a GGUF file.

    It needs a config.json and weights; without any GGUF file the config is enough.
    """
    from pensieve.worker.hub import has_weights

    return (folder / "config.json").exists() and (has_weights(folder) or not any(folder.glob("*.gguf")))


def require_model_folder(spec: str, folder: Path) -> None:
    """Refuse a folder that is not a model, by its files.

    Raises:
        ConfigError: there is no config.json.
    """
    if (folder / "config.json").exists():
        return
    if (folder / "adapter_config.json").exists():
        raise ConfigError(
            f"the folder {spec!r} holds a LoRA adapter, no whole model: merge it into its base model "
            "(`merge_and_unload` of peft), save that, "
            "and name its folder"
        )
    raise ConfigError(
        f"the folder {spec!r} holds no config.json, so it is no Hugging Face model: name a folder that holds "
        "one, its weight files and its tokenizer, "
        "or a .gguf file"
    )


def config_of(folder: Path) -> PretrainedConfig:
    """The config in a model's folder.

    Raises:
        ModelRefused: transformers cannot read it.
    """
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # each config class checks in its own way, and raises its own errors
        raise ModelRefused(
            f"transformers cannot read {folder / 'config.json'}: {' '.join(str(error).split())}"
        ) from error
    return config


def stop_ids(folder: Path, config: PretrainedConfig) -> tuple[int, ...]:
    """Token ids that end an answer: of generation_config.json, then the config, then the tokenizer."""
    named: list[int | list[int] | None] = [_read_json(folder / "generation_config.json").get("eos_token_id")]
    named.append(getattr(config.get_text_config(), "eos_token_id", None))
    text = _read_json(folder / "tokenizer_config.json").get("eos_token")
    text = text.get("content") if isinstance(text, dict) else text
    added = _read_json(folder / "tokenizer.json").get("added_tokens", [])
    named.append([token["id"] for token in added if token.get("content") == text and "id" in token])
    flat = [i for ids in named if ids is not None for i in (ids if isinstance(ids, list) else [ids])]
    return tuple(dict.fromkeys(flat))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()).items())
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError) as error:
        raise ModelRefused(f"{path} is not JSON ({error}): fetch the model again") from error
