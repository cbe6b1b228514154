"""Conversations that outlive the process: messages and raw token ids, durable before they are acknowledged.

Knows trees of turns in a database; never models, caches or text rendering.
"""

from pensieve.store.base import Conversation, ConversationStore, Turn, path_messages, path_tokens
from pensieve.store.sqlite import SqliteStore, default_path

__all__ = [
    "Conversation",
    "ConversationStore",
    "SqliteStore",
    "Turn",
    "default_path",
    "path_messages",
    "path_tokens",
]
