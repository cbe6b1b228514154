"""Conversations that outlive the process: messages and raw token ids, durable before they are acknowledged.

Knows trees of turns in a database; never models, caches or text rendering.
"""

from pensieve.store.conversation_store import ConversationStore
from pensieve.store.lease import Lease
from pensieve.store.opening import open_store, sqlite_path
from pensieve.store.sqlite import MEMORY, SqliteStore, default_path
from pensieve.store.values import (
    CLAIM_S,
    INTERRUPTED,
    LEASE_S,
    Claim,
    Conversation,
    Erased,
    Owner,
    Turn,
    path_messages,
    path_tokens,
)

__all__ = [
    "CLAIM_S",
    "Claim",
    "Conversation",
    "ConversationStore",
    "Erased",
    "INTERRUPTED",
    "LEASE_S",
    "Lease",
    "MEMORY",
    "Owner",
    "SqliteStore",
    "Turn",
    "default_path",
    "open_store",
    "path_messages",
    "path_tokens",
    "sqlite_path",
]
