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


def painted(size, *parts):
    """Share of each cell of 8 pixels that is painted; parts are boxes in quarters of a pixel."""
    canvas = np.zeros((4 * size[0], 4 * size[1]))
    for left, top, right, bottom in parts:
        canvas[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = 1
    rows, columns = (4 * side // 32 for side in size)
    return torch.from_numpy(canvas.reshape(rows, 32, columns, 32).mean(axis=(1, 3))).float()


def in_pixels(part):
    return tuple(edge / 4 for edge in part)


def some_boxes(rng, count, size, step=1):
    """Boxes in quarters of a pixel, some of which stick out."""
    boxes = []
    for _ in range(count):
        edges = [sorted(rng.choice(range(-8, 4 * side + 8, step), 2, False)) for side in size[::-1]]
        boxes.append(tuple(int(edge) for pair in zip(*edges, strict=True) for edge in pair))
    return boxes


@pytest.mark.parametrize("count", [1, 2, 5, 30])
def test_boxes_cover_what_a_painted_picture_of_them_shows(count):
    rng = np.random.default_rng(count)
    for size in ((64, 48), (16, 80)):
        boxes = some_boxes(rng, count, size)
        areas = [Area(in_pixels(box)) for box in boxes]
        shares = covered(areas, size, size, resize="squash", cell=CELL)
        torch.testing.assert_close(shares, painted(size, *boxes), rtol=0, atol=1e-6)
        again = covered([*areas, *areas[::-1]], size, size, resize="squash", cell=CELL)
        assert torch.equal(again, shares)


def test_half_a_cell_told_twice_is_half_a_cell():
    boxes = [Area((0, 0, 32, 64)), Area((0, 0, 32.001, 64))]
    for masks in (True, False):
        shares = covered(boxes, (64, 64), (64, 64), resize="squash", cell=64, masks=masks)
        assert shares.item() == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("with_boxes", [False, True], ids=["masks", "masks and boxes"])
def test_masks_and_boxes_cover_what_a_painted_picture_of_them_shows(with_boxes):
    size, rng = (64, 48), np.random.default_rng(1)
    masked = some_boxes(rng, 3, size, step=4)
    boxes = some_boxes(rng, 3, size) if with_boxes else []
    areas = [Area(in_pixels(box)) for box in boxes]
    for box in masked:
        left, top, right, bottom = (max(edge // 4, 0) for edge in box)
        mask = np.zeros(size, dtype=bool)
        mask[top:bottom, left:right] = True
        areas.append(Area(in_pixels(box), runs=runs_of(mask)))
    shares = covered(areas, size, size, resize="squash", cell=CELL)
    expected = painted(size, *masked, *boxes)
    assert (expected < sum(painted(size, box) for box in [*masked, *boxes])).any()  # they overlap
    torch.testing.assert_close(shares, expected, rtol=0, atol=1e-6)


def test_a_mask_and_a_box_apart_are_added():
    mask = np.zeros((64, 64), dtype=bool)
    mask[:4, :4] = True
    areas = [Area((0, 0, 4, 4), runs=runs_of(mask)), Area((41.3, 33.7, 50, 60.1))]
    one, other = (covered([each], (64, 64), (64, 64), resize="squash", cell=8) for each in areas)
    both = covered(areas, (64, 64), (64, 64), resize="squash", cell=8)
    assert torch.equal(both, one + other)


@pytest.mark.parametrize("kind", ["box", "polygon"])
def test_what_sticks_out_of_a_picture_covers_nothing_of_its_padding(kind):
    box = (10.0, -9.0, 30.0, 40.0)
    left, top, right, bottom = box
    polygons = ((left, top, right, top, right, bottom, left, bottom),)
    area = Area(box, polygons if kind == "polygon" else ())
    shares = covered([area], (32, 64), (64, 64), resize="pad", cell=8)  # 16 rows above and below
    assert shares[:2].sum() == shares[6:].sum() == 0
    expected = painted((32, 64), (40, 0, 120, 128))
    torch.testing.assert_close(shares[2:6], expected, rtol=0, atol=0.04)


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


@pytest.mark.parametrize("value", [[40, 12, -16, 16], [40, 12, 16, -0.5]])
def test_a_box_of_negative_extent_is_refused(value):
    with pytest.raises(ConfigError, match=r"here must be .*negative width or height"):
        read_box(value, "here", corners=False)


def test_a_box_of_coco_is_width_and_height_and_ours_is_edges():
    assert read_box([1, 2, 3, 4], "here", corners=False) == (1, 2, 4, 6)
    assert read_box([1, 2, 3, 4], "here", corners=True) == (1, 2, 3, 4)
    assert Area((1, 2, 1, 4)).is_empty
    assert not Area((1, 2, 1.5, 4)).is_empty
