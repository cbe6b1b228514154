"""`pensieve models`: what can be loaded, and how to name it."""

from __future__ import annotations

import click

from pensieve.worker.weights import describe_models

MIN_WIDTH = 130


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def models(as_json: bool) -> None:
    """List what --model takes: the embedded default, named architectures, hub ids, folders, GGUF files."""
    rows = describe_models()
    if as_json:
        import dataclasses
        import json

        click.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
        return
    from rich import box
    from rich.console import Console
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
    console = Console()
    if console.width < MIN_WIDTH:
        console = Console(width=MIN_WIDTH)  # a line that the terminal wraps reads better than a column of syllables
    console.print(table)
    for row in rows:
        if row.kind == "how-to":
            console.print(f"[bold]{row.name}[/bold]  {row.detail}", highlight=False)
