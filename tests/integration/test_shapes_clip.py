"""The bundled CLIP baseline, by the stock classes of transformers and by its own floors."""

import pytest
import torch

from diffenc.evals.matching.clip import ClipMatcher
from diffenc.shapes import captions, render, sample_scenes
from diffenc.shapes.pairs import winoground_items
from diffenc.storage.pretrained import pretrained_source
from shapes_oracle import is_true


@pytest.fixture(scope="module")
def matcher():
    return ClipMatcher.from_pretrained("shapes-clip")


def test_a_true_caption_is_found_among_many(matcher):
    scenes = list(sample_scenes(64, seed=930_000))
    texts = [captions(scene, 1, seed=index)[0] for index, scene in enumerate(scenes)]
    scores = matcher([render(scene) for scene in scenes], texts)
    chosen = scores.argmax(dim=1).tolist()
    right = sum(is_true(texts[k], scene) for k, scene in zip(chosen, scenes, strict=True))
    assert right >= 57  # the card's figure is 95 %


def text_score(matcher, kind):
    items = winoground_items(40, seed=930_000, kinds=[kind])
    scores = torch.stack(
        [matcher([render(s) for s in item.scenes], list(item.captions)) for item in items]
    )
    return ((scores[:, 0, 0] > scores[:, 0, 1]) & (scores[:, 1, 1] > scores[:, 1, 0])).sum().item()


def test_it_knows_words_and_not_their_order(matcher):
    assert text_score(matcher, "noun") >= 36
    assert text_score(matcher, "relation") <= 16  # chance is 10; the weakness that it stands for


def test_transformers_loads_it_as_it_is():
    from transformers import CLIPModel, CLIPProcessor

    folder = pretrained_source("shapes-clip")
    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPProcessor.from_pretrained(folder)
    scene = next(iter(sample_scenes(1, seed=930_001)))
    inputs = processor(
        text=captions(scene, 1), images=render(scene, 100), padding=True, return_tensors="pt"
    )
    assert inputs.pixel_values.shape == (1, 3, 64, 64)
    with torch.no_grad():
        assert model(**inputs).logits_per_image.shape == (1, 1)
