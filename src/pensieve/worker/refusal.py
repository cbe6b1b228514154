"""How a model is refused, and what a forward that fails says of it.

Knows words and exceptions; never configs, caches or logits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from pensieve.errors import ModelRefused

log = logging.getLogger(__name__)

T = TypeVar("T")


class ForwardFails(ModelRefused):
    """A model whose forward raises over a paged cache."""


class FusedDiffers(ModelRefused):
    """A model that fused operations do not compute as its modules do."""


class UnsupportedAttention(Exception):
    """A layer asks attention for something that ours does not do."""


class AttentionBypassed(AssertionError):
    """A layer calls our attention function without the step's attention.

    It does not hand on its keyword arguments.
    """


def refused(label: str, reason: str) -> ModelRefused:
    """The refusal of a model, with the command that lists models that can be served."""
    return ModelRefused(f"{label} cannot be served: {reason}. `pensieve models` lists models that can")


def attempt(label: str, forward: Callable[[], T]) -> T:
    """Run a forward through our attention.

    Raises:
        ModelRefused: if the forward raises, whatever it raises.
    """
    try:
        return forward()
    except ModelRefused:
        raise
    except UnsupportedAttention as error:
        raise refused(label, str(error)) from error
    except AttentionBypassed as error:
        reason = (
            "its layers do not hand what our attention needs on to it, "
            "as transformers' attention interface asks"
        )
        raise refused(label, reason) from error
    except Exception as error:
        log.info("%s: its forward fails over a paged cache", label, exc_info=error)
        kind, where = type(error).__name__, _where(error)
        reason = f"its own code fails over a paged cache ({kind} in transformers' {where})"
        raise ForwardFails(refused(label, reason).message) from error


def _where(error: Exception) -> str:
    """The function that raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "code" if trace is None else trace.tb_frame.f_code.co_qualname
