"""Conversations on top of an engine: messages in, text out, turns made durable. Knows text, store and messages; never tensors, slots or HTTP."""

from pensieve.service.service import DEFAULT_NAMESPACE, ConversationService, Erasure
from pensieve.service.turn import LEAF, Composed, Path, PendingTurn, Piece, TurnDone, TurnSpec

__all__ = [
    "DEFAULT_NAMESPACE",
    "LEAF",
    "Composed",
    "ConversationService",
    "Erasure",
    "Path",
    "PendingTurn",
    "Piece",
    "TurnDone",
    "TurnSpec",
]
