"""Areas that cannot be meant in their picture are counted and told before anything is learnt."""

import json
import re

import pytest
from PIL import ExifTags, Image

from diffenc import DiffusionEncoder
from diffenc.errors import ConfigError, ImageError
from diffenc.grounding import (
    Area,
    GroundedImage,
    GroundedText,
    Phrase,
    PhraseDataset,
    RunLengths,
    collate_phrases,
    read_phrases,
)
from diffenc.grounding.picture_bounds import picture_size
from diffenc.grounding.reading import find_phrases
from phrases_data import pictures, write

SIDE = 64


@pytest.fixture
def images(tmp_path):
    return pictures(tmp_path / "images", "a.jpg", size=(SIDE, SIDE))


def line(**phrase):
    return {"image": "a.jpg", "text": "a red circle", "phrases": [{"words": "circle", **phrase}]}


def read(tmp_path, images, *lines, **options):
    text = "".join(json.dumps(each) + "\n" for each in lines)
    return read_phrases(write(tmp_path / "p.jsonl", text), images, **options)


def region(**box):
    return [{"id": 1, "regions": [{"phrase": "a man", **box}]}]


def turned(path, size, orientation=6):
    """Write a picture that is to be turned by a quarter; `size` is (width, height) as stored."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "gray").save(path, exif=exif)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([0.3, 0.6, 0.57, 0.88], "1 with areas within the first pixel .*not shares"),
        ([0, 0, 1, 1], "within the first pixel of a picture of 64 x 64"),
        (
            [20, 40, 3600, 5600],
            r"1 with areas outside of their picture \(sample 1 on a.jpg: the box \[20,",
        ),
        ([200, 200, 300, 300], "mostly outside of the picture of 64 x 64"),
        ([-30, 0, 20, 64], "mostly outside"),
        ([64, 0, 65, 20], "mostly outside"),
        ([-2, -2, 0, 20], "mostly outside"),
        ([0, 0, 1e9, 1e9], "mostly outside"),
    ],
)
def test_a_box_that_cannot_be_meant_is_told(tmp_path, images, box, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, images, line(boxes=[[4, 4, 40, 40], box]))
    left, top, right, bottom = box
    outline = [left, top, right, top, right, bottom, left, bottom]
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, images, line(segmentations=[[outline]]))


@pytest.mark.parametrize(
    "box",
    [
        [0, 0, 64, 64],
        [-1, -2, 66, 65],
        [-2, 0, 1, 20],
        [-30, 0, 31, 64],
        [62, 62, 64.5, 66],
        [0, 0, 1.5, 1],
    ],
)
def test_a_box_that_sticks_out_a_little_or_has_half_of_itself_inside_is_kept(tmp_path, images, box):
    (sample,) = read(tmp_path, images, line(boxes=[box]))
    assert sample.texts[0].phrases[0].areas == (Area(tuple(box)),)


def test_what_cannot_be_meant_is_counted_by_kind_and_left_out_on_request(tmp_path, images):
    lines = [
        line(boxes=[[4, 4, 40, 40]]),
        line(boxes=[[0.1, 0.1, 0.5, 0.5]]),
        line(boxes=[[90, 4, 99, 40]]),
        line(boxes=[[4, 90, 40, 99]]),
        {**line(boxes=[[4, 4, 40, 40]]), "size": [64, 32]},
    ]
    with pytest.raises(ConfigError, match=r"4 of 5 records .* 1 with areas within .* 2 with areas"):
        read(tmp_path, images, *lines)
    assert [each.key for each in read(tmp_path, images, *lines, skip_broken=True)] == ["1"]
    samples, faults = find_phrases(tmp_path / "p.jsonl", images, left_out=[1, 2, 3, 4])
    assert ([each.place for each in samples], [each.place for each in faults]) == (
        [0],
        [1, 2, 3, 4],
    )
    samples, _ = find_phrases(tmp_path / "p.jsonl", images, left_out=[])
    assert len(samples) == 5  # as the run began, which was checked then


@pytest.mark.parametrize("size", [[10, 10], [32, 128], [64, 63]])
def test_a_mask_has_the_size_of_its_picture(tmp_path, images, size):
    runs = {"size": size, "counts": [0, size[0] * size[1]]}
    with pytest.raises(ConfigError, match=f"1 with masks of another size .* {size[0]} x {size[1]}"):
        read(tmp_path, images, line(segmentations=[runs]))
    with pytest.raises(ConfigError, match="1 with masks of another size"):
        read(tmp_path, images, {**line(segmentations=[runs]), "size": [64, 64]})
    whole = {"size": [64, 64], "counts": [0, 4096]}
    assert read(tmp_path, images, line(segmentations=[whole]))


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_the_size_is_that_of_the_upright_picture(tmp_path, orientation, ending):
    path = tmp_path / f"a.{ending}"
    turned(path, (40, 100), orientation)
    encoder_sees = (100, 40) if orientation < 5 else (40, 100)
    assert picture_size(path) == encoder_sees


def test_a_picture_is_not_decoded_for_its_size(tmp_path):
    turned(tmp_path / "a.jpg", (400, 1000))
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(content[: len(content) // 2])
    assert picture_size(tmp_path / "b.jpg") == (400, 1000)
    (tmp_path / "c.jpg").write_bytes(b"x")
    assert picture_size(tmp_path / "c.jpg") is None
    assert picture_size(tmp_path / "gone.jpg") is None


def test_regions_are_measured_in_the_upright_picture(tmp_path):
    images = tmp_path / "images"
    turned(images / "1.jpg", (40, 100))  # 40 high and 100 wide once it is upright
    path = write(tmp_path / "r.json", region(x=5, y=60, width=30, height=30))
    with pytest.raises(ConfigError, match=r"outside of their picture .* 40 x 100"):
        read_phrases(path, images)
    path = write(tmp_path / "r.json", region(x=60, y=5, width=30, height=30))
    assert len(read_phrases(path, images)) == 1


def test_another_copy_of_a_picture_is_told_before_it_is_learnt_from(tmp_path):
    images = tmp_path / "images"
    turned(images / "a.jpg", (40, 100))
    table = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 100}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}],
        "categories": [{"id": 1, "name": "dog"}],
    }
    path = write(tmp_path / "i.json", table)
    with pytest.raises(
        ConfigError,
        match=r"1 with pictures of another size than .*has 40 x 100 .*100 x 40",
    ):
        read_phrases(path, images)
    table["images"][0].update(width=100, height=40)
    assert len(read_phrases(write(path, table), images)) == 1


def test_where_a_header_cannot_be_read_the_annotated_size_counts(tmp_path, images):
    (images / "a.jpg").write_bytes(b"x")  # told when pictures are decoded
    assert read(tmp_path, images, line(boxes=[[90, 4, 99, 40]]))
    told = {**line(boxes=[[90, 4, 99, 40]]), "size": [64, 64]}
    with pytest.raises(ConfigError, match="outside of their picture"):
        read(tmp_path, images, told)


def test_samples_made_by_hand_are_looked_at_when_their_picture_is(images):
    encoder = DiffusionEncoder.from_pretrained("shapes")

    def sample(area):
        text = GroundedText("a red circle", (Phrase(((6, 12),), (area,)),))
        return GroundedImage("x", images / "a.jpg", (text,))

    box = (4, 4, 40, 40)
    areas = {
        "99, 40] lies mostly outside": Area((90, 4, 99, 40)),
        "10 x 10": Area(box, runs=RunLengths((10, 10), (0, 100))),
        "70, 40] lies mostly outside": Area(box, ((66, 4, 70, 4, 70, 40),)),
        "0.5, 0.7] lies within the first pixel": Area(box, ((0.1, 0.1, 0.5, 0.1, 0.5, 0.7),)),
    }
    good = sample(Area(box))
    assert PhraseDataset([good], encoder)[0]["masks"]
    for message, area in areas.items():
        with pytest.raises(ImageError, match=rf"a\.jpg: .*{re.escape(message)}"):
            PhraseDataset([sample(area)], encoder)[0]
        dataset = PhraseDataset([sample(area), good], encoder, skip_broken=True)
        batch = collate_phrases([dataset[0], dataset[1]])
        assert batch["whole"].tolist() == [0, 1]
        assert message in batch["broken"][0]
