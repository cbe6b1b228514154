"""Fields that several request bodies share, as checked types; sampling among them.

Knows OpenAI's field names; never answers.

An unknown field is refused. A known field that this server does not support may only have the value that
changes nothing; the `refuse` of each body checks that.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pensieve.core.request import SamplingParams
from pensieve.server.errors import UNKNOWN_FIELD, ApiError, unsupported

MAX_STOPS = 16
MAX_STOP_CHARS = 1024  # of one stop string: each piece of the answer is compared with its beginnings
MAX_METADATA = 16  # entries; this and the next two are OpenAI's limits
MAX_METADATA_KEY, MAX_METADATA_VALUE = 64, 512  # characters
MAX_BIAS = 1024  # entries of `logit_bias`, which must be empty here
DEFAULT_NEW_TOKENS = 1024  # if a client sets no limit; the context may end sooner
DEFAULT_TEMPERATURE = 1.0  # OpenAI's; its other defaults are those of `SamplingParams`


class Strict(BaseModel):
    """Refuses unknown fields, and names only the first of them: an error for each would take 1 kB and 10 µs
    of all clients' time.
    """

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_many(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > len(cls.model_fields):
            unknown = next(name for name in value if name not in cls.model_fields)
            raise PydanticCustomError(UNKNOWN_FIELD, "unknown parameter", {"name": unknown})
        return value


class Body(Strict):
    """A whole request body."""


def _check_metadata(value: dict[str, str] | None) -> dict[str, str] | None:
    for key, text in (value or {}).items():
        if len(key) > MAX_METADATA_KEY or len(text) > MAX_METADATA_VALUE:
            raise ValueError(
                f"keys have at most {MAX_METADATA_KEY} characters and values {MAX_METADATA_VALUE}, "
                f"got {key[:80]!r}"
            )
    return value


def at_most(limit: int) -> BeforeValidator:
    """Refuse an object with more entries before any of them is parsed."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limit:
            raise ValueError(f"at most {limit} entries, got {len(value)}")
        return value

    return BeforeValidator(check)


Metadata = Annotated[
    dict[StrictStr, StrictStr] | None, at_most(MAX_METADATA), AfterValidator(_check_metadata)
]
Probability = Annotated[float, Field(gt=0.0, le=1.0)]
Temperature = Annotated[float, Field(ge=0.0, le=2.0)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
Count = Annotated[StrictInt, Field(ge=1, le=1 << 20)]
Seed = Annotated[StrictInt, Field(ge=-(1 << 63), le=(1 << 63) - 1)]
Stop = Annotated[StrictStr, Field(max_length=MAX_STOP_CHARS)]
Stops = Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=MAX_STOPS)]
Name = Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_.\-]{1,64}$")]
Identifier = Annotated[StrictStr, Field(min_length=1, max_length=256)]


class StreamOptions(Strict):
    """`stream_options`."""

    include_usage: StrictBool | None = None
    # padding against guessing a text by its length: this server never adds any, as if this were false
    include_obfuscation: StrictBool | None = None


class SamplingFields(Body):
    """Fields that say how tokens are sampled.

    Those that `SamplingParams` has too have the same name and meaning in it.
    """

    temperature: Temperature | None = None
    top_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    # beyond OpenAI's, under the names that vLLM and others use
    top_k: Annotated[StrictInt, Field(ge=-1, le=1 << 20)] | None = None  # -1 and 0: all tokens
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=10.0)] | None = None


class CompletionFields(SamplingFields):
    """Fields that chat and text completions share."""

    model: StrictStr
    max_tokens: Count | None = None
    n: StrictInt | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    stop: Stops | None = None
    logit_bias: Annotated[dict[str, float] | None, at_most(MAX_BIAS)] = None
    user: StrictStr | None = None
    ignore_eos: StrictBool | None = None
    min_tokens: Annotated[StrictInt, Field(ge=0, le=1 << 20)] | None = None

    def refuse_common(self) -> None:
        """Refuse unsupported values of these fields."""
        if self.n not in (None, 1):
            raise unsupported("n", f"n must be 1: this server gives one answer a request, got {self.n}")
        if self.logit_bias:
            raise unsupported("logit_bias", "logit_bias is not supported: leave it out")
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400, "stream_options needs stream: true", code="invalid_value", param="stream_options"
            )

    def sampling(self, max_new_tokens: int | None, logprobs: int | None = None) -> SamplingParams:
        """How the answer's tokens are sampled."""
        limit = max_new_tokens or DEFAULT_NEW_TOKENS
        if self.min_tokens is not None and self.min_tokens > limit:
            message = (
                f"min_tokens must be at most the limit of the answer's tokens, {limit}, "
                f"got {self.min_tokens}: lower it or raise the limit"
            )
            raise ApiError(400, message, code="invalid_value", param="min_tokens")
        return sampling_params(
            self, max_new_tokens=limit, min_new_tokens=self.min_tokens or 0, logprobs=logprobs
        )

    def stops(self) -> tuple[str, ...]:
        """The stop strings that are not empty."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in stops if stop)


def sampling_params(
    body: BaseModel, *, max_new_tokens: int, min_new_tokens: int = 0, logprobs: int | None = None
) -> SamplingParams:
    """The `SamplingParams` that a body's `SamplingFields` ask for; fields that are None, or that the body
    lacks, have the defaults.
    """
    sent = {name: getattr(body, name, None) for name in SamplingFields.model_fields}
    chosen = {"temperature": DEFAULT_TEMPERATURE} | {
        name: value for name, value in sent.items() if value is not None
    }
    chosen["top_k"] = max(0, chosen.get("top_k", 0))
    return SamplingParams(
        max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, logprobs=logprobs, **chosen
    )


def refuse_tuning(
    effort: str | None, verbosity: str | None, service_tier: str | None, retention: str | None
) -> None:
    """Refuse fields that tune OpenAI's own service, unless they ask for what this server does anyway."""
    if effort not in (None, "none"):
        raise unsupported("reasoning_effort", f"reasoning_effort {effort!r} is not supported: leave it out")
    if verbosity not in (None, "medium"):
        raise unsupported("verbosity", f"verbosity {verbosity!r} is not supported: leave it out")
    if service_tier not in (None, "auto", "default"):
        raise unsupported("service_tier", f"service_tier must be 'auto' or 'default', got {service_tier!r}")
    if retention not in (None, "in_memory", "in-memory"):
        raise unsupported(
            "prompt_cache_retention",
            f"prompt_cache_retention {retention!r} is not supported: pin the conversation or set its ttl",
        )
