"""FLUX.1 behind the same calls: dual and single streams, packed latents, guidance embedding."""

from dataclasses import replace

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file
from typer.testing import CliRunner

import dit_builders
from diffenc import CrossAttnScorer, DiffusionEncoder, list_taps
from diffenc.cli.main import app
from diffenc.denoiser.hooks import ForwardTaps
from diffenc.errors import BackboneError, ConfigError, ShapeError
from diffenc.inputs.noise import shared_noise
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.models import load_backbone
from diffenc.passes.forward import predict_noise
from plain_dit import agree, as_map, hooked, latents_of, picture

TAPS = (
    "transformer_blocks.0",
    "transformer_blocks.0.attn",
    "transformer_blocks.0.ff",
    "transformer_blocks.1.attn.to_q",
    "single_transformer_blocks.0.norm",
    "single_transformer_blocks.1",
    "single_transformer_blocks.1.attn",
    "single_transformer_blocks.1.attn.to_k",
    "single_transformer_blocks.2",
)
TEXT = "a red circle left of a blue square"
OPTIONS = {"taps": TAPS, "timestep": 515, "size": (48, 80)}


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "schnell"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-flux")
    dit_builders.flux_pipeline(guidance=request.param).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return FluxPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def encoder(folder):
    return DiffusionEncoder.from_pretrained(folder, **OPTIONS)


@pytest.fixture(scope="module")
def dev(folder):
    return "dev" in str(folder) or load_backbone(folder).is_guidance_distilled


@torch.no_grad()
def plain_pass(pipe, text, timestep, names=TAPS, length=None):
    """Outputs of modules as they come, the flow, and the flow that would be right."""
    latents = latents_of(pipe, picture(48, 80))
    noise = shared_noise(tuple(latents.shape[1:]), seed=0, timestep=timestep)[None]
    sigma = timestep / 1000
    guidance = pipe.transformer.config.guidance_embeds
    states, pooled, txt_ids = pipe.encode_prompt(
        text, None, max_sequence_length=length or (512 if guidance else 256)
    )
    packed = pipe._pack_latents(sigma * noise + (1 - sigma) * latents, 1, 16, 6, 10)
    flows = []
    outputs = hooked(
        pipe.transformer,
        names,
        lambda: flows.append(
            pipe.transformer(
                packed,
                encoder_hidden_states=states,
                pooled_projections=pooled,
                timestep=torch.tensor([sigma]),
                guidance=torch.tensor([3.5]) if guidance else None,
                txt_ids=txt_ids,
                img_ids=pipe._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32),
                return_dict=False,
            )[0]
        ),
    )
    return outputs, pipe._unpack_latents(flows[0], 48, 80, 8), noise - latents


def image_tokens(tap, output):
    """What of a module's output is the picture's: 15 rows, behind the text's where both are in."""
    if tap.endswith("norm") or tap == "transformer_blocks.0.attn":
        output = output[0]
    elif isinstance(output, tuple):
        output = output[1]
    return output[:, -15:]


@pytest.mark.parametrize("text", [TEXT, "", "Red, star " * 99], ids=["text", "empty", "cut"])
def test_features_are_the_pictures_stream_of_the_plain_pipeline(encoder, pipe, text):
    ours = encoder.extract(picture(48, 80), text)
    theirs, _, _ = plain_pass(pipe, text, 515)
    for tap in TAPS:
        assert agree(ours[tap], as_map(image_tokens(tap, theirs[tap]), 3, 5)), tap


def test_packed_tokens_become_latents_again(folder, pipe):
    backbone = load_backbone(folder)
    _, flow, target = plain_pass(pipe, TEXT, 515, names=())
    latents = latents_of(pipe, picture(48, 80)).detach()
    noise = target + latents
    noisy = 0.515 * noise + 0.485 * latents
    with torch.no_grad():
        ours = predict_noise(backbone, noisy, 515, backbone.embed([TEXT], size=(48, 80)))
    assert agree(ours, noisy + 0.485 * flow)


@torch.no_grad()
def test_shuffled_text_leaves_the_picture_before_it_meets_the_text(encoder):
    # No text has a place in FLUX: its order changes no tap; its states change all but the first's
    # queries, which would differ if they held a row of the text.
    backbone = encoder.backbone
    embeds = backbone.embed([TEXT], size=(48, 80))
    order = torch.randperm(embeds.prompt_embeds.shape[1], generator=torch.manual_seed(0))
    latents = torch.randn(1, 16, 6, 10, generator=torch.manual_seed(1))
    names = ("transformer_blocks.0.attn.to_q", *TAPS)

    def read(states, latents):
        call = PromptEmbeds(states, embeds.pooled_prompt_embeds, truncated=(0,))
        with ForwardTaps(backbone.transformer, names) as taps:
            return taps.run(lambda: backbone.denoise(latents, 515, call))

    plain = read(embeds.prompt_embeds, latents)
    shuffled = read(embeds.prompt_embeds[:, order], latents)
    other = read(embeds.prompt_embeds.flip(-1), latents)
    turned = read(embeds.prompt_embeds, latents.flip(-1))
    assert torch.equal(other[names[0]], plain[names[0]])
    for tap in TAPS:
        assert agree(shuffled[tap], plain[tap], 2e-5), tap
        assert not agree(turned[tap], plain[tap], 1e-3), tap
        assert tap == TAPS[0] or not agree(other[tap], plain[tap], 1e-4), tap


@pytest.mark.parametrize("last", [3, 6])
def test_a_truncated_model_gives_the_same_features(folder, encoder, last):
    short = DiffusionEncoder.from_pretrained(
        folder, **{**OPTIONS, "taps": TAPS[:last]}, truncate=True
    )
    transformer = short.backbone.transformer
    counts = (len(transformer.transformer_blocks), len(transformer.single_transformer_blocks))
    assert counts == ((1, 0) if last == 3 else (2, 2))
    ours, theirs = (each.extract(picture(48, 80), TEXT) for each in (short, encoder))
    for tap in TAPS[:last]:
        assert agree(ours[tap], theirs[tap], 1e-6)


def test_a_distilled_model_has_no_half_without_a_text(encoder, pipe, dev):
    if dev:
        for conditioning in ("cfg", "concat"):
            with pytest.raises(ConfigError, match="distilled of guided predictions and has no"):
                encoder.extract(picture(48, 80), TEXT, conditioning=conditioning)
    else:
        halves = encoder.extract(picture(48, 80), "a photo", conditioning="cfg")
        theirs, _, _ = plain_pass(pipe, "a photo", 515)
        ours = halves.select("cond")[TAPS[5]]
        assert agree(ours, as_map(image_tokens(TAPS[5], theirs[TAPS[5]]), 3, 5))
    alone = encoder.extract(picture(48, 80))
    empty, _, _ = plain_pass(pipe, "", 515)
    assert agree(alone[TAPS[5]], as_map(image_tokens(TAPS[5], empty[TAPS[5]]), 3, 5))


def test_a_text_is_encoded_once_and_states_of_the_pipeline_are_taken(encoder, pipe, dev):
    calls = []
    handles = [
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, part in encoder.backbone.parts().items()
    ]
    encoder.extract(picture(48, 80), "a photo of a star")
    first = len(calls)
    encoder.extract(picture(48, 80), "a photo of a star")
    for handle in handles:
        handle.remove()
    assert [name for name in calls[:first] if name.startswith("text")]
    assert [name for name in calls[first:] if name.startswith("text")] == []
    states, pooled, _ = pipe.encode_prompt(TEXT, None, max_sequence_length=512 if dev else 256)
    ours = encoder.extract(picture(48, 80), PromptEmbeds(states, pooled, truncated=(0,)))
    assert agree(ours[TAPS[5]], encoder.extract(picture(48, 80), TEXT)[TAPS[5]])
    with pytest.raises(ShapeError, match="needs pooled_prompt_embeds beside the states"):
        encoder.extract(picture(48, 80), PromptEmbeds(states, truncated=(0,)))


def test_states_of_other_lengths_are_not_padded(encoder, pipe, dev):
    """The pipeline's `max_sequence_length`: no padding may stand for what was left out."""
    images = [picture(48, 80), picture(48, 80, seed=1)]
    short, pooled, _ = pipe.encode_prompt([TEXT] * 2, None, max_sequence_length=20)
    embeds = PromptEmbeds(short, pooled, truncated=(0, 0))
    theirs, _, _ = plain_pass(pipe, TEXT, 515, length=20)
    expected = as_map(image_tokens(TAPS[5], theirs[TAPS[5]]), 3, 5)
    assert agree(encoder.extract(images, embeds)[TAPS[5]][:1], expected)
    own = replace(embeds, lengths=(20, 12))
    both = encoder.extract(images, own)[TAPS[5]]
    assert agree(both[:1], expected)
    fewer = PromptEmbeds(short[1:, :12], pooled[1:], truncated=(0,))
    assert agree(both[1:], encoder.extract(images[1], fewer)[TAPS[5]])
    assert not agree(both[1:], encoder.extract(images[1], embeds.select(1, 2))[TAPS[5]], 1e-4)
    if not dev:
        halves = encoder.extract(images, embeds, conditioning="cfg")
        assert agree(halves.select("cond")[TAPS[5]][:1], expected)
        empty, _, _ = plain_pass(pipe, "", 515)
        uncond = as_map(image_tokens(TAPS[5], empty[TAPS[5]]), 3, 5)
        assert agree(halves.select("uncond")[TAPS[5]][:1], uncond)
    with pytest.raises(ShapeError, match="masks no padding"):
        encoder.backbone.denoise(torch.zeros(2, 16, 6, 10), 515, own)


def test_self_bench_is_the_norm_of_the_error_of_the_flow(folder, pipe):
    scorer = CrossAttnScorer.from_pretrained(
        folder, preset="self-bench", size=(48, 80), timesteps=(66, 515)
    )
    expected = []
    for timestep in (66, 515):
        _, flow, target = plain_pass(pipe, TEXT, timestep, names=())
        expected.append((flow - target).square().sum().sqrt())
    ours = scorer(picture(48, 80), TEXT)[0, 0]
    assert torch.allclose(ours, -torch.stack(expected).mean(), rtol=1e-5)


def test_taps_are_known_before_weights(folder):
    taps = {tap.name: (tap.channels, tap.reduction) for tap in list_taps(folder)}
    assert taps["latents"] == (16, 8)
    assert taps["single_transformer_blocks.2"] == taps["transformer_blocks.1.ff"] == (32, 16)
    assert taps["single_transformer_blocks.1.proj_mlp"] == (128, 16)
    assert "transformer_blocks.0.norm" not in taps
    default = DiffusionEncoder.from_pretrained(folder).backbone.default_taps
    assert default == ("single_transformer_blocks.0",)


@pytest.fixture(scope="module")
def deep():
    return dit_builders.flux_pipeline(num_single_layers=10)


def plain_ditf(encoder, discard, seeds):
    """What DiTF's release makes of its block's inputs: their mean, zeroed, normed, modulated."""
    inputs = []

    def keep(_module, args, kwargs):
        joined = kwargs["hidden_states"]
        if "encoder_hidden_states" in kwargs:  # diffusers before 0.35 joins them before the blocks
            joined = torch.cat([kwargs["encoder_hidden_states"], joined], dim=1)
        inputs.append((joined[:, -15:], kwargs["temb"]))  # the text comes first

    block = encoder.backbone.transformer.single_transformer_blocks[9]
    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    features = encoder.extract(picture(48, 80), TEXT)[0]
    handle.remove()
    ((states, time),) = inputs
    assert len(states) == seeds
    mean = states.mean(dim=0, keepdim=True)
    mean[:, :, list(discard)] = 0.0
    shift, scale, _ = block.norm.linear(torch.nn.functional.silu(time[:1])).chunk(3, dim=1)
    flat = torch.nn.functional.layer_norm(mean, mean.shape[-1:], eps=1e-6)
    return features, as_map((1 + scale[:, None]) * flat + shift[:, None], 3, 5)


@pytest.mark.parametrize(("discard", "draws"), [((), 1), ((), 3), ((5, 30), 1), ((5, 30), 3)])
def test_ditf_norms_the_mean_input_of_its_block(deep, discard, draws):
    options = {"size": (48, 80), "draws": draws, "discard": discard}
    encoder = DiffusionEncoder.from_pretrained(deep, preset="ditf", **options)
    ours, theirs = plain_ditf(encoder, discard, draws)
    assert agree(ours, theirs, 1e-5)


def test_ditf_without_a_mean_is_the_norm_of_the_model(deep):
    tap = "single_transformer_blocks.9.norm"
    options = {"size": (48, 80), "taps": (tap,), "timestep": (260, 515)}
    plain, ditf, less = (
        DiffusionEncoder.from_pretrained(deep, **options, discard=discard)
        for discard in (None, (), (3,))
    )
    halves = [each.extract(picture(48, 80), TEXT)[0] for each in (plain, ditf, less)]
    assert halves[0].shape == (1, 2, 32, 3, 5)
    assert agree(halves[1], halves[0], 1e-6)
    assert not agree(halves[2], halves[0], 1e-3)


def test_the_preset_discards_the_massive_channels_of_the_published_model(deep):
    with pytest.raises(ConfigError, match=r"no channel 154 at .*which has 32; massive channels"):
        DiffusionEncoder.from_pretrained(deep, preset="ditf")
    encoder = DiffusionEncoder.from_pretrained(deep, preset="ditf", discard=())
    assert (encoder.config.timestep, encoder.config.draws, encoder.config.size) == (260, 8, 640)
    assert encoder.config.posterior == "sample"
    with pytest.raises(ConfigError, match=r"'transformer_blocks\.0' is none"):
        DiffusionEncoder.from_pretrained(deep, taps="transformer_blocks.0", discard=())


def test_features_of_other_channels_are_not_remembered_as_these(deep):
    tap = "single_transformer_blocks.9.norm"
    options = {"size": (48, 80), "taps": (tap,)}
    first = DiffusionEncoder.from_pretrained(deep, **options, discard=())
    second = DiffusionEncoder.from_pretrained(first.backbone, **options, discard=(3,))
    plain = DiffusionEncoder.from_pretrained(first.backbone, **options)
    ours, theirs, last = (each.extract(picture(48, 80))[0] for each in (first, second, plain))
    assert not agree(ours, theirs, 1e-3)
    assert agree(ours, last, 1e-6)


@pytest.mark.long
def test_a_compiled_transformer_gives_the_same_features_at_every_size(deep):
    torch._dynamo.reset()
    taps = ("transformer_blocks.1", "single_transformer_blocks.0.norm")
    plain = DiffusionEncoder.from_pretrained(deep, taps=taps, size=(48, 80))
    own = DiffusionEncoder.from_pretrained(deep, taps=taps, size=(48, 80))
    own.compile(backend="eager", fullgraph=True)
    for size in ((48, 80), (64, 32)):
        compiled, expected = (
            DiffusionEncoder.from_pretrained(each.backbone, taps=taps, size=size)
            for each in (own, plain)
        )
        ours, theirs = (each.extract(picture(*size), TEXT) for each in (compiled, expected))
        for tap in taps:
            assert agree(ours[tap], theirs[tap]), tap
    ditf = DiffusionEncoder.from_pretrained(plain.backbone, taps=taps[1:], discard=())
    with pytest.raises(ConfigError, match="runs behind the pass, which is not compiled"):
        ditf.compile()


@pytest.mark.long
def test_the_commands_take_channels_to_discard(deep, folder, dev, tmp_path):
    deep.save_pretrained(tmp_path / "deep")
    picture(48, 80).save(tmp_path / "picture.png")
    call = ("encode", tmp_path / "picture.png", "-p", TEXT, "-m", tmp_path / "deep")
    for channels, discard in (("5,30", (5, 30)), ("none", ())):
        encoder = DiffusionEncoder.from_pretrained(
            tmp_path / "deep", preset="ditf", draws=2, size=(48, 80), discard=discard
        )
        _, plain = plain_ditf(encoder, discard, 2)
        out = tmp_path / f"{channels}.safetensors"
        options = ("--preset", "ditf", "--draws", 2, "--size", "48x80", "--discard", channels)
        result = run(*call, *options, "-o", out)
        assert result.exit_code == 0, result.output
        assert agree(load_file(out)["single_transformer_blocks.9.norm"], plain)
    for channels, message in (
        ("x", "--discard takes channels with commas, such as 154,1446, or none, got 'x'"),
        ("99", "no channel 99 at 'single_transformer_blocks.9.norm', which has 32"),
    ):
        result = run(*call, "--preset", "ditf", "--discard", channels, "-o", tmp_path / "none")
        assert result.exit_code == 2
        assert message in result.output
    result = run(*call, "--taps", "transformer_blocks.0", "--discard", "none")
    assert (result.exit_code, "'transformer_blocks.0' is none" in result.output) == (2, True)
    if not dev:  # which has no half without a text
        look = ("look", tmp_path / "picture.png", "-q", TEXT, "-m", folder, "--side", 64)
        options = ("--taps", "single_transformer_blocks.1.norm", "-o", tmp_path / "look.png")
        rows = [
            run(*look, *options, "--force", "--discard", channels).output
            for channels in ("none", "5,30")
        ]
        assert all("single_transformer_blocks.1.norm" in row for row in rows)
        assert rows[0] != rows[1]


def test_massive_channels_are_found(deep):
    block = deep.transformer.single_transformer_blocks[8]
    before = block.proj_out.bias.detach().clone()
    options = {"taps": ("single_transformer_blocks.8",), "size": (48, 80)}
    encoder = DiffusionEncoder.from_pretrained(deep, **options)
    assert encoder.extract(picture(48, 80), TEXT).massive_channels() == {options["taps"][0]: ()}
    with torch.no_grad():
        block.proj_out.bias[[4, 17]] += torch.tensor([1e6, -1e6])
    encoder.clear_cache()
    features = encoder.extract(picture(48, 80), TEXT)
    with torch.no_grad():
        block.proj_out.bias.copy_(before)
    encoder.clear_cache()
    assert features.massive_channels() == {options["taps"][0]: (4, 17)}
    with pytest.raises(ConfigError, match="ratio must be above 1"):
        features.massive_channels(ratio=1)


@pytest.mark.long
def test_real_models_are_described_without_weights():
    taps = {tap.name: (tap.channels, tap.reduction) for tap in list_taps("flux-dev")}
    assert taps["single_transformer_blocks.37"] == taps["single_transformer_blocks.9.norm"]
    assert taps["single_transformer_blocks.9.norm"] == (3072, 16)


def test_text_encoders_of_another_width_are_refused(folder):
    parts = load_backbone(folder)
    kept = {name: part for name, part in parts.named_children() if name != "text_encoder_2"}
    with pytest.raises(BackboneError, match="T5 gives states of 16"):
        type(parts)(
            name="mixed",
            scheduler=parts.scheduler,
            tokenizer=parts.tokenizer,
            tokenizer_2=parts.tokenizer_2,
            text_encoder_2=dit_builders.tiny_t5(16),
            **kept,
        )
