"""How messages are written to a store."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from pensieve.message import Message, ToolCall
from pensieve.store.encoding import messages_text
