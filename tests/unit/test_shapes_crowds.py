"""Crowded scenes: seeded, readable, and worded truly; false captions are false."""

import random
import sys

import pytest

from shapes_tools import FOLDER

sys.path.insert(0, str(FOLDER))

from crowd_texts import false_caption, holds
from grounding import spoken_of
from transformers import CLIPTokenizer

from diffenc.errors import ConfigError
from diffenc.models.shapes import shapes_folder
from diffenc.shapes import (
    Scene,
    captions,
    masks,
    questions,
    render_array,
    sample_crowd,
    sample_crowds,
)
from diffenc.shapes.crowds import CROWD_RADII
from diffenc.shapes.phrases import scene_text
from shapes_oracle import answer, is_true

CROWDS = list(sample_crowds(120, seed=5))


def test_equal_seeds_give_equal_crowds_and_other_seeds_others():
    assert list(sample_crowds(20, seed=3)) == list(sample_crowds(40, seed=3))[:20]
    assert not set(sample_crowds(20, seed=3)) & set(sample_crowds(20, seed=4))


@pytest.mark.long
def test_five_to_nine_objects_lie_within_the_picture_and_can_all_be_seen():
    assert {len(scene.objects) for scene in CROWDS} == {5, 6, 7, 8, 9}
    for scene in CROWDS:
        seen = masks(scene, 128).sum(axis=(1, 2))
        for thing, pixels in zip(scene.objects, seen, strict=True):
            low, high = CROWD_RADII[thing.size]
            assert low <= thing.radius <= high
            assert thing.radius < min(thing.x, thing.y, 1 - thing.x, 1 - thing.y)
            assert pixels > 0.5 * (thing.radius * 128) ** 2  # a star alone covers 1.1 of it


@pytest.mark.long
def test_some_objects_are_partly_hidden_and_most_crowds_hold_distractors():
    alone = [
        masks(Scene((thing,), scene.background), 128).sum()
        for scene in CROWDS
        for thing in scene.objects
    ]
    seen = [pixels for scene in CROWDS for pixels in masks(scene, 128).sum(axis=(1, 2))]
    hidden = sum(a > s for a, s in zip(alone, seen, strict=True))
    assert 0.02 < hidden / len(alone) < 0.3
    shared = sum(len({t.color for t in s.objects}) < len(s.objects) for s in CROWDS)
    assert shared > 0.9 * len(CROWDS)


def test_a_crowd_of_given_kinds_has_them():
    kinds = [("red", "star")] * 2 + [("blue", "circle")] * 3
    assert [thing.kind for thing in sample_crowd(random.Random(0), kinds=kinds).objects] == kinds


@pytest.mark.parametrize(
    "options", [{"count": 4}, {"count": 10}, {"count": 6, "kinds": []}], ids=str
)
def test_what_is_no_crowd_is_refused(options):
    with pytest.raises(ConfigError, match=r"5 to 9 objects|6 kinds"):
        sample_crowd(random.Random(0), **options)


def test_captions_of_crowds_are_true_by_another_reader():
    for scene in CROWDS:
        for text in captions(scene, 5):
            assert is_true(text, scene), (text, scene)
            assert holds(scene, text)


def test_questions_about_crowds_have_the_answer_that_geometry_gives():
    kinds = set()
    for scene in CROWDS:
        for question in questions(scene)[:12]:
            kinds.add(question.kind)
            assert answer(question.text, scene)[0] == question.answer, (question, scene)
    assert len(kinds) == 7


def test_false_captions_are_false_by_another_reader():
    rng = random.Random(0)
    changed = 0
    for scene in CROWDS:
        for text in captions(scene, 5):
            wrong = false_caption(scene, text, rng)
            if wrong is not None:
                changed += 1
                assert not is_true(wrong, scene), (text, wrong, scene)
                assert wrong.replace("an ", "a ").split() != text.replace("an ", "a ").split()
    assert changed > 400
    assert false_caption(CROWDS[0], "what color is the star?", rng) is None


def test_every_naming_word_speaks_of_what_it_describes():
    tokenizer = CLIPTokenizer.from_pretrained(shapes_folder() / "tokenizer")
    scene = sample_crowd(
        random.Random(0),
        kinds=[("red", "star"), ("red", "circle"), ("blue", "star"), ("blue", "square")] * 2,
    )
    expected = {"red": 0b00110011, "star": 0b00010001}
    text = "the red star"
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    bits = spoken_of(tokenizer, text, scene, colors=True)
    named = {piece.removesuffix("</w>"): bit for piece, bit in zip(pieces, bits, strict=False)}
    assert {word: named[word] for word in expected} == expected
    assert spoken_of(tokenizer, "a blue object", scene, colors=True)[3] == 0b11001100
    assert sum(map(bool, spoken_of(tokenizer, text, scene))) == 1  # colours left to themselves


def test_texts_for_training_fit_the_tokenizer():
    tokenizer = CLIPTokenizer.from_pretrained(shapes_folder() / "tokenizer")
    texts = [scene_text(scene, random.Random(index)) for index, scene in enumerate(CROWDS)]
    assert max(len(ids) for ids in tokenizer(texts).input_ids) <= tokenizer.model_max_length
    assert len(set(texts)) > 100


def test_a_crowd_is_rendered_at_its_size():
    assert render_array(CROWDS[0], 128).shape == (128, 128, 3)
