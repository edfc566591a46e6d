"""The page of `diffenc app` in a headless browser; needs Gradio, Playwright and Chromium."""

import shutil

import pytest

from diffenc.app.answers import Desk
from diffenc.app.page import QUESTION, TEXTS, build, launch

pytest.importorskip("gradio", reason="the extra app is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # Gradio's own
]


@pytest.fixture(scope="module")
def address():
    page = build(Desk(side=128))
    yield launch(page, host="127.0.0.1", port=7961, browser=False, block=False)
    page.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


def opened(browser, address, width):
    """The page with its first answer, what went wrong in it, and what it loads from elsewhere."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(240_000)
    faults, foreign = [], []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: foreign.append(request.url) if is_foreign(request) else None)
    page.goto(address)
    cell(page, TEXTS[0]).wait_for()
    return page, faults, foreign


def is_foreign(request):
    return not request.url.startswith(("http://127.0.0.1", "data:", "blob:"))


def cell(page, text):
    return page.locator("td:visible", has_text=text).first


def test_a_question_is_answered_with_pictures_words_and_scores(browser, address):
    page, faults, foreign = opened(browser, address, 1280)
    assert cell(page, QUESTION).is_visible()
    page.get_by_label("Question").fill("what color is the star?")
    page.get_by_role("button", name="Read the picture").click()
    cell(page, "what color is the star?").wait_for()
    assert page.locator("img:visible").count() >= 6
    assert faults == []
    assert foreign == []


def test_a_question_without_a_word_gets_a_message(browser, address):
    page, _, _ = opened(browser, address, 1280)
    page.get_by_label("Question").fill("   ")
    page.get_by_role("button", name="Read the picture").click()
    page.get_by_text("the question has no word yet").first.wait_for()


def test_the_page_fits_a_phone(browser, address):
    page, _, _ = opened(browser, address, 500)
    assert page.evaluate("document.documentElement.scrollWidth") <= 500
