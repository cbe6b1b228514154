"""API keys and their tenants, hashed in a file. Knows the file's format; never HTTP or conversations.

A line of the file is `TENANT sha256:HEX [remark]`; empty lines and lines that begin with # do not count.
Several keys may name one tenant: add the new key, wait for the clients, remove the old one. The file is read
again when it changes.

A key that was removed is refused at once. While the file cannot be read, or has an invalid line, the keys
read before stay valid, so that a half-written file or a typing error locks no client out; `KeyFile.trouble`
and the log report it every minute. A file without any key refuses every key after `SETTLE_S`: by then it was
emptied on purpose, and is not just being written.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pensieve.errors import ConfigError

log = logging.getLogger(__name__)

PREFIX = "pk-"
SETTLE_S = 5.0  # how long a file must hold no key until that counts as intended
TELL_S = 60.0  # how often a fault of the file is logged
WATCH_S = 1.0
_LINE = re.compile(r"(?P<tenant>[A-Za-z0-9][A-Za-z0-9._@-]{0,63})\s+sha256:(?P<digest>[0-9a-f]{64})(?:\s.*)?")


def new_key() -> str:
    """A key with 256 random bits: enough to store a plain hash of it."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str) -> str:
    """The hash that the file holds for a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def key_line(tenant: str, key: str, remark: str = "") -> str:
    """A line for the file.

    Raises:
        ConfigError: the tenant's name is invalid.
    """
    line = f"{tenant} sha256:{digest_of(key)}" + (f" {remark}" if remark else "")
    if "\n" in line or _LINE.fullmatch(line) is None:
        raise ConfigError(
            "a tenant's name must be 1 to 64 letters, digits and ._@- beginning with a letter or digit, "
            f"got {tenant!r}"
        )
    return line


class KeyFile:
    """The keys of a file, as it is now. May be used from any thread."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file.

        Raises:
            ConfigError: it cannot be read, holds no key, or has an invalid line.
        """
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._state = self._look()
        self._tenants = self._read()
        if not self._tenants:
            raise ConfigError(
                f"the key file {path} holds no key: make one with `pensieve keys add NAME --file {path}`"
            )
        self.error: str | None = None  # the fault of the file as it is now; None if it has none
        self._empty_since_s: float | None = None
        self._told_s: float | None = None
        self._warn_of_mode()

    @property
    def tenants(self) -> frozenset[str]:
        """All tenants that have a key."""
        self._refresh()
        return frozenset(self._tenants.values())

    def tenant(self, key: str) -> str | None:
        """The tenant of a key; None if the file does not hold it."""
        self._refresh()
        return self._tenants.get(digest_of(key))

    def trouble(self) -> str | None:
        """The fault of the file as it is now, without naming paths or keys; None if it has none.

        Logs it, once a minute.
        """
        self._refresh()
        if self.error is None:
            return None
        if not self._tenants:
            return "the API key file holds no key: every key is refused"
        return (
            "the API key file cannot be read or is not in order: "
            "the keys of before are valid (the log says more)"
        )

    async def watch(self) -> None:
        """Check the file every second, so that a fault is logged even if no client sends a request."""
        while True:
            self.trouble()
            await asyncio.sleep(WATCH_S)

    def _refresh(self) -> None:
        state = self._look()
        if state == self._state and self.error is None:
            return
        with self._lock:
            if state != self._state:
                self._take(state)
            if (
                self._empty_since_s is not None
                and self._tenants
                and self._clock() - self._empty_since_s >= SETTLE_S
            ):
                self._tenants = {}
                self._told_s = None
            self._tell()

    def _take(self, state: tuple[int, int, int, int] | None) -> None:
        """Read the file anew."""
        before = self.error
        try:
            tenants = self._read()
        except ConfigError as error:
            self.error, self._empty_since_s = error.message, None
        else:
            if tenants:
                self._tenants, self.error, self._empty_since_s = tenants, None, None
                if before is not None:
                    log.info("the key file %s is in order again", self._path)
            else:
                self.error = f"the key file {self._path} holds no key"
                if self._empty_since_s is None:
                    self._empty_since_s = self._clock()
        if self.error != before:
            self._told_s = None
        self._state = state
        self._warn_of_mode()

    def _tell(self) -> None:
        now_s = self._clock()
        if self.error is None or (self._told_s is not None and now_s - self._told_s < TELL_S):
            return
        self._told_s = now_s
        log.error(
            "%s; %s",
            self.error,
            "the keys of before are still valid" if self._tenants else "every key is refused",
        )

    def _warn_of_mode(self) -> None:
        with contextlib.suppress(OSError):
            mode = os.stat(self._path).st_mode
            if os.name == "posix" and mode & 0o077:
                log.warning(
                    "the key file %s can be read or written by other users (mode %03o): chmod 600 it",
                    self._path,
                    mode & 0o777,
                )

    def _look(self) -> tuple[int, int, int, int] | None:
        try:
            stat = os.stat(self._path)
        except OSError:
            return None
        return (
            stat.st_mtime_ns,
            stat.st_ctime_ns,
            stat.st_size,
            stat.st_ino,
        )  # ctime changes with the mode

    def _read(self) -> dict[str, str]:
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the key file {self._path} cannot be read: {error}") from error
        tenants = {}
        for number, line in enumerate(text.splitlines(), start=1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            match = _LINE.fullmatch(line)
            if match is None:  # the line itself is not quoted: it may hold a key in clear
                raise ConfigError(
                    f"{self._path}, line {number}: expected `TENANT sha256:HEX [remark]` "
                    "(see `pensieve keys add`)"
                )
            tenants[match["digest"]] = match["tenant"]
        return tenants
