"""The commands of `pensieve`, in the order of its help."""

from __future__ import annotations

import click

from pensieve import __version__
from pensieve.cli.bench import bench
from pensieve.cli.chat import chat
from pensieve.cli.compare import compare
from pensieve.cli.conversations import conversations
from pensieve.cli.keys import keys
from pensieve.cli.models import models
from pensieve.cli.plan import plan
from pensieve.cli.profile import profile
from pensieve.cli.record import record
from pensieve.cli.serve import serve
from pensieve.cli.simulate import simulate


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="pensieve")
def cli() -> None:
    """Pensieve serves large language models and keeps the KV cache of each conversation between its turns."""


for _command in (serve, chat, conversations, keys, compare, bench, record, simulate, plan, models, profile):
    cli.add_command(_command)
