"""Text in and out of models: tokenizer, chat template, incremental detokeniser, stop strings.

Knows text and token ids; never weights, caches or conversations on disk. Importing it loads no library: transformers
is imported when a tokenizer is.
"""

from pensieve.chat import ROLES, Message
from pensieve.text.chat import ChatText, Extension
from pensieve.text.detokenize import Detokenizer
from pensieve.text.overflow import Truncated, truncate
from pensieve.text.stop import StopStrings, keep_tokens

__all__ = ["ROLES", "ChatText", "Detokenizer", "Extension", "Message", "StopStrings", "Truncated", "keep_tokens", "truncate"]
