"""The tokenizer and chat template of a GGUF file, as transformers builds them.

Knows ways to split text; never tensors.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pensieve.errors import ModelRefused
from pensieve.worker.gguf.file import GgufModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Pre-tokenizers that split digits one by one and then as GPT-2 does. transformers only splits as GPT-2 does
# for them, which merges the space before a number differently ("\n\n  1").
_SINGLE_DIGIT_SPLITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"})
_GPT2_SPLITS = frozenset({"default", "gpt-2", "gpt2"})
_STOPS = ("eos", "eot", "eom")  # end of sequence, of turn, of message


def stop_ids(metadata: dict[str, Any]) -> tuple[int, ...]:
    """Token ids that end an answer, in the file's order of importance."""
    ids = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _STOPS)
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, int)))


def require_tokenizer(model: GgufModel) -> None:
    """Refuse by its header a file whose kind of tokenizer transformers lacks.

    Raises:
        ModelRefused: with the kinds that it has.
    """
    from transformers.integrations.gguf import gguf_tokenizer_mapping

    kinds = getattr(gguf_tokenizer_mapping, "GGUF_TOKENIZER_TYPES", None)
    if kinds is not None and model.metadata.get("tokenizer.ggml.model") not in kinds:
        raise _unbuildable(model, f"it builds {', '.join(sorted(kinds))}")


def tokenizer_of(model: GgufModel) -> tuple[PreTrainedTokenizerBase, str | None]:
    """The tokenizer, and a note if its way to split text is not known.

    Raises:
        ModelRefused: transformers cannot build it; the message says why.
    """
    from transformers import TokenizersBackend
    from transformers.integrations.gguf import gguf_tokenizer_mapping

    kind = model.metadata.get("tokenizer.ggml.model")
    try:
        # An otherwise empty folder: what is beside the file may belong to another model.
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "model.gguf").symlink_to(model.parts[0].resolve())
            tokenizer: PreTrainedTokenizerBase = TokenizersBackend.from_pretrained(
                folder, gguf_file="model.gguf", local_files_only=True
            )
    except Exception as error:  # tokenizers raises bare exceptions
        raise _unbuildable(model, " ".join(str(error).split())[:300] or type(error).__name__) from error
    context = model.metadata.get(f"{model.architecture}.context_length")
    if isinstance(context, int):
        tokenizer.model_max_length = context
    if kind != "gpt2":
        return tokenizer, None
    split = model.metadata.get("tokenizer.ggml.pre", "default")
    if split in _SINGLE_DIGIT_SPLITS:
        from tokenizers import pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        return tokenizer, None
    if split in _GPT2_SPLITS or split in getattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", {}):
        return tokenizer, None
    return tokenizer, (
        f"text is split as GPT-2 does, because the file's own way ({split!r}) is not known: some texts get "
        "other tokens than in training"
    )


def _unbuildable(model: GgufModel, why: str) -> ModelRefused:
    kind = model.metadata.get("tokenizer.ggml.model")
    what = (
        "holds no tokenizer"
        if kind is None
        else f"has a tokenizer (of the kind {kind!r}) that transformers cannot build"
    )
    return ModelRefused(
        f"{model.name} {what}: {why}. Name a folder with safetensors and tokenizer of the same model, or its "
        "hub id, instead"
    )
