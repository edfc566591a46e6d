"""PixArt behind the same calls: features, texts, sizes, early end and files."""

import json
import shutil

import pytest
import torch
from diffusers import DDPMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

import dit_builders
from diffenc import DiffusionEncoder, list_taps
from diffenc.errors import BackboneError, ConfigError, ShapeError, TapError
from diffenc.inputs.noise import shared_noise
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.models import describe, load_backbone
from diffenc.models.pixart import PixArt
from diffenc.passes.forward import predict_noise
from plain_dit import agree, as_map, hooked, latents_of, picture

TAPS = (
    "transformer_blocks.0.attn1",
    "transformer_blocks.1.attn2",
    "transformer_blocks.1.attn2.to_q",
    "transformer_blocks.2",
    "transformer_blocks.2.ff",
)
TEXT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return dit_builders.save_pixart(tmp_path_factory.mktemp("tiny-pixart"))


@pytest.fixture(scope="module")
def pipe(folder):
    return PixArtSigmaPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def encoder(folder):
    return DiffusionEncoder.from_pretrained(folder, taps=TAPS, timestep=261, size=(48, 80))


def plain_pass(pipe, image, text, timestep, names=TAPS):
    """Outputs of modules, the prediction and its input; the text is padded and masked."""
    latents = latents_of(pipe, image)
    noise = shared_noise(tuple(latents.shape[1:]), seed=0, timestep=timestep)[None]
    signal = pipe.scheduler.alphas_cumprod[timestep]
    noisy = signal**0.5 * latents + (1 - signal) ** 0.5 * noise
    states, mask, _, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
    height, width = latents.shape[2:]
    added = {"resolution": None, "aspect_ratio": None}
    if pipe.transformer.config.sample_size == 128:
        added = {
            "resolution": torch.tensor([[8.0 * height, 8.0 * width]]),
            "aspect_ratio": torch.tensor([[height / width]]),
        }
    predictions = []

    def call():
        predictions[:] = pipe.transformer(
            noisy,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            timestep=torch.tensor([timestep]),
            added_cond_kwargs=added,
            return_dict=False,
        )

    outputs = hooked(pipe.transformer, names, call)
    maps = {name: as_map(tokens, height // 2, width // 2) for name, tokens in outputs.items()}
    return maps, predictions[0], noisy


@torch.no_grad()
def test_features_equal_hooks_on_the_plain_pipeline(encoder, pipe):
    images = [picture(48, 80), picture(48, 80, seed=1), picture(48, 80)]
    texts = ["A Red circle", TEXT, "Red, star " * 99]  # the last is cut
    ours = encoder.extract(images, texts)
    for row, (image, text) in enumerate(zip(images, texts, strict=True)):
        theirs, _, _ = plain_pass(pipe, image, text, 261)
        for tap in TAPS:
            assert ours[tap].shape[2:] == (3, 5)
            assert agree(ours[tap][row : row + 1], theirs[tap]), tap


@torch.no_grad()
def test_no_prompt_is_the_empty_text_and_both_halves_come_from_one_pass(encoder, pipe):
    image = picture(48, 80)
    halves = encoder.extract(image, TEXT, conditioning="concat")
    theirs, _, _ = plain_pass(pipe, image, "", 261)
    cond = encoder.extract(image, TEXT)
    for tap in TAPS:
        assert agree(halves.select("uncond")[tap], theirs[tap])
        assert agree(halves.select("cond")[tap], cond[tap])


@torch.no_grad()
def test_the_noise_is_the_first_half_of_what_the_transformer_gives(folder, pipe):
    backbone = load_backbone(folder)
    _, output, noisy = plain_pass(pipe, picture(48, 80), TEXT, 500, names=())
    ours = predict_noise(backbone, noisy, 500, backbone.embed([TEXT], size=(48, 80)))
    assert output.shape[1] == 8
    assert agree(ours, output[:, :4])


def test_a_truncated_model_gives_the_same_features_and_nothing_behind_them(folder, encoder):
    taps = ("transformer_blocks.1.attn2.to_q", "transformer_blocks.0")
    image = picture(48, 80)
    options = {"taps": taps, "timestep": 261, "size": (48, 80)}
    whole = DiffusionEncoder(encoder.backbone, encoder.config.from_dict(options))
    short = DiffusionEncoder.from_pretrained(folder, truncate=True, **options)
    for tap in taps:
        assert agree(short.extract(image, TEXT)[tap], whole.extract(image, TEXT)[tap], 1e-6)
    assert len(short.backbone.transformer.transformer_blocks) == 2
    assert short.backbone.shortened
    assert not whole.backbone.shortened
    with pytest.raises(TapError, match=r"transformer_blocks\.2' lies behind"):
        short.backbone.match_taps(["transformer_blocks.2"])
    with pytest.raises(ConfigError, match="predicts no noise"):
        predict_noise(
            short.backbone, torch.zeros(1, 4, 6, 10), 5, PromptEmbeds(torch.zeros(1, 1, 16))
        )


def test_the_pass_ends_at_the_last_tap(encoder):
    ran = []
    block = encoder.backbone.transformer.transformer_blocks[3]
    handle = block.register_forward_hook(lambda *_: ran.append(True))
    encoder.extract(picture(48, 80, seed=5), TEXT)
    handle.remove()
    assert not ran


@pytest.mark.slow
def test_a_compiled_transformer_gives_the_same_features(folder):
    encoder = DiffusionEncoder.from_pretrained(folder, taps=TAPS[:2], size=(48, 80))
    plain = encoder.extract(picture(48, 80), TEXT)
    encoder.compile(backend="eager", fullgraph=True)
    compiled = encoder.extract(picture(48, 80), TEXT)
    for tap in TAPS[:2]:
        assert agree(compiled[tap], plain[tap])


@pytest.mark.long
def test_further_sizes_compile_up_to_torchs_limit_as_in_plain_diffusers(folder, pipe):
    sizes = ((48, 80), (64, 32), (64, 64))  # the last is the model's own, and square
    limit_hit = torch._dynamo.exc.FailOnRecompileLimitHit
    plain = DiffusionEncoder.from_pretrained(folder, taps=TAPS[:1])
    own = DiffusionEncoder.from_pretrained(folder, taps=TAPS[:1])

    def ours(size):
        compiled, expected = (
            DiffusionEncoder.from_pretrained(each.backbone, taps=TAPS[:1], size=size)
            for each in (own, plain)
        )
        maps = compiled.extract(picture(*size), TEXT)[0]
        assert agree(maps, expected.extract(picture(*size), TEXT)[0])

    @torch.no_grad()
    def theirs(size):
        h, w = (side // 8 for side in size)
        transformer(
            torch.zeros(1, 4, h, w),
            encoder_hidden_states=torch.zeros(1, 4, 16),
            timestep=torch.tensor([5]),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        )

    for limit in (2, 8):
        for call in (ours, theirs):
            torch._dynamo.reset()
            own.compile(backend="eager", fullgraph=True)
            transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
            with torch._dynamo.config.patch(recompile_limit=limit):
                call(sizes[0])
                call(sizes[1])
                if limit == 2:
                    with pytest.raises(limit_hit):
                        call(sizes[2])
                else:
                    call(sizes[2])


def test_texts_are_encoded_once_and_pictures_without_text_too(encoder):
    calls = []
    handles = [
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, part in encoder.backbone.parts().items()
    ]
    image = picture(48, 80, seed=7)
    encoder.extract(image, "a red photo", conditioning="cfg")
    first = list(calls)
    encoder.extract(image, "a red photo", conditioning="cfg")
    for handle in handles:
        handle.remove()
    assert first.count("text_encoder") == 2  # the text, and the empty one
    assert calls[len(first) :].count("text_encoder") == 0
    assert [*calls, *first].count("transformer") == 0  # it ends before its own hook


def test_states_of_the_pipeline_are_taken_as_they_are(encoder, pipe):
    states, mask, _, _ = pipe.encode_prompt([TEXT, "a red"], do_classifier_free_guidance=False)
    lengths = tuple(mask.sum(dim=1).tolist())
    embeds = PromptEmbeds(states, truncated=(0, 0), lengths=lengths)
    image = picture(48, 80)
    ours, theirs = (
        encoder.extract([image] * 2, embeds),
        encoder.extract([image] * 2, [TEXT, "a red"]),
    )
    for tap in TAPS:
        assert agree(ours[tap], theirs[tap])
    with pytest.raises(ShapeError, match=r"have width 8, .* reads 16"):
        encoder.extract(image, PromptEmbeds(torch.zeros(1, 4, 8)))


@pytest.mark.parametrize("texts", [[TEXT], ["a red", "a blue"]], ids=["one", "two as long"])
@pytest.mark.parametrize("conditioning", ["cond", "cfg"])
def test_padding_of_states_is_left_out_however_long_the_texts_are(
    encoder, pipe, texts, conditioning
):
    states, mask, _, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False)
    lengths = tuple(mask.sum(dim=1).tolist())
    embeds = PromptEmbeds(states, truncated=(0,) * len(texts), lengths=lengths)
    images = [picture(48, 80), picture(48, 80, seed=1)]
    for shown in ([images[0]] * len(texts), images):
        ours, theirs = (
            encoder.extract(shown, prompts, conditioning=conditioning)
            for prompts in (embeds, texts if len(texts) > 1 else texts[0])
        )
        for tap in TAPS:
            assert agree(ours[tap], theirs[tap]), tap
    for wrong in ((4,) * (len(texts) + 1), (0,) * len(texts), (301,) * len(texts)):
        with pytest.raises(ShapeError, match=r"lengths must say of each of \d rows how many"):
            encoder.extract(images[0], PromptEmbeds(states, lengths=wrong))


def test_sides_are_multiples_of_the_patch(encoder, folder):
    assert encoder.backbone.multiple == 16
    odd = DiffusionEncoder(encoder.backbone, encoder.config.from_dict({"size": (40, 64)}))
    with pytest.raises(ShapeError, match=r"multiples of 16 .* 32 and 48 are the nearest to 40"):
        odd.extract(picture(64, 64), TEXT)
    padded = DiffusionEncoder(encoder.backbone, encoder.config.from_dict({"resize": "none"}))
    assert padded.extract(picture(50, 70), TEXT)[0].shape == (1, 32, 4, 5)


def test_taps_are_known_before_weights(folder, tmp_path):
    bare = shutil.copytree(
        folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")
    )
    taps = {tap.name: (tap.channels, tap.reduction) for tap in list_taps(bare)}
    assert taps["latents"] == (4, 8)
    assert taps["transformer_blocks.3"] == taps["transformer_blocks.0.attn2.to_q"] == (32, 16)
    assert taps["transformer_blocks.0.ff.net.0"] == (128, 16)
    assert describe(bare).default_taps == ("transformer_blocks.2",)
    with pytest.raises(TapError, match=r"no tap matches 'up_blocks\.1'"):
        describe(bare).match_taps(["up_blocks.1"])


def test_configs_of_the_first_releases_name_another_class(folder, tmp_path):
    old = shutil.copytree(folder, tmp_path / "old")
    config = json.loads((old / "transformer" / "config.json").read_text())
    config |= {"_class_name": "Transformer2DModel", "double_self_attention": False}
    (old / "transformer" / "config.json").write_text(json.dumps(config))
    index = json.loads((old / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "Transformer2DModel"]
    (old / "model_index.json").write_text(json.dumps(index))
    assert type(load_backbone(old).transformer) is PixArtTransformer2DModel


@torch.no_grad()
def test_alpha_is_told_the_size_of_the_picture_and_reads_fewer_tokens(tmp_path):
    pipe = dit_builders.pixart_pipeline(
        sample_size=128,
        use_additional_conditions=None,
        num_attention_heads=3,
        cross_attention_dim=48,
    )
    backbone = PixArt(
        name="alpha",
        transformer=pipe.transformer,
        vae=pipe.vae,
        scheduler=DDPMScheduler(beta_schedule="linear"),
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        pipeline="PixArtAlphaPipeline",
    )
    assert backbone.tokenizer.model_max_length == 120
    assert pipe.tokenizer.model_max_length == 512
    encoder = DiffusionEncoder.from_pretrained(backbone, taps=TAPS, size=(48, 80))
    theirs, _, _ = plain_pass(pipe, picture(48, 80), TEXT, 50)
    ours = encoder.extract(picture(48, 80), TEXT)
    for tap in TAPS:
        assert agree(ours[tap], theirs[tap])
    encoder.save_pretrained(tmp_path, include_backbone=True)
    saved = DiffusionEncoder.from_pretrained(tmp_path)
    assert saved.backbone.tokenizer.model_max_length == 120
    assert agree(saved.extract(picture(48, 80), TEXT)[0], ours[0], 1e-6)


def test_a_pipeline_is_read_as_it_is(pipe, encoder):
    ours = DiffusionEncoder.from_pretrained(pipe, taps=TAPS, timestep=261, size=(48, 80))
    assert ours.backbone.transformer is pipe.transformer
    image = picture(48, 80)
    assert agree(ours.extract(image, TEXT)[TAPS[3]], encoder.extract(image, TEXT)[TAPS[3]])


def test_words_of_t5_are_stored_once_and_its_last_layers_do_not_overflow(folder):
    text_encoder = load_backbone(folder).text_encoder
    assert text_encoder.shared.weight is text_encoder.encoder.embed_tokens.weight
    half = load_backbone(folder, dtype=torch.float16).text_encoder.encoder.block[0].layer[1]
    assert half.DenseReluDense.wo.weight.dtype == torch.float32
    assert half.DenseReluDense.wi_0.weight.dtype == torch.float16


def test_bfloat16_is_close_to_float32(folder, encoder):
    half = DiffusionEncoder.from_pretrained(
        folder, taps=TAPS, timestep=261, size=(48, 80), dtype=torch.bfloat16
    )
    image = picture(48, 80)
    ours, exact = half.extract(image, TEXT), encoder.extract(image, TEXT)
    for tap in TAPS:
        assert agree(ours[tap].float(), exact[tap], tolerance=4e-2), tap


def test_what_does_not_fit_is_refused_with_the_reason(folder, encoder, tiny_unet):
    with pytest.raises(BackboneError, match="this model has a transformer"):
        load_backbone(folder, unet=tiny_unet)
    chunked = DiffusionEncoder(
        encoder.backbone, encoder.config.from_dict({"long_prompts": "chunk"})
    )
    with pytest.raises(ConfigError, match=r"reads 300 tokens .* trained without windows"):
        chunked.extract(picture(64, 64), "red " * 400)
    with pytest.raises(ConfigError, match="preset 'gdf' is defined for"):
        DiffusionEncoder.from_pretrained(folder, preset="gdf")
    with pytest.raises(BackboneError, match=r"states of width 8 and the transformer takes 16"):
        load_backbone(folder, text_encoder=dit_builders.tiny_t5(width=8))
