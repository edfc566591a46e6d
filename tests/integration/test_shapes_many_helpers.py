"""CLIP of crowded scenes, and the language model of all, by stock classes of transformers."""

import random

import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from diffenc.clip.tokens import ClipTokens
from diffenc.mllm.language import load_language_model
from diffenc.mllm.vision import VisionTokens
from diffenc.shapes.captions import caption
from diffenc.shapes.crowds import sample_crowds
from diffenc.shapes.render import render
from diffenc.storage.pretrained import pretrained_source
from shapes_tools import shapes_tools

SCENES = list(sample_crowds(60, seed=930_000))


def test_transformers_loads_the_clip_at_its_own_size():
    folder = pretrained_source("shapes-many-clip")
    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPProcessor.from_pretrained(folder)
    texts = [caption(SCENES[0], random.Random(0))]
    inputs = processor(text=texts, images=render(SCENES[0], 130), padding=True, return_tensors="pt")
    assert inputs.pixel_values.shape == (1, 3, 96, 96)
    with torch.no_grad():
        assert model(**inputs).logits_per_image.shape == (1, 1)


def test_its_tokens_are_the_cells_of_a_grid_of_twelve():
    pictures = [render(scene, 96) for scene in SCENES[:2]]
    tokens = ClipTokens.from_pretrained("shapes-many-clip")(pictures)
    assert tokens.shape == (2, 144, 128)
    vision = VisionTokens.from_pretrained("shapes-many-clip")
    assert vision.num_tokens == 144
    torch.testing.assert_close(vision(pictures), tokens)


def test_a_patch_of_a_crowd_tells_more_than_that_of_the_clip_of_few_objects():
    """A linear layer, fitted to some patches, names colour and shape on others."""
    with shapes_tools("patches", "train_clip", "measure_clip") as tools:
        few, many = (
            tools["measure_clip"].read_of_patches(
                CLIPModel.from_pretrained(pretrained_source(name)).eval(), fit=40, test=20
            )
            for name in ("shapes-clip", "shapes-many-clip")
        )
    assert many["patch_shape"] > few["patch_shape"] + 10, (few, many)
    assert many["patch_color"] > few["patch_color"], (few, many)


@pytest.mark.parametrize(
    ("spelling", "floor", "above"),
    [("grids", 64, 20), ("placed", 75, 30), ("words", 88, 45)],
)
def test_the_language_model_reads_crowds_spelled_out(spelling, floor, above):
    """The card's figures are above these; another picture's leaves what can be guessed."""
    model, tokenizer = load_language_model("shapes-lm")
    with shapes_tools("documents", "grammar", "symbolic_crowds", "train_lm", "measure_lm") as tools:
        shares = tools["measure_lm"].crowds(model.eval(), tokenizer, spelling, 120, 930_000)
    assert shares["own"] >= floor, shares
    assert shares["own"] > shares["other"] + above, shares
    if spelling == "words":  # places too: of five, and of two
        assert shares["position"] >= 75, shares
        assert shares["relation"] >= 75, shares


def test_the_language_model_reads_few_objects_and_letters():
    model, tokenizer = load_language_model("shapes-lm")
    with shapes_tools("documents", "grammar", "symbolic_crowds", "train_lm", "measure_lm") as tools:
        own, other = tools["measure_lm"].pictures(model.eval(), tokenizer, 120, 930_000)
        letters = tools["measure_lm"].crowds(
            model.eval(), tokenizer, "grids", 120, 930_000, lettered=True
        )
    assert own >= 84
    assert own > other + 35
    assert letters["own"] >= 65, letters
    assert letters["own"] > letters["other"] + 10, letters


@pytest.mark.parametrize("words", [("left", "right"), ("top", "bottom"), ("above", "below")])
def test_opposite_places_are_different_words_to_the_language_model(words):
    """Texts without pictures do not tell them apart: what learns from those alone may not."""
    model, tokenizer = load_language_model("shapes-lm")
    vectors = [
        model.get_input_embeddings().weight[
            tokenizer(f" {word}", add_special_tokens=False).input_ids
        ]
        for word in words
    ]
    assert torch.cosine_similarity(*vectors).item() < 0.7
