"""The page of `diffenc app` in a headless browser; needs Gradio, Playwright and Chromium."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from diffenc.app.answers import Desk
from diffenc.app.page import NAMES, QUESTION, TEXTS, build, launch
from diffenc.shapes.example import example_picture

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
    for earlier in browser.contexts:
        earlier.close()  # its animations would go on
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
    page.locator(".words .caption-label", has_text="star").wait_for()
    assert named_tiles(page) == ["what", "color", "is", "the", "star"]
    assert page.locator(".chart img").is_visible()
    assert page.locator("img:visible").count() >= 6 + 5
    assert faults == []
    assert foreign == []


def named_tiles(page):
    return [text.strip() for text in page.locator(".words .caption-label").all_inner_texts()]


def picture_at(page, place):
    """What a picture of the page shows, as an array."""
    address = place.get_attribute("src")
    content = page.context.request.get(address).body()
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB").resize((64, 64))) / 255


def test_each_picture_stands_under_its_name(browser, address):
    page, _, _ = opened(browser, address, 1280)
    answer = Desk(side=128).answer(example_picture(256), QUESTION)
    drawn = [
        np.asarray(panel.image.convert("RGB").resize((64, 64))) / 255 for panel in answer.features
    ]
    for number, name in enumerate(NAMES):
        block = page.locator(".block", has=page.get_by_text(name, exact=True)).last
        shown = picture_at(page, block.locator("img"))
        assert np.argmin([np.abs(shown - other).mean() for other in drawn]) == number


def test_scores_fall_from_the_first_row_on_and_the_true_text_beats_the_wrong_ones(browser, address):
    page, _, _ = opened(browser, address, 1280)
    rows = [row.split("\t") for row in page.locator("tbody tr:visible").all_inner_texts()]
    scores = [float(row[1]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    places = {row[0]: place for place, row in enumerate(rows)}
    assert set(places) == {QUESTION, *TEXTS}
    assert places[TEXTS[0]] < min(places[TEXTS[1]], places[TEXTS[2]])


def test_enter_in_the_question_reads_the_picture(browser, address):
    page, _, _ = opened(browser, address, 1280)
    box = page.get_by_label("Question")
    box.fill("is there a circle?")
    box.press("Enter")
    cell(page, "is there a circle?").wait_for()


def test_a_picture_that_is_dropped_is_read_and_a_foreign_one_warned_of(browser, address, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    page, _, _ = opened(browser, address, 1280)
    begun = panels(page)
    page.get_by_label("Remove Image").first.click()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "photo.png")
    page.wait_for_function("document.querySelectorAll('img').length >= 1")
    answered(page, begun)
    page.get_by_text("knows coloured shapes").first.wait_for()


def panels(page):
    """Addresses of the pictures of the features, which are named by their contents."""
    shown = page.locator("img:visible")
    return {shown.nth(place).get_attribute("src") for place in range(shown.count())}


def options(page):
    """The page with its options open, and what it shows with those it begins with."""
    page.get_by_text("Model, tap and timestep").click()
    page.get_by_label("Tap").wait_for()
    return panels(page)


def answered(page, before):
    """What the page shows after another reading; it must differ."""
    page.get_by_role("button", name="Read the picture").click()
    page.wait_for_function(
        "before => [...document.querySelectorAll('img')].filter(e => e.checkVisibility() && "
        "!before.includes(e.getAttribute('src'))).length >= 3",
        arg=sorted(before),
    )
    cell(page, QUESTION).wait_for()
    return panels(page)


def choose(page, label, name):
    """Click a drop-down, then one of its entries."""
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=name, exact=True).click()


def test_each_tap_and_timestep_that_is_chosen_changes_the_pictures(browser, address):
    page, faults, _ = opened(browser, address, 1280)
    begun = options(page)
    choose(page, "Tap", "mid_block")
    assert page.get_by_label("Tap", exact=True).input_value() == "mid_block"
    other_tap = answered(page, begun)
    box = page.get_by_label("number input for Timestep (noise)")
    box.fill("600")
    box.press("Tab")
    other_step = answered(page, other_tap)
    choose(page, "Tap", "up_blocks.1")
    box.fill("50")
    box.press("Tab")
    page.get_by_role("button", name="Read the picture").click()
    page.wait_for_function(
        "begun => begun.every(src => [...document.images].some(e => e.getAttribute('src') == src))",
        arg=sorted(begun),
    )
    assert other_step != other_tap != begun
    assert faults == []


def test_another_model_has_its_own_taps_and_answers(browser, address, tiny_sd_folder):
    page, faults, _ = opened(browser, address, 1280)
    begun = options(page)
    choose(page, "Tap", "up_blocks.2")  # another model begins at a tap of its own
    model = page.get_by_label("Model", exact=True)
    model.fill(str(tiny_sd_folder))
    model.press("Enter")
    page.wait_for_function(
        "name => document.querySelector('input[aria-label=Tap]').value == name", arg="up_blocks.1"
    )
    page.get_by_label("Tap", exact=True).click()
    taps = page.get_by_role("option").all_inner_texts()
    assert any("up_blocks.0" in each for each in taps)
    page.keyboard.press("Escape")
    answered(page, begun)
    assert faults == []


def test_a_model_that_is_not_there_gets_a_message(browser, address):
    page, _, _ = opened(browser, address, 1280)
    options(page)
    model = page.get_by_label("Model", exact=True)
    model.fill("no-such-model")
    model.press("Enter")
    page.get_by_text("unknown model").first.wait_for()


def test_a_question_without_a_word_gets_a_message(browser, address):
    page, _, _ = opened(browser, address, 1280)
    page.get_by_label("Question").fill("   ")
    page.get_by_role("button", name="Read the picture").click()
    page.get_by_text("the question has no word yet").first.wait_for()


@pytest.mark.parametrize(("width", "smallest", "columns"), [(500, 180, 2), (1280, 150, 4)])
def test_words_are_large_enough_to_read(browser, address, width, smallest, columns):
    page, _, _ = opened(browser, address, width)
    page.locator(".words .gallery-item").last.wait_for()
    boxes = [tile.bounding_box() for tile in page.locator(".words .gallery-item").all()]
    assert min(box["width"] for box in boxes) >= smallest
    assert len({round(box["x"]) for box in boxes}) >= columns
    frame = page.locator(".block.words").bounding_box()
    assert max(box["y"] + box["height"] for box in boxes) <= frame["y"] + frame["height"]


def test_the_page_fits_a_phone(browser, address):
    page, _, _ = opened(browser, address, 500)
    assert page.evaluate("document.documentElement.scrollWidth") <= 500
