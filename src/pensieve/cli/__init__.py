"""The command line: `pensieve chat | compare | models | profile`. Chooses, wires, starts; the rooms do the work."""

from __future__ import annotations

import sys

import click

from pensieve import __version__
from pensieve.cli.chat import chat
from pensieve.cli.compare import compare
from pensieve.cli.models import models
from pensieve.cli.profile import profile
from pensieve.errors import PensieveError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="pensieve")
def cli() -> None:
    """Pensieve serves large language models to people in conversation, and remembers: the KV cache of a chat is kept between its turns."""


for _command in (chat, compare, models, profile):
    cli.add_command(_command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    run_command(cli, "pensieve", arguments)


def run_command(command: click.Command, name: str, arguments: list[str] | None = None) -> None:
    """Run a click command as a program; a `PensieveError` becomes one line on stderr and exit status 2."""
    try:
        command.main(arguments, prog_name=name, standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except PensieveError as error:
        click.echo(f"{name}: {error.code}: {error.message}", err=True)
        sys.exit(2)
