import json
import shutil
from dataclasses import replace

import pytest
import torch

from diffenc import DiffusionEncoder
from diffenc.denoiser.hooks import ForwardTaps
from diffenc.errors import BackboneError, TapError
from diffenc.models import describe, list_backbones, list_taps, load_backbone, match_taps
from diffenc.models.denoisers import build_denoiser
from diffenc.models.taps import TapInfo

FOLDERS = ["tiny_sd_folder", "tiny_sd21_base_folder", "tiny_sd21_folder", "tiny_sdxl_folder"]


@pytest.fixture(params=FOLDERS)
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def broken(tiny_sd_folder, tmp_path):
    """A copy of a good folder, to be damaged."""
    return shutil.copytree(tiny_sd_folder, tmp_path / "broken")


def test_tap_info_equals_real_shapes_for_every_tap(folder):
    backbone = load_backbone(folder)
    taps = backbone.taps()
    assert len(taps) > 100
    side = 16
    embeds = backbone.embed(["red"], size=(64, 64))
    assert taps[0] == TapInfo("latents", 4, backbone.reduction)
    taps = taps[1:]
    names = [tap.name for tap in taps]
    with torch.no_grad(), ForwardTaps(backbone.unet, names) as reader:
        sample = torch.zeros(1, 4, side, side)
        maps = reader.run(lambda: backbone.unet(sample, 10, **embeds.unet_kwargs()))
    for tap in taps:
        cells = side * backbone.reduction // tap.reduction
        assert maps[tap.name].shape == (1, tap.channels, cells, cells), tap


KINDS_OF_TAPS = [
    "latents",
    "conv_in",
    "down_blocks.*",
    "mid_block",
    "up_blocks.*",
    "down_blocks.*.resnets.*",
    "mid_block.resnets.*",
    "up_blocks.*.resnets.*",
    "up_blocks.*.resnets.*.conv2",
    "mid_block.attentions.*",
    "up_blocks.*.attentions.*",
    "up_blocks.*.attentions.*.transformer_blocks.*",
    "mid_block.attentions.*.transformer_blocks.*",
    "up_blocks.*.attentions.*.transformer_blocks.*.attn1.to_[qkv]",
    "up_blocks.*.attentions.*.transformer_blocks.*.attn2.to_q",
    "up_blocks.*.attentions.*.transformer_blocks.*.ff",
    "up_blocks.*.attentions.*.transformer_blocks.*.ff.net.0",
    "down_blocks.*.downsamplers.*",
    "up_blocks.*.upsamplers.*",
]


@pytest.mark.parametrize("size", [(288, 352), (264, 280)], ids=str)
@pytest.mark.parametrize("batch", [1, 7])
def test_every_kind_of_tap_has_the_shape_foretold_at_odd_sizes(folder, size, batch):
    """A cell is a part of the latents, halved and rounded up once per level above it."""
    backbone = load_backbone(folder)
    taps = match_taps(KINDS_OF_TAPS, backbone.taps())
    missing = set(match_taps(["*", *KINDS_OF_TAPS], backbone.taps())) - set(taps)
    assert not missing
    options = {"taps": tuple(tap.name for tap in taps), "resize": "none"}
    encoder = DiffusionEncoder.from_pretrained(backbone, use_cache=False, **options)
    images = torch.linspace(-1, 1, batch * 3 * size[0] * size[1]).reshape(batch, 3, *size)
    posterior = "mode" if batch == 1 else "sample"
    encoder.config = replace(encoder.config, posterior=posterior)
    features = encoder.extract(images, "red circle")
    for tap in taps:
        sides = []
        for side in size:
            cells, reduction = side // backbone.reduction, backbone.reduction
            while reduction < tap.reduction:
                cells, reduction = -(-cells // 2), 2 * reduction
            sides.append(cells)
        assert features[tap.name].shape == (batch, tap.channels, *sides), tap
    assert torch.isfinite(features["latents"]).all()


def test_taps_are_known_without_loading_weights(folder, tmp_path):
    hollow = shutil.copytree(
        folder, tmp_path / "hollow", ignore=shutil.ignore_patterns("*.safetensors")
    )
    assert list_taps(hollow) == load_backbone(folder).taps()


def test_everything_is_frozen_and_evaluating(folder):
    backbone = load_backbone(folder)
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not any(module.training for module in backbone.modules())


def test_globs_stay_within_one_part_of_the_path():
    known = [
        TapInfo(name, 4, 8) for name in ("up_blocks.0", "up_blocks.1", "up_blocks.0.resnets.0")
    ]
    assert [tap.name for tap in match_taps(["up_blocks.*"], known)] == [
        "up_blocks.0",
        "up_blocks.1",
    ]
    assert [tap.name for tap in match_taps(["up_blocks.1", "up_blocks.?"], known)] == [
        "up_blocks.1",
        "up_blocks.0",
    ]
    with pytest.raises(TapError, match=r"Did you mean .*'up_blocks\.0'"):
        match_taps(["up_block.0"], known)


def test_unconditional_rules(tiny_sd_folder, tiny_sdxl_folder):
    sd, sdxl = load_backbone(tiny_sd_folder), load_backbone(tiny_sdxl_folder)
    size = (64, 64)
    empty = sdxl.embed([""], size=size)
    assert torch.equal(
        sd.embed_uncond(None, size=size).prompt_embeds, sd.embed([""], size=size).prompt_embeds
    )
    zeros = sdxl.embed_uncond(None, size=size)
    assert not zeros.prompt_embeds.any()
    assert not zeros.pooled_prompt_embeds.any()
    assert torch.equal(zeros.time_ids, empty.time_ids)
    assert torch.equal(sdxl.embed_uncond("empty", size=size).prompt_embeds, empty.prompt_embeds)


def test_a_backbone_object_is_taken_as_it_is(tiny_sd_folder):
    backbone = load_backbone(tiny_sd_folder)
    assert load_backbone(backbone) is backbone


def test_an_unknown_alias_lists_the_known_ones():
    with pytest.raises(
        BackboneError, match=r"Did you mean 'sd2\.1'.* Known are shapes, shapes-many, sd1\.5"
    ) as e:
        load_backbone("sd2.1b")
    for source in list_backbones():
        assert source.alias in str(e.value)


def test_weights_that_cannot_be_had_name_their_mirrors(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BackboneError, match=r"sd2-community/.*Manojb/.*model_index\.json"):
        load_backbone("sd2.1-base")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(BackboneError, match="nowhere"):
        load_backbone(name)


def test_a_folder_without_an_index_is_refused(tmp_path):
    with pytest.raises(BackboneError, match=r"no model_index\.json"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"_class_name": "Flux2Pipeline"}'])
def test_a_broken_or_foreign_index_is_refused(broken, content):
    (broken / "model_index.json").write_text(content)
    with pytest.raises(BackboneError, match=r"is broken|Flux2Pipeline; diffenc reads"):
        load_backbone(broken)


@pytest.mark.parametrize("part", ["unet", "vae", "tokenizer", "text_encoder", "scheduler"])
def test_a_missing_part_is_named(broken, part):
    shutil.rmtree(broken / part)
    with pytest.raises(BackboneError, match=f"lacks {part}"):
        load_backbone(broken)


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model", "text_encoder/model"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_weights_are_named(broken, file, damage):
    path = broken / f"{file}.safetensors"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BackboneError, match=f"cannot load .*{path.parent.name}"):
        load_backbone(broken)


def test_a_broken_config_is_named(broken):
    (broken / "unet" / "config.json").write_text("{")
    with pytest.raises(BackboneError, match=r"unet.config\.json is no JSON that can be read"):
        load_backbone(broken)


def test_the_schedule_is_the_folder_s(tiny_sd21_folder):
    backbone = load_backbone(tiny_sd21_folder)
    assert backbone.prediction_type == "v_prediction"
    config = json.loads((tiny_sd21_folder / "scheduler" / "scheduler_config.json").read_text())
    betas = torch.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, 1000) ** 2
    torch.testing.assert_close(backbone.scheduler.alphas_cumprod, (1 - betas).cumprod(0))


@pytest.mark.parametrize(
    ("alias", "millions", "taps"),
    [
        ("sd1.5", 859.52, {"up_blocks.1": (1280, 16), "up_blocks.3.attentions.0": (320, 8)}),
        ("sd2.1-base", 865.91, {"mid_block": (1280, 64), "up_blocks.2": (640, 8)}),
        ("sd2.1", 865.91, {"up_blocks.1": (1280, 16)}),
        ("sd3.5-medium", 2243.17, {"transformer_blocks.12.attn": (1536, 16)}),
        ("sana", 1604.46, {"transformer_blocks.10.ff": (2240, 32)}),
        ("pixart-sigma", 610.86, {"transformer_blocks.14.attn2.to_q": (1152, 16)}),
        (
            "sdxl",
            2567.46,
            {
                "up_blocks.0.attentions.0.transformer_blocks.7": (1280, 32),
                "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q": (640, 16),
            },
        ),
    ],
)
def test_known_architectures_have_the_published_size_and_shapes(alias, millions, taps):
    """Parameter counts as published; channels and resolutions as the papers' tables state them."""
    with torch.device("meta"):
        denoiser = build_denoiser(describe(alias).denoiser_config)
    assert sum(p.numel() for p in denoiser.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    known = {tap.name: (tap.channels, tap.reduction) for tap in list_taps(alias)}
    assert taps.items() <= known.items()
