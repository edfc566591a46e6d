import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffenc.errors import ConfigError, ImageError, NonFiniteError, ShapeError
from diffenc.viz.heatmap import HeatMap, colorize
from diffenc.viz.word_maps import WordMaps


def lightness(colors):
    """CIE L* of sRGB bytes."""
    unit = colors / 255
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)


def test_lightness_rises_evenly():
    steps = np.diff(lightness(colorize(np.linspace(0, 1, 51)[None])[0]))
    assert steps.min() > 0.5 * steps.mean()
    assert steps.max() < 2 * steps.mean()


def test_values_become_colours_between_low_and_high():
    values = [[0.0, 1.0], [2.0, 4.0]]
    cells = np.asarray(HeatMap(values).to_pil())
    assert np.array_equal(cells, colorize(np.array([[0, 0.25], [0.5, 1]])))
    fixed = np.asarray(HeatMap(values, low=1.0, high=2.0).to_pil())
    assert np.array_equal(fixed, colorize(np.array([[0.0, 0.0], [1.0, 1.0]])))


def test_the_range_is_that_of_the_values_unless_given():
    heat = HeatMap(torch.tensor([[0.25, 0.5]], dtype=torch.float16))
    assert (heat.low, heat.high) == (0.25, 0.5)
    assert repr(heat) == "HeatMap(1 x 2 cells, 0.25 to 0.5)"
    assert HeatMap([[0.25, 0.5]], low=0.0, high=1.0).high == 1


def test_an_even_map_is_cold():
    cells = np.asarray(HeatMap(np.full((2, 2), 3.0)).to_pil())
    assert np.array_equal(cells, colorize(np.zeros((2, 2))))


@pytest.mark.parametrize("resample", ["nearest", "bicubic"])
def test_size_is_height_and_width(resample):
    assert HeatMap(np.eye(3)).to_pil((20, 30), resample=resample).size == (30, 20)
    assert HeatMap(np.eye(3)).to_pil(20).size == (20, 20)


def test_smoothing_stays_between_low_and_high():
    peak = np.zeros((5, 5))
    peak[2, 2] = 1
    colors = np.asarray(HeatMap(peak).to_pil(100))  # bicubic overshoots below 0
    assert np.array_equal(colors[0, 0], colorize(np.zeros((1, 1)))[0, 0])


def test_an_overlay_mixes_the_picture_in_grey():
    picture = Image.new("RGB", (6, 4), (255, 0, 0))
    heat = HeatMap([[0.0, 1.0]])
    over = heat.to_pil(overlay=picture, alpha=0.5, resample="nearest")
    assert over.size == (6, 4)
    grey = np.asarray(picture.convert("L"))[0, 0]
    expected = (colorize(np.array([[0.0, 1.0]]))[0].astype(int) + grey) // 2
    assert np.abs(np.asarray(over)[0, [0, -1]] - expected).max() <= 1
    alone = np.asarray(heat.to_pil(overlay=picture, alpha=1.0))
    assert np.array_equal(alone, np.asarray(heat.to_pil((4, 6))))
    assert heat.to_pil(12, overlay=picture).size == (12, 12)
    assert picture.getpixel((0, 0)) == (255, 0, 0)


def test_the_legend_runs_from_low_to_high():
    ramp = np.asarray(HeatMap(np.eye(2)).legend((3, 50)))
    assert ramp.shape == (3, 50, 3)
    assert np.array_equal(ramp[1], colorize(np.linspace(0, 1, 50)[None])[0])


def test_bad_input():
    with pytest.raises(ShapeError, match=r"\(h w\), got shape \(3,\)"):
        HeatMap([1, 2, 3])
    with pytest.raises(ShapeError, match=r"\(0, 4\)"):
        HeatMap(np.zeros((0, 4)))
    with pytest.raises(NonFiniteError):
        HeatMap([[0.0, float("inf")]])
    with pytest.raises(ConfigError, match="low must not be above high"):
        HeatMap(np.eye(2), low=2.0)
    with pytest.raises(ConfigError, match="alpha must be in"):
        HeatMap(np.eye(2)).to_pil(alpha=2.0)


def test_a_map_knows_its_word_and_its_picture():
    picture = Image.new("RGB", (30, 20), (255, 0, 0))
    heat = HeatMap(np.eye(3), label="circle", picture=picture)
    assert repr(heat) == "HeatMap('circle', 3 x 3 cells, 0 to 1)"
    assert heat.to_pil(overlay=True).size == (30, 20)
    assert np.array_equal(heat.to_pil(overlay=True), heat.to_pil(overlay=picture))
    assert np.array_equal(heat.to_pil(overlay=False), heat.to_pil())
    heat.array[0, 0] = 9
    assert heat.array[0, 0] == 1  # a copy
    with pytest.raises(ConfigError, match="needs a map with a picture"):
        HeatMap(np.eye(3)).to_pil(overlay=True)


def test_a_notebook_shows_the_map_over_its_picture():
    picture = Image.new("RGB", (30, 20))
    shown = Image.open(io.BytesIO(HeatMap(np.eye(3), picture=picture)._repr_png_()))
    assert shown.size == (256, 171)
    assert Image.open(io.BytesIO(HeatMap(np.eye(4)[:2])._repr_png_())).size == (256, 128)


@pytest.fixture
def picture():
    return Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3))


KINDS = {
    "path": lambda picture, file: str(file),
    "bytes": lambda picture, file: file.read_bytes(),
    "array": lambda picture, file: np.array(picture),
    "tensor": lambda picture, file: torch.from_numpy(np.array(picture)).permute(2, 0, 1),
    "batch": lambda picture, file: np.array(picture)[None],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_under_a_map_is_of_any_kind(picture, tmp_path, kind):
    picture.save(tmp_path / "picture.png")
    source = KINDS[kind](picture, tmp_path / "picture.png")
    expected = np.asarray(HeatMap(np.eye(2)).to_pil(overlay=picture))
    assert np.array_equal(HeatMap(np.eye(2)).to_pil(overlay=source), expected)
    heat = HeatMap(np.eye(2), picture=source)
    assert np.array_equal(heat.to_pil(overlay=True), expected)
    assert Image.open(io.BytesIO(heat._repr_png_())).size == (256, 171)


def test_the_picture_of_many_maps_is_not_copied(picture):
    assert HeatMap(np.eye(2), picture=picture).picture is picture


@pytest.mark.wrong_type
@pytest.mark.parametrize("size", ["a", 3.5, (1,), (1, 2, 3), (0, 3), (2.5, 3), True], ids=str)
def test_a_size_that_is_none_is_refused(size):
    for draw in (HeatMap(np.eye(2)).to_pil, HeatMap(np.eye(2)).legend):
        with pytest.raises(ConfigError, match=r"size must be a positive int or \(height, width\)"):
            draw(size)


@pytest.mark.wrong_type
def test_what_is_no_picture_and_no_number_is_refused(tmp_path):
    with pytest.raises(ImageError, match="no such image file"):
        HeatMap(np.eye(2)).to_pil(overlay=str(tmp_path / "absent.png"))
    with pytest.raises(ImageError, match="got int"):
        HeatMap(np.eye(2)).to_pil(overlay=3)
    with pytest.raises(ShapeError, match="one picture is needed, got 2"):
        HeatMap(np.eye(2), picture=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(ConfigError, match="alpha must be a finite number, got 'x'"):
        HeatMap(np.eye(2)).to_pil(alpha="x")
    with pytest.raises(ConfigError, match="high must be a finite number"):
        HeatMap(np.eye(2), high="x")
    with pytest.raises(ShapeError, match=r"expected numbers over \(h w\), got 'map'"):
        HeatMap("map")


def test_small_differences_between_large_values_are_seen():
    values = np.array([[0.0, 1.0], [2.0, 4.0]])
    expected = np.asarray(HeatMap(values).to_pil(size=8))
    np.testing.assert_array_equal(np.asarray(HeatMap(values + 2.0**40).to_pil(size=8)), expected)


def test_the_picture_under_a_map_stands_upright():
    lying = Image.new("RGB", (80, 40), "red")
    lying.getexif()[0x0112] = 6
    heat = HeatMap(np.zeros((8, 4)), picture=lying)
    assert heat.picture.size == (40, 80)
    assert Image.open(io.BytesIO(heat._repr_png_())).size == (128, 256)
    upright = WordMaps({"a": HeatMap(np.zeros((8, 4)), picture=lying.rotate(-90, expand=True))})
    drawn = WordMaps({"a": heat}).to_pil(side=64)
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(upright.to_pil(side=64)))


@pytest.mark.parametrize(("words", "columns", "rows"), [(3, 4, 1), (3, 2, 2), (5, 1, 6)])
def test_all_words_are_one_picture_with_the_picture_first(words, columns, rows):
    picture = Image.new("RGB", (128, 64), (9, 200, 40))
    maps = WordMaps(
        (f"word {place}", HeatMap(np.eye(4) + place, picture=picture)) for place in range(words)
    )
    drawn = maps.to_pil(side=64, columns=columns)
    across = min(columns, words + 1)
    assert drawn.width == across * 64 + (across + 1) * 6
    plain = np.asarray(drawn)
    assert (plain == (9, 200, 40)).all(axis=-1).sum() == 64 * 32
    taller = np.asarray(maps.to_pil(side=64, columns=columns, title="a title"))
    assert taller.shape[0] > plain.shape[0]
    one_row = maps.to_pil(side=64, columns=words + 1)
    assert (drawn.size == one_row.size) == (rows == 1)
    assert drawn.height > 0.8 * (rows - 0.5) * one_row.height


def test_words_without_a_picture_are_drawn_alone_and_none_are_refused():
    maps = WordMaps({"a": HeatMap(np.eye(4))})
    assert maps.to_pil(side=64).width == 64 + 2 * 6
    with pytest.raises(ConfigError, match="a figure needs a panel"):
        WordMaps().to_pil()
    with pytest.raises(ConfigError, match="columns"):
        maps.to_pil(columns=0)
