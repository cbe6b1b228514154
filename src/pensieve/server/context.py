"""What the routes of one server share, and the caller of a request.

Knows the types of the parts; never routes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol, TypeVar
from weakref import WeakValueDictionary

from fastapi import Depends, Request

from pensieve.core.sequence import TENANT_END
from pensieve.engine.wire import EngineInfo
from pensieve.errors import ConfigError, EngineSilent
from pensieve.server.errors import ApiError
from pensieve.server.keys import KeyFile
from pensieve.server.metrics import Metrics
from pensieve.server.open_answers import OpenAnswers, QueueTimeout
from pensieve.server.recorders import MAX_RECORDERS, MAX_RECORDERS_PER_TENANT
from pensieve.server.shares import Shares
from pensieve.server.totals import Totals
from pensieve.server.writing import Writing
from pensieve.service import DEFAULT_NAMESPACE, ConversationService
from pensieve.store import ConversationStore
from pensieve.text import ChatText, InlineRunner, TextJob, TextRunner

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Limits and names of a server."""

    model: str  # the name that clients use
    max_open: int = 256  # open answers: running and waiting
    max_open_per_key: int | None = None  # of these, those of one tenant; None if one tenant may have all
    max_body_bytes: int = 16 << 20
    max_messages: int = 4096
    queue_timeout_s: float = 120.0  # to the first token
    request_timeout_s: float = 900.0
    stall_timeout_s: float = 60.0  # a client that reads nothing for this long is disconnected
    drain_timeout_s: float = 30.0
    operation_timeout_s: float = 30.0  # of a question to the engine: a map, a hint, a pin, an erasure
    debug: bool = False  # whether clients may have the cache verified, during which no answer goes on

    def __post_init__(self) -> None:
        for name in (
            "max_open",
            "max_body_bytes",
            "max_messages",
            "queue_timeout_s",
            "request_timeout_s",
            "stall_timeout_s",
            "drain_timeout_s",
            "operation_timeout_s",
        ):
            if not getattr(self, name) > 0:
                option = name.removesuffix("_s").replace("_", "-")
                raise ConfigError(f"--{option} must be positive, got {getattr(self, name)}")
        if self.max_open_per_key is not None and not 0 < self.max_open_per_key <= self.max_open:
            raise ConfigError(
                f"--max-open-per-key must lie in [1, {self.max_open}] (--max-open), "
                f"got {self.max_open_per_key}"
            )


class EngineState(Protocol):
    """What the server asks the process that runs the engine."""

    @property
    def state(self) -> str:
        """starting, ready, restarting, failed or closed."""
        ...

    @property
    def restarts(self) -> int:
        """How often the engine was started again."""
        ...


@dataclass(slots=True)
class Context:
    """What the routes of one server share."""

    config: ServerConfig
    info: EngineInfo
    text: ChatText
    store: ConversationStore
    service: ConversationService
    answers: OpenAnswers
    engine: EngineState
    keys: KeyFile | None
    metrics: Metrics
    started_s: float = field(default_factory=time.time)
    names: frozenset[str] = frozenset()  # other names that clients may call the model
    # for /ready, by component: a sentence if turns would fail, None if the component works
    checks: dict[str, Callable[[], str | None]] = field(default_factory=dict)
    recorders: Shares = field(default_factory=lambda: Shares(MAX_RECORDERS, MAX_RECORDERS_PER_TENANT))
    totals: Totals = field(default_factory=Totals)
    runner: TextRunner | None = None  # renders and tokenizes; None for a thread of this process
    writing: Writing = field(default_factory=Writing)
    reading: asyncio.Lock = field(
        default_factory=asyncio.Lock
    )  # held while the JSON of a large body is parsed
    # locks of idempotency keys, by namespace and key
    claiming: WeakValueDictionary[tuple[str, str], asyncio.Lock] = field(default_factory=WeakValueDictionary)

    async def written(self, job: TextJob[T], tenant: str) -> T:
        """The result of a job of the text room.

        Raises:
            PensieveError: the job failed, or took longer than a request may take to its first token.
        """
        runner = self.runner if self.runner is not None else InlineRunner(self.text)
        try:
            async with asyncio.timeout(self.config.queue_timeout_s):
                return await asyncio.wrap_future(await in_thread(runner.submit, job, tenant))
        except TimeoutError:
            raise QueueTimeout(
                f"the text was not read within {self.config.queue_timeout_s:g} s: "
                "the server is busy, try again later"
            ) from None

    def troubles(self) -> dict[str, str]:
        """Why turns would fail now, by component; empty if they would not."""
        return {name: trouble for name, check in self.checks.items() if (trouble := check()) is not None}

    async def answer_to(self, question: Future[T]) -> T:
        """The engine's answer to a question.

        Raises:
            EngineSilent: it does not answer within `operation_timeout_s`.
        """
        limit_s = self.config.operation_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await asyncio.wrap_future(question)
        except TimeoutError:
            raise EngineSilent(
                f"the engine did not answer within {limit_s:g} s (--operation-timeout): "
                "it is busy or being replaced, try again later"
            ) from None

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not served here; None stands for the one that is."""
        if name is not None and name != self.config.model and name not in self.names:
            raise ApiError(
                404,
                f"the model {name!r} is not served here; this server has {self.config.model!r}",
                code="model_not_found",
                param="model",
            )

    def check_tokens(self, tokens: Sequence[int], param: str) -> None:
        """Refuse token ids that the model does not have."""
        wrong = min(tokens) if tokens and min(tokens) < 0 else max(tokens, default=0)
        if not 0 <= wrong < self.info.vocab_size:
            raise ApiError(
                400,
                f"token ids lie in [0, {self.info.vocab_size}), got {wrong}",
                code="invalid_value",
                param=param,
            )


@dataclass(frozen=True, slots=True)
class Caller:
    """The client of a request."""

    tenant: str
    namespace: str  # of its conversations and KV cache: the tenant, or the tenant and a salt


def context_of(request: Request) -> Context:
    """The context of the server that got a request."""
    context: Context = request.app.state.context
    return context


def tenant_by_key(keys: KeyFile | None, authorization: str) -> str:
    """The tenant whose key an Authorization header holds.

    Raises:
        ApiError: the server has keys, and the header holds none of them.
    """
    if keys is None:
        return DEFAULT_NAMESPACE
    scheme, _, key = authorization.partition(" ")
    found = keys.tenant(key.strip()) if scheme.lower() == "bearer" else None
    if found is None:
        raise ApiError(
            401,
            "this server needs an API key: send it as `Authorization: Bearer KEY`"
            if not key
            else "this API key is not valid here",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return found


async def _context(request: Request) -> Context:
    return context_of(request)  # FastAPI would run this in a thread if it were no coroutine


async def authenticate(request: Request) -> Caller:
    """The caller, by its key.

    Raises:
        ApiError: the server has keys, and the request holds none of them.
    """
    tenant = tenant_by_key(context_of(request).keys, request.headers.get("authorization", ""))
    salt = request.headers.get("x-cache-salt", "")
    if len(salt) > 128 or TENANT_END in salt:
        raise ApiError(
            400, "X-Cache-Salt must have at most 128 characters", code="invalid_value", param="X-Cache-Salt"
        )
    return Caller(tenant, tenant + TENANT_END + salt if salt else tenant)


Server = Annotated[Context, Depends(_context)]
Asking = Annotated[Caller, Depends(authenticate)]


async def in_thread(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Run a function that waits, as for a database, in a thread."""
    return await asyncio.to_thread(function, *arguments, **keywords)
