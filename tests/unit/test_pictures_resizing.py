import json
import math
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffenc.errors import ConfigError, ImageError
from diffenc.inputs.images import to_pixel_values
from diffenc.inputs.pictures.resizing import crop_offset, fit, scaled_size

GOLDEN = Path(__file__).parents[1] / "golden" / "torchvision_geometry.json"
SIZES = [(480, 640), (427, 640), (640, 427), (33, 97), (7, 5), (512, 512)]


def noise(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, height, width, generator=generator) * 2 - 1


def scaled_by_pillow(row: np.ndarray, scaled: int, start: int, count: int) -> np.ndarray:
    """Part of a row of floats, resized by Pillow's own bicubic filter."""
    image = Image.fromarray(row[None].astype(np.float32))
    return np.asarray(image.resize((scaled, 1), Image.Resampling.BICUBIC))[0, start : start + count]


def test_sizes_and_corners_are_torchvisions():
    rows = json.loads(GOLDEN.read_text())["rows"]
    assert [480, 640, 512, 512, 682] in [row[:5] for row in rows]
    for height, width, side, high, wide, top, left in rows:
        assert scaled_size((height, width), (side, side), cover=True) == (high, wide)
        assert (crop_offset(high, side), crop_offset(wide, side)) == (top, left)


def test_a_crop_shows_what_resize_and_center_crop_show():
    for height, width, side, high, wide, top, left in json.loads(GOLDEN.read_text())["rows"][:60]:
        if max(high, wide) > 3 * side:
            continue
        image = noise(height, width)
        scaled = torch.nn.functional.interpolate(
            image[None], size=(high, wide), mode="bicubic", antialias=True
        )[0].clamp(-1, 1)
        expected = scaled[:, top : top + side, left : left + side]
        assert torch.equal(to_pixel_values(image, size=side, resize="crop")[0], expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_and_corners_are_those_of_clips_image_processor(size, monkeypatch):
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    except ImportError:  # before transformers 5 the only one
        from transformers import CLIPImageProcessor as CLIPImageProcessorPil

    for side in (32, 224):
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size=side, do_normalize=False
        )
        resized = {}
        crop = processor.center_crop

        def cropping(image, *args, seen=resized, crop=crop, **kwargs):
            seen["size"] = image.shape[-2:] if len(image) == 3 else image.shape[:2]
            return crop(image, *args, **kwargs)

        monkeypatch.setattr(processor, "center_crop", cropping)
        # The place of each pixel is its value, by columns or by rows.
        ramp = np.zeros((*size, 3), np.uint8)
        ramp[..., 0] = np.linspace(0, 255, size[1])
        ramp[..., 1] = np.linspace(0, 255, size[0])[:, None]
        theirs = processor(Image.fromarray(ramp), return_tensors="np")["pixel_values"][0]
        assert scaled_size(size, (side, side), cover=True) == resized["size"]
        ours = to_pixel_values(ramp, size=side, resize="crop", multiple=1, center="transformers")[0]
        np.testing.assert_allclose((ours.numpy() + 1) / 2, theirs, atol=1.01 / 255)


def test_the_two_middles_differ_where_the_margin_leaves_three_of_four():
    margins = {
        margin: crop_offset(64 + margin, 64) - crop_offset(64 + margin, 64, "transformers")
        for margin in range(40)
    }
    assert margins == {margin: int(margin % 4 == 3) for margin in range(40)}


@pytest.mark.wrong_type
def test_another_middle_is_refused():
    with pytest.raises(ConfigError, match="center must be"):
        to_pixel_values(noise(8, 16), size=8, resize="crop", center="clip")


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("target", [(64, 64), (48, 80)], ids=str)
def test_padding_cuts_sizes_off_and_halves_the_rest(size, target):
    ratio = min(target[0] / size[0], target[1] / size[1])
    inner = [max(1, math.floor(side * ratio + 1e-9)) for side in size]
    top, left = (math.floor((a - b) / 2) for a, b in zip(target, inner, strict=True))
    white = to_pixel_values(torch.ones(3, *size), size=target, resize="pad")[0, 0]
    expected = torch.zeros(target)
    expected[top : top + inner[0], left : left + inner[1]] = 1
    torch.testing.assert_close(white, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(9, 80), (80, 9), (6, 120), (1, 37), (90, 4)])
def test_the_middle_of_a_narrow_picture_is_what_all_of_it_would_give(rows, columns):
    image = noise(rows, columns)
    size = (24, 32)
    high, wide = scaled_size((rows, columns), size, cover=True)
    assert high * wide > 4 * max(rows * columns, size[0] * size[1])  # the way that is tested
    top, left = crop_offset(high, size[0]), crop_offset(wide, size[1])
    whole = torch.nn.functional.interpolate(
        image[None].double(), size=(high, wide), mode="bicubic", antialias=True
    )[0].clamp(-1, 1)
    expected = whole[:, top : top + size[0], left : left + size[1]].float()
    torch.testing.assert_close(fit(image, size, "crop"), expected, rtol=0, atol=1e-6)


def test_a_row_of_pixels_is_scaled_as_pillow_scales_it():
    image = noise(1, 50)
    ours = fit(image, (16, 16), "crop")
    assert scaled_size((1, 50), (16, 16), cover=True) == (16, 800)
    for channel in range(3):
        row = scaled_by_pillow(image[channel, 0].numpy(), 800, 392, 16).clip(-1, 1)
        np.testing.assert_allclose(ours[channel], np.tile(row, (16, 1)), atol=2e-6)


@pytest.mark.parametrize("shape", [(1, 10_000), (10_000, 1), (300_000, 1), (1, 300_000)], ids=str)
@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
def test_no_picture_is_so_narrow_that_memory_ends(shape, resize):
    image = torch.full((3, *shape), -0.5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    values = to_pixel_values(image, size=512, resize=resize)
    assert values.shape == (1, 3, 512, 512)
    padding = 0.0 if resize == "pad" else -0.5
    assert values[0, 0, 0, 0].item() == pytest.approx(padding, abs=1e-5)
    assert values.min().item() == pytest.approx(-0.5, abs=1e-5)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 500_000  # kB; a whole picture of 512 pixels height takes 31 GB


def test_a_line_is_not_blown_up_beyond_what_can_be_opened(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    values = to_pixel_values(noise(1, 990), size=None, resize="none")
    assert values.shape == (1, 3, 8, 992)
    with pytest.raises(ImageError, match=r"1 x 1001 is padded to 8 x 1008 .*more than 8,000"):
        to_pixel_values(noise(1, 1001), size=None, resize="none")
