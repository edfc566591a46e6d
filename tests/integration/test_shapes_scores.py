"""Scores of the bundled model, in words that hold whatever its weights are."""

import pytest
import torch

from diffenc import CrossAttnScorer
from diffenc.shapes import render, sample_scenes, winoground_items


@pytest.fixture(scope="module")
def scorer():
    return CrossAttnScorer.from_pretrained("shapes")


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
