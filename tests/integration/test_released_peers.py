"""Presets beside what the released programs themselves computed, which lies in `golden/peers`."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffenc import CrossAttnScorer, DiffusionEncoder
from diffenc.inputs.noise import shared_noise
from diffenc.models import load_backbone
from diffenc.scoring.config import discffusion_timesteps, itm_timesteps, scorer_preset
from diffenc.scoring.word_maps import daam_maps
from peer_models import OTHER, PROMPT, picture, save_peer_model

PEERS = Path(__file__).parents[1] / "golden" / "peers"
DAAM_STEPS = {1: (589,), 2: (389, 789), 5: (189, 389, 589, 789, 989)}
KINDS = ("sd1.5", "sd2.1-base")


def released(peer):
    return load_file(PEERS / f"{peer}.safetensors")


def assert_close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The backbone of a kind, made when it is first asked for."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = load_backbone(save_peer_model(tmp_path_factory.mktemp(kind), kind))
        return made[kind]

    return of


@pytest.mark.parametrize("draws", [1, 2, 8])
@pytest.mark.parametrize("text", [PROMPT, ""], ids=["text", "empty"])
def test_dift_features_are_those_of_its_code(model, text, draws):
    theirs = released("dift")[f"sd2.1-base.{'text' if text else 'empty'}.{draws}"]
    encoder = DiffusionEncoder.from_pretrained(
        model("sd2.1-base"), preset="dift", draws=draws, size=(64, 96)
    )
    assert_close(encoder.extract(picture(0, 64, 96), text)["up_blocks.1"], theirs)


@pytest.mark.long
def test_dift_takes_the_same_way_for_the_other_topology(model):
    encoder = DiffusionEncoder.from_pretrained(model("sd1.5"), preset="dift", size=(64, 96))
    ours = encoder.extract(picture(0, 64, 96), PROMPT)["up_blocks.1"]
    assert_close(ours, released("dift")["sd1.5.text.8"])


GDF_PLACES = {
    "sd": (
        "up-level1-repeat1-vit-block0-cross-q",
        "up-level1-repeat2-res-out",
        "up-level2-repeat1-vit-block0-cross-q",
        "up-level3-repeat0-vit-block0-self-k",
    ),
    "sdxl": (
        "up-level0-repeat0-vit-block7-out",
        "up-level0-repeat0-vit-block5-out",
        "up-level1-repeat0-vit-block0-cross-q",
        "up-level1-repeat0-vit-block0-out",
    ),
}


@pytest.mark.parametrize("text", [PROMPT, ""], ids=["text", "empty"])
@pytest.mark.parametrize(
    ("kind", "options"),
    # SD 1.5's own scheduler makes step 51 of the step 50 that GDF asks for.
    [("sd1.5", {"timestep": 51}), ("sd2.1-base", {}), ("sdxl", {})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_gdf_features_are_those_of_its_code(model, kind, options, text):
    theirs = released("gdf")
    encoder = DiffusionEncoder.from_pretrained(model(kind), preset="gdf", size=64, **options)
    ours = encoder.extract(picture(0, 64, 64), text)
    places = GDF_PLACES["sdxl" if kind == "sdxl" else "sd"]
    assert len(ours) == len(places)
    for tap, place in zip(ours, places, strict=True):
        assert_close(ours[tap], theirs[f"{kind}.{'text' if text else 'empty'}.{place}"])


def test_gdf_without_a_prompt_reads_the_empty_text_on_sdxl_too(model):
    encoder = DiffusionEncoder.from_pretrained(model("sdxl"), preset="gdf", size=64)
    ours = encoder.extract(picture(0, 64, 64))
    for tap, place in zip(ours, GDF_PLACES["sdxl"], strict=True):
        assert_close(ours[tap], released("gdf")[f"sdxl.empty.{place}"])


def scores(backbone, **options):
    scorer = CrossAttnScorer.from_pretrained(backbone, size=(64, 96), **options)
    return scorer([picture(0, 64, 96), picture(1, 64, 96)], [PROMPT, OTHER])


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_discffusion_scores_are_those_of_its_code(model, kind, steps):
    ask = partial(scores, model(kind), preset="discffusion", timesteps=discffusion_timesteps(steps))
    theirs = released("discffusion")
    assert_close(ask(), theirs[f"{kind}.{steps}"])
    assert_close(ask(error_term=None), theirs[f"{kind}.{steps}.plain"])


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_diffusion_itm_scores_are_those_of_its_code(model, kind, steps):
    options = {} if steps == 10 else {"timesteps": itm_timesteps(steps)}  # 10 is its default
    ours = scores(model(kind), preset="diffusion-itm", **options)
    theirs = released("diffusion-itm")
    # The score is a small difference of norms, whose grain in float32 is what counts.
    norms = theirs[f"{kind}.{steps}.plain"].abs().max()
    assert ours.shape == theirs[f"{kind}.{steps}"].shape
    assert (ours - theirs[f"{kind}.{steps}"]).abs().max() <= 4e-7 * norms


def test_what_diffusion_itm_was_taken_for_has_a_name_of_its_own(model):
    ours = scores(model("sd1.5"), preset="denoising-gap")
    theirs = released("diffusion-itm")["sd1.5.10"]
    assert (ours - theirs).abs().max() > 0.5 * theirs.abs().max()
    assert scorer_preset("denoising-gap")["error_term"] == "mse_gap"


DAAM_CASES = [
    ("sd1.5", 256, 1), ("sd1.5", 256, 2), ("sd1.5", 256, 5), ("sdxl", 512, 2),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("sd1.5", 512, 1), ("sd2.1-base", 256, 5),
        ("sdxl", 512, 1), ("sdxl", 512, 5), ("sdxl", 1024, 1),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "side", "steps"), DAAM_CASES)
def test_daam_maps_are_those_of_its_code(model, kind, side, steps):
    backbone = model(kind)
    latents = shared_noise((4, side // 8, side // 8), seed=7, timestep=0)[None]
    words = ("zebra", "square")
    maps = daam_maps(backbone, latents, PROMPT, words, timesteps=DAAM_STEPS[steps])
    assert maps.shape == (1, 2, 64, 64)
    for word, ours in zip(words, maps[0], strict=True):
        assert_close(ours[::3, ::3], released("daam")[f"{kind}.{side}.{steps}.{word}"])


def test_daams_grid_is_its_own_and_grows_with_the_longer_side(model):
    backbone = model("sd1.5")
    latents = shared_noise((4, 16, 24), seed=7, timestep=0)[None]
    ask = partial(daam_maps, backbone, latents, PROMPT, ["square"], timesteps=[50])
    assert ask().shape == (1, 1, 64, 96)
    assert ask(grid=(5, 7)).shape == (1, 1, 5, 7)


def test_the_outputs_that_are_kept_are_small():
    sizes = [path.stat().st_size for path in PEERS.iterdir()]
    assert len(sizes) == 7
    assert sum(sizes) < 500_000


def test_no_two_outputs_that_are_kept_are_alike():
    for peer in ("dift", "gdf", "daam", "discffusion", "diffusion-itm"):
        values = list(released(peer).values())
        assert all(torch.isfinite(value).all() for value in values)
        for row, value in enumerate(values):
            assert not any(torch.equal(value, other) for other in values[:row])
