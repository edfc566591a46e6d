"""Aliases without their dot and short names of dtypes: every entry takes both spellings."""

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from diffenc import (
    CrossAttnScorer,
    DiffusionEncoder,
    DiffusionVLM,
    FusedEncoder,
    list_backbones,
    list_taps,
    load_backbone,
)
from diffenc.cli.main import app
from diffenc.errors import BackboneError, ConfigError
from diffenc.extraction.extractor import Extractor
from diffenc.hosts.spec import TowerSpec
from diffenc.mllm.training.downloads import _download
from diffenc.models import describe, model_name, resolve_folder
from diffenc.models.device import as_dtype, named_dtype
from diffenc.models.encoder_folder import is_saved, read_source
from diffenc.models.sources import DOTLESS, SOURCES
from diffenc.shapes import render, sample_scenes

ALIASES = [alias for alias in SOURCES if "." in alias]
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_may_be_without_its_dot(alias, tmp_path):
    short = alias.replace(".", "")
    assert DOTLESS[short] == model_name(short) == alias
    assert TowerSpec(model=short) == TowerSpec(model=alias)
    assert TowerSpec.parse(f"diffenc:{short}") == TowerSpec.parse(f"diffenc:{alias}")
    assert model_name(read_source(short, tmp_path)) == alias
    if alias != "sd3.5-medium":  # its U-Net takes seconds to describe
        assert describe(short) == describe(alias)
        assert list_taps(short) == list_taps(alias)


def test_the_plan_of_a_training_knows_where_a_short_alias_leads():
    told = [_download("model.encoder", name, 1.0) for name in ("sd21-base", "sd2.1-base")]
    assert told[0].repository == told[1].repository == SOURCES["sd2.1-base"].hub_ids[0]


def test_no_two_aliases_are_alike_without_dots():
    assert len(DOTLESS) == len(list_backbones())


def test_the_short_alias_wins_over_a_folder_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd21").mkdir()
    (tmp_path / "sd21" / "config.json").write_text("{}")
    assert model_name("sd21") == "sd2.1"
    assert not is_saved(model_name("sd21"))
    for folder in ("./sd21", tmp_path / "sd21"):
        assert model_name(folder) == str(tmp_path / "sd21")
        assert is_saved(model_name(folder))


def test_the_program_takes_it_and_so_does_a_download(monkeypatch, tmp_path):
    picture, asked = tmp_path / "a.png", []
    render(next(iter(sample_scenes(1, seed=0)))).save(picture)

    def hub_folder(hub_id, *_args, **_options):
        asked.append(hub_id)
        raise BackboneError("none here")

    monkeypatch.setattr("diffenc.models.sources.hub_folder", hub_folder)
    for call in (load_backbone, resolve_folder, DiffusionEncoder.from_pretrained):
        with pytest.raises(BackboneError, match="none here"):
            call("sd21")
    assert "none here" in run("encode", picture, "-m", "sd21").output
    assert set(asked) == {*SOURCES["sd2.1"].hub_ids}


@pytest.mark.parametrize(("long", "short"), NAMES.items())
def test_a_dtype_has_two_names(long, short, tiny_sd_folder):
    dtype = getattr(torch, long)
    for name in (long, short, f"torch.{long}", dtype):
        assert as_dtype(name) == dtype
    assert named_dtype(long) == named_dtype(short) == dtype
    for name in (long, short):
        assert DiffusionEncoder.from_pretrained(tiny_sd_folder, dtype=name).dtype == dtype
        spec = TowerSpec(model="shapes", dtype=name)
        assert spec.dtype == short
        assert spec == TowerSpec.parse(f"diffenc:shapes?dtype={name}")
        assert str(spec) == f"diffenc:shapes?dtype={short}"
        assert replace(spec, dtype=long) == spec
        Extractor("shapes", dtype=name, output_dtype=name, maps=True)


def test_models_of_two_parts_take_both_names_of_a_dtype(tmp_path):
    FusedEncoder("shapes-clip", "shapes").save_pretrained(tmp_path / "fused")
    DiffusionVLM("shapes", "shapes-lm").save_pretrained(tmp_path / "vlm")
    for name in ("bf16", "bfloat16"):
        assert FusedEncoder.from_pretrained(tmp_path / "fused", dtype=name).dtype == torch.bfloat16
        vlm = DiffusionVLM.from_pretrained(tmp_path / "vlm", dtype=name)
        assert vlm.encoder.dtype == vlm.language_model.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="dtype must be one of"):
        DiffusionVLM.from_pretrained(tmp_path / "vlm", dtype="int8")


def test_the_program_and_an_index_take_both_names_of_a_dtype(tmp_path):
    (scene,) = sample_scenes(1, seed=0)
    render(scene).save(tmp_path / "a.png")
    scorer = CrossAttnScorer.from_pretrained("shapes", timesteps=(50,), mode="shared-query")
    for name in ("fp16", "float16"):
        output = tmp_path / f"{name}.safetensors"
        done = run("encode", tmp_path / "a.png", "-o", output, "--output-dtype", name)
        assert "float16" in done.output
        scorer.build_index([tmp_path / "a.png"], tmp_path / name, dtype=name)
        assert '"dtype": "float16"' in (tmp_path / name / "bank.json").read_text()
    wide = run("encode", tmp_path / "a.png", "-o", tmp_path / "w.safetensors", "--dtype", "bf16")
    assert "bfloat16" in wide.output
