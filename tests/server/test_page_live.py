"""The page against the real HTTP server: chunks appear, move under pressure, and vanish."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from serving import Serving, serving
from test_page import (
    answered,
    artefacts,
    browser,
    browser_test,
    check_main_flow,
    delete_by_button,
    map_row,
    open_id,
    page,
    send,
    watch,
)

if TYPE_CHECKING:
    from playwright.sync_api import Page

__all__ = ["artefacts", "browser", "page", "watch"]  # fixtures


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Serving]:
    with serving(slots=getattr(request, "param", (64, 64))) as running:
        running.say("An answer of a few words, which is all that is said.")
        yield running


@browser_test
def test_the_main_flow(page: Page, server: Serving) -> None:
    check_main_flow(page, server.url)
    server.until_idle()


@browser_test
@pytest.mark.parametrize("server", [(48, 24)], indirect=True)
def test_chunks_appear_move_under_pressure_and_vanish(page: Page, server: Serving, artefacts: Path) -> None:
    page.goto(server.url)
    send(page, "the one that is watched")
    answered(page, 1)
    send(page, "a second turn of it")
    answered(page, 2)
    watched = open_id(page)
    page.locator(f'.map-row[data-id="{watched}"][aria-label*=" gpu"]').wait_for()
    page.screenshot(path=artefacts / "live-before.png")
    for number in range(5):
        server.ask(f"pressure from conversation number {number}, which has a few more words", n=24)
    moved = re.compile(r"[1-9]\d* (cpu|dropped)")
    page.locator(f'.map-row[data-id="{watched}"]').wait_for()
    deadline = 50
    while not moved.search(map_row(page, watched).get_attribute("aria-label") or "") and deadline:
        page.wait_for_timeout(200)
        deadline -= 1
    assert moved.search(map_row(page, watched).get_attribute("aria-label") or "")
    page.screenshot(path=artefacts / "live-under-pressure.png")
    delete_by_button(page, "#chat-actions")
    map_row(page, watched).wait_for(state="detached")
    assert server.client.get(f"/v1/pensieve/conversations/{watched}").status_code == 404
    page.screenshot(path=artefacts / "live-after.png")
    server.until_idle()
