"""A request's tools, and how an answer is read that may call them.

Knows OpenAI's words for both; never endpoints or answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, StrictBool, StrictStr

from pensieve.server.errors import ApiError, unsupported
from pensieve.server.fields import Name, Strict
from pensieve.service.answer_parser import AnswerForm
from pensieve.text import ChatText, force_prefix, tool_names
from pensieve.text.tool_format import Tools

MAX_TOOLS = 128
MAX_TOOL_VALUES = 1 << 16  # JSON values in the schemas of all tools together


class FunctionSpec(Strict):
    """A function that the model may call.

    `strict` is accepted because clients send it by default; the schema is shown to the model and not
    enforced.
    """

    name: Name
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None

    def tool(self) -> dict[str, object]:
        """As chat templates expect it."""
        function: dict[str, object] = {"name": self.name, "description": self.description or ""}
        function["parameters"] = (
            self.parameters if self.parameters is not None else {"type": "object", "properties": {}}
        )
        return {"type": "function", "function": function}


class Tool(BaseModel):
    """An entry of `tools`."""

    model_config = ConfigDict(extra="allow")
    type: StrictStr
    function: FunctionSpec | None = None


class ChosenFunction(Strict):
    """The name in a `tool_choice`."""

    name: Name


class ChosenTool(Strict):
    """A `tool_choice` that names a function."""

    type: Literal["function"]
    function: ChosenFunction


def functions_of(tools: Sequence[tuple[str, FunctionSpec | None]]) -> Tools:
    """The functions as chat templates expect them, from each tool's type and function.

    Raises:
        ApiError: a tool is no function, two have one name, or their schemas are too large.
    """
    _check_size([function.parameters for _, function in tools if function is not None])
    found: dict[str, dict[str, object]] = {}
    for index, (kind, function) in enumerate(tools):
        at = f"tools.{index}"
        if kind != "function" or function is None:
            raise unsupported(at, f"{at}: only functions can be called here, got type {kind!r}")
        if function.name in found:
            message = f"{at}: two functions are called {function.name!r}"
            raise ApiError(400, message, code="invalid_value", param=at)
        found[function.name] = function.tool()
    return tuple(found.values())


def form_for(
    tools: Tools, mode: str | None, function: str | None, parallel: bool, text: ChatText
) -> AnswerForm:
    """How an answer is read that may call `tools`, or must.

    Args:
        tools: the functions, as chat templates expect them.
        mode: the tool choice: none, auto or required; None if it is absent or names a function.
        function: the function that the tool choice names; None if it names none.
        parallel: whether one answer may hold several calls.
        text: the model's tokenizer and template.

    Raises:
        ApiError: the choice is not among the functions.
    """
    form = AnswerForm(tools, parallel=parallel, reasoning=text.has_reasoning)
    if not tools and (function is not None or mode == "required"):
        raise ApiError(400, "tool_choice needs tools", code="invalid_value", param="tool_choice")
    if mode == "none":
        return replace(
            form, calls=False
        )  # the tools stay in the prompt, so that its cached prefix stays valid
    if function is None and mode != "required":
        return form
    names = tool_names(tools)
    if function is None:
        only = names[0] if len(names) == 1 else None
        return AnswerForm(tools, parallel=parallel, prefix=force_prefix(text.tool_format, only))
    if function not in names:
        message = f"tool_choice names {function!r}, which is none of the tools"
        raise ApiError(400, message, code="invalid_value", param="tool_choice")
    # A client that names a function wants one call of it and no text after it.
    return AnswerForm(tools, parallel=False, prefix=force_prefix(text.tool_format, function))


def _check_size(schemas: list[dict[str, Any] | None]) -> None:
    """Refuse tools whose schemas hold too many values: each is read several times for a prompt."""
    num_values, stack = 0, list[Any](schemas)
    while stack:
        item = stack.pop()
        num_values += 1
        if isinstance(item, dict | list):
            num_values += len(item)
            values = item.values() if isinstance(item, dict) else item
            stack += [value for value in values if isinstance(value, dict | list)]
        if num_values > MAX_TOOL_VALUES:
            message = (
                f"the tools' parameters hold more than {MAX_TOOL_VALUES} values: "
                "send fewer tools, or smaller schemas"
            )
            raise ApiError(400, message, code="invalid_value", param="tools")
