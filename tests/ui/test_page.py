"""The page in a real browser, before real processes: a chat, a swap, a cancelled request, a dead predictor."""

import re
from pathlib import Path
from typing import Final

import pytest
from playwright.sync_api import BrowserContext, Page, Route, expect

from tests.compute_node.tiny_serving import load_tokenizer
from tests.http_node import ScriptEngine, http_node
from tests.ui.conftest import PHONE, PageStack, Seen

pytestmark = pytest.mark.browser

MORE_THAN_TOKENS = re.compile(r"TTFT .*TPOT .*\d+ tokens")


def send(page: Page, text: str, max_tokens: int = 12) -> None:
    """Asks, and does not wait."""
    page.get_by_text("Options").click()
    page.get_by_label("Max tokens").fill(str(max_tokens))
    page.get_by_text("Options").click()
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answers(page: Page) -> "list[str]":
    """The texts so far."""
    return page.locator(".message[data-role=assistant] .text").all_inner_texts()


def test_a_chat_streams_and_is_kept(page: Page) -> None:
    send(page, "Hello <b>there</b>")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.locator(".message[data-role=user]")).to_contain_text("Hello <b>there</b>")
    expect(page.locator(".stats")).to_have_text(MORE_THAN_TOKENS)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.locator("#announcer")).to_contain_text("The answer has ended")
    first = answers(page)
    page.reload()
    expect(page.locator(".stats")).to_have_text(MORE_THAN_TOKENS)
    assert answers(page) == first
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".message")).to_have_count(0)
    expect(page.get_by_label("Message", exact=True)).to_be_focused()


def test_escape_stops_an_answer_and_the_node_hears_of_it(page: Page) -> None:
    send(page, "Go on for long", max_tokens=200)
    row = page.locator("#requests tbody tr")
    expect(row).to_have_count(1)
    expect(row).to_contain_text("running")
    page.keyboard.press("Escape")
    expect(page.locator(".stats")).to_contain_text("stopped")
    expect(row).to_have_count(0)


def test_a_request_is_cancelled_from_the_list(page: Page) -> None:
    send(page, "Go on for long", max_tokens=200)
    page.get_by_role("button", name="Cancel request").click()
    expect(page.locator("#requests-result")).to_contain_text("is cancelled")
    expect(page.locator(".stats")).to_contain_text("cancelled")
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_the_map_is_drawn_told_and_listed(page: Page) -> None:
    send(page, "Hello")
    heat_map = page.get_by_role("img", name=re.compile(r"Heat map of \d+ layers × \d+ experts: .*\d+ resident"))
    expect(heat_map).to_be_visible()
    heat_map.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#cell")).to_have_text(re.compile(r"L0E1: \w+"))
    page.get_by_text("As a table").click()
    expect(page.get_by_role("region", name="Experts by layer").get_by_role("row")).not_to_have_count(0)
    expect(page.locator(".figure").first).to_contain_text(re.compile(r"Hit rate\d+\.\d"))


def test_the_colours_can_be_chosen_and_are_kept(page: Page) -> None:
    body = page.locator("body")
    page.emulate_media(color_scheme="dark")
    dark = body.evaluate("body => getComputedStyle(body).backgroundColor")
    button = page.get_by_role("button", name="Colours")
    button.click()
    expect(button).to_have_accessible_name("Colours: light")
    assert body.evaluate("body => getComputedStyle(body).backgroundColor") != dark
    page.reload()
    expect(button).to_have_accessible_name("Colours: light")


def test_what_a_model_writes_never_becomes_markup(page: Page) -> None:
    text = "# Title\n\n- **bold** and `code`\n1. <img src=x onerror=alert(1)>\n\n```\n<script>alert(1)</script>\n```"
    kept = [{"role": "assistant", "content": text, "stats": ["1 token"]}]
    page.evaluate("kept => sessionStorage.setItem('promoe.chat', JSON.stringify(kept))", kept)
    page.reload()
    answer = page.locator(".message[data-role=assistant] .text")
    expect(answer.locator("h3")).to_have_text("Title")
    expect(answer.locator("ul strong")).to_have_text("bold")
    expect(answer.locator("ol li")).to_have_text("<img src=x onerror=alert(1)>")
    expect(answer.locator("pre")).to_have_text("<script>alert(1)</script>")
    expect(answer.locator("img, script")).to_have_count(0)


def test_a_guarded_node_asks_for_its_key(context: BrowserContext, seen: Seen, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path)
    with http_node(ScriptEngine(tokenizer, "hello"), tokenizer, keys=("a-secret-key",)) as node:
        page = context.new_page()
        seen.watch(page)
        page.goto(node.url)
        dialog = page.get_by_role("dialog", name="API key")
        expect(dialog).to_be_visible()
        expect(page.locator("#node-state")).to_have_text("key needed")
        page.keyboard.press("Escape")
        send(page, "Hello")
        expect(page.locator(".trouble")).to_contain_text("A valid API key is needed")
        expect(dialog).to_be_visible()
        page.get_by_label("Key", exact=True).fill("a-secret-key")
        page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        expect(page.locator("#node-state")).to_have_text("live")
        page.get_by_role("button", name="Try again").click()
        expect(page.locator(".message[data-role=assistant] .text")).to_have_text("hello")
        expect(page.locator(".message")).to_have_count(2)
        page.close()
    assert seen.errors == []


def test_a_phone_shows_one_view_at_a_time(page: Page) -> None:
    page.set_viewport_size(PHONE)
    message = page.get_by_label("Message", exact=True)
    expect(message).to_be_visible()
    expect(page.locator("#map")).to_be_hidden()
    page.get_by_role("button", name="System", exact=True).click()
    expect(page.locator("#map")).to_be_visible()
    expect(message).to_be_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], "nothing sticks out"


def test_a_swap_by_button_changes_the_version(page: Page) -> None:
    versions = page.get_by_role("list", name="Versions")
    page.get_by_role("button", name=re.compile("^Activate transition")).click()
    expect(page.locator("#predictor-result")).to_contain_text("is active now")
    active = versions.get_by_role("listitem").filter(has=page.locator("[data-state=active]"))
    expect(active).to_contain_text("transition")
    page.get_by_role("button", name=re.compile("^Let look on without effect: frequency")).click()
    expect(page.locator("#predictor-result")).to_contain_text("looks on now")
    expect(versions.locator("[data-state=shadow]")).to_have_count(1)
    page.get_by_role("button", name="End the shadow").click()
    expect(versions.locator("[data-state=shadow]")).to_have_count(0)
    page.get_by_role("button", name="Roll back").click()
    expect(page.locator("#predictor-result")).to_contain_text("is active again")
    expect(active).not_to_contain_text("transition")


LEARNERS: Final = (
    ({"state": "off", "news": "The service does not learn."}, None),
    (None, None),
    ({"state": "gathering"}, "gathers requests to learn from · 37 requests held, 1,204 tokens, 5.20 MB"),
    ({"state": "gathering", "paused": True}, "is paused · 37 requests held, 1,204 tokens, 5.20 MB"),
    ({"state": "training"}, "trains a candidate · 37 requests held"),
    ({"state": "shadowing", "progress": [{"name": "evidence_for", "value": 3.14159}]}, "· evidence for 3.14"),
    ({"state": "watching", "paused": True}, "watches the version that it promoted, beside the one before (paused"),
    ({"state": "failed", "news": "It is started again in 5 s."}, "Learner: is away"),
)
"""What a service may say of its learner beside its numbers, and what the page says then."""


def test_what_the_learner_does_is_told(page: Page) -> None:
    numbers = {"paused": False, "documents": 37, "tokens": 1204, "size_bytes": 5_200_000, "progress": [], "news": ""}
    said: dict[str, object] = {}

    def answer(route: Route) -> None:
        document = route.fetch().json()
        # The real service of these tests does not learn.
        assert document["learner"]["state"] == "off"
        route.fulfill(json=document | said)

    page.route("**/api/predictor", answer)
    learner = page.locator("#learner")
    for report, line in LEARNERS:
        said["learner"] = None if report is None else numbers | report
        page.reload()
        # What is said of versions and of the learner is shown at once.
        expect(page.get_by_role("list", name="Versions").get_by_role("listitem").first).to_be_visible()
        if report is None or line is None:
            expect(learner).to_be_hidden()
            continue
        expect(learner.locator("p").first).to_contain_text(line)
        news = str(report.get("news", ""))
        expect(learner.locator("p").last).to_have_text(news)
        assert learner.locator("p").last.is_visible() == bool(news)
    page.unroute_all()


def test_a_killed_predictor_is_shown_as_away_and_the_chat_goes_on(page: Page, behind: PageStack) -> None:
    """The last one: it stays dead."""
    expect(page.get_by_role("button", name=re.compile("^Activate")).first).to_be_enabled()
    behind.predictor.kill()
    expect(page.locator("#predictor-state")).to_have_text("away", timeout=10_000)
    send(page, "Hello")
    expect(page.locator("#predictor-note")).to_contain_text("The cache only reacts")
    expect(page.get_by_role("button", name=re.compile("^Activate")).first).to_be_disabled()
    expect(page.locator(".stats")).to_have_text(MORE_THAN_TOKENS)
