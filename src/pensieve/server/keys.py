"""Who may ask, and as whom: API keys in a file, hashed. Knows the file's form; never HTTP or conversations.

A line of the file is `TENANT sha256:HEX [remark]`; empty lines and lines that begin with # do not count. Several keys may
name one tenant: add the new key, wait for the clients, remove the old one. The file is read again when it changes.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import threading
from pathlib import Path

from pensieve.errors import ConfigError

PREFIX = "pk-"
SALT_MARK = "\x1f"  # between a tenant and its own subdivision of the cache, see `messages.tenant_of`
_LINE = re.compile(r"(?P<tenant>[A-Za-z0-9][A-Za-z0-9._@-]{0,63})\s+sha256:(?P<digest>[0-9a-f]{64})(?:\s.*)?")


def new_key() -> str:
    """A key with 256 random bits: so many that a plain hash of it can be stored."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str) -> str:
    """What the file holds instead of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def key_line(tenant: str, key: str, remark: str = "") -> str:
    """A line for the file.

    Raises:
        ConfigError: the tenant's name has characters that it may not have.
    """
    line = f"{tenant} sha256:{digest_of(key)}" + (f" {remark}" if remark else "")
    if "\n" in line or _LINE.fullmatch(line) is None:
        raise ConfigError(f"a tenant's name must be 1 to 64 letters, digits and ._@- beginning with a letter or digit, got {tenant!r}")
    return line


class KeyFile:
    """The keys of a file, as it is now."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            ConfigError: it cannot be read, holds no key, or holds a line that is none.
        """
        self._path = path
        self._lock = threading.Lock()
        self._state = self._look()
        self._tenants = self._read()
        self.error: str | None = None  # why the file as it is now was not taken; the keys are those of before

    def tenant(self, key: str) -> str | None:
        """Whose key this is; None: nobody's."""
        self._refresh()
        return self._tenants.get(digest_of(key))

    def _refresh(self) -> None:
        state = self._look()
        if state == self._state:
            return
        with self._lock:
            if state != self._state:
                try:
                    self._tenants, self.error = self._read(), None
                except ConfigError as error:  # a file half written, or with a typing error, locks nobody out
                    self.error = error.message
                self._state = state

    def _look(self) -> tuple[int, int, int] | None:
        try:
            stat = os.stat(self._path)
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

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
            if match is None:  # the line itself is not quoted: somebody may have put a key there in clear
                raise ConfigError(f"{self._path}, line {number}: expected `TENANT sha256:HEX [remark]` (see `pensieve keys add`)")
            tenants[match["digest"]] = match["tenant"]
        if not tenants:
            raise ConfigError(f"the key file {self._path} holds no key: make one with `pensieve keys add NAME --file {self._path}`")
        return tenants
