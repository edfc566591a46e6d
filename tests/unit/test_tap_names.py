"""Names of taps in the literature, against the table of the paper and the lists of GDF."""

import json

import pytest
import torch
from PIL import Image

from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError, TapError
from diffenc.hosts.spec import TowerSpec
from diffenc.models import describe, list_taps, match_taps
from diffenc.models.tap_names import gdf_name
from diffenc.models.taps import derived_taps

TABLE_1 = {  # name: module path, channels, tokens of a picture of 512 x 512 pixels
    "D-L2-R0-B0-Cross-Q": ("down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_q", 1280, 256),
    "U-L1-R1-B0-Cross-Q": ("up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q", 1280, 256),
    "U-L1-R1-B0-Out": ("up_blocks.1.attentions.1.transformer_blocks.0", 1280, 256),
    "U-L1-R2-B0-Cross-Q": ("up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_q", 1280, 256),
    "U-L2-R1-B0-Cross-Q": ("up_blocks.2.attentions.1.transformer_blocks.0.attn2.to_q", 640, 1024),
    "U-L2-R2-Res-Out": ("up_blocks.2.resnets.2", 640, 1024),
}
GDF = {
    "up-level1-upsampler-out": "up_blocks.1.upsamplers.0",
    "down-level0-downsampler-out": "down_blocks.0.downsamplers.0",
    "up-level2-repeat1-res-increment": "up_blocks.2.resnets.1.conv2",
    "up-level1-repeat2-vit-out": "up_blocks.1.attentions.2",
    "up-level3-repeat0-vit-block0-self-k": (
        "up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_k"
    ),
    "up-level1-repeat2-vit-block0-ffn-inner": (
        "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0"
    ),
    "mid-vit-out": "mid_block.attentions.0",
    "mid-repeat1-res-out": "mid_block.resnets.1",
    "mid-vit-block0-cross-q": "mid_block.attentions.0.transformer_blocks.0.attn2.to_q",
}


@pytest.mark.parametrize("name", TABLE_1)
def test_the_papers_six_layers_lie_where_its_table_says(name):
    path, channels, tokens = TABLE_1[name]
    (tap,) = describe("sd2.1-base").match_taps([name])
    assert (tap.name, tap.channels, (512 // tap.reduction) ** 2) == (path, channels, tokens)
    assert match_taps(name.lower(), list_taps("sd2.1-base")) == (tap,)


@pytest.mark.parametrize("name", GDF)
def test_names_of_gdf_are_module_paths(name):
    (tap,) = match_taps(name, list_taps("sd1.5"))
    assert tap.name == GDF[name]


@pytest.mark.parametrize("model", ["sd1.5", "sdxl", "shapes"])
def test_no_two_taps_share_a_name(model):
    names = [name for tap in list_taps(model) if (name := gdf_name(tap.name))]
    assert len(set(names)) == len(names) > 50
    for name in names:
        assert gdf_name(match_taps(name, list_taps(model))[0].name) == name


def test_unknown_names_offer_near_ones_and_texts_are_no_maps():
    taps = list_taps("sd2.1-base")
    with pytest.raises(TapError, match="up-level1-repeat1-vit-block0-cross-q"):
        match_taps("U-L1-R1-B1-Cross-Q", taps)
    with pytest.raises(TapError, match=r"is called 'U-L9-R1-B0-Out'"):
        match_taps("U-L9-R1-B0-Out", taps)
    for name in ("up-level1-repeat1-vit-block0-cross-k", "mid-vit-block0-cross-map"):
        with pytest.raises(TapError, match="has no map of the picture"):
            match_taps(name, taps)


@pytest.mark.long
def test_encoders_and_towers_take_the_names(tiny_sd_folder, tmp_path):
    image = Image.new("RGB", (64, 64), "red")
    named = DiffusionEncoder.from_pretrained(tiny_sd_folder, taps="U-L1-R1-B0-Cross-Q", size=64)
    plain = DiffusionEncoder.from_pretrained(
        tiny_sd_folder, taps=TABLE_1["U-L1-R1-B0-Cross-Q"][0], size=64
    )
    assert torch.equal(named(image, "red"), plain(image, "red"))
    named.save_pretrained(tmp_path / "saved")
    again = DiffusionEncoder.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(image, "red"), plain(image, "red"))
    spec = TowerSpec.parse("diffenc:sd2.1-base?taps=U-L1-R1-B0-Cross-Q+mid-vit-out")
    assert [tap.name for tap in spec.tap_infos] == [
        TABLE_1["U-L1-R1-B0-Cross-Q"][0],
        "mid_block.attentions.0",
    ]
    assert TowerSpec.parse(str(spec)) == spec


def test_the_papers_preset_reads_its_best_layer_and_says_where_it_cannot(
    tiny_sd21_folder, tiny_sdxl_folder
):
    encoder = DiffusionEncoder.from_pretrained(tiny_sd21_folder, preset="mustafar", size=64)
    assert [tap.name for tap in encoder.feature_info] == [TABLE_1["U-L1-R1-B0-Cross-Q"][0]]
    assert (encoder.config.timestep, encoder.config.draws) == (50, 1)
    other = DiffusionEncoder.from_pretrained(tiny_sd21_folder, preset="mustafar", timestep=10)
    assert other.config.timestep == 10
    with pytest.raises(ConfigError, match=r"reads SD 2\.1 alone, and its draft reads SDXL"):
        DiffusionEncoder.from_pretrained(tiny_sdxl_folder, preset="mustafar")


def test_the_bundled_models_places_are_those_that_a_pass_finds():
    architecture = describe("shapes")
    config = json.dumps(architecture.configs["unet"])
    assert derived_taps(config, architecture.reduction) == architecture.taps()
