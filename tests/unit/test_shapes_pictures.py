"""Scenes of little pictures: seeded, visible, and worded truly; false captions are false."""

import random
import re
import sys

import numpy as np
import pytest

from shapes_tools import FOLDER

sys.path.insert(0, str(FOLDER))

from measure_pictures import picture_pair
from picture_falsehoods import false_caption, holds

from diffenc.errors import ConfigError
from diffenc.shapes import (
    PictureScene,
    Thing,
    picture_caption,
    picture_masks,
    render_pictures,
    sample_picture_scenes,
    sample_pictures,
)
from diffenc.shapes.picture_texts import named_things, picture_text
from diffenc.shapes.pictures import NOUNS, PICTURE_RADII

SCENES = list(sample_picture_scenes(60, seed=5))
OFFSETS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "over": (0, -1)}
OFFSETS |= {"below": (0, 1), "under": (0, 1)}
WORDS = {
    *NOUNS,
    *OFFSETS,
    *["a", "an", "and", "the", "of", "to", "picture", "photo", "there", "is", "are", "we", "see"],
}


def is_true(scene, caption):
    """Read a caption by its words alone: which things it names, and which way one lies."""
    words = re.findall(r"\w+", caption)
    nouns = [word for word in words if word in NOUNS]
    way = next((OFFSETS[word] for word in words if word in OFFSETS), None)
    places = {
        noun: [np.array((t.x, t.y)) for t in scene.objects if t.noun == noun] for noun in nouns
    }
    if way is None:
        return all(places.values())
    first, second = (places[noun] for noun in nouns)
    along = [float((a - b) @ way) for a in first for b in second]
    across = [float(abs((a - b) @ way[::-1])) for a in first for b in second]
    return any(one > 0 and one >= 1.5 * other for one, other in zip(along, across, strict=True))


def test_equal_seeds_give_equal_scenes_and_other_seeds_others():
    assert list(sample_picture_scenes(20, seed=5)) == SCENES[:20]
    assert not set(sample_picture_scenes(20, seed=6)) & set(SCENES)


def test_five_to_nine_things_lie_within_the_picture_and_can_all_be_seen():
    assert {len(scene.objects) for scene in SCENES} == {5, 6, 7, 8, 9}
    assert any(len({t.noun for t in scene.objects}) < len(scene.objects) for scene in SCENES)
    for scene in SCENES:
        seen = picture_masks(scene, 96)
        assert seen.sum(axis=0).max() == 1
        for thing, mask in zip(scene.objects, seen, strict=True):
            assert PICTURE_RADII[0] <= thing.radius <= PICTURE_RADII[1]
            assert thing.radius <= min(thing.x, thing.y, 1 - thing.x, 1 - thing.y)
            assert mask.sum() > 0.35 * (thing.radius * 96) ** 2


@pytest.mark.parametrize("size", [96, 131])
def test_masks_are_where_the_picture_is_not_the_ground(size):
    for scene in SCENES[:10]:
        image = np.asarray(render_pictures(scene, size)).astype(int)
        assert image.shape == (size, size, 3)
        change = np.abs(image - scene.ground).max(axis=2)
        masked = picture_masks(scene, size).any(axis=0)
        assert change[~masked].max() < 150  # soft edges, of which less than half is the thing
        assert change[~masked].mean() < 4 < 40 < change[masked].mean()


def test_each_noun_has_a_picture_of_its_own():
    tiles = [
        np.asarray(render_pictures(PictureScene((Thing(noun, 0.5, 0.5, 0.45),)), 64)).astype(int)
        for noun in NOUNS
    ]
    apart = [np.abs(a - b).mean() for i, a in enumerate(tiles) for b in tiles[:i]]
    assert min(apart) > 8


def test_what_lies_in_front_hides_what_lies_behind():
    both = PictureScene((Thing("pizza", 0.5, 0.5, 0.2), Thing("football", 0.55, 0.5, 0.2)))
    alone = PictureScene(both.objects[1:])
    front = picture_masks(alone)[0]
    assert np.array_equal(picture_masks(both)[1], front)
    assert not (picture_masks(both)[0] & front).any()
    assert picture_masks(both)[0].any()


def test_captions_are_true_and_false_ones_are_not():
    rng = random.Random(0)
    related = 0
    for scene in SCENES * 5:
        line = picture_caption(scene, rng)
        assert is_true(scene, line), line
        assert holds(scene, line)
        false = false_caption(scene, line, rng)
        assert false is not None
        assert not is_true(scene, false), (line, false)
        shown = [len(re.findall(r"\w+", text)) for text in (line, false)]
        assert shown[0] == shown[1]
        assert set(re.findall(r"\w+", false)) <= WORDS, false
        related += any(word in OFFSETS for word in line.split())
    assert 60 < related < 150


def test_words_name_things_and_texts_name_what_is_there():
    rng = random.Random(1)
    scene = sample_pictures(rng, nouns=["dog", "cat", "dog", "key", "pizza"])
    assert named_things(scene, ["a", "dog", "left", "of", "a", "key"]) == [
        (),
        (0, 2),
        (),
        (),
        (),
        (3,),
    ]
    for _ in range(50):
        words = re.findall(r"\w+", picture_text(scene, rng))
        assert any(named_things(scene, words)), words
    assert {
        false_caption(scene, text, rng) for text in ("the dog", "where is the cat?", "dog")
    } == {None}


def test_what_there_is_not_is_said():
    with pytest.raises(ConfigError, match=r"no little picture of 'dgo'; known are dog.*'dog'"):
        Thing("dgo", 0.5, 0.5, 0.1)
    with pytest.raises(ConfigError, match="radius above 0"):
        Thing("dog", 0.5, float("nan"), 0.1)
    with pytest.raises(ConfigError, match="5 to 9 of them, got 3"):
        sample_pictures(random.Random(0), count=3)
    with pytest.raises(ConfigError, match="needs 6 nouns, got 5"):
        sample_pictures(random.Random(0), count=6, nouns=NOUNS[:5])
    with pytest.raises(ConfigError, match="0 or more"):
        sample_picture_scenes(-1, seed=0)
    with pytest.raises(ConfigError, match="8 pixels"):
        render_pictures(SCENES[0], 4)
    with pytest.raises(ConfigError, match="8 pixels"):
        picture_masks(SCENES[0], 4)


@pytest.mark.parametrize("kind", ["noun", "relation"])
def test_captions_of_a_pair_are_true_of_their_own_scene_alone(kind):
    rng = random.Random(kind)
    for _ in range(40):
        scenes, lines = picture_pair(rng, kind)
        true = [[is_true(scene, line) for line in lines] for scene in scenes]
        assert true == [[True, False], [False, True]], lines
        apart = [a != b for a, b in zip(*(scene.objects for scene in scenes), strict=True)]
        assert sum(apart) == {"noun": 1, "relation": 2}[kind]


def test_a_noun_that_begins_another_is_changed_as_a_whole():
    scene = sample_pictures(random.Random(1), nouns=["carrot", "car", "dog", "cat", "key"])
    rng = random.Random(0)
    for _ in range(200):
        false = false_caption(scene, "a carrot and a car", rng)
        assert set(false.split()) <= WORDS, false
