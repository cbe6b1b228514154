"""Which pages may call the server, and under which host names.

Knows the headers Host, Origin and Sec-Fetch-Site; never paths or keys.

A browser sends a page's requests to any address, from the user's network and without asking the user. They
differ from a program's requests by headers that a page cannot change. The rule is that of Go's
`http.CrossOriginProtection`: `Sec-Fetch-Site` if the browser sends it (over https, and to this machine),
otherwise `Origin` compared with `Host`; a request with neither comes from a program.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from pensieve.errors import ConfigError

Headers = Iterable[tuple[bytes, bytes]]  # names in lower case

OWN_SITES = ("same-origin", "none")  # none: from the user, such as a bookmark


def values_of(headers: Headers, name: bytes) -> list[str]:
    """All values of a header."""
    return [value.decode("latin-1") for key, value in headers if key == name]


def host_fault(hosts: list[str], http_version: str) -> str | None:
    """The fault of a request's Host headers (RFC 9112, section 3.2), in words; None if they have none."""
    if len(hosts) > 1:
        return f"a request must have one Host header, got {len(hosts)}"
    if not hosts and http_version not in ("0.9", "1.0"):
        return "an HTTP/1.1 request must have a Host header"
    return None


def name_of(host: str) -> str:
    """The name in a Host header for comparison: in lower case, without the port and a final dot."""
    name, _, port = host.strip().rpartition(":")
    name = name if name and port.isdigit() else host.strip()
    return name.lower().removesuffix(".")


def parse_origin(text: str) -> str:
    """An origin as browsers write it, `scheme://host[:port]` in lower case.

    Raises:
        ConfigError: it is not an origin.
    """
    try:
        parts = urlsplit(text.strip().lower())
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.path not in ("", "/")
        or parts.query
        or parts.username
    ):
        raise ConfigError(f"an origin must look like https://host or https://host:port, got {text!r}")
    name = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    standard = {"http": 80, "https": 443}[parts.scheme]
    return f"{parts.scheme}://{name}" + (f":{port}" if port not in (None, standard) else "")


def is_foreign(headers: Headers, allowed: frozenset[str]) -> bool:
    """Whether a request comes from a page of an origin that is neither the server's own nor `allowed`."""
    headers = list(headers)
    origins = [origin.strip().lower() for origin in values_of(headers, b"origin")]
    if origins and all(origin in allowed for origin in origins):
        return False
    if sites := values_of(headers, b"sec-fetch-site"):
        return any(site.strip().lower() not in OWN_SITES for site in sites)
    hosts = values_of(headers, b"host")
    return any(not hosts or not _same_server(origin, hosts[0]) for origin in origins)


def _same_server(origin: str, host: str) -> bool:
    """Whether an origin is `host`, with any scheme, because a proxy may end TLS. `null` is no server."""
    scheme, separator, _ = origin.partition("://")
    authority = _authority(origin)
    return bool(separator) and authority is not None and authority == _authority(f"{scheme}://{host}")


def _authority(origin: str) -> str | None:
    """`host:port` of an origin; None if it is not one."""
    try:
        parts = urlsplit(origin.strip().lower())
        if parts.scheme not in ("http", "https") or not parts.hostname:
            return None
        return f"{parts.hostname.removesuffix('.')}:{parts.port or (443 if parts.scheme == 'https' else 80)}"
    except ValueError:
        return None
