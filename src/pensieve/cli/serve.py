"""`pensieve serve`: the engine in a process of its own, and an HTTP server in front of it. Chooses, wires, starts."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pensieve.cli.front import BACKLOG, Front, front_options, log_to_stderr, password_note, raise_file_limit
from pensieve.cli.loops import loop_factory
from pensieve.cli.options import cache_options, model_options, pick, template_options
from pensieve.engine.vitals import SILENT_S, STEPS_TO_SILENCE, Patience
from pensieve.errors import ConfigError, ModelUnavailable, WorkerLost
from pensieve.runtime.follower import follow_unless_first
from pensieve.runtime.loading import notes_of
from pensieve.runtime.options import Options

if TYPE_CHECKING:
    from pensieve.engine.process import State
    from pensieve.runtime.apart import ApartRuntime
    from pensieve.server.connections import Connections
    from pensieve.server.context import Context, ServerConfig
    from pensieve.server.keys import KeyFile
    from pensieve.store import ConversationStore, Lease
    from pensieve.text import ChatText

log = logging.getLogger(__name__)

DEFAULT_PORT = 8000
REQUESTS_PER_TURN = 4  # requests of all kinds that may be under way for each of --max-open
CLOSE_S, GAVE_UP_CLOSE_S = 30.0, 3.0  # that the engine's process gets to end after its step


@click.command()
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen at; beyond this machine only with --api-key-file.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=DEFAULT_PORT,
    show_default=True,
    help="0: any free one, printed.",
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    default=None,
    help="Who may ask (see `pensieve keys add`); read again when it changes.",
)
@click.option("--insecure", is_flag=True, help="Listen beyond this machine without keys.")
@click.option(
    "--store",
    "store_url",
    envvar="PENSIEVE_STORE",
    default=None,
    help="A file's path, sqlite:///FILE or postgresql://…, also in PENSIEVE_STORE.  [default: a SQLite file in your data directory]",
)
@click.option(
    "--name", "model_name", default=None, help="What clients call the model.  [default: what --model says]"
)
@click.option(
    "--max-open",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Requests running and waiting; beyond it: 429.",
)
@click.option(
    "--max-open-per-key",
    type=click.IntRange(min=1),
    default=None,
    help="Of these, of one tenant's keys together.  [default: three quarters with --api-key-file, else all]",
)
@front_options
@click.option(
    "--queue-timeout",
    "queue_timeout_s",
    type=float,
    default=120.0,
    show_default=True,
    help="Seconds to a request's first token.",
)
@click.option(
    "--request-timeout",
    "request_timeout_s",
    type=float,
    default=900.0,
    show_default=True,
    help="Seconds of a whole request.",
)
@click.option(
    "--prompt-timeout",
    "prompt_timeout_s",
    type=click.FloatRange(min=0.1),
    default=10.0,
    show_default=True,
    help="Seconds of processor time to render and tokenize a request's prompt.",
)
@click.option(
    "--stall-timeout",
    "stall_timeout_s",
    type=float,
    default=60.0,
    show_default=True,
    help="Seconds that a client may read nothing.",
)
@click.option(
    "--drain-timeout",
    "drain_timeout_s",
    type=float,
    default=30.0,
    show_default=True,
    help="Seconds that open answers get at SIGTERM.",
)
@click.option(
    "--operation-timeout",
    "operation_timeout_s",
    type=float,
    default=None,
    help="Seconds that the engine may take to answer what is no turn.  [default: 30, or --queue-timeout if that is less]",
)
@click.option(
    "--engine-timeout",
    "engine_timeout_s",
    type=float,
    default=SILENT_S,
    show_default=True,
    help="Seconds without a heartbeat after which the engine's process is replaced.",
)
@click.option(
    "--step-timeout",
    "step_timeout_s",
    type=float,
    default=None,
    help="Seconds that one step of the engine may take before it is replaced.  [default: ten times --engine-timeout]",
)
@click.option(
    "--stateless",
    is_flag=True,
    help="Keep no KV between turns, as a baseline: one tier of both tiers' bytes.",
)
@template_options
@model_options
@cache_options
def serve(**arguments: Any) -> None:
    """Serve conversations over HTTP, as any OpenAI client expects them; they outlive the process."""
    options = pick(arguments)
    run_server(options, **arguments)


def run_server(
    options: Options,
    *,
    host: str,
    port: int,
    api_key_file: Path | None,
    insecure: bool,
    store_url: str | None,
    model_name: str | None,
    max_open: int,
    max_open_per_key: int | None,
    stateless: bool,
    queue_timeout_s: float,
    request_timeout_s: float,
    prompt_timeout_s: float,
    stall_timeout_s: float,
    drain_timeout_s: float,
    operation_timeout_s: float | None,
    engine_timeout_s: float,
    step_timeout_s: float | None,
    **front_arguments: Any,
) -> None:
    """Start everything, serve until told to stop, end everything in order. `front_arguments` are those of `front_options`.

    Raises:
        ConfigError: an option is wrong, or the server packages are not installed.
        WorkerLost: the model was split over several processes, and one of them ended.
        ModelUnavailable, ModelRefused, StoreError: what could not be had.
    """
    begun_s = time.perf_counter()
    rank = follow_unless_first(options)
    try:
        import uvicorn
        from prometheus_client import CollectorRegistry  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"`pensieve serve` needs the server packages ({error.name}): pip install 'pensieve-serve[server]'"
        ) from error
    from pensieve.server.context import ServerConfig
    from pensieve.server.keys import KeyFile

    config = ServerConfig(
        model=model_name or options.model,
        max_open=max_open,
        max_open_per_key=max_open_per_key or (None if api_key_file is None else max(1, max_open * 3 // 4)),
        max_body_bytes=int(front_arguments["max_body_mb"] * (1 << 20)),
        queue_timeout_s=queue_timeout_s,
        request_timeout_s=request_timeout_s,
        stall_timeout_s=stall_timeout_s,
        drain_timeout_s=drain_timeout_s,
        operation_timeout_s=min(30.0, queue_timeout_s)
        if operation_timeout_s is None
        else operation_timeout_s,
        debug=options.debug,
    )
    patience = Patience(
        engine_timeout_s, STEPS_TO_SILENCE * engine_timeout_s if step_timeout_s is None else step_timeout_s
    )
    log_to_stderr()
    keys = None if api_key_file is None else KeyFile(api_key_file)
    servers: list[uvicorn.Server] = []
    failed = threading.Event()

    def on_state(state: State) -> None:
        if (
            state == "failed" and rank is not None
        ):  # it is not started again, and neither are the other processes
            failed.set()
            for server in servers:
                server.should_exit = True

    raise_file_limit()
    front = Front(
        host=host,
        port=port,
        has_keys=keys is not None,
        insecure=insecure,
        stall_timeout_s=stall_timeout_s,
        max_requests=REQUESTS_PER_TURN * max_open,
        **front_arguments,
    )
    try:
        parts = _start(
            options,
            store_url,
            retain=not stateless,
            on_state=on_state,
            patience=patience,
            prompt_timeout_s=prompt_timeout_s,
        )
    except BaseException:
        front.close()
        raise
    app, connections = parts.application(config, keys, front)
    url = front.url

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if not self.should_exit:
                info = parts.runtime.info
                tiers = ", ".join(f"{tier.name} {tier.num_slots} chunks" for tier in info.tiers)
                computing = f", {info.instructions}" if info.instructions else ""
                for remark in info.remarks:
                    click.secho(remark, dim=True)
                mode = ", stateless: nothing is kept between turns" if stateless else ""
                click.secho(
                    f"{info.model} ({info.weights} weights, {info.dtype} on {info.device}, {info.attention} attention, {info.forward} forward"
                    f"{computing}); "
                    f"{tiers}{mode}; "
                    f"context {info.max_context} tokens; ready in {time.perf_counter() - begun_s:.1f} s",
                    fg="cyan",
                )
                for note in (
                    *notes_of(info.note, parts.text.note),
                    *front.notes,
                    *filter(None, (password_note(store_url),)),
                ):
                    click.secho(f"note: {note}", fg="yellow")
                metrics = f", metrics: {front.metrics_url}" if len(front.sockets) > 1 else ""
                click.secho(
                    f"listening at {url}  (API: {url}/v1, page: {url}/{metrics})"
                    + ("" if keys else "  without keys"),
                    bold=True,
                )
                sys.stdout.flush()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            drained = asyncio.ensure_future(parts.drain(config.drain_timeout_s))
            while not (
                drained.done() or self.force_exit
            ):  # still listening: who asks now is told to ask somebody else
                await asyncio.wait({drained}, timeout=0.1)
            drained.cancel()
            await super().shutdown(sockets)

    server = Server(
        uvicorn.Config(
            app,
            http=connections.protocol(),
            ws="none",
            log_config=None,
            access_log=False,  # the door writes it, without queries
            timeout_keep_alive=75,
            timeout_graceful_shutdown=int(config.drain_timeout_s) + 5,
            backlog=BACKLOG,
            server_header=False,
        )
    )
    servers.append(server)
    server.should_exit = failed.is_set()
    _on_terminate(server, parts)
    try:
        gc.collect()
        gc.freeze()  # what was loaded stays: the collector need not look at it again and again
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(server.serve(sockets=front.sockets))
    finally:
        parts.close()
    if failed.is_set():
        reason = parts.runtime.process.last_error or "the engine ended"
        raise WorkerLost(
            f"{reason}. The model is split over several processes, and they end together: start all of them again"
        )


class _Parts:
    """What stands behind the HTTP server."""

    def __init__(
        self,
        runtime: ApartRuntime,
        text: ChatText,
        store: ConversationStore,
        ephemeral: ConversationStore,
        lease: Lease,
    ) -> None:
        self.runtime, self.text, self.store, self.ephemeral, self.lease = (
            runtime,
            text,
            store,
            ephemeral,
            lease,
        )
        self.context: Context | None = None
        self._closed = False

    def application(
        self, config: ServerConfig, keys: KeyFile | None, front: Front
    ) -> tuple[Any, Connections]:
        """The ASGI application, whose context is made when it starts, and its connections."""
        from pensieve.server.app import create_app
        from pensieve.server.connections import Connections
        from pensieve.server.context import Context
        from pensieve.server.metrics import Metrics
        from pensieve.server.turns import Answer, Turns

        metrics = Metrics()
        runtime = self.runtime

        def on_end(answer: Answer) -> None:
            if answer.done is not None:
                metrics.observe(answer.done.receipt)

        def make_context() -> Context:
            turns = Turns(
                runtime.service,
                max_open=config.max_open,
                max_open_per_tenant=config.max_open_per_key,
                queue_timeout_s=config.queue_timeout_s,
                request_timeout_s=config.request_timeout_s,
                on_end=on_end,
            )
            self.context = Context(
                config,
                runtime.info,
                self.text,
                self.store,
                runtime.service,
                turns,
                runtime.process,
                keys,
                metrics,
                names=frozenset({runtime.info.model}),
                checks={"engine": runtime.process.trouble},
                runner=runtime.workers,
            )
            if (workers := runtime.workers) is not None:
                self.context.checks["text"] = lambda: workers.trouble
            return self.context

        connections = Connections(front.limits(), lambda reason: metrics.refused.labels(reason).inc())
        return create_app(make_context, metrics, front.rules, self.close), connections

    async def drain(self, timeout_s: float) -> None:
        """Let open answers end, and take no new ones."""
        if self.context is not None:
            await self.context.turns.drain(timeout_s)

    def close(self) -> None:
        """The engine first, whose turns then fail, then the service that says so, then the lease under which they were made, then the stores."""
        if not self._closed:
            self._closed = True
            gave_up = self.context is not None and bool(
                self.context.turns.open
            )  # what the engine still does was told to end, and did not
            self.runtime.close(GAVE_UP_CLOSE_S if gave_up else CLOSE_S)
            self.lease.close()
            self.store.close()
            self.ephemeral.close()


def _start(
    options: Options,
    store_url: str | None,
    *,
    retain: bool,
    on_state: Callable[[State], None] | None = None,
    patience: Patience | None = None,
    prompt_timeout_s: float | None = None,
) -> _Parts:
    """Open the store, with a lease under which answers are kept while they are made, and start the engine's process."""
    from pensieve.runtime.apart import start_apart
    from pensieve.runtime.torchless import do_without_torch
    from pensieve.store import MEMORY, Lease, SqliteStore, default_path, open_store

    do_without_torch()
    store = open_store(str(default_path()) if store_url is None else store_url)
    lease: Lease | None = None
    try:
        lease = Lease(store)
        if lease.num_recovered:
            log.info(
                "%d answers had been under way when a server stopped: what was stored of them is kept",
                lease.num_recovered,
            )
        ephemeral = SqliteStore(MEMORY)
        runtime = start_apart(
            options,
            store=store,
            ephemeral=ephemeral,
            drafts=lease.owner,
            retain=retain,
            on_state=on_state,
            patience=patience,
            prompt_timeout_s=prompt_timeout_s,
        )
        if runtime.text is None:
            runtime.close()
            raise ModelUnavailable(
                f"{runtime.info.model} has no tokenizer here, and a server answers text: name a model that has one"
            )
    except BaseException:
        if lease is not None:
            lease.close()
        store.close()
        raise
    return _Parts(runtime, runtime.text, store, ephemeral, lease)


def _on_terminate(server: Any, parts: _Parts) -> None:
    """SIGTERM: take nothing new and let open answers end; uvicorn then closes the connections.

    Uvicorn raises the signal once more when all is done, for whoever handled it before. That is nobody: the exit is a clean one.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    before = server.handle_exit

    def handle_exit(number: int, frame: Any) -> None:
        if parts.context is not None and number == signal.SIGTERM:
            parts.context.turns.draining = True
        before(number, frame)

    server.handle_exit = handle_exit
