"""Turns of conversations over an engine: messages in, text out, turns made durable.

Knows text, store and messages; never tensors, slots or HTTP.
"""

from pensieve.service.engine_client import DEFAULT_NAMESPACE, EngineClient
from pensieve.service.erasing import Erasure
from pensieve.service.service import ConversationService
from pensieve.service.turn import LEAF, Path, PendingTurn, Piece, TurnDone, TurnSpec

__all__ = [
    "DEFAULT_NAMESPACE",
    "LEAF",
    "EngineClient",
    "ConversationService",
    "Erasure",
    "Path",
    "PendingTurn",
    "Piece",
    "TurnDone",
    "TurnSpec",
]
