import json

import pytest
import torch
from safetensors.torch import save_file

from diffenc import CrossAttnScorer, load_backbone
from diffenc.errors import BackboneError, ConfigError, DiffencError, OutputError


@pytest.fixture(scope="module")
def backbone(tiny_sd_folder):
    return load_backbone(tiny_sd_folder)


def pictures(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 24, 40), dtype=torch.uint8, generator=generator)


@pytest.fixture
def saved(backbone, tmp_path):
    scorer = CrossAttnScorer(backbone)
    scorer.config = CrossAttnScorer.from_pretrained(backbone, preset="paper", size=64).config
    scorer.calibrate(pictures(3))
    scorer.save_pretrained(tmp_path / "scorer")
    return tmp_path / "scorer"


def refused(folder, match):
    with pytest.raises(BackboneError, match=match):
        CrossAttnScorer.from_pretrained(folder)


@pytest.mark.long
def test_what_was_saved_comes_back(saved):
    again = CrossAttnScorer.from_pretrained(saved)
    assert len(again.references.pictures) == 3
    assert again.references.digest == again.config.reference_digest
    assert {path.name for path in saved.iterdir()} == {
        "references.safetensors",
        "scorer_config.json",
    }


@pytest.mark.parametrize(
    "tensors",
    [
        {"pictures": pictures(3).float()},
        {"pictures": pictures(3)[0]},
        {"pictures": pictures(3)[:, :2].clone()},
        {"pictures": pictures(3)[:0]},
        {"images": pictures(3)},
        {"pictures": pictures(3), "more": pictures(1)},
        {},
    ],
    ids=["floats", "one", "two channels", "none", "name", "more", "empty"],
)
def test_what_is_no_reference_is_refused(saved, tensors):
    save_file(tensors, saved / "references.safetensors")
    refused(saved, "cannot read the reference images")


@pytest.mark.parametrize("others", [pictures(2), pictures(3, seed=1)], ids=["fewer", "others"])
def test_other_references_are_not_scored_with(saved, others):
    save_file({"pictures": others}, saved / "references.safetensors")
    scorer = CrossAttnScorer.from_pretrained(saved)
    with pytest.raises(ConfigError, match=r"needs the reference images 3-.*there are others"):
        scorer(pictures(1), "red")


def test_references_that_are_missing_or_cut_off(saved):
    path = saved / "references.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(saved, r"cannot read .*references\.safetensors")
    path.unlink()
    with pytest.raises(ConfigError, match=r"needs the reference images 3-.*there are none"):
        CrossAttnScorer.from_pretrained(saved)(pictures(1), "red")


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", "[" * 5000, '{"backbone": "shapes", "seed": NaN}']
)
def test_configs_that_are_no_json(saved, text):
    (saved / "scorer_config.json").write_text(text)
    refused(saved, r"scorer_config\.json")


@pytest.mark.parametrize(
    "values",
    [
        {"backbone": None},
        {"backbone": ""},
        {"backbone": ["shapes"]},
        {"parts": []},
        {"parts": {"unet": 3}},
        {"parts": "unet"},
    ],
    ids=str,
)
def test_fields_are_of_their_types(saved, values):
    path = saved / "scorer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    refused(saved, r"is not a config that CrossAttnScorer\.save_pretrained wrote|names no model")


def test_saving_again_without_references_leaves_none(saved, backbone):
    CrossAttnScorer.from_pretrained(backbone, preset="paper").save_pretrained(saved)
    assert [path.name for path in saved.iterdir()] == ["scorer_config.json"]
    assert CrossAttnScorer.from_pretrained(saved).references is None


def test_saving_that_stops_half_way_is_seen(saved, backbone, monkeypatch):
    """The config is written last: with other references beside the old one it would be wrong."""

    def full(*_args, **_options):
        raise OutputError("disk full")

    monkeypatch.setattr("diffenc.scoring.saved.write_json", full)
    scorer = CrossAttnScorer.from_pretrained(backbone, preset="paper", size=64)
    scorer.calibrate(pictures(1))
    with pytest.raises(OutputError, match="disk full"):
        scorer.save_pretrained(saved)
    with pytest.raises(DiffencError):
        CrossAttnScorer.from_pretrained(saved)


def test_folders_that_cannot_be_made(backbone, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        CrossAttnScorer.from_pretrained(backbone).save_pretrained(tmp_path / "file" / "scorer")
