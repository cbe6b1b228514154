"""Hides API keys and passwords in text. Knows what they look like; never where a text comes from."""

from __future__ import annotations

import logging
import re

SECRET = "[hidden]"
_SECRETS = (
    re.compile(r"\bpk-[A-Za-z0-9_-]{8,}"),  # our own API keys, see `keys.new_key`
    re.compile(r"(?i)(?<=bearer )[^\s'\",;)\]}\[]+"),  # keys of other services
    re.compile(r"(?<=://)(?P<user>[^\s/@:'\"]*):[^\s/'\"]*(?=@)"),  # user:password@ in a URL
    re.compile(r"(?i)(?<=\bpassword=)(?:'[^']*'|[^\s&'\"]+)"),  # as libpq writes it
)


def redacted(text: str) -> str:
    """The text with `[hidden]` in place of every key and password in it."""
    for pattern in _SECRETS:
        text = pattern.sub(
            lambda match: f"{match['user']}:{SECRET}" if "user" in match.groupdict() else SECRET, text
        )
    return text


class RedactingFormatter(logging.Formatter):
    """Log lines, tracebacks included, without keys and passwords, and each on one line unless it has a
    traceback.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        return redacted(super().format(record))
