import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import builders
from diffenc import DiffusionEncoder, FusedEncoder, FusedProjector, Projector, projector_for
from diffenc.clip.tokens import ClipTokens
from diffenc.errors import BackboneError, ConfigError, NonFiniteError, OutputError, ShapeError

SIZES = {
    "hidden_size": 12,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
PROCESSOR = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def clip_vision() -> CLIPVisionModel:
    return builders.seeded(lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES)))


def clip_whole() -> CLIPModel:
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    special = {"vocab_size": 9, "num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(vision_config=SIZES, text_config={**text, **special})
    return builders.seeded(lambda: CLIPModel(config))


def siglip(**options: int) -> SiglipVisionModel:
    config = SiglipVisionConfig(**{**SIZES, **options})
    return builders.seeded(lambda: SiglipVisionModel(config))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def diffusion(tiny_sd_folder: Path) -> DiffusionEncoder:
    return DiffusionEncoder.from_pretrained(tiny_sd_folder)


@pytest.fixture
def fuse(diffusion) -> Callable[..., FusedEncoder]:
    def make(how: str = "channel", clip: nn.Module | None = None, **options: object):
        options.setdefault("image_processor", PROCESSOR)
        return FusedEncoder(clip or clip_vision(), diffusion, how, **options)

    return make


def by_hand(model: nn.Module, images: list[Image.Image], layer: int = -2) -> torch.Tensor:
    """What transformers itself gives."""
    pixel_values = PROCESSOR(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model(pixel_values, output_hidden_states=True).hidden_states[layer][:, 1:]


def diffusion_maps(encoder: DiffusionEncoder, images, prompts, side: int) -> torch.Tensor:
    """Tokens on a square grid, made with torch alone."""
    maps = []
    for features in encoder.extract(images, prompts).values():
        times = features.shape[-1] / side
        maps.append(
            F.avg_pool2d(features, int(times))
            if times >= 1
            else F.interpolate(features, scale_factor=1 / times, mode="bilinear")
        )
    return torch.cat(maps, dim=1).flatten(2).mT


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("how", ["channel", "tokens", "interleave"])
def test_both_streams_lie_where_the_way_of_fusing_says(fuse, how, count) -> None:
    encoder = fuse(how, grid=4)
    images = [picture(64, 64, seed) for seed in range(count)]
    prompts = [f"a red {'square' if seed % 2 else 'circle'}" for seed in range(count)]
    clip = by_hand(clip_vision(), images)
    features = diffusion_maps(encoder.diffusion, images, prompts, 4)
    tokens = encoder(images, prompts)
    assert tokens.shape[-1] == encoder.hidden_size == 12 + features.shape[-1]
    if how == "channel":
        expected = [clip, features]
        found = [tokens[..., :12], tokens[..., 12:]]
    else:
        first = tokens[:, :16] if how == "tokens" else tokens[:, 0::2]
        second = tokens[:, 16:] if how == "tokens" else tokens[:, 1::2]
        expected = [clip, features, torch.zeros(()), torch.zeros(())]
        found = [first[..., :12], second[..., 12:], first[..., 12:].sum(), second[..., :12].sum()]
    for part, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(part, wanted, rtol=1e-5, atol=1e-5)


def test_the_common_grid_is_clips_unless_another_is_asked_for(fuse) -> None:
    image = picture(64, 64)
    assert fuse().grid == (4, 4)
    assert fuse()(image, "a").shape[1] == 16
    assert fuse("interleave")(image, "a").shape[1] == 32
    encoder = fuse(grid=(2, 8))
    tokens = encoder(image, "a")
    assert tokens.shape[1] == 16
    maps = by_hand(clip_vision(), [image]).mT.unflatten(2, (4, 4))
    rows = F.interpolate(F.avg_pool2d(maps, (2, 1)), size=(2, 8), mode="bilinear")
    torch.testing.assert_close(tokens[..., :12], rows.flatten(2).mT)


def test_in_sequence_each_keeps_its_own_grid(fuse, diffusion) -> None:
    encoder, image = fuse("tokens"), picture(64, 64)
    alone = diffusion(image, "a")
    tokens = encoder(image, "a")
    assert encoder.grid is None
    assert encoder.clip_tokens == 16
    assert tokens.shape[1] == 16 + alone.shape[1]
    assert torch.equal(tokens[:, 16:, 12:], alone)


def test_only_the_diffusion_half_reads_the_prompt(fuse) -> None:
    encoder, image = fuse(), picture(64, 64)
    red, blue, none = (encoder(image, text) for text in ("a red circle", "a blue square", None))
    assert torch.equal(red[..., :12], blue[..., :12])
    assert not torch.allclose(red[..., 12:], blue[..., 12:])
    assert torch.equal(none, encoder(image, ""))


@pytest.mark.parametrize("layer", [-4, -2, -1, 0, 3])
def test_the_layer_is_the_one_asked_for(fuse, layer) -> None:
    image = picture(32, 32)
    tokens = fuse(layer=layer)(image)
    torch.testing.assert_close(tokens[..., :12], by_hand(clip_vision(), [image], layer))


def test_a_whole_clip_model_gives_its_vision_part(fuse) -> None:
    whole, image = clip_whole(), picture(48, 48)
    encoder = fuse(clip=whole)
    torch.testing.assert_close(encoder(image)[..., :12], by_hand(whole.vision_model, [image]))
    names = [name for name, _ in encoder.clip.named_parameters()]
    assert not any("text" in name for name in names)


def test_siglip_has_no_class_token_to_drop(fuse) -> None:
    model, image = siglip(), picture(40, 40)
    processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    tokens = fuse(clip=model, image_processor=processor)(image)
    pixel_values = processor(images=[image], return_tensors="pt")["pixel_values"]
    states = model(pixel_values, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(tokens[..., :12], states)
    assert tokens.shape[1] == 16


def test_a_patch_that_does_not_divide_the_picture_is_taken(fuse) -> None:
    processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    encoder = fuse(clip=siglip(patch_size=9), image_processor=processor)
    assert encoder.grid == (3, 3)
    assert encoder(picture(32, 32)).shape[1] == 9


def quadrant(height: int, width: int) -> Image.Image:
    """Black, with a white patch in the last eighth of the longer side."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[-max(height // 8, 1) :, -max(width // 8, 1) :] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("rule", ["squash", "crop", "pad", "none"])
def test_clip_sees_what_the_diffusion_encoder_sees(tiny_sd_folder, rule) -> None:
    wide = DiffusionEncoder.from_pretrained(tiny_sd_folder, resize=rule)
    seen: list[np.ndarray] = []

    class Watch:
        def __call__(self, images, return_tensors):
            seen.extend(np.asarray(image) for image in images)
            return PROCESSOR(images=images, return_tensors=return_tensors)

    encoder = FusedEncoder(clip_vision(), wide, image_processor=Watch())
    encoder(quadrant(64, 128))
    view = seen[0][..., 0].astype(float)
    height, width = view.shape
    assert height == width
    corner = view[-height // 16 :, -width // 16 :].mean()
    if rule in ("squash", "none"):
        assert corner > 200
    elif rule == "crop":
        assert view.max() < 60
    else:  # grey bars above and below, the patch right in the last rows of the picture
        assert abs(corner - 127.5) < 2
        assert view[height * 3 // 4 - height // 16 : height * 3 // 4, -width // 16 :].mean() > 150


def test_clips_own_view_cuts_what_is_not_square(fuse) -> None:
    image = quadrant(64, 128)
    own = fuse(view="own")(image)[..., :12]
    torch.testing.assert_close(own, by_hand(clip_vision(), [image]))
    assert not torch.allclose(own, fuse()(image)[..., :12], atol=1e-3)


def test_every_kind_of_picture_gives_the_same_tokens(fuse, tmp_path) -> None:
    encoder, image = fuse(), picture(64, 64)
    image.save(tmp_path / "x.png")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 127.5 - 1
    expected = encoder(image, "a")
    for other in (str(tmp_path / "x.png"), array, tensor, tensor[None], [image]):
        torch.testing.assert_close(encoder(other, "a"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["channel", "tokens", "interleave"])
@pytest.mark.parametrize("by_name", [True, False])
def test_what_is_saved_comes_back(tmp_path, diffusion, how, by_name) -> None:
    clip_vision().save_pretrained(tmp_path / "clip")
    PROCESSOR.save_pretrained(tmp_path / "clip")
    given = {"clip": tmp_path / "clip"}
    if not by_name:
        given = {"clip": clip_vision(), "image_processor": PROCESSOR}
    encoder = FusedEncoder(diffusion=diffusion, how=how, layer=-1, grid=(4, 2), **given)
    encoder.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "clip").is_dir() != by_name
    again = FusedEncoder.from_pretrained(tmp_path / "saved")
    image = picture(64, 96)
    assert torch.equal(again(image, "a red circle"), encoder(image, "a red circle"))
    assert (again.how, again.grid, again.clip.layer) == (how, (4, 2), -1)


def test_a_trained_clip_is_saved_with_its_weights(tmp_path, diffusion) -> None:
    clip_vision().save_pretrained(tmp_path / "clip")
    PROCESSOR.save_pretrained(tmp_path / "clip")
    encoder = FusedEncoder(tmp_path / "clip", diffusion, freeze_clip=False)
    with torch.no_grad():
        for parameter in encoder.clip.parameters():
            parameter.mul_(1.1)
    encoder.save_pretrained(tmp_path / "saved")
    again = FusedEncoder.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(picture(64, 64)), encoder(picture(64, 64)))
    assert not again.clip.frozen


def test_both_models_can_be_written_into_the_folder(tmp_path, diffusion, monkeypatch) -> None:
    clip_vision().save_pretrained(tmp_path / "clip")
    PROCESSOR.save_pretrained(tmp_path / "clip")
    monkeypatch.chdir(tmp_path)
    encoder = FusedEncoder("clip", diffusion)
    assert encoder.clip.name == str(tmp_path / "clip")
    encoder.save_pretrained("saved", include_backbone=True)
    (tmp_path / "clip").rename(tmp_path / "elsewhere")
    again = FusedEncoder.from_pretrained("saved")
    assert torch.equal(again(picture(64, 64)), encoder(picture(64, 64)))


def test_the_vision_part_of_a_whole_model_is_saved_too(tmp_path, fuse) -> None:
    encoder = fuse(clip=clip_whole())
    encoder.save_pretrained(tmp_path)
    again = FusedEncoder.from_pretrained(tmp_path)
    assert torch.equal(again(picture(64, 64)), encoder(picture(64, 64)))
    assert not any("text" in key for key in load_file(tmp_path / "clip" / "model.safetensors"))


def test_half_saved_folders_are_refused(tmp_path, fuse) -> None:
    with pytest.raises(BackboneError, match="does not hold"):
        FusedEncoder.from_pretrained(tmp_path)
    fuse().save_pretrained(tmp_path)
    (tmp_path / "clip").rename(tmp_path / "elsewhere")
    with pytest.raises(BackboneError, match="'clip' is missing"):
        FusedEncoder.from_pretrained(tmp_path)
    told = json.loads((tmp_path / "fusion.json").read_text())
    (tmp_path / "fusion.json").write_text(json.dumps({k: told[k] for k in told if k != "how"}))
    with pytest.raises(BackboneError, match="how"):
        FusedEncoder.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        fuse().save_pretrained(tmp_path / "file")


def test_a_failed_save_leaves_no_folder_that_loads(tmp_path, fuse, monkeypatch) -> None:
    encoder = fuse()
    encoder.save_pretrained(tmp_path)

    def fail(folder):
        raise OSError("disk full")

    monkeypatch.setattr(encoder.clip.model, "save_pretrained", fail)
    with pytest.raises(OutputError, match="disk full"):
        encoder.save_pretrained(tmp_path)
    with pytest.raises(BackboneError):
        FusedEncoder.from_pretrained(tmp_path)


def test_a_frozen_encoder_has_nothing_to_train(fuse) -> None:
    encoder = fuse()
    assert not [name for name, p in encoder.named_parameters() if p.requires_grad]
    assert not encoder(picture(64, 64), "a").requires_grad


@pytest.mark.parametrize("layer", [-3, -2, -1])
@pytest.mark.parametrize("make", [clip_vision, siglip])
def test_an_unfrozen_clip_has_gradients_everywhere_and_nowhere_else(fuse, make, layer) -> None:
    processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    encoder = fuse(clip=make(), layer=layer, freeze_clip=False, image_processor=processor)
    encoder(picture(64, 64), "a").square().mean().backward()
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    reached = {name for name, p in encoder.named_parameters() if p.grad is not None}
    assert trained == reached
    assert all(name.startswith("clip.") for name in trained)
    depth = 1 + max(int(name.split("layers.")[1][0]) for name in trained if "layers." in name)
    assert depth == 4 + layer
    assert any("position_embedding" in name for name in trained)


def test_clip_runs_once_for_several_questions(fuse) -> None:
    encoder, image = fuse(), picture(64, 64)
    calls = []
    encoder.clip.model.register_forward_hook(lambda *_: calls.append(1))
    first = encoder([image, image], ["a red circle", "a blue square"])
    encoder(image, "a photo")
    assert len(calls) == 1
    encoder.clear_cache()
    again = encoder([image, image], ["a red circle", "a blue square"])
    assert len(calls) == 2
    assert torch.equal(first, again)
    with torch.no_grad():
        for parameter in encoder.clip.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(encoder(image)[..., :12], first[:1, :, :12])


def test_tokens_do_not_share_memory_with_the_cache(fuse) -> None:
    encoder, image = fuse("tokens"), picture(64, 64)
    first = encoder.clip(image)
    first.zero_()
    assert encoder.clip(image).abs().sum() > 0


@pytest.mark.parametrize("count", [1, 7])
def test_a_picture_has_the_same_tokens_in_any_batch(fuse, count) -> None:
    encoder = fuse("interleave")
    images = [picture(64, 64 + 8 * seed, seed) for seed in range(count)]
    alone = torch.cat([encoder(image, "a circle") for image in images])
    encoder.clear_cache()
    torch.testing.assert_close(encoder(images, "a circle"), alone, rtol=1e-5, atol=1e-5)


def test_half_precision_goes_through_and_nan_is_refused(tiny_sd_folder) -> None:
    encoder = FusedEncoder(
        clip_vision(), DiffusionEncoder.from_pretrained(tiny_sd_folder), image_processor=PROCESSOR
    )
    image = picture(64, 64)
    exact = encoder(image, "a red circle")
    encoder.to(torch.bfloat16)
    tokens = encoder(image, "a red circle")
    assert tokens.dtype == encoder.dtype == torch.bfloat16
    clip = exact[..., :12]
    torch.testing.assert_close(
        tokens[..., :12].float(), clip, rtol=0, atol=2e-2 * float(clip.abs().max())
    )
    with torch.no_grad():
        next(encoder.clip.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="NaN"):
        encoder(image, "a red circle")


def test_clips_precision_may_differ_from_the_u_nets(fuse) -> None:
    encoder = fuse(clip=clip_vision().to(torch.bfloat16))
    assert encoder(picture(64, 64)).dtype == torch.float32


def test_channels_are_told_before_anything_runs(fuse, diffusion) -> None:
    encoder = fuse()
    assert encoder.token_channels == (12, *diffusion.token_channels)
    assert encoder.stream_channels == (12, diffusion.hidden_size)
    assert [tap.channels for tap in encoder.feature_info] == list(encoder.token_channels)
    assert encoder.feature_info[0].reduction == 8


@pytest.mark.parametrize("how", ["channel", "tokens", "interleave"])
@pytest.mark.parametrize("norm", [True, False])
def test_the_projector_that_fits_is_made(fuse, how, norm) -> None:
    encoder = fuse(how)
    projector = projector_for(encoder, 10, norm=norm)
    assert isinstance(projector, Projector if how == "channel" else FusedProjector)
    widths = projector.norm_channels
    flat = widths if how == "channel" else sum(widths, ())
    assert flat == (encoder.token_channels if norm else ())
    tokens = encoder([picture(64, 64)], "a circle")
    assert projector(tokens).shape == (*tokens.shape[:2], 10)
    plain = Projector(encoder.hidden_size, 10, norm_channels=encoder.token_channels)
    assert plain(tokens).shape == (*tokens.shape[:2], 10)


def test_a_device_is_shared_by_both(fuse, diffusion) -> None:
    encoder = fuse()
    encoder.clip.to("meta")
    with pytest.raises(ConfigError, match=r"CLIP is on meta .* on cpu; move both"):
        encoder(picture(64, 64))
    with pytest.raises(ConfigError, match="move both"):
        fuse(clip=clip_vision().to("meta"))


def test_variable_grids_cannot_be_matched(fuse) -> None:
    model = clip_vision()
    model.config.image_size = (32, 48)
    with pytest.raises(ConfigError, match=r"cannot be matched.*Square grids can"):
        fuse(clip=model)


def test_tokens_that_form_no_grid_are_refused(fuse) -> None:
    encoder = fuse()
    encoder.clip.side = 5
    with pytest.raises(ShapeError, match="25 tokens can, or 26 with a class token"):
        encoder(picture(64, 64))


def test_an_image_processor_of_another_model_is_refused(fuse) -> None:
    other = CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40})
    with pytest.raises(ShapeError, match=r"gives \(40, 40\) pixels and the model takes \(32, 32\)"):
        fuse(image_processor=other)(picture(64, 64))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param({"how": "channels"}, "how must be one of", marks=pytest.mark.wrong_type),
        pytest.param({"view": "mine"}, "view must be one of", marks=pytest.mark.wrong_type),
        ({"grid": 0}, "grid must be a positive int"),
        ({"layer": 4}, "layer must be -4 to 3"),
        ({"layer": -5}, "layer must be -4 to 3"),
        ({"image_processor": None}, "image processor of this CLIP is not known"),
        ({"clip": nn.Linear(2, 2)}, "of the kind 'Linear'; taken are CLIPVisionModel"),
    ],
)
def test_bad_options_are_named(fuse, options, said) -> None:
    with pytest.raises(ConfigError, match=said):
        fuse(**options)


def test_the_stream_of_clip_runs_no_diffusion(fuse, monkeypatch) -> None:
    encoder, images = fuse(grid=2), [picture(64, 64), picture(32, 96, seed=1)]
    expected = encoder.streams(images, "a")[0]
    monkeypatch.setattr(encoder.diffusion, "extract", None)
    assert torch.equal(encoder.clip_stream(images), expected)


def test_a_clip_that_was_saved_with_weights_is_saved_with_them_again(fuse, tmp_path: Path) -> None:
    fuse().save_pretrained(tmp_path / "first")
    again = FusedEncoder.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    found = FusedEncoder.from_pretrained(tmp_path / "second").clip
    for name, value in clip_vision().state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value)


def test_a_clip_is_frozen_and_let_go_again(diffusion, tmp_path: Path) -> None:
    clip_vision().save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    clip = ClipTokens.from_pretrained(tmp_path)
    named = ClipTokens.from_pretrained(tmp_path, frozen=False)
    wanted = {name for name, p in named.named_parameters() if p.requires_grad}
    assert wanted
    assert (clip.name, named.name) == (str(tmp_path), None)
    clip.freeze(False)
    assert {name for name, p in clip.named_parameters() if p.requires_grad} == wanted
    assert clip.train().model.training
    clip.freeze()
    assert not any(p.requires_grad for p in clip.parameters())
    assert not clip.model.training
    assert clip.name is None


def test_several_timesteps_are_refused(tiny_sd_folder) -> None:
    several = DiffusionEncoder.from_pretrained(tiny_sd_folder, timestep=(50, 261))
    with pytest.raises(ConfigError, match="one timestep"):
        FusedEncoder(clip_vision(), several, image_processor=PROCESSOR)


def test_names_of_no_clip_are_refused(diffusion, tmp_path, tiny_sd_folder) -> None:
    with pytest.raises(BackboneError, match="cannot load a CLIP"):
        FusedEncoder(tmp_path / "nowhere", diffusion)
    with pytest.raises(BackboneError, match="of the kind 'clip_text_model'"):
        FusedEncoder(tiny_sd_folder / "text_encoder", diffusion)


@pytest.mark.parametrize(
    ("images", "prompts"),
    [
        ([], "a"),
        (picture(64, 64), ["a", "b"]),
        pytest.param(3, "a", marks=pytest.mark.wrong_type),
    ],
    ids=["no pictures", "more prompts", "no picture"],
)
def test_bad_pictures_and_prompts_say_so_as_without_fusion(fuse, images, prompts) -> None:
    encoder = fuse()
    with pytest.raises(ValueError, match=r".") as alone:
        encoder.diffusion(images, prompts)
    with pytest.raises(type(alone.value)):
        encoder(images, prompts)


def test_a_clip_of_ones_own_making_is_taken(diffusion) -> None:
    clip = ClipTokens(clip_vision(), PROCESSOR, layer=-1)
    assert FusedEncoder(clip, diffusion).clip is clip


@pytest.mark.parametrize(
    ("name", "value"), [("layer", -3), ("freeze_clip", False), ("image_processor", object())]
)
def test_options_beside_clip_tokens_are_theirs_or_refused(diffusion, name, value) -> None:
    clip = ClipTokens(clip_vision(), PROCESSOR, layer=-1)
    with pytest.raises(ConfigError, match=f"ClipTokens has its own {name}, and another"):
        FusedEncoder(clip, diffusion, **{name: value})
    own = FusedEncoder(clip, diffusion, layer=-1, image_processor=clip.image_processor)
    assert own.clip is clip
