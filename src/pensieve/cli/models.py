"""`pensieve models`: what can be loaded, and how to name it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from pensieve.machine import cache_folder
from pensieve.worker import conversions
from pensieve.worker.model_table import describe_models

if TYPE_CHECKING:
    from rich.console import Console

MIN_WIDTH = 130
_SHORT_HASH = 12  # digits that name a conversion well enough


@click.command()
@click.option("--cached", is_flag=True, help="List what was converted from GGUF files and lies in the cache.")
@click.option(
    "--remove",
    metavar="NAME|HASH|all",
    help="Remove conversions from the cache; what is used again is converted again.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def models(cached: bool, remove: str | None, as_json: bool) -> None:
    """List what --model takes: the embedded default, named architectures, hub ids, folders, GGUF files."""
    if remove is not None:
        _show_removed(remove, as_json)
        return
    if cached:
        _show_cached(as_json)
        return
    rows = describe_models()
    if as_json:
        _echo_json(rows)
        return
    from rich import box
    from rich.table import Table

    table = Table(title="What --model takes", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("name", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("weights\n(bf16)", justify="right", no_wrap=True)
    table.add_column("KV bytes\na token", justify="right", no_wrap=True)
    table.add_column("context", justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        if row.kind == "how-to":
            continue
        table.add_row(
            row.name,
            f"{row.num_parameters / 1e6:,.0f} M" if row.num_parameters else "",
            f"{row.weight_bytes / 1e9:.2f} GB" if row.weight_bytes else "",
            f"{row.kv_bytes_per_token:,}" if row.kv_bytes_per_token else "",
            f"{row.max_context:,}" if row.max_context else "",
            row.detail,
        )
    console = _console()
    console.print(table)
    for row in rows:
        if row.kind == "how-to":
            console.print(f"[bold]{row.name}[/bold]  {row.detail}", highlight=False)


def _show_cached(as_json: bool) -> None:
    found = conversions.converted()
    if as_json:
        _echo_json(found)
        return
    from rich import box
    from rich.table import Table

    place = cache_folder() / "converted"
    if not found:
        click.echo(f"Nothing converted lies in {place}.")
        return
    table = Table(title=f"Converted from GGUF files, in {place}", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("name", no_wrap=True)
    table.add_column("hash", no_wrap=True)
    table.add_column("on disk", justify="right", no_wrap=True)
    table.add_column("made", no_wrap=True)
    table.add_column("")
    notes = {
        "old format": "old format: not used any more",
        "damaged": "damaged: converted again when used",
        "unfinished": "unfinished",
    }
    for one in found:
        note = notes.get(one.state, one.state)
        table.add_row(
            one.name,
            one.sha256[:_SHORT_HASH],
            f"{one.num_bytes / 1e9:.2f} GB",
            one.changed[:16].replace("T", " "),
            note,
        )
    _console().print(table, highlight=False)
    total = sum(one.num_bytes for one in found)
    click.echo(f"{total / 1e9:.2f} GB together. `pensieve models --remove NAME`, HASH or all frees it.")


def _show_removed(which: str, as_json: bool) -> None:
    removed = conversions.remove(which)
    if as_json:
        _echo_json(removed)
        return
    for one in removed:
        click.echo(
            f"removed {one.name} ({one.sha256[:_SHORT_HASH]}, {one.state}): {one.num_bytes / 1e9:.2f} GB"
        )
    if not removed:
        click.echo("Nothing to remove.")


def _echo_json(rows: Sequence[Any]) -> None:
    import dataclasses
    import json

    click.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))


def _console() -> Console:
    from rich.console import Console

    console = Console()
    # A line that the terminal wraps reads better than a column of syllables.
    return console if console.width >= MIN_WIDTH else Console(width=MIN_WIDTH)
