"""No key and no password in a line of the log, in an error, or on a page."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from raw import exchange
from serving import serving

from pensieve.cli import run_command
from pensieve.errors import StoreError
from pensieve.server.keys import PREFIX, key_line
from pensieve.server.redaction import RedactingFormatter, redacted

KEY = (
    PREFIX + "0123456789abcdefghijKLMNOPQRSTUVWXYZ_-01234"
)  # as `new_key` makes them; the same in each process that shares the tests


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"GET /v1/models?api_key={KEY}", "GET /v1/models?api_key=[hidden]"),
        (f"Authorization: Bearer {KEY}", "Authorization: Bearer [hidden]"),
        ("authorization: bearer sk-other.key/1=", "authorization: bearer [hidden]"),
        ("postgresql://me:s3cr:t@db:5432/x", "postgresql://me:[hidden]@db:5432/x"),
        ("postgresql://me:p@ss@db/x", "postgresql://me:[hidden]@db/x"),
        ("host=db password=s3cret user=me", "host=db password=[hidden] user=me"),
        ("host=db password='with blanks' user=me", "host=db password=[hidden] user=me"),
        ("postgresql://db/x?password=s3cret&user=me", "postgresql://db/x?password=[hidden]&user=me"),
        (
            "postgresql://me@db:5432/x, http://[::1]:8000/a@b",
            "postgresql://me@db:5432/x, http://[::1]:8000/a@b",
        ),
        (
            "a bearer of news, and pk-ix",
            "a bearer [hidden] news, and pk-ix",
        ),  # (too much rather than too little)
    ],
)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    assert redacted(text) == shown


def test_tracebacks_are_redacted_too() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(RedactingFormatter("%(message)s"))
    logger = logging.Logger("apart")
    logger.addHandler(handler)
    try:
        raise ValueError(f"with {KEY}")
    except ValueError:
        logger.exception("failed at %s", "postgresql://me:s3cret@db/x")
    assert (
        KEY not in stream.getvalue()
        and "s3cret" not in stream.getvalue()
        and "ValueError" in stream.getvalue()
    )


def test_the_access_log_has_no_query_and_one_line_a_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    path.write_text(key_line("alice", KEY) + "\n")
    caplog.set_level(logging.INFO)
    with serving(keys=path, key=KEY, rules={"access_log": True}) as server:
        server.client.get("/v1/models", params={"api_key": KEY})
        server.client.get(f"/v1/models/{KEY}")
        server.client.get("/nothing%0a2026-01-01 INFO forged line")
        server.client.post(
            "/v1/chat/completions", content=b"x" * 100, headers={"Content-Type": f"text/{KEY}"}
        )
        exchange(
            server,
            b"GET /v1/models?api_key=" + KEY.encode() + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        )
        exchange(server, b"BREW /?api_key=" + KEY.encode() + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    lines = [
        record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))
    ]
    assert not [line for line in lines if KEY in line or "api_key" in line or "\n" in line]
    access = [record.getMessage() for record in caplog.records if record.name == "pensieve.access"]
    assert len(access) == 5 and '"GET /v1/models" 200' in access[0] and '"GET /v1/models" 401' in access[4]
    assert (
        "/v1/models/[hidden]" in access[1]
        and "/nothing%0A2026" in access[2]
        and access[0].startswith("127.0.0.1:")
    )


def test_errors_of_commands_hide_passwords(capsys: pytest.CaptureFixture[str]) -> None:
    import click

    @click.command()
    def failing() -> None:
        raise StoreError("postgresql://me:s3cret@db/x cannot be reached")

    with pytest.raises(SystemExit):
        run_command(failing, "pensieve", [])
    said = capsys.readouterr().err
    assert "s3cret" not in said and "postgresql://me:[hidden]@db/x" in said
