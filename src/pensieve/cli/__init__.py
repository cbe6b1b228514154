"""The command line. Knows click and exit codes; the rooms below do the work."""

from __future__ import annotations

import sys

import click

from pensieve.errors import ConfigError, PensieveError
from pensieve.worker.rank import Rank


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    from pensieve.cli.commands import cli  # here: an engine's own process imports this file and no command

    run_command(cli, "pensieve", arguments)


def run_command(command: click.Command, name: str, arguments: list[str] | None = None) -> None:
    """Run a click command as a program; a `PensieveError` becomes one line on stderr and exit status 2.

    Under torchrun, rank 0 alone prints errors of the command line and exits with their status.
    """
    try:
        command.main(arguments, prog_name=name, standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        if _is_follower():
            sys.exit(0)
        error.show()
        sys.exit(error.exit_code)
    except PensieveError as error:
        if _is_follower():
            sys.exit(0)
        from pensieve.server.redaction import redacted

        click.echo(f"{name}: {error.code}: {redacted(error.message)}", err=True)
        sys.exit(2)


def _is_follower() -> bool:
    try:
        rank = Rank.from_environment()
    except ConfigError:
        return False
    return rank is not None and rank.index > 0
