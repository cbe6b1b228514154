"""A whole server on a real port, over the tests' fake worker: everything but a model."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from text_tokenizers import CHATML, HERMES, chat

from fake_worker import FakeWorker
from pensieve.config import CacheConfig, SchedulerConfig, TierConfig
from pensieve.core.cache import TieredCache
from pensieve.core.cost import CostProfile, ResumeQuote
from pensieve.core.eviction import RetentionValue
from pensieve.core.plan import StepPlan, StepResult
from pensieve.core.scheduler import Scheduler
from pensieve.engine.engine import Engine
from pensieve.engine.wire import EngineInfo
from pensieve.server.app import create_app
from pensieve.server.connections import ConnectionLimits, Connections
from pensieve.server.context import Context, ServerConfig
from pensieve.server.guard import GuardRules
from pensieve.server.keys import KeyFile
from pensieve.server.metrics import Metrics
from pensieve.server.open_answers import OpenAnswers
from pensieve.service import ConversationService
from pensieve.store import MEMORY, SqliteStore
from pensieve.text import ChatText, TextRunner

CHUNK = 8
VOCAB = 250  # bytes and merges, below every special token of the test tokenizer
COST = CostProfile([(8, 1.0), (512, 3.0)], CHUNK)


class ScriptedWorker(FakeWorker):
    """Says what it is told to say, where it is told."""

    script: tuple[int, ...] | None = None  # an answer's ids; None: what the cells give
    broken: str | None = None  # sampling any request fails with this

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.said: dict[str, int] = {}

    def run(self, plan: StepPlan) -> StepResult:
        result = super().run(plan)
        for request_id in plan.ended:
            self.said.pop(request_id, None)
        if self.script is None:
            return result
        tokens = []
        for token in result.tokens:
            position = self.said.get(token.request_id, 0)
            self.said[token.request_id] = position + 1
            tokens.append(replace(token, token_id=self.script[min(position, len(self.script) - 1)]))
        return replace(result, tokens=tuple(tokens))


@dataclass
class EngineState:
    """Stands for the process that runs the engine."""

    state: str = "ready"
    restarts: int = 0


@dataclass
class Serving:
    """A running server."""

    url: str
    context: Context
    worker: ScriptedWorker
    engine: Engine
    text: ChatText
    store: SqliteStore
    state: EngineState
    client: httpx.Client = field(repr=False)
    connections: Connections = field(repr=False)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return self.client.post(path, json=body, headers=headers)

    def ask(self, *contents: str, n: int = 8, **more: Any) -> dict[str, Any]:
        """A chat whose messages alternate between user and assistant; greedy."""
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
        response = self.post(
            "/v1/chat/completions",
            {"model": "tiny", "messages": messages, "max_tokens": n, "temperature": 0} | more,
        )
        assert response.status_code == 200, response.text
        body: dict[str, Any] = response.json()
        return body

    def say(self, text: str) -> None:
        """Every answer from now on is this text."""
        ids = self.text.encode_answer(text)
        self.worker.script = (*ids, min(self.text.stop_token_ids))

    def until_idle(self, timeout_s: float = 20.0) -> None:
        """Wait until nothing is open, and see that the cache holds together and leases nothing."""
        deadline = time.monotonic() + timeout_s
        while self.context.answers.open:
            assert time.monotonic() < deadline, f"still open: {list(self.context.answers.open)}"
            time.sleep(0.01)
        checked = self.client.post("/v1/pensieve/check", headers=self.client.headers).json()
        assert checked["ok"] and checked["leases"] == 0, checked


@contextmanager
def serving(
    *,
    template: str = CHATML,
    slots: tuple[int, int] = (64, 64),
    max_context: int = 400,
    overflow: str = "refuse",
    store_path: Path | None = None,
    owner: str = "test",
    keys: Path | None = None,
    key: str | None = None,
    max_waiting: int = 4096,
    config: dict[str, Any] | None = None,
    rules: dict[str, Any] | None = None,
    limits: ConnectionLimits | None = None,
    more_ports: tuple[int, ...] = (),
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
    runner: TextRunner | None = None,
) -> Iterator[Serving]:
    text = chat(template)
    store, ephemeral = SqliteStore(store_path or MEMORY), SqliteStore(MEMORY)
    tiers = (TierConfig("gpu", slots[0]), TierConfig("cpu", slots[1]))
    cache = TieredCache(CacheConfig(tiers, CHUNK), lambda: RetentionValue(COST.of_chunk))
    service = ConversationService(
        text,
        store,
        max_context=max_context,
        overflow="truncate" if overflow == "truncate" else "refuse",
        ephemeral=ephemeral,
        drafts=owner,
        runner=runner,
    )
    worker = ScriptedWorker(list(slots), CHUNK, vocab=VOCAB)
    scheduler = Scheduler(SchedulerConfig(max_batch_tokens=128, max_waiting=max_waiting), cache, max_context)
    engine = Engine(
        scheduler,
        worker,
        chunk_bytes=1000,
        emit=service.handle,
        debug=True,
        quote=ResumeQuote(COST, 1000, 1e6),
    )
    service.connect(engine.post)
    engine.start()
    info = EngineInfo(
        0,
        "tiny",
        "random",
        1,
        "float32",
        "cpu",
        10_000,
        max_context,
        CHUNK,
        1000,
        tiers,
        "test",
        "fake",
        "fake",
        0.0,
    )
    metrics, state = Metrics(), EngineState()
    server_config = ServerConfig("tiny", **{"drain_timeout_s": 5.0, "debug": True, **(config or {})})
    contexts: list[Context] = []

    def make_context() -> Context:
        answers = OpenAnswers(
            service,
            max_open=server_config.max_open,
            max_open_per_tenant=server_config.max_open_per_key,
            queue_timeout_s=server_config.queue_timeout_s,
            request_timeout_s=server_config.request_timeout_s,
        )
        key_file = None if keys is None else KeyFile(keys)
        contexts.append(
            Context(
                server_config, info, text, store, service, answers, state, key_file, metrics, runner=runner
            )
        )
        return contexts[0]

    hosts = frozenset({"127.0.0.1", "localhost"}) if keys is None else None
    own = {"max_body_bytes": server_config.max_body_bytes, "shared": keys is not None, "hosts": hosts}
    app = create_app(make_context, metrics, GuardRules(**{**own, **(rules or {})}))
    connections = Connections(
        limits or ConnectionLimits(), lambda reason: metrics.refused.labels(reason).inc()
    )
    listener = socket.create_server(("127.0.0.1", 0))
    more = [socket.create_server(("127.0.0.1", port)) for port in more_ports]
    listener.setsockopt(
        socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
    )  # asyncio sees to that for `pensieve serve`'s listener; 40 ms a request
    server = uvicorn.Server(
        uvicorn.Config(
            app, http=connections.protocol(), ws="none", log_config=None, timeout_graceful_shutdown=10
        )
    )

    def run() -> None:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(server.serve(sockets=[listener, *more]))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.005)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    client = httpx.Client(
        base_url=url, timeout=30.0, headers={"Authorization": f"Bearer {key}"} if key else {}
    )
    try:
        yield Serving(url, contexts[0], worker, engine, text, store, state, client, connections)
    finally:
        client.close()
        server.should_exit = True
        thread.join(20)
        engine.close()
        service.close()
        store.close()
        ephemeral.close()


def tool_server(**keywords: Any) -> Any:
    """A server whose template knows tools."""
    return serving(template=HERMES, **keywords)
