"""Sana behind the same calls: linear attention, Gemma, a deep VAE, flow matching."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SanaPipeline

import dit_builders
from diffenc import CrossAttnScorer, DiffusionEncoder, list_taps
from diffenc.errors import BackboneError, ConfigError
from diffenc.inputs.noise import add_noise, shared_noise, signal_levels, to_noise
from diffenc.inputs.tokenizing import marks_of
from diffenc.models import load_backbone
from diffenc.models.sana import Sana
from diffenc.models.schedules import make_scheduler
from diffenc.passes.forward import predict_noise
from plain_dit import agree, as_map, hooked, picture

TAPS = (
    "transformer_blocks.0.attn1",
    "transformer_blocks.1",
    "transformer_blocks.1.attn2.to_q",
    "transformer_blocks.1.ff",
)
TEXT = "A red circle, left"


@pytest.fixture(scope="module", params=[None, "rms_norm_across_heads"], ids=["sana", "sana1.5"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-sana")
    options = {"qk_norm": request.param} if request.param else {}
    if not options.keys() <= dit_builders.SANA_OPTIONS.keys():
        pytest.skip("this diffusers has no Sana 1.5")
    dit_builders.sana_pipeline(**options).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return DiffusionEncoder.from_pretrained(folder, taps=TAPS, timestep=300, size=(24, 40))


@pytest.fixture(scope="module")
def plain(folder):
    """Outputs of modules, the prediction and its input, by the parts of the pipeline."""
    pipe = SanaPipeline.from_pretrained(folder)

    @torch.no_grad()
    def read(text, timestep, names=TAPS):
        pixels = torch.from_numpy(picture_values(24, 40))
        latents = pipe.vae.encode(pixels).latent * pipe.vae.config.scaling_factor
        noise = shared_noise((4, 3, 5), seed=0, timestep=timestep)[None]
        sigma = timestep / 1000
        noisy = sigma * noise + (1 - sigma) * latents
        states, mask, _, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
        predictions = []
        outputs = hooked(
            pipe.transformer,
            names,
            lambda: predictions.append(
                pipe.transformer(
                    noisy,
                    encoder_hidden_states=states,
                    encoder_attention_mask=mask,
                    timestep=torch.tensor([float(timestep)]) * dit_builders.SANA_TIME_SCALE,
                    return_dict=False,
                )[0]
            ),
        )
        return outputs, predictions[0], noisy, int(mask.sum())

    return read


def picture_values(height, width):
    import numpy as np

    pixels = np.asarray(picture(height, width), np.float32) / 127.5 - 1
    return pixels.transpose(2, 0, 1)[None].copy()


@pytest.mark.parametrize("text", [TEXT, "", "Red, star " * 99], ids=["text", "empty", "cut"])
def test_features_equal_hooks_on_the_plain_pipeline(encoder, plain, text):
    ours = encoder.extract(picture(24, 40), text)
    theirs, _, _, _ = plain(text, 300)
    for tap in TAPS:
        output = theirs[tap]
        expected = output if output.ndim == 4 else as_map(output, 3, 5)
        assert ours[tap].shape == expected.shape
        assert agree(ours[tap], expected), tap


def test_what_flows_is_the_noise_less_the_latents(folder, plain):
    backbone = load_backbone(folder)
    _, velocity, noisy, _ = plain(TEXT, 300, names=())
    with torch.no_grad():
        ours = predict_noise(backbone, noisy, 300, backbone.embed([TEXT], size=(24, 40)))
    assert backbone.prediction_type == "flow"
    assert agree(ours, noisy + 0.7 * velocity)


def test_an_early_end_and_a_cut_change_nothing(folder, encoder):
    short = DiffusionEncoder.from_pretrained(
        folder, taps=TAPS, timestep=300, size=(24, 40), truncate=True
    )
    assert len(short.backbone.transformer.transformer_blocks) == 2
    ours, theirs = (each.extract(picture(24, 40), TEXT) for each in (short, encoder))
    for tap in TAPS:
        assert agree(ours[tap], theirs[tap], 1e-6)


def test_taps_are_known_before_weights(folder):
    taps = {tap.name: (tap.channels, tap.reduction) for tap in list_taps(folder)}
    assert taps["latents"] == (4, 8)
    assert taps["transformer_blocks.0.ff"] == taps["transformer_blocks.2"] == (32, 8)
    assert "transformer_blocks.0.ff.net.0" not in taps


def test_scores_and_word_maps_read_queries_and_keys_behind_their_norms(folder, plain, request):
    normed = "sana1.5" in request.node.name
    last = ("norm_q", "norm_k") if normed else ("to_q", "to_k")
    layers = [f"transformer_blocks.{index}.attn2" for index in range(3)]
    outputs, _, _, own = plain(TEXT, 300, [f"{layer}.{part}" for layer in layers for part in last])
    shares, pooled = [], []
    for layer in layers:
        q, k = (outputs[f"{layer}.{part}"][0] for part in last)
        q, k = (each.reshape(len(each), 2, 16).transpose(0, 1) for each in (q, k[:own]))
        logits = q @ k.transpose(1, 2) / 4
        shares.append(logits.softmax(-1).mean(0))
        pooled.append(logits.logsumexp(-1).mean())
    options = {"layers": "all", "timesteps": (300,), "size": (24, 40)}
    scorer = CrossAttnScorer.from_pretrained(folder, preset="paper", **options)
    expected = torch.stack(pooled).mean()
    assert torch.allclose(scorer(picture(24, 40), TEXT)[0, 0], expected, rtol=1e-5)
    maps = scorer.word_maps(picture(24, 40), TEXT, "red", timesteps=(300,))
    # Of <bos>, "a", a space and three letters: the space is a piece of the word behind it.
    expected = torch.stack(shares).mean(0)[:, 2:6].sum(-1).reshape(3, 5)
    assert agree(torch.as_tensor(maps["red"].array).float(), expected)


def test_shared_queries_meet_keys_behind_projection_and_norms(folder):
    # The first block's queries know nothing of the text: the shortcut is exact there.
    layers = ("transformer_blocks.0",)
    options = {"preset": "paper", "layers": layers, "timesteps": (300,), "size": (24, 40)}
    exact, shared = (
        CrossAttnScorer.from_pretrained(folder, mode=mode, **options)(
            picture(24, 40), ["a red circle", TEXT]
        )
        for mode in ("exact", "shared-query")
    )
    assert torch.allclose(shared, exact, rtol=1e-5)


def test_daam_maps_and_word_tokens_are_those_of_the_plain_pass(folder, encoder, plain, request):
    last = ("norm_q", "norm_k") if "sana1.5" in request.node.name else ("to_q", "to_k")
    layers = [f"transformer_blocks.{index}.attn2" for index in range(3)]
    names = [f"{layer}.{part}" for layer in layers for part in last]
    outputs, _, _, own = plain(TEXT, 300, [*names, "transformer_blocks.1"])
    shares = []
    for layer in layers:
        q, k = (outputs[f"{layer}.{part}"][0].reshape(-1, 2, 16).transpose(0, 1) for part in last)
        shares.append((q @ k[:, :own].transpose(1, 2) / 4).softmax(-1))
    # The published grid is that of the latents, in which no cell is made up.
    scorer = CrossAttnScorer.from_pretrained(folder, size=(24, 40))
    maps = scorer.word_maps(picture(24, 40), TEXT, "red", preset="daam", timesteps=(300,))
    expected = torch.stack(shares).mean((0, 1))[:, 2:6].mean(-1).reshape(3, 5)
    assert agree(torch.as_tensor(maps["red"].array), expected)
    words = encoder.word_tokens(picture(24, 40), TEXT, "red", layers="transformer_blocks.1")
    weights = shares[1].mean(0)[:, 2:6].sum(-1)
    weights = weights / weights.sum()
    gathered = weights @ outputs["transformer_blocks.1"][0]
    assert agree(words.tokens[0, 0, 32:64], gathered)  # behind those of the first tap


def test_an_adapter_changes_what_the_tap_reads_and_is_merged_without_a_trace(folder):
    encoder = DiffusionEncoder.from_pretrained(
        folder, taps=("transformer_blocks.1",), size=(24, 40)
    )
    before = encoder.extract(picture(24, 40), TEXT)[0]
    encoder.add_lora(rank=2)
    assert agree(encoder.extract(picture(24, 40), TEXT)[0].detach(), before, 1e-6)
    trained = {name: each for name, each in encoder.named_parameters() if each.requires_grad}
    assert len(trained) == 2 * 2 * 4  # A and B, two blocks, four projections
    encoder.extract(picture(24, 40), TEXT)[0].square().mean().backward()
    assert all(each.grad is not None for each in trained.values())
    with torch.no_grad():
        for name, each in trained.items():
            if ".lora_B." in name:
                each.add_(0.1)
    after = encoder.extract(picture(24, 40), TEXT)[0].detach()
    assert not agree(after, before, 1e-3)
    encoder.merge_lora()
    assert agree(encoder.extract(picture(24, 40), TEXT)[0].detach(), after, 1e-5)


def test_a_gemma_tokenizer_has_a_start_and_no_end(encoder):
    tokenizer = encoder.backbone.tokenizer
    assert marks_of(tokenizer) == (1, 0)
    assert tokenizer.padding_side == "right"
    assert encoder.backbone.embed(["a" * 400], size=(24, 40)).truncated == (101,)


def test_a_schedule_of_steps_is_refused_for_a_flow_and_a_flow_for_steps(folder):
    steps = {"_class_name": "DDPMScheduler"}
    with pytest.raises(BackboneError, match=r"'DDPMScheduler', and this model matches flows"):
        make_scheduler(steps, flow=True)
    with pytest.raises(BackboneError, match="is of a 'FlowMatchEulerDiscreteScheduler'"):
        make_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    with pytest.raises(ConfigError, match="matches flows"):
        load_backbone(folder, prediction_type="epsilon")


def test_steps_of_another_kind_are_refused_in_parts_too(folder):
    parts = load_backbone(folder)
    own = {**dict(parts.named_children()), "tokenizer": parts.tokenizer}
    steps = DDPMScheduler()
    with pytest.raises(BackboneError, match="a DDPMScheduler, and this model matches flows"):
        Sana(name="mixed", **own, scheduler=steps)
    with pytest.raises(BackboneError, match="a DDPMScheduler, and this model matches flows"):
        parts.scheduler = steps
    with pytest.raises(BackboneError, match="num_train_timesteps=500, and models that"):
        make_scheduler({"_class_name": "FlowMatchX", "num_train_timesteps": 500}, flow=True)
    few = FlowMatchEulerDiscreteScheduler(num_train_timesteps=500)
    with pytest.raises(BackboneError, match="told their noise level in 1000 steps"):
        Sana(name="mixed", **own, scheduler=few)
    if "guidance_embeds" in dit_builders.SANA_OPTIONS:
        sprint = dit_builders.sana_pipeline(guidance_embeds=True).transformer
        with pytest.raises(BackboneError, match="Sana-Sprint, distilled of guided"):
            Sana(name="sprint", **{**own, "transformer": sprint}, scheduler=parts.scheduler)


def test_flow_mixes_noise_in_without_the_shift_of_sampling():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    levels = signal_levels(scheduler)
    assert (levels[0], levels[250]) == (1, 0.75)
    latents, noise = torch.randn(2, 4, 2, 3), torch.randn(4, 2, 3)
    noisy = add_noise(scheduler, latents, noise, 250)
    assert torch.allclose(noisy, 0.75 * latents + 0.25 * noise)
    steps = torch.full((2,), 250)
    back = to_noise(scheduler, "flow", noise - latents, noisy, steps)
    assert torch.allclose(back, noise.expand(2, -1, -1, -1), atol=1e-6)
