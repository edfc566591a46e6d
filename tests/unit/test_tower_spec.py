import pickle
import re

import pytest
import torch

from diffenc.config import EncoderConfig
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError, DiffencError, TapError
from diffenc.hosts.spec import TowerSpec, long_tap, short_tap

# Hosts look for these in a tower's name, and split it at these marks.
OTHER_TOWERS = ["clip", "sig", "eva", "mae", "sam", "moco", "maws", "midas", "dinov2", "openai"]
OTHER_TOWERS += ["laion", "ShareGPT4V", "diffusion", "lora", ";", ",", "."]


@pytest.mark.parametrize(
    "text",
    [
        "diffenc:sdxl",
        "diffenc:sd21-base?t=261",
        "diffenc:sdxl?t=50&taps=up1&size=512&lora=16&clip=vitl336&how=channel",
        "diffenc:shapes?taps=up0a1+up2a0&cond=cfg&scale=1%2E25&grid=5&seed=7&draws=2&batch=3",
        "diffenc:shapes?t=50&reuse=down&taps=up1",
        "diffenc:shapes?noise=none&uncond=zeros&rank=4&alpha=8&null=a%20photo%2C%20big&cut=0",
        "diffenc:/data/my.models/v1.5?dtype=bf16&prompted=1",
    ],
)
def test_a_spec_survives_its_own_text(text) -> None:
    spec = TowerSpec.parse(text)
    again = TowerSpec.parse(str(spec))
    assert again == spec
    assert str(again) == str(spec)


def test_words_of_the_text_mean_what_they_say() -> None:
    spec = TowerSpec.parse(
        "diffenc:sd21-base?t=261&taps=up1a0b0+mid&size=256&grid=9&cond=concat&lora=8&alpha=16"
        "&clip=vitl336&how=tokens&null=a%20photo&prompted=1&cut=0&dtype=fp16&noise=none&seed=3"
    )
    assert spec == TowerSpec(
        model="sd2.1-base",
        timestep=261,
        taps=("up_blocks.1.attentions.0.transformer_blocks.0", "mid_block"),
        size=256,
        grid=9,
        conditioning="concat",
        rank=8,
        alpha=16.0,
        fuse="vitl336",
        how="tokens",
        null="a photo",
        prompted=True,
        cut=False,
        dtype="fp16",
        noise=None,
        seed=3,
    )
    assert spec.encoder_config() == EncoderConfig(
        taps=spec.taps, timestep=261, size=256, grid=9, conditioning="concat", noise=None, seed=3
    )


def test_canonical_text_holds_nothing_that_hosts_react_to() -> None:
    spec = TowerSpec.parse("diffenc:sdxl?t=50&taps=up_blocks.1.attentions.0&lora=16&clip=vitl336")
    text = str(spec)
    assert not [word for word in OTHER_TOWERS if word.lower() in text.lower()]


@pytest.mark.parametrize(
    ("text", "part", "words"),
    [
        ("diffenc:sdxl?t=5o&rank=16", "t=5o", "whole number"),
        ("diffenc:sdxl?t=50&rnk=16", "rnk=16", "Did you mean 'rank'"),
        ("diffenc:sdxl?t=50&rank", "rank", "key=value"),
        ("diffenc:sdxl?cond=cnd", "cond=cnd", "cond"),
        ("diffenc:sdxl?taps=up1++up2&t=3", "taps=up1++up2", "joined by one"),
        ("diffenc:sdxl?t=1&timestep=2", "timestep=2", "twice"),
        ("diffenc:sdxl?rank=0", "rank=0", "1 or more"),
        ("diffenc:sdxl?rank=-1", "rank=-1", "1 or more"),
        ("diffenc:sdxl?t=²", "t=²", "whole number"),
        ("diffenc:sdxl?clip=vitl33", "clip=vitl33", "vitl336"),
        ("diffenc:sdxl?scale=x", "scale=x", "number"),
        ("diffenc:sdxl?cut=yes", "cut=yes", "0 or 1"),
        ("diffenc:sdxl?dtype=int8", "dtype=int8", "fp16"),
        ("diffenc:sdxl?null=", "null=", "text"),
        ("diffenc:sdxl?&t=1", "", "key=value"),
    ],
)
def test_an_error_points_at_the_part(text, part, words) -> None:
    with pytest.raises(ConfigError) as caught:
        TowerSpec.parse(text)
    message = str(caught.value)
    assert re.search(re.escape(words), message)
    shown, marks = message.splitlines()[-2:]
    start = marks.index("^")
    assert shown[start : start + marks.count("^")].startswith(part)
    assert shown.strip() == text


@pytest.mark.parametrize("text", ["sdxl", "diffenc:", "diffenc:?t=5", "openai/clip", "", "diffenc"])
def test_what_is_no_spec_is_told(text) -> None:
    with pytest.raises(ConfigError):
        TowerSpec.parse(text)


@pytest.mark.parametrize(
    "text", ["diffenc:shapes?t=1000", "diffenc:shapes?alpha=2", "diffenc:sdxl?scale=nan"]
)
def test_values_that_parse_and_are_not_allowed_are_told_with_the_text(text) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        TowerSpec.parse(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("diffenc:shapes?k=4", "add tokens=words or tokens=grid+words"),
        ("diffenc:shapes?k=8", "add tokens=words or tokens=grid+words"),
        ("diffenc:shapes?scale=1%2E5&cond=cond", "read with cond=cfg alone"),
        ("diffenc:shapes?how=channel", "name it by fuse="),
        ("diffenc:shapes?words=4", "add tokens=words or tokens=grid+words"),
        ("diffenc:shapes?tokens=grid&k=4", "add tokens=words or tokens=grid+words"),
        ("diffenc:shapes?scale=3", "read with cond=cfg alone"),
        ("diffenc:shapes?how=tokens", "name it by fuse="),
        ("diffenc:shapes?tokens=words&grid=4", "tokens=words has none"),
        ("diffenc:shapes?taps=up1%2Bup1", "taps name 'up_blocks.1' twice"),
        ("diffenc:shapes?scale=3&cond=concat", "read with cond=cfg alone"),
    ],
)
def test_options_that_nothing_reads_are_refused_with_what_reads_them(text, said) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        TowerSpec.parse(text)


@pytest.mark.parametrize("size", [66, 500 + 2, 3])
def test_sizes_that_the_model_does_not_take_are_told_before_a_host_builds_on_them(size) -> None:
    spec = TowerSpec.parse(f"diffenc:shapes?size={size}")
    for name in ("image_size", "num_patches", "num_patches_per_side"):
        with pytest.raises(ConfigError, match=f"size={size} is no multiple of 4"):
            getattr(spec, name)


def test_unknown_models_and_taps_are_told_when_their_sizes_are_asked_for() -> None:
    with pytest.raises(DiffencError, match="shpes"):
        _ = TowerSpec.parse("diffenc:shpes").hidden_size
    with pytest.raises(TapError):
        _ = TowerSpec.parse("diffenc:shapes?taps=up9").hidden_size


@pytest.mark.parametrize(
    ("short", "path"),
    [
        ("up1", "up_blocks.1"),
        ("mid", "mid_block"),
        ("down0r1", "down_blocks.0.resnets.1"),
        ("mida0", "mid_block.attentions.0"),
        ("up1a0b7", "up_blocks.1.attentions.0.transformer_blocks.7"),
        ("up1a1b0-attn2-to_q", "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q"),
        ("latents", "latents"),
        ("up_blocks.*", "up_blocks.*"),
    ],
)
def test_short_taps_and_paths_are_one(short, path) -> None:
    assert long_tap(short) == path
    assert long_tap(path) == path
    assert short_tap(path) == short


@pytest.mark.parametrize(
    "options",
    [
        "",
        "?taps=up1",
        "?taps=mid+up0",
        "?size=72&taps=down1+up0",
        "?cond=concat&grid=3",
        "?size=96",
    ],
)
def test_sizes_told_before_loading_are_those_of_the_features(options) -> None:
    spec = TowerSpec.parse(f"diffenc:shapes{options}")
    encoder = DiffusionEncoder.from_pretrained("shapes", **spec.encoder_config().to_dict())
    tokens = encoder(torch.zeros(2, 3, spec.image_size, spec.image_size), "a circle")
    assert tokens.shape == (2, spec.num_patches, spec.hidden_size)
    assert spec.num_patches_per_side**2 == spec.num_patches
    assert encoder.token_channels == spec.token_channels
    assert TowerSpec.parse(f"diffenc:shapes{options}") == pickle.loads(pickle.dumps(spec))


@pytest.mark.parametrize(
    ("text", "hidden_size", "num_patches", "image_size"),
    [
        ("diffenc:sd21-base?taps=up1", 1280, 1024, 512),  # 512 / 8 / 2 after the upsampler
        ("diffenc:sdxl?taps=up0", 1280, 1024, 512),
        ("diffenc:sdxl?taps=up0&clip=vitl336", 1280 + 1024, 576, 512),
        ("diffenc:sdxl?taps=up0&clip=vitl336&how=tokens", 1280 + 1024, 1024 + 576, 512),
        ("diffenc:sdxl?taps=up0&clip=vitl336&how=interleave", 1280 + 1024, 2 * 576, 512),
    ],
)
def test_sizes_of_real_models_need_no_weights(text, hidden_size, num_patches, image_size) -> None:
    spec = TowerSpec.parse(text)
    assert (spec.hidden_size, spec.num_patches) == (hidden_size, num_patches)
    assert spec.image_size == image_size


def test_two_rows_of_tokens_form_no_square() -> None:
    with pytest.raises(ConfigError, match="no square"):
        _ = TowerSpec.parse("diffenc:sdxl?clip=vitl336&how=tokens").num_patches_per_side
