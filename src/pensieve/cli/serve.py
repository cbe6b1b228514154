"""`pensieve serve`: the engine in a process of its own, and an HTTP server in front of it.

Knows options and how to report; wires nothing.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pensieve.cli.loops import loop_factory
from pensieve.cli.options import cache_options, model_options, pick, template_options
from pensieve.engine.vitals import SILENT_S
from pensieve.errors import ConfigError
from pensieve.runtime.follower import follow_unless_first
from pensieve.runtime.loading import notes_of

if TYPE_CHECKING:
    from pensieve.server.listener import Listener
    from pensieve.server.options import ServeOptions
    from pensieve.server.run import Backend

Function = TypeVar("Function", bound=Callable[..., Any])

DEFAULT_PORT = 8000


def _guard_options(function: Function) -> Function:
    """Options of which requests are let in, and of how much and how slowly clients may send."""
    for option in reversed(
        (
            click.option(
                "--max-body",
                "max_body_mb",
                type=click.FloatRange(min=0.001),
                default=16.0,
                show_default=True,
                help="MB of a request's body.",
            ),
            click.option(
                "--max-bodies",
                "max_bodies_mb",
                type=click.FloatRange(min=0.001),
                default=None,
                help="MB of the bodies of all requests under way; beyond it: 429.  "
                "[default: eight times --max-body]",
            ),
            click.option(
                "--header-timeout",
                "header_timeout_s",
                type=click.FloatRange(min=0.01),
                default=20.0,
                show_default=True,
                help="Seconds to a request's complete headers; a body must go on as steadily.",
            ),
            click.option(
                "--allow-origin",
                "origins",
                multiple=True,
                help="Another server whose pages may call this one, as https://host; repeatable.",
            ),
            click.option(
                "--private",
                is_flag=True,
                help="Answer only /health and /ready without a key; no page, no /metrics.",
            ),
            click.option(
                "--metrics-port",
                type=click.IntRange(0, 65535),
                default=None,
                help="Show /metrics at this port, without a key, and not at --port. "
                "0: any free one, printed.",
            ),
            click.option(
                "--metrics-host", default="127.0.0.1", show_default=True, help="Address of --metrics-port."
            ),
            click.option(
                "--access-log", is_flag=True, help="Log a line a request: never its content nor its query."
            ),
        )
    ):
        function = option(function)
    return function


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
    help="File with the API keys of clients (see `pensieve keys add`); read again when it changes.",
)
@click.option("--insecure", is_flag=True, help="Listen beyond this machine without keys.")
@click.option(
    "--store",
    "store_url",
    envvar="PENSIEVE_STORE",
    default=None,
    help="A file's path, sqlite:///FILE or postgresql://…, also in PENSIEVE_STORE.  "
    "[default: a SQLite file in your data directory]",
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
    help="Of these, requests of one tenant's keys.  [default: three quarters with --api-key-file, else all]",
)
@_guard_options
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
    help="Seconds that the engine may take to answer a question that is not a turn (map, pin, erasure).  "
    "[default: 30, or --queue-timeout if that is less]",
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
    help="Seconds that one step of the engine may take before it is replaced.  "
    "[default: ten times --engine-timeout]",
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
    begun_s = time.perf_counter()
    options = pick(arguments)
    rank = follow_unless_first(options)
    try:
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"`pensieve serve` needs the server packages ({error.name}): pip install 'pensieve-serve[server]'"
        ) from error
    from pensieve.server.options import ServeOptions
    from pensieve.server.run import run_server

    serving = ServeOptions(**arguments)
    _log_to_stderr()

    def on_ready(backend: Backend, listener: Listener) -> None:
        _announce(backend, listener, serving, time.perf_counter() - begun_s)

    run_server(
        options, serving, on_ready=on_ready, ends_with_engine=rank is not None, loop_factory=loop_factory()
    )


def _announce(backend: Backend, listener: Listener, serving: ServeOptions, start_s: float) -> None:
    """Print what serves where, and what an operator should know."""
    info, url = backend.runtime.info, listener.url
    for remark in info.remarks:
        click.secho(remark, dim=True)
    tiers = ", ".join(f"{tier.name} {tier.num_slots} chunks" for tier in info.tiers)
    computing = f", {info.instructions}" if info.instructions else ""
    mode = ", stateless: nothing is kept between turns" if serving.stateless else ""
    click.secho(
        f"{info.model} ({info.weights} weights, {info.dtype} on {info.device}, {info.attention} attention, "
        f"{info.forward} forward{computing}); {tiers}{mode}; "
        f"context {info.max_context} tokens; ready in {start_s:.1f} s",
        fg="cyan",
    )
    notes = [*notes_of(info.note, backend.text.note), *listener.notes]
    if (note := password_note(serving.store_url)) is not None:
        notes.append(note)
    for note in notes:
        click.secho(f"note: {note}", fg="yellow")
    metrics = f", metrics: {listener.metrics_url}" if len(listener.sockets) > 1 else ""
    without = "" if serving.has_keys else "  without keys"
    click.secho(f"listening at {url}  (API: {url}/v1, page: {url}/{metrics}){without}", bold=True)
    sys.stdout.flush()


def _log_to_stderr() -> None:
    """Log to stderr, without keys and passwords."""
    from pensieve.server.redaction import RedactingFormatter

    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def password_note(store_url: str | None) -> str | None:
    """A warning where the store's password was typed on the command line, where every user of the machine can
    read it.
    """
    if (
        store_url is None
        or not re.search(r"://[^/@]*:[^/]+@|[?&]password=", store_url)
        or not any(store_url in word for word in sys.argv)
    ):
        return None
    return (
        "the store's password stands on the command line, where other users of this machine can read it: "
        "give the URL in PENSIEVE_STORE, or the password in PGPASSWORD or ~/.pgpass"
    )
