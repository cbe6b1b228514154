"""Text in and out of models.

Tokenizer, chat template, incremental detokeniser, stop strings, tool calls, reasoning.

Knows text and token ids; never weights, caches or conversations on disk. Importing it loads no library:
transformers is imported when a tokenizer is.
"""

from pensieve.message import ROLES, Message, ToolCall
from pensieve.text.chat_text import ChatText
from pensieve.text.detokenize import Detokenizer
from pensieve.text.jobs import (
    DecodeIds,
    EncodeChat,
    EncodeRest,
    EncodeText,
    InlineRunner,
    TextJob,
    TextRunner,
    WriteChat,
    WrittenChat,
    check_length,
)
from pensieve.text.overflow import Truncated, newest, size_of, surely_exceed, truncate
from pensieve.text.prompt_writer import Extension
from pensieve.text.reasoning import ReasoningDelta, ReasoningSplitter
from pensieve.text.stop import StopStrings, keep_tokens
from pensieve.text.template import read_template
from pensieve.text.tool_format import ToolFormat, force_prefix, tool_names, tools_prompt
from pensieve.text.tools import CallBegin, CallDelta, CallEnd, ContentDelta, ToolCallParser, ToolEvent

__all__ = [
    "DecodeIds",
    "EncodeChat",
    "EncodeRest",
    "EncodeText",
    "InlineRunner",
    "TextJob",
    "TextRunner",
    "WriteChat",
    "WrittenChat",
    "check_length",
    "newest",
    "size_of",
    "CallBegin",
    "CallDelta",
    "CallEnd",
    "ChatText",
    "ContentDelta",
    "Detokenizer",
    "Extension",
    "Message",
    "ROLES",
    "ReasoningDelta",
    "ReasoningSplitter",
    "StopStrings",
    "ToolCall",
    "ToolCallParser",
    "ToolEvent",
    "ToolFormat",
    "Truncated",
    "force_prefix",
    "keep_tokens",
    "read_template",
    "surely_exceed",
    "tool_names",
    "tools_prompt",
    "truncate",
]
