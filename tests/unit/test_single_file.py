"""Checkpoints in one file: the loaded backbone equals the folder that the file was made from."""

import json
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

import ldm_layout as ldm
from diffenc import DiffusionEncoder, list_taps, load_backbone
from diffenc.errors import BackboneError, ConfigError
from diffenc.inputs.prompts import tokenize
from diffenc.models import describe
from diffenc.models.parts import fitting_tokenizer, load_tokenizer
from diffenc.models.single_file import SingleFile
from loaded import fresh, shared

KINDS = ["tiny_sd_folder", "tiny_sd21_base_folder", "tiny_sd21_folder", "tiny_sdxl_folder"]
SIZE = (64, 64)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a single file was loaded through the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty-cache"))


def original_layout(folder) -> dict[str, torch.Tensor]:
    backbone = shared(folder)
    unet = ldm.unet_in_original_layout(backbone.unet.state_dict())
    vae = ldm.vae_in_original_layout(backbone.vae.state_dict())
    state = {
        **ldm.prefixed("model.diffusion_model.", unet),
        **ldm.prefixed("first_stage_model.", vae),
        "alphas_cumprod": torch.ones(1000),
    }
    text = backbone.text_encoder.state_dict()
    if backbone.family == "sdxl":
        second = ldm.openclip_in_original_layout(backbone.text_encoder_2.state_dict())
        first = ldm.clip_in_original_layout(text)
        state |= ldm.prefixed("conditioner.embedders.0.transformer.", first)
        state |= ldm.prefixed("conditioner.embedders.1.model.", second)
    elif "sd21" in str(folder):
        inner = ldm.openclip_in_original_layout(text, extra_layer=True)
        state |= ldm.prefixed("cond_stage_model.model.", inner)
    else:
        inner = ldm.clip_in_original_layout(text)
        inner["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        state |= ldm.prefixed("cond_stage_model.transformer.", inner)
    return {key: value.contiguous().clone() for key, value in state.items()}


def write(path, state, **metadata):
    save_file(state, path, metadata=metadata or None)
    return path


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A folder and a file of the same weights, which no test changes."""
    folder = request.getfixturevalue(request.param)
    file = tmp_path_factory.mktemp("single") / "model.safetensors"
    return folder, write(file, original_layout(folder))


def test_a_checkpoint_is_opened_once_per_load(pair, monkeypatch):
    folder, file = pair
    opened, begin = [], SingleFile.__init__

    def count(self, path):
        opened.append(path)
        begin(self, path)

    monkeypatch.setattr(SingleFile, "__init__", count)
    load_backbone(file, architecture=folder)
    assert opened == [file]


def test_every_weight_equals_the_folder_s(pair):
    folder, file = pair
    ours, theirs = load_backbone(file, architecture=folder), shared(folder)
    expected = theirs.state_dict()
    found = ours.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not any(p.requires_grad or p.is_meta for p in ours.parameters())
    assert not any(buffer.is_meta for buffer in ours.buffers())
    assert not any(module.training for module in ours.modules())
    assert type(ours) is type(theirs)
    assert ours.prediction_type == theirs.prediction_type
    assert (ours.default_size, ours.default_taps) == (theirs.default_size, theirs.default_taps)


@pytest.mark.long
def test_features_equal_the_folder_s_and_a_saved_encoder_finds_its_file(pair, tmp_path):
    folder, file = pair
    options = {"taps": ("mid_block", "up_blocks.1"), "size": 64, "conditioning": "cfg"}
    image = torch.linspace(-1, 1, 3 * 64 * 64).reshape(3, 64, 64)
    expected = DiffusionEncoder.from_pretrained(fresh(folder), **options).extract(
        image, "red circle"
    )
    encoder = DiffusionEncoder.from_pretrained(file, architecture=folder, **options)
    encoder.save_pretrained(tmp_path / "saved")
    again = DiffusionEncoder.from_pretrained(tmp_path / "saved")
    for found in (encoder.extract(image, "red circle"), again.extract(image, "red circle")):
        for tap in expected:
            torch.testing.assert_close(found[tap], expected[tap], atol=1e-6, rtol=1e-5)


@pytest.mark.long
def test_what_lies_behind_the_last_tap_is_not_kept(pair):
    folder, file = pair
    options = {"taps": ("mid_block",), "size": 64, "truncate": True}
    short = DiffusionEncoder.from_pretrained(file, architecture=folder, **options)
    expected = DiffusionEncoder.from_pretrained(folder, **options)
    assert short.state_dict().keys() == expected.state_dict().keys()
    image = torch.zeros(3, 64, 64)
    torch.testing.assert_close(short(image, "red"), expected(image, "red"), atol=1e-5, rtol=1e-5)


@pytest.mark.long
def test_half_precision_files_come_out_in_the_dtype_asked_for(tiny_sdxl_folder, tmp_path):
    halved = {
        key: value.half() if value.is_floating_point() else value
        for key, value in original_layout(tiny_sdxl_folder).items()
    }
    file = write(tmp_path / "half.safetensors", halved)
    whole = load_backbone(file, architecture=tiny_sdxl_folder)
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    expected = fresh(tiny_sdxl_folder).unet.conv_in.weight
    torch.testing.assert_close(whole.unet.conv_in.weight, expected, atol=1e-3, rtol=1e-3)
    half = load_backbone(file, architecture=tiny_sdxl_folder, dtype=torch.float16)
    assert {p.dtype for p in half.unet.parameters()} == {torch.float16}
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32}  # it would overflow


@pytest.mark.long
def test_a_file_without_text_encoder_or_vae_says_how_to_give_them(pair, tmp_path):
    folder, file = pair
    state = load_file(file)
    text = {k: v for k, v in state.items() if not k.startswith(("cond_stage", "conditioner"))}
    bare = write(tmp_path / "bare.safetensors", text)
    with pytest.raises(BackboneError, match=r"holds no text encoder.*text_encoder="):
        load_backbone(bare, architecture=folder)
    parts = {"text_encoder": folder}
    if (folder / "text_encoder_2").is_dir():
        with pytest.raises(BackboneError, match=r"text_encoder_2="):
            load_backbone(bare, architecture=folder, **parts)
        parts["text_encoder_2"] = folder
    completed = load_backbone(bare, architecture=folder, **parts)
    assert completed.embed(["red"], size=SIZE).prompt_embeds.shape[0] == 1
    without = {k: v for k, v in state.items() if not k.startswith("first_stage_model")}
    with pytest.raises(BackboneError, match=r"holds no VAE.*vae="):
        load_backbone(write(tmp_path / "no-vae.safetensors", without), architecture=folder)


def test_what_is_no_checkpoint_is_refused(tiny_sd_folder, tmp_path):
    other = write(tmp_path / "lora.safetensors", {"lora.up": torch.ones(2)})
    with pytest.raises(BackboneError, match=r"no checkpoint of a whole.*'lora\.up'.*unet="):
        load_backbone(other, architecture=tiny_sd_folder)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x00" * 50)
    with pytest.raises(BackboneError, match="cannot load"):
        load_backbone(broken)
    with pytest.raises(BackboneError, match="no such checkpoint file"):
        load_backbone(tmp_path / "none.safetensors")
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"")
    with pytest.raises(BackboneError, match="can run code"):
        load_backbone(pickled)


def test_an_unknown_architecture_asks_for_configs(pair, tmp_path):
    folder, file = pair
    with pytest.raises(BackboneError, match=r"no Stable Diffusion 1.x, 2.x or XL.*architecture="):
        load_backbone(file)
    with pytest.raises(BackboneError, match=r"unknown architecture 'sd16'.*Did you mean"):
        load_backbone(file, architecture="sd16")
    with pytest.raises(BackboneError, match=r"does not fit .* made for another"):
        load_backbone(file, architecture="sdxl", tokenizer=folder)
    with pytest.raises(ConfigError, match="architecture= is for a single file"):
        load_backbone(folder, architecture="sd1.5")


def test_a_missing_weight_is_named(tiny_sd_folder, tmp_path):
    state = original_layout(tiny_sd_folder)
    state.pop("model.diffusion_model.middle_block.1.norm.weight")
    file = write(tmp_path / "cut.safetensors", state)
    with pytest.raises(BackboneError, match=r"lacks 1 weights.*mid_block\.attentions\.0\.norm"):
        load_backbone(file, architecture=tiny_sd_folder)


def test_a_tokenizer_comes_from_the_configs_the_caller_or_the_cache(
    tiny_sd_folder, tmp_path, monkeypatch
):
    file = write(tmp_path / "model.safetensors", original_layout(tiny_sd_folder))
    hollow = shutil.copytree(tiny_sd_folder, tmp_path / "hollow")
    shutil.rmtree(hollow / "tokenizer")
    (hollow / "tokenizer").mkdir()
    with pytest.raises(BackboneError, match="holds no tokenizer"):
        load_backbone(file, architecture=hollow)
    given = load_backbone(file, architecture=hollow, tokenizer=tiny_sd_folder / "tokenizer")
    own = fresh(tiny_sd_folder)
    assert given.tokenizer("red zigzag").input_ids == own.tokenizer("red zigzag").input_ids
    by_object = load_backbone(file, architecture=hollow, tokenizer=own.tokenizer)
    assert by_object.tokenizer is own.tokenizer


def test_a_tokenizer_of_clip_itself_learns_the_model_s_limit_and_padding(tiny_sd_folder, tmp_path):
    """As CLIP publishes it: padded with the end token, and without a limit."""
    folder = shutil.copytree(tiny_sd_folder / "tokenizer", tmp_path / "clip")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("model_max_length")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    published = load_tokenizer(folder)
    assert published.model_max_length > 10**6
    text_encoder = fresh(tiny_sd_folder).text_encoder
    fitting = fitting_tokenizer(published, text_encoder, "!")
    ids, truncated = tokenize(fitting, ["red", "red " * 90])
    assert ids.shape == (2, 77)
    assert truncated == (0, 15)
    assert set(ids[0, 3:].tolist()) == {0}  # "!" is the first token
    assert published.model_max_length > 10**6
    assert published.pad_token == "<|endoftext|>"
    assert fitting_tokenizer(fitting, text_encoder, "!") is fitting


def test_shapes_alone_tell_which_model_it_is(tmp_path):
    """Headers of real width, without the weights behind them."""

    def header(width, *, label=False, channels=4, **metadata):
        prefix = "model.diffusion_model."
        state = {
            f"{prefix}input_blocks.0.0.weight": torch.zeros(320, channels, 3, 3),
            f"{prefix}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(
                640, width
            ),
        }
        if label:
            state[f"{prefix}label_emb.0.0.weight"] = torch.zeros(1280, 2816)
        return write(tmp_path / "header.safetensors", state, **metadata)

    def is_like(alias, file, **options) -> bool:
        return describe(file, **options).configs == describe(alias).configs

    assert is_like("sd1.5", header(768))
    assert is_like("sdxl", header(2048, label=True))
    assert is_like("sd2.1", header(1024, **{"modelspec.prediction_type": "v"}))
    assert is_like("sd2.1-base", header(1024, **{"modelspec.prediction_type": "epsilon"}))
    unclear = header(1024)
    with pytest.raises(ConfigError, match=r"does not say whether it predicts.*'sd2\.1-base'"):
        describe(unclear)
    assert is_like("sd2.1", unclear, architecture="sd2.1")
    assert list_taps(header(768)) == list_taps("sd1.5")
    with pytest.raises(BackboneError, match="takes 9 channels"):
        describe(header(768, channels=9))
    with pytest.raises(BackboneError, match=r"texts of width \[1280\]"):
        describe(header(1280, label=True))


@pytest.mark.parametrize(
    ("name", "kind", "instead"),
    [
        ("joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3", "SD3Transformer2DModel"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable", "SD3Transf"),
        ("double_blocks.0.img_attn.qkv.weight", "FLUX", "FluxTransformer2DModel.from_single_file"),
        ("blocks.0.cross_attn.q_linear.weight", "PixArt", "a folder that holds config.json"),
        ("transformer_blocks.0.attn1.to_q.weight", "diffusers'", "a folder that holds config.json"),
    ],
)
def test_a_file_of_a_transformer_is_refused_with_what_to_pass(tmp_path, name, kind, instead):
    path = tmp_path / "transformer.safetensors"
    write(path, {name: torch.zeros(2, 2)})
    with pytest.raises(BackboneError, match=f"it is {kind}.*whose single files are not read") as e:
        load_backbone(path)
    assert instead in str(e.value)


def test_a_file_of_sana_is_not_called_pixart(tmp_path):
    path = tmp_path / "sana.safetensors"
    names = ("attention_y_norm.weight", "blocks.0.cross_attn.q_linear.weight")
    write(path, {name: torch.zeros(2) for name in names})
    with pytest.raises(BackboneError, match=r"it is Sana, .*SanaTransformer2DModel"):
        load_backbone(path)
