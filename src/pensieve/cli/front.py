"""What stands before the server's application: its sockets, its limits of connections, and the door's options. Chooses and wires; knows no routes."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pensieve.errors import ConfigError

if TYPE_CHECKING:
    from pensieve.server.connections import ConnectionLimits
    from pensieve.server.door import DoorRules

Function = TypeVar("Function", bound=Callable[..., Any])

BACKLOG = 4096  # connections not yet accepted; the system may take fewer. One beyond them waits a second before it is tried again
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
MANY_FILES = 10_240  # what macOS takes where the hard limit is "unlimited"
RESERVED_FILES = 128  # for the store, the log and the engine's pipes; a quarter where there are few
MIN_CONNECTIONS = 8


def front_options(function: Function) -> Function:
    """The options of who may come in, and how much and how slowly clients may send."""
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
                help="MB of the bodies of all requests under way; beyond it: 429.  [default: eight times --max-body]",
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
                help="Show /metrics at this port, without a key, and not at --port. 0: any free one, printed.",
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


class Front:
    """The listening sockets, and what the door and the connections may do."""

    def __init__(
        self,
        *,
        host: str,
        port: int,
        has_keys: bool,
        insecure: bool,
        stall_timeout_s: float,
        max_requests: int,
        max_body_mb: float,
        max_bodies_mb: float | None,
        header_timeout_s: float,
        origins: tuple[str, ...],
        private: bool,
        metrics_port: int | None,
        metrics_host: str,
        access_log: bool,
    ) -> None:
        """Check the options and listen.

        Raises:
            ConfigError: an option is wrong, or one cannot listen there.
        """
        from pensieve.server.door import DoorRules
        from pensieve.server.origins import parse_origin

        if not has_keys and not insecure and not is_loopback(host):
            raise ConfigError(
                f"--host {host} can be reached from other machines: give --api-key-file (see `pensieve keys add`), or --insecure if any client may ask"
            )
        if private and not has_keys:
            raise ConfigError("--private needs --api-key-file: without keys no request could pass")
        if metrics_port and metrics_port == port:
            raise ConfigError(
                f"--metrics-port {metrics_port} must not be --port: /metrics is at --port if it is not given"
            )
        self._header_timeout_s, self._stall_timeout_s = header_timeout_s, stall_timeout_s
        origins_taken = frozenset(map(parse_origin, origins))
        self.sockets = [
            _listen(host, port)
        ]  # first: a port that is taken should not cost the loading of a model
        try:
            if metrics_port is not None:
                self.sockets.append(_listen(metrics_host, metrics_port))
            self.rules: DoorRules = DoorRules(
                max_body_bytes=int(max_body_mb * (1 << 20)),
                max_bodies_bytes=None if max_bodies_mb is None else int(max_bodies_mb * (1 << 20)),
                max_requests=max_requests,
                shared=has_keys,
                hosts=_names(host) if not has_keys and not insecure else None,
                origins=origins_taken,
                private=private,
                metrics_port=None if metrics_port is None else self.sockets[1].getsockname()[1],
                metrics_hosts=_names(metrics_host) if is_loopback(metrics_host) else None,
                access_log=access_log,
            )
        except BaseException:
            self.close()
            raise
        self.url = _url(host, self.sockets[0])
        self.metrics_url = (
            f"{self.url if metrics_port is None else _url(metrics_host, self.sockets[1])}/metrics"
        )
        self.notes = [] if not has_keys or private else [self._open_note(is_apart=metrics_port is not None)]

    def close(self) -> None:
        """Listen no more."""
        for each in self.sockets:
            each.close()

    def limits(self) -> ConnectionLimits:
        """Limits of connections, by the files that may be open beside those that are."""
        from pensieve.server.connections import ConnectionLimits

        limits = ConnectionLimits(
            header_timeout_s=self._header_timeout_s, stall_timeout_s=self._stall_timeout_s
        )
        num_files = raise_file_limit()
        if num_files is None:
            return limits
        reserved = min(RESERVED_FILES, num_files // 4)
        return ConnectionLimits(
            header_timeout_s=self._header_timeout_s,
            stall_timeout_s=self._stall_timeout_s,
            max_connections=max(MIN_CONNECTIONS, num_files - num_open_files() - reserved),
        )

    @staticmethod
    def _open_note(*, is_apart: bool) -> str:
        metrics = (
            ""
            if is_apart
            else "/metrics (it counts every tenant's tokens: --metrics-port puts it elsewhere), "
        )
        return f"open without a key: {metrics}the page, /openapi.json, /version, /health, /ready; --private closes all but the last two"


def log_to_stderr() -> None:
    """Log to stderr, without keys and passwords."""
    from pensieve.server.redaction import RedactingFormatter

    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def password_note(store_url: str | None) -> str | None:
    """A warning where the store's password was typed on the command line, where every user of the machine can read it."""
    if (
        store_url is None
        or not re.search(r"://[^/@]*:[^/]+@|[?&]password=", store_url)
        or not any(store_url in word for word in sys.argv)
    ):
        return None
    return (
        "the store's password stands on the command line, where other users of this machine can read it: give the URL in PENSIEVE_STORE, "
        "or the password in PGPASSWORD or ~/.pgpass"
    )


def raise_file_limit() -> int | None:
    """Raise the soft limit of open files to the hard one. Returns how many may be open; None where there is no such limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (hard, MANY_FILES):
        if soft != resource.RLIM_INFINITY and (wanted == resource.RLIM_INFINITY or wanted > soft):
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                soft = wanted
            except (ValueError, OSError):  # more than the kernel takes
                continue
    return None if soft == resource.RLIM_INFINITY else soft


def num_open_files() -> int:
    """Files that this process has open; 64 where the system does not say."""
    for folder in ("/proc/self/fd", "/dev/fd"):
        if Path(folder).is_dir():
            return len(os.listdir(folder))
    return 64


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    if host.lower().removesuffix(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _names(host: str) -> frozenset[str]:
    bracketed = f"[{host}]" if ":" in host else host
    return frozenset({bracketed.lower().removesuffix("."), *LOOPBACK_NAMES})


def _url(host: str, listener: socket.socket) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host}:{port}: {error.strerror or error}; choose another --port or --host"
        ) from error
    return listener
