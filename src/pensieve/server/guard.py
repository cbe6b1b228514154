"""Refuses requests before a route sees them. Knows a request's head, sizes and keys; never what bodies mean.

Checked in this order: the host, the origin of the page, the path, the size of the body, the key, the tenant's
share, the kind of the body, and whether a turn would be refused in any case. Only then is a body read.
"""

from __future__ import annotations

import logging
import time
import uuid
from dataclasses import dataclass
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pensieve.errors import ConfigError, PensieveError
from pensieve.server.context import Context, tenant_by_key
from pensieve.server.errors import ApiError, error_response
from pensieve.server.memory import (
    JSON_BYTES_PER_S,
    LARGE_BYTES,
    PART_BYTES,
    PARTS_BYTES_PER_S,
    Spacing,
    Trimmer,
)
from pensieve.server.metrics import Metrics
from pensieve.server.origins import host_fault, is_foreign, name_of, values_of
from pensieve.server.redaction import redacted
from pensieve.server.shares import Shares

log = logging.getLogger(__name__)
access = logging.getLogger("pensieve.access")

READING = ("GET", "HEAD", "OPTIONS")  # methods that change nothing, except for `CHANGING`
CHANGING = ("/v1/pensieve/record",)  # GET requests that take something scarce
ALWAYS_OPEN = ("/health", "/ready")  # for supervisors, whatever else is closed
OPEN = ("/", "/metrics", "/openapi.json", "/version")  # without a key, unless --private
TURNS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")  # POST requests that the model answers
CLIENT_LEFT = 499  # counted in place of a status if none was sent, as nginx does
NUM_BODIES = 8  # largest bodies that fit into the default of `max_bodies_bytes`


@dataclass(frozen=True, slots=True)
class GuardRules:
    """What `RequestGuard` lets in.

    Raises:
        ConfigError: a limit is not positive, or one body could not pass.
    """

    max_body_bytes: int = 16 << 20
    # bytes of all bodies under way; None for `NUM_BODIES` of the largest
    max_bodies_bytes: int | None = None
    max_requests: int = 1024  # requests under way that need a key
    shared: bool = False  # whether there are tenants, each of which gets a share of bodies and requests
    hosts: frozenset[str] | None = None  # host names that requests may name; None for any
    origins: frozenset[str] = frozenset()  # other servers whose pages may call this one
    private: bool = False  # whether every path but `ALWAYS_OPEN` needs a key
    # port of /metrics, with `ALWAYS_OPEN` and no other path; None if /metrics is at the server's own port
    metrics_port: int | None = None
    metrics_hosts: frozenset[str] | None = None  # host names at that port; None for any
    access_log: bool = False

    def __post_init__(self) -> None:
        if not self.max_body_bytes > 0:
            raise ConfigError(f"--max-body must be positive, got {self.max_body_bytes} bytes")
        if self.total_bytes < self.max_body_bytes:
            raise ConfigError(
                f"--max-bodies ({self.total_bytes} bytes) must not be less than "
                f"--max-body ({self.max_body_bytes}): no body could pass"
            )

    @property
    def total_bytes(self) -> int:
        """Bytes of all bodies under way."""
        return NUM_BODIES * self.max_body_bytes if self.max_bodies_bytes is None else self.max_bodies_bytes

    def share_of(self, total: int) -> int | None:
        """The most of `total` that one tenant may have; None if it may have all."""
        return max(1, total * 3 // 4) if self.shared else None


class RequestGuard:
    """Counts requests, gives each an id, and refuses some of them before their bodies are read.

    A server without keys answers all programs of this machine. A page from elsewhere must not pass for one of
    them by giving its own name this machine's address (DNS rebinding), hence `hosts`; nor by having the
    browser write, hence `origins`.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, rules: GuardRules) -> None:
        self._app = app
        self._metrics = metrics
        self._rules = rules
        total = rules.total_bytes
        share = rules.share_of(total)
        self.bodies = Shares(total, None if share is None else max(share, rules.max_body_bytes))
        self.requests = Shares(rules.max_requests, rules.share_of(rules.max_requests))
        self.parts = Spacing(PART_BYTES, PARTS_BYTES_PER_S)  # as they come
        self.whole = Spacing(LARGE_BYTES, JSON_BYTES_PER_S)  # bodies, before their JSON is read
        self._trimmer = Trimmer()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = _as_routed(scope)
        begun_s = time.perf_counter()
        request_id = f"req_{uuid.uuid4().hex}"
        status = 0

        async def counting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {
                    **message,
                    "headers": [*message["headers"], (b"x-request-id", request_id.encode())],
                }
            await send(message)

        body = _Body(self, receive, scope)
        tenant = None
        try:
            try:
                tenant = self._admit(scope, body)
            except PensieveError as error:
                refusal = error_response(error)
                if body.expected:  # and not read
                    refusal.headers["Connection"] = "close"
                await refusal(scope, receive, counting_send)
                return
            await self._app(scope, body.receive, counting_send)
        except ClientDisconnect:
            status = CLIENT_LEFT  # it left within its body, so no answer is sent
        except Exception as error:
            log.error("%s %s failed (%s)", scope["method"], _shown(scope["path"]), request_id, exc_info=error)
            if status:  # too late for another answer
                raise
            await error_response(error)(scope, receive, counting_send)
        finally:
            body.close()
            if tenant is not None:
                self.requests.give(tenant)
            route = scope.get("route")
            endpoint = getattr(route, "path", scope["path"] if scope["path"] in TURNS else "other")
            self._metrics.requests.labels(endpoint, str(status)).inc()
            if self._rules.access_log:
                self._log_access(scope, status, begun_s, request_id)

    def trim_after(self, num_bytes: int) -> None:
        """`num_bytes` of a body were freed: give memory back to the system soon."""
        self._trimmer.freed(num_bytes)

    # -- inside

    def _admit(self, scope: Scope, body: _Body) -> str | None:
        """Refuse a request, or count it.

        Returns its tenant, None if the path is open to all and the request is not counted.

        Raises:
            PensieveError: the request is refused.
        """
        rules, headers, path, method = self._rules, scope["headers"], scope["path"], scope["method"]
        at_metrics_port = self._check_host(scope)
        if (method not in READING or path in CHANGING) and is_foreign(headers, rules.origins):
            raise ApiError(
                403,
                "a page of another origin may not change anything here: name its origin with --allow-origin, "
                "or put both behind one proxy",
                code="origin_not_allowed",
            )
        if body.declared > rules.max_body_bytes:
            raise ApiError(413, body.too_large(body.declared), code="request_too_large")
        if path in ALWAYS_OPEN or at_metrics_port:
            return None
        if path == "/metrics" and (rules.private or rules.metrics_port is not None):
            where = (
                f"port {rules.metrics_port}"
                if rules.metrics_port is not None
                else "no port: give --metrics-port"
            )
            raise ApiError(403, f"metrics are not shown here, but at {where}", code="not_allowed")
        if method == "OPTIONS" or ((path in OPEN or path.startswith("/static/")) and not rules.private):
            return None
        context: Context = scope["app"].state.context
        authorization = next(iter(values_of(headers, b"authorization")), "")
        tenant = tenant_by_key(context.keys, authorization)
        self._admit_body(scope, body, tenant, context)
        if not self.requests.take(tenant):
            raise ApiError(
                429,
                f"too many requests are under way, at most {self.requests.per_tenant} may be of one tenant: "
                "try again later",
                code="overloaded",
            )
        return tenant

    def _check_host(self, scope: Scope) -> bool:
        """Refuse host names, and paths, that the request's port does not serve.

        Returns whether it is the port of /metrics alone.
        """
        rules, path, hosts = self._rules, scope["path"], values_of(scope["headers"], b"host")
        if (fault := host_fault(hosts, scope["http_version"])) is not None:
            raise ApiError(400, fault, code="invalid_host")
        port = (scope.get("server") or (None, None))[1]
        at_metrics_port = rules.metrics_port is not None and port == rules.metrics_port
        names = rules.metrics_hosts if at_metrics_port else rules.hosts
        host = hosts[0] if hosts else ""
        if names is not None and name_of(host) not in names:
            known = ", ".join(sorted(names))
            raise ApiError(
                403,
                f"this server has no keys and answers to {known} only, not to {host!r}: "
                "start it with --api-key-file",
                code="host_not_allowed",
            )
        if at_metrics_port and path not in ("/metrics", *ALWAYS_OPEN):
            raise ApiError(
                404,
                f"there is nothing but /metrics, /health and /ready at this port, not {path}",
                code="not_found",
            )
        return at_metrics_port

    def _admit_body(self, scope: Scope, body: _Body, tenant: str, context: Context) -> None:
        """Refuse bodies that there is no room for, and requests that would be refused in any case after the
        body was read.
        """
        body.tenant = tenant
        if not body.expected or scope["method"] in READING:  # no route reads the body of a GET
            return
        kind = next(iter(values_of(scope["headers"], b"content-type")), "").partition(";")[0].strip().lower()
        if not (kind.startswith("application/") and (kind == "application/json" or kind.endswith("+json"))):
            message = "the body must be a JSON object, sent with the header Content-Type: application/json"
            raise ApiError(400, message, code="invalid_json")
        is_turn = scope["method"] == "POST" and scope["path"] in TURNS
        is_retry = bool(
            values_of(scope["headers"], b"idempotency-key")
        )  # perhaps, and then it needs no place
        if is_turn and not is_retry:
            context.answers.check_room(tenant)
        if not body.take(body.declared):
            raise body.no_room()

    def _log_access(self, scope: Scope, status: int, begun_s: float, request_id: str) -> None:
        """Log a request without its query, where clients send keys by mistake."""
        client = ":".join(map(str, scope.get("client") or "-"))
        ms = 1e3 * (time.perf_counter() - begun_s)
        access.info(
            '%s "%s %s" %d %.1f ms %s', client, scope["method"], _shown(scope["path"]), status, ms, request_id
        )


class _Body:
    """One request's body on its way in, and the share of `--max-bodies` that it takes."""

    def __init__(self, guard: RequestGuard, receive: Receive, scope: Scope) -> None:
        self._guard, self._receive = guard, receive
        length = next(iter(values_of(scope["headers"], b"content-length")), "0")
        is_number = length.isascii() and length.isdigit() and len(length) < 20
        self.declared = int(length) if is_number else 0  # bytes
        self.expected = self.declared > 0 or bool(values_of(scope["headers"], b"transfer-encoding"))
        self.tenant = ""
        self._taken = self._received = self._part_bytes = 0

    def take(self, num_bytes: int) -> bool:
        """Reserve `num_bytes` in all, as many more than now. False if there is no room."""
        more = max(0, num_bytes - self._taken)
        if not self._guard.bodies.take(self.tenant, more):
            return False
        self._taken += more
        return True

    def close(self) -> None:
        """The request has ended: give the reserved bytes back."""
        if self._taken:
            self._guard.bodies.give(self.tenant, self._taken)
            self._guard.trim_after(self._taken)
            self._taken = 0

    async def receive(self) -> Message:
        """The next part."""
        last_bytes, self._part_bytes = self._part_bytes, 0
        # While this waits, no more is read from the connection.
        await self._guard.parts.wait(last_bytes)
        message = await self._receive()
        if part := message.get("body"):
            self._part_bytes = len(part)
            self._received += len(part)
            if self._received > self._guard._rules.max_body_bytes:
                raise HTTPException(413, self.too_large(self._received), {"Connection": "close"})
            if self._received > self._taken and not self.take(self._received):
                raise HTTPException(429, self.no_room().message, {"Connection": "close"})
            if not message.get("more_body", False):
                await self._guard.whole.wait(self._received)
        return message

    def too_large(self, num_bytes: int) -> str:
        """The reason to refuse it for good."""
        limit = self._guard._rules.max_body_bytes
        return f"the body has {num_bytes} bytes or more, at most {limit} are taken (--max-body)"

    def no_room(self) -> ApiError:
        """The reason to refuse it for now."""
        bodies = self._guard.bodies
        return ApiError(
            429,
            f"bodies of {bodies.total} bytes may be under way together, of one tenant {bodies.per_tenant} "
            "(--max-bodies): try again later",
            code="overloaded",
        )


def _shown(path: str) -> str:
    """A path for the log: on one line, with keys hidden."""
    return redacted(quote(path))


def _as_routed(scope: Scope) -> Scope:
    """A request as routes match it:

    HEAD counts as GET, whose body the HTTP server leaves out, and a slash at the end is ignored.
    """
    path = scope["path"]
    if scope["method"] != "HEAD" and not path.endswith("/"):
        return scope
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "method": method, "path": path.rstrip("/") or "/"}
