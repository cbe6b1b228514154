"""What the routes of one server share, and who is asking. Knows the pieces' types; never routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol, TypeVar
from weakref import WeakValueDictionary

from fastapi import Depends, Request

from pensieve.engine.wire import EngineInfo
from pensieve.errors import ConfigError, EngineSilent
from pensieve.server.errors import ApiError
from pensieve.server.keys import SALT_MARK, KeyFile
from pensieve.server.metrics import Metrics
from pensieve.server.recorders import MAX_RECORDERS, MAX_RECORDERS_PER_TENANT
from pensieve.server.shares import Shares
from pensieve.server.totals import Totals
from pensieve.server.turns import QueueTimeout, Turns
from pensieve.server.writing import Writing
from pensieve.service import DEFAULT_NAMESPACE, ConversationService
from pensieve.store import ConversationStore
from pensieve.text import ChatText, InlineRunner, TextJob, TextRunner

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Limits and names of a server."""

    model: str  # the name that clients use
    max_open: int = 256  # answers running and waiting
    max_open_per_key: int | None = None  # of these, of one tenant's keys together. None: all of them
    max_body_bytes: int = 16 << 20
    max_messages: int = 4096
    queue_timeout_s: float = 120.0  # to the first token
    request_timeout_s: float = 900.0
    stall_timeout_s: float = 60.0  # a client that reads nothing for so long is cut off
    drain_timeout_s: float = 30.0
    operation_timeout_s: float = (
        30.0  # that the engine may take to answer what is no turn (a map, a hint, a pin, an erasure)
    )
    debug: bool = False  # the cache may be verified on demand, which stops every answer meanwhile

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
                raise ConfigError(
                    f"--{name.removesuffix('_s').replace('_', '-')} must be positive, got {getattr(self, name)}"
                )
        if self.max_open_per_key is not None and not 0 < self.max_open_per_key <= self.max_open:
            raise ConfigError(
                f"--max-open-per-key must lie in [1, {self.max_open}] (--max-open), got {self.max_open_per_key}"
            )


class EngineState(Protocol):
    """What the server asks of whoever runs the engine."""

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
    """One server."""

    config: ServerConfig
    info: EngineInfo
    text: ChatText
    store: ConversationStore
    service: ConversationService
    turns: Turns
    engine: EngineState
    keys: KeyFile | None
    metrics: Metrics
    started_s: float = field(default_factory=time.time)
    names: frozenset[str] = frozenset()  # other names of the model that are taken
    checks: dict[str, Callable[[], str | None]] = field(
        default_factory=dict
    )  # of what /ready looks at: a sentence if turns would fail
    recorders: Shares = field(default_factory=lambda: Shares(MAX_RECORDERS, MAX_RECORDERS_PER_TENANT))
    totals: Totals = field(default_factory=Totals)
    runner: TextRunner | None = None  # who renders and tokenizes; None: a thread of this process
    writing: Writing = field(default_factory=Writing)
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while a large body's JSON is read
    claiming: WeakValueDictionary[tuple[str, str], asyncio.Lock] = field(
        default_factory=WeakValueDictionary
    )  # by namespace and key

    async def written(self, job: TextJob[T], tenant: str) -> T:
        """What the text room answers to a job.

        Raises:
            PensieveError: it has no answer, or none in the time that a request may take to its first token.
        """
        runner = self.runner if self.runner is not None else InlineRunner(self.text)
        try:
            async with asyncio.timeout(self.config.queue_timeout_s):
                return await asyncio.wrap_future(await in_thread(runner.submit, job, tenant))
        except TimeoutError:
            raise QueueTimeout(
                f"the text was not read within {self.config.queue_timeout_s:g} s: the server is busy, try again later"
            ) from None

    def troubles(self) -> dict[str, str]:
        """Why turns would fail now, by what is to blame."""
        return {name: trouble for name, check in self.checks.items() if (trouble := check()) is not None}

    async def answer_to(self, question: Future[T]) -> T:
        """What the engine answers to a question that was put to it.

        Raises:
            EngineSilent: it does not within `operation_timeout_s`.
        """
        limit_s = self.config.operation_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await asyncio.wrap_future(question)
        except TimeoutError:
            raise EngineSilent(
                f"the engine did not answer within {limit_s:g} s (--operation-timeout): it is busy or being replaced, try again later"
            ) from None

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not served here; None is the one that is."""
        if name is not None and name != self.config.model and name not in self.names:
            raise ApiError(
                404,
                f"the model {name!r} is not served here; this server has {self.config.model!r}",
                code="model_not_found",
                param="model",
            )

    def check_tokens(self, tokens: Sequence[int], param: str) -> None:
        """Refuse what is no token id of the model."""
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
    """Who is asking."""

    tenant: str
    namespace: str  # whose conversations and KV


def context_of(request: Request) -> Context:
    """The server that a request came to."""
    context: Context = request.app.state.context
    return context


def tenant_by_key(keys: KeyFile | None, authorization: str) -> str:
    """Whose key an Authorization header holds.

    Raises:
        ApiError: there are keys and the header has none of them.
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
    return context_of(
        request
    )  # (what is not a coroutine would be run in a thread: two switches a request, beside a model on all cores)


async def authenticate(request: Request) -> Caller:
    """The caller, by their key.

    Raises:
        ApiError: there are keys and the request has none of them.
    """
    tenant = tenant_by_key(context_of(request).keys, request.headers.get("authorization", ""))
    salt = request.headers.get("x-cache-salt", "")
    if len(salt) > 128 or SALT_MARK in salt:
        raise ApiError(
            400, "X-Cache-Salt must have at most 128 characters", code="invalid_value", param="X-Cache-Salt"
        )
    return Caller(tenant, tenant + SALT_MARK + salt if salt else tenant)


Server = Annotated[Context, Depends(_context)]
Asking = Annotated[Caller, Depends(authenticate)]


async def in_thread(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Run something that waits (for a database) off the event loop."""
    return await asyncio.to_thread(function, *arguments, **keywords)
