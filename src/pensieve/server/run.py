"""A server from start to end: store, engine, application, sockets.

Chooses, wires, starts; knows no commands and no routes.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from pensieve.engine.process import State
from pensieve.engine.vitals import Patience
from pensieve.errors import ModelUnavailable, WorkerLost
from pensieve.runtime.apart import ApartRuntime, start_apart
from pensieve.runtime.options import Options
from pensieve.runtime.torchless import do_without_torch
from pensieve.server.app import create_app
from pensieve.server.connections import Connections
from pensieve.server.context import Context, ServerConfig
from pensieve.server.keys import KeyFile
from pensieve.server.listener import BACKLOG, Listener, raise_file_limit
from pensieve.server.metrics import Metrics
from pensieve.server.open_answers import OpenAnswers
from pensieve.server.options import ServeOptions
from pensieve.store import MEMORY, ConversationStore, Lease, SqliteStore, default_path, open_store
from pensieve.text import ChatText

log = logging.getLogger(__name__)

CLOSE_S, GAVE_UP_CLOSE_S = 30.0, 3.0  # how long the engine's process may take to end after its step
KEEP_ALIVE_S = 75  # how long an idle connection is kept

LoopFactory = Callable[[], asyncio.AbstractEventLoop]
OnReady = Callable[["Backend", Listener], None]


@dataclass(slots=True)
class Backend:
    """What stands behind the HTTP server. `context` is None until the application starts."""

    runtime: ApartRuntime
    text: ChatText
    store: ConversationStore
    ephemeral: ConversationStore
    lease: Lease
    failed: threading.Event  # set when the engine has ended for good
    context: Context | None = None
    _closed: bool = field(default=False)

    def refuse_new(self) -> None:
        """Take no new requests."""
        if self.context is not None:
            self.context.answers.draining = True

    async def drain(self, timeout_s: float) -> None:
        """Take no new requests, and let the open answers end."""
        if self.context is not None:
            await self.context.answers.drain(timeout_s)

    def make_context(self, config: ServerConfig, keys: KeyFile | None, metrics: Metrics) -> Context:
        """What the routes share. Called in the event loop."""
        runtime = self.runtime
        answers = OpenAnswers(
            runtime.service,
            max_open=config.max_open,
            max_open_per_tenant=config.max_open_per_key,
            queue_timeout_s=config.queue_timeout_s,
            request_timeout_s=config.request_timeout_s,
        )
        context = self.context = Context(
            config,
            runtime.info,
            self.text,
            self.store,
            runtime.service,
            answers,
            runtime.process,
            keys,
            metrics,
            names=frozenset({runtime.info.model}),
            checks={"engine": runtime.process.trouble},
            runner=runtime.workers,
        )
        if (workers := runtime.workers) is not None:
            context.checks["text"] = lambda: workers.trouble
        return context

    def close(self) -> None:
        """Close the engine, whose turns then fail, then the service, which reports that, then the lease and
        the stores.
        """
        if not self._closed:
            self._closed = True
            # Answers that are still open were told to end, and the engine did not end them.
            gave_up = self.context is not None and bool(self.context.answers.open)
            self.runtime.close(GAVE_UP_CLOSE_S if gave_up else CLOSE_S)
            self.lease.close()
            self.store.close()
            self.ephemeral.close()


class Server(uvicorn.Server):
    """uvicorn's server, which lets open answers end before it stops listening, and ends with the engine."""

    def __init__(
        self, config: uvicorn.Config, backend: Backend, drain_timeout_s: float, on_ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._backend = backend
        self._drain_timeout_s = drain_timeout_s
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application."""
        await super().startup(sockets)
        if not self.should_exit:
            self._on_ready()

    async def on_tick(self, counter: int) -> bool:
        """Whether to shut down; asked ten times a second."""
        return await super().on_tick(counter) or self._backend.failed.is_set()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Take a signal to end: refuse new requests at once."""
        if sig == signal.SIGTERM:
            self._backend.refuse_new()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let open answers end; new requests still get an answer meanwhile, which sends them to another
        server.
        """
        drained = asyncio.ensure_future(self._backend.drain(self._drain_timeout_s))
        while not (drained.done() or self.force_exit):
            await asyncio.wait({drained}, timeout=0.1)
        drained.cancel()
        await super().shutdown(sockets)


def run_server(
    options: Options,
    serving: ServeOptions,
    *,
    on_ready: OnReady,
    ends_with_engine: bool = False,
    loop_factory: LoopFactory | None = None,
) -> None:
    """Start everything, serve until told to stop, and close everything in order.

    Args:
        options: of the model and the cache.
        serving: of the server.
        on_ready: called once, when the server listens.
        ends_with_engine: whether to end with a failed engine instead of serving errors: its other processes
            cannot be joined again.
        loop_factory: makes the event loop; None for asyncio's.

    Raises:
        ConfigError: an option is wrong.
        WorkerLost: the server ended with its engine.
        ModelUnavailable, ModelRefused, StoreError: the model or the store is not available.
    """
    config = serving.config(options.model, debug=options.debug)
    patience = serving.patience()
    keys = None if serving.api_key_file is None else KeyFile(serving.api_key_file)
    failed = threading.Event()

    def on_state(state: State) -> None:
        if state == "failed" and ends_with_engine:
            failed.set()

    raise_file_limit()
    listener = Listener(serving)
    try:
        backend = _start(options, serving, failed=failed, on_state=on_state, patience=patience)
    except BaseException:
        listener.close()
        raise
    server = _make_server(backend, config, keys, listener, on_ready)
    # uvicorn raises SIGTERM again when all is done, for the handler of before: this one, which makes a clean
    # exit of it
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        gc.collect()
        gc.freeze()  # what was loaded stays, so the collector need not visit it again and again
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(server.serve(sockets=listener.sockets))
    finally:
        backend.close()
    if failed.is_set():
        reason = backend.runtime.process.last_error or "the engine ended"
        raise WorkerLost(
            f"{reason}. The model is split over several processes, and they end together: "
            "start all of them again"
        )


def _make_server(
    backend: Backend, config: ServerConfig, keys: KeyFile | None, listener: Listener, on_ready: OnReady
) -> Server:
    metrics = Metrics()
    connections = Connections(listener.limits(), lambda reason: metrics.refused.labels(reason).inc())
    app = create_app(
        lambda: backend.make_context(config, keys, metrics), metrics, listener.rules, backend.close
    )
    uvicorn_config = uvicorn.Config(
        app,
        http=connections.protocol(),
        ws="none",
        log_config=None,
        access_log=False,  # `RequestGuard` writes it, without queries
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(config.drain_timeout_s) + 5,
        backlog=BACKLOG,
        server_header=False,
    )
    return Server(uvicorn_config, backend, config.drain_timeout_s, lambda: on_ready(backend, listener))


def _start(
    options: Options,
    serving: ServeOptions,
    *,
    failed: threading.Event,
    on_state: Callable[[State], None],
    patience: Patience,
) -> Backend:
    """Open the store, with a lease for unfinished answers, and start the engine's process."""
    do_without_torch()
    store = open_store(str(default_path()) if serving.store_url is None else serving.store_url)
    lease: Lease | None = None
    try:
        lease = Lease(store)
        if lease.num_recovered:
            log.info(
                "%d answers were open when a server stopped: what was stored of them is kept",
                lease.num_recovered,
            )
        ephemeral = SqliteStore(MEMORY)
        runtime = start_apart(
            options,
            store=store,
            ephemeral=ephemeral,
            drafts=lease.owner,
            retain=not serving.stateless,
            on_state=on_state,
            patience=patience,
            prompt_timeout_s=serving.prompt_timeout_s,
        )
        if runtime.text is None:
            runtime.close()
            raise ModelUnavailable(
                f"{runtime.info.model} has no tokenizer here, and a server answers text: "
                "name a model that has one"
            )
    except BaseException:
        if lease is not None:
            lease.close()
        store.close()
        raise
    return Backend(runtime, runtime.text, store, ephemeral, lease, failed)
