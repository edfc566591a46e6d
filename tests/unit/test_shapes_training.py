"""The parts of the training scripts that a mistake in would not show in a loss curve."""

import random
import sys

import pytest
import torch

from shapes_tools import FOLDER

sys.path.insert(0, str(FOLDER))

import train_vae
from grounding import outside, spoken_of
from safetensors.torch import load_file
from texts import said, training_scene, training_text, wrong_captions
from train_clip import different_captions
from train_vae import LATENT_STDS, SCALING_FACTOR, build, correlations, drawn, whiten
from transformers import CLIPTokenizer

from diffenc.models.shapes import shapes_folder
from diffenc.shapes.scenes import Scene, SceneObject
from shapes_oracle import is_true


def thing(color: str, shape: str, size: str = "small", x: float = 0.5) -> SceneObject:
    return SceneObject(shape, color, size, x, 0.5, 0.13)  # type: ignore[arg-type]


RED_CIRCLE, BLUE_CIRCLE = thing("red", "circle"), thing("blue", "circle", "large", 0.2)
GREEN_STAR = thing("green", "star", x=0.8)
SCENE = Scene((RED_CIRCLE, BLUE_CIRCLE, GREEN_STAR))


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(shapes_folder() / "tokenizer")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a red circle left of a green star", {"red": 0, "circle": 1, "green": 0, "star": 4}),
        ("two circles and a star", {"circles": 3, "star": 4}),
        ("a big blue circle", {"big": 0, "blue": 0, "circle": 2}),
        ("is there a red star?", {"red": 0, "star": 0}),
        ("what color is the star? green", {"star": 4, "green": 0}),
        ("a small circle", {"small": 0, "circle": 1}),
    ],
)
def test_shape_words_stand_for_the_objects_with_all_their_properties(
    tokenizer: CLIPTokenizer, text: str, named: dict[str, int]
) -> None:
    bits = spoken_of(tokenizer, text, SCENE)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    assert len(bits) == tokenizer.model_max_length
    found = {piece.removesuffix("</w>"): bit for piece, bit in zip(pieces, bits, strict=False)}
    assert {word: found[word] for word in named} == named
    assert sum(map(bool, bits)) == sum(map(bool, named.values()))


def test_attention_inside_costs_nothing_and_outside_everything() -> None:
    shares = torch.zeros(1, 3, 16, 16)
    shares[0, 0, :8] = 1.0
    bits = torch.tensor([[0, 1]])
    above, below = torch.zeros(2, 1, 2, 8, 8)
    above[..., :4, :], below[..., 4:, :] = 0.5, 0.5
    weight = torch.ones(1)
    assert outside({"a": above}, shares, bits, weight).item() == pytest.approx(0, abs=1e-6)
    assert outside({"a": below}, shares, bits, weight).item() == pytest.approx(1, abs=1e-6)
    both = outside({"a": above, "b": below}, shares, bits, weight).item()
    assert both == pytest.approx(0.5, abs=1e-6)
    assert outside({"a": below}, shares, 0 * bits, weight).item() == 0


@pytest.mark.long
def test_whitening_changes_the_latents_and_not_the_pictures() -> None:
    torch.manual_seed(0)
    vae = build((16, 32, 64), 64).eval().requires_grad_(False)
    held_out = drawn(16, "test", size=64, crowds=0.0, pictures=0.0)
    before = vae.decode(vae.encode(held_out).latent_dist.mode()).sample
    units = torch.tensor(LATENT_STDS) / SCALING_FACTOR
    whiten(vae, drawn(256, "whiten", size=64, crowds=0.0, pictures=0.0), units)
    latents = vae.encode(held_out).latent_dist.mode()
    torch.testing.assert_close(vae.decode(latents).sample, before, rtol=0, atol=1e-3)
    mean, covariance = correlations(latents / units.view(1, 4, 1, 1))
    assert mean.abs().max() < 0.3
    assert (covariance - torch.eye(4)).abs().max() < 0.5


def test_negatives_are_false_of_the_scene_but_for_few():
    """By the reader that captions are checked with; 3.5 % of three thousand were true."""
    rng = random.Random("negatives")
    found, true = 0, 0
    for _ in range(400):
        scene, saying = training_scene(rng)
        texts = [training_text(scene, rng, saying=saying) for _ in range(4)]
        for text, wrong in zip(texts, wrong_captions(scene, texts, rng), strict=True):
            if wrong is None:
                continue
            assert "?" not in text
            found += 1
            true += is_true(wrong, scene)
    assert found > 500
    assert true < 0.06 * found


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("a red circle to the left of a big star", "a large star right of a red circle", True),
        ("we see a star and two red circles", "a photo of two red circles and a star", True),
        ("a star over a circle", "a circle over a star", False),
        ("a star, a circle and a square", "a star and a circle", False),
    ],
)
def test_what_captions_say_does_not_depend_on_how(one, other, same):
    assert (said(one) == said(other)) is same


def test_captions_differ_in_wording_or_in_what_they_say():
    scenes, worded = different_captions(256, "seed")
    assert len(scenes) == len(set(worded)) == 256
    assert len({said(text) for text in worded}) < 256  # some say the same in other words

    scenes, meant = different_captions(256, "seed", in_meaning=True)
    assert len({said(text) for text in meant}) == 256
    assert all(is_true(text, scene) for text, scene in zip(meant, scenes, strict=True))


@pytest.mark.long
def test_a_decoder_alone_is_trained_without_a_change_of_the_latents(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(train_vae, "read_back", lambda *_: 0.0)
    start, output = shapes_folder() / "vae", tmp_path / "vae"
    options = ["--decoder", "--pictures", "0.5", "--steps", "2", "--batch", "4", "--threads", "1"]
    options += ["--squared", "6", "--warm-start", str(start), "--run", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train_vae.py", *options, "--output", str(output)])
    train_vae.main()
    before, after = (load_file(next(each.glob("*.safetensors"))) for each in (start, output))
    for name, weights in before.items():
        changed = not torch.equal(weights.float(), after[name].float())
        kept = name.startswith(("encoder", "quant_conv"))
        assert not (changed and kept), name
    assert not torch.equal(
        before["decoder.conv_out.weight"].float(), after["decoder.conv_out.weight"]
    )
