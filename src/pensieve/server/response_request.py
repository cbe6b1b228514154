"""The body of POST /v1/responses, as checked types.

Knows OpenAI's field names; never conversations or answers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from pensieve.core.request import MAX_LOGPROBS
from pensieve.server.errors import ApiError, unsupported
from pensieve.server.fields import (
    Body,
    Count,
    Identifier,
    Metadata,
    Name,
    Probability,
    Seed,
    Strict,
    Temperature,
    refuse_tuning,
)
from pensieve.server.items import Input
from pensieve.server.request_tools import MAX_TOOLS


class ConversationRef(Strict):
    """`conversation` as an object."""

    id: Identifier


class ResponseTool(Strict):
    """A function; here its fields stand beside `type`."""

    type: StrictStr
    name: Name | None = None
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class ResponseToolChoice(Strict):
    """A function that must be called."""

    type: Literal["function"]
    name: Name


class Reasoning(Strict):
    """`reasoning`."""

    effort: StrictStr | None = None
    summary: StrictStr | None = None
    generate_summary: StrictStr | None = None


class TextFormat(BaseModel):
    """`text.format`. Only text is supported; the other fields belong to formats that are refused by name."""

    model_config = ConfigDict(extra="allow")
    type: StrictStr


class TextOptions(Strict):
    """`text`."""

    format: TextFormat | None = None
    verbosity: StrictStr | None = None


class ResponseStreamOptions(Strict):
    """`stream_options`."""

    include_obfuscation: StrictBool | None = None


class ResponseRequest(Body):
    """POST /v1/responses."""

    model: StrictStr | None = None  # None for the one that is served
    input: Input | None = None
    instructions: StrictStr | None = None
    previous_response_id: Identifier | None = None
    conversation: Identifier | ConversationRef | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    include: Annotated[list[StrictStr], Field(fail_fast=True, max_length=64)] | None = None
    stream: StrictBool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: StrictBool | None = None
    background: StrictBool | None = None
    tools: Annotated[list[ResponseTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: StrictBool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Metadata = None
    user: StrictStr | None = None
    prompt_cache_key: StrictStr | None = None
    safety_identifier: StrictStr | None = None
    # beyond OpenAI's
    seed: Seed | None = None
    ignore_eos: StrictBool | None = None
    # not supported, except for the value that changes nothing
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    max_tool_calls: StrictInt | None = None
    prompt: Any = None
    service_tier: StrictStr | None = None
    prompt_cache_retention: StrictStr | None = None
    prompt_cache_options: Any = None
    context_management: Any = None
    moderation: Any = None

    def refuse(self) -> None:
        """Refuse unsupported fields and values."""
        if self.text is not None and self.text.format is not None and self.text.format.type != "text":
            raise unsupported(
                "text.format",
                f"text.format {self.text.format.type!r} is not supported: answers are not constrained here",
            )
        reasoning = self.reasoning
        if reasoning is not None and (
            reasoning.summary is not None or reasoning.generate_summary is not None
        ):
            raise unsupported(
                "reasoning.summary", "reasoning summaries are not supported: leave reasoning.summary out"
            )
        refuse_tuning(
            reasoning.effort if reasoning is not None else None,
            self.text.verbosity if self.text is not None else None,
            self.service_tier,
            self.prompt_cache_retention,
        )
        for field in ("prompt", "max_tool_calls", "prompt_cache_options", "context_management", "moderation"):
            if getattr(self, field) is not None:
                raise unsupported(field, f"{field} is not supported: leave it out")
        for wanted in self.include or ():
            if wanted not in ("message.output_text.logprobs", "reasoning.encrypted_content"):
                raise unsupported(
                    "include", f"include {wanted!r} is not supported: this server has no such output"
                )
        if self.previous_response_id is not None and self.conversation is not None:
            raise ApiError(
                400,
                "previous_response_id and conversation exclude each other: both say what to go on from",
                code="invalid_value",
                param="conversation",
            )
        if self.background and self.store is False:
            raise ApiError(
                400,
                "background needs store: the answer is fetched later",
                code="invalid_value",
                param="background",
            )

    @property
    def num_logprobs(self) -> int | None:
        """Number of alternatives to give log-probabilities of; None for no log-probabilities."""
        wanted = "message.output_text.logprobs" in (self.include or ()) or bool(self.top_logprobs)
        return (self.top_logprobs or 0) if wanted else None

    def params(self) -> dict[str, Any]:
        """The fields that a response object repeats."""
        choice = self.tool_choice
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_logprobs": self.top_logprobs or 0,
            "tools": [
                tool.model_dump() | {"strict": False} for tool in self.tools or ()
            ],  # whatever was asked for: no schema is enforced
            "tool_choice": choice.model_dump()
            if isinstance(choice, ResponseToolChoice)
            else choice or "auto",
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "truncation": self.truncation or "disabled",
            "previous_response_id": self.previous_response_id,
            "background": bool(self.background),
            "store": self.store is not False,
            "metadata": self.metadata or {},
            "user": self.user,
            "prompt_cache_key": self.prompt_cache_key,
            "safety_identifier": self.safety_identifier,
        }
