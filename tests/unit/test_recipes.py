from functools import cache

import pytest
from typer.testing import CliRunner

from diffenc.cli.main import app
from diffenc.errors import ConfigError
from diffenc.evals.paper import published_table
from diffenc.mllm.recipes import chain, recipe, recipes
from diffenc.mllm.training import meta, plan
from diffenc.mllm.training.config import TrainConfig
from diffenc.models import describe

PLANNED = ("dinov2-instruct", "cross-instruct-s4")


@pytest.fixture(scope="module")
def real_size():
    """Equal models are built once."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((plan, "meta_language_model"), (meta, "_vision_model")):
            patch.setattr(module, name, cache(getattr(module, name)))
        yield


def options_of(name):
    return recipe(name).values["model"].get("options", {})


# Channels, and image pixels per side of a cell, of the features in the later version's table 1.
@pytest.mark.parametrize(
    ("tap", "channels", "reduction"),
    [
        ("d-l2-r0-b0-cross-q", 1280, 32),
        ("u-l1-r1-b0-cross-q", 1280, 32),
        ("u-l1-r1-b0-out", 1280, 32),
        ("u-l1-r2-b0-cross-q", 1280, 32),
        ("u-l2-r1-b0-cross-q", 640, 16),
        ("u-l2-r2-res-out", 640, 16),
    ],
)
def test_features_are_read_where_the_paper_reads_them(tap, channels, reduction):
    first, second = (recipe(f"sd21-{tap}-t50-{stage}") for stage in ("align", "instruct"))
    assert first.values["model"]["options"] == second.values["model"]["options"]
    (place,) = describe("sd2.1").match_taps(options_of(first.name)["taps"])
    assert (place.channels, place.reduction) == (channels, reduction)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in PLANNED else pytest.mark.slow) for name in recipes()],
)
def test_a_recipe_plans_at_real_size(real_size, name):
    made = plan.make_plan(recipe(name).config(), processes=8, tflops=300, samples=665_298)
    assert made.parameters["language model"] == 6_738_415_616  # Vicuna-7B
    tokens = {"clip": 576, "concat": 576, "cross": 576, "dinov2": 256, "sdxl": 256}
    sd = 1024 if "-l2-r1" in name or "res-out" in name else 256
    assert made.tokens_per_image == tokens.get(name.split("-")[0], sd)
    assert ("unet LoRA" in made.trained) == ("lora" in name)
    assert ("mixer" in made.trained) == name.startswith("cross")
    assert ("language model" in made.trained) == ("instruct" in name)
    assert "lmsys/vicuna-7b-v1.5" in {each.repository for each in made.downloads}
    assert made.fits[80]["zero3"]


def test_recipes_are_the_trainings_of_both_versions():
    scales = {
        name: (options_of(name).get("conditioning"), options_of(name).get("guidance_scale"))
        for name in recipes()
    }
    assert scales["sdxl-align-gt"] == ("cond", None)
    assert scales["sdxl-align-gt-s4.5"] == ("cfg", 4.5)
    assert scales["sdxl-align-gt-s7"] == ("cfg", 7.0)
    assert scales["sdxl-lora-instruct-noisy-c"] == ("concat", None)
    assert scales["cross-instruct-s0"] == ("uncond", None)
    assert scales["cross-instruct-s4"] == scales["sd21-align-drop-s4"] == ("cfg", 4.0)
    prompts = {name: each.values["data"]["prompts"] for name, each in recipes().items()}
    assert prompts["concat-align"] == prompts["cross-align"] == "empty"  # no text in stage 1
    assert prompts["cross-instruct-s4"] == "question"
    assert prompts["sdxl-align-noisy-c"] == "caption | noisy(0.3)"
    assert prompts["sdxl-align-drop-s1.5"] == "caption | dropout(0.3)"
    places = [row.labels[1:] for row in published_table("later-features").rows[1:]]
    for tap, timestep in places:
        name = f"sd21-{tap.lower()}-t{timestep.removeprefix('t = ')}-instruct"
        assert options_of(name)["taps"] == [tap]
        assert f"t = {options_of(name)['timestep']}" == timestep
    assert sum("b0" in name or "res-out" in name for name in recipes()) == 2 * len(places)


def test_a_training_follows_those_that_it_begins_with():
    names = list(recipes())
    for name, each in recipes().items():
        assert (each.stage == "instruct") == bool(each.start)
        if each.start:
            assert names.index(each.start) < names.index(name)
            first = recipe(each.start).values
            assert each.values["model"]["start"] == f"{first['output']}/model"
            for key in ("kind", "encoder", "clip", "how", "mixing"):
                assert each.values["model"].get(key) == first["model"].get(key)
    assert [each.name for each in chain("cross-instruct-s4")] == [
        "cross-align",
        "cross-instruct-s4",
    ]


@pytest.mark.parametrize("miniature", [False, True], ids=["real", "shapes"])
def test_the_toml_of_a_recipe_is_its_config(tmp_path, miniature):
    for name, each in recipes().items():
        sized = each.in_miniature() if miniature else each
        path = tmp_path / f"{name}.toml"
        path.write_text(sized.to_toml())
        assert TrainConfig.read(path) == sized.config()


def test_what_the_paper_leaves_open_is_marked():
    text = recipe("cross-align").to_toml()
    for key in ("taps", "size", "resize", "asks", "annotations"):
        before, _, _ = text.partition(f"\n{key} = ")
        assert "[?]" in before.splitlines()[-1] or "[?]" in before.splitlines()[-2], key
    assert "[?] Rank" in recipe("sdxl-lora-instruct-gt").to_toml()
    assert max(map(len, (line for line in text.splitlines() if line.startswith("#")))) <= 100


def run(*arguments):
    return CliRunner().invoke(app, ["recipes", *map(str, arguments)], prog_name="diffenc")


def test_the_command_lists_prints_and_writes(tmp_path):
    listed = run().output
    assert all(name in listed for name in recipes())
    assert run("clip-align").output == recipe("clip-align").to_toml()
    assert run("cross-align", "--shapes").output == recipe("cross-align").in_miniature().to_toml()
    folder = tmp_path / "some" / "recipes"
    assert run("cross-instruct-s4", "--write", folder).exit_code == 0
    assert {path.stem for path in folder.iterdir()} == {"cross-align", "cross-instruct-s4"}
    again = run("cross-instruct-s4", "--write", folder)
    assert (again.exit_code, again.output.count("exists already")) == (2, 1)
    assert "wrote 48 files" in run("--write", folder, "--force").output
    assert {path.stem for path in folder.iterdir()} == set(recipes())
    assert "--force belongs to --write" in run("--force").output


def test_an_unknown_recipe_is_told_with_what_is_near():
    with pytest.raises(ConfigError, match=r"no recipe 'cros-align'\. Did you mean 'cross-align'"):
        recipe("cros-align")
