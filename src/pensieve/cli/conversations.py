"""`pensieve conversations`: show and change conversations of a running server.

Knows its HTTP API; never a store.
"""

from __future__ import annotations

import json
import time
from typing import Any
from urllib.parse import quote

import click

from pensieve.errors import ConfigError, ConversationNotFound, PensieveError

MIN_WIDTH = 150
_PLACES = {
    "g": "gpu",
    "b": "gpu+cpu",
    "c": "cpu",
    "d": "disk",
    ".": "dropped",
    "*": "computing",
    ">": "coming in",
}


class Client:
    """Calls a server's own API."""

    def __init__(self, url: str, key: str | None) -> None:
        try:
            import httpx
        except ImportError as error:
            raise ConfigError(
                "`pensieve conversations` needs httpx: pip install 'pensieve-serve[server]'"
            ) from error
        self._httpx = httpx
        self._url = url.rstrip("/")
        self._client = httpx.Client(headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=120.0)

    def call(self, method: str, path: str, **keywords: Any) -> dict[str, Any]:
        """One call and its JSON answer.

        Raises:
            ConfigError: no server answers at this address.
            ConversationNotFound, PensieveError: the server refused.
        """
        try:
            response = self._client.request(method, self._url + path, **keywords)
        except self._httpx.HTTPError as error:
            raise ConfigError(
                f"no server answers at {self._url} ({error}): "
                "start one with `pensieve serve`, or name another with --url"
            ) from error
        try:
            body: dict[str, Any] = response.json()
        except ValueError:
            raise PensieveError(
                f"{self._url} answered {response.status_code} and no JSON: is it a Pensieve server?"
            ) from None
        if response.is_success:
            return body
        error_body = body.get("error", {}) if isinstance(body, dict) else {}
        message = str(error_body.get("message", response.text[:200]))
        raise ConversationNotFound(message) if response.status_code == 404 else PensieveError(message)


@click.group()
@click.option(
    "--url", envvar="PENSIEVE_URL", default="http://127.0.0.1:8000", show_default=True, help="The server."
)
@click.option(
    "--api-key",
    envvar="PENSIEVE_API_KEY",
    default=None,
    help="A key, if the server wants one (or PENSIEVE_API_KEY).",
)
@click.pass_context
def conversations(context: click.Context, url: str, api_key: str | None) -> None:
    """Look at and act on the conversations of a running server."""
    context.obj = lambda: Client(url, api_key)


@conversations.command("list")
@click.option("--limit", type=click.IntRange(1, 500), default=50, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.pass_obj
def list_command(make: Any, limit: int, as_json: bool) -> None:
    """The conversations, the latest used first, and where their chunks are."""
    answer = make().call("GET", "/v1/pensieve/conversations", params={"limit": limit})
    if as_json:
        click.echo(json.dumps(answer["data"], indent=1))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("id", "title", "used", "pinned", "chunks", "resume"):
        table.add_column(
            name, no_wrap=name in ("id", "used"), justify="right" if name in ("resume",) else "left"
        )
    for one in answer["data"]:
        resume = "" if one["resume_ms"] is None else f"{one['resume_ms']:.0f} ms"
        table.add_row(
            one["id"],
            one["title"],
            _ago(one["updated_at"]),
            "pinned" if one["pinned"] else "",
            _places(one["cells"]),
            resume,
        )
    console = Console()
    if console.width < MIN_WIDTH:
        console = Console(
            width=MIN_WIDTH
        )  # a line that the terminal wraps reads better than a column of syllables
    console.print(table)
    click.echo(f"{len(answer['data'])} of {answer['total']}")


@conversations.command()
@click.argument("conversation_id")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.pass_obj
def show(make: Any, conversation_id: str, as_json: bool) -> None:
    """A conversation's messages, and where its chunks are."""
    one = make().call("GET", _path(conversation_id))
    if as_json:
        click.echo(json.dumps(one, indent=1))
        return
    click.secho(
        f"{one['id']}, last used {_ago(one['updated_at'])} ago; {_places(one['cells']) or 'nothing cached'}",
        fg="cyan",
    )
    for message in one["messages"]:
        click.echo(click.style(f"{message['role']}: ", bold=True) + message["content"])


@conversations.command()
@click.argument("conversation_id")
@click.pass_obj
def export(make: Any, conversation_id: str) -> None:
    """A conversation as a line of JSON, in the form that `compare --dataset` reads."""
    one = make().call("GET", _path(conversation_id))
    click.echo(json.dumps({"id": one["id"], "messages": one["messages"]}, ensure_ascii=False))


@conversations.command()
@click.argument("conversation_id")
@click.pass_obj
def pin(make: Any, conversation_id: str) -> None:
    """Never drop a conversation's cache."""
    answer = make().call("POST", _path(conversation_id, "pin"))
    click.echo(
        f"{conversation_id} is pinned"
        + (f": {answer['note']}" if answer.get("note") else f", {answer['chunks']} chunks")
    )


@conversations.command()
@click.argument("conversation_id")
@click.pass_obj
def unpin(make: Any, conversation_id: str) -> None:
    """Lift a pin."""
    make().call("POST", _path(conversation_id, "unpin"))
    click.echo(f"{conversation_id} is not pinned")


@conversations.command()
@click.argument("conversation_id")
@click.option(
    "--at", default=None, help="The turn or response after which the fork begins (default: the end)."
)
@click.pass_obj
def fork(make: Any, conversation_id: str, at: str | None) -> None:
    """Begin a conversation that shares this one's turns; prints its id."""
    click.echo(make().call("POST", _path(conversation_id, "fork"), json={"at": at})["id"])


@conversations.command()
@click.argument("conversation_id")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def delete(make: Any, conversation_id: str, yes: bool) -> None:
    """Delete a conversation and overwrite what it left."""
    client = make()
    client.call("GET", _path(conversation_id))  # before the user is asked to confirm
    if not yes:
        click.confirm(f"delete {conversation_id} for good?", abort=True)
    answer = client.call("DELETE", _path(conversation_id))
    click.echo(
        f"{conversation_id} is deleted: {answer['turns']} turns, {answer['store_bytes']:,} bytes of text and "
        f"tokens and {answer['kv_bytes']:,} bytes of KV overwritten"
        + ("" if answer["complete"] else "; the database's log could not be truncated yet")
    )


def _path(conversation_id: str, action: str = "") -> str:
    return f"/v1/pensieve/conversations/{quote(conversation_id, safe='')}" + (f"/{action}" if action else "")


def _ago(then_s: float) -> str:
    seconds = max(0.0, time.time() - then_s)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _places(cells: str) -> str:
    counts: dict[str, int] = {}
    for cell in cells:
        name = _PLACES.get(cell.lower(), "?")
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} {name}" for name, count in counts.items())
