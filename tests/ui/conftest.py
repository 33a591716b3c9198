"""A whole stack of a tiny model with its page, and a headless Chromium in front of it; skipped where there is none."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Error,
    Page,
    Playwright,
    ViewportSize,
    expect,
    sync_playwright,
)

from tests.running_predictor import RunningPredictor
from tests.running_store import wait_until
from tests.system.tiny_stack import TinyStack, pack_tiny_model, running_stack

DEADLINE_MS: Final = 30_000
LAPTOP: Final = ViewportSize(width=1280, height=800)
PHONE: Final = ViewportSize(width=390, height=844)


@dataclass
class Seen:
    """What happened in the browser that nobody wants.

    Attributes:
        errors: of scripts, and errors and warnings of the console.
        hosts: that were asked for something.
    """

    errors: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def watch(self, page: Page) -> None:
        """Notes what happens from now on."""
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.hosts.add("/".join(request.url.split("/")[:3])))

    def _note(self, message: ConsoleMessage) -> None:
        # The browser itself tells of every answer that is an error; the page shows those.
        is_answer = message.text.startswith("Failed to load resource")
        if message.type in ("error", "warning") and not is_answer:
            self.errors.append(message.text)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, as the system or Playwright has it."""
    expect.set_options(timeout=DEADLINE_MS)
    with sync_playwright() as playwright:
        browser = _launched(playwright)
        yield browser
        browser.close()


def _launched(playwright: Playwright) -> Browser:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name)) is not None), None)
    try:
        # The sandbox cannot be had as root, and the pages are our own.
        return playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
    except Error as error:
        reason = str(error).strip().splitlines()[0]
        pytest.skip(f"there is no Chromium that starts here ({reason}); install Debian's chromium")


@dataclass
class PageStack:
    """What stands behind the page."""

    stack: TinyStack
    predictor: RunningPredictor
    url: str


@pytest.fixture(scope="module")
def behind(browser: Browser, tmp_path_factory: pytest.TempPathFactory, module_socket_dir: Path) -> Iterator[PageStack]:
    """The three processes, the node with its HTTP API; the browser is there first, or nothing is started."""
    folder = module_socket_dir
    pack_dir = pack_tiny_model(tmp_path_factory.mktemp("paged"))
    registry = f"predictor.registry={folder / 'registry'}"
    settings = (f"compute.predictor_endpoint=unix:{folder / 'predictor.sock'}", "compute.http_listen=127.0.0.1:0")
    with running_stack(pack_dir, folder, *settings) as stack, RunningPredictor(pack_dir, folder, registry) as predictor:
        url = stack.node.http_url()
        wait_until(lambda: "Connected to the predictor" in stack.node.log.read_text(), log=stack.node.log)
        yield PageStack(stack, predictor, url)


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A browser that remembers nothing; nothing moves, as some people want it."""
    with browser.new_context(viewport=LAPTOP, reduced_motion="reduce") as context:
        yield context


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def page(context: BrowserContext, behind: PageStack, seen: Seen) -> Iterator[Page]:
    """The page, live; at the end nothing has gone wrong in it, and it has asked nobody but its node."""
    page = context.new_page()
    seen.watch(page)
    page.goto(behind.url)
    expect(page.locator("#node-state")).to_have_text("live")
    yield page
    assert seen.errors == []
    assert seen.hosts == {behind.url}
