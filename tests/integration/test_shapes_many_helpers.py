"""CLIP and language model of the crowded world, by the stock classes of transformers."""

import random

import torch

from diffenc.clip.tokens import ClipTokens
from diffenc.mllm.language import load_language_model
from diffenc.mllm.vision import VisionTokens
from diffenc.shapes.captions import caption
from diffenc.shapes.crowds import sample_crowds
from diffenc.shapes.render import render
from diffenc.shapes.scenes import COLORS, SHAPES
from diffenc.storage.pretrained import pretrained_source
from shapes_tools import shapes_tools

SCENES = list(sample_crowds(60, seed=930_000))


def test_transformers_loads_the_clip_at_its_own_size():
    from transformers import CLIPModel, CLIPProcessor

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
    with shapes_tools("patches") as modules:
        truth = modules["patches"].truths(SCENES, 12)
    pictures = [render(scene, 96) for scene in SCENES]
    right = {}
    for name, side in (("shapes-clip", 8), ("shapes-many-clip", 12)):
        tokens = ClipTokens.from_pretrained(name)(pictures).detach()
        grid = tokens.mT.unflatten(2, (side, side))
        cells = torch.nn.functional.interpolate(grid, (12, 12)).flatten(2).mT
        covered = truth[..., 0] > 0
        fit, rest = covered[:40].nonzero(as_tuple=True), covered[40:].nonzero(as_tuple=True)
        for kind, words in ((0, SHAPES), (1, COLORS)):
            targets = torch.nn.functional.one_hot(truth[:40][fit][:, kind] - 1, len(words))
            states = torch.cat([cells[:40][fit], torch.ones(len(fit[0]), 1)], dim=1)
            gram = states.T @ states + 1.0 * torch.eye(states.shape[1])
            weights = torch.linalg.solve(gram, states.T @ targets.float())
            asked = torch.cat([cells[40:][rest], torch.ones(len(rest[0]), 1)], dim=1)
            named = (asked @ weights).argmax(1) + 1
            right[name, kind] = (named == truth[40:][rest][:, kind]).float().mean().item()
    assert right["shapes-many-clip", 0] > right["shapes-clip", 0] + 0.1, right
    assert right["shapes-many-clip", 1] > right["shapes-clip", 1], right


def test_the_language_model_reads_crowds_spelled_out_on_grids_and_as_words():
    """The card's figures are above these; another picture's leaves what can be guessed."""
    model, tokenizer = load_language_model("shapes-many-lm")
    with shapes_tools("documents", "grammar", "symbolic_crowds", "train_lm", "measure_lm") as tools:
        found = tools["measure_lm"].crowds(model.eval(), tokenizer, 60, 930_000)
    assert found["crowded_grids"] >= 55, found
    assert found["crowded_words"] >= 65, found
    assert found["crowded_grids"] > found["other_grids"] + 10, found
    assert found["crowded_words"] > found["other_words"] + 20, found
