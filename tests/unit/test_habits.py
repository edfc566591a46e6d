"""What people try who come from torch, timm and sklearn works, or is told what to try."""

import copy
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers.utils import logging

from diffenc import CrossAttnScorer, DiffusionEncoder, EncoderConfig, FusedEncoder, Size
from diffenc.errors import ConfigError, PromptError, TapError
from diffenc.inputs.pictures import world
from diffenc.shapes import masks, render, sample_scenes

TEXT = "a red circle left of a blue square"
PHOTO = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


@pytest.fixture(scope="module")
def encoder():
    return DiffusionEncoder.from_pretrained("shapes")


@pytest.fixture(scope="module")
def scorer(encoder):
    return CrossAttnScorer(encoder.backbone)


@pytest.fixture(scope="module")
def pictures():
    return [render(scene, 80) for scene in sample_scenes(3, seed=0)]


@pytest.fixture(scope="module")
def features(encoder, pictures):
    return encoder.extract(pictures[0], TEXT, conditioning="cfg")


@pytest.fixture(scope="module")
def maps(scorer, pictures):
    return scorer.word_maps(pictures[0], TEXT, ["circle", "square", "red"])


def test_a_size_by_names_is_height_and_width_wherever_one_is_taken(encoder, pictures):
    named = Size(width=96, height=64)
    assert named == (64, 96)
    config = replace(encoder.config, size=named, grid=Size(height=4, width=6))
    wide = DiffusionEncoder(encoder.backbone, config)
    assert wide.transform(pictures[0]).shape == (3, 64, 96)
    assert wide(pictures[0]).shape[1] == 24
    assert EncoderConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("resize", ["squash", "crop", "pad", "none"])
def test_features_of_transformed_pictures_are_those_of_the_pictures(encoder, resize):
    picture = render(next(sample_scenes(1, seed=4)), 80).crop((0, 0, 80, 56))
    other = DiffusionEncoder(encoder.backbone, replace(encoder.config, resize=resize))
    torch.testing.assert_close(other(other.transform(picture), TEXT), other(picture, TEXT))


def test_a_loader_of_workers_takes_the_transform(encoder, pictures):
    transform = pickle.loads(pickle.dumps(encoder.transform))
    batch = next(iter(DataLoader([transform(p) for p in pictures], batch_size=3)))
    torch.testing.assert_close(encoder(batch, TEXT), encoder(pictures, TEXT))


def test_features_are_read_by_place_as_by_name(features):
    names = list(features)
    assert features[0] is features[names[0]]
    assert features[-1] is features[names[-1]]
    assert list(features[1:]) == names[1:]


def test_a_slice_of_features_has_all_its_conditionings(features):
    some = features[:2]
    for conditioning in ("uncond", "cond", "concat"):
        whole = features.select(conditioning)
        for tap, values in some.select(conditioning).items():
            assert torch.equal(values, whole[tap])
    assert some.tokens().shape[-1] == sum(values.shape[1] for values in some.values())


@pytest.mark.parametrize("key", [3, -4, (0, 1), "up_blocks.0.attentions.2", 1.0, None])
def test_a_wrong_key_says_which_taps_there_are_and_what_rows_are(features, key):
    with pytest.raises(TapError, match=r"up_blocks.0.attentions.1.*its rows are the images"):
        features[key]


def test_an_empty_slice_of_features_is_an_error(features):
    with pytest.raises(TapError, match="there are 3"):
        features[5:]


def test_features_say_where_a_tensor_is_to_be_had(features):
    with pytest.raises(AttributeError, match=r"features\[0\]\.shape.*features\.tokens\(\)\.shape"):
        _ = features.shape
    with pytest.raises(AttributeError, match=r"no attribute 'shap'$"):
        _ = features.shap


def test_features_survive_copies_and_pickles(features):
    for twin in (copy.copy(features), pickle.loads(pickle.dumps(features))):
        assert torch.equal(twin[0], features[0])


def test_features_print_a_line_for_each_tap(features):
    first, *taps, last = repr(features).splitlines()
    assert first == "Features('cfg', guidance_scale=1.5"
    assert taps[0] == f"  {next(iter(features))!r}: {tuple(features[0].shape)},"
    assert (len(taps), last) == (3, ")")


def test_word_maps_are_read_by_place_as_by_word(maps):
    assert maps[0] is maps["circle"]
    assert maps[-1] is maps["red"]
    assert maps[:2] == [maps["circle"], maps["square"]]
    assert repr(maps).splitlines()[1].startswith("  HeatMap('circle', ")


def test_a_word_without_a_map_is_told_with_those_that_have_one(maps):
    with pytest.raises(PromptError, match=r"'squar'.*Did you mean 'square'.*words=\['squar'\]"):
        maps["squar"]
    with pytest.raises(ConfigError, match="there are 3"):
        maps[3]
    assert maps.get("blue") is None
    assert "blue" not in maps


def test_words_point_at_their_objects_by_default(scorer):
    hits = []
    for scene in sample_scenes(60, seed=900_000):
        kinds = {thing.shape: index for index, thing in enumerate(scene.objects)}
        colors = {thing.color for thing in scene.objects}
        if not len(scene.objects) == len(kinds) == len(colors) == 2:
            continue
        text = " and ".join(f"a {thing.color} {thing.shape}" for thing in scene.objects)
        maps = scorer.word_maps(render(scene), text, list(kinds))
        for word, index in kinds.items():
            values = maps[word].array
            row, column = divmod(int(values.argmax()), values.shape[1])
            side = 64 // values.shape[0]
            hits.append(masks(scene)[index][row * side + side // 2, column * side + side // 2])
    assert len(hits) >= 20
    assert sum(map(bool, hits)) / len(hits) >= 0.9


@pytest.fixture
def not_yet(monkeypatch):
    monkeypatch.setattr(world, "_warned", False)


def test_the_bundled_model_says_once_that_it_knows_no_photographs(encoder, not_yet):
    with pytest.warns(UserWarning, match="coloured shapes on a plain background"):
        encoder(PHOTO, "a woman")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(PHOTO, "a flag")


def test_scores_and_word_maps_say_so_too(scorer, not_yet):
    with pytest.warns(UserWarning, match="'sd2.1-base'"):
        scorer.word_maps(Image.open(PHOTO), "a woman")


def test_nothing_is_said_of_scenes(encoder, not_yet):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for side in (32, 64, 200):
            encoder([render(scene, side) for scene in sample_scenes(2, seed=side)], TEXT)
    assert all(
        world.is_flat(encoder.transform(render(scene))) for scene in sample_scenes(100, seed=1)
    )


@pytest.mark.parametrize("enabled", [True, False])
def test_loading_writes_nothing_and_leaves_bars_as_they_were(encoder, capfd, enabled):
    before = logging.is_progress_bar_enabled()
    switches = {True: logging.enable_progress_bar, False: logging.disable_progress_bar}
    switches[enabled]()
    try:
        FusedEncoder("shapes-clip", encoder)
        DiffusionEncoder.from_pretrained("shapes")
        assert capfd.readouterr() == ("", "")
        assert logging.is_progress_bar_enabled() is enabled
    finally:
        switches[before]()
