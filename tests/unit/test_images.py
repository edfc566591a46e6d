import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffenc.errors import ImageError, ShapeError
from diffenc.inputs.images import load_image, to_pixel_values


def gradient(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    red = rows * 255 // max(1, height - 1)
    green = columns * 255 // max(1, width - 1)
    return np.stack([red, green, np.full_like(red, 128)], axis=-1).astype(np.uint8)


def single(image, **options) -> torch.Tensor:
    return to_pixel_values(image, **{"size": None, "resize": "none", **options})[0]


def test_bytes_become_minus_one_to_one_channels_first():
    values = single(Image.fromarray(gradient(8, 16)))
    assert values.shape == (3, 8, 16)
    assert values.dtype == torch.float32
    assert values[0, 0, 0] == -1
    assert values[0, -1, 0] == 1
    assert values[1, 0, -1] == 1
    assert values[2, 0, 0].item() == pytest.approx(128 / 127.5 - 1, abs=1e-6)


def test_arrays_tensors_files_and_pil_images_agree(tmp_path):
    pixels = gradient(8, 16)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    channels_first = torch.from_numpy(pixels).permute(2, 0, 1)
    sources = [
        Image.fromarray(pixels),
        path,
        str(path),
        pixels,
        pixels.astype(np.float64) / 255,
        pixels.astype(np.uint16) * 257,
        channels_first,
        channels_first.float() / 127.5 - 1,
        np.concatenate([pixels, np.full((8, 16, 1), 255, np.uint8)], axis=-1),
    ]
    batch = to_pixel_values(sources, size=None, resize="none")
    for values in batch:
        torch.testing.assert_close(values, batch[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_of_pil_gives_three_channels(mode):
    image = Image.fromarray(gradient(8, 8))
    image = (
        image.convert("L").convert(mode)
        if mode in ("1", "LA")
        else image.convert("RGB" if mode == "LAB" else mode)
    )
    values = single(image)
    assert values.shape == (3, 8, 8)
    assert torch.isfinite(values).all()


def test_sixteen_bit_grey_keeps_its_range():
    values = single(Image.fromarray(np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)))
    assert values.min() == -1
    assert values.max() == 1
    assert abs(values.mean()) < 0.01


def test_transparency_lies_over_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (single(image) == 1).all()
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0] * 256)
    palette.info["transparency"] = 0
    assert (single(palette) == 1).all()


def test_an_exif_turn_is_undone():
    picture = Image.fromarray(gradient(8, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by 90 degrees
    stream = io.BytesIO()
    picture.save(stream, "PNG", exif=exif)
    turned = load_image(Image.open(stream))
    assert turned.size == (8, 16)
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(gradient(8, 16), -1))


@pytest.mark.parametrize("shape", [(30, 90), (90, 30), (7, 5), (64, 64)], ids=str)
@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_all_ways_of_resizing_give_the_size_asked_for(resize, shape):
    values = to_pixel_values(gradient(*shape), size=(32, 48), resize=resize)
    assert values.shape == (1, 3, 32, 48)
    assert values.min() >= -1
    assert values.max() <= 1


def test_crop_keeps_the_middle_and_pad_adds_grey():
    image = np.zeros((32, 96, 3), np.uint8)
    image[:, 32:64] = 255
    assert (to_pixel_values(image, size=32, resize="crop") == 1).all()
    padded = to_pixel_values(image, size=96, resize="pad")[0]
    assert (padded[:, :32] == 0).all()
    assert (padded[:, 32:64, :30] == -1).all()
    assert (padded[:, 64:] == 0).all()


def test_none_repeats_the_last_rows_up_to_the_multiple():
    values = single(gradient(13, 22))
    assert values.shape == (3, 16, 24)
    torch.testing.assert_close(values[:, 13:], values[:, 12:13].expand(-1, 3, -1))
    torch.testing.assert_close(values[:, :, 22:], values[:, :, 21:22].expand(-1, -1, 2))


def test_a_batch_equals_its_single_images():
    batch = np.stack([gradient(8, 8), gradient(8, 8)[::-1]])
    together = to_pixel_values(batch, size=16)
    apart = torch.cat([to_pixel_values(image, size=16) for image in batch])
    torch.testing.assert_close(together, apart, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/file.png", "no such image file"),
        (np.zeros((0, 8, 3), np.uint8), "must be"),
        (Image.new("RGB", (0, 0)), "no pixels"),
        (np.zeros((8, 8, 2), np.uint8), r"\(height, width"),
        (np.zeros((8, 8, 3), np.int64), "uint8, uint16 or float"),
        (np.full((8, 8, 3), 255.0), "divide by 255"),
        (np.full((8, 8, 3), np.nan), "NaN"),
        (torch.zeros(8, 8, 3), r"\(3, height, width\)"),
        (torch.full((3, 8, 8), 200.0), r"divide by 127\.5"),
        (torch.full((3, 8, 8), float("inf")), "infinity"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "uint8 or float"),
        pytest.param(3.5, "float", marks=pytest.mark.wrong_type),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_image_is_refused(source, message):
    with pytest.raises(ImageError, match=message):
        to_pixel_values([source], size=8)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"0" * 30])
def test_a_broken_file_is_named(tmp_path, content):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"cannot read the image .*broken\.png"):
        load_image(path)


def test_a_file_cut_off_is_refused(tmp_path):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        stream, "PNG"
    )
    path = tmp_path / "cut.png"
    path.write_bytes(stream.getvalue()[:2000])
    with pytest.raises(ImageError, match="cannot read"):
        load_image(path)


def test_sizes_are_checked():
    with pytest.raises(ShapeError, match=r"multiples of 8.*56 and 64 are the nearest to 60"):
        to_pixel_values(gradient(8, 8), size=60)
    with pytest.raises(ShapeError, match="one size"):
        to_pixel_values([gradient(8, 8), gradient(16, 8)], size=None, resize="none")
    with pytest.raises(ShapeError, match="no images"):
        to_pixel_values([], size=8)
    with pytest.raises(ShapeError, match="batch of 2"):
        to_pixel_values([np.zeros((2, 8, 8, 3), np.uint8)], size=8)
