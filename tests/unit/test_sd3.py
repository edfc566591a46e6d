"""Stable Diffusion 3 behind the same calls: joint attention, three text encoders, flow matching."""

import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import dit_builders
from diffenc import CrossAttnScorer, DiffusionEncoder, list_taps
from diffenc.denoiser.hooks import ForwardTaps
from diffenc.errors import BackboneError, ConfigError, ShapeError, TapError
from diffenc.hosts.prompts import PromptTokens, embed_tokens
from diffenc.inputs.noise import shared_noise
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.models import load_backbone
from diffenc.scoring.config import self_bench_timesteps
from plain_dit import agree, as_map, hooked, latents_of, picture

TAPS = (
    "transformer_blocks.0",
    "transformer_blocks.0.attn",
    "transformer_blocks.0.ff",
    "transformer_blocks.1.attn.to_q",
    "transformer_blocks.2",
)
TEXT = "a red circle left of a blue square"


@pytest.fixture(scope="module", params=[True, False], ids=["sd3.5", "sd3"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-sd3")
    dit_builders.sd3_pipeline(dual=request.param).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return StableDiffusion3Pipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def encoder(folder):
    return DiffusionEncoder.from_pretrained(folder, taps=TAPS, timestep=515, size=(48, 80))


@torch.no_grad()
def plain_pass(pipe, text, timestep, names=TAPS, **options):
    """Outputs of modules as they come, the flow, and the flow that would be right."""
    latents = latents_of(pipe, picture(48, 80))
    noise = shared_noise(tuple(latents.shape[1:]), seed=0, timestep=timestep)[None]
    sigma = timestep / 1000
    states, _, pooled, _ = pipe.encode_prompt(
        text, text, text, do_classifier_free_guidance=False, **options
    )
    if pipe.text_encoder_3 is None:  # diffusers 0.32 has 77 zeros there, later ones 256
        states = torch.nn.functional.pad(states, (0, 0, 0, 77 + 256 - states.shape[1]))
    flows = []
    outputs = hooked(
        pipe.transformer,
        names,
        lambda: flows.append(
            pipe.transformer(
                sigma * noise + (1 - sigma) * latents,
                encoder_hidden_states=states,
                pooled_projections=pooled,
                timestep=torch.tensor([1000.0 * sigma]),
                return_dict=False,
            )[0]
        ),
    )
    return outputs, flows[0], noise - latents


PICTURE = {  # which of a module's outputs is the picture's, and where it lies there
    "transformer_blocks.0": lambda output: output[1],
    "transformer_blocks.0.attn": lambda output: output[0],
    "transformer_blocks.0.ff": lambda output: output,
    "transformer_blocks.1.attn.to_q": lambda output: output,
    "transformer_blocks.2": lambda output: output[1],
}


@pytest.mark.parametrize("text", [TEXT, "", "Red, star " * 99], ids=["text", "empty", "cut"])
def test_features_are_the_pictures_stream_of_the_plain_pipeline(encoder, pipe, text):
    ours = encoder.extract(picture(48, 80), text)
    theirs, _, _ = plain_pass(pipe, text, 515)
    for tap in TAPS:
        tokens = PICTURE[tap](theirs[tap])
        assert tokens.shape[1] == 15
        assert agree(ours[tap], as_map(tokens, 3, 5)), tap


@torch.no_grad()
def test_shuffled_text_states_leave_the_picture_as_it_is_and_shuffled_cells_do_not(encoder):
    # Joint attention has no order of text: an image-only tap that changed would hold text rows.
    backbone = encoder.backbone
    embeds = backbone.embed([TEXT], size=(48, 80))
    order = torch.randperm(embeds.prompt_embeds.shape[1], generator=torch.manual_seed(0))
    latents = torch.randn(1, 16, 6, 10, generator=torch.manual_seed(1))

    def read(states, latents):
        call = PromptEmbeds(states, embeds.pooled_prompt_embeds, truncated=(0,))
        with ForwardTaps(backbone.transformer, TAPS) as taps:
            return taps.run(lambda: backbone.denoise(latents, 515, call))

    plain = read(embeds.prompt_embeds, latents)
    shuffled = read(embeds.prompt_embeds[:, order], latents)
    turned = read(embeds.prompt_embeds, latents.flip(-1))
    for tap in TAPS:
        assert agree(shuffled[tap], plain[tap]), tap
        assert not agree(turned[tap], plain[tap], 1e-3), tap


def test_a_truncated_model_gives_the_same_features(folder, encoder):
    short = DiffusionEncoder.from_pretrained(
        folder, taps=TAPS[:4], timestep=515, size=(48, 80), truncate=True
    )
    assert len(short.backbone.transformer.transformer_blocks) == 2
    ours, theirs = (each.extract(picture(48, 80), TEXT) for each in (short, encoder))
    for tap in TAPS[:4]:
        assert agree(ours[tap], theirs[tap], 1e-6)


def test_both_halves_come_from_one_pass_and_texts_are_encoded_once(encoder, pipe):
    calls = []
    handles = [
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, part in encoder.backbone.parts().items()
    ]
    halves = encoder.extract(picture(48, 80), "a photo", conditioning="cfg")
    first = len(calls)
    encoder.extract(picture(48, 80), "a photo", conditioning="cfg")
    for handle in handles:
        handle.remove()
    assert [name for name in calls[first:] if name.startswith("text")] == []
    theirs, _, _ = plain_pass(pipe, "a photo", 515)
    assert agree(halves.select("cond")[TAPS[4]], as_map(theirs[TAPS[4]][1], 3, 5))


def test_states_of_the_pipeline_are_taken_as_they_are(encoder, pipe):
    states, _, pooled, _ = pipe.encode_prompt(TEXT, TEXT, TEXT, do_classifier_free_guidance=False)
    ours = encoder.extract(picture(48, 80), PromptEmbeds(states, pooled, truncated=(0,)))
    assert agree(ours[TAPS[0]], encoder.extract(picture(48, 80), TEXT)[TAPS[0]])
    with pytest.raises(ShapeError, match="needs pooled_prompt_embeds beside the states"):
        encoder.extract(picture(48, 80), PromptEmbeds(states, truncated=(0,)))


def test_states_of_other_lengths_are_not_padded(encoder, pipe):
    """The pipeline's `max_sequence_length`: no padding may stand for what was left out."""
    states, _, pooled, _ = pipe.encode_prompt(
        TEXT, TEXT, TEXT, do_classifier_free_guidance=False, max_sequence_length=20
    )
    embeds = PromptEmbeds(states, pooled, truncated=(0,))
    theirs, _, _ = plain_pass(pipe, TEXT, 515, max_sequence_length=20)
    whole, _, _ = plain_pass(pipe, TEXT, 515)
    empty, _, _ = plain_pass(pipe, "", 515)
    halves = encoder.extract(picture(48, 80), embeds, conditioning="concat")
    for tap in TAPS:
        cond, uncond, longer = (
            as_map(PICTURE[tap](each[tap]), 3, 5) for each in (theirs, empty, whole)
        )
        assert agree(halves.select("cond")[tap], cond), tap
        assert agree(halves.select("uncond")[tap], uncond), tap
        assert not agree(cond, longer, 1e-4)


def test_self_bench_is_the_norm_of_the_error_of_the_flow(folder, pipe):
    options = {"size": (48, 80), "timesteps": (66, 515)}
    scorer = CrossAttnScorer.from_pretrained(folder, preset="self-bench", **options)
    norms = {}
    for text in (TEXT, "a photo", ""):
        errors = [plain_pass(pipe, text, step, ())[1:] for step in (66, 515)]
        norms[text] = torch.stack([(flow - right).norm() for flow, right in errors]).mean()
    scores = scorer(picture(48, 80), [TEXT, "a photo"])[0]
    assert torch.allclose(scores, -torch.stack([norms[TEXT], norms["a photo"]]), rtol=1e-5)
    gap = CrossAttnScorer.from_pretrained(
        folder, preset="self-bench", error_term="l2_flow_gap", **options
    )(picture(48, 80), [TEXT])[0, 0]
    assert torch.allclose(gap, norms[""] - norms[TEXT], atol=2e-5 * float(norms[""]))


def test_self_bench_takes_thirty_steps_of_the_shifted_schedule():
    steps = self_bench_timesteps()
    published = (65.97, 151.08, 226.66, 294.21, 354.96, 409.88, 459.78, 505.31)
    assert steps[:8] == tuple(round(step) for step in published)
    assert (len(steps), steps[-1]) == (30, 993)


def test_taps_are_known_before_weights(folder, request):
    taps = {tap.name: (tap.channels, tap.reduction) for tap in list_taps(folder)}
    assert taps["latents"] == (16, 8)
    assert taps["transformer_blocks.0"] == taps["transformer_blocks.2.attn"] == (32, 16)
    assert ("transformer_blocks.0.attn2" in taps) == ("sd3.5" in request.node.name)


def test_what_needs_cross_attention_is_refused_with_the_reason(folder, encoder):
    joint = "joins picture and text in one attention"
    with pytest.raises(TapError, match=joint):
        CrossAttnScorer.from_pretrained(folder)
    with pytest.raises(TapError, match=joint):
        encoder.word_tokens(picture(48, 80), TEXT)
    with pytest.raises(ConfigError, match="reads those of T5 behind them"):
        encoder.add_captioner("shapes-clip")
    ids = torch.zeros(1, 77, dtype=torch.long)
    with pytest.raises(ConfigError, match="split texts in different ways"):
        embed_tokens(encoder.backbone, PromptTokens(ids, torch.ones_like(ids)), size=(48, 80))


def test_pictures_beyond_the_positions_are_refused(folder):
    large = DiffusionEncoder.from_pretrained(folder, size=(208, 64))
    with pytest.raises(ShapeError, match="12 cells on a side, which is 192 pixels"):
        large.extract(picture(64, 64), TEXT)


def test_an_error_of_the_flow_needs_a_flow(tiny_sd_folder):
    with pytest.raises(ConfigError, match="models that match flows"):
        CrossAttnScorer.from_pretrained(tiny_sd_folder, preset="self-bench")


def test_encoders_of_another_width_are_refused(folder):
    parts = load_backbone(folder)
    with pytest.raises(BackboneError, match="T5 gives states of width 16"):
        type(parts)(
            name="other",
            transformer=parts.transformer,
            vae=parts.vae,
            scheduler=parts.scheduler,
            text_encoder=parts.text_encoder,
            tokenizer=parts.tokenizer,
            text_encoder_2=parts.text_encoder_2,
            tokenizer_2=parts.tokenizer_2,
            text_encoder_3=dit_builders.tiny_t5(16),
            tokenizer_3=parts.tokenizer_3,
        )


def test_without_t5_zeros_stand_for_its_states(tmp_path):
    pipe = dit_builders.sd3_pipeline()
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path / "model")
    theirs, _, _ = plain_pass(pipe, TEXT, 515)
    options = {"taps": TAPS, "timestep": 515, "size": (48, 80)}
    shutil.rmtree(tmp_path / "model" / "tokenizer_3", ignore_errors=True)
    encoder = DiffusionEncoder.from_pretrained(tmp_path / "model", **options)
    assert [name for name in encoder.backbone.parts() if "_3" in name] == []
    ours = encoder.extract(picture(48, 80), TEXT)
    for tap in TAPS:
        assert agree(ours[tap], as_map(PICTURE[tap](theirs[tap]), 3, 5)), tap
    of_pipeline = DiffusionEncoder.from_pretrained(pipe, **options)
    assert agree(of_pipeline.extract(picture(48, 80), TEXT)[TAPS[4]], ours[TAPS[4]], 1e-6)
    encoder.save_pretrained(tmp_path / "saved", include_backbone=True)
    back = DiffusionEncoder.from_pretrained(tmp_path / "saved")
    assert torch.equal(back.extract(picture(48, 80), TEXT)[TAPS[4]], ours[TAPS[4]])
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    StableDiffusion3Pipeline.from_pretrained(tmp_path / "saved" / "backbone", **absent)


def test_t5_comes_with_its_tokenizer_or_not_at_all(folder):
    parts = load_backbone(folder)
    kept = {name: part for name, part in parts.named_children() if not name.endswith("_3")}
    with pytest.raises(BackboneError, match="text_encoder_3 and tokenizer_3 go together"):
        type(parts)(
            name="half",
            scheduler=parts.scheduler,
            tokenizer=parts.tokenizer,
            tokenizer_2=parts.tokenizer_2,
            tokenizer_3=parts.tokenizer_3,
            **kept,
        )
