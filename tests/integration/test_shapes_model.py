"""The bundled model: a real diffusers folder that means what the words say."""

import math
import random

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffenc import DiffusionEncoder, load_backbone
from diffenc.inputs.images import to_pixel_values
from diffenc.inputs.latents import encode_latents
from diffenc.models.shapes import shapes_folder
from diffenc.scorer import denoising_scores, word_maps
from diffenc.shapes import (
    Scene,
    SceneObject,
    masks,
    render,
    sample_scene,
    sample_scenes,
    winoground_items,
)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("shapes")


@pytest.fixture(scope="module")
def encoder(backbone):
    return DiffusionEncoder(backbone)


def latents_of(backbone, scenes) -> torch.Tensor:
    with torch.no_grad():
        return encode_latents(backbone.vae, to_pixel_values([render(s) for s in scenes], size=64))


def two_objects() -> Scene:
    return Scene(
        (
            SceneObject("circle", "red", "large", 0.27, 0.5, 0.2),
            SceneObject("square", "blue", "large", 0.73, 0.5, 0.2),
        )
    )


def test_the_stock_pipeline_loads_it_and_generates():
    pipe = StableDiffusionPipeline.from_pretrained(shapes_folder())
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipe(
        "a large red circle", num_inference_steps=10, guidance_scale=4.0, generator=generator
    ).images[0]
    pixels = np.asarray(image, np.float32)
    assert pixels.shape == (64, 64, 3)
    redness = pixels[..., 0] - pixels[..., 1:].max(axis=-1)
    assert (redness > 80).mean() > 0.02  # a small circle covers 4 %


def test_pictures_survive_the_autoencoder(backbone):
    scenes = list(sample_scenes(32, seed=910_000))
    pixel_values = to_pixel_values([render(scene) for scene in scenes], size=64)
    with torch.no_grad():
        decoded = backbone.vae.decode(
            encode_latents(backbone.vae, pixel_values) / backbone.vae.config.scaling_factor
        ).sample.clamp(-1, 1)
    errors = (decoded - pixel_values).square().mean(dim=(1, 2, 3))
    assert (10 * torch.log10(4 / errors)).mean() >= 28


def test_latents_have_unit_scale(backbone):
    latents = latents_of(backbone, sample_scenes(64, seed=910_000))
    assert 0.8 < latents.std() < 1.2


@pytest.mark.long
@pytest.mark.parametrize("items", [8, pytest.param(24, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "floor"),
    [("noun", 0.8), ("color", 0.85), ("relation", 0.85), ("count", 0.55), ("size", 0.65)],
)
def test_the_right_text_explains_the_noise_better(backbone, kind, floor, items):
    """Text score by denoising error; chance is 25 %, the card has what was measured."""
    hits = 0
    for item in winoground_items(items, seed=910_000, kinds=[kind]):
        scores = denoising_scores(backbone, latents_of(backbone, item.scenes), item.captions)
        hits += bool(scores[0, 0] > scores[0, 1] and scores[1, 1] > scores[1, 0])
    assert hits >= math.floor(floor * items)


def test_the_text_changes_features_where_it_speaks(encoder):
    """Asked for one of two objects, features change more inside its mask than in the background."""
    scene = two_objects()
    features = encoder.extract(render(scene), "a red circle", conditioning="cfg")
    tap = max(features, key=lambda name: features[name].shape[2])
    change = (features.select("cond")[tap] - features.select("uncond")[tap])[0].square().sum(0)
    side = change.shape[0]
    inside = masks(scene).reshape(2, side, 64 // side, side, 64 // side).mean(axis=(2, 4)) > 0.5
    background = ~inside.any(axis=0)
    assert change[inside[0]].mean() > change[background].mean()


def test_tokens_in_place_of_clip_s(encoder):
    tokens = encoder(render(two_objects()), "what color is the circle?")
    assert tokens.shape == (1, 64, encoder.hidden_size)
    assert torch.isfinite(tokens).all()


def test_shape_words_are_seen_on_their_objects(backbone):
    """Where the card says that maps point best; 100 % of held-out words were measured there."""
    rng = random.Random("words on objects")
    hits, words = 0, 0
    for _ in range(10):
        scene = sample_scene(rng, kinds=[("red", "circle"), ("blue", "star")])
        maps = word_maps(
            backbone,
            latents_of(backbone, [scene]),
            "a red circle and a blue star",
            ["circle", "star"],
            timesteps=[50],
            layers=["up_blocks.1.attentions.0"],
        )[0]
        for found, mask in zip(maps, masks(scene), strict=True):
            y, x = divmod(int(found.argmax()), found.shape[1])
            cell = 64 // found.shape[1]
            hits += mask[y * cell : (y + 1) * cell, x * cell : (x + 1) * cell].any()
            words += 1
    assert hits >= 0.85 * words


def test_word_maps_are_shares(backbone):
    maps = word_maps(
        backbone,
        latents_of(backbone, [two_objects()]),
        "a red circle left of a blue square",
        ["circle", "square"],
    )
    assert maps.shape == (1, 2, 16, 16)
    assert maps.min() >= 0
    assert maps.max() <= 1


def test_half_precision_agrees(encoder):
    half = DiffusionEncoder.from_pretrained("shapes", dtype=torch.bfloat16)
    image = render(two_objects())
    exact, rounded = encoder(image, "a red circle"), half(image, "a red circle").float()
    cosine = torch.nn.functional.cosine_similarity(exact, rounded, dim=-1)
    assert cosine.mean() > 0.99
