"""`pensieve keys`: API keys for `pensieve serve --api-key-file`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from pensieve.errors import ConfigError


@click.group()
def keys() -> None:
    """Make API keys for `pensieve serve --api-key-file`."""


@keys.command()
@click.argument("tenant")
@click.option(
    "--file",
    "path",
    type=click.Path(path_type=Path),
    required=True,
    help="The key file; made if it is not there.",
)
@click.option("--remark", default="", help="What the key is for.")
def add(tenant: str, path: Path, remark: str) -> None:
    """Make a key for TENANT and print it, once: the file holds only its hash.

    Conversations and cache belong to the tenant. Several keys may name one tenant, so that a key can be
    replaced without a gap.
    """
    from pensieve.server.keys import key_line, new_key

    key = new_key()
    line = key_line(tenant, key, remark)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(fd, "r+", encoding="utf-8") as file:
            _close_to_others(path, file.fileno())
            file.seek(0)
            text = file.read()
            file.write(
                ("\n" if text and not text.endswith("\n") else "") + line + "\n"
            )  # (a last line without an end would swallow the key)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the key file {path} cannot be written: {getattr(error, 'strerror', None) or error}"
        ) from error
    click.echo(key)


def _close_to_others(path: Path, fd: int) -> None:
    """Make a key file that others may read or write its owner's alone, and say so."""
    mode = os.fstat(fd).st_mode & 0o777
    if os.name != "posix" or not mode & 0o077:
        return
    try:
        os.fchmod(fd, 0o600)
        click.echo(
            f"{path} could be read or written by other users (mode {mode:03o}): it is mode 600 now", err=True
        )
    except OSError as error:
        click.echo(
            f"{path} can be read or written by other users (mode {mode:03o}), and that cannot be changed: "
            f"{error.strerror}",
            err=True,
        )
