"""The body of POST /v1/completions, as checked types. Knows OpenAI's field names; never caches or answers."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StrictBool, StrictInt, StrictStr

from pensieve.core.request import MAX_LOGPROBS
from pensieve.server.errors import ApiError, unsupported
from pensieve.server.fields import CompletionFields

MAX_IDS = 1 << 20  # token ids in one list
MAX_PROMPTS = 1024  # of which one is answered


class CompletionRequest(CompletionFields):
    """POST /v1/completions."""

    prompt: (
        StrictStr
        | Annotated[list[StrictInt], Field(fail_fast=True, max_length=MAX_IDS)]
        | Annotated[list[StrictStr], Field(fail_fast=True, max_length=MAX_PROMPTS)]
        | Annotated[
            list[Annotated[list[StrictInt], Field(fail_fast=True, max_length=MAX_IDS)]],
            Field(fail_fast=True, max_length=MAX_PROMPTS),
        ]
    )
    echo: StrictBool | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: StrictInt | None = None
    suffix: StrictStr | None = None
    prompt_cache_key: Annotated[StrictStr, Field(max_length=64)] | None = None

    def refuse(self) -> None:
        """Refuse unsupported fields and values."""
        self.refuse_common()
        if self.best_of not in (None, 1):
            raise unsupported(
                "best_of", f"best_of must be 1: this server gives one answer a request, got {self.best_of}"
            )
        if self.suffix:
            raise unsupported("suffix", "suffix is not supported: leave it out")

    def one_prompt(self) -> str | list[int]:
        """The prompt; a list with one prompt counts as that prompt."""
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) != 1:
                raise unsupported("prompt", f"one prompt a request, got {len(prompt)}: send them one by one")
            first = prompt[0]
            assert not isinstance(first, int)
            return first
        if not prompt:
            raise ApiError(400, "prompt must not be empty", code="invalid_value", param="prompt")
        return prompt  # type: ignore[return-value]
