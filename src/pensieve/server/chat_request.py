"""The body of POST /v1/chat/completions, as checked types.

Knows OpenAI's field names; never conversations or answers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from pensieve.core.request import MAX_LOGPROBS
from pensieve.server.chat_messages import Messages
from pensieve.server.errors import ApiError, unsupported
from pensieve.server.fields import CompletionFields, Count, Metadata, refuse_tuning
from pensieve.server.request_tools import MAX_TOOLS, ChosenTool, Tool


class ResponseFormat(BaseModel):
    """`response_format`."""

    model_config = ConfigDict(extra="allow")
    type: StrictStr


class ChatRequest(CompletionFields):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: StrictBool | None = None
    metadata: Metadata = None
    store: StrictBool | None = None
    prompt_cache_key: Annotated[StrictStr, Field(max_length=64)] | None = None
    # not supported, except for the value that changes nothing
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[StrictStr], Field(fail_fast=True, max_length=16)] | None = None
    audio: Any = None
    prediction: Any = None
    functions: Any = None
    function_call: Any = None
    web_search_options: Any = None
    reasoning_effort: StrictStr | None = None
    verbosity: StrictStr | None = None
    service_tier: StrictStr | None = None
    safety_identifier: StrictStr | None = None
    prompt_cache_retention: StrictStr | None = None
    prompt_cache_options: Any = None
    moderation: Any = None

    def refuse(self) -> None:
        """Refuse unsupported fields and values."""
        self.refuse_common()
        if self.response_format is not None and self.response_format.type != "text":
            raise unsupported(
                "response_format",
                f"response_format {self.response_format.type!r} is not supported: "
                "answers are not constrained here; ask for JSON in the prompt",
            )
        if self.modalities not in (None, ["text"]):
            raise unsupported(
                "modalities",
                f"modalities must be ['text'], got {self.modalities}: this server reads and writes text",
            )
        gone = {"functions": "send tools", "function_call": "send tool_choice"}
        for field, way_out in gone.items():
            if getattr(self, field) is not None:
                raise unsupported(field, f"{field} is the old form: {way_out}")
        for field in ("audio", "prediction", "web_search_options", "prompt_cache_options", "moderation"):
            if getattr(self, field) is not None:
                raise unsupported(field, f"{field} is not supported: leave it out")
        refuse_tuning(self.reasoning_effort, self.verbosity, self.service_tier, self.prompt_cache_retention)
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(
                400, "top_logprobs needs logprobs: true", code="invalid_value", param="top_logprobs"
            )

    @property
    def max_new_tokens(self) -> int | None:
        """The limit, under either name."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Number of alternatives to give log-probabilities of; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None
