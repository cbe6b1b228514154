"""The sockets and limits before the application, as `pensieve serve` sets them up."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner

from pensieve.cli import serve
from pensieve.cli.commands import cli
from pensieve.errors import ConfigError
from pensieve.server.listener import Listener
from pensieve.server.options import ServeOptions

DEFAULTS: dict[str, Any] = {"port": 0, "api_key_file": "keys", "max_open": 16}


def made(**options: Any) -> Listener:
    """A listener whose sockets are closed again."""
    listener = Listener(ServeOptions(**DEFAULTS | options))
    listener.close()
    return listener


def test_metrics_get_a_socket_of_their_own() -> None:
    alone, apart = made(), made(metrics_port=0)
    assert (
        len(alone.sockets) == 1
        and alone.rules.metrics_port is None
        and alone.metrics_url == f"{alone.url}/metrics"
    )
    assert (
        len(apart.sockets) == 2
        and apart.metrics_url
        == f"http://127.0.0.1:{apart.rules.metrics_port}/metrics"
        != f"{apart.url}/metrics"
    )
    assert apart.rules.metrics_hosts is not None and "localhost" in apart.rules.metrics_hosts
    assert (
        made(metrics_port=0, metrics_host="0.0.0.0").rules.metrics_hosts is None
    )  # an operator's network has names of its own


def test_what_is_open_is_said_at_the_start() -> None:
    assert "/metrics" in made().notes[0] and "--private" in made().notes[0]
    assert "/metrics" not in made(metrics_port=0).notes[0]
    assert made(private=True).notes == [] == made(api_key_file=None).notes


def test_names_and_limits() -> None:
    assert made().rules.hosts is None and made().rules.shared
    bare = made(api_key_file=None, host="LocalHost")
    assert bare.rules.hosts == frozenset(("localhost", "127.0.0.1", "[::1]")) and not bare.rules.shared
    assert made(origins=("https://App.Example/",)).rules.origins == {"https://app.example"}
    assert made().rules.total_bytes == 128 << 20 and made(max_bodies_mb=20.0).rules.total_bytes == 20 << 20
    for wrong in (
        {"max_bodies_mb": 1.0},
        {"private": True, "api_key_file": None},
        {"origins": ("*",)},
        {"host": "0.0.0.0", "api_key_file": None},
    ):
        with pytest.raises(ConfigError):
            made(**wrong)


def test_a_store_s_url_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(
        cli, ["serve", "--port", "0"], env={"PENSIEVE_STORE": "mysql://me:s3cret@db/x"}
    )
    assert (
        result.exception is not None
        and "sqlite:///" in str(result.exception)
        and "s3cret" not in str(result.exception)
    )
    url = "postgresql://me:s3cret@db/x"
    monkeypatch.setattr(sys, "argv", ["pensieve", "serve", "--store", url])
    assert "PENSIEVE_STORE" in str(serve.password_note(url)) and "s3cret" not in str(serve.password_note(url))
    assert serve.password_note("postgresql://me@db:5432/x") is None and serve.password_note(None) is None
    monkeypatch.setattr(sys, "argv", ["pensieve", "serve", f"--store={url}"])
    assert serve.password_note(url) is not None
    monkeypatch.setattr(sys, "argv", ["pensieve", "serve"])
    assert serve.password_note(url) is None


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
@pytest.mark.parametrize(("soft", "hard", "expected"), [(64, 512, 512), (200, 200, 200)])
def test_the_soft_limit_of_open_files_is_raised(soft: int, hard: int, expected: int) -> None:
    program = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        "from pensieve.server.listener import raise_file_limit\n"
        "assert raise_file_limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[0]\n"
        "print(raise_file_limit())"
    )
    assert (
        int(
            subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
        )
        == expected
    )


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
@pytest.mark.parametrize("files", [256])
def test_as_many_connections_as_fit_below_the_limit(files: int) -> None:
    program = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))\n"
        "from pensieve.server.listener import Listener, num_open_files\n"
        "from pensieve.server.options import ServeOptions\n"
        f"limits = Listener(ServeOptions(**{DEFAULTS!r})).limits()\n"
        "print(limits.max_connections, num_open_files())"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    assert files / 3 < int(said[0]) <= files - int(said[1]) - min(128, files // 4)
