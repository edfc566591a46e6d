import json
import re

import pytest
from typer.testing import CliRunner

from diffenc import list_backbones, list_taps, load_backbone
from diffenc.cli.main import app
from diffenc.denoiser.shortening import shortened


def run(*arguments):
    return CliRunner().invoke(app, ["info", *map(str, arguments)])


def test_without_a_model_aliases_are_listed():
    table, values = run(), json.loads(run("--json").output)
    assert table.exit_code == 0
    for source, value in zip(list_backbones(), values, strict=True):
        assert f"  {source.alias} " in table.output
        assert all(hub_id in table.output for hub_id in source.hub_ids)
        assert value["alias"] == source.alias
        assert isinstance(value["here"], bool)


@pytest.mark.parametrize("kind", ["tiny_sd_folder", "tiny_sdxl_folder"])
def test_numbers_from_configs_equal_those_of_the_loaded_model(kind, request):
    folder = request.getfixturevalue(kind)
    result = run(folder, "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.output)
    backbone = load_backbone(folder)
    parts = {
        name: sum(weight.numel() for weight in module.parameters())
        for name, module in backbone.parts().items()
    }
    assert {part["name"]: part["parameters"] for part in values["components"]} == parts
    assert all(part["bytes_on_disk"] > 4 * part["parameters"] for part in values["components"])
    short = shortened(backbone.unet, backbone.default_taps)
    expected = sum(weight.numel() for weight in short.parameters())
    assert values["truncated_unet_parameters"] == expected < parts["unet"]
    unet = values["components"][0]
    assert unet["memory_bytes"] == {
        "float32": 4 * parts["unet"],
        "float16": 2 * parts["unet"],
        "bfloat16": 2 * parts["unet"],
    }
    assert values["family"] == backbone.family
    assert values["default_size"] == backbone.default_size
    assert values["latent_reduction"] == backbone.reduction
    assert values["prediction_type"] == backbone.prediction_type
    taps = [(tap["name"], tap["channels"], tap["reduction"]) for tap in values["taps"]]
    assert taps == [(tap.name, tap.channels, tap.reduction) for tap in list_taps(folder)]


def test_main_and_default_taps_are_shown_and_all_on_request(tiny_sd_folder):
    short, long = run(tiny_sd_folder).output, run(tiny_sd_folder, "--all").output
    rows = {line.split()[0]: line.split() for line in short.splitlines() if "blocks." in line}
    assert rows["up_blocks.3.attentions.1"][1:] == ["8", "8", "8", "x", "8"]
    assert rows["up_blocks.1.resnets.2"][-1] == "yes"
    assert "up_blocks.1.resnets.1" not in rows
    assert "up_blocks.1.resnets.1 " in long
    assert f"of {len(list_taps(tiny_sd_folder))} taps shown; --all" in short
    assert "not here" not in short
    assert re.search(r"truncate=True .*: [\d,]+ of [\d,]+ U-Net parameters, .* less", short)


def test_weights_are_not_needed(tiny_sd_folder, tmp_path):
    for file in tiny_sd_folder.rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            copy = tmp_path / file.relative_to(tiny_sd_folder)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(file.read_bytes())
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    assert result.output.count("not here") == 3
    (tmp_path / "text_encoder/config.json").write_text('{"hidden_size": "wide"}')
    result = run(tmp_path)
    assert result.exit_code == 2
    assert result.output.startswith(f"error: cannot build text_encoder of {tmp_path}")


@pytest.mark.parametrize(
    ("model", "message"),
    [("sd3", "Did you mean"), ("no/model", "cannot get 'no/model'"), (".", "no diffusers folder")],
)
def test_unknown_or_absent_models(model, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    result = run(model)
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert message in result.output
    assert result.output.count("\n") == 1


def test_aliases_are_described_without_weights_and_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    result = run("sd2.1", "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.output)
    assert values["folder"] is None
    assert values["prediction_type"] == "v_prediction"
    assert values["components"][0]["parameters"] == 865_910_724
    assert sum(tap["default"] for tap in values["taps"]) == 4
