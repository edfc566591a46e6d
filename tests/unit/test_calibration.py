import pytest
import torch

from diffenc.errors import ConfigError, ShapeError
from diffenc.scoring.calibration import References, neutral_pictures, reference_pixels
from diffenc.scoring.config import ScorerConfig


def test_neutral_pictures_are_equal_on_every_call_and_of_any_size():
    pictures = neutral_pictures((24, 40))
    assert pictures.shape == (8, 3, 24, 40)
    assert pictures.abs().max() <= 1
    assert torch.equal(pictures, neutral_pictures((24, 40)))
    assert len({tuple(picture.flatten().tolist()) for picture in pictures}) == 8


def test_references_are_what_the_config_asks_for():
    assert reference_pixels(ScorerConfig(), (8, 8), None).shape == (0, 3, 8, 8)
    gray = reference_pixels(ScorerConfig(calibration="gray"), (8, 16), None)
    assert torch.equal(gray, torch.zeros(1, 3, 8, 16))


def test_given_pictures_are_kept_in_bytes_and_resized_on_demand():
    generator = torch.Generator().manual_seed(0)
    picture = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=generator)
    given = References.read(picture, ScorerConfig(), default_size=16, multiple=8)
    config = ScorerConfig(calibration="given", reference_digest=given.digest)
    values = reference_pixels(config, (16, 16), given)
    assert torch.equal(((values + 1) * 127.5).round(), given.pictures.float())
    assert torch.equal(given.pictures, picture)
    again = References.read(given.pictures, ScorerConfig(), default_size=16, multiple=8)
    assert again.digest == given.digest
    assert reference_pixels(config, (8, 24), given).shape == (2, 3, 8, 24)
    other = ScorerConfig(calibration="given", reference_digest="2-00")
    with pytest.raises(ConfigError, match=r"needs the reference images 2-00, and there are others"):
        reference_pixels(other, (16, 16), given)
    with pytest.raises(ConfigError, match="there are none"):
        reference_pixels(config, (16, 16), None)


@pytest.mark.parametrize(
    "pictures",
    [
        torch.zeros(1, 3, 8, 8),
        torch.zeros(1, 3, 8, 8, dtype=torch.int8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 4, 8, 8, dtype=torch.uint8),
        torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 3, 0, 8, dtype=torch.uint8),
    ],
    ids=lambda pictures: f"{tuple(pictures.shape)} {pictures.dtype}",
)
def test_other_tensors_are_no_pictures(pictures):
    with pytest.raises(ShapeError, match="reference picture"):
        References(pictures)
