"""What axe-core finds in the page: nothing, in both schemes, on a laptop and on a phone."""

from collections.abc import Iterator
from typing import Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.ui.conftest import LAPTOP, PHONE, PageStack

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def talked(browser: Browser, behind: PageStack) -> Iterator[Page]:
    """After a chat, with everything opened. The page's own policy would keep axe-core out."""
    with browser.new_context(bypass_csp=True, reduced_motion="reduce") as context:
        page = context.new_page()
        page.goto(behind.url)
        page.get_by_label("Message", exact=True).fill("Hello")
        page.get_by_text("Options").click()
        page.get_by_label("Max tokens").fill("8")
        page.get_by_label("Message", exact=True).press("Enter")
        expect(page.locator(".stats")).to_contain_text("tokens")
        page.get_by_text("As a table").click()
        yield page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", ["laptop", "phone: chat", "phone: system"])
def test_axe_finds_nothing(talked: Page, scheme: Literal["light", "dark"], view: str) -> None:
    talked.emulate_media(color_scheme=scheme)
    talked.set_viewport_size(LAPTOP if view == "laptop" else PHONE)
    if view != "laptop":
        talked.get_by_role("button", name=view.partition(": ")[2].title(), exact=True).click()
    found = Axe().run(talked)
    assert found.violations_count == 0, found.generate_report()


def test_everything_can_be_reached_with_the_keyboard_and_shows_that_it_is(talked: Page) -> None:
    talked.set_viewport_size(LAPTOP)
    talked.locator("body").press("Home")
    reached = set()
    for _ in range(60):
        talked.keyboard.press("Tab")
        focused = talked.evaluate(
            "[document.activeElement.id || document.activeElement.tagName,"
            " getComputedStyle(document.activeElement).outlineStyle]"
        )
        reached.add(focused[0])
        assert focused[1] != "none" or focused[0] == "BODY", focused
    scrolled = "[document.scrollingElement, document.body].map(element => element.scrollTop)"
    assert talked.evaluate(scrolled) == [0, 0], "the frame stays where it is"
    for name in ("theme-button", "new-chat", "prompt", "send", "map", "share", "why", "score"):
        assert name in reached, sorted(reached)
