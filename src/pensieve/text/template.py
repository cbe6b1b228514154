"""Renders messages and tools with a chat template, and finds out what the template can do.

Knows templates and template variables; never token ids, logs or whose text it is. What a template can do with
tools is found out by rendering a tool and a call of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pensieve.errors import ConfigError, InvalidRequest, ModelUnavailable
from pensieve.message import Message
from pensieve.text.tool_format import ToolFormat, Tools, format_of_call, map_texts, write_calls, write_plainly

# For models without a template: each message is a paragraph that begins with its speaker's name.
PLAIN_TEMPLATE = (
    "{{ plain_bos }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% else %}{{ message.role | capitalize }}: {{ message.content | trim }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
PLAIN_STOPS = ("\nUser:",)
MAX_REASON = 500  # characters of a template's own error that are shown

Turn = dict[str, Any]  # a message as templates take it

_PROBE = "pensieve_probe"
PROBE_TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": _PROBE, "description": "?", "parameters": {"type": "object", "properties": {}}},
    }
]
_ASK: Turn = {"role": "user", "content": "?"}
# Mistral's templates require ids of nine letters and digits.
_CALL: Turn = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "pensieve1", "type": "function", "function": {"name": _PROBE, "arguments": {"x": 1}}}
    ],
}


# Chats that every template should be able to write, by name. No chat works without the first.
_CHATS: dict[str, list[Turn]] = {
    "a user's message": [{"role": "user", "content": _PROBE}],
    "a system message": [{"role": "system", "content": "?"}, {"role": "user", "content": _PROBE}],
    "a second question": [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "?"},
        {"role": "user", "content": _PROBE},
    ],
}
_OTHER_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
}  # until a tokenizer is known


def read_template(path: Path) -> str:
    """Read a chat template from a file and try it.

    Raises:
        ConfigError: it cannot be read, or does not write chats; the message names file and line.
    """
    try:
        source = path.expanduser().read_text()
    except OSError as error:
        raise ConfigError(f"--chat-template {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--chat-template {path} is no text in UTF-8: {error.reason} at byte {error.start}"
        ) from error
    if not source.strip():
        raise ConfigError(
            f"--chat-template {path} is empty: it must be a Jinja template, as in a model's "
            "chat_template.jinja"
        )
    if source.lstrip().startswith('{"'):
        raise ConfigError(
            f"--chat-template {path} is JSON: it must be the Jinja template itself, as in a model's "
            "chat_template.jinja"
        )
    troubles = what_fails(source, _OTHER_TOKENS)
    for what in ("a user's message", "a second question"):
        if what in troubles:
            line, reason = troubles[what]
            where = f", line {line}" if line is not None else ""
            raise ConfigError(f"--chat-template {path}{where}: it does not write {what}: {reason}")
    return source


def what_fails(source: str, variables: Mapping[str, object]) -> dict[str, tuple[int | None, str]]:
    """Which of a few plain chats a template cannot write.

    Returns:
        By the chat's name, the template's line (None if unknown) and the reason.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    troubles: dict[str, tuple[int | None, str]] = {}
    for name, turns in _CHATS.items():
        try:
            (rendered,), _ = render_jinja_template(
                [turns], chat_template=source, add_generation_prompt=True, **variables
            )
        except MemoryError:  # a limit of the caller, not an error of the template
            raise
        except Exception as error:  # a template is foreign code and may raise anything
            troubles[name] = (_line_of(error), " ".join(str(error).split()) or type(error).__name__)
            continue
        if _PROBE not in rendered:
            troubles[name] = (None, "what was said is not in what it writes")
    return troubles


def _line_of(error: Exception) -> int | None:
    """The template's line in which it failed; None if unknown."""
    if (line := getattr(error, "lineno", None)) is not None:
        return int(line)
    found = None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            found = trace.tb_lineno
        trace = trace.tb_next
    return found


class PromptTemplate:
    """Renders chats.

    Args:
        tokenizer: a Hugging Face tokenizer.
        options: variables for the template beyond the messages.
        plain_bos: what a model without a template begins with.

    Attributes:
        source: the template's source.
        tools_source: the source of the template that is used with tools; nearly always the same.
        supports_tools: whether the template writes a list of tools.
        writes_calls: whether it also writes calls, in a form that we can parse. If not, tools and calls are
            written as text.
        tool_format: how the model writes calls.
        trouble: which plain chats the template cannot write, and why; None if it can write all.
        moves_tools: whether the list of tools moves to later messages as the chat goes on.

    Raises:
        ModelUnavailable: the tokenizer has several templates and no default.
    """

    def __init__(self, tokenizer: Any, options: Mapping[str, object], plain_bos: str) -> None:
        self._tokenizer = tokenizer
        self._options = dict(options)
        self.is_plain = not tokenizer.chat_template
        if self.is_plain:
            self.source = self.tools_source = PLAIN_TEMPLATE
            self._options["plain_bos"] = plain_bos
        else:
            self.source = _source_of(tokenizer)
            several = isinstance(tokenizer.chat_template, dict)
            self.tools_source = (
                str(tokenizer.chat_template.get("tool_use", self.source)) if several else self.source
            )
        self.trouble = None if self.is_plain else self._find_trouble()
        self.supports_tools = _PROBE in self._try([_ASK], PROBE_TOOLS)
        written = (
            self._try([_ASK, _CALL], PROBE_TOOLS, add_generation_prompt=False) if self.supports_tools else ""
        )
        native = format_of_call(written.rpartition("?")[2], _PROBE)
        self.writes_calls = native is not None
        self.tool_format = native or ToolFormat.HERMES
        asked_twice = [_ASK, {"role": "assistant", "content": "#"}, _ASK]
        self.moves_tools = (
            self.writes_calls and _PROBE in self._try(asked_twice, PROBE_TOOLS).rpartition("#")[2]
        )
        self._takes_system = _PROBE in self._try([{"role": "system", "content": _PROBE}, _ASK], None)

    def variables(self, messages: Sequence[Message]) -> list[Turn]:
        """Messages as templates take them."""
        names = {call.id: call.name for message in messages for call in message.tool_calls}
        turns: list[Turn] = []
        for message in messages:
            turn: Turn = {"role": message.role, "content": message.content}
            if message.tool_calls:
                turn["tool_calls"] = [
                    {
                        "id": self._id(call.id),
                        "type": "function",
                        "function": {"name": call.name, "arguments": parsed(call.arguments)},
                    }
                    for call in message.tool_calls
                ]
            if message.tool_call_id is not None:
                turn["tool_call_id"] = self._id(message.tool_call_id)
            name = message.name or names.get(message.tool_call_id or "")
            if name is not None:
                turn["name"] = name
            turns.append(turn)
        return turns

    def render(self, turns: Sequence[Turn], tools: Tools | None, add_generation_prompt: bool = True) -> str:
        """The template's text for these messages.

        Raises:
            InvalidRequest: the template refuses these messages.
        """
        if not turns:
            raise InvalidRequest("a prompt needs at least one message, got none")
        try:
            if self.writes_calls:
                return self._write(turns, tools, add_generation_prompt)
            return self._write(write_plainly(turns, tools, self._takes_system), None, add_generation_prompt)
        except MemoryError:
            raise
        except Exception as error:  # a template is foreign code and may raise anything
            roles = ", ".join(turn["role"] for turn in turns[:8]) + (", …" if len(turns) > 8 else "")
            raise InvalidRequest(
                f"the model's chat template refuses these messages ({roles}): {str(error)[:MAX_REASON]}"
            ) from error

    def said(self, turn: Turn) -> str:
        """The content of an assistant's message when it is rendered."""
        return str(turn["content"]) if self.writes_calls else write_calls(turn)

    def probe_call(self) -> str:
        """A rendered call after the function's name; empty if the template cannot write calls."""
        written = (
            self._try([_ASK, _CALL], PROBE_TOOLS, add_generation_prompt=False) if self.writes_calls else ""
        )
        return written.rpartition(_PROBE)[2]

    def probe_tools(self) -> tuple[str, str]:
        """The same question without and with a list of tools."""
        return self._try([_ASK], None), self._try([_ASK], PROBE_TOOLS)

    def begins_thinking(self) -> bool:
        """Whether an answer begins inside `<think>`, because the template wrote the marker."""
        asked = self._try([_ASK], None)
        return asked.rfind("<think>") > asked.rfind("</think>")

    def _find_trouble(self) -> str | None:
        tokens = {
            name: str(value)
            for name, value in self._tokenizer.special_tokens_map.items()
            if not isinstance(value, list)
        }
        troubles = what_fails(self.source, {**tokens, **self._options})
        if not troubles:
            return None
        reasons = dict.fromkeys(
            f"line {line}: {reason}" if line is not None else reason for line, reason in troubles.values()
        )
        return f"{', '.join(troubles)} ({'; '.join(reasons)})"

    def _write(self, turns: Sequence[Turn], tools: Tools | None, add_generation_prompt: bool) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                [dict(turn) for turn in turns],
                tools=list(tools) if tools else None,
                chat_template=self.tools_source if tools else self.source,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._options,
            )
        )

    def _try(self, turns: Sequence[Turn], tools: Tools | None, add_generation_prompt: bool = True) -> str:
        """The template's text for a probe; empty if it refuses."""
        try:
            return self._write(turns, tools, add_generation_prompt)
        except MemoryError:
            raise
        # foreign code, as above; a template that refuses a probe cannot do what it asks for
        except Exception:
            return ""

    def _id(self, call_id: str) -> str:
        """A call's id as the template takes it."""
        if self.tool_format not in (ToolFormat.MISTRAL, ToolFormat.MISTRAL_ARGS) or re.fullmatch(
            r"[a-zA-Z0-9]{9}", call_id
        ):
            return call_id
        return hashlib.blake2b(call_id.encode(errors="surrogatepass")).hexdigest()[:9]


def parsed(arguments: str) -> Any:
    """A call's arguments as data; their text if it is not JSON that can be written again."""
    if not arguments.strip():
        return {}
    try:
        value = json.loads(arguments, parse_constant=_no_constant)
        json.dumps(map_texts(value, str), ensure_ascii=False).encode()  # half a surrogate pair has no bytes
    except (ValueError, RecursionError):
        return arguments
    return value


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _source_of(tokenizer: Any) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:  # several templates and no default
        raise ModelUnavailable(f"the tokenizer's chat template cannot be used: {error}") from error
