"""How `pensieve serve` is to serve, as its options say.

Knows names, limits and defaults; never sockets, engines or routes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pensieve.engine.vitals import SILENT_S, STEPS_TO_SILENCE, Patience
from pensieve.server.context import ServerConfig

MB = 1 << 20
REQUESTS_PER_TURN = 4  # requests of all kinds that may be under way, for each of `max_open`
OPERATION_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The options of `pensieve serve`, except those of the model and the cache."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0 for any free one
    api_key_file: Path | None = None
    insecure: bool = False
    store_url: str | None = None  # None for a SQLite file in the user's data directory
    model_name: str | None = None  # what clients call the model; None for the name it is loaded by
    max_open: int = 256
    max_open_per_key: int | None = None
    max_body_mb: float = 16.0
    max_bodies_mb: float | None = None
    header_timeout_s: float = 20.0
    origins: tuple[str, ...] = ()
    private: bool = False
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    access_log: bool = False
    queue_timeout_s: float = 120.0
    request_timeout_s: float = 900.0
    prompt_timeout_s: float = 10.0
    stall_timeout_s: float = 60.0
    drain_timeout_s: float = 30.0
    operation_timeout_s: float | None = None
    engine_timeout_s: float = SILENT_S
    step_timeout_s: float | None = None
    stateless: bool = False

    @property
    def has_keys(self) -> bool:
        """Whether clients need a key."""
        return self.api_key_file is not None

    @property
    def max_body_bytes(self) -> int:
        """Bytes of one request's body."""
        return int(self.max_body_mb * MB)

    @property
    def max_bodies_bytes(self) -> int | None:
        """Bytes of the bodies of all requests under way; None for the default."""
        return None if self.max_bodies_mb is None else int(self.max_bodies_mb * MB)

    @property
    def max_requests(self) -> int:
        """Requests of all kinds that may be under way."""
        return REQUESTS_PER_TURN * self.max_open

    def config(self, model: str, *, debug: bool) -> ServerConfig:
        """Limits and names for the routes; `model` is the name that the model is loaded by.

        Raises:
            ConfigError: an option is out of its range.
        """
        share = max(1, self.max_open * 3 // 4) if self.has_keys else None
        operation_timeout_s = self.operation_timeout_s
        if operation_timeout_s is None:
            operation_timeout_s = min(OPERATION_TIMEOUT_S, self.queue_timeout_s)
        return ServerConfig(
            model=self.model_name or model,
            max_open=self.max_open,
            max_open_per_key=self.max_open_per_key or share,
            max_body_bytes=self.max_body_bytes,
            queue_timeout_s=self.queue_timeout_s,
            request_timeout_s=self.request_timeout_s,
            stall_timeout_s=self.stall_timeout_s,
            drain_timeout_s=self.drain_timeout_s,
            operation_timeout_s=operation_timeout_s,
            debug=debug,
        )

    def patience(self) -> Patience:
        """How long the engine's process may be silent, and one step may take, before it is replaced."""
        step_timeout_s = self.step_timeout_s
        if step_timeout_s is None:
            step_timeout_s = STEPS_TO_SILENCE * self.engine_timeout_s
        return Patience(self.engine_timeout_s, step_timeout_s)
