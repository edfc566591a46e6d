"""LoRA inside the encoder: who gets gradients, what is remembered, what is saved and read."""

import copy
import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tests import builders

from diffenc import CrossAttnScorer, DiffusionEncoder, EncoderConfig
from diffenc.denoiser.lora import lora_disabled
from diffenc.errors import BackboneError, ConfigError
from diffenc.models import StableDiffusion
from loaded import fresh

TAPS = ("up_blocks.1",)
WEIGHTS = "pytorch_lora_weights.safetensors"
FOLDERS = ["tiny_sd_folder", "tiny_sdxl_folder"]


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8))


def load(folder, **options) -> DiffusionEncoder:
    """An encoder of a tiny folder; where nothing about loading is said, of a copy."""
    loads = {"dtype", "truncate"} & options.keys()
    source = folder if loads else fresh(folder)
    return DiffusionEncoder.from_pretrained(source, **{"taps": TAPS, "size": 64, **options})


def tiny_backbone() -> StableDiffusion:
    return StableDiffusion(
        name="tiny",
        unet=builders.tiny_unet(),
        vae=builders.tiny_vae(),
        scheduler=DDPMScheduler(
            **{k: builders.NOISE_SCHEDULE[k] for k in ("beta_start", "beta_end")}
        ),
        text_encoder=builders.tiny_text_encoder(),
        tokenizer=builders.tiny_tokenizer(),
        default_taps=("up_blocks.0",),
    )


def shake(encoder, seed: int = 1) -> None:
    """The active adapter as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if f".{encoder.active_lora}." in name and ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


@pytest.fixture(params=FOLDERS)
def encoder(request):
    return load(request.getfixturevalue(request.param))


@pytest.fixture
def sd():
    """Of two levels: attention in the second down block, the middle, and the first up block."""
    return DiffusionEncoder(tiny_backbone(), EncoderConfig(taps=("up_blocks.0",), size=16))


@pytest.mark.long
def test_a_new_adapter_changes_nothing_and_a_trained_one_does(encoder):
    plain = encoder([picture(), picture(1)], ["red", "blue circle"])
    encoder.add_lora(rank=2)
    assert torch.equal(encoder([picture(), picture(1)], ["red", "blue circle"]), plain)
    shake(encoder)
    assert not torch.allclose(encoder([picture(), picture(1)], ["red", "blue circle"]), plain)


ATTENTIONS = [
    *(f"down_blocks.{block}.attentions.{k}" for block in range(3) for k in range(2)),
    "mid_block.attentions.0",
    *(f"up_blocks.1.attentions.{k}" for k in range(3)),
]
ALL = ("to_q", "to_k", "to_v", "to_out.0")
INSIDE = "up_blocks.1.attentions.1.transformer_blocks.0"


@pytest.mark.long
@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize(
    ("taps", "whole", "partly"),
    [
        (("up_blocks.1",), 10, ()),
        (("mid_block", "latents"), 7, ()),
        (("down_blocks.1.resnets.0",), 2, ()),
        ((f"{INSIDE}.attn2.to_q",), 8, ("to_q",)),
        ((f"{INSIDE}.attn1.to_k", "mid_block"), 8, ()),
        ((INSIDE,), 9, ()),
    ],
)
def test_every_adapted_layer_gets_a_gradient_and_no_other_parameter_does(
    tiny_sd_folder, taps, whole, partly, truncated
):
    """`whole` attentions run in full before the last tap; of the next one `partly`."""
    encoder = load(tiny_sd_folder, taps=taps, **({"truncate": True} if truncated else {}))
    encoder.add_lora(rank=1)
    shake(encoder)
    sum(m.square().sum() for m in encoder.extract(picture(), "red")._maps.values()).backward()
    layers = [
        f"{path}.transformer_blocks.0.attn2.{part}" for path in ATTENTIONS[:whole] for part in ALL
    ]
    layers += [f"{INSIDE}.attn2.{part}" for part in partly]
    expected = {
        f"backbone.unet.{layer}.{part}.default.weight"
        for layer in layers
        for part in ("lora_A", "lora_B")
    }
    found = {name for name, p in encoder.named_parameters() if p.grad is not None}
    assert found == expected == {name for name, _ in encoder.named_trainable_parameters()}
    assert len(list(encoder.trainable_parameters())) == len(expected)
    moved = {n for n, p in encoder.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == expected


@pytest.mark.long
def test_sdxl_reaches_every_adapted_layer_too(tiny_sdxl_folder):
    taps = (
        "up_blocks.0.attentions.0.transformer_blocks.1",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q",
    )
    encoder = load(tiny_sdxl_folder, taps=taps)
    encoder.add_lora(rank=1, projections="to_v")
    shake(encoder)
    encoder(picture(), "red").square().sum().backward()
    names = [name for name, p in encoder.named_trainable_parameters() if p.grad is not None]
    assert names == [name for name, _ in encoder.named_trainable_parameters()]
    # Down: two blocks of two attentions, of 2 and of 3 layers; middle: 3; up: three of 3.
    assert len(names) == 2 * (2 * 2 + 2 * 3 + 3 + 3 * 3)
    assert all(".attn2.to_v." in name for name in names)


def test_taps_before_any_cross_attention_are_refused(tiny_sd_folder):
    for taps in (("conv_in",), ("latents",), ("down_blocks.0.resnets.0",)):
        with pytest.raises(ConfigError, match="nothing to adapt"):
            load(tiny_sd_folder, taps=taps).add_lora()


@pytest.mark.parametrize("conditioning", ["uncond", "cond", "cfg", "concat"])
def test_nothing_is_stale_after_a_step_of_the_optimizer(sd, conditioning):
    def features():
        return sd.extract(picture(), "red", conditioning=conditioning)["up_blocks.0"]

    features()  # remembered
    sd.add_lora(rank=2)
    shake(sd)
    sd.train()
    optimizer = torch.optim.AdamW(sd.trainable_parameters(), lr=0.05)
    for _ in range(2):
        before = features()
        before.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.allclose(features(), before)
    sd.eval().requires_grad_(False)
    frozen = features()
    torch.testing.assert_close(features(), frozen, atol=1e-6, rtol=1e-5)  # partly from caches
    sd.use_cache = False
    torch.testing.assert_close(features(), frozen, atol=1e-6, rtol=1e-5)
    sd.use_cache = True
    with torch.no_grad():
        for name, parameter in sd.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    assert not torch.allclose(features(), frozen)


def test_switching_empties_the_caches_and_switches_the_features(sd):
    plain = sd(picture())
    sd.add_lora(rank=1, name="first")
    shake(sd, 1)
    first = sd(picture())
    sd.add_lora(rank=3, name="second", projections=("to_k", "to_v"))
    assert sd.lora_names == ("first", "second")
    assert sd.active_lora == "second"
    shake(sd, 2)
    second = sd(picture())
    assert not torch.allclose(first, plain)
    assert not torch.allclose(first, second)
    sd.requires_grad_(False)  # now everything is remembered
    for name, expected in (("first", first), (None, plain), ("second", second), ("first", first)):
        sd.set_lora(name)
        assert sd.active_lora == name
        for _ in range(2):
            torch.testing.assert_close(sd(picture()), expected, atol=1e-6, rtol=1e-5)


def test_layers_that_are_switched_elsewhere_are_told_apart_too(sd):
    sd.add_lora(rank=1)
    shake(sd)
    sd.requires_grad_(False)
    changed = sd(picture())
    with lora_disabled(sd.backbone.unet):
        assert not torch.allclose(sd(picture()), changed)
    assert torch.equal(sd(picture()), changed)


def test_only_the_adapter_in_use_trains(sd):
    sd.add_lora(rank=1, name="first")
    sd.add_lora(rank=1, name="second")

    def trained() -> set[str]:
        return {re.search(r"lora_.\.(\w+)\.", n)[1] for n, _ in sd.named_trainable_parameters()}

    assert trained() == {"second"}
    sd.set_lora("first")
    assert trained() == {"first"}
    sd.set_lora(None)
    assert trained() == set()
    sd.set_lora("second", trainable=False)
    assert trained() == set()
    sd.set_lora("first")
    assert trained() == {"first"}
    sd.set_lora("second")
    assert trained() == set()
    sd.set_lora("second", trainable=True)
    sd(picture(), "red").sum().backward()
    assert all(p.grad is not None for p in sd.trainable_parameters())
    assert trained() == {"second"}


@pytest.mark.long
def test_merged_features_are_equal_and_unmerging_is_exact(encoder):
    encoder = encoder.to(torch.bfloat16)
    weights = copy.deepcopy(encoder.backbone.unet.state_dict())
    encoder.add_lora(rank=2)
    shake(encoder)
    changed = encoder(picture(), "red")
    encoder.merge_lora()
    assert list(encoder.trainable_parameters()) == []
    assert encoder.active_lora == "default"
    scale = changed.abs().max()
    assert (encoder(picture(), "red") - changed).abs().max() <= 0.05 * scale
    after = encoder.backbone.unet.state_dict()
    assert not all(
        torch.equal(after[k.replace("weight", "base_layer.weight")], v)
        for k, v in weights.items()
        if "attn2.to_v" in k and "down_blocks.1" in k
    )
    encoder.merge_lora()  # twice is once
    encoder.unmerge_lora()
    assert torch.equal(encoder(picture(), "red"), changed)
    assert len(list(encoder.trainable_parameters())) > 0
    state = encoder.backbone.unet.state_dict()
    for key, value in weights.items():
        own = (
            key
            if key in state
            else key.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        )
        assert torch.equal(state[own], value), key
    encoder.merge_lora()
    encoder.set_lora(None)
    assert not torch.allclose(encoder(picture(), "red"), changed)
    with pytest.raises(ConfigError, match="no adapter is active"):
        encoder.merge_lora()


@pytest.mark.parametrize("cast", ["half", "to"])
def test_the_adapter_is_never_in_float16(sd, cast):
    sd.add_lora(rank=2)
    shake(sd)
    before = {name: p.detach().clone() for name, p in sd.named_trainable_parameters()}
    sd(picture(), "red").sum().backward()
    gradients = {name: p.grad.clone() for name, p in sd.named_trainable_parameters()}
    sd.half() if cast == "half" else sd.to(torch.float16)
    assert sd.dtype == torch.float16
    for name, parameter in sd.named_trainable_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])  # not rounded on the way either
        assert parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-2, rtol=1e-2)
    sd.add_lora(rank=1, name="later")
    assert {p.dtype for p in sd.trainable_parameters()} == {torch.float32}


@pytest.mark.long
def test_adapters_made_in_a_bfloat16_encoder_are_precise(tiny_sd_folder):
    encoder = load(tiny_sd_folder, dtype=torch.bfloat16)
    encoder.add_lora(rank=2)
    assert {p.dtype for p in encoder.trainable_parameters()} == {torch.float32}
    shake(encoder)
    features = encoder.extract(picture(), "red")[TAPS[0]]
    assert features.dtype == torch.bfloat16
    features.float().square().sum().backward()
    assert all(p.grad is not None for p in encoder.trainable_parameters())


def test_training_under_autocast_lowers_the_loss_and_remembers_nothing_imprecise(sd):
    sd.add_lora(rank=2, dropout=0.1)
    target = sd(picture(), "blue").detach()
    sd.train()
    optimizer = torch.optim.Adam(sd.trainable_parameters(), lr=0.02)
    losses = []
    for _ in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            loss = (sd(picture(), "red") - target).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    sd.eval().requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        sd(picture())
    exact = sd(picture())
    sd.use_cache = False
    assert torch.equal(sd(picture()), exact)


@pytest.mark.long
@pytest.mark.parametrize("training", [False, True])
def test_checkpointing_changes_no_gradient(encoder, training):
    encoder.add_lora(rank=2)
    shake(encoder)
    encoder.train(training)

    def gradients():
        encoder.zero_grad()
        encoder.extract(
            [picture(), picture(1)], "red", conditioning="concat"
        ).tokens().square().sum().backward()
        return {name: p.grad.clone() for name, p in encoder.named_trainable_parameters()}

    expected = gradients()
    encoder.backbone.unet.enable_gradient_checkpointing()
    found = gradients()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name
    assert sum(len(m._forward_hooks) for m in encoder.backbone.unet.modules()) == 0


@pytest.mark.long
def test_compiled_encoders_follow_their_adapters(pytestconfig):
    """A tap that is an adapted layer itself: compiled code has a copy of it."""
    if pytestconfig.getoption("jaxtyping_packages", None):
        pytest.skip("the run-time type checker breaks the graph")
    torch._dynamo.reset()
    tap = "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_q"
    encoder = DiffusionEncoder(
        tiny_backbone(), EncoderConfig(taps=(tap,), size=16), use_cache=False
    )
    plain = encoder(picture(), "red")
    encoder.compile(backend="eager")
    encoder.add_lora(rank=2)  # what was compiled before is compiled again
    shake(encoder)
    compiled, encoder.backbone.compiled = encoder.backbone.compiled, {}
    eager = encoder(picture(), "red")
    assert not torch.allclose(eager, plain)
    eager.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in encoder.named_trainable_parameters()}
    encoder.zero_grad()
    assert list(compiled) == [(tap,)]
    encoder.backbone.compiled = compiled
    features = encoder(picture(), "red")
    torch.testing.assert_close(features, eager, atol=1e-5, rtol=1e-5)
    features.square().sum().backward()
    for name, parameter in encoder.named_trainable_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-4)
    encoder.set_lora(None)
    torch.testing.assert_close(encoder(picture(), "red"), plain, atol=1e-5, rtol=1e-5)
    encoder.set_lora("default")
    torch.testing.assert_close(encoder(picture(), "red"), eager, atol=1e-5, rtol=1e-5)


def test_dropout_is_on_in_training_alone_and_frozen_parts_stay_in_evaluation(sd):
    sd.add_lora(rank=4, dropout=0.5)
    shake(sd)
    assert torch.equal(sd(picture(), "red"), sd(picture(), "red"))
    assert sd.train() is sd
    assert sd.backbone.unet.training
    assert not sd.backbone.vae.training
    assert not sd.backbone.text_encoder.training
    assert not torch.equal(sd(picture(), "red"), sd(picture(), "red"))
    assert len(sd.backbone.caches.latents) == 1  # the VAE runs once in training too
    sd.eval()
    assert torch.equal(sd(picture(), "red"), sd(picture(), "red"))


def test_an_encoder_that_shares_the_backbone_and_a_scorer_see_the_adapter(sd):
    other = DiffusionEncoder.from_pretrained(sd.backbone, taps=("mid_block",), size=16)
    scorer = CrossAttnScorer.from_pretrained(sd.backbone, size=16)
    plain, score = other(picture()), scorer(picture(), ["red", "blue"])
    sd.add_lora(rank=2)
    shake(sd)
    sd.requires_grad_(False)
    changed = scorer(picture(), ["red", "blue"])
    assert not torch.allclose(other(picture()), plain)
    assert not torch.allclose(changed, score)
    sd.set_lora(None)
    assert torch.equal(other(picture()), plain)
    torch.testing.assert_close(scorer(picture(), ["red", "blue"]), score, atol=1e-6, rtol=1e-5)


def test_the_summary_counts_what_trains(sd):
    sd.add_lora(rank=2)
    count = sum(p.numel() for p in sd.trainable_parameters())
    lines = {line.split("  ")[0].strip(): line.split() for line in sd.summary().splitlines()}
    assert lines["LoRA 'default' (active)"][-3:] == [f"{count:,}", f"{count:,}", "float32"]
    assert lines["unet"][2] == lines["vae"][2] == lines["text_encoder"][2] == "0"
    total = sum(p.numel() for p in sd.parameters())
    assert lines["all"][1:3] == [f"{total:,}", f"{count:,}"]


@pytest.mark.long
@pytest.mark.parametrize("truncated", [False, True])
def test_a_saved_adapter_comes_back_and_trains_if_asked(tiny_sd_folder, tmp_path, truncated):
    encoder = load(tiny_sd_folder, truncate=truncated)
    encoder.add_lora(rank=3, alpha=7.0)
    shake(encoder)
    encoder.save_lora(tmp_path)
    again = load(tiny_sd_folder, truncate=False)
    again.load_lora(tmp_path, name="mine")
    assert torch.equal(again(picture(), "red"), encoder(picture(), "red"))
    assert list(again.trainable_parameters()) == []
    more = load(tiny_sd_folder)
    more.load_lora(tmp_path, trainable=True)
    names = [name for name, _ in more.named_trainable_parameters()]
    assert names == [name for name, _ in encoder.named_trainable_parameters()]


@pytest.mark.long
@pytest.mark.parametrize(
    ("folder", "pipeline"),
    [
        ("tiny_sd_folder", StableDiffusionPipeline),
        ("tiny_sdxl_folder", StableDiffusionXLPipeline),
    ],
)
@pytest.mark.parametrize("truncated", [False, True])
def test_diffusers_pipelines_really_apply_the_file_keyed_for_them(
    folder, pipeline, truncated, request, tmp_path
):
    folder = request.getfixturevalue(folder)
    encoder = load(folder, truncate=truncated)
    encoder.add_lora(rank=2, alpha=5.0)
    shake(encoder)
    encoder.save_lora(tmp_path)
    pipe = pipeline.from_pretrained(folder)
    image, text = picture(), "red circle"
    plain = DiffusionEncoder.from_pretrained(folder, unet=pipe.unet, taps=TAPS, size=64)
    before = plain(image, text)
    pipe.load_lora_weights(tmp_path, weight_name=WEIGHTS)
    plain.clear_cache()
    after = plain(image, text)
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(after, encoder(image, text), atol=5e-5, rtol=1e-4)


@pytest.mark.long
def test_peft_reads_the_folder_of_a_truncated_encoder_into_a_whole_unet(tiny_sd_folder, tmp_path):
    """The saved config names each layer: peft would shorten the list to endings such as `to_q`."""
    from peft import PeftModel

    encoder = load(tiny_sd_folder, taps=("mid_block",), truncate=True)
    encoder.add_lora(rank=2)
    shake(encoder)
    encoder.save_lora(tmp_path)
    unet = load(tiny_sd_folder).backbone.unet
    model = PeftModel.from_pretrained(unet, str(tmp_path))
    adapted = {name for name, m in model.named_modules() if hasattr(m, "lora_A")}
    expected = {name.partition(".lora_")[0] for name, _ in encoder.named_trainable_parameters()}
    assert {n.partition("base_model.model.")[2] for n in adapted} == {
        n.removeprefix("backbone.unet.") for n in expected
    }


def saved(folder, target, **options) -> None:
    encoder = load(folder, **options)
    encoder.add_lora(rank=2)
    shake(encoder)
    encoder.save_lora(target)


@pytest.mark.long
def test_adapters_of_another_backbone_are_refused(
    tiny_sd_folder, tiny_sd21_base_folder, tiny_sdxl_folder, tmp_path
):
    saved(tiny_sd_folder, tmp_path)
    sdxl = load(tiny_sdxl_folder)
    names = list(sdxl.state_dict())
    with pytest.raises(BackboneError, match="another model"):
        sdxl.load_lora(tmp_path, other_taps=True)
    assert list(sdxl.state_dict()) == names
    # Of the same sizes, with other weights.
    other = load(tiny_sd_folder)
    with torch.no_grad():
        other.backbone.unet.conv_in.weight.mul_(1.01)
    with pytest.raises(BackboneError, match=r"another backbone.*tiny-sd"):
        other.load_lora(tmp_path)
    assert other.lora_names == ()


@pytest.mark.long
def test_rounding_of_the_dtype_makes_no_other_backbone(tiny_sd_folder, tmp_path):
    saved(tiny_sd_folder, tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        load(tiny_sd_folder, dtype=dtype).load_lora(tmp_path)


@pytest.mark.long
def test_adapters_for_other_taps_are_refused(tiny_sd_folder, tmp_path):
    saved(tiny_sd_folder, tmp_path)
    before = load(tiny_sd_folder, taps=("mid_block",))
    with pytest.raises(BackboneError, match=r"other taps.*up_blocks\.1.*mid_block"):
        before.load_lora(tmp_path)
    with pytest.raises(BackboneError, match=r"other taps.*no effect"):
        before.load_lora(tmp_path, other_taps=True)
    assert before.lora_names == ()
    behind = load(tiny_sd_folder, taps=("up_blocks.2",))
    with pytest.raises(BackboneError, match="other taps"):
        behind.load_lora(tmp_path)
    behind.load_lora(tmp_path, other_taps=True)
    assert behind.lora_names == ("default",)
    (tmp_path / "diffenc.json").unlink()  # as peft writes it
    with pytest.raises(BackboneError, match=r"other taps.*no effect"):
        before.load_lora(tmp_path)


def test_broken_folders_are_refused_and_leave_the_encoder_alone(tiny_sd_folder, tmp_path):
    whole = tmp_path / "whole"
    saved(tiny_sd_folder, whole)
    encoder = load(tiny_sd_folder)
    names = list(encoder.state_dict())
    weights = "adapter_model.safetensors"

    def broken(name: str):
        target = tmp_path / name
        shutil.copytree(whole, target)
        return target

    for file in ("adapter_config.json", weights):
        folder = broken(f"without-{file}")
        (folder / file).unlink()
        with pytest.raises(BackboneError, match="holds no LoRA adapter"):
            encoder.load_lora(folder)
    folder = broken("cut")
    (folder / weights).write_bytes((folder / weights).read_bytes()[:-100])
    with pytest.raises(BackboneError, match="holds no LoRA adapter"):
        encoder.load_lora(folder)
    folder = broken("one-less")
    state = load_file(folder / weights)
    state.pop(next(key for key in state if "lora_B" in key))
    save_file(state, folder / weights)
    with pytest.raises(BackboneError, match=r"incomplete.*lora_B"):
        encoder.load_lora(folder)
    for key, value in (("r", 5), ("use_dora", True)):
        folder = broken(key)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(BackboneError, match=r"must be|no plain LoRA"):
            encoder.load_lora(folder)
    folder = broken("note")
    (folder / "diffenc.json").write_text("{")
    with pytest.raises(BackboneError, match="is broken"):
        encoder.load_lora(folder)
    assert list(encoder.state_dict()) == names
    encoder.load_lora(whole)
    with pytest.raises(ConfigError, match=r"already; known are \['default'\]\. Pass another name="):
        encoder.load_lora(whole)
    with pytest.raises(BackboneError, match=r"there is no folder .*gone; an adapter is a folder"):
        encoder.load_lora(tmp_path / "gone")


def test_wrong_calls_are_told(sd, tmp_path):
    with pytest.raises(ConfigError, match="rank"):
        sd.add_lora(rank=0)
    with pytest.raises(ConfigError, match="projections"):
        sd.add_lora(projections=("to_w",))
    adding = r"there is none yet: add_lora\(\) makes one, load_lora\(folder\) reads one"
    with pytest.raises(ConfigError, match=f"no adapter 'defalt'; {adding}"):
        sd.set_lora("defalt")
    with pytest.raises(ConfigError, match=f"no adapter is active.*{adding}"):
        sd.save_lora(tmp_path)
    with pytest.raises(ConfigError, match=f"nothing to merge; {adding}"):
        sd.merge_lora()
    sd.unmerge_lora()
    assert sd.lora_names == ()
    assert sd.active_lora is None
