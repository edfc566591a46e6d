"""How much of each cell areas cover, against pictures of them that are resized as the encoder's."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from diffenc import EncoderConfig
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError
from diffenc.grounding.areas import Area, RunLengths, covered, outline_box, read_box, read_outline
from diffenc.inputs.images import to_pixel_values

CELL = 8


def drawn(size, draw):
    """A black picture with something white on it."""
    picture = Image.new("RGB", (size[1], size[0]))
    draw(ImageDraw.Draw(picture))
    return picture


def whiteness(picture, size, resize):
    """Mean whiteness of each cell of the encoder's own pixel values; padding is black."""
    values = to_pixel_values(picture, size=size, resize=resize)[0, 0]
    everything = to_pixel_values(Image.new("RGB", picture.size, "white"), size=size, resize=resize)[
        0, 0
    ]
    shares = torch.where(everything > 0.5, (values + 1) / 2, 0)
    rows, columns = (side // CELL for side in shares.shape)
    whole = shares[: rows * CELL, : columns * CELL]
    return whole.reshape(rows, CELL, columns, CELL).mean(dim=(1, 3)), tuple(values.shape)


def runs_of(mask):
    """A mask as runs, by walking over its pixels."""
    counts, value = [0], False
    for pixel in mask.T.reshape(-1).tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return RunLengths(mask.shape, tuple(counts))


@pytest.mark.parametrize("resize", ["squash", "crop", "pad", "none"])
@pytest.mark.parametrize("picture", [(60, 100), (101, 67), (48, 48)], ids=str)
@pytest.mark.parametrize("kind", ["box", "polygon", "runs"])
def test_an_area_covers_the_cells_in_which_the_encoder_sees_it(kind, picture, resize):
    box = (31.0, 9.0, 55.0, 40.0)
    left, top, right, bottom = box
    image = drawn(
        picture, lambda draw: draw.rectangle((left, top, right - 1, bottom - 1), fill="white")
    )
    expected, result = whiteness(image, (64, 48), resize)
    area = {
        "box": Area(box),
        "polygon": Area((0, 0, 1, 1), ((left, top, right, top, right, bottom, left, bottom),)),
        "runs": Area((0, 0, 1, 1), runs=runs_of(np.asarray(image)[..., 0] > 0)),
    }[kind]
    shares = covered([area], picture, result, resize=resize, cell=CELL)
    assert shares.shape == expected.shape
    assert (shares - expected).abs().max() < 0.09
    assert abs(float(shares.sum() - expected.sum())) < 0.04 * float(expected.sum())


def test_what_covers_a_cell_twice_covers_it_once_and_what_is_outside_does_not():
    boxes = [Area((0, 0, 32, 32)), Area((16, 0, 32, 32)), Area((-50, -50, 4, 4))]
    shares = covered(boxes, (64, 64), (64, 64), resize="squash", cell=32)
    assert shares.tolist() == [[1, 0], [0, 0]]
    outside = covered([Area((200, 0, 300, 64))], (64, 300), (64, 64), resize="crop", cell=32)
    assert outside.sum() == 0


def test_masks_are_left_aside_on_request_and_where_they_are_thinner_than_a_pixel():
    triangle = Area((0, 0, 64, 64), ((0, 0, 64, 0, 0, 64),))
    place = {"picture": (64, 64), "result": (64, 64), "resize": "squash", "cell": 64}
    assert covered([triangle], **place).item() == pytest.approx(0.5, abs=0.02)
    assert covered([triangle], masks=False, **place).item() == 1
    empty = Area((0, 0, 32, 64), runs=RunLengths((4, 4), (16,)))
    assert covered([empty], **place).item() == 0.5


def test_the_encoders_own_transform_is_the_measure():
    encoder = DiffusionEncoder.from_pretrained("shapes", resize="crop", size=(32, 64))
    image = drawn((40, 40), lambda draw: draw.rectangle((0, 10, 39, 19), fill="white"))
    values = encoder.transform(image)
    shares = covered(
        [Area((0, 10, 40, 20))],
        (40, 40),
        tuple(values.shape[1:]),
        resize=encoder.config.resize,
        cell=encoder.backbone.reduction,
    )
    expected = ((values[0] + 1) / 2).reshape(8, 4, 16, 4).mean(dim=(1, 3))
    assert (shares - expected).abs().max() < 0.2
    assert EncoderConfig().resize == "squash"


def test_compressed_runs_are_those_of_pycocotools():
    mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for size in ((1, 1), (7, 5), (40, 61), (300, 2)):
        blobs = np.zeros(size, dtype=bool)
        for _ in range(4):
            row, column = (rng.integers(0, side) for side in size)
            blobs[row : row + size[0] // 2 + 1, column : column + size[1] // 3 + 1] ^= True
        packed = mask.encode(np.asfortranarray(blobs.astype(np.uint8)))
        value = {"size": list(packed["size"]), "counts": packed["counts"].decode()}
        polygons, runs = read_outline(value, "here")
        assert polygons == ()
        assert (runs.mask() == blobs).all()
        if blobs.any():
            left, top, width, height = mask.toBbox(packed)
            assert outline_box((), runs) == (left, top, left + width, top + height)


def test_polygons_cover_what_pycocotools_says():
    mask = pytest.importorskip("pycocotools.mask")
    polygon = [10.5, 20.25, 90.0, 5.5, 70.0, 60.0, 30.0, 62.5]
    theirs = mask.decode(mask.frPyObjects([polygon], 64, 96))[..., 0]
    polygons, _ = read_outline([polygon], "here")
    ours = covered([Area((0, 0, 1, 1), polygons)], (64, 96), (64, 96), resize="none", cell=8)
    pooled = torch.from_numpy(theirs.astype(np.float32)).reshape(8, 8, 12, 8).mean(dim=(1, 3))
    assert (ours - pooled).abs().max() < 0.1
    assert abs(float(ours.sum() - pooled.sum())) < 0.02 * float(pooled.sum())
    assert outline_box(polygons, None) == (10.5, 5.5, 90.0, 62.5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("x", "must be a list of polygons"),
        ({"size": [2, 2]}, "must be a list of polygons"),
        ([[1, 2, 3, 4]], "three corners or more"),
        ([[1, 2, 3, 4, 5, 6, 7]], "three corners or more"),
        ([[1, 2, 3, 4, 5, float("nan")]], "finite number"),
        ([["a"] * 6], "finite number"),
        ({"size": [2, 2], "counts": [1, 2]}, "cover 3 pixels and its mask has 4"),
        ({"size": [2, 2], "counts": [-1, 5]}, "of 0 or more"),
        ({"size": [2, 2], "counts": []}, "cover 0 pixels"),
        ({"size": [2], "counts": [4]}, r"\[height, width\]"),
        ({"size": [2, True], "counts": [4]}, "must be an int"),
        ({"size": [2**20, 2**20], "counts": [2**40]}, "too large"),
        ({"size": [2, 2], "counts": 4}, "list or a text"),
        ({"size": [2, 2], "counts": "\u00e9"}, "stands for no number"),
        ({"size": [2, 2], "counts": "o"}, "cut off"),
        ({"size": [2, 2], "counts": "o" * 40}, "more than 60 bits"),
        ({"size": [2, 2], "counts": "N"}, "cover"),
    ],
)
def test_a_broken_outline_is_refused_in_words(value, message):
    with pytest.raises(ConfigError, match=message):
        read_outline(value, "here")


@pytest.mark.parametrize("value", [None, 4, [1, 2, 3], [1, 2, 3, None], [1, 2, 3, float("inf")]])
def test_a_broken_box_is_refused_in_words(value):
    for corners in (True, False):
        with pytest.raises(ConfigError, match="here must be"):
            read_box(value, "here", corners=corners)


def test_a_box_of_coco_is_width_and_height_and_ours_is_edges():
    assert read_box([1, 2, 3, 4], "here", corners=False) == (1, 2, 4, 6)
    assert read_box([1, 2, 3, 4], "here", corners=True) == (1, 2, 3, 4)
    assert Area((1, 2, 1, 4)).is_empty
    assert not Area((1, 2, 1.5, 4)).is_empty
