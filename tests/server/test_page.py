"""The page as a person uses it, in a real browser.

Against the pretend server of `page_mock` by default; with PENSIEVE_PAGE_URL the main flow runs against any
server. Screenshots go to PENSIEVE_ARTEFACTS, or to pytest's temporary folder.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from page_mock import PageMock

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Locator, Page

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
STATIC = Path(__file__).parents[2] / "src/pensieve/server/static"
XSS = "<img src=x onerror=alert(1)><script>alert(2)</script> & \"quoted\" 'too'"

browser_test = pytest.mark.browser


@dataclass
class Watch:
    """Errors and foreign requests of a page."""

    expected_statuses: set[int] = field(default_factory=set)  # failures that a test provokes
    errors: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def on_console(self, message: ConsoleMessage) -> None:
        if message.type != "error" or "net::ERR_" in message.text:  # the server went first
            return
        status = re.match(
            r"Failed to load resource: the server responded with a status of (\d+)", message.text
        )
        if status is None or int(status[1]) not in self.expected_statuses:
            self.errors.append(message.text)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM}")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def page(browser: Browser, watch: Watch) -> Iterator[Page]:
    """A fresh page that may not complain, and may speak to one host only."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.on("console", watch.on_console)
    page.on("pageerror", lambda error: watch.errors.append(f"uncaught: {error}"))
    page.on("request", lambda request: watch.hosts.add(urllib.parse.urlsplit(request.url).netloc))
    yield page
    context.close()
    assert watch.errors == []
    assert len(watch.hosts) <= 1, watch.hosts


@pytest.fixture
def mock() -> Iterator[PageMock]:
    with PageMock() as mock:
        yield mock


@pytest.fixture
def page_url() -> Iterator[str]:
    """Where the page is: PENSIEVE_PAGE_URL, or an empty pretend server."""
    if url := os.environ.get("PENSIEVE_PAGE_URL"):
        yield url
        return
    with PageMock(num_conversations=0) as mock:
        yield mock.url


@pytest.fixture
def artefacts(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("PENSIEVE_ARTEFACTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# -- what a person does


def send(page: Page, words: str) -> None:
    page.get_by_label("Message", exact=True).fill(words)
    page.keyboard.press("Enter")


def answered(page: Page, num_turns: int, timeout_s: float = 10) -> Locator:
    """Wait until so many answers in this page have their receipts; the last answer."""
    page.locator(".receipt").nth(num_turns - 1).wait_for(timeout=1000 * timeout_s)
    return page.locator(".message.assistant").last


def map_row(page: Page, conversation_id: str) -> Locator:
    return page.locator(f'.map-row[data-id="{conversation_id}"]')


def open_from_list(page: Page, conversation_id: str) -> None:
    page.locator(f'a[href="#{conversation_id}"]').click()
    page.locator(f'a[href="#{conversation_id}"][aria-current="page"]').wait_for()


def open_id(page: Page) -> str:
    return urllib.parse.unquote(urllib.parse.urlsplit(page.url).fragment)


def wait_for(page: Page, expression: str, timeout_s: float = 10) -> None:
    """Until a JavaScript expression holds.

    (`wait_for_function` evaluates strings in the page, which its CSP forbids.)
    """
    deadline = time.monotonic() + timeout_s
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"not so after {timeout_s} s: {expression}"
        page.wait_for_timeout(20)


def wait_until(holds: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not so after {timeout_s} s"
        time.sleep(0.02)


def toast(page: Page, pattern: str) -> None:
    page.locator("#toast.shown", has_text=re.compile(pattern)).wait_for()


def delete_by_button(page: Page, bar: str) -> None:
    page.locator(bar).get_by_role("button", name="Delete").click()
    page.locator("#delete-dialog").get_by_role("button", name="Delete").click()
    toast(page, r"is deleted: [\d.]+ \w+ of cache and [\d.]+ \w+ of the store erased")


def check_main_flow(page: Page, url: str, timeout_s: float = 60) -> None:
    """Two turns, their chunks in the map, a reload, pin, fork, delete: against any server."""
    page.goto(url)
    page.locator('#status[data-state="connected"]').wait_for()
    send(page, "Name three rivers in Portugal.")
    assert answered(page, 1, timeout_s).locator(".words").inner_text().strip() != ""
    conversation_id = open_id(page)
    assert conversation_id != ""
    map_row(page, conversation_id).wait_for()
    send(page, "Which of them is the longest?")
    answer = answered(page, 2, timeout_s)
    assert "first token" in answer.locator(".numbers").inner_text()
    assert re.search(r"\d+ gpu", answer.locator(".numbers").inner_text()), (
        "the second turn finds the first one on the gpu"
    )
    summary = re.compile(r"[1-9]\d* chunks?: .*gpu")
    page.locator(f'.map-row[data-id="{conversation_id}"][aria-label*="gpu"]').wait_for()
    assert summary.search(map_row(page, conversation_id).get_attribute("aria-label") or "")
    words = page.locator(".message .words").all_inner_texts()

    page.reload()
    page.locator(".message").nth(3).wait_for()
    assert [" ".join(text.split()) for text in page.locator(".message .words").all_inner_texts()] == [
        " ".join(text.split()) for text in words
    ]
    assert open_id(page) == conversation_id

    chat_bar = page.locator("#chat-actions")
    chat_bar.get_by_role("button", name="Pin", exact=True).click()
    chat_bar.get_by_role("button", name="Unpin").wait_for()
    chat_bar.get_by_role("button", name="Unpin").click()
    chat_bar.get_by_role("button", name="Pin", exact=True).wait_for()
    chat_bar.get_by_role("button", name="Fork").click()
    wait_for(page, f"location.hash !== '#' + encodeURIComponent({json.dumps(conversation_id)})")
    page.locator(".message").nth(3).wait_for()
    fork_id = open_id(page)
    for gone in (fork_id, conversation_id):
        page.goto(f"{url}/#{urllib.parse.quote(gone)}")
        page.locator(".message").nth(3).wait_for()
        delete_by_button(page, "#chat-actions")
        wait_for(page, "location.hash === ''")
        map_row(page, gone).wait_for(state="detached")


# -- the tests


@browser_test
def test_main_flow(page: Page, page_url: str) -> None:
    check_main_flow(page, page_url)


@browser_test
def test_an_answer_streams_and_stops_at_escape(page: Page, mock: PageMock) -> None:
    mock.token_delay_s = 0.05
    mock.answer = lambda words: [f"w{i} " for i in range(2000)]
    page.goto(mock.url)
    send(page, "count")
    words = page.locator(".message.assistant .words")
    wait_for(page, "document.querySelector('.message.assistant .words')?.textContent.includes('w2 ')")
    before = words.inner_text()
    wait_for(page, f"document.querySelector('.message.assistant .words').textContent.length > {len(before)}")
    assert page.locator("#stop").is_visible() and page.locator("#send").is_hidden()
    page.keyboard.press("Escape")
    page.locator(".message.assistant", has_text="Stopped.").wait_for()
    assert page.locator("#send").is_visible()
    assert mock.disconnected.wait(5), "the server sees that the client has disconnected"


@browser_test
def test_shift_enter_makes_a_line_and_blank_messages_stay(page: Page, mock: PageMock) -> None:
    page.goto(mock.url)
    field_ = page.get_by_label("Message", exact=True)
    field_.fill("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert field_.input_value() == "one\ntwo"
    page.keyboard.press("Enter")
    answered(page, 1)
    field_.fill("   ")
    page.keyboard.press("Enter")
    assert [body["input"] for method, path, body in mock.requests if path == "/v1/responses"] == ["one\ntwo"]


@browser_test
def test_a_receipt_tells_sources_and_why_tokens_were_missing(page: Page, mock: PageMock) -> None:
    conversation = mock.world.conversations["conv_0005"]
    mock.world.conversations["conv_0000"].title = "Plan a party"
    conversation.tokens = 280
    conversation.cells = "...ccgggg"
    page.goto(f"{mock.url}/#conv_0005")
    page.locator('#status[data-state="connected"]').wait_for()
    map_row(page, "conv_0000").wait_for()
    page.get_by_label("Message", exact=True).fill("go on")
    wait_until(lambda: mock.count("POST", "/warm") == 1)
    conversation.cells = "...ccgggg"  # as if the hint had come too late
    page.keyboard.press("Enter")
    receipt = answered(page, 1).locator(".receipt")
    text = receipt.inner_text()
    for words in (
        "120 gpu",
        "64 cpu",
        "96 recomputed",
        "25 new",
        "tokens 0–96 were dropped 12 s ago to make room for “",
    ):
        assert words in text, text
    assert "tokens 96–160 had moved to a lower tier: swapped in" in text
    assert (
        receipt.get_by_role("img").get_attribute("aria-label")
        == "305 prompt tokens: 120 gpu, 64 cpu, 96 recomputed, 25 new"
    )
    widths = receipt.locator(".stack .part").evaluate_all(
        "parts => parts.map(p => p.getBoundingClientRect().width)"
    )
    assert widths[0] > widths[2] > widths[1] > widths[3]
    receipt.get_by_text("all 3 reasons").click()
    assert "tokens 280–305 are new" in receipt.inner_text()


@browser_test
def test_typing_warms_once_a_pause_where_chunks_are_away(page: Page, mock: PageMock) -> None:
    mock.world.conversations["conv_0004"].cells = "gbGB*"
    mock.world.conversations["conv_0005"].cells = "ccggg"
    page.goto(f"{mock.url}/#conv_0004")
    map_row(page, "conv_0005").wait_for()
    field_ = page.get_by_label("Message", exact=True)
    field_.press_sequentially("all here")
    open_from_list(page, "conv_0005")
    field_.press_sequentially("not all here")
    wait_for(page, "document.activeElement.value === 'not all here'")
    page.wait_for_timeout(200)
    warmed = [path for method, path, _ in mock.requests if path.endswith("/warm")]
    assert warmed == ["/v1/pensieve/conversations/conv_0005/warm"]
    open_from_list(page, "conv_0004")
    assert field_.input_value() == "all here", "each conversation keeps its draft"
    assert mock.count("POST", "/idle") == 0, "leaving is not a reason to evict"


@browser_test
def test_the_keyboard_alone_does_everything(page: Page, mock: PageMock) -> None:
    mock.world.conversations["conv_0006"].last_active_s = 4e9  # in the first row for good
    mock.world.conversations["conv_0006"].active = True
    title = mock.world.conversations["conv_0006"].title
    page.goto(mock.url)
    row = map_row(page, "conv_0006")
    row.wait_for()
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('map-row')"):
            break
    assert page.evaluate("document.activeElement.dataset.id") == "conv_0006", (
        "the map is one stop for Tab, at its first row"
    )
    outline = row.evaluate("element => getComputedStyle(element).outlineStyle")
    assert outline != "none", "focus shows"
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.getAttribute('aria-rowindex')") == "2"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    assert re.search(r"chunk 1 of \d+, tokens 0–32: ", page.locator("#cell-words").text_content() or "")
    assert page.locator("#tooltip").is_visible()
    page.keyboard.press("p")
    toast(page, "is pinned")
    page.keyboard.press("p")
    toast(page, "no longer pinned")
    page.keyboard.press("w")
    toast(page, "on the way to the gpu|nothing to bring in")
    page.keyboard.press("i")
    toast(page, "is idle")
    page.keyboard.press("f")
    toast(page, "was forked")
    wait_for(page, "location.hash.startsWith('#conv_new')")
    assert page.evaluate("document.activeElement.dataset.id") == "conv_0006", (
        "focus stays with its conversation"
    )
    page.keyboard.press("Delete")
    page.locator("#delete-dialog").wait_for()
    assert title in page.locator("#delete-dialog").inner_text()
    page.keyboard.press("Escape")
    page.locator("#delete-dialog").wait_for(state="hidden")
    assert mock.count("DELETE", "conv_0006") == 0
    page.keyboard.press("Delete")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    toast(page, r"is deleted: .* erased")
    row.wait_for(state="detached")
    assert mock.count("DELETE", "conv_0006") == 1
    assert page.evaluate("document.activeElement.getAttribute('aria-rowindex')") == "1", (
        "focus goes to the row that took its place"
    )


@browser_test
def test_an_answer_to_one_question_is_not_taken_for_another(page: Page, page_url: str) -> None:
    """A dialog tells of its closing a moment later; by then it may ask about another conversation."""
    page.goto(page_url)
    answers = page.evaluate(
        """async () => {
            const { askToDelete } = await import("./static/dialogs.js");
            const dialog = document.getElementById("delete-dialog");
            const refused = askToDelete("one", "");
            dialog.close("cancel");
            const agreed = askToDelete("two", "");
            await new Promise((done) => setTimeout(done, 100));
            const open = dialog.open;
            dialog.close("ok");
            return [await refused, open, await agreed];
        }"""
    )
    assert answers == [False, True, True]


@browser_test
def test_a_refused_action_says_why_beside_its_buttons(page: Page, mock: PageMock, watch: Watch) -> None:
    watch.expected_statuses.add(409)
    mock.world.conversations["conv_0004"].title = "cannot be pinned"
    page.goto(f"{mock.url}/#conv_0004")
    map_row(page, "conv_0004").wait_for()
    page.locator("#inspector").get_by_role("button", name="Pin").click()
    page.locator("#inspector .error", has_text="unpin another conversation first").wait_for()


@browser_test
def test_a_busy_server_is_asked_again(page: Page, mock: PageMock, watch: Watch) -> None:
    watch.expected_statuses.add(429)
    mock.busy_answers = 1
    page.goto(mock.url)
    send(page, "hello")
    page.get_by_text("busy, trying again in 1 s").wait_for()
    assert "you said hello" in answered(page, 1).locator(".words").inner_text()
    assert page.get_by_text("busy, trying again").count() == 0


@browser_test
def test_a_failed_answer_says_so_and_can_be_sent_again(page: Page, mock: PageMock) -> None:
    mock.answer = lambda words: ["half an ", "<fail>"]
    page.goto(mock.url)
    send(page, "hello")
    failed = page.locator(".message.assistant", has_text="the forward pass failed")
    failed.wait_for()
    mock.answer = lambda words: ["whole"]
    failed.get_by_role("button", name="Try again").click()
    assert answered(page, 1).locator(".words").inner_text() == "whole"
    assert page.locator(".message").count() == 2


@browser_test
def test_a_key_is_asked_for_and_kept_for_the_tab(page: Page, watch: Watch) -> None:
    watch.expected_statuses.add(401)
    with PageMock(keys=("right",)) as mock:
        page.goto(mock.url)
        dialog = page.locator("#key-dialog")
        dialog.wait_for()
        page.keyboard.press("Escape")
        page.locator("#status", has_text="API key needed").wait_for()
        asked = mock.count("GET", "/map")
        wait_until(lambda: mock.count("GET", "/map") > asked)
        assert dialog.is_hidden(), "not now means not at the next poll either"
        page.get_by_role("button", name="Enter API key").click()
        dialog.get_by_label("Key", exact=True).fill("wrong")
        page.keyboard.press("Enter")
        dialog.get_by_text("did not accept").wait_for()
        dialog.get_by_label("Key", exact=True).fill("right")
        page.keyboard.press("Enter")
        page.locator('#status[data-state="connected"]').wait_for()
        send(page, "hello")
        answered(page, 1)
        page.reload()
        page.locator(".message").first.wait_for()
        assert dialog.is_hidden()
        assert page.evaluate(
            "[sessionStorage.getItem('pensieve.key'), Object.values(localStorage).includes('right')]"
        ) == ["right", False]


@browser_test
def test_a_restart_and_an_outage_are_told_and_waited_for(page: Page, watch: Watch) -> None:
    watch.expected_statuses.add(503)
    with PageMock() as mock:
        page.goto(mock.url)
        page.locator('#status[data-state="connected"]').wait_for()
        mock.restarting = True
        page.locator("#status", has_text="engine restarting").wait_for()
        mock.restarting = False
        page.locator('#status[data-state="connected"]').wait_for()
        port = mock.http.server_address[1]
    page.locator("#status", has_text="server unreachable, trying again").wait_for()
    with PageMock(port=port):
        page.locator('#status[data-state="connected"]').wait_for()


@browser_test
def test_what_others_wrote_is_shown_literally(page: Page, mock: PageMock) -> None:
    dialogs: list[str] = []

    def dismiss(dialog: Any) -> None:
        dialogs.append(dialog.message)
        dialog.dismiss()

    page.on("dialog", dismiss)
    conversation = mock.world.conversations["conv_0003"]
    conversation.title = XSS
    conversation.messages = [{"role": "user", "content": XSS}, {"role": XSS, "content": XSS}]
    mock.answer = lambda words: list(XSS)
    page.goto(f"{mock.url}/#conv_0003")
    map_row(page, "conv_0003").wait_for()
    send(page, XSS)
    assert answered(page, 1).locator(".words").inner_text() == XSS
    assert page.locator(".message .words").all_inner_texts() == [XSS] * 4
    assert page.locator("#chat-title").inner_text() == XSS
    assert page.locator('a[href="#conv_0003"] .title').text_content() == XSS
    assert (map_row(page, "conv_0003").get_attribute("aria-label") or "").startswith(XSS)
    map_row(page, "conv_0003").hover()
    assert XSS in page.locator("#tooltip").inner_text()
    assert page.evaluate("document.querySelectorAll('img[src=x], body script').length") == 0
    assert dialogs == []


@browser_test
def test_a_thousand_rows_scroll_with_few_of_them_drawn(page: Page, artefacts: Path) -> None:
    with PageMock(num_conversations=1000, max_chunks=250) as mock:
        mock.world.moving = True
        page.goto(mock.url)
        page.get_by_role("button", name="Map", exact=True).click()
        page.locator(".map-row").first.wait_for()
        grid = page.locator("#map")
        assert grid.get_attribute("aria-rowcount") == "1000"
        assert re.search(
            r": \d+ chunks?: \d+ ", page.locator(".map-row").first.get_attribute("aria-label") or ""
        )
        page.screenshot(path=artefacts / "map-1000.png")
        for density, row_px in (("roomy", 26), ("dense", 6)):
            page.get_by_label("Rows").select_option(density)
            for share in (0.5, 1, 0.1):
                grid.evaluate("(grid, share) => { grid.scrollTop = share * grid.scrollHeight; }", share)
                middle = 1 + int(grid.evaluate("grid => grid.scrollTop + grid.clientHeight / 2") / row_px)
                page.locator(f'.map-row[aria-rowindex="{middle}"]').wait_for()
                in_sight = grid.evaluate("grid => grid.clientHeight") / row_px
                bound = in_sight + 2 * 240 / row_px + 4
                assert page.locator(".map-row").count() <= bound
                assert int(page.locator("#map-canvas").get_attribute("data-rows") or "0") <= bound
            page.screenshot(path=artefacts / f"map-1000-{density}.png")
        assert page.locator(".map-row").first.is_visible()
        grid.evaluate("grid => { grid.scrollTop = 0; }")
        page.locator('.map-row[aria-rowindex="1"]').click()
        page.keyboard.press("Control+End")
        wait_for(page, "document.activeElement.getAttribute('aria-rowindex') === '1000'")


@browser_test
def test_cells_are_painted_where_the_map_says(page: Page, mock: PageMock) -> None:
    mock.world.conversations["conv_0004"].cells = "gggg....cccc"
    page.goto(f"{mock.url}/#conv_0004")
    map_row(page, "conv_0004").wait_for()
    page.wait_for_timeout(300)
    colours = page.evaluate(
        """() => {
          const canvas = document.getElementById('map-canvas'), row = document.querySelector('.map-row[data-id=conv_0004]');
          const y = row.getBoundingClientRect().top - canvas.getBoundingClientRect().top + 32;
          const at = (cell) => Array.from(canvas.getContext('2d').getImageData(12 + 10 * cell + 4, y, 1, 1).data);
          return [at(1), at(5), at(9)];
        }"""
    )
    assert colours[0] == [0, 114, 178, 255], "gpu blue"
    assert colours[1][3] == 0, "a dropped chunk leaves its cell empty"
    assert colours[2][3] == 255 and colours[2] != colours[0]
    for cell, words in ((1, "on gpu"), (5, "dropped, to be computed again"), (9, "in cpu memory")):
        map_row(page, "conv_0004").hover(position={"x": 12 + 10 * cell + 4, "y": 32})
        assert (
            page.locator("#tooltip")
            .inner_text()
            .endswith(f"chunk {cell + 1} of 12, tokens {32 * cell}–{32 * cell + 32}: {words}")
        )


@browser_test
def test_light_dark_and_all_widths(page: Page, mock: PageMock, artefacts: Path) -> None:
    page.goto(f"{mock.url}/#conv_0003")
    map_row(page, "conv_0003").wait_for()
    background = "getComputedStyle(document.body.querySelector('.chat')).backgroundColor"
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(background)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(background)
    assert dark != light
    theme = page.locator("#theme")
    theme.click()
    theme.click()
    assert "dark" in (theme.get_attribute("aria-label") or "") and page.evaluate(background) == dark
    page.reload()
    assert page.evaluate(background) == dark, "the choice is kept"
    map_row(page, "conv_0003").wait_for()
    for width, height in ((360, 640), (390, 844), (768, 1024), (1440, 900), (2560, 1300)):
        page.set_viewport_size({"width": width, "height": height})
        for view in ("Chat", "Map", *(["List"] if width <= 720 else [])):
            page.get_by_role("button", name=view, exact=True).click()
            overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert overflow <= 0, f"{view} at {width} px is {overflow} px too wide"
            page.screenshot(path=artefacts / f"{view.lower()}-{width}.png")
    page.get_by_role("button", name="Chat", exact=True).click()


@browser_test
def test_every_control_has_a_name(page: Page, mock: PageMock) -> None:
    page.goto(f"{mock.url}/#conv_0003")
    map_row(page, "conv_0003").wait_for()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, select, input, textarea, a, [role=grid], [role=row], [role=meter], dialog, nav, main, aside')]
          .filter((e) => !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.labels?.length || e.textContent.trim()))
          .map((e) => e.outerHTML.slice(0, 100))"""
    )
    assert nameless == []


def test_the_page_needs_nothing_from_elsewhere() -> None:
    """Also without a browser: no other host, no inline script or style, nothing that parses text as markup."""
    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//cdn|@import", text), file.name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setAttribute\(.style",
            text,
        ), file.name
    html = (STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    for name in re.findall(r'(?:src|href)="(static/[^"]+)"', html):
        assert (STATIC.parent / name).is_file(), name
    for file in STATIC.glob("*.js"):
        for name in re.findall(r'from "\./([^"]+)"', file.read_text(encoding="utf-8")):
            assert (STATIC / name).is_file(), f"{file.name} imports {name}"


# -- the dashboard

METRICS = {
    *(
        "pensieve_tokens_total",
        "pensieve_bytes_total",
        "pensieve_tier_slots",
        "pensieve_evictions_total",
        "pensieve_engine_requests",
    ),
    *(
        "pensieve_requests_total",
        "pensieve_engine_restarts_total",
        "pensieve_suspensions_total",
        "pensieve_conversations",
    ),
    *("pensieve_streams", "process_resident_memory_bytes"),
}
HISTOGRAMS = {
    "pensieve_time_to_first_token_seconds",
    "pensieve_time_per_output_token_seconds",
    "pensieve_queue_seconds",
}
DASHBOARD = STATIC.parent / "grafana/pensieve.json"


def metrics_in(text: str) -> set[str]:
    return set(re.findall(r"\b(?:pensieve|process)_[a-z_]+", text))


def test_the_dashboard_names_exported_metrics_only() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    exported = METRICS | {f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")}
    named = set()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            metrics = metrics_in(target["expr"])
            assert metrics, f"{panel['title']}: no metric in {target['expr']}"
            assert metrics <= exported, f"{panel['title']}: {metrics - exported}"
            named |= metrics
    for variable in dashboard["templating"]["list"]:
        assert metrics_in(json.dumps(variable.get("query", ""))) <= exported
    assert exported <= named, f"nothing shows {exported - named}"


def test_every_panel_has_a_title_a_unit_a_description_and_a_place_of_its_own() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert dashboard["schemaVersion"] >= 39
    assert [v["name"] for v in dashboard["templating"]["list"] if v["type"] == "datasource"] == ["datasource"]
    taken: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    for panel in dashboard["panels"]:
        assert panel["title"]
        place = panel["gridPos"]
        squares = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert not squares & taken, f"{panel['title']} lies on another panel"
        assert place["x"] + place["w"] <= 24
        taken |= squares
        if panel["type"] == "row":
            continue
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert target["expr"].count("(") == target["expr"].count(")") and target["expr"].count(
                "{"
            ) == target["expr"].count("}")
