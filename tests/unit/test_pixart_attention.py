"""Cross-attention of PixArt: scores, word maps, word tokens, adapters and towers as a U-Net's."""

import json

import pytest
import torch
from diffusers import PixArtSigmaPipeline
from safetensors.torch import load_file

import dit_builders
from diffenc import CrossAttnScorer, DiffusionEncoder
from diffenc.errors import ConfigError, TapError
from diffenc.hosts.prompts import PromptTokenizer
from diffenc.hosts.tower import DiffusionVisionTower
from diffenc.inputs.noise import shared_noise
from plain_dit import agree, hooked, latents_of, picture

TEXT = "A red circle left of a blue square"
WORDS = {"red": [1], "circle": [2], "blue square": [6, 7]}
STEPS = (189, 589)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return dit_builders.save_pixart(tmp_path_factory.mktemp("tiny-pixart"))


@pytest.fixture(scope="module")
def plain(folder):
    """Products q·k of each layer and timestep (heads cells tokens), and errors of the noise."""
    pipe = PixArtSigmaPipeline.from_pretrained(folder)
    layers = [f"transformer_blocks.{index}.attn2" for index in range(4)]
    latents = latents_of(pipe, picture(48, 80))

    def denoised(noisy, step, states, mask):
        return pipe.transformer(
            noisy,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            timestep=torch.tensor([step]),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0][:, :4]

    @torch.no_grad()
    def read(text):
        states, mask, _, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
        own = int(mask.sum())
        parts = [f"{layer}.{part}" for layer in layers for part in ("to_q", "to_k")]
        logits, errors = [], []
        for step in STEPS:
            noise = shared_noise(tuple(latents.shape[1:]), seed=0, timestep=step)[None]
            signal = pipe.scheduler.alphas_cumprod[step]
            noisy = signal**0.5 * latents + (1 - signal) ** 0.5 * noise
            outputs = hooked(
                pipe.transformer,
                [*parts, "proj_out"],
                lambda noisy=noisy, step=step, noise=noise: errors.append(
                    (denoised(noisy, step, states, mask) - noise).square().mean()
                ),
            )
            for layer in layers:
                q = outputs[f"{layer}.to_q"][0].reshape(15, 2, 16).transpose(0, 1)
                k = outputs[f"{layer}.to_k"][0, :own].reshape(own, 2, 16).transpose(0, 1)
                logits.append(q @ k.transpose(1, 2) / 16**0.5)
        return logits, torch.stack(errors).mean()

    return read


def scorer(folder, **options):
    options = {"size": (48, 80), "timesteps": STEPS, **options}
    return CrossAttnScorer.from_pretrained(folder, **options)


@pytest.mark.parametrize("texts", [("a red circle", TEXT)])
def test_scores_are_those_of_the_plain_pass(folder, plain, texts):
    attention = scorer(folder, preset="paper", layers="all")(picture(48, 80), texts)[0]
    noise = scorer(folder, preset="diffusion-classifier", resize="squash")(picture(48, 80), texts)[
        0
    ]
    for row, text in enumerate(texts):
        logits, error = plain(text)
        expected = torch.stack([each.logsumexp(-1).mean() for each in logits]).mean()
        assert torch.allclose(attention[row], expected, rtol=1e-5)
        assert torch.allclose(noise[row], -error, rtol=1e-5)


def test_words_count_without_the_end_token(folder, plain):
    score = scorer(folder, preset="paper", layers="all", token_mask="content")(
        picture(48, 80), TEXT
    )
    logits, _ = plain(TEXT)
    expected = torch.stack([each[..., :-1].logsumexp(-1).mean() for each in logits]).mean()
    assert torch.allclose(score[0, 0], expected, rtol=1e-5)


def test_the_default_score_reads_every_block(folder):
    default = scorer(folder)
    assert len(default.layers) == 4
    assert default(picture(48, 80), [TEXT, "a photo"]).isfinite().all()
    with pytest.raises(TapError, match="a transformer without stages"):
        scorer(folder, preset="discffusion")


def test_shared_queries_meet_keys_of_projected_states(folder):
    options = {"preset": "paper", "layers": ("transformer_blocks.0",)}
    # The first block's queries know nothing of the text: the shortcut is exact there.
    texts = ["a red circle", TEXT]
    exact = scorer(folder, **options)(picture(48, 80), texts)
    shared = scorer(folder, mode="shared-query", **options)(picture(48, 80), texts)
    assert torch.allclose(shared, exact, rtol=1e-5)


def test_word_maps_are_shares_of_attention(folder, plain):
    maps = scorer(folder).word_maps(picture(48, 80), TEXT, list(WORDS), timesteps=STEPS)
    shares = torch.stack([each.softmax(-1).mean(0) for each in plain(TEXT)[0]]).mean(0)
    for word, positions in WORDS.items():
        expected = shares[:, positions].sum(-1).reshape(3, 5)
        assert agree(torch.as_tensor(maps[word].array).float(), expected)


def test_daam_maps_lie_on_its_grid(folder):
    maps = scorer(folder).word_maps(picture(48, 80), TEXT, "circle", preset="daam")
    assert maps["circle"].array.shape == (6, 10)


def test_words_gather_tokens(folder, plain):
    encoder = DiffusionEncoder.from_pretrained(
        folder, taps=("transformer_blocks.1",), timestep=STEPS[0], size=(48, 80)
    )
    question = encoder.word_tokens(picture(48, 80), TEXT, list(WORDS))
    assert question.tokens.shape == (1, 3, 32)
    assert question.maps.shape == (1, 3, 3, 5)
    assert torch.allclose(question.maps.sum(dim=(-2, -1)), torch.ones(1, 3))


def test_an_adapter_trains_what_the_tap_reads_and_is_saved_for_diffusers(folder, tmp_path):
    encoder = DiffusionEncoder.from_pretrained(
        folder, taps=("transformer_blocks.1",), size=(48, 80)
    )
    before = encoder.extract(picture(48, 80), TEXT)[0]
    encoder.add_lora(rank=2)
    trained = [name for name, each in encoder.named_parameters() if each.requires_grad]
    assert len(trained) == 2 * 2 * 4  # A and B, two blocks, four projections
    encoder.extract(picture(48, 80), TEXT)[0].square().mean().backward()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad.sign())
    after = encoder.extract(picture(48, 80), TEXT)[0].detach()
    assert not torch.allclose(after, before)
    encoder.save_pretrained(tmp_path)
    saved = DiffusionEncoder.from_pretrained(tmp_path, truncate=True)
    assert agree(saved.extract(picture(48, 80), TEXT)[0], after, 1e-6)
    files = tmp_path / "lora" / "default"
    weights = load_file(files / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("transformer.transformer_blocks.") for name in weights)
    assert json.loads((files / "diffenc.json").read_text())["backbone"] == str(folder)


def test_a_captioner_is_refused(folder):
    with pytest.raises(ConfigError, match="one for no text; use add_lora"):
        DiffusionEncoder.from_pretrained(folder).add_captioner("shapes-clip")


def test_a_tower_reads_the_question(folder):
    tower = DiffusionVisionTower(f"diffenc:{folder}?rank=2")
    tokens = PromptTokenizer(str(folder))
    pixels = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.no_grad():
        one, same, other = (
            tower(pixels, prompts=tokens(text)) for text in ("a Red circle", "a red circle", TEXT)
        )
    assert one.shape == (1, tower.num_patches, 32)
    assert agree(one, same, 1e-6)
    assert not torch.allclose(one, other)
    encoder = DiffusionEncoder.from_pretrained(folder)
    assert agree(one, encoder(pixels, "a red circle"))


def test_a_tower_that_hosts_build_themselves_is_refused(folder):
    import tiny_llava  # noqa: F401  # skips where transformers is too old for it
    from diffenc.hosts.transformers import DiffEncConfig

    with pytest.raises(ConfigError, match="names a diffusion transformer"):
        DiffEncConfig(f"diffenc:{folder}")
