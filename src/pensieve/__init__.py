"""Pensieve: stateful serving of large language models. Conversations keep their KV cache between turns.

`from pensieve import Pensieve, SamplingParams` is the library's front door. Torch is imported when a model is
loaded, not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pensieve.core.request import SamplingParams
    from pensieve.runtime.library import Conversation, Pensieve

__all__ = ["Conversation", "Pensieve", "SamplingParams"]
__version__ = "0.2.0"

_HOMES = {
    "Conversation": "pensieve.runtime.library",
    "Pensieve": "pensieve.runtime.library",
    "SamplingParams": "pensieve.core.request",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pensieve' has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
