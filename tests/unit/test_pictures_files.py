import io
import os
import random
import struct
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffenc.errors import DiffencError, ImageError
from diffenc.evals.items import picture_of
from diffenc.inputs.images import (
    as_list,
    broken_images,
    describe_broken,
    image_sizes,
    load_image,
    to_pixel_values,
)
from diffenc.inputs.pictures.files import read_picture
from marks import wrong_type

EXTREMES = (b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\x7f\xff\xff\xff")
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")
PIXELS = np.random.default_rng(0).integers(0, 256, (11, 17, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)


def encoded(kind: str = "PNG", image: Image.Image = PICTURE, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(encoded())
    return file


class Named(io.BytesIO):
    """A stream that knows the name of its file."""

    name = "b.jpg"


def read(image):
    return to_pixel_values(image, size=None, resize="none", multiple=1)


def mutated(content: bytes, draw: random.Random) -> bytes:
    """A file with some bytes changed, cut off, doubled, or filled with extremes."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 6)):
        place = draw.randrange(len(changed))
        changed[place] = draw.choice([0, 255, draw.randrange(256)])
    if draw.random() < 0.3:
        changed = changed[: draw.randrange(1, len(changed))]
    if draw.random() < 0.2:
        place = draw.randrange(len(changed))
        changed[place : place + 4] = draw.choice(
            [b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\x7f\xff\xff\xff"]
        )
    if draw.random() < 0.1:
        place = draw.randrange(len(changed))
        changed[place:place] = changed[: draw.randrange(40)]
    return bytes(changed)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_file_is_a_picture_or_an_image_error(kind, capfd):
    draw = random.Random(f"damage {kind}")
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    if kind == "GIF":
        options = {"save_all": True, "append_images": [PICTURE.rotate(90)]}
    if kind == "TIFF":
        options["compression"] = "tiff_deflate"
    content = encoded(kind, **options)
    outcomes = {"read": 0, "refused": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(150):
            image = fault = None
            try:
                image = load_image(mutated(content, draw), name="a damaged file")
            except ImageError as error:
                fault = str(error)
            if fault is None:
                assert image.mode == "RGB"
                assert min(image.size) > 0
            else:
                assert fault.startswith("cannot read the image a damaged file: ")
                assert "\n" not in fault
                assert "object at 0x" not in fault
            outcomes["read" if fault is None else "refused"] += 1
    assert all(outcomes.values()), outcomes


DECODER_ERRORS = (
    *(SyntaxError, struct.error, IndexError, OverflowError, MemoryError, zlib.error, EOFError),
    *(KeyError, TypeError, RuntimeError, UnboundLocalError, AttributeError),
)


@pytest.mark.parametrize("error", DECODER_ERRORS, ids=map(str, range(12)))
def test_whatever_a_decoder_raises_is_an_image_error(path, monkeypatch, error):
    def fail(_image):
        raise error("a decoder failed")

    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(ImageError, match=r"cannot read the image .*a\.png: "):
        load_image(path)


GIF_FRAME = b"," + struct.pack("<HHHHBB", 0, 0, 11, 17, 0, 8)


def header(kind: str, side: int) -> bytes:
    """A file whose header tells of a huge picture that is not there."""
    if kind == "PNG":
        body = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
        return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT"
    if kind == "BMP":
        head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
        return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head
    if kind == "GIF":
        return b"GIF89a" + struct.pack("<HHBBB", side, side, 0, 0, 0) + GIF_FRAME
    if kind == "PPM":
        return f"P6 {side} {side} 255\n".encode()
    if kind == "TGA":
        return struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, side, side, 24, 0)
    small = bytearray(encoded("TIFF"))
    for tag in (256, 257):  # width and height, in the little-endian directory
        place = small.index(
            struct.pack("<HH", tag, 4)
            if struct.pack("<HH", tag, 4) in small
            else struct.pack("<HH", tag, 3)
        )
        small[place + 2 : place + 12] = struct.pack("<HII", 4, 1, side)
    return bytes(small)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "PPM", "TGA", "TIFF"])
def test_a_header_that_lies_allocates_nothing(kind):
    content = header(kind, 40_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ImageError, match=r"1600000000 pixels"):
            load_image(content)


@pytest.mark.filterwarnings("error")
def test_a_large_picture_is_refused_where_warnings_are_errors(path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"187 pixels"):
        load_image(path)


@pytest.mark.parametrize(
    "opened",
    [
        str,
        lambda path: path,
        lambda path: path.read_bytes(),
        lambda path: bytearray(path.read_bytes()),
        lambda path: memoryview(path.read_bytes()),
        lambda path: io.BytesIO(path.read_bytes()),
        lambda path: {"bytes": path.read_bytes(), "path": None},
        lambda path: {"bytes": path.read_bytes(), "path": "no/such.png"},
        lambda path: {"bytes": None, "path": str(path)},
        lambda path: {"path": str(path)},
        Image.open,
    ],
    ids=map(str, range(11)),
)
def test_whatever_holds_a_picture_is_read(path, opened):
    expected = torch.from_numpy(PIXELS).permute(2, 0, 1).float() / 127.5 - 1
    for images, count in ((opened(path), 1), ([opened(path), opened(path)], 2)):
        pictures = as_list(images)
        for _ in range(2):  # the encoder reads a picture more than once
            assert torch.equal(read(pictures), expected.expand(count, -1, -1, -1))
        assert image_sizes(pictures) == [(11, 17)] * count


def test_a_stream_stands_where_it_stood(path):
    with path.open("rb") as stream:
        stream.seek(5)
        np.testing.assert_array_equal(np.asarray(load_image(stream)), PIXELS)
        assert stream.tell() == 5
        assert torch.equal(read(stream), read([stream]))
    with pytest.raises(ImageError, match="closed file"):
        read(stream)
    with path.open(encoding="latin-1") as text, pytest.raises(ImageError, match='mode "rb"'):
        read(text)
    with tempfile.SpooledTemporaryFile() as spooled:
        spooled.write(encoded())
        assert read(spooled).shape == (1, 3, 11, 17)


def test_a_stream_that_cannot_go_back_is_read_once(path):
    reading, writing = os.pipe()
    os.write(writing, encoded())
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        pictures = as_list([pipe])
        assert torch.equal(read(pictures), read(pictures))


def test_home_is_known(path, monkeypatch):
    monkeypatch.setenv("HOME", str(path.parent))
    assert read("~/a.png").shape == (1, 3, 11, 17)
    with pytest.raises(ImageError, match=f"no such image file: {path.parent}/b.png"):
        read("~/b.png")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"no such image file: \. is a folder"),
        ("a" * 5000, "no such image file: aaa.*…"),
        ("a\0b.png", r"no such image file: a\\x00b"),
        ("half \ud800.png", r"no such image file: half \\ud800"),
        ("/dev/zero", "/dev/zero is no regular file"),
        ("http://example.org/a.png", r"http://example\.org/a\.png is a URL.*nothing is downloaded"),
        ("HTTPS://example.org/a.png", "is a URL"),
        (Path("https://example.org/a.png"), "is a URL"),
        ("s3://bucket/a.png", "is a URL"),
        ("file:///a.png", "is a URL"),
        ("data:image/png;base64," + "iVBORw0KGgo" * 3000, "data:image/png.*… ?.*is a URL"),
        ("C:/a.png", "no such image file: C:/a.png"),
        ("a: b, c.png", "no such image file: a: b, c.png"),
    ],
    ids=map(str, range(13)),
)
def test_names_that_lead_to_no_picture(name, message):
    with pytest.raises(ImageError, match=message) as caught:
        read(name)
    assert len(str(caught.value)) < 500
    str(caught.value).encode()
    with pytest.raises(ImageError, match=r"no such image file|is a URL"):
        read_picture(name)


def test_folders_and_pipes_are_no_pictures(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("", "pipe"):
        with pytest.raises(ImageError, match=r"is a folder|is no regular file"):
            load_image(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>404</html>", r"web page \(HTML\)"),
        (b'<?xml version="1.0"?><svg xmlns="..."/>', "SVG drawing, which has no pixels"),
        (b"%PDF-1.4", "no picture, or of an unknown format"),
        (encoded()[:60], "truncated|broken"),
        (encoded("JPEG")[:400], "Truncated"),
    ],
    ids=map(str, range(6)),
)
def test_what_a_file_is_instead_is_told(tmp_path, content, message):
    file = tmp_path / "b.jpg"
    file.write_bytes(content)
    for source in (file, Named(content), {"bytes": content, "path": "b.jpg"}):
        with pytest.raises(ImageError, match=rf"cannot read the image .*b\.jpg: .*({message})"):
            load_image(source)
    with pytest.raises(ImageError, match=message):
        load_image(content)


def test_pictures_that_pillow_has_not_loaded_yet(path, tmp_path):
    large = Image.fromarray(np.random.default_rng(1).integers(0, 256, (300, 300, 3), np.uint8))
    large.save(path)
    lazy = Image.open(path)
    path.write_bytes(encoded(image=large)[:99_999])
    with pytest.raises(ImageError, match=r"cannot read the image .*a\.png: "):
        read([lazy])
    lazy.close()
    gone = tmp_path / "b.png"
    gone.write_bytes(encoded())
    closed = Image.open(gone)
    closed.close()
    with pytest.raises(ImageError, match=r"cannot read the image .*b\.png: "):
        read([PICTURE, closed])
    with pytest.raises(ImageError, match="no pixels: its size is 0 x 5"):
        read(Image.new("RGB", (5, 0)))


@pytest.mark.parametrize(
    "source",
    [wrong_type(source) for source in (None, 3, {}, {"url": "a"}, {"bytes": 3}, object())],
    ids=map(str, range(6)),
)
def test_what_holds_no_picture_is_an_image_error(source):
    with pytest.raises(ImageError, match=r"must be|must hold"):
        read(source)
    with pytest.raises(ImageError, match=r"must be|must hold"):
        load_image(source)


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa", "P", "L", "RGB", "I;16"])
def test_what_is_transparent_is_white(mode):
    image = Image.new("RGBA", (4, 4), (10, 10, 10, 0))
    if mode in ("P", "L", "RGB", "I;16"):
        hidden = {"P": 0, "L": 10, "RGB": (10, 10, 10), "I;16": 2570}[mode]
        image = Image.new(mode, (4, 4), hidden)
        if mode == "P":
            image.putpalette([10, 10, 10] * 256)
        image.info["transparency"] = hidden
    elif mode == "PA":
        image = Image.new("P", (4, 4), 0).convert("PA")
        image.putalpha(Image.new("L", (4, 4), 0))
    elif mode in ("LA", "La"):
        image = Image.new("LA", (4, 4), (10, 0))
        image = image if mode == "LA" else image.convert("La")
    else:
        image = image.convert(mode)
    assert image.mode == mode
    assert (read(image) == 1).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_counts_unless_pillow_stands_elsewhere(kind):
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(kind, frames[0], save_all=True, append_images=frames[1:], **options)
    assert load_image(content).getpixel((3, 3)) == (255, 0, 0)
    with Image.open(io.BytesIO(content)) as opened:
        opened.seek(1)
        assert load_image(opened).getpixel((3, 3)) == (0, 0, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_is_turned_back(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2),
        6: np.rot90(PIXELS, 1),
        7: np.rot90(PIXELS, 2).transpose(1, 0, 2),
        8: np.rot90(PIXELS, -1),
    }[orientation]
    for kind in ("PNG", "TIFF"):
        content = encoded(kind, Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
        np.testing.assert_array_equal(np.asarray(load_image(content)), PIXELS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [6, 8])
def test_a_picture_that_was_turned_is_not_turned_again(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    once = load_image(encoded(kind, PICTURE, exif=exif))
    assert once.size == PICTURE.size[::-1]
    np.testing.assert_array_equal(np.asarray(load_image(once)), np.asarray(once))
    again = io.BytesIO()
    once.save(again, "PNG")
    np.testing.assert_array_equal(np.asarray(load_image(again)), np.asarray(once))


def test_exif_that_cannot_be_read_turns_nothing():
    content = encoded(exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff\x01\x12\0\x03")
    np.testing.assert_array_equal(np.asarray(load_image(content)), PIXELS)


def test_tables_may_hold_pictures_in_each_of_these_ways(path):
    for cell in (
        PICTURE,
        path.read_bytes(),
        {"bytes": path.read_bytes()},
        {"path": str(path)},
        {"bytes": None, "path": str(path)},
        memoryview(path.read_bytes()),
    ):
        picture = picture_of(cell, "row 3")
        assert picture is not None
        np.testing.assert_array_equal(np.asarray(picture.open()), PIXELS)
    assert picture_of({"bytes": None, "path": None}, "row 3") is None
    assert picture_of("a text", "row 3") is None
    broken = picture_of(b"<html>", "row 3")
    with pytest.raises(ImageError, match="cannot read the image row 3: it holds a web page"):
        broken.open()


@pytest.mark.parametrize("workers", [1, 3])
def test_all_that_is_broken_is_found_and_told(path, workers):
    images = [path, path.with_name("none.png"), PICTURE, b"", *[path] * 100, "gone.png"]
    calls = []
    found = broken_images(images, workers=workers, progress=lambda *done: calls.append(done))
    assert list(found) == [1, 3, 104]
    assert calls == [(64, 105), (105, 105)]
    told = describe_broken(found.values(), len(images))
    assert told.startswith("3 of 105 images cannot be read: no such image file: ")
    assert told.count(";") == 2
    many = describe_broken([f"fault {index}" for index in range(25)], 30)
    assert many.endswith("fault 19; and 5 more")
    assert issubclass(ImageError, DiffencError)
