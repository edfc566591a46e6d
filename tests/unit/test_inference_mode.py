"""What is made inside `torch.inference_mode()` can be used, and trained, outside of it."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffenc import CrossAttnScorer, DiffusionEncoder, Projector
from diffenc.memory.cache import TensorCache
from diffenc.models import reached_layers
from diffenc.runtime.inference import lasting, make_plain

IMAGE = torch.linspace(-1, 1, 3 * 64 * 72).reshape(3, 64, 72)
OPTIONS = {"taps": ("mid_block", "up_blocks.1"), "size": (64, 72)}


def load(name, **options):
    return DiffusionEncoder.from_pretrained(name, **{**OPTIONS, **options})


def trains(encoder, prompt="red") -> bool:
    """Whether a step gives every parameter that trains a gradient."""
    encoder.train()
    features = encoder.extract(IMAGE, prompt)
    sum(each.square().mean() for each in features.values()).backward()
    parameters = list(encoder.trainable_parameters())
    return bool(parameters) and all(p.grad is not None for p in parameters)


@pytest.fixture(params=["folder", "pipeline"])
def loaded_inside(request, tiny_sd_folder):
    with torch.inference_mode():
        name = tiny_sd_folder
        if request.param == "pipeline":
            name = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
        return load(name)


@pytest.mark.long
def test_a_model_loaded_inside_works_and_trains_outside(loaded_inside, tiny_sd_folder):
    tensors = [*loaded_inside.parameters(), *loaded_inside.buffers()]
    assert not any(tensor.is_inference() for tensor in tensors)
    expected = load(tiny_sd_folder)(IMAGE, "red")
    torch.testing.assert_close(loaded_inside(IMAGE, "red"), expected, atol=1e-4, rtol=1e-4)
    loaded_inside.add_lora(rank=2)
    assert trains(loaded_inside)


@pytest.mark.long
def test_an_adapter_and_a_captioner_made_inside_train_outside(tiny_sd_folder):
    reached_layers._reached.cache_clear()
    encoder = load(tiny_sd_folder)
    with torch.inference_mode():
        encoder.add_lora(rank=2)
        encoder.add_captioner("shapes-clip")
        encoder(IMAGE, "red")
        encoder.merge_lora()
        encoder(IMAGE, "red")
        encoder.unmerge_lora()
        encoder.set_lora(None)
        encoder.set_lora("default")
    assert trains(encoder)
    other = load(tiny_sd_folder)
    other.add_lora(rank=2)
    assert trains(other)


@pytest.mark.long
def test_what_was_loaded_inside_from_files_trains_outside(tiny_sd_folder, tmp_path):
    encoder = load(tiny_sd_folder)
    encoder.add_lora(rank=2)
    encoder.save_pretrained(tmp_path)
    with torch.inference_mode():
        again = DiffusionEncoder.from_pretrained(tmp_path, trainable=True)
        again(IMAGE, "red")
    assert trains(again)


@pytest.mark.long
def test_a_model_that_was_moved_inside_trains_outside(tiny_sd_folder):
    for move in (
        lambda e: e.to(torch.bfloat16).float(),
        lambda e: e.backbone.unet.double().float(),
    ):
        encoder = load(tiny_sd_folder)
        with torch.inference_mode():
            move(encoder)
            encoder(IMAGE, "red")
        encoder.add_lora(rank=2)
        assert trains(encoder)


@pytest.mark.parametrize("conditioning", ["cfg", "uncond"])
def test_what_is_remembered_inside_is_used_outside(tiny_sd_folder, conditioning):
    encoder = load(tiny_sd_folder, conditioning=conditioning)
    with torch.inference_mode():
        inside = encoder.extract(IMAGE, "red")
    misses = encoder.backbone.caches.latents.misses
    outside = encoder.extract(IMAGE, "red")
    assert encoder.backbone.caches.latents.misses == misses
    for tap in outside:
        torch.testing.assert_close(outside[tap], inside[tap])
        assert not outside[tap].is_inference()
    encoder.backbone.unet.requires_grad_(True)  # saves latents and texts for its own gradient
    encoder.extract(IMAGE, "red")["up_blocks.1"].mean().backward()
    assert encoder.backbone.unet.conv_in.weight.grad is not None


def test_scores_inside_and_outside_are_equal(tiny_sd_folder):
    with torch.inference_mode():
        scorer = CrossAttnScorer.from_pretrained(tiny_sd_folder, size=64, timesteps=(189,))
        scorer.calibrate(IMAGE)
        inside = scorer(IMAGE, ["red", "blue"])
    torch.testing.assert_close(scorer(IMAGE, ["red", "blue"]), inside)
    assert scorer(IMAGE, ["red", "a"]).isfinite().all()
    assert not scorer.references.pictures.is_inference()


def test_a_projector_made_inside_trains_outside():
    with torch.inference_mode():
        projector = Projector(6, 4, norm_channels=(2, 4))
    projector(torch.ones(2, 3, 6)).sum().backward()
    assert all(p.grad is not None for p in projector.parameters())


def test_no_entry_of_a_cache_was_made_in_inference_mode():
    cache = TensorCache(1000)
    with torch.inference_mode():
        cache.put("a", (torch.ones(3), torch.zeros(2)))
        (first, second) = cache.get("a") or ()
    assert not first.is_inference()
    assert not second.is_inference()
    kept = torch.ones(3)
    cache.put("b", (kept,))
    kept.zero_()
    assert torch.equal((cache.get("b") or ())[0], torch.ones(3))


def test_gradients_stay_off_where_they_are_off():
    enabled = lasting(torch.is_grad_enabled)
    assert enabled()
    with torch.no_grad():
        assert not enabled()


def test_tied_weights_stay_tied():
    with torch.inference_mode():
        shared = torch.nn.Linear(3, 3)
        pair = torch.nn.ModuleList([shared, torch.nn.Linear(3, 3)])
        pair[1].weight = shared.weight
    make_plain(pair)
    assert pair[1].weight is pair[0].weight
    assert not pair[0].weight.is_inference()
