"""What `save_pretrained` writes gives the same features when it is read, in every combination."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from tests import builders
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from diffenc import DiffusionEncoder
from diffenc.errors import BackboneError, ConfigError, OutputError

FOLDERS = {"sd": "tiny_sd_folder", "sdxl": "tiny_sdxl_folder"}
ARGUMENTS = {"taps": ("up_blocks.0", "mid_block"), "size": 64, "timestep": 261}


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8))


def tiny_clip(**options) -> CLIPVisionModelWithProjection:
    values = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    values |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8, "projection_dim": 12}
    config = CLIPVisionConfig(**{**values, **options})
    return builders.seeded(lambda: CLIPVisionModelWithProjection(config))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-clip")
    tiny_clip().save_pretrained(folder)
    return folder


def shake(encoder) -> None:
    """Everything that trains as if it had been trained."""
    generator = torch.Generator().manual_seed(len(encoder.lora_names))
    with torch.no_grad():
        for parameter in encoder.trainable_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def features(encoder) -> list[torch.Tensor]:
    """Without caches, so that equal calls have equal batches, and equal rounding."""
    encoder.use_cache = False
    prompts = [None, "red circle"]
    return [encoder(picture(), p) for p in prompts] + [
        encoder.extract(picture(), "red", conditioning="concat").tokens()
    ]


def assert_equal(first, second) -> None:
    """Equal but for rounding: what trains runs whole, what is frozen its text-free part once."""
    for mine, theirs in zip(features(first), features(second), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def build(folder, parts, clip_folder, **options) -> DiffusionEncoder:
    encoder = DiffusionEncoder.from_pretrained(folder, **ARGUMENTS, **options)
    if "captioner" in parts:
        encoder.add_captioner(clip_folder)
    if "lora" in parts:
        encoder.add_lora(rank=2, name="first")
        shake(encoder)
        encoder.add_lora(rank=1, alpha=4.0, name="second", projections=("to_k", "to_v"))
    shake(encoder)
    return encoder


COMBINATIONS = [
    *(("sd", parts) for parts in ((), ("lora",), ("captioner",), ("lora", "captioner"))),
    ("sdxl", ("lora", "captioner")),
]


@pytest.mark.long
@pytest.mark.parametrize("included", [False, True])
@pytest.mark.parametrize(("kind", "parts"), COMBINATIONS)
def test_what_is_saved_comes_back(kind, parts, included, clip_folder, tmp_path, request):
    folder = request.getfixturevalue(FOLDERS[kind])
    encoder = build(folder, parts, clip_folder)
    encoder.save_pretrained(tmp_path / "saved", include_backbone=included)
    source = shutil.move(tmp_path / "saved", tmp_path / "moved")
    again = DiffusionEncoder.from_pretrained(source)
    assert again.lora_names == encoder.lora_names
    assert again.active_lora == encoder.active_lora == ("second" if "lora" in parts else None)
    assert (again.captioner is None) == ("captioner" not in parts)
    assert list(again.trainable_parameters()) == []
    assert again.feature_info == encoder.feature_info
    assert_equal(again, encoder)
    if "lora" in parts:
        encoder.set_lora("first")
        again.set_lora("first")
        assert_equal(again, encoder)
    assert (source / "backbone").is_dir() == included


@pytest.mark.long
def test_a_backbone_that_was_trained_is_saved_with_its_weights(tiny_sd_folder, tmp_path):
    """Its name alone would stand for other weights."""
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder, **ARGUMENTS)
    encoder.add_lora(rank=2)
    encoder.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "backbone").exists()
    encoder.backbone.unet.mid_block.requires_grad_(True)
    shake(encoder)
    encoder.save_pretrained(tmp_path / "whole")
    assert_equal(encoder, DiffusionEncoder.from_pretrained(tmp_path / "whole"))


def test_another_encoder_on_the_same_model_has_its_adapter_and_captioner(
    tiny_sd_folder, clip_folder
):
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder, **ARGUMENTS)
    encoder.add_captioner(clip_folder)
    encoder.add_lora(rank=2)
    shake(encoder)
    other = encoder.with_options(timestep=50, taps="up_blocks.0", grid=2)
    assert other.backbone is encoder.backbone
    assert other.captioner is encoder.captioner
    assert (other.config.timestep, other.config.size) == (50, 64)
    assert encoder.config.timestep == 261
    alone = DiffusionEncoder.from_pretrained(
        encoder.backbone, **{**ARGUMENTS, "timestep": 50, "taps": "up_blocks.0", "grid": 2}
    )
    alone.captioner, alone.clip = encoder.captioner, encoder.clip
    assert_equal(other, alone)
    assert other.train().training
    assert not encoder.eval().with_options().training
    with pytest.raises(ConfigError, match="Did you mean 'timestep'"):
        encoder.with_options(timesteps=5)


def test_no_adapter_in_use_and_a_merged_one_come_back_as_they_were(
    tiny_sd_folder, clip_folder, tmp_path
):
    encoder = build(tiny_sd_folder, ("lora",), clip_folder)
    encoder.set_lora(None)
    encoder.save_pretrained(tmp_path / "none")
    again = DiffusionEncoder.from_pretrained(tmp_path / "none", trainable=True)
    assert again.active_lora is None
    assert list(again.trainable_parameters()) == []
    assert_equal(again, encoder)
    encoder.set_lora("first")
    encoder.merge_lora()
    for included in (False, True):
        encoder.save_pretrained(tmp_path / "merged", include_backbone=included)
        again = DiffusionEncoder.from_pretrained(tmp_path / "merged")
        assert_equal(again, encoder)
        again.set_lora(None)
        plain = DiffusionEncoder.from_pretrained(tiny_sd_folder, **ARGUMENTS)
        assert_equal(again, plain)  # the weights without the adapter are there, exactly


@pytest.mark.long
def test_training_goes_on_if_asked(tiny_sd_folder, clip_folder, tmp_path):
    encoder = build(tiny_sd_folder, ("lora", "captioner"), clip_folder)
    encoder.save_pretrained(tmp_path)
    again = DiffusionEncoder.from_pretrained(tmp_path, trainable=True)
    names = [name for name, _ in encoder.named_trainable_parameters()]
    assert sorted(name for name, _ in again.named_trainable_parameters()) == sorted(names)
    for name, parameter in again.named_trainable_parameters():
        assert torch.equal(parameter, encoder.get_parameter(name))
    again(picture(), "red").sum().backward()
    assert all(p.grad is not None for p in again.trainable_parameters())


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "pipeline"), [("sd", StableDiffusionPipeline), ("sdxl", StableDiffusionXLPipeline)]
)
def test_the_included_backbone_is_a_folder_for_diffusers(
    kind, pipeline, clip_folder, tmp_path, request
):
    folder = request.getfixturevalue(FOLDERS[kind])
    encoder = build(folder, ("lora",), clip_folder)
    encoder.save_pretrained(tmp_path, include_backbone=True)
    mine, theirs = pipeline.from_pretrained(tmp_path / "backbone"), pipeline.from_pretrained(folder)
    for part in ("unet", "vae", "text_encoder"):
        state, expected = getattr(mine, part).state_dict(), getattr(theirs, part).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)
    text = "a red circle left of a zebra"
    assert mine.tokenizer(text).input_ids == theirs.tokenizer(text).input_ids


@pytest.mark.long
def test_truncated_half_precision_and_given_parts_are_included_too(tiny_sd_folder, tmp_path):
    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
    options = {"truncate": True, "vae": tiny.eval(), "dtype": torch.bfloat16}
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder, **ARGUMENTS, **options)
    encoder.add_lora(rank=1)
    shake(encoder)
    encoder.save_pretrained(tmp_path / "a", include_backbone=True)
    source = shutil.move(tmp_path / "a", tmp_path / "b")
    again = DiffusionEncoder.from_pretrained(source, dtype=torch.bfloat16)
    assert again.backbone.shortened
    assert_equal(again, encoder)
    encoder.save_pretrained(tmp_path / "c")
    with pytest.raises(ConfigError, match=r"vae.*include_backbone=True"):
        DiffusionEncoder.from_pretrained(tmp_path / "c", dtype=torch.bfloat16)


@pytest.mark.long
def test_a_bundled_backbone_reads_the_same_taps_from_its_folder(tmp_path):
    encoder = DiffusionEncoder.from_pretrained("shapes")
    encoder.save_pretrained(tmp_path, include_backbone=True)
    again = DiffusionEncoder.from_pretrained(tmp_path)
    assert again.feature_info == encoder.feature_info
    for mine, theirs in zip(features(again), features(encoder), strict=True):
        # The same weights from another place in memory are summed in another order.
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.long
def test_a_clip_without_a_name_is_asked_for(tiny_sd_folder, clip_folder, tmp_path):
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder, **ARGUMENTS)
    encoder.add_captioner(tiny_clip())
    shake(encoder)
    encoder.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"no name.*clip="):
        DiffusionEncoder.from_pretrained(tmp_path)
    assert_equal(DiffusionEncoder.from_pretrained(tmp_path, clip=tiny_clip()), encoder)
    with pytest.raises(BackboneError, match=r"another CLIP.*12.*20"):
        DiffusionEncoder.from_pretrained(tmp_path, clip=tiny_clip(projection_dim=20))
    with pytest.raises(ConfigError, match="holds none"):
        DiffusionEncoder.from_pretrained(tiny_sd_folder, clip=clip_folder)


def test_nothing_but_json_and_safetensors_is_written(tiny_sd_folder, clip_folder, tmp_path):
    encoder = build(tiny_sd_folder, ("lora", "captioner"), clip_folder)
    encoder.save_pretrained(tmp_path, include_backbone=True)
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".safetensors", ".txt"}
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "lora", "captioner", "backbone"}


@pytest.mark.long
def test_half_saved_folders_are_refused(tiny_sd_folder, clip_folder, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    encoder = build(tiny_sd_folder, ("lora", "captioner"), clip_folder)
    encoder.save_pretrained(whole, include_backbone=True)
    for index, path in enumerate(
        (
            "config.json",
            "lora/first",
            "captioner",
            "backbone",
            "backbone/model_index.json",
            "backbone/unet",
            "backbone/vae/diffusion_pytorch_model.safetensors",
            "lora/second/adapter_model.safetensors",
            "lora/second/adapter_config.json",
            "captioner/captioner.json",
            "captioner/captioner.safetensors",
        )
    ):
        target = tmp_path / str(index)
        shutil.copytree(whole, target)
        gone = target / path
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        with pytest.raises(BackboneError):
            DiffusionEncoder.from_pretrained(target)
    weights = whole / "backbone/unet/diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(BackboneError, match="cannot load"):
        DiffusionEncoder.from_pretrained(whole)


@pytest.mark.long
def test_saving_that_is_interrupted_leaves_no_folder_that_can_be_read(
    tiny_sd_folder, clip_folder, tmp_path, monkeypatch
):
    encoder = build(tiny_sd_folder, ("lora",), clip_folder)
    encoder.save_pretrained(tmp_path, include_backbone=True)

    def fail(*_args, **_kwargs):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(type(encoder.backbone.vae), "save_config", fail)
        with pytest.raises(OutputError, match="no space left"):
            encoder.save_pretrained(tmp_path, include_backbone=True)
    with pytest.raises(BackboneError, match="interrupted"):
        DiffusionEncoder.from_pretrained(tmp_path)
    encoder.save_pretrained(tmp_path, include_backbone=True)  # and it can be done again
    assert_equal(DiffusionEncoder.from_pretrained(tmp_path), encoder)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        encoder.save_pretrained(tmp_path / "file")


def test_configs_that_were_tampered_with_are_told(tiny_sd_folder, tmp_path):
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder, **ARGUMENTS)
    encoder.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    for change, error, said in (
        ({"lora": ["ghost"]}, BackboneError, "lacks lora/ghost"),
        ({"lora": 3}, BackboneError, "not a config"),
        ({"captioner": True}, BackboneError, "lacks captioner"),
        ({"included": True}, BackboneError, "lacks backbone"),
        ({"tap": "mid_block"}, ConfigError, "unknown options"),
    ):
        file.write_text(json.dumps({**values, **change}))
        with pytest.raises(error, match=said):
            DiffusionEncoder.from_pretrained(tmp_path)


@pytest.mark.long
def test_other_taps_than_those_that_were_trained_are_told(tiny_sd_folder, clip_folder, tmp_path):
    encoder = build(tiny_sd_folder, ("lora",), clip_folder)
    encoder.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="for other taps"):
        DiffusionEncoder.from_pretrained(tmp_path, taps="up_blocks.2")
    assert DiffusionEncoder.from_pretrained(tmp_path, timestep=50).config.timestep == 50
