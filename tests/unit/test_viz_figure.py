import numpy as np
import pytest
from PIL import Image, ImageFont

from diffenc.errors import ConfigError
from diffenc.viz.figure import Panel, dot_chart, figure, wrap
from diffenc.viz.heatmap import HeatMap

RED = Image.new("RGB", (8, 8), (255, 0, 0))
LONG = "a small red circle to the left of a large blue square " * 4


def ink(image):
    """Rows and columns (first, last) that are not white."""
    used = np.asarray(image.convert("L")) < 250
    rows, columns = np.flatnonzero(used.any(axis=1)), np.flatnonzero(used.any(axis=0))
    return (rows[0], rows[-1]), (columns[0], columns[-1])


def test_panels_stand_in_rows_at_their_size():
    picture = figure([[Panel(RED), Panel(RED)], [None, Panel(RED)]], side=100)
    gap = 10
    assert picture.size == (2 * 100 + 3 * gap, 2 * 100 + 3 * gap)
    pixels = np.asarray(picture)
    assert (pixels[gap : gap + 100, gap : gap + 100] == (255, 0, 0)).all()
    assert (pixels[-gap - 100 : -gap, gap : gap + 100] == 255).all()
    assert (pixels[-gap - 100 : -gap, -gap - 100 : -gap] == (255, 0, 0)).all()


def test_panels_show_pictures_as_an_encoder_sees_them():
    lying = Image.new("RGB", (64, 32), (255, 0, 0))
    lying.getexif()[0x0112] = 6
    pictures = {
        "turned": (lying, (255, 0, 0)),
        "transparent": (Image.new("RGBA", (32, 64), (0, 0, 0, 0)), (255, 255, 255)),
        "16 bits": (Image.fromarray(np.full((64, 32), 128 * 257, np.uint16)), (128, 128, 128)),
    }
    for kind, (picture, color) in pictures.items():
        drawn = figure([[Panel(picture)]], side=64)
        expected = figure([[Panel(Image.new("RGB", (32, 64), color))]], side=64)
        np.testing.assert_array_equal(np.asarray(drawn), np.asarray(expected), err_msg=kind)


def test_text_makes_room_and_nothing_is_cut():
    panel = Panel(RED, title=LONG, caption=LONG, legend=HeatMap(np.eye(2)))
    plain, full = figure([[panel]], side=128), figure([[panel]], side=128, title=LONG, note=LONG)
    assert full.height > plain.height
    for picture in (plain, full):
        (top, bottom), (left, right) = ink(picture)
        assert top > 0 < left
        assert bottom < picture.height - 5
        assert right < picture.width - 5


def test_a_picture_keeps_its_aspect_ratio():
    pixels = np.asarray(figure([[Panel(Image.new("RGB", (200, 50)))]], side=100))
    assert (pixels.sum(axis=2) == 0).sum() == 100 * 25


def test_figures_are_reproducible():
    rows = [[Panel(RED, "title", "caption", HeatMap(np.eye(2))), None]]
    assert figure(rows).tobytes() == figure(rows).tobytes()


def test_a_figure_needs_panels():
    with pytest.raises(ConfigError, match="got 0 columns"):
        figure([])
    with pytest.raises(ConfigError, match="64 pixels or more"):
        figure([[Panel(RED)]], side=10)


@pytest.mark.parametrize("width", [40, 120])
def test_wrapped_lines_fit_and_lose_nothing(width):
    font = ImageFont.load_default(14)
    text = "a red circle\nleft of up_blocks.2.attentions.0.transformer_blocks.0.attn2.to_q"
    lines = wrap(text, font, width)
    assert all(font.getlength(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")


def test_letters_that_the_font_lacks_are_spelt_in_ascii():
    spelt = figure([[Panel(RED, "a cafe - 16 x 16 ?")]])
    assert figure([[Panel(RED, "a café – 16 × 16 圆")]]).tobytes() == spelt.tobytes()


def test_dots_stand_in_the_order_of_their_values():
    chart = np.asarray(dot_chart(["a", "b", "c"], [-2.0, -1.0, -3.0], side=256)).astype(int)
    dark = (chart.sum(axis=2) < 150) & (np.arange(256) < 180)  # dots, not numbers
    best = (np.abs(chart - (216, 80, 62)).sum(axis=2) < 10) & (np.arange(256) < 180)
    centres = [np.flatnonzero(rows.any(axis=0)).mean() for rows in (dark[:85], best, dark[170:])]
    assert centres[2] < centres[0] < centres[1]


def test_charts_grow_with_what_they_hold():
    assert dot_chart(["a"], [1.0], side=100).size == (100, 100)
    chart = dot_chart([LONG] * 9, [1.0] * 9, side=100)
    assert chart.width == 100 < ink(chart)[0][1] < chart.height
    with pytest.raises(ConfigError, match="2 labels for 1 values"):
        dot_chart(["a", "b"], [1.0])
