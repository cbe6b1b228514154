"""`pensieve record`: the traffic of a running server as a trace. Chooses, wires, starts;
`workloads.recording` makes the lines.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import click

from pensieve.errors import ConfigError, PensieveError
from pensieve.workloads.recording import Recording

# a server that writes nothing for so long is gone: with nothing to tell it says so every 15 s
SILENT_S = 60.0


@click.command()
@click.option(
    "--url",
    envvar="PENSIEVE_URL",
    default="http://127.0.0.1:8000",
    show_default=True,
    help="The server, with or without /v1.",
)
@click.option(
    "--api-key",
    envvar="PENSIEVE_API_KEY",
    default=None,
    help="A key, if the server wants one (or PENSIEVE_API_KEY).",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    help="The file, which must not be there yet.  [default: stdout]",
)
@click.option(
    "--duration",
    "duration_s",
    type=click.FloatRange(min=0, min_open=True),
    default=None,
    help="Seconds.  [default: until Ctrl-C]",
)
def record(url: str, api_key: str | None, out: Path | None, duration_s: float | None) -> None:
    """Write a trace of a running server: lengths, times and salted hashes of each finished turn, no text.

    `pensieve bench --trace` plays it. With keys, the turns of the key's tenant are recorded.
    """
    import_httpx()
    with ExitStack() as stack:
        file = stack.enter_context(_create(out)) if out is not None else sys.stdout
        progress = _Progress()
        try:
            _write(_events(url, api_key, duration_s), file, progress)
        except KeyboardInterrupt:
            pass
        finally:
            click.echo(progress.words(), err=True)


def import_httpx() -> Any:
    """The HTTP client, if it is installed."""
    try:
        import httpx
    except ImportError as error:
        raise ConfigError("`pensieve record` needs httpx: pip install 'pensieve-serve[server]'") from error
    return httpx


class _Progress:
    """How much was written."""

    def __init__(self) -> None:
        self.recording: Recording | None = None
        self.lost = 0

    def words(self) -> str:
        turns, conversations = (
            (self.recording.num_turns, self.recording.num_conversations)
            if self.recording is not None
            else (0, 0)
        )
        lost = f"; {self.lost} turns were lost: they came faster than they were taken" if self.lost else ""
        return f"recorded {turns} turns of {conversations} conversations{lost}"


def _write(events: Iterable[tuple[str, dict[str, Any]]], file: TextIO, progress: _Progress) -> None:
    """A line a turn, each written at once.

    Raises:
        PensieveError: the events are not those of a recording, or end before its end.
    """
    for name, told in events:
        try:
            if name == "begin":
                progress.recording = Recording(told["block_tokens"])
            elif name == "turn" and progress.recording is not None:
                file.write(json.dumps(progress.recording.line(**told), separators=(",", ":")) + "\n")
                file.flush()
            elif name == "lost":
                progress.lost = told["turns"]
            elif name == "end":
                progress.lost = told["turns_lost"]
                return
        except (KeyError, TypeError) as error:
            raise PensieveError(
                f"the server tells {name!r} in a form that is not known here ({error!r}): are both of one "
                "version?"
            ) from error
    raise PensieveError("the server broke the recording off; what is written up to here is whole")


def _events(url: str, api_key: str | None, duration_s: float | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the server tells, as it comes."""
    httpx = import_httpx()
    root = url.strip().rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    parameters = {} if duration_s is None else {"duration_s": duration_s}
    try:
        with (
            httpx.Client(headers=headers, timeout=httpx.Timeout(10.0, read=SILENT_S)) as client,
            client.stream("GET", f"{root}/v1/pensieve/record", params=parameters) as response,
        ):
            if not response.is_success:
                raise PensieveError(_refusal(root, response.status_code, response.read()))
            name = ""
            for line in response.iter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    yield name, _json(line.removeprefix("data: "))
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeEncodeError) as error:
        raise PensieveError(
            f"{root} could not be recorded ({error or type(error).__name__}): is `pensieve serve` running "
            "there?"
        ) from error


def _json(text: str) -> dict[str, Any]:
    try:
        told = json.loads(text)
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise PensieveError(f"the server tells what is no JSON object: {text[:60]!r}")
    return told


def _refusal(root: str, status: int, body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{root} answered {status}: is it a Pensieve server that can be recorded?"


def _create(path: Path) -> TextIO:
    try:
        return path.open("x", encoding="utf-8")
    except FileExistsError:
        raise ConfigError(f"{path} is there already: name another file, or move it away") from None
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
