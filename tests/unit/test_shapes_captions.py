"""Every caption is true of its scene, by a reader that shares no code with the writer."""

import random
import re
from collections import Counter

import pytest

from diffenc.errors import ConfigError
from diffenc.shapes.captions import caption, captions, noun_phrase
from diffenc.shapes.scenes import Scene, SceneObject, perturb, sample_scene, sample_scenes
from shapes_oracle import UngrammaticalError, is_true

SCENES = list(sample_scenes(400, seed=31))
TEXTS = [captions(scene, 8, seed=number) for number, scene in enumerate(SCENES)]
ALL_TEXTS = [text for texts in TEXTS for text in texts]

THING = SceneObject("circle", "orange", "small", 0.2, 0.5, 0.13)
OTHER = SceneObject("star", "blue", "large", 0.7, 0.5, 0.2)


@pytest.mark.parametrize(
    ("text", "true"),
    [
        ("an orange circle left of a blue star", True),
        ("a big blue star to the right of a small orange circle", True),
        ("a blue star and an orange circle", True),
        ("a blue star left of an orange circle", False),
        ("an orange star left of a blue circle", False),
        ("an orange circle above a blue star", False),
        ("a large orange circle", False),
        ("an orange circle on the left", True),
        ("an orange circle at the top", False),
        ("two orange circles", False),
        ("there are two blue stars and an orange circle", False),
        ("a star on a white background", True),
        ("a star on a black background", False),
    ],
)
def test_the_reader_itself_knows_true_from_false(text, true):
    assert is_true(text, Scene((THING, OTHER))) == true


@pytest.mark.parametrize(
    "text",
    ["", "a orange circle", "two red circle", "there are a star", "a circle under", "red star"],
)
def test_the_reader_itself_refuses_what_is_no_caption(text):
    with pytest.raises(UngrammaticalError):
        is_true(text, Scene((THING, OTHER)))


def test_every_caption_is_true_of_its_scene():
    assert [
        (text, scene)
        for scene, texts in zip(SCENES, TEXTS, strict=True)
        for text in texts
        if not is_true(text, scene)
    ] == []


def test_captions_of_overlapping_and_of_perturbed_scenes_are_true():
    rng = random.Random(0)
    for scene in sample_scenes(200, seed=32, overlap=0.5):
        twin = perturb(scene, rng)
        assert is_true(caption(scene, rng), scene)
        assert is_true(caption(twin, rng), twin)


def test_captions_tell_scenes_apart():
    others = [*SCENES[1:], SCENES[0]]
    true = [is_true(texts[0], other) for texts, other in zip(TEXTS, others, strict=True)]
    assert sum(true) < 0.1 * len(SCENES)


def test_captions_are_short_lower_case_words():
    for text in ALL_TEXTS:
        assert re.fullmatch("[a-z, ]+", text)
        assert len(re.findall(r"\w+|,", text)) <= 30
        assert text == " ".join(text.split())


@pytest.mark.parametrize(
    "form",
    [
        r"a picture of .*",
        r"a photo of .*",
        r"there is .*",
        r"there are .*",
        r"we see .*",
        r".* (to the )?left of .*",
        r".* (to the )?right of .*",
        r".* (above|over) .*",
        r".* (below|under) .*",
        r".* on the (left|right)",
        r".* at the (top|bottom)",
        r".* in the middle",
        r".* on a (white|gray|black) background",
        r"two \w+ \w+s",
        r"three \w+ \w+s",
        r"two \w+ \w+s and .*",
        r".*, .* and .*",
        r".*\b(small|large|big) .*",
        r"an? (circle|square|triangle|star)",
        r"an? (\w+ )?(circle|square|triangle|star) .* an? (circle|square|triangle|star)",
    ],
)
def test_every_form_of_caption_is_written(form):
    assert any(re.fullmatch(form, text) for text in ALL_TEXTS)


def test_captions_of_one_scene_differ_and_are_as_many_as_asked():
    assert Counter(len(texts) for texts in TEXTS)[8] > 0.5 * len(TEXTS)
    for texts in TEXTS:
        assert 3 < len(texts) == len(set(texts)) <= 8
    assert captions(SCENES[0], 0) == []


def test_equal_seeds_give_equal_captions_and_other_seeds_others():
    scene = SCENES[0]
    assert captions(scene, 5, seed=1) == captions(scene, 5, seed=1)
    assert captions(scene, 2, seed=1) == captions(scene, 5, seed=1)[:2]
    assert caption(scene, random.Random(2)) == caption(scene, random.Random(2))
    assert len({tuple(captions(scene, 5, seed=seed)) for seed in range(10)}) > 5


def test_captions_stay_what_they_were_when_the_bundled_models_learnt_them():
    (scene,) = sample_scenes(1, seed=4)
    assert captions(scene, 3) == [
        "a photo of a large red circle",
        "a red circle on a white background",
        "a big red circle",
    ]


def test_colours_are_left_out_of_a_relation_only_where_shapes_tell_the_two_apart():
    bare = re.compile(r"an? (\w+) (?:(?!and)[a-z]+ )+an? (\w+)")
    said = [match.groups() for text in ALL_TEXTS if (match := bare.fullmatch(text))]
    assert said
    assert all(first != second for first, second in said)


def test_sizes_are_told_only_where_all_of_a_group_agree():
    rng = random.Random(0)
    kinds = [("red", "star")] * 2
    mixed = sample_scene(rng, kinds=kinds, sizes=["small", "large"])
    alike = sample_scene(rng, kinds=kinds, sizes=["large", "large"])
    assert not any("small" in text or "large" in text for text in captions(mixed, 20))
    assert any("two large red stars" in text for text in captions(alike, 20))


@pytest.mark.parametrize("objects", [(), (THING,) * 10], ids=len)
def test_scenes_without_words_are_refused(objects):
    scene = Scene(objects)
    with pytest.raises(ConfigError, match=f"1 to 9 objects, this one has {len(objects)}"):
        caption(scene, random.Random(0))
    with pytest.raises(ConfigError, match="1 to 9 objects"):
        captions(scene, 2)


def test_a_negative_number_of_captions_is_refused():
    with pytest.raises(ConfigError, match="0 or more, got -1"):
        captions(SCENES[0], -1)


def test_noun_phrases_have_the_right_article_and_number():
    assert noun_phrase(shape="star", color="orange") == "an orange star"
    assert noun_phrase(shape="star", color="orange", size_word="big") == "a big orange star"
    assert noun_phrase(color="red", count=2) == "two red objects"
    assert noun_phrase() == "an object"
    assert noun_phrase(shape="square", article=False) == "square"
