"""How models write tool calls, and how a prompt asks them to.

Knows the written forms; never tokenizers, templates or streams.

Most templates that know tools write them in their own form. For the others there is a text for the system
message, `tools_prompt`, and everything else is written into messages that any template takes: an assistant's
calls into its content, a tool's result into a user's message.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pensieve.errors import InvalidRequest

# Function tools as the OpenAI API has them: {"type": "function", "function": {"name", "description",
# "parameters"}}
Tools = Sequence[Mapping[str, object]]


class ToolFormat(enum.Enum):
    """A form in which models write calls."""

    HERMES = "hermes"  # <tool_call>{"name": "f", "arguments": {}}</tool_call>, one after another
    LLAMA3 = (
        "llama3"  # {"name": "f", "parameters": {}}, perhaps after <|python_tag|>; several are separated by ;
    )
    MISTRAL = "mistral"  # [TOOL_CALLS][{"name": "f", "arguments": {}}, ...]
    MISTRAL_ARGS = (
        "mistral-args"  # [TOOL_CALLS]f[ARGS]{}, one after another, perhaps with [CALL_ID]x before [ARGS]
    )

    @property
    def begin(self) -> str:
        """The text that a call begins with; Llama 3 may leave it out."""
        return {"hermes": "<tool_call>", "llama3": "<|python_tag|>"}.get(self.value, "[TOOL_CALLS]")

    @property
    def markers(self) -> tuple[str, ...]:
        """The texts that delimit calls. They may be tokens of the vocabulary, special or not."""
        return {
            "hermes": (self.begin, "</tool_call>"),
            "mistral-args": (self.begin, "[CALL_ID]", "[ARGS]"),
        }.get(self.value, (self.begin,))


# Delimiters that `write_plainly` writes: no user's text may contain them as tokens, if the vocabulary has
# them.
PLAIN_MARKUP = ("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def tool_names(tools: Tools) -> tuple[str, ...]:
    """The functions' names.

    Raises:
        InvalidRequest: a tool is not a function with a name, or two have the same name.
    """
    names: list[str] = []
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
            raise InvalidRequest(
                f'tools[{index}] must be {{"type": "function", "function": {{...}}}}, got {_shortened(tool)}'
            )
        name = function.get("name")
        if not isinstance(name, str) or not name.strip():
            raise InvalidRequest(f"tools[{index}].function.name must be text, got {name!r}")
        if name in names:
            raise InvalidRequest(f"tools[{index}].function.name must be unique, {name!r} is there twice")
        names.append(name)
    return tuple(names)


def force_prefix(format: ToolFormat, name: str | None) -> str:
    """The text that an answer begins with which must call a function; the model continues it.

    Args:
        format: the model's.
        name: the function; None leaves the choice to the model.
    """
    # No white space at the end: a token usually holds it together with what follows, and models fail after a
    # lone one.
    if format is ToolFormat.MISTRAL_ARGS:
        return "[TOOL_CALLS]" if name is None else f"[TOOL_CALLS]{name}[ARGS]"
    opening, key = {
        ToolFormat.HERMES: ("<tool_call>\n", "arguments"),
        ToolFormat.LLAMA3: ("", "parameters"),
        ToolFormat.MISTRAL: ("[TOOL_CALLS][", "arguments"),
    }[format]
    return (
        opening
        + '{"name": "'
        + ("" if name is None else f'{json.dumps(name, ensure_ascii=False)[1:]}, "{key}":')
    )


def tools_prompt(tools: Tools, format: ToolFormat = ToolFormat.HERMES) -> str:
    """The text that describes tools, and how to call them, to a model whose template does not.

    The form is the one that Hermes and Qwen models were trained on: other models have often seen it, too.
    """
    signatures = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    calls = {
        ToolFormat.HERMES: (
            "within <tool_call></tool_call> XML tags:\n"
            '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
        ),
        ToolFormat.LLAMA3: 'and nothing else:\n{"name": <function-name>, "parameters": <args-json-object>}',
        ToolFormat.MISTRAL: (
            'in a list:\n[TOOL_CALLS][{"name": <function-name>, "arguments": <args-json-object>}]'
        ),
        ToolFormat.MISTRAL_ARGS: (
            "behind the function's name:\n[TOOL_CALLS]<function-name>[ARGS]<args-json-object>"
        ),
    }[format]
    what = "its arguments" if format is ToolFormat.MISTRAL_ARGS else "function name and arguments"
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML "
        f"tags:\n<tools>\n{signatures}\n</tools>\n\n"
        f"For each function call, return a json object with {what} {calls}"
    )


def write_calls(turn: Mapping[str, Any]) -> str:
    """An assistant's content followed by its calls, in the form that `tools_prompt` asks for."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", ())]
    return "\n".join(
        [
            *([turn["content"]] if turn["content"] or not calls else []),
            *(f"<tool_call>\n{call}\n</tool_call>" for call in calls),
        ]
    )


def write_plainly(
    turns: Sequence[Mapping[str, Any]], tools: Tools | None, takes_system: bool
) -> list[dict[str, Any]]:
    """The same chat in system, user and assistant messages that hold only text.

    Args:
        turns: template variables of messages.
        tools: described in the system message, or before the first user's text if there can be none.
        takes_system: whether the template takes system messages.
    """
    plain: list[dict[str, Any]] = []
    for index, turn in enumerate(turns):
        if turn["role"] == "tool":
            response = f"<tool_response>\n{turn['content']}\n</tool_response>"
            if index > 0 and turns[index - 1]["role"] == "tool":
                plain[-1]["content"] += "\n" + response
            else:
                plain.append({"role": "user", "content": response})
        else:
            plain.append({"role": turn["role"], "content": write_calls(turn)})
    if tools:
        role = "system" if takes_system else "user"
        at = next((index for index, turn in enumerate(plain) if turn["role"] == role), None)
        if at is None or (takes_system and at > 0):
            at = 0
            plain.insert(0, {"role": role, "content": ""})
        said = [plain[at]["content"]] if plain[at]["content"] else []
        plain[at]["content"] = "\n\n".join(
            [*said, tools_prompt(tools)] if takes_system else [tools_prompt(tools), *said]
        )
    return plain


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of JSON data with every string changed, keys of objects included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(str(key)): map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_texts(item, change) for item in value]
    return value


def texts_in(value: Any) -> Iterator[str]:
    """Every string in JSON data, keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)


def format_of_call(written: str, name: str) -> ToolFormat | None:
    """The form in which a template wrote a call of the function `name`; None if we cannot parse it."""
    quoted = re.escape(json.dumps(name))
    forms = {
        ToolFormat.HERMES: r'<tool_call>\s*\{\s*"name"\s*:\s*' + quoted,
        ToolFormat.MISTRAL_ARGS: r"\[TOOL_CALLS\]\s*" + re.escape(name) + r"(\[CALL_ID\]\w*)?\[ARGS\]",
        ToolFormat.MISTRAL: r'\[TOOL_CALLS\]\s*\[\s*\{\s*"name"\s*:\s*' + quoted,
        ToolFormat.LLAMA3: r'\{\s*"name"\s*:\s*' + quoted + r'\s*,\s*"parameters"\s*:',
    }
    return next((format for format, pattern in forms.items() if re.search(pattern, written)), None)


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
