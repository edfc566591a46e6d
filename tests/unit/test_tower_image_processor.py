import copy
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from diffenc.errors import ConfigError, ImageError
from diffenc.hosts.image_processor import TowerImageProcessor
from diffenc.inputs.images import to_pixel_values


@pytest.fixture
def picture() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_every_form_in_which_hosts_ask(picture) -> None:
    processor = TowerImageProcessor(32)
    expected = to_pixel_values(picture, size=32)
    one = processor.preprocess(picture, return_tensors="pt")["pixel_values"]
    assert isinstance(one, torch.Tensor)
    assert torch.equal(one, expected)
    assert torch.equal(processor(picture, return_tensors="pt")["pixel_values"][0], expected[0])
    several = processor([picture] * 3, return_tensors="pt")
    assert several.pixel_values.shape == (3, 3, 32, 32)
    assert processor.preprocess(picture, return_tensors="pt")["pixel_values"].half().dtype
    arrays = processor.preprocess(np.asarray(picture))["pixel_values"]
    assert isinstance(arrays, list)
    assert np.array_equal(arrays[0], expected[0].numpy())
    stacked = processor([np.asarray(picture)] * 2, return_tensors="np")["pixel_values"]
    assert stacked.shape == (2, 3, 32, 32)
    resized = processor.preprocess(
        picture, return_tensors="pt", do_center_crop=False, size={"shortest_edge": 900}
    )
    assert resized["pixel_values"].shape == (1, 3, 32, 32)


def test_lists_of_samples_are_joined_and_pictures_written_out_are_not(picture) -> None:
    processor = TowerImageProcessor(64)
    expected = processor([picture] * 3, return_tensors="pt")["pixel_values"]
    nested = processor([[picture], [], [picture, picture], None], return_tensors="pt")
    assert torch.equal(nested["pixel_values"], expected)
    array = np.asarray(picture.convert("RGB"))
    with pytest.raises(ImageError):
        processor(array.tolist(), return_tensors="pt")


def test_attributes_that_hosts_read() -> None:
    processor = TowerImageProcessor(48)
    assert processor.image_mean == processor.image_std == [0.5] * 3
    assert processor.crop_size == {"height": 48, "width": 48}
    assert processor.size == {"shortest_edge": 48, "height": 48, "width": 48}
    assert isinstance(processor.size, dict)


def test_the_padding_of_hosts_is_grey_afterwards() -> None:
    processor = TowerImageProcessor(16)
    color = tuple(int(value * 255) for value in processor.image_mean)
    values = processor(Image.new("RGB", (9, 9), color), return_tensors="pt")["pixel_values"]
    assert values.abs().max() < 0.01


def test_rules_of_resizing(picture) -> None:
    for rule in ("squash", "crop", "pad"):
        found = TowerImageProcessor(32, rule)(picture, return_tensors="pt")["pixel_values"]
        assert torch.equal(found, to_pixel_values(picture, size=32, resize=rule))


def test_it_is_copied_pickled_and_saved(picture, tmp_path) -> None:
    processor = TowerImageProcessor(32, "pad")
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    processor.save_pretrained(tmp_path)
    json.loads((tmp_path / "preprocessor_config.json").read_text())
    for twin in (
        copy.deepcopy(processor),
        pickle.loads(pickle.dumps(processor)),
        TowerImageProcessor.from_pretrained(tmp_path),
    ):
        assert torch.equal(twin(picture, return_tensors="pt")["pixel_values"], expected)
        assert twin.size == processor.size


@pytest.mark.parametrize(
    "size",
    [
        *(0, -4, {}, {"longest_edge": 3}, 2.5, True, (64, 96), [64], "64", None),
        *({"height": 64, "width": 96}, {"shortest_edge": 64, "height": 32}, {"height": [64]}),
    ],
    ids=str,
)
def test_sizes_that_are_none_are_told(size) -> None:
    with pytest.raises(ConfigError, match="size must be"):
        TowerImageProcessor(size)


def test_a_side_is_any_whole_number_and_a_rule_of_resizing_one_that_there_is() -> None:
    assert TowerImageProcessor(np.int64(32)).size["height"] == 32
    assert TowerImageProcessor({"height": 32, "width": 32}).crop_size["width"] == 32
    with pytest.raises(ConfigError, match="resize must be one of"):
        TowerImageProcessor(32, "stretch")


def test_pictures_that_are_none_are_told() -> None:
    with pytest.raises(ImageError):
        TowerImageProcessor(32)("nowhere.png", return_tensors="pt")
