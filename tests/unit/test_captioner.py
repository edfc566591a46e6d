"""The implicit captioner: begins as nothing, hears CLIP, trains alone or with other parts."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from tests import builders
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from diffenc import DiffusionEncoder, EncoderConfig, Projector
from diffenc.clip.captioner import ClipEmbedder, ImplicitCaptioner
from diffenc.errors import BackboneError, ConfigError
from diffenc.inputs.images import to_pixel_values
from diffenc.models import StableDiffusion

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 12,
}
TAP = "up_blocks.0"


def picture(seed: int = 0, height: int = 48, width: int = 32) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def tiny_clip(**options) -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(**{**VISION, **options})
    clip = builders.seeded(lambda: CLIPVisionModelWithProjection(config))
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.mul_(5)  # as initialised it hardly tells pictures apart
    return clip


def tiny_encoder(**options) -> DiffusionEncoder:
    schedule = {key: builders.NOISE_SCHEDULE[key] for key in ("beta_start", "beta_end")}
    backbone = StableDiffusion(
        name="tiny",
        unet=builders.tiny_unet(),
        vae=builders.tiny_vae(),
        scheduler=DDPMScheduler(**schedule),
        text_encoder=builders.tiny_text_encoder(),
        tokenizer=builders.tiny_tokenizer(),
        default_taps=(TAP,),
    )
    return DiffusionEncoder(backbone, EncoderConfig(**{"taps": (TAP,), "size": 16, **options}))


@pytest.fixture
def encoder():
    encoder = tiny_encoder()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder.add_captioner(tiny_clip())
    return encoder


@pytest.fixture
def sdxl(tiny_sdxl_folder):
    encoder = DiffusionEncoder.from_pretrained(tiny_sdxl_folder, taps=("mid_block",), size=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder.add_captioner(tiny_clip())
    return encoder


def opened(encoder) -> DiffusionEncoder:
    """As if it had been trained: its gates let something through."""
    with torch.no_grad():
        encoder.captioner.gate.fill_(1.0)
        if hasattr(encoder.captioner, "pooled_gate"):
            encoder.captioner.pooled_gate.fill_(1.0)
    return encoder


def test_it_begins_exactly_unconditional(encoder):
    plain = tiny_encoder()
    images = [picture(seed) for seed in range(7)]
    assert torch.equal(encoder(images), plain(images))
    assert torch.equal(encoder(images, ""), plain(images))
    assert torch.equal(encoder(images, "red"), plain(images, "red"))
    assert encoder.extract(images).conditioning == "cond"
    halves = encoder.extract(picture(), conditioning="concat")
    assert halves[TAP].shape[1] == 2 * plain.extract(picture())[TAP].shape[1]


@pytest.mark.long
def test_it_begins_exactly_unconditional_on_sdxl_in_half_precision_too(tiny_sdxl_folder, sdxl):
    plain = DiffusionEncoder.from_pretrained(tiny_sdxl_folder, taps=("mid_block",), size=64)
    assert torch.equal(sdxl(picture()), plain(picture()))
    # The unconditional embedding of SDXL is zeros, not that of the empty text.
    assert not torch.equal(
        sdxl(picture()), plain(picture(), plain.backbone.embed([""], size=(64, 64)))
    )
    sdxl.to(torch.bfloat16), plain.to(torch.bfloat16)
    assert torch.equal(sdxl(picture()), plain(picture()))


def test_the_states_are_those_of_the_formula(encoder, monkeypatch):
    opened(encoder)
    seen = {}
    forward = encoder.backbone.unet.forward

    def spy(*args, **kwargs):
        seen["states"] = kwargs["encoder_hidden_states"]
        return forward(*args, **kwargs)

    monkeypatch.setattr(encoder.backbone.unet, "forward", spy)
    images = [picture(0), picture(1)]
    with torch.no_grad():
        encoder(images, ["red", "blue circle"])
    text = encoder.backbone.embed(["red", "blue circle"], size=(16, 16)).prompt_embeds
    state = encoder.captioner.state_dict()
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    embeds = tiny_clip()(pixels).image_embeds.numpy()
    first, second = (
        (state[f"mlp.{layer}.weight"].numpy(), state[f"mlp.{layer}.bias"].numpy())
        for layer in (0, 2)
    )
    hidden = torch.nn.functional.gelu(torch.from_numpy(embeds @ first[0].T + first[1])).numpy()
    added = (hidden @ second[0].T + second[1])[:, None] + state["positions"].numpy()
    expected = text.numpy() + np.tanh(1.0) * added
    assert added.shape == (2, 77, 8)
    np.testing.assert_allclose(seen["states"].numpy(), expected, atol=5e-3 * np.abs(expected).max())


def test_preprocessing_is_clip_s_own(tmp_path):
    options = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, **options
    )
    tiny_clip().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    embedder = ClipEmbedder.from_name(tmp_path)
    assert embedder.mean == (0.5, 0.4, 0.3)
    seen = []
    embedder.vision_model.register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    image = picture(height=100, width=64)
    embedder(to_pixel_values(image, size=embedder.size, resize="crop", multiple=1))
    expected = processor(images=image, return_tensors="pt")["pixel_values"]
    # Pillow rounds to bytes after each of its two passes; both are bicubic.
    assert (seen[0] - expected).abs().mean() < 0.02
    assert (seen[0] - expected).abs().max() < 0.2


@pytest.mark.parametrize("by_name", [True, False])
def test_the_preprocessing_that_was_passed_counts_and_is_saved(tmp_path, by_name):
    tiny_clip().save_pretrained(tmp_path / "clip")
    loaded = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "clip")
    processor = CLIPImageProcessor(
        image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7], do_center_crop=False
    )
    encoder = tiny_encoder()
    encoder.add_captioner(tmp_path / "clip" if by_name else loaded, processor=processor)
    encoder.save_pretrained(tmp_path / "saved", include_backbone=True)
    for each in (encoder, DiffusionEncoder.from_pretrained(tmp_path / "saved")):
        assert each.clip.mean == (0.1, 0.2, 0.3)
        assert each.clip.std == (0.5, 0.6, 0.7)
        assert not each.clip.crops


def test_pictures_and_prompts_change_what_it_says(encoder):
    opened(encoder)
    plain = tiny_encoder()
    both = encoder([picture(0), picture(1)])
    assert not torch.allclose(both, plain([picture(0), picture(1)]))
    torch.testing.assert_close(both[1:], encoder(picture(1)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(encoder(picture()), encoder(picture(), "red"))
    uncond = encoder.extract(picture(), conditioning="uncond")[TAP]
    torch.testing.assert_close(uncond, plain.extract(picture())[TAP], atol=1e-5, rtol=1e-5)
    halves = encoder.extract(picture(), conditioning="cfg")
    torch.testing.assert_close(halves.select("uncond")[TAP], uncond, atol=1e-5, rtol=1e-5)


def test_pooled_text_of_sdxl_is_conditioned_too(sdxl):
    before = sdxl(picture())
    with torch.no_grad():
        sdxl.captioner.pooled_gate.fill_(1.0)
    assert not torch.allclose(sdxl(picture()), before)


def test_long_and_short_embeddings_get_what_fits(encoder):
    opened(encoder)
    windows = encoder.backbone.embed(["red " * 200, "blue"], size=(16, 16), long_prompts="chunk")
    states = encoder.caption([picture(0), picture(1)], windows)
    assert states.prompt_embeds.shape == windows.prompt_embeds.shape
    change = states.prompt_embeds - windows.prompt_embeds
    assert change[:, :77].abs().sum() > 0
    assert not change[:, 77:].any()
    assert states.lengths == windows.lengths
    assert encoder([picture(0), picture(1)], windows).isfinite().all()


def grad_names(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.grad is not None}


def test_the_gate_moves_first_and_then_all_of_it(encoder):
    optimizer = torch.optim.SGD(encoder.trainable_parameters(), lr=10.0)
    encoder(picture()).square().sum().backward()
    moving = {n for n, p in encoder.captioner.named_parameters() if p.grad.any()}
    assert moving == {"gate"}
    optimizer.step()
    optimizer.zero_grad()
    encoder(picture()).square().sum().backward()
    moving = {n for n, p in encoder.captioner.named_parameters() if p.grad.any()}
    assert moving == {name for name, _ in encoder.captioner.named_parameters()}


@pytest.mark.parametrize("kind", ["tiny", "sdxl"])
@pytest.mark.parametrize("parts", [(), ("projector",), ("lora",), ("lora", "projector")])
def test_gradients_reach_what_trains_and_nothing_else(kind, parts, request):
    encoder = opened(request.getfixturevalue("encoder" if kind == "tiny" else "sdxl"))
    expected = {f"captioner.{name}" for name, _ in encoder.captioner.named_parameters()}
    if "lora" in parts:
        encoder.add_lora(rank=1)
        expected |= {name for name, _ in encoder.named_parameters() if ".lora_" in name}
    head = Projector(encoder.hidden_size, 4, "linear").requires_grad_("projector" in parts)
    encoder.train()
    head(encoder([picture(0), picture(1)], ["red", "blue"])).square().sum().backward()
    assert grad_names(encoder) == expected
    assert {name for name, _ in encoder.named_trainable_parameters()} == expected
    assert bool(grad_names(head)) == ("projector" in parts)


def test_training_lowers_the_loss_and_nothing_remembered_is_stale(encoder):
    target = tiny_encoder()([picture(0), picture(1)], ["red", "blue circle"])
    encoder.train()
    assert encoder.captioner.training
    assert not encoder.backbone.unet.training
    assert not encoder.clip.training
    optimizer = torch.optim.Adam(encoder.trainable_parameters(), lr=0.03)
    losses = []
    for _ in range(8):
        loss = (encoder([picture(0), picture(1)]) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    encoder.eval().requires_grad_(False)
    frozen = encoder(picture())
    encoder.use_cache = False
    torch.testing.assert_close(encoder(picture()), frozen, atol=1e-6, rtol=1e-5)


def test_clip_runs_once_for_each_picture_unless_the_switch_is_off(encoder, monkeypatch):
    rows = []
    forward = encoder.clip.forward
    monkeypatch.setattr(encoder.clip, "forward", lambda x: (rows.append(len(x)), forward(x))[1])
    encoder([picture(0), picture(1), picture(0)], ["red", "blue", "red"])
    encoder([picture(1), picture(2)], "red")
    assert rows == [2, 1]
    encoder.extract(picture(0), conditioning="uncond")
    assert rows == [2, 1]
    encoder.use_cache = False
    encoder(picture(0))
    assert rows == [2, 1, 1]
    encoder.use_cache = True
    encoder.clear_cache()
    encoder(picture(0))
    assert rows == [2, 1, 1, 1]


def test_clip_sees_the_original_picture_and_not_the_squashed_one(encoder):
    """Two pictures that are the same once they are squashed, and not in CLIP's crop."""
    column = np.linspace(0, 255, 16).astype(np.uint8)
    square = np.broadcast_to(column[:, None, None], (16, 16, 3)).copy()
    narrow = np.broadcast_to(column[:, None, None], (16, 8, 3)).copy()
    squashed = [to_pixel_values(image, size=16) for image in (square, narrow)]
    torch.testing.assert_close(*squashed, atol=1e-5, rtol=0)
    opened(encoder)
    assert not torch.allclose(encoder(square), encoder(narrow), atol=1e-4)


def test_gradients_reach_the_pixels_through_clip(encoder):
    opened(encoder)
    pixels = torch.rand(3, 16, 16, requires_grad=True)
    encoder.captioner.requires_grad_(False)
    direct = torch.autograd.grad(encoder._image_embeds_of(pixels).sum(), pixels)[0]
    assert direct.abs().sum() > 0


@pytest.mark.parametrize("cast", ["half", "to"])
def test_it_is_never_in_float16(encoder, cast):
    before = {name: p.detach().clone() for name, p in encoder.captioner.named_parameters()}
    encoder.half() if cast == "half" else encoder.to(torch.float16)
    assert next(encoder.clip.parameters()).dtype == torch.float16
    for name, parameter in encoder.captioner.named_parameters():
        assert torch.equal(parameter, before[name])


def test_autocast_trains_it(encoder):
    with torch.autocast("cpu", torch.bfloat16):
        encoder(picture()).float().square().sum().backward()
    assert encoder.captioner.gate.grad.abs().sum() > 0


def test_any_clip_with_an_image_embedding_does(encoder):
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 64}
    text |= {"num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 2}
    config = CLIPConfig(vision_config=VISION, text_config=text, projection_dim=12)
    whole = builders.seeded(lambda: CLIPModel(config))
    embedder = ClipEmbedder(whole)
    assert not any("text" in name for name, _ in embedder.named_parameters())
    pixels = to_pixel_values(picture(), size=32, resize="crop", multiple=1)
    inputs = CLIPImageProcessor()(
        images=pixels[0] / 2 + 0.5,
        do_rescale=False,
        do_resize=False,
        do_center_crop=False,
        return_tensors="pt",
    )["pixel_values"]
    features = whole.get_image_features(pixel_values=inputs)
    features = getattr(features, "pooler_output", features)
    torch.testing.assert_close(embedder(pixels), features, atol=1e-4, rtol=1e-3)


@pytest.mark.wrong_type
def test_what_is_no_clip_is_told(encoder, tmp_path):
    with pytest.raises(ConfigError, match="a captioner already"):
        encoder.add_captioner(tiny_clip())
    plain = tiny_encoder()
    with pytest.raises(ConfigError, match="a captioner needs a CLIP"):
        plain.add_captioner(None)
    others = [CLIPVisionModel(CLIPVisionConfig(**VISION)), nn.Linear(2, 2)]
    others.append(CLIPTextModel(builders._text_config(hidden_size=8)))
    for model in others:
        with pytest.raises(ConfigError, match=f"image embedding.*{type(model).__name__}"):
            plain.add_captioner(model)
    with pytest.raises(BackboneError, match="cannot load a CLIP"):
        plain.add_captioner(tmp_path)
    with pytest.raises(BackboneError, match="cannot load a CLIP"):
        plain.add_captioner("nobody/no-clip")
    for options in ({"layers": 0}, {"hidden_size": -1}, {"layers": 1.5}):
        with pytest.raises(ConfigError, match="must be an int from 1 to 1048576"):
            plain.add_captioner(tiny_clip(), **options)
    assert plain.captioner is None
    with pytest.raises(ConfigError, match="needs prompts"):
        plain.extract(picture(), conditioning="cond")
    encoder.clip = None
    with pytest.raises(ConfigError, match="no CLIP"):
        encoder(picture())


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("pooled", [None, 5])
def test_what_is_saved_comes_back(tmp_path, layers, pooled):
    captioner = ImplicitCaptioner(12, 8, length=6, pooled_width=pooled, layers=layers)
    for parameter in captioner.parameters():
        nn.init.normal_(parameter)
    captioner.save_pretrained(tmp_path)
    again, told = ImplicitCaptioner.from_pretrained(tmp_path)
    assert told == {}
    embeds = torch.randn(3, 12)
    for mine, theirs in zip(captioner(embeds), again(embeds), strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)
    linears = [m for m in captioner.mlp if isinstance(m, nn.Linear)]
    assert len(linears) == layers


def test_broken_folders_are_refused(tmp_path):
    captioner = ImplicitCaptioner(12, 8)
    captioner.save_pretrained(tmp_path)
    config, weights = tmp_path / "captioner.json", tmp_path / "captioner.safetensors"
    text, content = config.read_text(), weights.read_bytes()
    for broken in ("{", "[]", json.dumps({**json.loads(text), "width": 9}), '{"clip": null}'):
        config.write_text(broken)
        with pytest.raises(BackboneError, match="no whole captioner"):
            ImplicitCaptioner.from_pretrained(tmp_path)
    config.write_text(text)
    weights.write_bytes(content[:-10])
    with pytest.raises(BackboneError, match="no whole captioner"):
        ImplicitCaptioner.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(BackboneError, match="no whole captioner"):
        ImplicitCaptioner.from_pretrained(tmp_path)
