"""A server's sockets, and the limits that its options set on requests and connections.

Knows addresses and files; never routes.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import replace
from pathlib import Path

from pensieve.errors import ConfigError
from pensieve.server.connections import ConnectionLimits
from pensieve.server.guard import GuardRules
from pensieve.server.options import ServeOptions
from pensieve.server.origins import parse_origin

BACKLOG = 4096  # connections not yet accepted; one beyond them is tried again after a second
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
MANY_FILES = 10_240  # the most that macOS takes where the hard limit is "unlimited"
RESERVED_FILES = 128  # for the store, the log and the engine's pipes; a quarter where there are few
MIN_CONNECTIONS = 8


class Listener:
    """The listening sockets of a server.

    Attributes:
        sockets: for the API; then for /metrics, if that has a port of its own.
        rules: what `RequestGuard` lets in.
        url: where the API is.
        metrics_url: where /metrics is.
        notes: what an operator should know of the options.
    """

    def __init__(self, options: ServeOptions) -> None:
        """Check the options and listen.

        Raises:
            ConfigError: an option is wrong, or the address cannot be listened at.
        """
        has_keys, host = options.has_keys, options.host
        self._options = options
        if not has_keys and not options.insecure and not is_loopback(host):
            raise ConfigError(
                f"--host {host} can be reached from other machines: give --api-key-file "
                "(see `pensieve keys add`), or --insecure if any client may ask"
            )
        if options.private and not has_keys:
            raise ConfigError("--private needs --api-key-file: without keys no request could pass")
        if options.metrics_port and options.metrics_port == options.port:
            raise ConfigError(
                f"--metrics-port {options.metrics_port} must not be --port: "
                "/metrics is at --port if it is not given"
            )
        origins = frozenset(map(parse_origin, options.origins))
        # Listen first: a port that is taken should not cost the loading of a model.
        self.sockets = [_listen(host, options.port)]
        try:
            if options.metrics_port is not None:
                self.sockets.append(_listen(options.metrics_host, options.metrics_port))
            self.rules = self._guard_rules(origins)
        except BaseException:
            self.close()
            raise
        self.url = _url(host, self.sockets[0])
        metrics_url = self.url if len(self.sockets) == 1 else _url(options.metrics_host, self.sockets[1])
        self.metrics_url = f"{metrics_url}/metrics"
        is_open = has_keys and not options.private
        self.notes = [self._open_note()] if is_open else []

    def _guard_rules(self, origins: frozenset[str]) -> GuardRules:
        options, is_apart = self._options, len(self.sockets) > 1
        closed = options.has_keys or options.insecure
        return GuardRules(
            max_body_bytes=options.max_body_bytes,
            max_bodies_bytes=options.max_bodies_bytes,
            max_requests=options.max_requests,
            shared=options.has_keys,
            hosts=None if closed else _names(options.host),
            origins=origins,
            private=options.private,
            metrics_port=self.sockets[1].getsockname()[1] if is_apart else None,
            metrics_hosts=_names(options.metrics_host) if is_loopback(options.metrics_host) else None,
            access_log=options.access_log,
        )

    def close(self) -> None:
        """Stop listening."""
        for each in self.sockets:
            each.close()

    def limits(self) -> ConnectionLimits:
        """Limits of connections: as many as the limit of open files allows."""
        options, num_files = self._options, raise_file_limit()
        limits = ConnectionLimits(
            header_timeout_s=options.header_timeout_s, stall_timeout_s=options.stall_timeout_s
        )
        if num_files is None:
            return limits
        reserved = min(RESERVED_FILES, num_files // 4)
        return replace(limits, max_connections=max(MIN_CONNECTIONS, num_files - num_open_files() - reserved))

    def _open_note(self) -> str:
        metrics = "/metrics (it counts every tenant's tokens: --metrics-port puts it elsewhere), "
        return (
            f"open without a key: {metrics if len(self.sockets) == 1 else ''}the page, /openapi.json, "
            "/version, /health, /ready; --private closes all but the last two"
        )


def raise_file_limit() -> int | None:
    """Raise the soft limit of open files to the hard one.

    Returns how many may be open, None if there is no limit.
    """
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
    """Files that this process has open; 64 if the system does not say."""
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
