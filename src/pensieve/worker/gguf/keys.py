"""The keys of one architecture, each to be used or known to be harmless.

Knows which were asked for; never what they mean.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from pensieve.errors import ModelRefused
from pensieve.worker.gguf.file import Strings

# Keys that mean nothing while they have one of these values, with what they would mean otherwise.
_NEUTRAL: dict[str, tuple[Container[Any], str]] = {
    "attention.causal": ((True,), "whether tokens see only those before them"),
    "attention.clamp_kqv": ((0,), "a limit to keys and values"),
    "attention.max_alibi_bias": ((0,), "alibi in place of rotary positions"),
    "attention.q_lora_rank": ((0,), "a compressed query"),
    "attention.kv_lora_rank": ((0,), "compressed keys and values"),
    "attention.shared_kv_layers": ((0,), "layers without keys and values of their own"),
    "attention.sliding_window": ((0,), "a window"),
    "attn_logit_softcapping": ((0,), "a limit to attention scores"),
    "final_logit_softcapping": ((0,), "a limit to logits"),
    "embedding_length_per_layer_input": ((0,), "embeddings for each layer"),
    "expert_count": ((0,), "experts"),
    "expert_group_count": ((0, 1), "groups of experts"),
    "expert_group_used_count": ((0, 1), "groups of experts"),
    "expert_shared_count": ((0,), "an expert that all tokens share"),
    "expert_used_count": ((0,), "experts"),
    "expert_weights_scale": ((0, 1), "a factor to the experts' weights"),
    "leading_dense_block_count": ((0,), "first layers without experts"),
    "nextn_predict_layers": ((0,), "layers that predict further tokens"),
    "pooling_type": ((0,), "one vector of a whole text, as embedding models give"),
    "use_parallel_residual": ((False,), "attention and MLP side by side"),
}
# Keys that never change an answer, each with its meaning.
_HARMLESS = {
    "rope.scaling.finetuned": "whether training went on after the rotary positions were scaled",
    "tensor_data_layout": "the first converter's order of rows, which the architecture says too",
}


class Keys:
    """The `{architecture}.*` keys of a file. Remembers which were asked for."""

    def __init__(self, metadata: dict[str, Any], architecture: str, label: str) -> None:
        """Take a file's keys.

        Args:
            metadata: of the file.
            architecture: the prefix of the keys.
            label: the file, for messages.
        """
        self.architecture, self.label = architecture, label
        self._values = {
            k.removeprefix(f"{architecture}."): v
            for k, v in metadata.items()
            if k.startswith(f"{architecture}.")
        }
        self._used: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether the file has the key."""
        return name in self._values

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it is stored."""
        self._used.add(name)
        return self._values.get(name, default)

    def ignore(self, *names: str) -> None:
        """Note that these keys change nothing here."""
        self._used.update(names)

    def ignore_under(self, *prefixes: str) -> None:
        """Note that no key with one of these prefixes changes anything here."""
        self._used.update(name for name in self._values if name.startswith(prefixes))

    def whole(self, name: str, default: int | None = None) -> int:
        """An integer; of a list with one number a layer, their common value.

        Raises:
            ModelRefused: missing and without a default, or not such a number.
        """
        value = self.get(name, default)
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]
        if value is None:
            raise self.refused(f"it does not say its {name}")
        if isinstance(value, list):
            raise self.refused(
                f"its {name} differs from layer to layer ({', '.join(map(str, value[:6]))}, ...)"
            )
        if isinstance(value, bool | str | Strings) or value != int(value) or value < 0:
            raise self.refused(f"its {name} is {value!r}, which is no count")
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        """A number.

        Raises:
            ModelRefused: missing and without a default, or not a number.
        """
        value = self.get(name, default)
        if value is None:
            raise self.refused(f"it does not say its {name}")
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refused(f"its {name} is {value!r}, which is no number")
        return float(value)

    def require(self, name: str, value: float, why: str) -> None:
        """Require this value of a key, if the file has it: transformers always computes with it."""
        if name in self._values and abs(self.number(name) - value) > 1e-5 * abs(value):
            raise self.refused(f"its {name} is {self.number(name):g}; {why}")

    def require_if_unused(self, name: str, value: float, why: str) -> None:
        """Require this value of a key, unless the key was used otherwise."""
        if name not in self._used:
            self.require(name, value, why)

    def unused(self) -> list[str]:
        """Keys that were not asked for and are not known to be harmless, with their values."""
        left = []
        for name, value in self._values.items():
            if name in self._used or name in _HARMLESS:
                continue
            if name in _NEUTRAL and not isinstance(value, list) and value in _NEUTRAL[name][0]:
                continue
            meaning = f" ({_NEUTRAL[name][1]})" if name in _NEUTRAL else ""
            shown = value if isinstance(value, int | float | str) else "..."
            left.append(f"{self.architecture}.{name} = {shown}{meaning}")
        return left

    def refused(self, reason: str) -> ModelRefused:
        """The error for a refusal, with the way out."""
        return ModelRefused(
            f"{self.label} cannot be converted: {reason}. Name a folder with safetensors of the same model, "
            "or its hub id, instead"
        )
