"""`pensieve keys`: API keys for `pensieve serve --api-key-file`."""

from __future__ import annotations

import os
from pathlib import Path

import click


@click.group()
def keys() -> None:
    """Make API keys for `pensieve serve --api-key-file`."""


@keys.command()
@click.argument("tenant")
@click.option("--file", "path", type=click.Path(path_type=Path), required=True, help="The key file; made if it is not there.")
@click.option("--remark", default="", help="What the key is for.")
def add(tenant: str, path: Path, remark: str) -> None:
    """Make a key for TENANT and print it, once: the file holds only its hash.

    Conversations and cache belong to the tenant. Several keys may name one tenant, so that a key can be replaced without a gap.
    """
    from pensieve.server.keys import key_line, new_key

    key = new_key()
    line = key_line(tenant, key, remark)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(fd, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    click.echo(key)
