"""Parts given by the caller in place of a model's own, and backbones built of components."""

import copy
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

import builders
import ldm_layout as ldm
from diffenc import DiffusionEncoder, EncoderConfig, list_taps, load_backbone
from diffenc.errors import BackboneError, ConfigError
from diffenc.inputs.noise import shared_noise
from diffenc.models import StableDiffusion, StableDiffusionXL
from diffenc.models.weights import unet_state

TAPS = ("mid_block", "up_blocks.1")
IMAGE = torch.linspace(-1, 1, 3 * 64 * 64).reshape(3, 64, 64)


def other_weights(module) -> dict[str, torch.Tensor]:
    """Another training of the same architecture."""
    generator = torch.Generator().manual_seed(7)
    return {
        key: value + 0.1 * torch.randn(value.shape, generator=generator)
        for key, value in module.state_dict().items()
    }


def with_unet(folder, unet, **options) -> dict[str, torch.Tensor]:
    encoder = DiffusionEncoder.from_pretrained(folder, taps=TAPS, size=64, unet=unet, **options)
    return dict(encoder.extract(IMAGE, "red circle"))


def tiny_taesd(**options) -> AutoencoderTiny:
    widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    blocks = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    return builders.seeded(lambda: AutoencoderTiny(**widths, **blocks, **options))


@pytest.mark.parametrize("prefix", ["", "unet.", "module.", "_orig_mod.", "aligner.unet.model."])
def test_weights_are_found_under_any_prefix(tiny_sd_folder, tmp_path, prefix):
    unet = load_backbone(tiny_sd_folder).unet
    weights = other_weights(unet)
    beside = {"vae.encoder.conv_in.weight": torch.ones(1)} if prefix else {}
    written = {**ldm.prefixed(prefix, weights), **beside}
    save_file(written, tmp_path / "unet.safetensors")
    for source in (tmp_path / "unet.safetensors", str(tmp_path / "unet.safetensors"), written):
        found = unet_state(source, dict(unet.config))
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[key], weights[key]) for key in weights)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tiny_sd_folder", "tiny_sdxl_folder"])
def test_a_unet_takes_the_weights_of_a_file_whole_or_in_part(request, tmp_path, kind):
    folder, file = request.getfixturevalue(kind), tmp_path / "unet.safetensors"
    weights = other_weights(load_backbone(folder).unet)
    save_file(weights, file)
    given = load_backbone(folder, unet=file).unet.state_dict()
    assert all(torch.equal(given[key], weights[key]) for key in weights)
    left = load_backbone(folder, unet=file, keep_taps=["mid_block"]).unet.state_dict()
    assert left.keys() < weights.keys()
    assert all(torch.equal(left[key], weights[key]) for key in left)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_state_dict_in_the_original_layout_is_converted(tiny_sd21_folder, prefix):
    weights = other_weights(load_backbone(tiny_sd21_folder).unet)
    original = ldm.prefixed(prefix, ldm.unet_in_original_layout(weights))
    given = load_backbone(tiny_sd21_folder, unet=original).unet.state_dict()
    assert all(torch.equal(given[key], weights[key]) for key in weights)


@pytest.mark.long
def test_cleandift_s_weights_are_read_where_its_preset_says(tiny_sd21_folder, tmp_path):
    """Against the plain pipeline with these weights in its U-Net, on clean latents."""
    pipe = DiffusionPipeline.from_pretrained(tiny_sd21_folder)
    weights = other_weights(pipe.unet)
    save_file(weights, tmp_path / "cleandift.safetensors")
    pipe.unet.load_state_dict(weights)
    found = []
    pipe.unet.up_blocks[1].register_forward_hook(lambda _m, _a, output: found.append(output))
    with torch.no_grad():
        latents = pipe.vae.encode(IMAGE[None]).latent_dist.mean * pipe.vae.config.scaling_factor
        states = pipe.encode_prompt("red", "cpu", 1, False)[0]
        pipe.unet(latents, 261, encoder_hidden_states=states)
    options = {"preset": "cleandift", "size": 64, "posterior": "mode"}
    encoder = DiffusionEncoder.from_pretrained(
        tiny_sd21_folder, unet=tmp_path / "cleandift.safetensors", **options
    )
    ours = encoder.extract(IMAGE, "red")["up_blocks.1"]
    assert (ours - found[0]).abs().max() <= 1e-5 * found[0].abs().max()
    plain = DiffusionEncoder.from_pretrained(tiny_sd21_folder, **options)
    assert not torch.allclose(plain.extract(IMAGE, "red")["up_blocks.1"], ours, rtol=0.1)


@pytest.mark.long
def test_a_unet_may_be_a_module_with_other_configs(tiny_sd_folder):
    own = load_backbone(tiny_sd_folder).unet
    assert all(
        torch.equal(found, expected)
        for found, expected in zip(
            with_unet(tiny_sd_folder, own).values(),
            with_unet(tiny_sd_folder, None).values(),
            strict=True,
        )
    )
    config = {**own.config, "layers_per_block": 1}
    smaller = builders.seeded(lambda: UNet2DConditionModel.from_config(config))
    encoder = DiffusionEncoder.from_pretrained(
        tiny_sd_folder, unet=smaller, taps="down_blocks.*.resnets.0", truncate=True
    )
    assert len(encoder.feature_info) == 4
    assert not hasattr(encoder.backbone.unet.conv_out, "weight")
    assert hasattr(smaller.conv_out, "weight")  # the caller's stays whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {**w, "conv_in.weight": torch.ones(8, 9, 3, 3)}, r"\(8, 9, 3, 3\), needed"),
        (lambda w: {k: v for k, v in w.items() if "conv_out" not in k}, "lacks 2 weights"),
        (lambda w: {**w, "extra.weight": torch.ones(1)}, "has unknown 1 weights, .*'extra.weight'"),
        (lambda w: {"lora": torch.ones(1)}, "holds no U-Net"),
        (
            lambda w: {**ldm.prefixed("a.", w), **ldm.prefixed("b.", w)},
            r"several U-Nets, under \['a\.', 'b\.'\]",
        ),
    ],
    ids=["shape", "missing", "unknown", "none", "several"],
)
def test_a_state_dict_that_does_not_fit_is_refused(tiny_sd_folder, change, message):
    weights = load_backbone(tiny_sd_folder).unet.state_dict()
    with pytest.raises(BackboneError, match=message):
        load_backbone(tiny_sd_folder, unet=change(weights))


def test_weights_of_another_backbone_name_the_first_misfit(tiny_sd_folder, tiny_sd21_folder):
    weights = load_backbone(tiny_sd21_folder).unet.state_dict()
    with pytest.raises(
        BackboneError, match=r"'down_blocks.0.attentions.0.proj_in.weight' is \(8, 8"
    ):
        load_backbone(tiny_sd_folder, unet=weights)


def test_files_that_are_no_weights_are_refused(tiny_sd_folder, tmp_path):
    pickled, broken = tmp_path / "unet.pt", tmp_path / "unet.safetensors"
    pickled.write_bytes(b"")
    broken.write_bytes(b"\x00" * 20)
    for path, message in (
        (tmp_path / "none.safetensors", "no such weights file"),
        (pickled, "can run code"),
        (broken, "cannot load"),
    ):
        with pytest.raises(BackboneError, match=message):
            load_backbone(tiny_sd_folder, unet=path)
    with pytest.raises(BackboneError, match="vae must be a model or a path, got int"):
        load_backbone(tiny_sd_folder, vae=3)


@pytest.mark.parametrize("posterior", ["mode", "sample"])
@pytest.mark.parametrize("as_folder", [False, True])
def test_taesd_gives_latents_that_need_no_posterior(tiny_sd_folder, tmp_path, as_folder, posterior):
    taesd = tiny_taesd()
    taesd.save_pretrained(tmp_path / "taesd")
    encoder = DiffusionEncoder.from_pretrained(
        tiny_sd_folder,
        vae=tmp_path / "taesd" if as_folder else copy.deepcopy(taesd),
        taps=("latents", "mid_block"),
        size=64,
        posterior=posterior,
    )
    features = encoder.extract(IMAGE, "red")
    with torch.no_grad():
        latents = taesd.encode(IMAGE[None]).latents * taesd.config.scaling_factor
        noise = shared_noise((4, 8, 8), seed=0, timestep=50)
        signal = encoder.backbone.scheduler.alphas_cumprod[50]
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        found = []
        unet = encoder.backbone.unet
        handle = unet.mid_block.register_forward_hook(lambda _m, _a, output: found.append(output))
        unet(noisy, 50, **encoder.backbone.embed(["red"], size=(64, 64)).unet_kwargs())
        handle.remove()
    torch.testing.assert_close(features["latents"], latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features["mid_block"], found[0], atol=1e-5, rtol=1e-5)


def test_a_vae_without_overflow_stays_in_half_precision(tiny_sdxl_folder, tmp_path):
    """The fp16-fix of SDXL's VAE differs from the original in weights and in this entry."""
    own = load_backbone(tiny_sdxl_folder, dtype=torch.float16)
    assert own.vae.dtype == torch.float32
    fixed = AutoencoderKL.from_config({**own.vae.config, "force_upcast": False})
    fixed.save_pretrained(tmp_path / "fixed")
    given = load_backbone(tiny_sdxl_folder, vae=tmp_path / "fixed", dtype=torch.float16)
    assert given.vae.dtype == torch.float16
    expected = fixed.state_dict()["encoder.conv_in.weight"].half()
    assert torch.equal(given.vae.encoder.conv_in.weight, expected)


@pytest.mark.parametrize("original", [False, True])
def test_a_vae_may_be_one_file_in_either_layout(tiny_sd_folder, tmp_path, original):
    weights = other_weights(load_backbone(tiny_sd_folder).vae)
    written = ldm.vae_in_original_layout(weights) if original else weights
    file = tmp_path / "vae.safetensors"
    save_file({key: value.contiguous() for key, value in written.items()}, file)
    given = load_backbone(tiny_sd_folder, vae=file).vae.state_dict()
    assert all(torch.equal(given[key], weights[key]) for key in weights)


def test_vaes_that_do_not_fit_are_refused(tiny_sd_folder, tmp_path):
    with pytest.raises(BackboneError, match="gives 16 channels and the U-Net takes 4"):
        load_backbone(tiny_sd_folder, vae=tiny_taesd(latent_channels=16))
    with pytest.raises(BackboneError, match="whose config lacks"):
        load_backbone(tiny_sd_folder, vae=torch.nn.Conv2d(3, 4, 1))
    with pytest.raises(
        BackboneError, match="it is of a UNet2DConditionModel; diffenc reads AutoencoderKL or"
    ):
        load_backbone(tiny_sd_folder, vae=tiny_sd_folder / "unet")
    with pytest.raises(BackboneError, match="no such folder for vae"):
        load_backbone(tiny_sd_folder, vae=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BackboneError, match="cannot read the VAE's config"):
        load_backbone(tiny_sd_folder, vae=tmp_path / "empty")


@pytest.mark.long
def test_other_text_encoders_must_fit_the_unet(tiny_sd_folder, tiny_sd21_folder, tiny_text_encoder):
    given = load_backbone(tiny_sd_folder, text_encoder=tiny_sd21_folder)
    assert given.text_encoder.config.num_hidden_layers == 3
    with pytest.raises(BackboneError, match="states of width 8 and the U-Net takes 16"):
        load_backbone(tiny_sd_folder, text_encoder=copy.deepcopy(tiny_text_encoder))


@pytest.mark.long
def test_saved_encoders_find_paths_again_and_ask_for_objects(tiny_sd_folder, tmp_path, monkeypatch):
    weights = other_weights(load_backbone(tiny_sd_folder).unet)
    monkeypatch.chdir(tmp_path)
    save_file(weights, "unet.safetensors")
    taesd = tiny_taesd()
    encoder = DiffusionEncoder.from_pretrained(
        tiny_sd_folder, taps="mid_block", size=64, unet="unet.safetensors", vae=taesd
    )
    encoder.save_pretrained("saved")
    monkeypatch.chdir(tiny_sd_folder)
    with pytest.raises(ConfigError, match=r"was saved with vae given as an object.*pass vae="):
        DiffusionEncoder.from_pretrained(tmp_path / "saved")
    again = DiffusionEncoder.from_pretrained(tmp_path / "saved", vae=taesd)
    assert torch.equal(again(IMAGE, "red"), encoder(IMAGE, "red"))


@pytest.mark.long
def test_backbones_are_built_of_components(tiny_sd_folder, tiny_sdxl_folder):
    for folder, build in ((tiny_sd_folder, StableDiffusion), (tiny_sdxl_folder, StableDiffusionXL)):
        pipe = DiffusionPipeline.from_pretrained(folder)
        names = ["unet", "vae", "scheduler", "text_encoder", "tokenizer"]
        names += ["text_encoder_2", "tokenizer_2"] if folder == tiny_sdxl_folder else []
        backbone = build(name="mine", **{name: getattr(pipe, name) for name in names})
        loaded = load_backbone(folder)
        assert backbone.default_taps == loaded.default_taps
        assert backbone.default_size == loaded.default_size
        assert list_taps(backbone) == list_taps(folder)
        config = EncoderConfig(taps=TAPS, size=64)
        built = DiffusionEncoder(backbone, config)(IMAGE, "red")
        torch.testing.assert_close(built, DiffusionEncoder(loaded, config)(IMAGE, "red"))


def test_components_that_do_not_fit_are_refused(tiny_sd_folder):
    pipe = DiffusionPipeline.from_pretrained(tiny_sd_folder)
    names = ["unet", "vae", "scheduler", "text_encoder", "tokenizer"]
    parts = {name: getattr(pipe, name) for name in names}
    larger = copy.deepcopy(parts["tokenizer"])
    larger.add_tokens([f"word{i}" for i in range(9)])
    for change, message in (
        ({"tokenizer": larger}, "the tokenizer knows"),
        ({"scheduler": object()}, "without alphas_cumprod"),
        ({"unet": torch.nn.Linear(1, 1)}, "unet is a Linear whose config lacks"),
    ):
        with pytest.raises(BackboneError, match=message):
            StableDiffusion(name="mine", **{**parts, **change})
    backbone = StableDiffusion(name="mine", **parts)
    with pytest.raises(ConfigError, match="a Backbone has its parts"):
        load_backbone(backbone, unet=parts["unet"])
    with pytest.raises(ConfigError, match="a Backbone has its parts"):
        DiffusionEncoder.from_pretrained(backbone, vae=parts["vae"])


def test_the_caller_s_folder_is_left_alone(tiny_sd_folder, tmp_path):
    folder = shutil.copytree(tiny_sd_folder, tmp_path / "copy")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    load_backbone(folder, unet=other_weights(load_backbone(folder).unet))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
