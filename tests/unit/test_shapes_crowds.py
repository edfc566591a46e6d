"""Crowded scenes: seeded, readable, and worded truly; false captions are false."""

import random
import sys
from types import SimpleNamespace

import pytest
import torch

from shapes_tools import FOLDER

sys.path.insert(0, str(FOLDER))

import measure_crowds
from crowd_texts import false_caption, holds
from denoisers import build_scheduler
from grounding import spoken_of
from measure_crowds import asked_scenes, crowd_pair, differing, gathered_maxima, told_apart
from torch.nn import functional as F
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


@pytest.mark.parametrize(("thing", "percent"), [("target", 100.0), ("control", 0.0)])
def test_a_maximum_of_gathered_maps_counts_where_it_lies_on_what_is_asked(thing, percent):
    # Twins in kind would be taken for each other; words that name one object alone leave none.
    trials = asked_scenes(30, 7, "both")
    places = {item.scene: item.scene.objects[getattr(item, thing)] for item in trials}
    shown = iter(trials)

    def word_tokens(images, texts, words):
        """Maps whose only peak is the middle of an object, for the word that is asked for."""
        maps = torch.zeros(len(images), len(words), 24, 24)
        for row, text in enumerate(texts):
            place = places[next(shown).scene]
            word = words.index(text.split()[-1])
            maps[row, word, int(place.y * 24), int(place.x * 24)] = 1
        return SimpleNamespace(maps=maps)

    vae = SimpleNamespace(config=SimpleNamespace(sample_size=96))
    encoder = SimpleNamespace(backbone=SimpleNamespace(vae=vae), word_tokens=word_tokens)
    assert gathered_maxima(encoder, trials, "both", lambda thing: thing.shape) == percent


def test_single_predictions_are_told_apart_over_all_cells_and_where_pictures_differ(monkeypatch):
    rng = random.Random("crowd-pairs/noun/5")
    pairs = [crowd_pair(rng, "noun") for _ in range(4)]
    lines = [both for _, both in pairs]
    cells = torch.stack([differing(*scenes, 96) for scenes, _ in pairs])
    assert 0 < cells.mean() < 0.1
    changed = F.adaptive_max_pool2d(cells, (24, 24)).repeat_interleave(2, dim=0)[:, None]
    scheduler = build_scheduler()
    signal = scheduler.alphas_cumprod

    def unet(noisy, timestep, texts):
        """Errs where pictures differ under a false caption, and elsewhere under a true one."""
        false = torch.tensor([text != lines[row // 2][row % 2] for row, text in enumerate(texts)])
        astray = torch.where(false[:, None, None, None], changed, 1 - changed)
        return SimpleNamespace(sample=noisy / (1 - signal[timestep]).sqrt() + astray)

    backbone = SimpleNamespace(
        vae=SimpleNamespace(config=SimpleNamespace(sample_size=96)),
        scheduler=scheduler,
        embed=lambda texts, size: SimpleNamespace(prompt_embeds=texts),
        unet=unet,
    )
    monkeypatch.setattr(
        measure_crowds, "latents_of", lambda _, scenes: torch.zeros(len(scenes), 4, 24, 24)
    )
    for name, row in told_apart(backbone, 4, 5).items():
        if name.startswith("noun"):
            assert row == {"all cells": 0.0, "where pictures differ": 100.0}
