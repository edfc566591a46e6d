"""Scores follow their definitions: each against a plain program that scores one pair at a time."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffenc import CrossAttnScorer, load_backbone
from diffenc.inputs.noise import shared_noise

TEXTS = ["a red circle", "a blue square left of a circle"]
SIX_OF_SD = {
    "down_blocks.2.attentions.0.transformer_blocks.0.attn2",
    "down_blocks.2.attentions.1.transformer_blocks.0.attn2",
    "mid_block.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.3.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.3.attentions.1.transformer_blocks.0.attn2",
    "up_blocks.3.attentions.2.transformer_blocks.0.attn2",
}


@pytest.fixture(scope="module")
def images():
    values = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    return [Image.fromarray(pixels) for pixels in values]


@pytest.fixture(autouse=True)
def _no_graph():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def models_of(request):
    """Gives the plain program and the backbone of the model that a fixture names."""

    @cache
    def load(fixture):
        folder = request.getfixturevalue(fixture)
        return Plain(folder), load_backbone(folder)

    return load


class Plain:
    """A diffusers pipeline, asked one image, text and timestep at a time, and each once."""

    def __init__(self, folder):
        self.pipe = DiffusionPipeline.from_pretrained(folder)
        self.xl = hasattr(self.pipe, "text_encoder_2")
        self.known = {}
        self.run = cache(self._run)

    def latents(self, image, sampled=False):
        key = np.asarray(image, np.float32).tobytes(), sampled
        if key not in self.known:
            self.known[key] = self._latents(image, sampled)
        return self.known[key]

    def _latents(self, image, sampled):
        values = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1)
        posterior = self.pipe.vae.encode(values[None]).latent_dist
        drawn = posterior.mode()
        if sampled:
            drawn = posterior.mean + posterior.std * shared_noise((4, 8, 8), seed=0, timestep=-1)
        return drawn * self.pipe.vae.config.scaling_factor

    def conditions(self, text):
        encoded = self.pipe.encode_prompt(
            text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if not self.xl:
            return encoded[0], None
        sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
        return encoded[0], {"text_embeds": encoded[2], "time_ids": sizes}

    def _run(self, latents, text, timestep):
        """The noise, what the model makes of it, and per cross-attention its products q·k."""
        alpha = self.pipe.scheduler.alphas_cumprod[timestep]
        noise = shared_noise((4, 8, 8), seed=0, timestep=timestep)[None]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        states, added = self.conditions(text)
        inputs, handles = {}, []
        for name, module in self.pipe.unet.named_modules():
            if name.endswith(".attn2"):
                handles.append(
                    module.register_forward_pre_hook(
                        lambda _m, args, _kwargs, name=name: inputs.update({name: args[0]}),
                        with_kwargs=True,
                    )
                )
        output = self.pipe.unet(noisy, timestep, states, added_cond_kwargs=added).sample
        products = {
            name: self._products(self.pipe.unet.get_submodule(name), cells[0], states[0])
            for name, cells in inputs.items()
        }
        for handle in handles:
            handle.remove()
        if self.pipe.scheduler.config.prediction_type == "v_prediction":
            output = alpha.sqrt() * output + (1 - alpha).sqrt() * noisy
        return noise, output, products

    @staticmethod
    def _products(attn, cells, states):
        queries = (cells @ attn.to_q.weight.T).chunk(attn.heads, dim=1)
        keys = (states @ attn.to_k.weight.T).chunk(attn.heads, dim=1)
        return [q @ k.T / math.sqrt(q.shape[1]) for q, k in zip(queries, keys, strict=True)]


def mean_lse(products):
    """Mean over layers of the mean over heads and cells of log-sum-exp over tokens."""
    layers = [
        torch.stack([product.exp().sum(dim=1).log().mean() for product in heads]).mean()
        for heads in products.values()
    ]
    return float(torch.stack(layers).mean())


def table(images, score):
    rows = [[score(image, text) for text in TEXTS] for image in images]
    return torch.tensor(rows, dtype=torch.float32)


def assert_scores(ours, expected, tolerance=None):
    assert ours.dtype == torch.float32
    assert ours.shape == (2, 2)
    tolerance = tolerance or 1e-5 * expected.abs().max().item()
    assert (expected[:, 0] - expected[:, 1]).abs().min() > 3 * tolerance  # texts can be told apart
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


STEPS = (189, 389, 589, 789, 989)
FOLDERS = ["tiny_sd_folder", "tiny_sd21_folder", "tiny_sdxl_folder"]


@pytest.mark.long
@pytest.mark.parametrize("fixture", FOLDERS)
def test_the_papers_score_is_the_log_partition_of_every_cross_attention(fixture, images, models_of):
    plain, backbone = models_of(fixture)

    def score(image, text):
        latents = plain.latents(image)
        return np.mean([mean_lse(plain.run(latents, text, t)[2]) for t in STEPS])

    scorer = CrossAttnScorer.from_pretrained(backbone, preset="paper", size=64)
    assert len(scorer.layers) == (28 if fixture == "tiny_sdxl_folder" else 16)
    assert_scores(scorer(images, TEXTS), table(images, score))


@pytest.mark.long
@pytest.mark.parametrize("fixture", FOLDERS[:2])
def test_discffusion_scores_six_layers_both_halves_and_the_gap_of_errors(
    fixture, images, models_of
):
    plain, backbone = models_of(fixture)

    def score(image, text):
        latents, scores = plain.latents(image, sampled=True), []
        for timestep in STEPS:
            attention, distance = [], []
            for half in ("", text):
                noise, predicted, products = plain.run(latents, half, timestep)
                attention.append(mean_lse({name: products[name] for name in SIX_OF_SD}))
                distance.append(float((noise - predicted).norm()))
            scores.append(np.mean(attention) + distance[0] - distance[1])
        return np.mean(scores)

    scorer = CrossAttnScorer.from_pretrained(backbone, preset="discffusion", size=64)
    assert set(scorer.layers) == SIX_OF_SD
    assert_scores(scorer(images, TEXTS), table(images, score))


@pytest.mark.parametrize("fixture", FOLDERS)
def test_diffusion_classifier_is_minus_the_mean_squared_error(fixture, images, models_of):
    plain, backbone = models_of(fixture)

    def score(image, text):
        latents = plain.latents(image)
        runs = [plain.run(latents, text, t) for t in (125, 325, 525, 725, 925)]
        return -np.mean([float(((noise - seen) ** 2).mean()) for noise, seen, _ in runs])

    scorer = CrossAttnScorer.from_pretrained(backbone, preset="diffusion-classifier", size=64)
    assert_scores(scorer(images, TEXTS), table(images, score))


@pytest.mark.long
@pytest.mark.parametrize("fixture", FOLDERS[1:])
def test_diffusion_itm_is_a_difference_of_norms_at_its_ten_timesteps(fixture, images, models_of):
    plain, backbone = models_of(fixture)

    def norm(latents, text):
        runs = [plain.run(latents, text, t) for t in range(10, 911, 100)]
        return np.mean([float((noise - predicted).norm()) for noise, predicted, _ in runs])

    def score(image, text):
        latents = plain.latents(image, sampled=True)
        return norm(latents, "") - norm(latents, text)

    scorer = CrossAttnScorer.from_pretrained(backbone, preset="diffusion-itm", size=64)
    # float32's grain of the norms, about 16, of which the score is a small difference
    assert_scores(scorer(images, TEXTS), table(images, score), tolerance=6e-6)


@pytest.mark.parametrize("fixture", FOLDERS)
def test_the_denoising_gap_takes_away_the_error_without_the_text(fixture, images, models_of):
    plain, backbone = models_of(fixture)

    def error(latents, text):
        runs = [plain.run(latents, text, t) for t in (125, 325, 525, 725, 925)]
        return np.mean([float(((noise - seen) ** 2).mean()) for noise, seen, _ in runs])

    def score(image, text):
        latents = plain.latents(image)
        return error(latents, "") - error(latents, text)

    scorer = CrossAttnScorer.from_pretrained(backbone, preset="denoising-gap", size=64)
    # float32's grain of the errors, about 1, of which the score is a small difference
    assert_scores(scorer(images, TEXTS), table(images, score), tolerance=3e-7)


def mean_word_lse(products, words):
    """Mean over decoder layers, heads and words of log-sum-exp over cells."""
    layers = [
        torch.stack([p[:, 1 : words + 1].exp().sum(dim=0).log().mean() for p in heads]).mean()
        for name, heads in products.items()
        if name.startswith("up_blocks")
    ]
    return float(torch.stack(layers).mean())


@pytest.mark.long
@pytest.mark.parametrize("fixture", ["tiny_sd_folder", "tiny_sdxl_folder"])
def test_the_calibrated_score_asks_where_each_word_is_seen_best(fixture, images, models_of):
    """In the decoder, less the same on a grey picture."""
    plain, backbone = models_of(fixture)
    grey = np.full((64, 64, 3), 127.5)

    def score(image, text):
        words = len(plain.pipe.tokenizer(text).input_ids) - 2
        latents, reference = plain.latents(image), plain.latents(grey)
        runs = [(plain.run(latents, text, t)[2], plain.run(reference, text, t)[2]) for t in STEPS]
        return np.mean([mean_word_lse(a, words) - mean_word_lse(b, words) for a, b in runs])

    scorer = CrossAttnScorer.from_pretrained(backbone, preset="calibrated", size=64)
    expected = table(images, score)
    torch.testing.assert_close(scorer(images, TEXTS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fixture", FOLDERS)
def test_shared_queries_meet_the_keys_of_every_text(fixture, images, models_of):
    plain, backbone = models_of(fixture)

    @cache
    def queries_under(latents, timestep, prompt):
        seen, handles = {}, []
        for name, module in plain.pipe.unet.named_modules():
            if name.endswith(".attn2.to_q"):
                handles.append(
                    module.register_forward_hook(
                        lambda _m, _a, output, name=name: seen.update({name: output[0]})
                    )
                )
        plain._run(latents, prompt, timestep)  # anew, for its hooks
        for handle in handles:
            handle.remove()
        return seen

    def score(image, text):
        latents, states = plain.latents(image), plain.conditions(text)[0][0]
        found = []
        for timestep in STEPS:
            for name, cells in queries_under(latents, timestep, "a photo").items():
                attn = plain.pipe.unet.get_submodule(name.removesuffix(".to_q"))
                keys = (states @ attn.to_k.weight.T).chunk(attn.heads, dim=1)
                parts = zip(cells.chunk(attn.heads, dim=1), keys, strict=True)
                lse = [(q @ k.T / math.sqrt(q.shape[1])).exp().sum(1).log() for q, k in parts]
                found.append(float(torch.stack(lse).mean()))
        return np.mean(found)

    scorer = CrossAttnScorer.from_pretrained(
        backbone, preset="paper", mode="shared-query", query_prompt="a photo", size=64
    )
    assert_scores(scorer(images, TEXTS), table(images, score))
