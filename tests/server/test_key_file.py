"""A key file that changes, breaks or disappears while the server runs: which keys stay valid, what is logged."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from raw import until
from serving import Serving, serving

from pensieve.cli.commands import cli
from pensieve.errors import PensieveError
from pensieve.server import keys as key_module
from pensieve.server.keys import SETTLE_S, TELL_S, KeyFile, key_line, new_key

ALICE, BOB = new_key(), new_key()
BOTH = key_line("alice", ALICE) + "\n" + key_line("bob", BOB) + "\n"


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(BOTH)
    path.chmod(0o600)
    return path


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.ERROR and record.name == key_module.__name__
    ]


def garble(path: Path) -> None:
    path.write_text(BOTH + "carol sha256:abc\n")


def put_a_folder_there(path: Path) -> None:
    path.unlink()
    path.mkdir()


def no_utf8(path: Path) -> None:
    path.write_bytes(b"\xff\xfe" + BOTH.encode())


BREAKAGES: tuple[Callable[[Path], object], ...] = (
    garble,
    put_a_folder_there,
    no_utf8,
    Path.unlink,
    lambda path: path.write_text("half a li"),
)


@pytest.mark.parametrize("break_it", BREAKAGES)
def test_a_broken_file_locks_no_client_out_and_is_said(
    path: Path, break_it: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    keys = KeyFile(path, clock=clock)
    assert keys.trouble() is None
    break_it(path)
    for clock.now_s in (0.0, 1.0, SETTLE_S + 1, TELL_S - 1):
        assert keys.tenant(ALICE) == "alice" and keys.tenant(new_key()) is None
    told = keys.trouble()
    assert (
        told is not None
        and "keys of before are valid" in told
        and str(path) not in told
        and ALICE not in told
    )
    assert len(errors(caplog)) == 1 and str(path) in errors(caplog)[0]  # once, however often it was asked for
    clock.now_s = TELL_S + 1
    keys.trouble()
    assert len(errors(caplog)) == 2  # and every minute
    if path.is_dir():
        path.rmdir()
    path.write_text(key_line("bob", BOB) + "\n")
    assert keys.tenant(ALICE) is None and keys.tenant(BOB) == "bob" and keys.trouble() is None


@pytest.mark.parametrize("text", ["", "\n\n", "# no key any more\n"])
def test_a_file_that_was_emptied_refuses_every_key_in_the_end(
    path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    keys = KeyFile(path, clock=clock)
    path.write_text(text)
    assert keys.tenant(ALICE) == "alice"  # it may be written just now
    clock.now_s = SETTLE_S + 0.1
    assert keys.tenant(ALICE) is None and keys.tenant(BOB) is None
    assert "every key is refused" in str(keys.trouble()) and any(
        "every key is refused" in line for line in errors(caplog)
    )
    path.write_text(BOTH)
    assert keys.tenant(ALICE) == "alice" and keys.trouble() is None


def test_a_file_that_is_written_in_two_steps_refuses_none(path: Path) -> None:
    clock = Clock()
    keys = KeyFile(path, clock=clock)
    for number in range(20):
        path.write_text("")
        assert keys.tenant(BOB) == "bob"
        clock.now_s += SETTLE_S / 2
        path.write_text(BOTH if number % 2 else "# new\n" + BOTH)
        assert keys.tenant(BOB) == "bob"
        clock.now_s += SETTLE_S / 2


def test_a_removed_key_stops_at_once(path: Path) -> None:
    keys = KeyFile(path)
    path.write_text(key_line("bob", BOB) + "\n")
    assert keys.tenant(ALICE) is None and keys.tenants == {"bob"}
    replaced = path.with_suffix(".new")
    replaced.write_text(key_line("alice", ALICE) + "\n")
    os.replace(replaced, path)
    assert keys.tenant(ALICE) == "alice" and keys.tenant(BOB) is None


def metric(server: Serving) -> float:
    line = next(
        line
        for line in server.client.get("/metrics").text.splitlines()
        if line.startswith("pensieve_key_file_error ")
    )
    return float(line.split()[1])


def test_ready_and_a_metric_tell_of_it_and_so_does_the_log_unasked(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(key_module, "WATCH_S", 0.05)
    with serving(keys=path, key=ALICE) as server:
        assert server.client.get("/ready").status_code == 200 and metric(server) == 0
        path.unlink()
        until(lambda: errors(caplog))  # before any client asked
        ready = server.client.get("/ready")
        assert (
            ready.status_code == 503
            and "API key file" in ready.json()["troubles"]["keys"]
            and str(path) not in ready.text
        )
        assert metric(server) == 1
        assert server.client.get("/v1/models").status_code == 200
        path.write_text(BOTH)
        assert server.client.get("/ready").status_code == 200 and metric(server) == 0


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_files_that_others_can_read_are_said_and_closed(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    KeyFile(path)
    assert not [record for record in caplog.records if "chmod 600" in record.getMessage()]
    path.chmod(0o644)
    KeyFile(path)
    assert [
        record
        for record in caplog.records
        if "mode 644" in record.getMessage() and "chmod 600" in record.getMessage()
    ]
    added = CliRunner().invoke(cli, ["keys", "add", "carol", "--file", str(path)])
    assert added.exit_code == 0 and "644" in added.stderr and path.stat().st_mode & 0o777 == 0o600
    key = added.stdout.strip()
    assert KeyFile(path).tenant(key) == "carol" and KeyFile(path).tenant(ALICE) == "alice"


def test_a_key_is_not_added_to_the_end_of_another_s_line(path: Path) -> None:
    path.write_text(BOTH.rstrip("\n"))
    key = CliRunner().invoke(cli, ["keys", "add", "carol", "--file", str(path)]).stdout.strip()
    assert {KeyFile(path).tenant(one) for one in (ALICE, BOB, key)} == {"alice", "bob", "carol"}
    nowhere = CliRunner().invoke(cli, ["keys", "add", "carol", "--file", str(path / "below")])
    assert isinstance(nowhere.exception, PensieveError) and "cannot be written" in nowhere.exception.message
