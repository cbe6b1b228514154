"""What clients may send: bodies as types, checked. Knows OpenAI's field names; never conversations or answers.

A field that is not listed is refused. One that is listed and not supported may only have the value that means nothing; `refuse` says so.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

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

from pensieve.core.request import MAX_LOGPROBS, SamplingParams
from pensieve.message import Message, ToolCall
from pensieve.server.errors import UNKNOWN_FIELD, ApiError, unsupported

MAX_STOPS = 16
MAX_TOOLS = 128
MAX_TOOL_VALUES = 1 << 16  # in the schemas of all tools
MAX_IDS = 1 << 20  # token ids in one list
MAX_DECODED = 1 << 18  # token ids that are made text at a time
MAX_PROMPTS = 1024  # of which one is answered
MAX_METADATA = 16  # OpenAI's limits
MAX_METADATA_KEY, MAX_METADATA_VALUE = 64, 512
MAX_STOP_CHARS = 1024  # of one stop string: each piece of the answer is compared with its beginnings
MAX_MESSAGES = 4096  # a server's own limit may be lower
MAX_PARTS = 4096  # of one message
MAX_CALLS = 1024  # of one message
MAX_BIAS = 1024  # entries of `logit_bias`, which must be empty here
DEFAULT_NEW_TOKENS = 1024  # where a client sets no limit; the context's end comes first


class Strict(BaseModel):
    """Unknown fields are refused, the first of many alone: an error for each would take a kilobyte and 10 µs of all clients' time."""

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
                f"keys have at most {MAX_METADATA_KEY} characters and values {MAX_METADATA_VALUE}, got {key[:80]!r}"
            )
    return value


def at_most(limit: int) -> BeforeValidator:
    """Refuse an object of more entries before any of them is looked at."""

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


class Sampling(Body):
    """Fields of sampling that chat and text completions share."""

    model: StrictStr
    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    n: StrictInt | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    stop: Stops | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, float] | None, at_most(MAX_BIAS)] = None
    seed: Seed | None = None
    user: StrictStr | None = None
    # beyond OpenAI's, under the names that vLLM and others use
    top_k: Annotated[StrictInt, Field(ge=-1, le=1 << 20)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=10.0)] | None = None
    ignore_eos: StrictBool | None = None
    min_tokens: Annotated[StrictInt, Field(ge=0, le=1 << 20)] | None = None

    def refuse_common(self) -> None:
        """Refuse what this server has not, in any of its forms."""
        if self.n not in (None, 1):
            raise unsupported("n", f"n must be 1: this server gives one answer a request, got {self.n}")
        if self.logit_bias:
            raise unsupported("logit_bias", "logit_bias is not supported: leave it out")
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400, "stream_options needs stream: true", code="invalid_value", param="stream_options"
            )

    def sampling(self, max_new_tokens: int | None, logprobs: int | None = None) -> SamplingParams:
        """How the answer's tokens are chosen."""
        limit = max_new_tokens or DEFAULT_NEW_TOKENS
        if self.min_tokens is not None and self.min_tokens > limit:
            message = f"min_tokens must be at most the limit of the answer's tokens, {limit}, got {self.min_tokens}: lower it or raise the limit"
            raise ApiError(400, message, code="invalid_value", param="min_tokens")
        return sampling_params(
            max_new_tokens=limit,
            min_new_tokens=self.min_tokens or 0,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            logprobs=logprobs,
        )

    def stops(self) -> tuple[str, ...]:
        """The stop strings; empty ones mean nothing."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in stops if stop)


class StreamOptions(Strict):
    """`stream_options`."""

    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = (
        None  # padding against guessing by length: never added, false is what happens
    )


def sampling_params(
    *,
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    min_new_tokens: int = 0,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    seed: int | None = None,
    logprobs: int | None = None,
) -> SamplingParams:
    """Sampling as the API's fields say; what is None has OpenAI's default."""
    return SamplingParams(
        max_new_tokens=max_new_tokens or DEFAULT_NEW_TOKENS,
        min_new_tokens=min_new_tokens,
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=max(0, top_k or 0),
        min_p=min_p or 0.0,
        repetition_penalty=repetition_penalty or 1.0,
        presence_penalty=presence_penalty or 0.0,
        frequency_penalty=frequency_penalty or 0.0,
        seed=seed,
        logprobs=logprobs,
    )


# -- chat completions


class ContentPart(BaseModel):
    """A part of a message. Only text is taken; the other fields belong to parts that are refused by name."""

    model_config = ConfigDict(extra="allow")
    type: StrictStr
    text: StrictStr | None = None
    refusal: StrictStr | None = None


class FunctionCall(Strict):
    """What an assistant's message asks to be called."""

    name: Name
    arguments: StrictStr


class CallItem(Strict):
    """A tool call of an assistant's message."""

    id: Identifier
    type: Literal["function"] = "function"
    function: FunctionCall
    index: StrictInt | None = None  # some clients send their stream's objects back


Parts = Annotated[list[ContentPart], Field(fail_fast=True, max_length=MAX_PARTS)]


class ChatMessage(Strict):
    """A message as clients resend it: answers come back with fields that mean nothing here, such as `refusal` and `annotations`."""

    role: StrictStr
    content: StrictStr | Parts | None = None
    name: StrictStr | None = None
    tool_calls: Annotated[list[CallItem], Field(fail_fast=True, max_length=MAX_CALLS)] | None = None
    tool_call_id: Identifier | None = None
    refusal: StrictStr | None = None
    annotations: list[Any] | None = None
    audio: Any = None
    function_call: Any = None
    reasoning: StrictStr | None = None
    reasoning_content: StrictStr | None = None

    def message(self, where: str) -> Message:
        """Ours.

        Raises:
            ApiError: naming the field that cannot be had.
        """
        role = {"developer": "system"}.get(self.role, self.role)
        if role not in ("system", "user", "assistant", "tool"):
            hint = ": answer calls with the role 'tool'" if role == "function" else ""
            raise ApiError(
                400,
                f"{where}.role must be system, developer, user, assistant or tool, got {self.role!r}{hint}",
                code="invalid_value",
                param=f"{where}.role",
            )
        if self.function_call is not None:
            raise unsupported(
                f"{where}.function_call", "function_call is the old form of tool_calls: send tool_calls"
            )
        if self.audio is not None:
            raise unsupported(f"{where}.audio", "audio is not supported: this server reads and writes text")
        text = (
            self.refusal
            if self.content is None and self.refusal
            else text_of(self.content, f"{where}.content")
        )
        if self.content is None and role != "assistant":
            raise ApiError(
                400,
                f"{where}.content is required for role {self.role!r}",
                code="missing_required_parameter",
                param=f"{where}.content",
            )
        calls = tuple(
            ToolCall(call.id, call.function.name, call.function.arguments) for call in self.tool_calls or ()
        )
        if calls and role != "assistant":
            raise ApiError(
                400,
                f"{where}.tool_calls belongs to an assistant's message",
                code="invalid_value",
                param=f"{where}.tool_calls",
            )
        if role == "tool" and self.tool_call_id is None:
            raise ApiError(
                400,
                f"{where}.tool_call_id is required for role 'tool'",
                code="missing_required_parameter",
                param=f"{where}.tool_call_id",
            )
        return Message(
            role,
            text,
            calls,
            self.tool_call_id if role == "tool" else None,
            self.name if role == "tool" else None,
        )


Messages = Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]


def text_of(content: str | list[ContentPart] | None, where: str) -> str:
    """The text of a message's content.

    Raises:
        ApiError: a part is no text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        if part.type in ("text", "input_text", "output_text") and part.text is not None:
            texts.append(part.text)
        elif part.type == "refusal" and part.refusal is not None:
            texts.append(part.refusal)
        else:
            what = {
                "image_url": "images",
                "input_image": "images",
                "input_audio": "audio",
                "file": "files",
                "input_file": "files",
            }.get(part.type)
            message = (
                f"{what} are not supported"
                if what
                else f"a content part of type {part.type!r} without text is not supported"
            )
            raise unsupported(f"{where}.{index}", f"{where}.{index}: {message}: this server reads text")
    return "".join(texts)


class FunctionSpec(Strict):
    """A function that the model may call. `strict` is taken, because clients ask for it unasked, and the schema is only shown to the model."""

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


class ResponseFormat(BaseModel):
    """`response_format`."""

    model_config = ConfigDict(extra="allow")
    type: StrictStr


class ChatRequest(Sampling):
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
    # known and not to be had, but for the value that means nothing
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
        """Refuse what this server has not."""
        self.refuse_common()
        if self.response_format is not None and self.response_format.type != "text":
            raise unsupported(
                "response_format",
                f"response_format {self.response_format.type!r} is not supported: answers are not constrained here; ask for JSON in the prompt",
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
        """How many alternatives; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


def refuse_tuning(
    effort: str | None, verbosity: str | None, service_tier: str | None, retention: str | None
) -> None:
    """Fields that tune OpenAI's own service: taken where they ask for what happens anyway."""
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


def check_schemas(schemas: list[dict[str, Any] | None]) -> None:
    """Refuse tools whose schemas hold too many values: each is read several times until a prompt is made of it.

    Raises:
        ApiError: they do.
    """
    num_values, stack = 0, list[Any](schemas)
    while stack:
        item = stack.pop()
        num_values += 1
        if isinstance(item, (dict, list)):
            num_values += len(item)
            stack += [
                inner
                for inner in (item.values() if isinstance(item, dict) else item)
                if isinstance(inner, (dict, list))
            ]
        if num_values > MAX_TOOL_VALUES:
            raise ApiError(
                400, f"the tools' parameters hold more than {MAX_TOOL_VALUES} values: send fewer tools, or smaller schemas",
                code="invalid_value", param="tools",
            )  # fmt: skip


def tools_of(tools: list[Tool] | None) -> tuple[dict[str, object], ...]:
    """The functions as chat templates expect them.

    Raises:
        ApiError: a tool is no function, or two have one name.
    """
    found: dict[str, dict[str, object]] = {}
    check_schemas([tool.function.parameters for tool in tools or () if tool.function is not None])
    for index, tool in enumerate(tools or ()):
        if tool.type != "function" or tool.function is None:
            raise unsupported(
                f"tools.{index}", f"tools.{index}: only functions can be called here, got type {tool.type!r}"
            )
        if tool.function.name in found:
            raise ApiError(
                400,
                f"tools.{index}: two functions are called {tool.function.name!r}",
                code="invalid_value",
                param=f"tools.{index}",
            )
        found[tool.function.name] = tool.function.tool()
    return tuple(found.values())


# -- text completions


class CompletionRequest(Sampling):
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
        """Refuse what this server has not."""
        self.refuse_common()
        if self.best_of not in (None, 1):
            raise unsupported(
                "best_of", f"best_of must be 1: this server gives one answer a request, got {self.best_of}"
            )
        if self.suffix:
            raise unsupported("suffix", "suffix is not supported: leave it out")

    def one_prompt(self) -> str | list[int]:
        """The prompt; a list of one counts as that one."""
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


# -- tokens


class TokenizeRequest(Body):
    """POST /tokenize: a text, or messages as a chat would be put before the model."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: Messages | None = None
    add_special_tokens: StrictBool = True
    add_generation_prompt: StrictBool = True


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: StrictStr | None = None
    tokens: Annotated[
        list[Annotated[StrictInt, Field(ge=0, lt=1 << 32)]], Field(fail_fast=True, max_length=MAX_DECODED)
    ]


# -- conversations


class ForkRequest(Body):
    """POST /v1/pensieve/conversations/{id}/fork."""

    at: Identifier | None = None  # a response's id, or a turn's; None: the end


class TtlRequest(Body):
    """POST /v1/pensieve/conversations/{id}/ttl."""

    seconds: Annotated[float, Field(gt=0, le=10 * 366 * 86400.0)] | None


Sampling.model_rebuild()
ChatRequest.model_rebuild()
CompletionRequest.model_rebuild()
