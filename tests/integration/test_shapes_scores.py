"""Scores of the bundled model, in words that hold whatever its weights are."""

import numpy as np
import pytest
import torch

from diffenc import CrossAttnScorer
from diffenc.shapes import masks, render, sample_scenes, winoground_items

CARD_LAYER, CARD_TIMESTEP = "up_blocks.1.attentions.0.transformer_blocks.0.attn2", 50
"""Where the card of `shapes` says that shape words are seen."""


@pytest.fixture(scope="module")
def scorer():
    return CrossAttnScorer.from_pretrained("shapes")


@pytest.mark.long
def test_the_noise_is_found_better_under_the_true_text(scorer):
    items = winoground_items(12, seed=950_000, kinds=["noun"])
    classifier = scorer.with_options(preset="diffusion-classifier")
    right = total = 0
    for item in items:
        scores = classifier([render(scene) for scene in item.scenes], list(item.captions))
        right += int((scores.argmax(dim=1) == torch.arange(2)).sum())
        total += 2
    assert right / total > 0.7  # chance is a half


@pytest.mark.parametrize("mode", ["exact", "shared-query"])
def test_calibration_takes_the_offset_of_a_text_away(scorer, mode):
    """Of raw scores the text explains most; of calibrated ones much less."""
    scenes = list(sample_scenes(4, seed=950_001))
    images = [render(scene) for scene in scenes]
    texts = ["a red circle", "a large blue square above a green star", "three yellow triangles"]
    raw = scorer.with_options(preset="paper", mode=mode)
    calibrated = raw.with_options()
    calibrated.calibrate([render(scene) for scene in sample_scenes(4, seed=950_002)])

    def spread_of_texts(scores):
        return scores.mean(dim=0).std()

    assert spread_of_texts(calibrated(images, texts)) < 0.5 * spread_of_texts(raw(images, texts))


@pytest.mark.long
def test_the_default_score_ranks_pictures_by_their_words(scorer):
    """Of two pictures the one that shows what a text says, for a noun or a colour exchanged."""
    items = winoground_items(6, seed=950_003, kinds=["noun", "color"])
    right = 0
    for item in items:
        scores = scorer([render(scene) for scene in item.scenes], list(item.captions))
        # Right pairs against wrong ones: neither a text's offset nor a picture's counts here.
        right += int(scores.diagonal().sum() > scores.fliplr().diagonal().sum())
    assert right >= 0.75 * len(items)  # chance is a half


def scenes_of_different_shapes(count):
    for scene in sample_scenes(100, seed=950_004):
        shapes = [thing.shape for thing in scene.objects]
        if len(set(shapes)) == len(shapes):
            yield scene
            count -= 1
        if not count:
            return


def grown(mask, cells=1):
    """The mask and all within half a latent cell of 4 pixels, along both axes."""
    reach = 2 * cells
    found = np.zeros_like(mask)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            found |= np.roll(mask, (dy, dx), axis=(0, 1))
    return found


def test_a_shape_word_is_seen_on_its_object(scorer):
    """The maximum of its map lies in the object's true mask, or within half a cell of it."""
    hits = total = 0
    for scene in scenes_of_different_shapes(12):
        shapes = [thing.shape for thing in scene.objects]
        text = " and ".join(f"a {thing.color} {thing.shape}" for thing in scene.objects)
        maps = scorer.word_maps(
            render(scene), text, shapes, layers=CARD_LAYER, timesteps=[CARD_TIMESTEP]
        )
        for shape, mask in zip(shapes, masks(scene), strict=True):
            cells = maps[shape].array
            row, column = np.unravel_index(cells.argmax(), cells.shape)
            side = 64 // len(cells)
            y, x = (int((place + 0.5) * side) for place in (row, column))
            hits += bool(grown(mask.astype(bool))[y, x])
            total += 1
    assert total >= 15
    assert hits / total >= 0.9
