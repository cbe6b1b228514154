"""The keys and names that all architectures share, and what each makes of a file.

Knows keys and names that all share; never one architecture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pensieve.worker.gguf.file import GgufModel, GgufTensor, Strings
from pensieve.worker.gguf.keys import Keys
from pensieve.worker.gguf.rope import llama3, rope_parameters
from pensieve.worker.gguf.transforms import Transform


@dataclass(frozen=True, slots=True)
class Rule:
    """A parameter that needs more than another name."""

    parameter: re.Pattern[str]  # of transformers; its group "n", if any, is the layer
    sources: tuple[str, ...]  # names of tensors; "{n}" is the layer
    transform: Transform


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a file means to transformers."""

    config: dict[str, Any]  # of its `model_type`
    arrangements: Mapping[str, Transform] = field(
        default_factory=dict
    )  # by the name of a tensor without "blk.N." and ".weight"
    rules: tuple[Rule, ...] = ()
    ignored: tuple[str, ...] = ()  # prefixes of the names of tensors that change nothing
    note: str | None = None  # what the user should know; None if nothing


class Source:
    """A file's keys and its tensors' names and shapes, with what all architectures have in common."""

    def __init__(self, model: GgufModel) -> None:
        self.model = model
        self.keys = Keys(model.metadata, model.architecture, model.name)
        self.tensors = model.tensors

    def has(self, name: str) -> bool:
        """Whether there is such a tensor; of layers, the first is asked."""
        return name in self.tensors or f"blk.0.{name}" in self.tensors

    def vector(self, name: str) -> list[float] | None:
        """A tensor's numbers; None if it is missing."""
        tensor = self.tensors.get(name)
        return None if tensor is None else [float(value) for value in tensor.values().reshape(-1)]

    @property
    def context(self) -> int:
        """The context that the model was made for, tokens."""
        return self.keys.whole("context_length")

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        heads = self.keys.whole("attention.head_count")
        size = self.keys.whole("attention.key_length", self.keys.whole("embedding_length") // max(heads, 1))
        if self.keys.whole("attention.value_length", size) != size:
            raise self.keys.refused("its keys and values are of different sizes, which cannot be cached here")
        return size

    def common(
        self, model_type: str, *, norm: str = "rms_norm_eps", feed_forward: str = "feed_forward_length"
    ) -> dict[str, Any]:
        """The part of the config that is the same for all architectures.

        Sizes, counts, the norms' epsilon (under transformers' name for it), special tokens.
        """
        keys = self.keys
        heads = keys.whole("attention.head_count")
        epsilon = (
            "attention.layer_norm_rms_epsilon" if norm == "rms_norm_eps" else "attention.layer_norm_epsilon"
        )
        return {
            "model_type": model_type,
            "hidden_size": keys.whole("embedding_length"),
            "intermediate_size": keys.whole(feed_forward),
            "num_hidden_layers": keys.whole("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
            "max_position_embeddings": self.context,
            norm: keys.number(epsilon),
            **self.vocabulary(),
        }

    def vocabulary(self) -> dict[str, Any]:
        """The part of a config that concerns tokens."""
        embedding = self._embedding()
        size, tokens = embedding.shape[0], self.model.metadata.get("tokenizer.ggml.tokens")
        counts = [
            self.keys.whole("vocab_size", size),
            *([tokens.count] if isinstance(tokens, Strings) else []),
        ]
        if counts[0] != size or counts[-1] > size:
            raise self.keys.refused(f"it has {size} embeddings for {max(counts)} tokens")
        special = {
            f"{name}_token_id": self._token(key)
            for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        }
        return {"vocab_size": size, "tie_word_embeddings": not self.has("output.weight"), **special}

    def rope(self, *, partial: bool = False) -> dict[str, Any]:
        """Rotary parameters of all layers, Llama 3's factors included."""
        plain = rope_parameters(self.keys, self.head_dim, self.context, partial=partial)
        factors = self.vector("rope_freqs.weight")
        return plain if factors is None else llama3(self.keys, plain, np.array(factors, np.float32))

    def _embedding(self) -> GgufTensor:
        embedding = self.tensors.get("token_embd.weight")
        if embedding is None:
            raise self.keys.refused(
                "it has no token_embd.weight: the file holds a vocabulary or a part of a model, not a model"
            )
        return embedding

    def _token(self, key: str) -> int | None:
        value = self.model.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None and not isinstance(value, int):
            raise self.keys.refused(f"its tokenizer.ggml.{key}_token_id is {value!r}, which is no token id")
        return value if value is not None and value < self._embedding().shape[0] else None
