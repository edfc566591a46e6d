import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from diffenc.cli.main import app
from diffenc.denoiser.registers import register_cells
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError, TapError
from diffenc.models import describe, load_backbone
from diffenc.models.tap_names import paper_name
from diffenc.shapes import render
from diffenc.studies.registers import decoder_taps, first_share, kind_of, study_registers
from diffenc.studies.registers_page import findings_of
from diffenc.studies.trials import sample_trials

OUT = "up_blocks.1.attentions.0.transformer_blocks.0"
TAPS = (OUT, f"{OUT}.attn2.to_q")


@pytest.fixture(scope="module")
def backbone(tiny_sd_folder):
    return load_backbone(str(tiny_sd_folder))


@pytest.fixture(scope="module")
def planted(backbone):
    """The study of a model whose block has a long cell in row 1, column 3 of every picture."""

    def plant(module, args, out):
        side = round(out.shape[1] ** 0.5)
        out = out.clone()
        out[:, side + 3] = 100 * out.norm(dim=2).max()
        return out

    handle = backbone.denoiser.get_submodule(OUT).register_forward_hook(plant)
    try:
        return study_registers(
            backbone, taps=TAPS, timesteps=(261, 50), scenes=5, seeds=2, size=128
        )
    finally:
        handle.remove()


def test_planted_registers_are_counted_placed_and_weighed(planted, backbone):
    assert (planted.timesteps, len(planted.rows)) == ((50, 261), 4)
    row = planted.find(OUT, 261)
    side = 128 // backbone.match_taps([OUT])[0].reduction
    assert row.count.values == row.pictures.values == (1.0, 1.0)
    assert row.place == pytest.approx((1 / (side - 1), 3 / (side - 1)))
    assert row.there == 1
    assert row.first.mean > 0.95 > row.first_without.mean
    assert row.largest.mean > 50
    json.dumps(planted.to_dict(), allow_nan=False)


def test_taps_of_the_kinds_are_compared(planted):
    (finding,) = findings_of(planted)
    assert finding.finding.statement.startswith("Out taps hold more registers")
    assert len(finding.decisions) == 2


def test_figures_are_those_of_the_maps(backbone):
    study = study_registers(backbone, taps=TAPS, timesteps=(50,), scenes=4, seeds=1, ratio=1.2)
    encoder = DiffusionEncoder.from_pretrained(backbone, taps=TAPS, timestep=50)
    images = [render(trial.scene, 64) for trial in sample_trials(4, seed=0)]
    maps = encoder.extract(images)[OUT]
    cells = register_cells(maps, ratio=1.2)
    row = study.find(OUT, 50)
    assert row.count.mean == pytest.approx(float(cells.sum()) / 4)
    assert row.pictures.mean == pytest.approx(float(cells.flatten(1).any(dim=1).float().mean()))
    flat = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1]).double().numpy()
    values = np.linalg.svd(flat - flat.mean(axis=0), compute_uv=False) ** 2
    assert row.first.mean == pytest.approx(values[0] / values.sum(), rel=1e-4)


def test_features_that_do_not_vary_have_no_first_component():
    assert first_share(torch.ones(5, 3)) == 0
    assert first_share(torch.tensor([[1.0, 0], [2, 0], [4, 0]])) == pytest.approx(1)


def test_kinds_are_told_by_the_end_of_names():
    kinds = {"U-L1-R1-B0-Cross-Q": "cross-q", "U-L1-R1-B0-Out": "out", "U-L2-R2-Res-Out": "res-out"}
    assert {name: kind_of(name) for name in kinds} == kinds
    assert kind_of("up_blocks.1") is None


def test_the_taps_of_a_decoder_are_found_in_every_family():
    for name in ("shapes", "sd2.1", "sdxl"):
        names = map(paper_name, decoder_taps(describe(name).taps()))
        assert {kind_of(each) for each in names} == {"cross-q", "out", "res-out"}
    with pytest.raises(TapError, match="none of the usual taps"):
        decoder_taps([tap for tap in describe("shapes").taps() if tap.name == "conv_in"])


@pytest.mark.parametrize(
    "wrong",
    [{"scenes": 1}, {"seeds": 0}, {"timesteps": [50, 50]}, {"ratio": 1.0}, {"images": []}],
    ids=str,
)
def test_wrong_options(backbone, wrong):
    options = {"taps": TAPS, "scenes": 2, "seeds": 1, "timesteps": [50]} | wrong
    with pytest.raises(ConfigError):
        study_registers(backbone, **options)


@pytest.mark.long
def test_the_command_reads_pictures_of_yours(tiny_sd_folder, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "mine.png")
    options = ["--image", str(tmp_path / "mine.png"), "--seeds", "1", "--timesteps", "50"]
    result = CliRunner().invoke(
        app,
        ["study", "registers", "-b", str(tiny_sd_folder), "-o", str(tmp_path / "out"), *options],
    )
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out" / "registers.md").read_text("utf-8")
    assert "1 picture per seed" in " ".join(page.split())  # lines break where the path puts them
    assert "registers a picture" in result.stdout
    with Image.open(tmp_path / "out" / "registers.png") as picture:
        assert min(picture.size) > 300
