import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import evals_data
from diffenc.cli.main import app
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError, NonFiniteError, ShapeError, TapError
from diffenc.evals.matching.miniature import SHAPES_SEED, shapes_benchmark
from diffenc.models import describe, load_backbone
from diffenc.models.tap_names import gdf_name, paper_name, spelled_out
from diffenc.studies.cka import cka, guided_cka, hsic
from diffenc.studies.similarity import CLIP, paper_taps, study_similarity
from diffenc.studies.similarity_page import PAPER_CKA, PAPER_COSINES, findings_of

TAPS = ("conv_in", "mid_block")


def random_rows(n=12, c=5, seed=0):
    return torch.randn((n, c), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def u_centred(kernel):
    """A kernel centred so that its products estimate without bias (Szekely and Rizzo 2014)."""
    n = len(kernel)
    kernel = kernel.copy()
    np.fill_diagonal(kernel, 0)
    rows = kernel.sum(axis=0, keepdims=True) / (n - 2)
    columns = kernel.sum(axis=1, keepdims=True) / (n - 2)
    centred = kernel - rows - columns + kernel.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(centred, 0)
    return centred


def cka_by_hand(first, second):
    """CKA as the cosine between U-centred kernels."""
    one, two = (u_centred(np.asarray(x) @ np.asarray(x).T) for x in (first, second))
    return (one * two).sum() / math.sqrt((one**2).sum() * (two**2).sum())


def test_cka_is_the_cosine_of_centred_kernels():
    one, two = random_rows(), random_rows(c=7, seed=1)
    assert cka(one, two) == pytest.approx(cka_by_hand(one, two), rel=1e-9)
    assert cka(one, one @ random_rows(5, 9, 2)) == pytest.approx(
        cka_by_hand(one, one @ random_rows(5, 9, 2)), rel=1e-9
    )


def test_hsic_has_no_bias():
    # Four points leave one estimate of HSIC for each: their mean is the estimate of six points.
    kernels = [x @ x.T for x in (random_rows(6), random_rows(6, seed=1))]
    parts = []
    for four in combinations(range(6), 4):
        index = torch.tensor(four)
        parts.append(hsic(*(k[index][:, index] for k in kernels)))
    assert hsic(*kernels) == pytest.approx(np.mean(parts), rel=1e-9)


def test_equal_features_have_1_however_they_are_turned_shifted_and_scaled():
    rows = random_rows(n=20, c=6)
    turn, _ = torch.linalg.qr(random_rows(6, 6, 3))
    assert cka(rows, rows) == pytest.approx(1)
    assert cka(rows, -3 * rows @ turn + 100) == pytest.approx(1)


def test_independent_features_have_about_0_and_nothing_exceeds_1():
    values = [cka(random_rows(40, 6, 2 * k), random_rows(40, 6, 2 * k + 1)) for k in range(20)]
    assert abs(np.mean(values)) < 0.04
    assert min(values) < 0 < max(values) < 0.3
    for noise in (1e-6, 1e-3, 0.1, 1):
        rows = random_rows(8, 30)
        assert cka(rows, rows + noise * random_rows(8, 30, 5)) <= 1 + 1e-12


def test_guided_features_need_no_features_of_their_own():
    uncond, cond = random_rows(9, 4), random_rows(9, 4, 1)
    scales = (0.0, 1.0, 1.5, 7.0, -2.0)
    direct = [cka_by_hand(uncond, uncond + s * (cond - uncond)) for s in scales]
    assert guided_cka(uncond, cond, scales) == pytest.approx(direct, rel=1e-9)
    assert guided_cka(uncond, cond, (0.0,)) == pytest.approx([1])


def test_half_precision_is_summed_in_double():
    rows = 100 + random_rows(10, 2000).half()
    assert cka(rows, rows + 0) == pytest.approx(1)
    coarse = rows.bfloat16()
    expected = cka_by_hand(rows.double() - 100, coarse.double() - 100)
    assert cka(rows, coarse) == pytest.approx(expected)


def test_cka_of_too_few_or_of_nothing():
    with pytest.raises(ShapeError, match="4 pictures or more, got 3"):
        cka(random_rows(3), random_rows(3))
    with pytest.raises(ShapeError, match="same pictures"):
        cka(random_rows(5), random_rows(6))
    with pytest.raises(NonFiniteError, match="differ between pictures"):
        cka(torch.ones(5, 2), random_rows(5))
    with pytest.raises(NonFiniteError):
        cka(random_rows(5) * math.nan, random_rows(5))


def test_the_paper_has_names_for_taps():
    names = ["U-L1-R1-B0-Cross-Q", "U-L1-R1-B0-Out", "U-L2-R2-Res-Out", "D-L2-R0-B0-Cross-Q"]
    paths = {gdf_name(tap.name): tap.name for tap in describe("sd2.1").taps()}
    for name in names:
        assert paper_name(paths[spelled_out(name)]) == name
    assert paper_name("mid_block.attentions.0") == "M-Out"
    assert paper_name("up_blocks.1") == "up_blocks.1"
    assert set(PAPER_CKA) == set(PAPER_COSINES) == {paper_name(t) for t in sd_taps()}


def sd_taps():
    return paper_taps(describe("sd2.1").taps())


def test_where_a_level_is_shorter_its_last_repeat_stands_in():
    assert len(sd_taps()) == 6
    assert paper_taps(describe("shapes").taps()) == [
        "down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_q",
        "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q",
        "up_blocks.1.attentions.1.transformer_blocks.0",
        "up_blocks.2.attentions.1.transformer_blocks.0.attn2.to_q",
        "up_blocks.2.resnets.1",
    ]
    assert paper_taps(describe("sdxl").taps())
    with pytest.raises(TapError, match="none of the paper's layers"):
        paper_taps([tap for tap in describe("shapes").taps() if tap.name == "conv_in"])


@pytest.fixture(scope="module")
def backbone(tiny_sd_folder):
    return load_backbone(str(tiny_sd_folder))


@pytest.fixture(scope="module")
def study(backbone):
    return study_similarity(
        backbone, taps=TAPS, timesteps=(261, 50), guidance_scales=(4, 1), per_pattern=1, seeds=2
    )


def test_everything_is_measured_at_every_place(study):
    assert (study.timesteps, study.guidance_scales) == ((50, 261), (1, 4))
    assert study.taps == {"conv_in": "conv_in", "mid_block": "mid_block"}
    assert len(study.figures) == 2 * 2 + 2 * 2 * 3 + 2 * 2
    assert all(len(each.value.values) == 2 for each in study.figures)
    assert study.settings["pairs"] == 6
    assert study.find("mid_block", "cka", 3) is None
    json.dumps(study.to_dict(), allow_nan=False)


def test_before_the_text_guidance_changes_nothing(study):
    assert study.find("conv_in", "cka", 4).values == pytest.approx((1, 1))
    assert max(study.find("mid_block", "cka", 4).values) < 1


def test_cosines_and_cka_are_those_of_the_maps(backbone, study):
    items = shapes_benchmark("mmvp-vlm", per_label=1, seed=SHAPES_SEED + 1).items
    pictures = [[picture.open() for picture in item.pictures] for item in items]
    encoder = DiffusionEncoder.from_pretrained(backbone, taps=("mid_block",), timestep=261, seed=1)
    rows = [
        [encoder.extract(picture)["mid_block"][0].flatten().double() for picture in pair]
        for pair in pictures
    ]

    def cosine(a, b):
        return float(a @ b / (a.norm() * b.norm()))

    pair = np.mean([cosine(*each) for each in rows])
    strangers = np.mean([cosine(rows[k][0], rows[k + 1][1]) for k in range(5)])
    assert study.find("mid_block", "pair", 261).values[1] == pytest.approx(pair, rel=1e-4)
    assert study.find("mid_block", "strangers", 261).values[1] == pytest.approx(strangers, rel=1e-4)
    encoder = DiffusionEncoder.from_pretrained(backbone, taps=("mid_block",), timestep=50, seed=1)
    uncond, guided = [], []
    for item, two in zip(items, pictures, strict=True):
        for picture, caption in zip(two, item.captions, strict=True):
            features = encoder.extract(picture, caption, conditioning="cfg", guidance_scale=4)
            uncond.append(features.select("uncond")["mid_block"].flatten())
            guided.append(features["mid_block"].flatten())
    expected = cka_by_hand(torch.stack(uncond).double(), torch.stack(guided).double())
    assert study.find("mid_block", "cka", 4).values[1] == pytest.approx(expected, abs=1e-4)


def test_findings_are_decided_by_the_figures(study):
    verdicts = {each.finding.statement: each.verdict for each in findings_of(study)}
    assert set(verdicts.values()) <= {"holds", "does not show", "opposite"}
    assert any("stronger the guidance" in statement for statement in verdicts)


@pytest.mark.parametrize(
    "wrong",
    [
        {"per_pattern": 0},
        {"seeds": 0},
        {"timesteps": []},
        {"timesteps": [50, 50]},
        {"guidance_scales": [1, 1]},
        {"guidance_scales": [math.inf]},
        {"cka_timestep": 1000},
        {"data": "no-such-folder"},
    ],
    ids=str,
)
def test_wrong_options(backbone, wrong):
    with pytest.raises(ConfigError):
        study_similarity(backbone, taps=TAPS, **wrong)


@pytest.mark.long
def test_the_command_writes_a_page_with_the_papers_figures_beside(tiny_sd_folder, tmp_path):
    options = ["--taps", "mid_block,up_blocks.1", "--timesteps", "50,261", "--scales", "1,4"]
    options += ["--per-pattern", "1", "--seeds", "1", "--clip", "none"]
    result = CliRunner().invoke(
        app,
        ["study", "similarity", "-b", str(tiny_sd_folder), "-o", str(tmp_path), *options],
    )
    assert result.exit_code == 0, result.output
    page = (tmp_path / "similarity.md").read_text("utf-8")
    for words in ("Digitised", "U-L2-R2-Res-Out", "undecided", "own noise", "`mid_block`"):
        assert words in page
    with Image.open(tmp_path / "similarity.png") as picture:
        assert min(picture.size) > 300
    wrong = CliRunner().invoke(app, ["study", "similarity", "--scales", "1,x", "-o", str(tmp_path)])
    assert wrong.exit_code == 2
    assert "guidance scales must be like 1,1.5,4" in wrong.output


@pytest.mark.long
def test_pairs_of_the_real_layout_are_read_and_broken_ones_refused(
    tiny_sdxl_folder, tmp_path_factory
):
    folder = evals_data.mmvp_vlm(tmp_path_factory.mktemp("mmvp-vlm"))
    study = study_similarity(
        str(tiny_sdxl_folder), data=folder, clip="shapes-clip", timesteps=[50], seeds=2
    )
    assert (study.data, study.settings["pairs"]) == ("MMVP-VLM", 9)
    assert "U-L1-R1-B0-Cross-Q" in study.taps
    embedding, tokens = (study.find(name, "pair", "image") for name in CLIP)
    assert -1 <= embedding.mean <= 1
    assert embedding.values[0] == pytest.approx(embedding.values[1])  # CLIP has no noise
    assert tokens.mean != embedding.mean
    next(folder.rglob("*.jpg")).unlink()
    with pytest.raises(ConfigError, match="missing pictures"):
        study_similarity(str(tiny_sdxl_folder), data=folder, clip=None, timesteps=[50], seeds=1)
