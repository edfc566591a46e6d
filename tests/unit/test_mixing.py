"""Ways of fusing that have weights: against plain programs, saved, trained."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

import builders
from diffenc import DiffusionEncoder, FusedEncoder, Projector, projector_for
from diffenc.errors import BackboneError, ConfigError, PromptError, ShapeError
from diffenc.hosts.spec import TowerSpec
from diffenc.mixing import Mixer, MixingConfig, load_mixer, make_mixer
from diffenc.mixing.config import MIXED
from diffenc.mllm.vision import tokens_per_image
from diffenc.passes.questions import mean_states

PROCESSOR = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
CLIP, TAPS, TEXT = 12, (5, 2), 6
TWO_HEADS = MixingConfig(heads=2)


def clip_vision() -> CLIPVisionModel:
    sizes = {"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 3}
    config = CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=32, patch_size=8)
    return builders.seeded(lambda: CLIPVisionModel(config))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def diffusion(tiny_sd_folder) -> DiffusionEncoder:
    return DiffusionEncoder.from_pretrained(tiny_sd_folder)


@pytest.fixture
def fuse(diffusion):
    def make(how: str, mixing: MixingConfig | None = None, **options: object) -> FusedEncoder:
        if how == "cross_attention":
            mixing = mixing or TWO_HEADS
        arguments = {"image_processor": PROCESSOR, "diffusion": diffusion, **options}
        return FusedEncoder(clip_vision(), how=how, mixing=mixing, **arguments)

    return make


def stirred(mixer: Mixer, scale: float = 0.4) -> Mixer:
    """With no weight at zero or one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return mixer


def streams(cells: int = 6, others: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    made = [(3, cells, CLIP), (3, others, sum(TAPS)), (3, TEXT)]
    return tuple(torch.randn(shape, generator=generator) for shape in made)


def normed(state, path: str, tokens: torch.Tensor, groups: tuple[int, ...]) -> torch.Tensor:
    parts = []
    for index, part in enumerate(tokens.split(groups, dim=-1)):
        centred = part - part.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        name = f"{path}.norms.{index}"
        parts.append(scaled * state[f"{name}.weight"] + state[f"{name}.bias"])
    return torch.cat(parts, -1)


def linear(state, path: str, tokens: torch.Tensor) -> torch.Tensor:
    return torch.einsum("...c,dc->...d", tokens, state[f"{path}.weight"]) + state[f"{path}.bias"]


def sums_by_hand(how: str, state, clip, diffusion, text) -> torch.Tensor:
    right = linear(state, "diffusion_in", normed(state, "diffusion_norm", diffusion, TAPS))
    if how == "gated":
        return clip + torch.tanh(state["gate"]) * right
    left = linear(state, "clip_in", normed(state, "clip_norm", clip, (CLIP,)))
    if how == "add":
        return left + right
    if how == "weighted":
        share = 1 / (1 + torch.exp(-state["weight"]))
    else:
        logits = linear(state, "gate", torch.cat([left, right], -1))
        if how == "question_gated":
            text_logits = linear(state, "text_gate", normed(state, "text_norm", text, (TEXT,)))
            logits = logits + text_logits[:, None]
        share = 1 / (1 + torch.exp(-logits))
    return share * left + (1 - share) * right


@pytest.mark.parametrize("how", [how for how in MIXED if how != "cross_attention"])
def test_a_sum_equals_its_formula(how) -> None:
    mixer = stirred(make_mixer(how, (CLIP,), TAPS, text_width=TEXT))
    clip, diffusion, text = streams()
    mixed = mixer(clip, diffusion, text)
    assert mixed.shape[-1] == mixer.width == CLIP
    expected = sums_by_hand(how, mixer.state_dict(), clip, diffusion, text)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)


def attention_of_torch(state, block: str, heads: int, width: int, others: int) -> nn.Module:
    peer = nn.MultiheadAttention(width, heads, kdim=others, vdim=others, batch_first=True)
    names = {"q_proj_weight": "query", "k_proj_weight": "key", "v_proj_weight": "value"}
    weights = {name: state[f"{block}.{ours}.weight"] for name, ours in names.items()}
    biases = [state[f"{block}.{ours}.bias"] for ours in ("query", "key", "value")]
    out = {f"out_proj.{kind}": state[f"{block}.out.{kind}"] for kind in ("weight", "bias")}
    peer.load_state_dict({**weights, "in_proj_bias": torch.cat(biases), **out})
    return peer.eval()


@pytest.mark.parametrize(("asks", "heads", "blocks"), [("clip", 3, 2), ("diffusion", 7, 1)])
@pytest.mark.parametrize("residual", [True, False])
@torch.no_grad()
def test_cross_attention_equals_torchs_own(asks, heads, blocks, residual) -> None:
    config = MixingConfig(asks=asks, heads=heads, blocks=blocks, residual=residual)
    mixer = stirred(make_mixer("cross_attention", (CLIP,), TAPS, config=config))
    clip, diffusion, _ = streams(6, 15)
    state = mixer.state_dict()
    tokens, own, others, theirs = (
        (clip, (CLIP,), diffusion, TAPS) if asks == "clip" else (diffusion, TAPS, clip, (CLIP,))
    )
    keys = normed(state, "others_norm", others, theirs)
    for index in range(blocks):
        block = f"blocks.{index}"
        peer = attention_of_torch(state, block, heads, sum(own), sum(theirs))
        attended = peer(normed(state, f"{block}.norm", tokens, own), keys, keys)[0]
        tokens = tokens + attended if residual else attended
        hidden = linear(state, f"{block}.mlp.0", normed(state, f"{block}.mlp_norm", tokens, own))
        tokens = tokens + linear(state, f"{block}.mlp.2", F.gelu(hidden))
    torch.testing.assert_close(mixer(clip, diffusion), tokens, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("asks", ["clip", "diffusion"])
@torch.no_grad()
def test_tokens_that_are_absent_are_not_attended_to_and_stay_zeros(asks) -> None:
    mixer = stirred(
        make_mixer("cross_attention", (CLIP,), TAPS, config=MixingConfig(asks=asks, heads=1))
    )
    clip, diffusion, _ = streams(6, 15)
    there = torch.ones(diffusion.shape[:2], dtype=torch.bool)
    there[:, 9:] = False
    short = mixer(clip, diffusion[:, :9])
    masked = mixer(clip, diffusion * there[..., None], None, there)
    close = {"rtol": 1e-5, "atol": 1e-6}
    if asks == "clip":
        torch.testing.assert_close(masked, short, **close)
        assert not torch.allclose(mixer(clip, diffusion * there[..., None]), short, **close)
    else:
        torch.testing.assert_close(masked[:, :9], short, **close)
        assert not masked[:, 9:].any()


@pytest.mark.parametrize("asks", ["clip", "diffusion"])
def test_cross_attention_begins_from_the_stream_that_asks(fuse, asks) -> None:
    heads = 2
    encoder = fuse("cross_attention", MixingConfig(asks=asks, heads=heads, blocks=2))
    image = picture(64, 96)
    clip, diffusion = encoder.streams(image, "a red circle")
    own = clip if asks == "clip" else diffusion
    tokens = encoder(image, "a red circle")
    assert torch.equal(tokens, own)
    assert tokens_per_image(encoder) == own.shape[1]
    assert tokens.shape[-1] == encoder.hidden_size == sum(encoder.token_channels)
    other = fuse("cross_attention", MixingConfig(asks=asks, heads=heads, residual=False))
    assert not torch.allclose(other(image, "a red circle"), own)


def test_each_stream_keeps_its_grid_in_cross_attention_unless_one_is_given(fuse) -> None:
    diffusion_asks = MixingConfig(asks="diffusion", heads=2)
    image = picture(64, 64)
    alone = fuse("cross_attention", diffusion_asks).diffusion(image).shape[1]
    assert fuse("cross_attention", diffusion_asks)(image).shape[1] == alone
    assert fuse("cross_attention", diffusion_asks, grid=3)(image).shape[1] == 9
    assert tokens_per_image(fuse("cross_attention", diffusion_asks, grid=3)) == 9


def test_gates_begin_in_the_middle_or_from_clip_alone(fuse) -> None:
    image = picture(64, 64)
    gated = fuse("gated")
    assert torch.equal(gated(image, "a"), gated.clip_stream(image))
    for how in ("weighted", "token_gated", "question_gated"):
        mixer = make_mixer(how, (CLIP,), TAPS, text_width=TEXT)
        plain = make_mixer("add", (CLIP,), TAPS)
        plain.load_state_dict({key: mixer.state_dict()[key] for key in plain.state_dict()})
        clip, diffusion, text = streams()
        half = plain(clip, diffusion) / 2
        torch.testing.assert_close(mixer(clip, diffusion, text), half, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", MIXED)
def test_weights_come_from_the_seed_and_from_nothing_else(how) -> None:
    before = torch.random.get_rng_state()
    options = {"text_width": TEXT}
    heads = {"heads": 2} if how == "cross_attention" else {}
    made = [
        make_mixer(how, (CLIP,), TAPS, config=MixingConfig(seed=seed, **heads), **options)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(before, torch.random.get_rng_state())
    first, same, other = (each.state_dict() for each in made)
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    assert {value.dtype for value in first.values()} == {torch.float32}


@pytest.mark.parametrize("how", MIXED)
def test_a_mixed_picture_is_the_same_in_any_batch(fuse, how) -> None:
    encoder = fuse(how)
    stirred(encoder.mixer)
    images = [picture(64, 64 + 8 * seed, seed) for seed in range(3)]
    texts = ["a red circle", "", "what is left of the square?"]
    together = encoder(images, texts)
    encoder.clear_cache()
    alone = torch.cat([encoder(i, t) for i, t in zip(images, texts, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)  # of values up to 20
    assert together.shape[-1] == encoder.hidden_size
    assert isinstance(projector_for(encoder, 10), Projector)
    assert projector_for(encoder, 10, norm=True)(together).shape[-1] == 10
    assert together.shape[1] == tokens_per_image(encoder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", MIXED)
def test_half_precision_leaves_a_mixer_usable(tiny_sd_folder, how, dtype) -> None:
    config = TWO_HEADS if how == "cross_attention" else None
    diffusion = DiffusionEncoder.from_pretrained(tiny_sd_folder)
    encoder = FusedEncoder(clip_vision(), diffusion, how, image_processor=PROCESSOR, mixing=config)
    stirred(encoder.mixer, 0.1)
    image = picture(64, 64)
    exact = encoder(image, "a red circle")
    half = encoder.to(dtype)
    assert {p.dtype for p in half.mixer.parameters()} == {
        torch.float32 if dtype == torch.float16 else dtype
    }
    tokens = half(image, "a red circle")
    assert tokens.dtype == dtype
    limit = 5e-2 * float(exact.detach().abs().max())
    torch.testing.assert_close(tokens.float(), exact, rtol=0, atol=limit)


@pytest.mark.parametrize("how", MIXED)
def test_gradients_reach_the_mixer_and_what_trains_below_it(tiny_sd_folder, how) -> None:
    diffusion = DiffusionEncoder.from_pretrained(tiny_sd_folder)
    diffusion.add_lora(rank=2)
    config = TWO_HEADS if how == "cross_attention" else None
    encoder = FusedEncoder(clip_vision(), diffusion, how, image_processor=PROCESSOR, mixing=config)
    stirred(encoder.mixer, 0.1)
    encoder(picture(64, 64), "a red circle").square().mean().backward()
    trained = dict(encoder.named_trainable_parameters())
    assert {name.split(".")[0] for name in trained} == {"mixer", "diffusion"}
    assert all(p.grad is not None for p in trained.values())
    assert all(p.grad.any() for name, p in trained.items() if ".lora_B." in name)
    assert f"mixer ({how})" in encoder.summary()


def test_only_the_gate_that_asks_reads_the_question_beside_the_features(fuse, diffusion) -> None:
    encoder = fuse("question_gated")
    stirred(encoder.mixer)
    clip, features = encoder.streams(picture(64, 64), "a red circle")
    size = diffusion.backbone.default_size
    texts = ["a red circle", "", "is there anything blue?"]
    states = mean_states(diffusion.backbone, texts, size=(size, size))
    mixed = [encoder.mixer(clip, features, states[row][None]) for row in range(3)]
    assert torch.equal(encoder(picture(64, 64), "a red circle"), mixed[0])
    assert not torch.allclose(mixed[0], mixed[2], atol=1e-4)
    unasked = encoder(picture(64, 64))
    silent = encoder.mixer(*encoder.streams(picture(64, 64)), states[1][None])
    torch.testing.assert_close(unasked, silent, rtol=1e-5, atol=1e-5)
    embeds = diffusion.backbone.embed(["a red circle"], size=(size, size))
    with pytest.raises(PromptError, match="pass the texts themselves"):
        encoder(picture(64, 64), embeds)


@pytest.mark.parametrize("text", ["", "a red circle", "left of the red circle " * 40])
def test_a_question_is_the_mean_over_its_own_tokens(diffusion, text) -> None:
    backbone = diffusion.backbone
    tokenizer, limit = backbone.tokenizer, backbone.tokenizer.model_max_length

    def states(*ids: int) -> torch.Tensor:
        row = [*ids, *[tokenizer.pad_token_id] * (limit - len(ids))]
        return backbone.text_encoder(torch.tensor([row])).last_hidden_state[0, : len(ids)]

    cut = states(*tokenizer(text, truncation=True).input_ids)
    means = mean_states(backbone, [text], size=(64, 64))
    torch.testing.assert_close(means[0], cut.mean(0), rtol=1e-5, atol=1e-5)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    first, last, room = tokenizer.bos_token_id, tokenizer.eos_token_id, limit - 2
    parts = [ids[start : start + room] for start in range(0, max(1, len(ids)), room)]
    windows = torch.cat([states(first, *part, last) for part in parts])
    means = mean_states(backbone, [text], size=(64, 64), long_prompts="chunk")
    torch.testing.assert_close(means[0], windows.mean(0), rtol=1e-5, atol=1e-5)
    assert len(parts) == (4 if len(text) > 40 else 1)


def test_clip_may_ask_several_timesteps_and_nothing_else_may(tiny_sd_folder, fuse) -> None:
    several = DiffusionEncoder.from_pretrained(tiny_sd_folder, timestep=(50, 261))
    encoder = fuse("cross_attention", diffusion=several)
    stirred(encoder.mixer)
    clip, features = encoder.streams(picture(64, 64), "a")
    assert features.shape[1] == 2
    expected = encoder.mixer(clip, torch.cat([features[:, 0], features[:, 1]], dim=1))
    torch.testing.assert_close(encoder(picture(64, 64), "a"), expected, rtol=1e-5, atol=1e-5)
    other = MixingConfig(asks="diffusion", heads=2)
    for how, config in [("add", None), ("token_gated", None), ("cross_attention", other)]:
        with pytest.raises(ConfigError, match="one timestep"):
            fuse(how, config, diffusion=several)


@pytest.mark.long
@pytest.mark.parametrize("how", MIXED)
def test_a_saved_mixer_comes_back(fuse, tmp_path, how) -> None:
    encoder = fuse(how)
    stirred(encoder.mixer)
    encoder.save_pretrained(tmp_path)
    image = picture(64, 96)
    expected = encoder(image, "a red circle")
    for trainable in (False, True):
        again = FusedEncoder.from_pretrained(tmp_path, trainable=trainable)
        assert torch.equal(again(image, "a red circle"), expected)
        assert (again.how, again.grid, again.mixer.config) == (
            how,
            encoder.grid,
            encoder.mixer.config,
        )
        assert bool(list(again.trainable_parameters())) is trainable


def test_a_mixer_that_is_not_whole_is_refused(fuse, tmp_path) -> None:
    fuse("token_gated").save_pretrained(tmp_path)
    weights, description = tmp_path / "mixer/mixer.safetensors", tmp_path / "mixer/mixer.json"
    # Copies: older safetensors maps the file itself, which is overwritten here.
    whole = {name: value.clone() for name, value in load_file(weights).items()}
    config = json.loads(description.read_text())

    def refused(said: str) -> None:
        with pytest.raises(BackboneError, match=said):
            FusedEncoder.from_pretrained(tmp_path)

    save_file({key: value for key, value in whole.items() if key != "gate.bias"}, weights)
    refused("gate.bias is nothing in the file")
    save_file({**whole, "gate.bias": torch.zeros(13)}, weights)
    refused(r"gate.bias is \(13,\) in the file, and \(12,\)")
    save_file({**whole, "gate.bias": torch.full((12,), float("nan"))}, weights)
    refused("NaN")
    weights.write_bytes(b"no weights")
    refused("cannot read")
    save_file(whole, weights)
    for key, value in [
        ("how", "tokens"),
        ("how", "add"),
        ("clip_channels", [10**9]),
        ("text_width", 3),
        ("config", {"seed": "x"}),
        ("config", None),
        ("config", {"blocks": 10**9}),
    ]:
        description.write_text(json.dumps({**config, key: value}))
        refused("does not hold the mixer")
    description.unlink()
    refused("mixer.json")
    description.parent.rename(tmp_path / "elsewhere")
    refused("'mixer' is missing")


def test_a_mixer_of_another_encoder_is_refused(fuse, tmp_path) -> None:
    encoder = fuse("add")
    encoder.save_pretrained(tmp_path)
    make_mixer("add", (12,), TAPS).save_pretrained(tmp_path / "mixer")
    with pytest.raises(BackboneError, match="do not go together"):
        FusedEncoder.from_pretrained(tmp_path)
    assert load_mixer(tmp_path / "mixer").sizes["diffusion_channels"] == TAPS
    with pytest.raises(ShapeError, match="made for streams of 12 and 7 channels"):
        load_mixer(tmp_path / "mixer")(*encoder.streams(picture(64, 64)))
    with pytest.raises(ShapeError, match="one grid"):
        load_mixer(tmp_path / "mixer")(*streams(6, 7)[:2])
    encoder.diffusion.to("cpu"), encoder.mixer.to("meta")
    with pytest.raises(ConfigError, match="the mixer is not"):
        encoder(picture(64, 64))


@pytest.mark.parametrize(
    ("how", "options", "said"),
    [
        (
            "cross_attention",
            {"heads": 5},
            "heads must divide the 12 channels.*1, 2, 3, 4, 6, 12 do",
        ),
        ("cross_attention", {"heads": 0}, "mixing.heads must be"),
        ("cross_attention", {"blocks": 0}, "mixing.blocks must be"),
        ("cross_attention", {"blocks": 10**6}, "mixing.blocks must be"),
        ("cross_attention", {"asks": "text"}, "mixing.asks must be one of"),
        ("cross_attention", {"seed": -1}, "mixing.seed must be"),
        ("add", {"asks": "diffusion"}, "mixing.asks is read by how='cross_attention' alone"),
        ("channel", {"blocks": 2}, "mixing.blocks is read by how='cross_attention' alone"),
        ("channel", {"seed": 2}, "which has no weights; leave it out"),
    ],
)
@pytest.mark.wrong_type
def test_bad_options_are_named(fuse, how, options, said) -> None:
    with pytest.raises(ConfigError, match=said):
        fuse(how, MixingConfig(**options))


@pytest.mark.parametrize("how", MIXED)
def test_a_tower_says_that_it_has_no_place_for_such_weights(how) -> None:
    with pytest.raises(ConfigError, match=r"weights of its own.*take one of channel, tokens"):
        TowerSpec.parse(f"diffenc:sdxl?clip=vitl336&how={how}")
