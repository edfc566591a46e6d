"""The bundled diffusion transformer: what its family's tests read of random weights has meaning."""

import math
import random

import numpy as np
import pytest
import torch
from diffusers import PixArtSigmaPipeline

from diffenc import DiffusionEncoder
from diffenc.inputs.images import to_pixel_values
from diffenc.inputs.latents import encode_latents
from diffenc.inputs.noise import shared_noise
from diffenc.models import describe
from diffenc.models.shapes import shapes_folder
from diffenc.scorer import denoising_scores, word_maps
from diffenc.shapes import masks, render, sample_scene, winoground_items

TEXTS = ["a red circle", "a small blue star left of a green square", ""]
TAP = "transformer_blocks.4"
PAIR = ("shapes", "shapes-dit")
ITEMS = 16


@pytest.fixture(scope="module")
def encoder():
    return DiffusionEncoder.from_pretrained("shapes-dit")


@pytest.fixture(scope="module")
def pipe():
    pipe = PixArtSigmaPipeline.from_pretrained(shapes_folder("shapes-dit"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(encoder, scenes):
    with torch.no_grad():
        pixel_values = to_pixel_values([render(scene) for scene in scenes], size=64)
        return encode_latents(encoder.backbone.vae, pixel_values)


def test_the_stock_pipeline_loads_it_and_generates(pipe):
    image = pipe(
        "a large red circle",
        num_inference_steps=10,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        max_sequence_length=32,
        use_resolution_binning=False,
        clean_caption=False,
    ).images[0]
    pixels = np.asarray(image, np.float32)
    assert pixels.shape == (64, 64, 3)
    redness = pixels[..., 0] - pixels[..., 1:].max(axis=-1)
    assert (redness > 80).mean() > 0.02


def test_it_reads_the_pictures_and_the_texts_of_the_bundled_unet():
    transformer, unet = describe("shapes-dit"), describe("shapes")
    assert transformer.family == "pixart"
    assert transformer.default_size == unet.default_size == 64
    for part in ("vae", "text_encoder", "scheduler"):
        assert transformer.configs[part] == unet.configs[part]
    for part in ("vae", "text_encoder"):
        files = [next((shapes_folder(name) / part).glob("*.safetensors")) for name in PAIR]
        assert files[0].read_bytes() == files[1].read_bytes()


@torch.no_grad()
def test_a_text_has_its_end_among_its_states_as_in_the_stock_pipeline(encoder, pipe):
    """CLIP's tokenizer pads with the end token, which T5's does not."""
    embeds = encoder.backbone.embed(TEXTS, size=(64, 64))
    states, mask, _, _ = pipe.encode_prompt(
        TEXTS, do_classifier_free_guidance=False, max_sequence_length=32
    )
    lengths = mask.sum(dim=1).tolist()
    assert lengths[2] == 2  # start and end
    assert embeds.lengths == tuple(lengths)
    for row, length in enumerate(lengths):
        own = embeds.prompt_embeds[row, :length]
        torch.testing.assert_close(own, states[row, :length], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_features_equal_hooks_on_the_stock_pipeline(encoder, pipe):
    scene = sample_scene(random.Random("dit"), count=2)
    picture = render(scene)
    pixels = torch.from_numpy(np.asarray(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    noise = shared_noise((4, 16, 16), seed=0, timestep=50)[None]
    signal = pipe.scheduler.alphas_cumprod[50]
    states, mask, _, _ = pipe.encode_prompt(
        TEXTS[1], do_classifier_free_guidance=False, max_sequence_length=32
    )
    kept = []
    block = pipe.transformer.get_submodule(TAP)
    handle = block.register_forward_hook(lambda _module, _args, output: kept.append(output))
    pipe.transformer(
        signal**0.5 * latents + (1 - signal) ** 0.5 * noise,
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
        timestep=torch.tensor([50]),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )
    handle.remove()
    theirs = kept[0].transpose(1, 2).unflatten(2, (8, 8))
    ours = DiffusionEncoder(
        encoder.backbone, encoder.config.from_dict({"taps": [TAP], "timestep": 50})
    ).extract(picture, TEXTS[1])[TAP]
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.long
@pytest.mark.parametrize(("kind", "floor"), [("noun", 0.8), ("color", 0.8), ("relation", 0.8)])
def test_the_right_text_explains_the_noise_better(encoder, kind, floor):
    """Text score by denoising error; chance is 25 %, the card has what was measured."""
    hits = 0
    for item in winoground_items(ITEMS, seed=910_000, kinds=[kind]):
        latents = latents_of(encoder, item.scenes)
        scores = denoising_scores(encoder.backbone, latents, item.captions)
        hits += bool(scores[0, 0] > scores[0, 1] and scores[1, 1] > scores[1, 0])
    assert hits >= math.floor(floor * ITEMS)


@pytest.mark.long
def test_shape_words_are_seen_on_their_objects(encoder):
    rng, hits, words = random.Random("words on objects"), 0, 0
    for _ in range(10):
        scene = sample_scene(rng, kinds=[("red", "circle"), ("blue", "star")])
        maps = word_maps(
            encoder.backbone,
            latents_of(encoder, [scene]),
            "a red circle and a blue star",
            ["circle", "star"],
            layers=["transformer_blocks.4"],
            timesteps=[50],
        )[0]
        for values, mask in zip(maps, masks(scene), strict=True):
            row, column = divmod(int(values.argmax()), values.shape[1])
            side = 64 // values.shape[1]
            cell = mask[row * side : (row + 1) * side, column * side : (column + 1) * side]
            hits, words = hits + bool(cell.any()), words + 1
    assert hits >= 0.85 * words
